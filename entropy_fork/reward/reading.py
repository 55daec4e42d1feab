r"""What an answer is: a number, a list, a relation, a quantity, words, … A function here for each kind.

:func:`read` asks the functions of :data:`READERS` in their order; the first that knows the tokens decides. What no
other one knows is a formula, which math-verify's parser must read, or else text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from entropy_fork.reward.expression import expression_of, rows_of
from entropy_fork.reward.numbers import Number, number_of
from entropy_fork.reward.readings import (
    Cases,
    Choice,
    Clock,
    Exact,
    Formula,
    InBase,
    Listed,
    Matrix,
    Measured,
    Modulo,
    Named,
    Percent,
    Ratio,
    Reading,
    Related,
    SetOf,
    Text,
)
from entropy_fork.reward.tokens import (
    Tokens,
    Unreadable,
    deepest,
    group_end,
    in_one_piece,
    split,
    strip,
    tokens_of,
    without_spaces,
    word_of,
)
from entropy_fork.reward.units import Unit, unit_of
from entropy_fork.reward.words import (
    AND,
    CURRENCY_WORDS,
    NUMBER_WORDS,
    ORDINAL_ENDS,
    ORDINAL_WORDS,
    SCALES,
    chinese_number,
    number_in_words,
)

#: more items, signs of plus or minus, or brackets within brackets are not read
MAX_ITEMS, MAX_SIGNS, MAX_NESTED = 200, 3, 40


def read(text: str) -> Reading:
    """Read a spelled text. What cannot be read is a text, too."""
    unread = Text("".join(text.split()).lower(), False)
    try:
        tokens = tokens_of(_without_commas(text))
        if deepest(tokens) > MAX_NESTED:
            return unread
        return read_tokens(tokens, grouped=_GROUPED.search(text) is not None)
    except (Unreadable, RecursionError):
        return unread


_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def _without_commas(text: str) -> str:
    """``1,000`` is 1000, outside of brackets. So say math-verify and most people; with a space it is a list."""
    if "," not in text:
        return text
    depth, inside = 0, []
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        inside.append(depth > 0)

    def joined(match: re.Match[str]) -> str:
        return match[0] if inside[match.start()] else match[0].replace(",", "")

    return _GROUPED.sub(joined, text)


def read_tokens(tokens: Tokens, grouped: bool = False) -> Reading:
    """Read tokens by the first of :data:`READERS` that knows them."""
    tokens = strip(tokens)
    text = in_one_piece(tokens)
    if not tokens:
        return Text("", False)
    for reader in READERS:
        found = reader(tokens, text)
        if found is not None:
            return Exact(found.text, found.number, grouped) if grouped and isinstance(found, Exact) else found
    return Text(text, any(word_of(token) for token in tokens))


def _environment(tokens: list[str], text: str) -> Reading | None:
    r"""``\begin{pmatrix}…``, ``\begin{cases}…``, also in brackets."""
    while len(tokens) > 2 and tokens[0] in ("(", "[", "{", "\\{") and group_end(tokens, 0) == len(tokens) - 1:
        tokens = strip(tokens[1:-1])
    if not tokens or not tokens[0].startswith("\\begin") or group_end(tokens, 0) != len(tokens) - 1:
        return None
    kind = tokens[0][7:-1].rstrip("*")
    inner = tokens[1:-1]
    if kind in ("array", "tabular") and inner[:1] == ["{"]:
        inner = inner[group_end(inner, 0) + 1 :]
    rows = tuple(tuple(read_tokens(cell) for cell in row) for row in rows_of(inner))
    if kind in ("cases", "aligned", "align", "gathered", "rcases"):
        flat = [cell for row in rows for cell in row]
        if all(len(row) == 1 for row in rows):
            return Listed(text, tuple(flat), joined_by="and")
        return Cases(text, rows)
    return Matrix(text, rows) if kind in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "Bmatrix") else None


def _choice(tokens: list[str], text: str) -> Reading | None:
    r"""``(C)``, ``\textbf{(C)}\ 12``, ``C. 12``, ``C) 12``: the letter of a multiple choice."""
    match = re.match(
        r"\(([A-Ja-j])\)|([A-J])(?=[.):])", "".join((word_of(t) and t[6:-1]) or t for t in without_spaces(tokens))
    )
    if match is None:
        return None
    rest = strip(tokens)
    length = 3 if match[1] else 2
    while length:
        length -= rest[0] != " "
        rest = rest[1:]
    if match[2] is not None and not strip(rest):
        rest = []
    if strip(rest) and (strip(rest)[0] in (",", ";") or word_of(strip(rest)[0]) in AND):
        return None
    if match[1] and rest and (rest[0] != " " or (match[1].islower() and strip(rest)[:1] == ["("])):
        return None  # (a)(b) is a product
    if match[2] and rest and rest[0] != " ":
        return None  # A:B is a ratio
    content = read_tokens(rest) if strip(rest) else None
    return Choice(text, (match[1] or match[2]).upper(), content)


def _list(tokens: list[str], text: str) -> Reading | None:
    r"""Items with commas, semicolons, ``\quad``, "and" or "or" between them."""
    joins = {token for token in tokens if word_of(token) in AND}
    parts, found = split(tokens, {",", ";", "\\quad", "\\\\"} | joins)
    if not found or (joins and _said(tokens) is not None):
        return None
    items = [part for part in parts if part]
    if len(items) > MAX_ITEMS or not items:
        return None
    if len(items) == 1:
        return read_tokens(items[0])
    words = {word_of(sign) for sign in found} & AND
    by = "or" if words & {"or", "或", "或者"} else "and" if words else ","
    return Listed(text, _with_their_name(_flat([read_tokens(item) for item in items])), joined_by=by)


def _flat(items: Sequence[Reading]) -> list[Reading]:
    r"""``1, \pm 2`` is a list of three."""
    flat: list[Reading] = []
    for item in items:
        flat += item.items if isinstance(item, Listed) and item.joined_by == "±" else [item]
    return flat


def _with_their_name(items: list[Reading]) -> tuple[Reading, ...]:
    """``n = 1, 2, 3`` says n three times."""
    first = items[0]
    if (
        isinstance(first, Related)
        and first.signs == ("=",)
        and not any(isinstance(item, Related) for item in items[1:])
    ):
        rest = [Related(f"{first.parts[0].text}={item.text}", (first.parts[0], item), ("=",)) for item in items[1:]]
        return (first, *rest)
    return tuple(items)


_SIGNS = {
    "=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in", "\\notin": "notin",
    "\\equiv": "=",
    "\\approx": "≈", "\\sim": "~", "\\to": "->", "\\subset": "⊂", "\\subseteq": "⊆", "\\mapsto": "->", "\\iff": "<->",
    "\\perp": "⊥", "\\parallel": "∥", "\\propto": "∝",
}  # fmt: skip


def _modulo(tokens: list[str], text: str) -> Reading | None:
    r"""``n \equiv 2 \pmod 5``, ``42 \mod 100``, ``2 (\mod 5)``."""
    for place, token in enumerate(tokens):
        if token in ("\\pmod", "\\mod", "\\pod"):
            residue, modulus = tokens[:place], without_spaces(tokens[place + 1 :])
            if residue and residue[-1] == "(" and modulus and modulus[-1] == ")":
                residue, modulus = residue[:-1], modulus[:-1]
            if strip(residue) and modulus and not set(modulus) & set(_SIGNS):
                return Modulo(text, read_tokens(residue), read_tokens(modulus))
    return None


def _relation(tokens: list[str], text: str) -> Reading | None:
    """Equations, inequalities and their chains."""
    parts, signs = split(tokens, _SIGNS)
    if not signs:
        return None
    if not all(parts):
        return Text(text, False)
    if "\\approx" in signs and "=" not in signs[signs.index("\\approx") :]:
        place = signs.index("\\approx")  # 2\sqrt{2} \approx 2.83 says the first, x \approx 2.83 the second
        if place or len(without_spaces(parts[0])) > 1 or not parts[0][0].isalpha():
            return read_tokens(tokens[: tokens.index("\\approx")])
        signs = ["=" if sign == "\\approx" else sign for sign in signs]
    return Related(text, tuple(read_tokens(part) for part in parts), tuple(_SIGNS[sign] for sign in signs))


def _set(tokens: list[str], text: str) -> Reading | None:
    r"""``\mathbb{R}``, ``\emptyset``, and sets with ``\cup``, ``\cap`` or ``\setminus`` between them."""
    if text in ("\\emptyset", "\\{\\}"):
        return Named(text, "")
    if match := re.fullmatch(r"\\mathbb\{?([RZNQC])\}?", text):
        return Named(text, match[1])
    parts, signs = split(tokens, {"\\cup", "\\cap", "\\setminus"})
    if not signs or not all(parts):
        return None
    return SetOf(text, tuple(read_tokens(part) for part in parts), tuple(sign[1:] for sign in signs))


_PAIRS = {"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle", "{": "}"}
_SHORT = {"\\{": "{", "\\}": "}", "\\langle": "<", "\\rangle": ">"}


def _brackets(tokens: list[str], text: str) -> Reading | None:
    r"""``(1, 2)``, ``[0, 1)``, ``\{1, 2\}``, ``\langle 1, 2\rangle``, ``\{x \mid x > 3\}``."""
    if tokens[0] not in _PAIRS or group_end(tokens, 0) != len(tokens) - 1:
        return None
    if "\\pm" in tokens and tokens[0] not in ("\\{", "{"):
        return _plus_or_minus(tokens, text)  # two points, or two numbers
    if tokens[0] == "{" and ("\\choose" in tokens or "\\over" in tokens):
        return None
    inner, shape = strip(tokens[1:-1]), _SHORT.get(tokens[0], tokens[0]) + _SHORT.get(tokens[-1], tokens[-1])
    if not inner:
        return None
    if tokens[0] == "\\{":
        for bar in ("\\mid", "|", ":"):
            parts, found = split(inner, {bar})
            if len(found) == 1 and all(parts) and (bar != ":" or _has_relation(parts[1])):
                name, condition = read_tokens(parts[0]), read_tokens(parts[1])
                if isinstance(name, Related) and name.signs == ("in",):  # x \in R | x > 3
                    name = name.parts[0]
                return _named_as(Listed(text, (condition,), "{|}"), name)
    content = read_tokens(inner)
    if tokens[0] == "{" or (shape in ("()", "[]") and not isinstance(content, Listed)):
        return content if tokens[0] == "{" or not isinstance(content, (Formula, Text)) else None
    items = content.items if isinstance(content, Listed) and not content.shape else (content,)
    return Listed(text, items, shape)


def _has_relation(tokens: list[str]) -> bool:
    return bool(split(tokens, _SIGNS)[1])


def _named_as(made: Listed, name: Reading) -> Listed:
    return Listed(made.text, (made.items[0], name), made.shape)


def _plus_or_minus(tokens: list[str], text: str) -> Reading | None:
    r"""``\frac{1\pm\sqrt5}{2}`` is two values. Signs are chosen one by one, but ``\pm`` and ``\mp`` together."""
    places = [place for place, token in enumerate(tokens) if token in ("\\pm", "\\mp")]
    if not places or len(places) > MAX_SIGNS:
        return None
    together = any(tokens[place] == "\\mp" for place in places)
    choices = [(1,) * len(places), (-1,) * len(places)] if together else itertools.product((1, -1), repeat=len(places))
    items: list[Reading] = []
    for chosen in choices:
        made = list(tokens)
        for place, sign in zip(places, chosen, strict=True):
            made[place] = "+" if (tokens[place] == "\\pm") == (sign == 1) else "-"
        items.append(read_tokens(made))
    return Listed(text, tuple(items), joined_by="±")


def _clock(tokens: list[str], text: str) -> Reading | None:
    """``2:30 PM``, ``14:30``, ``2 PM``. A ratio has no second number of two digits below 60."""
    match = re.fullmatch(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))?(am|pm)?", text)
    if match is None or int(match[1]) > 24 or not (match[2] or match[4]):
        return None
    return Clock(text, tuple(int(part or 0) for part in match.groups()[:3]), match[4] or "")


def _ratio(tokens: list[str], text: str) -> Reading | None:
    """``3:2``, ``a:b:c``."""
    parts, found = split(tokens, {":"})
    return Ratio(text, tuple(read_tokens(part) for part in parts)) if found and all(parts) else None


_BASE = re.compile(r"\(?([0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)\)?(?:_\{?\(?(?:base)?|\\base)([0-9]{1,2}|[a-z]+)\)?\}?")


def _in_base(tokens: list[str], text: str) -> Reading | None:
    r"""``1011_2``, ``1A_{16}``, ``(1011)_{\text{two}}``, ``1011 \text{ base } 2``."""
    words = [word_of(token) for token in tokens]
    text = "\\base".join(text.rsplit("base", 1)) if "base" in words and "_" not in tokens else text
    match = _BASE.fullmatch(text)
    if match is None or len(match[1]) > 100:
        return None
    if match[1].isalpha() and not (words[0] or "").isalpha() and (len(match[1]) < 2 or not match[1].isupper()):
        return None  # x_2 is a variable
    base = NUMBER_WORDS.get(match[2], int(match[2]) if match[2].isdigit() else 0)
    digits = match[1].replace(".", "")
    if not 2 <= base <= 36 or (not digits.isdigit() and not all(int(sign, 36) < base for sign in digits)):
        return None
    return InBase(text, match[1].upper().lstrip("0") or "0", str(base))


def _percent(tokens: list[str], text: str) -> Reading | None:
    r"""``50\%``, ``50 percent``."""
    if tokens[-1] in ("%", "\\%") or word_of(tokens[-1]) in ("percent", "percentage", "pct"):
        amount = strip(tokens[:-1])
        return Percent(text, read_tokens(amount)) if amount else None
    return None


def _exact(tokens: list[str], text: str) -> Reading | None:
    """A number by itself, also one in words, with a scale, or as an ordinal."""
    number = number_of(tokens)
    if number is not None:
        return Exact(text, number)
    plain = without_spaces(tokens)
    if plain[0] == "\\text{第}" and len(plain) == 2 and plain[1].isdigit():
        return Exact(text, Number(Fraction(int(plain[1]))))
    if word_of(plain[-1]) in ORDINAL_ENDS and plain[0].isdigit() and len(plain) == 2:
        return Exact(text, Number(Fraction(int(plain[0]))))
    if plain[0].isdigit() and plain[1:3] == ["^", "{"] and len(plain) == 5 and word_of(plain[3]) in ORDINAL_ENDS:
        return Exact(text, Number(Fraction(int(plain[0]))))
    value = _said(plain)
    if value is not None:
        return Exact(text, Number(Fraction(value)))
    scale = SCALES.get(word_of(plain[-1]) or "")
    if scale is not None and len(plain) > 1:
        amount = read_tokens(plain[: -2 if plain[-2] == "-" else -1])
        if isinstance(amount, Exact):
            return Exact(
                text, amount.number._replace(value=amount.number.value * scale, place=amount.number.place * scale)
            )
    return None


_ANGLE_FUNCTIONS = {"\\sin", "\\cos", "\\tan", "\\cot", "\\sec", "\\csc"}


def _said(tokens: Tokens) -> int | None:
    """The integer that words say: "twenty-one", "third"."""
    words = [word_of(token) or "" for token in without_spaces(tokens) if token != "-"]
    if not words or not all(words):
        return None
    value = chinese_number(words[0]) if len(words) == 1 else None
    value = number_in_words(words) if value is None else value
    return ORDINAL_WORDS.get(words[0]) if value is None and len(words) == 1 else value


_CURRENCIES = {"\\$": "$", "$": "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹", "¢": "¢"}
_DEGREES = (["^", "\\circ"], ["^", "{", "\\circ", "}"])


def _measured(tokens: list[str], text: str) -> Reading | None:
    r"""A number or expression with a known unit behind it, ``3\text{ cm}^2``, or a currency before it, ``\$5``."""
    plain = without_spaces(_as_words(tokens))
    if len(plain) < 2 or ("\\circ" in tokens and _ANGLE_FUNCTIONS & set(tokens)):
        return None
    if plain[0] in _CURRENCIES or plain[:2] == ["-", "\\$"]:
        sign = ["-"] if plain[0] == "-" else []
        rest = plain[1 + len(sign) :]
        amount = read_tokens(sign + rest)
        unit = unit_of([_CURRENCIES[plain[len(sign)]]])
        if isinstance(amount, Measured) and unit is not None and amount.units[0].powers in (unit.powers, ()):
            amount = amount.amounts[0]
        return Measured(text, (amount,), (unit,)) if unit and _is_amount(amount) else None
    if plain[-1] == ")" and "(" in plain:  # 42 (units)
        begin = len(plain) - 1 - plain[::-1].index("(")
        inside = unit_of(plain[begin + 1 : -1]) if begin else None
        if inside is not None:
            amount = read_tokens(plain[:begin])
            return Measured(text, (amount,), (inside,)) if _is_amount(amount) else None
    if (word_of(plain[0]) or "") in CURRENCY_WORDS:
        amount, unit = read_tokens(plain[1:]), unit_of(plain[:1])
        return Measured(text, (amount,), (unit,)) if unit and _is_amount(amount) else None
    several = _several_amounts(plain, text)
    if several is not None:
        return several
    for begin in range(1, len(plain)):
        if plain[begin].startswith("\\text{") or plain[begin] in _CURRENCIES:
            end = [_CURRENCIES.get(token, token) for token in plain[begin:]]
            unit = unit_of(end)
            if unit is not None:
                amount = read_tokens(
                    tokens[: _place(tokens, begin)] if plain == without_spaces(tokens) else plain[:begin]
                )
                return Measured(text, (amount,), (unit,)) if _is_amount(amount) else None
    return None


def _as_words(tokens: list[str]) -> list[str]:
    r"""Degrees and minutes of arc as words, so that they are units as others."""
    made = list(tokens)
    at = 0
    while at < len(made):
        for shape in _DEGREES:
            if made[at : at + len(shape)] == shape and at:
                rest = strip(made[at + len(shape) :])
                scale = {"C": "celsius", "\\text{C}": "celsius", "F": "fahrenheit", "\\text{F}": "fahrenheit"}.get(
                    "".join(rest[:1])
                )
                end = len(made) if scale and len(rest) == 1 else at + len(shape)
                made[at:end] = [f"\\text{{{scale if scale and len(rest) == 1 else 'degree'}}}"]
        at += 1
    if "\\text{degree}" in made:
        primes = without_spaces(made)
        text = "".join(primes).replace("''", "\\text{arcsecond}").replace("'", "\\text{arcminute}")
        if re.fullmatch(r"-?[\d.]+\\text\{degree\}([\d.]+\\text\{arcminute\})?([\d.]+\\text\{arcsecond\})?", text):
            return re.findall(r"\\text\{\w+\}|[\d.]+|-", text)
    return made


def _place(tokens: list[str], plain_place: int) -> int:
    """The place in tokens with spaces of a token that has this place without them."""
    count = 0
    for place, token in enumerate(tokens):
        if token not in (" ", "\\quad"):
            if count == plain_place:
                return place
            count += 1
    return len(tokens)


def _is_amount(reading: Reading) -> bool:
    return isinstance(reading, (Exact, Formula, Ratio)) or (
        isinstance(reading, Listed) and (reading.joined_by == "±" or len(reading.shape) > 0)
    )


def _several_amounts(plain: list[str], text: str) -> Reading | None:
    """``3 hours 20 minutes``: numbers and units in turn."""
    amounts: list[Reading] = []
    units: list[Unit] = []
    at = 0
    while at < len(plain):
        begin = at
        while at < len(plain) and not plain[at].startswith("\\text{"):
            at += 1
        if plain[begin:at][:1] == [","] or word_of(plain[begin]) == "and":
            return None
        number = number_of(plain[begin:at])
        end = at
        while end < len(plain) and not plain[end][0].isdigit():
            end += 1
        unit = unit_of([token for token in plain[at:end] if word_of(token) != "and"])
        if number is None or unit is None:
            return None
        amounts.append(Exact("".join(plain[begin:at]), number))
        units.append(unit)
        at = end
    return Measured(text, tuple(amounts), tuple(units)) if len(amounts) > 1 else None


def _words(tokens: list[str], text: str) -> Reading | None:
    """Letters in capitals without signs between them, ``ABCD``: a name, and no product."""
    if len(tokens) > 1 and all(len(token) == 1 and "A" <= token <= "Z" for token in tokens):
        return Text(text, True)
    return None


def _formula(tokens: list[str], text: str) -> Reading | None:
    """Everything that is an expression."""
    if "\\ldots" in tokens or (
        len(tokens) > 1 and all(token.startswith("\\text{") or token == " " for token in tokens)
    ):
        return None
    try:
        return Formula(text, expression_of(tokens))
    except Unreadable:
        return None


#: in this order; the first that knows the tokens decides
READERS: tuple[Callable[[list[str], str], Reading | None], ...] = (
    _environment, _choice, _list, _modulo, _relation, _set, _brackets, _clock, _ratio, _in_base, _percent, _exact,
    _measured, _words, _plus_or_minus, _formula,
)  # fmt: skip
