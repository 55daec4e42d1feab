"""Units: what they measure, and how many of the first unit of their kind they are."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import NamedTuple

_TABLE = {
    "length": "m meter meters metre metres 米 1; km kilometer kilometers kilometre kilometres 千米 公里 1000; "
    "dm decimeter decimeters 分米 1/10; cm centimeter centimeters centimetre centimetres 厘米 1/100; "
    "mm millimeter millimeters millimetre millimetres 毫米 1/1000; nm nanometer nanometers 1/1000000000; "
    "in inch inches 127/5000; ft foot feet 381/1250; yd yds yard yards 1143/1250; mi mile miles 201168/125",
    "mass": "g gram grams 克 1; kg kilogram kilograms 千克 公斤 1000; mg milligram milligrams 1/1000; "
    "lb lbs pound pounds 45359237/100000; oz ounce ounces 45359237/1600000; ton tons tonne tonnes 吨 1000000",
    "time": "s sec secs second seconds 秒 1; ms millisecond milliseconds 1/1000; min mins minute minutes 分 分钟 60; "
    "h hr hrs hour hours 小时 3600; day days 天 日 86400; week weeks 周 604800",
    "months": "month months 月 个月 1; yr yrs year years 年 岁 12; decade decades 120; century centuries 1200",
    "volume": "l liter liters litre litres 升 1/1000; ml milliliter milliliters 毫升 1/1000000; dl 1/10000; "
    "cl 1/100000; gal gallon gallons 473176473/125000000000",
    "cups": "cup cups 1; pint pints 2; quart quarts 4",
    "spoons": "teaspoon teaspoons tsp 1; tablespoon tablespoons tbsp 3",
    "dollar": "dollar dollars usd $ 1; cent cents ¢ 1/100",
    "euro": "euro euros eur € 1",
    "pound sterling": "gbp £ 1",
    "yuan": "yuan rmb cny 元 1; 角 1/10",
    "yen": "yen jpy ¥ 1",
    "rupee": "rupee rupees rs inr ₹ 1",
    "angle": "degree degrees deg 度 1; arcminute arcminutes 1/60; arcsecond arcseconds 1/3600",
    "radian": "radian radians rad 1",
    "revolution": "revolution revolutions rev 1",
    "celsius": "celsius 1",
    "fahrenheit": "fahrenheit 1",
    "kelvin": "k kelvin kelvins 1",
    "charge": "c coulomb coulombs 1",
    "field": "t tesla 1",
    "force": "n newton newtons 1",
    "energy": "j joule joules 1; kj 1000; cal calorie calories 523/125",
    "electronvolt": "ev 1; kev 1000; mev 1000000",
    "power": "w watt watts 1; kw kilowatt kilowatts 1000",
    "voltage": "v volt volts 1",
    "current": "amp amps ampere amperes 1",
    "resistance": "ohm ohms 1",
    "frequency": "hz hertz 1; khz 1000; mhz 1000000",
    "pressure": "pa pascal pascals 1; kpa 1000",
    "atmosphere": "atm 1",
    "amount": "mol mole moles 1",
    "knot": "knot knots 1",
    "area": "acre acres 316160658/78125; hectare hectares ha 10000",
    "speed": "mph 1397/3125; kmph kmh kph 5/18",
    "byte": "byte bytes 1; kb 1000; mb 1000000",
    "bit": "bit bits 1",
    # what is counted in questions for schools; other plurals are units too, see NOT_UNITS
    "people": "person persons people 人 1",
    "men": "man men 1",
    "women": "woman women 1",
    "children": "child children 1",
    "students": "student students 1",
    "ways": "way ways 种 1",
    "times": "times 次 1",
    "point": "point points 分数 1",
    "things": "个 只 条 名 本 张 块 件 棵 辆 朵 1",
}

#: name → (what it measures, how many of the first unit of the kind)
UNITS: dict[str, tuple[str, Fraction]] = {}
for _kind, _entries in _TABLE.items():
    for _entry in _entries.split(";"):
        *_names, _factor = _entry.split()
        UNITS |= {name: (_kind, Fraction(_factor)) for name in _names}

#: these say nothing: "12 units"
EMPTY = {"unit", "units", "integer", "integers", "单位"}

#: a plural that is no unit: it scales, or says a direction or a change
NOT_UNITS = {"less", "plus", "minus", "is", "as", "this", "always", "yes", "us", "versus", "pairs", "couples", "others"}


#: kinds that are products of others
_PRODUCTS = {"speed": {"length": 1, "time": -1}, "volume": {"length": 3}, "area": {"length": 2}}


class Unit(NamedTuple):
    """A product of units.

    Attributes:
        powers: what is measured, and its power: ``(("length", 1), ("time", -1))``.
        factor: how many of the first units of these kinds it is.
        text: as it was written.
    """

    powers: tuple[tuple[str, int], ...]
    factor: Fraction
    text: str


_NAMED_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}


def unit_of(tokens: list[str]) -> Unit | None:
    r"""The unit that tokens without spaces spell; None if they spell none.

    >>> unit_of(["\\text{km}", "/", "\\text{h}"]).powers
    (('length', 1), ('time', -1))
    """
    powers: Counter[str] = Counter()
    factor = Fraction(1)
    sign, named, at = 1, 1, 0
    empty = found = False
    while at < len(tokens):
        token = tokens[at]
        word = token[6:-1].lower() if token.startswith("\\text{") else token
        at += 1
        if word in ("/", "per", "an", "a", "each") and found:
            sign = -1
        elif word in ("\\cdot", "·"):
            continue
        elif word in _NAMED_POWERS:
            named = _NAMED_POWERS[word]
        elif word in EMPTY:
            named, empty, found = 1, True, True
            at = _power(tokens, at)[1]
        else:
            if word[:2] in _NAMED_POWERS and word[2:] in UNITS:  # 平方厘米
                named, word = _NAMED_POWERS[word[:2]], word[2:]
            what, one = _kind_of(word)
            if what is None:
                return None
            power, at = _power(tokens, at)
            power *= named * sign
            for part, exponent in _PRODUCTS.get(what, {what: 1}).items():
                powers[part] += exponent * power
            factor *= one**power
            named, found = 1, True
    if not found:
        return None
    known = tuple(sorted((kind, power) for kind, power in powers.items() if power))
    return Unit((), Fraction(1), "") if empty and not known else Unit(known, factor, " ".join(tokens))


def _kind_of(word: str) -> tuple[str | None, Fraction]:
    if word in UNITS:
        return UNITS[word]
    plural = word.isascii() and word.isalpha() and len(word) > 3 and word.endswith("s") and not word.endswith("ss")
    return (f"number of {word}" if plural and word not in NOT_UNITS else None), Fraction(1)


def _power(tokens: list[str], at: int) -> tuple[int, int]:
    """The power written at a place, and the place behind it."""
    rest = tokens[at : at + 5]
    for length, digits in ((2, rest[1:2]), (4, rest[2:3]), (5, rest[2:4])):
        spelled = "".join(digits)
        whole = "".join(rest[:length])
        if whole in (f"^{spelled}", f"^{{{spelled}}}") and spelled.lstrip("-").isdigit() and len(spelled) < 3:
            return int(spelled), at + length
    return 1, at
