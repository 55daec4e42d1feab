r"""The first step of a comparison: rules that change how an answer is spelled, and never what it says.

Each rule is a function from text to text. :data:`SPELLING` has them in the order in which :func:`spelled` applies
them, to the answer and to the ground truth alike. The examples of a rule are tests, and docs/reference/reward.md is
made from them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple


class Rule(NamedTuple):
    """A rule of spelling.

    Attributes:
        name: the name of its function, in words.
        says: what it does, one sentence.
        examples: texts before and after it.
        apply: the rule itself.
    """

    name: str
    says: str
    examples: tuple[tuple[str, str], ...]
    apply: Callable[[str], str]


#: all rules, in the order in which they are applied
SPELLING: list[Rule] = []


def _rule(*examples: tuple[str, str]) -> Callable[[Callable[[str], str]], Callable[[str], str]]:
    def add(function: Callable[[str], str]) -> Callable[[str], str]:
        says = (function.__doc__ or "").splitlines()[0]
        SPELLING.append(Rule(function.__name__.replace("_", " "), says, examples, function))
        return function

    return add


def spelled(text: str) -> str:
    """The text after all rules of spelling. It is text still: nothing is computed."""
    for rule in SPELLING:
        text = rule.apply(text)
    return text


_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "✕": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∙": r"\cdot ", "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "≡": r"\equiv ", "∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ", "∅": r"\emptyset ", "⌀": r"\emptyset ", "∖": r"\setminus ",
    "°": r"^\circ ", "˚": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "′": "'", "″": "''",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "∣": r"\mid ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "∠": r"\angle ", "→": r"\to ", "¬": r"\lnot ",
    "“": '"', "”": '"', "‘": "'", "’": "'", "、": ",", "。": ".", "…": r"\ldots ", "⋯": r"\ldots ", "⁄": "/",
    "\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,", "\u2006": r"\,", "\u200b": "", "\ufeff": "", "\u2060": "",
    "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ",
    "λ": r"\lambda ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ",
    "¼": r"\frac{1}{4}", "½": r"\frac{1}{2}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
}  # fmt: skip
_SUPER = {sign: str(digit) for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {"⁻": "-", "⁺": "+", "ⁿ": "n"}
_SUB = {sign: str(digit) for digit, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")}
_SUPER_RUN, _SUB_RUN = re.compile(f"[{''.join(_SUPER)}]+"), re.compile(f"[{''.join(_SUB)}]+")


@_rule(
    ("１２", "12"), ("٣٤", "34"), ("x²", "x^{2}"), ("6×7", r"6\times 7"), ("2−√3", r"2-\sqrt 3"), ("（1，2）", "(1,2)")
)
def signs_of_other_scripts(text: str) -> str:
    r"""Signs and digits of other scripts become LaTeX and ASCII."""
    if text.isascii():
        return text
    text = _SUPER_RUN.sub(lambda run: f"^{{{''.join(map(_SUPER.__getitem__, run[0]))}}}", text)
    text = _SUB_RUN.sub(lambda run: f"_{{{''.join(map(_SUB.__getitem__, run[0]))}}}", text)
    text = "".join(_SIGNS.get(sign, sign) for sign in text)
    text = "".join(_SIGNS.get(sign, sign) for sign in unicodedata.normalize("NFKC", text))
    return "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else sign for sign in text)


_ENDS = re.compile(r"^(?:\s|\\[,;:! ]|~|\\q?quad(?![a-zA-Z]))+|(?:\s|(?<!\\)\\[,;:!]|~|\\q?quad)+$")


@_rule((r"\,42\;", "42"), (r"42\quad", "42"))
def space_at_the_ends(text: str) -> str:
    r"""Space at the ends goes, in all its spellings."""
    return _ENDS.sub("", text).strip()


_WRAPPED = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\*\*(?!\*)(.+?)\*\*", r"\*([^*]+)\*", r"__(.+?)__", r"`+([^`]+)`+", r"\$\$([^$]+)\$\$", r"\$([^$]+)\$",
        r"\\\((.+?)\\\)",        r"\\\[(.+?)\\\]", r'"([^"]+)"', r"``(.+?)''", r"'([^']+)'",
    )
]  # fmt: skip
_MARKS = (*"*_`$\"'", r"\boxed", r"\fbox", r"\[", r"\(")
_WHOLE_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.DOTALL)


@_rule(("**73**", "73"), ("`42`", "42"), ("$$42$$", "42"), (r"\(x\)", "x"), ('"42"', "42"), (r"$\$5$", r"\$5"))
def marks_around(text: str) -> str:
    r"""Marks of Markdown and of formulas around the whole answer go."""
    text = text.strip()
    for _ in range(4):
        before = text
        hidden = text.replace(r"\$", "\ue000")
        hidden = hidden.rstrip(" .,;") if hidden.startswith(_MARKS) else hidden
        for pattern in _WRAPPED:
            if match := pattern.fullmatch(hidden):
                hidden = match[1].strip()
        if (match := _WHOLE_BOX.fullmatch(hidden)) and _balanced(match[1]):
            hidden = match[1].strip()
        text = hidden.replace("\ue000", r"\$")
        if text == before:
            break
    if text.count("$") - text.count(r"\$") >= 2:  # $1$ and $2$
        text = re.sub(r"(?<!\\)\$", " ", text)
    return text


def _balanced(text: str) -> bool:
    depth = 0
    for sign in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth < 0:
            return False
    return depth == 0


_OPTION = re.compile(r"(?:\\text\s*\{)?\s*(?:option|choice)\s+(?=[A-J(])", re.I)
_LABEL = re.compile(
    r"(?:\\text\s*\{)?\s*(?:(?:the|my)\s+)?(?:final\s+)?(?:answer|ans\.?|result|答案)\s*(?:is\b|[:=]|是|为)+\s*:?\s*(\})?",
    re.I,
)


@_rule(("Answer: 42", "42"), ("The final answer is 42", "42"), (r"\text{Answer: }42", "42"))
def label(text: str) -> str:
    r"""A label such as "Answer:" or "Option" goes."""
    if match := _OPTION.match(text):
        return "\\text{" * match[0].startswith("\\") + text[match.end() :]
    match = _LABEL.match(text)
    if match is None or match.end() == len(text) or (match[0].startswith("\\text") and not match[1]):
        return text
    return text[match.end() :].strip()


_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;: ]|\{,\}|,\\!|\{\\,\}|~|\\ | )\s*\d{3})+(?!\d)")
_POINT_OF_PYTHON = re.compile(r"(?<=\d)\.(?=\s*[/*^)}])")
_JOINT = re.compile(r"\\[,;: !]|[{},~\s]")
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")


@_rule(
    (r"1\,000", "1000"),
    (r"1{,}000", "1000"),
    (r"10,\!000", "10000"),
    ("12 345 678", "12345678"),
    ("100{,}5", "100.5"),
    ("3./2", "3/2"),
)
def groups_of_digits(text: str) -> str:
    r"""Three digits with space or a comma are a group. Another comma in braces is a decimal point."""
    text = re.sub(r"(?<=\d),\\!\s*(?=\d)", "{,}", text)

    def joined(match: re.Match[str]) -> str:
        return match[0] if match[0].startswith("0") else _JOINT.sub("", match[0])

    text = _POINT_OF_PYTHON.sub("", text)
    return _DECIMAL_COMMA.sub(".", _GROUPED.sub(joined, text))


_LAYOUT = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|"
    r"tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|it|rm|em|centering|null|relax|mathstrut|strut)(?![a-zA-Z])"
)
_STRETCHED = re.compile(r"\\(?:m?left|m?right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*")
_SPACE = re.compile(r"(?<!\\)\\[,;:! \n\t]|~|\\(?:thin|en|med|thick|negthin|)space(?![a-zA-Z])|\\enskip(?![a-zA-Z])"
                    r"|\\(?:hspace|vspace|phantom|hphantom)\*?\{[^{}]*\}|[\s\x00-\x1f]+")  # fmt: skip


@_rule(
    (r"\displaystyle 42", "42"),
    (r"\left(1,\,2\right)", "(1, 2)"),
    (r"\Large 42", "42"),
    (r"6\!\cdot\!7", r"6 \cdot 7"),
)
def layout(text: str) -> str:
    r"""Sizes, stretched brackets and kinds of space become plain brackets and one space."""
    text = _STRETCHED.sub("", re.sub(r"\\(?:left|right)\s*\.", " ", text))
    text = _SPACE.sub(" ", _LAYOUT.sub(" ", text))
    return re.sub(r" +", " ", text).strip()


_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|up|md)?|mbox|mathrm|mathsf|mathtt|mathit|mathnormal|hbox|emph|textrm)(?![a-zA-Z])\s*(?=\{)"
)
_BOLD = re.compile(r"\\(?:mathbf|boldsymbol|bm|pmb|underline|mathbold)(?![a-zA-Z])\s*\{([^{}a-zA-Z\\]*)\}")
_ONE_LETTER = re.compile(r"\\(mathrm|mathbf|mathit|mathsf|text|boldsymbol)\s+([a-zA-Z0-9])")
_COLOR = re.compile(r"\\(?:color\s*\{[^{}]*\}|textcolor\s*\{[^{}]*\})")
_CONSTANT = re.compile(r"\\text\{\s*([eidj])\s*\}")


@_rule((r"\mathbf{70}", "{70}"), (r"\textbf{Alice}", r"\text{Alice}"), (r"\frac{1}{\mathrm{e}}", r"\frac{1}{e}"),
       (r"1.6\text{e}-19", "1.6e-19"), (r"\underline{42}", "{42}"))  # fmt: skip
def fonts(text: str) -> str:
    r"""A font says nothing: words become \text, and digits, e and i become plain. A bold letter stays bold."""
    if "\\" not in text:
        return text
    text = _ONE_LETTER.sub(r"\\\1{\2}", _COLOR.sub("", text))
    text = _TEXT.sub(r"\\text", text)
    return _CONSTANT.sub(r"\1", _BOLD.sub(r"{\1}", text))


_SAME_COMMAND = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "sfrac": "frac", "nicefrac": "frac", "dbinom": "binom",
    "tbinom": "binom", "leq": "le", "leqslant": "le", "leqq": "le", "geq": "ge", "geqslant": "ge", "geqq": "ge",
    "neq": "ne", "lt": "<", "gt": ">", "varnothing": "emptyset", "ast": "cdot", "times": "cdot", "bullet": "cdot",
    "lvert": "|", "rvert": "|", "vert": "|", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]",
    "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "backslash": "setminus",
    "smallsetminus": "setminus", "degree": "^\\circ", "imath": "i", "jmath": "j", "qquad": "quad", "tg": "tan",
    "ctg": "cot", "arctg": "arctan", "lg": "log", "rightarrow": "to", "cong": "approx", "simeq": "approx",
    "doteq": "=", "coloneqq": "=", "widehat": "hat", "overrightarrow": "vec", "bar": "overline", "land": "wedge",
    "neg": "lnot", "bmod": "mod", "thinspace": " ", "euro": "€", "pounds": "£", "yen": "¥", "percent": "%",
    "operatorname*": "operatorname", "wedge": "wedge", "prime": "'", "exponentialE": "e", "colon": ":",
}  # fmt: skip
_COMMAND = re.compile(r"\\(operatorname\*|[a-zA-Z]+)")
_PLAIN = {"<", ">", "|", "[", "]", "=", "^\\circ", "i", "j", " ", "€", "£", "¥", "%", "'", "e", ":"}


@_rule(
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"x \geq 3", r"x \ge 3"),
    (r"\varnothing", r"\emptyset"),
    ("x<=3", r"x\le 3"),
    ("2**3", "2^3"),
)
def synonyms(text: str) -> str:
    r"""Of several names for one sign, one is kept."""

    def kept(match: re.Match[str]) -> str:
        name = _SAME_COMMAND.get(match[1], match[1])
        return name + " " * name.isalpha() if name in _PLAIN else "\\" + name

    text = _COMMAND.sub(kept, re.sub(r"\\operatorname\s*\{\s*(sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan|"
                                     r"sinh|cosh|tanh|gcd|lcm|max|min|det)\s*\}", r"\\\1 ", text))  # fmt: skip
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ").replace("**", "^")
    return text.replace(r"\not =", r"\ne ").replace(r"\not=", r"\ne ").replace(r"\not\in", r"\notin ")


_ABBREVIATED = re.compile(r"(?<![a-zA-Z\\])([a-z]{2,})\.(?=[ }])")
_HALF_DAY = re.compile(r"(?<![a-zA-Z])([apAP])\.\s*([mM])(?![a-zA-Z])\.?")


@_rule(("2:30 p.m.", "2:30 pm"), ("12 sq. cm", "12 sq cm"))
def abbreviations(text: str) -> str:
    r"""The points in "a.m." and "sq." go."""
    text = _ABBREVIATED.sub(r"\1", text)
    return _HALF_DAY.sub(lambda match: (match[1] + match[2]).lower(), text)


_TAIL = re.compile(r"(?:\s|\\quad|\\\\|\\text\s*\{\s*[.,;:]?\s*\}|[.,;:])+$")
_FULL_STOP = re.compile(r"[.。]\s*\}$")


@_rule(("25.", "25"), ("42,", "42"), (r"42\text{.}", "42"), (r"\text{Tuesday.}", r"\text{Tuesday}"))
def full_stop(text: str) -> str:
    r"""A full stop, a comma or space at the end goes."""
    if text.endswith("..."):
        return text
    short = _TAIL.sub("", text)
    if short.startswith("\\text") and short.count("{") == 1:
        short = _FULL_STOP.sub("}", short)
    return short or text


_LEADING = re.compile(r"^(?:\s|=(?!=)|:|\\approx(?![a-zA-Z])|\\therefore|\\implies|\\Rightarrow|\\quad)+")


@_rule(("= 42", "42"), (r"\approx 3.14", "3.14"))
def sign_before(text: str) -> str:
    r"""An equals sign before everything goes."""
    return _LEADING.sub("", text) or text
