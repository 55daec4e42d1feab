"""Words that say a number, a scale or a function, and how they are told from letters that stand for numbers."""

from __future__ import annotations

from fractions import Fraction

from entropy_fork.reward.units import UNITS

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: value for value, word in enumerate(_SMALL.split())}
NUMBER_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}

_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
ORDINAL_WORDS = {word: value for value, word in enumerate(_ORDINALS.split(), 1)}

#: words that scale the number before them
SCALES: dict[str, int | Fraction] = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "score": 20, "gross": 144, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8,
    "hundreds": 100, "thousands": 10**3, "millions": 10**6, "billions": 10**9, "dozens": 12,
    "half": Fraction(1, 2), "halves": Fraction(1, 2), "third": Fraction(1, 3), "thirds": Fraction(1, 3),
    "quarter": Fraction(1, 4), "quarters": Fraction(1, 4), "fourths": Fraction(1, 4), "fifths": Fraction(1, 5),
    "sixths": Fraction(1, 6), "sevenths": Fraction(1, 7), "eighths": Fraction(1, 8), "ninths": Fraction(1, 9),
    "tenths": Fraction(1, 10), "hundredths": Fraction(1, 100), "thousandths": Fraction(1, 1000),
}  # fmt: skip

ORDINAL_ENDS = {"st", "nd", "rd", "th"}

#: words that join the items of a list
AND = {"and", "or", "和", "或", "或者", "与", "及", "以及", "并且", "且"}

#: short words that are answers, though their letters could be a product
ANSWER_WORDS = {
    "yes", "no", "on", "off", "true", "false", "odd", "even", "and", "or", "both", "all", "none", "any", "up", "down",
    "is", "if", "at", "in", "to", "of", "by", "am", "pm", "not", "the", "for", "per", "sky", "dry", "dne", "tie", "sq",
}  # fmt: skip

_FUNCTIONS = "sin cos tan cot csc log ln exp arcsin arccos arctan sinh cosh tanh gcd lcm pi sqrt"
_OTHERS = "sec infty frac cdot times pm theta alpha beta gamma lambda max min mod cup cap"

#: letters that are a command without its backslash
COMMAND_WORDS = {name: name for name in f"{_FUNCTIONS} {_OTHERS}".split()} | {
    "infinity": "infty", "inf": "infty", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "oo": "infty",
}  # fmt: skip

#: functions that some write as a word
FUNCTION_WORDS = {*_FUNCTIONS.split(), "infinity"}

#: units that need no ``\\text`` behind a number. Short ones are missing: ``5 m`` may be a product
UNIT_WORDS = {name for name in UNITS if len(name) > 2 and name.isascii() and name.isalpha()} | {
    "cm", "mm", "km", "kg", "ft", "yd", "hr", "lb", "oz", "in", "ml", "kw", "am", "pm", "sq", "percent",
    *ORDINAL_ENDS, *(word for word in SCALES if word.isascii()),
}  # fmt: skip

#: currencies by their letters, which may stand before the number
CURRENCY_WORDS = {"usd", "eur", "gbp", "cny", "rmb", "jpy", "inr"}

_CHINESE = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_CHINESE_SCALES = {"十": 10, "百": 100, "千": 1000}


def chinese_number(text: str) -> int | None:
    """The integer below ten thousand that Chinese numerals say; None if they do not.

    >>> chinese_number("二十一")
    21
    """
    total, digit = 0, None
    for sign in text.removeprefix("第"):
        if sign in _CHINESE:
            digit = _CHINESE[sign]
        elif sign in _CHINESE_SCALES:
            total, digit = total + (1 if digit is None else digit) * _CHINESE_SCALES[sign], None
        else:
            return None
    return total + (digit or 0) if text.removeprefix("第") else None


def number_in_words(words: list[str]) -> int | None:
    """The integer that words say; None if they do not.

    >>> number_in_words("two hundred and forty two".split())
    242
    """
    total = current = 0
    said = False
    last = 0
    for word in words:
        if word in NUMBER_WORDS:
            value = NUMBER_WORDS[word]
            if said and last and not ((last >= 20 and value < 10) or last >= 100):
                return None
            current, last, said = current + value, value or 1, True
        elif word == "and" and last >= 100:
            continue
        elif said and SCALES.get(word, 0) in (100, 1000, 10**6, 10**9) and word.isascii():
            scale = int(SCALES[word])
            current, last = current * scale, scale
            if scale > 100:
                total, current = total + current, 0
        else:
            return None
    return total + current if said else None
