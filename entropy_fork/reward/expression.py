r"""From tokens to the LaTeX of an expression that math-verify's parser reads in one way only.

The parser guesses: ``10 20`` is a sum, ``i`` is a variable, ``\gamma-1`` is a function, ``x(y)`` may be a function too.
So every product gets a sign, every argument gets brackets, every decimal becomes a fraction, and every name that is
more than a plain letter becomes ``x_{1}``, ``x_{2}``, …, by a table that holds for the process. So no text of an answer
becomes the name of a symbol.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from entropy_fork.reward.numbers import MAX_DIGITS
from entropy_fork.reward.tokens import Unreadable, depth_change, group_end, without_spaces, word_of

_FUNCTIONS = {
    "\\sin", "\\cos", "\\tan", "\\cot", "\\sec", "\\csc", "\\arcsin", "\\arccos", "\\arctan", "\\sinh", "\\cosh",
    "\\tanh", "\\ln", "\\log", "\\exp",
}  # fmt: skip
_INVERSE = {"\\sin": "\\arcsin", "\\cos": "\\arccos", "\\tan": "\\arctan"}
_SEVERAL = {"\\max", "\\min", "\\gcd", "\\lcm"}
_LETTERS = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar aleph "
    "partial nabla triangle angle parallel star dagger circ square"
)
_GREEK = {"\\" + name for name in _LETTERS.split()}
_ACCENTS = {
    "\\hat", "\\vec", "\\overline", "\\tilde", "\\widetilde", "\\dot", "\\ddot", "\\mathbf", "\\boldsymbol", "\\bm",
    "\\mathcal", "\\mathfrak", "\\mathbb", "\\mathscr", "\\underline",
}  # fmt: skip
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_MATRICES = {f"\\begin{{{kind}}}": f"\\end{{{kind}}}" for kind in ("pmatrix", "bmatrix", "matrix", "vmatrix")}

#: all commands with which a factor begins
_BEGINS = {
    *_BRACKETS, *_FUNCTIONS, *_SEVERAL, *_GREEK, *_ACCENTS, *_MATRICES, "\\frac", "\\sqrt", "\\pi", "\\infty",
    "\\binom", "\\sum", "\\prod", "\\int", "\\lim", "\\lfloor", "\\lceil",
}  # fmt: skip

#: letters that are symbols and nothing else to the parser
_PLAIN_LETTERS = set("abchjklmnopqrstuvwxyz")

#: how deep brackets may be nested
MAX_DEPTH = 40

_names: dict[str, int] = {}


def expression_of(tokens: Sequence[str]) -> str:
    r"""The LaTeX of an expression, to be read by math-verify's parser.

    >>> expression_of(["2", "x", "^", "10"])
    '2\\cdot x^{10}'

    Raises:
        Unreadable: the tokens are no expression.
    """
    writer = _Writer(without_spaces(tokens))
    found = writer.sum()
    if writer.at < len(writer.tokens):
        raise Unreadable(f"{writer.tokens[writer.at]} stands where nothing fits")
    return found


def _symbol(name: str) -> str:
    if name in _PLAIN_LETTERS:
        return name
    return f"x_{{{_names.setdefault(name, len(_names) + 1)}}}"


class _Writer:
    """Reads tokens from left to right, as a sum of products of factors."""

    def __init__(self, tokens: list[str], bound: frozenset[str] = frozenset(), depth: int = 0) -> None:
        self.tokens = tokens
        self.at = 0
        self.bound = bound | (frozenset("i") if "j" in tokens and "i" in tokens else frozenset())
        self.depth = depth
        self.bars = 0
        if depth > MAX_DEPTH:
            raise Unreadable("brackets are nested too deep")

    def inner(self, tokens: list[str], bound: frozenset[str] = frozenset()) -> str:
        writer = _Writer(tokens, self.bound | bound, self.depth + 1)
        found = writer.sum()
        if writer.at < len(writer.tokens):
            raise Unreadable(f"{writer.tokens[writer.at]} stands where nothing fits")
        return found

    def peek(self, ahead: int = 0) -> str:
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else ""

    def sum(self) -> str:
        found = ""
        while True:
            sign = ""
            while self.peek() in ("+", "-"):
                sign = "-" if (sign == "-") != (self.peek() == "-") else "+"
                self.at += 1
            if found and not sign:
                return found
            found += (sign if sign == "-" or found else "") + self.product()

    def product(self) -> str:
        found = self.factor()
        before_is_number = self._was_number
        while True:
            token = self.peek()
            if token in ("\\cdot", "*"):
                self.at += 1
                found = f"{found}\\cdot {self.signed_factor()}"
            elif token in ("/", "\\div"):
                self.at += 1
                found = f"\\frac{{{found}}}{{{self.signed_factor()}}}"
            elif token in ("\\mod",):
                self.at += 1
                found = f"({found}) \\mod {self.signed_factor()}"
            elif self.begins_factor(token):
                if before_is_number and token[0].isdigit():
                    raise Unreadable("two numbers stand side by side")
                mixed = before_is_number and token == "\\frac" and "/" not in found and "\\cdot" not in found
                part = self.factor()
                if mixed and found.isdigit() and _is_proper(part):
                    found = f"({found}+{part})"
                else:
                    found = f"{found}\\cdot {part}"
            else:
                return found
            before_is_number = self._was_number

    def begins_factor(self, token: str) -> bool:
        if token == "|":
            return self.bars == 0
        plain = token[:1].isdigit() or _is_letter(token) or (token[:1] == "." and len(token) > 1)
        return plain or token in _BEGINS or token.startswith("\\text{")

    def signed_factor(self) -> str:
        sign = ""
        while self.peek() in ("+", "-"):
            sign = "" if (sign == "-") == (self.peek() == "-") else "-"
            self.at += 1
        factor = self.factor()
        return f"({sign}{factor})" if sign else factor

    def factor(self) -> str:
        begin = self.at
        base = self.atom()
        self._was_number = self.tokens[begin][0].isdigit() and self.at == begin + 1
        while True:
            token = self.peek()
            if token == "!":
                if self.peek(1) == "!":
                    raise Unreadable("a double factorial")
                base, self.at = f"({base})!", self.at + 1
            elif token in ("%", "\\%"):
                base, self.at = f"\\frac{{{base}}}{{100}}", self.at + 1
            elif token == "^" and self._is_degree():
                base = f"\\frac{{{base}\\cdot \\pi}}{{180}}"
                self._was_number = False
            elif token == "^":
                self.at += 1
                power = self.argument(whole_number=True)
                base = f"{base}^{{{power}}}" if _is_simple(base) else f"({base})^{{{power}}}"
                self._was_number = self.tokens[begin][0].isdigit()
            else:
                return base

    def _is_degree(self) -> bool:
        for shape in (["^", "\\circ"], ["^", "{", "\\circ", "}"]):
            if self.tokens[self.at : self.at + len(shape)] == shape:
                self.at += len(shape)
                return True
        return False

    def group(self) -> list[str]:
        """The tokens within the brackets that begin here."""
        end = group_end(self.tokens, self.at)
        inner = self.tokens[self.at + 1 : end]
        if self.tokens[end] != _BRACKETS.get(self.tokens[self.at], self.tokens[end]):
            raise Unreadable("brackets of two kinds")
        self.at = end + 1
        return inner

    def argument(self, whole_number: bool = False) -> str:
        r"""What a command takes: a group, or one token. ``\frac12`` takes digits, and ``x^10`` takes the number."""
        token = self.peek()
        if token == "{" or (token == "(" and whole_number):
            return self.inner(self.group())
        if token[:1].isdigit() and not whole_number and len(token) > 1:
            self.tokens[self.at] = token[1:]
            return token[0]
        if whole_number and token in ("+", "-"):
            self.at += 1
            return ("-" if token == "-" else "") + self.argument(True)
        if not token:
            raise Unreadable("an argument is missing")
        return self.atom()

    def atom(self) -> str:
        token = self.peek()
        if not token:
            raise Unreadable("something is missing at the end")
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            self.at += 1
            return _number(token)
        if token in _BRACKETS:
            if self._is_choose():
                top, bottom = _parted(self.group(), "\\choose")
                return f"\\binom{{{self.inner(top)}}}{{{self.inner(bottom)}}}"
            if "\\over" in self.tokens[self.at : group_end(self.tokens, self.at)]:
                top, bottom = _parted(self.group(), "\\over")
                return f"\\frac{{{self.inner(top)}}}{{{self.inner(bottom)}}}"
            if token == "{" and self.tokens[self.at : self.at + 3] == ["{", "}", "_"]:
                self.at += 2
                return self.atom()
            inner = self.inner(self.group())
            return inner if inner.isdigit() else f"({inner})"
        if token in ("_", "^"):
            return self.choose_before()
        if token.startswith("\\text{"):
            return self.text()
        if token.isalpha() or token in _GREEK or token in _ACCENTS:
            return self.name()
        if token.startswith("\\") or token == "|":
            return self.command()
        raise Unreadable(f"{token} is no part of an expression")

    def _is_choose(self) -> bool:
        return "\\choose" in self.tokens[self.at : group_end(self.tokens, self.at)]

    def choose_before(self) -> str:
        """``_5C_2`` and ``^5P_2``."""
        self.at += 1
        top = self.argument(whole_number=True)
        kind, self.at = self.peek(), self.at + 1
        if kind not in ("C", "P", "\\text{C}", "\\text{P}") or self.peek() != "_":
            raise Unreadable("an index without a base")
        self.at += 1
        return _chosen(kind, top, self.argument(whole_number=True))

    def text(self) -> str:
        token = self.peek()
        word = token[6:-1]
        neighbours = {self.tokens[self.at - 1] if self.at else "", self.peek(1)}
        self.at += 1
        if len(word) == 1 and word.isascii():
            self.at -= 1
            self.tokens[self.at] = word
            return self.name()
        if not neighbours <= {"", "+", "-", "\\cdot", "_", "="}:
            raise Unreadable(f"the word {word} stands beside an expression")
        return _symbol(self._with_index(f"text {word.lower()}"))

    def name(self) -> str:
        token = self.peek()
        self.at += 1
        if token in _ACCENTS:
            inner = without_spaces(self.group()) if self.peek() == "{" else [self.peek()]
            self.at += self.tokens[self.at - 1] != "}" and inner == [self.peek()]
            text = "".join(word_of(each) or each for each in inner)
            if token in ("\\mathbf", "\\boldsymbol", "\\bm", "\\hat", "\\vec") and text in ("i", "j", "k", "\\imath"):
                return _symbol(self._with_index(f"unit vector {text}"))
            if token in ("\\mathbf", "\\boldsymbol", "\\bm"):
                return _symbol(self._with_index(text))
            return _symbol(self._with_index(f"{token}{{{text}}}"))
        if token == "\\Gamma" and self.peek() == "(":
            return f"({self.inner(self.group())}-1)!"
        if token in ("\\angle", "\\triangle"):
            begin = self.at
            while _is_letter(self.peek()) and self.peek().isupper():
                self.at += 1
            return _symbol(self._with_index(token + "".join(self.tokens[begin : self.at])))
        if token in ("C", "P", "A") and (pair := self._index_and_power()):
            return _chosen(token, *pair)
        if token in ("C", "P") and self.peek() == "(" and (pair := self._two_numbers()):
            return _chosen(token, *pair)
        if token in "fgFG" and self.peek() == "(":
            inner = self.group()
            return _symbol(f"{token}({''.join(inner)})")
        name = self._with_index(token)
        if name == "e":
            return "e"
        if name == "i" and "i" not in self.bound:
            return "I"
        return _symbol(name)

    def _two_numbers(self) -> tuple[str, str] | None:
        inner = self.tokens[self.at + 1 : group_end(self.tokens, self.at)]
        if len(inner) == 3 and inner[1] == "," and inner[0].isdigit() and inner[2].isdigit():
            self.at += 5
            return inner[0], inner[2]
        return None

    def _index_and_power(self) -> tuple[str, str] | None:
        """``C_5^2`` and ``C^2_5``: five choose two."""
        match = re.match(
            r"(?:_\{?(\d+)\}?\^\{?(\d+)\}?|\^\{?(\d+)\}?_\{?(\d+)\}?)(?!\d)",
            (text := "".join(self.tokens[self.at : self.at + 8])),
        )
        if match is None:
            return None
        top, bottom = match[1] or match[4], match[2] or match[3]
        if int(bottom) > int(top):
            return None
        length, end = 0, self.at
        while length < match.end():
            length, end = length + len(self.tokens[end]), end + 1
        self.at = end
        return (top, bottom) if text else None

    def _with_index(self, name: str) -> str:
        while self.peek() in ("_", "'") or self.tokens[self.at : self.at + 2] == ["^", "'"]:
            token = self.peek()
            self.at += 1 + (token == "^")
            if token in ("'", "^"):
                name += "'"
                continue
            inner = self.group() if self.peek() == "{" else [self.peek()]
            self.at += self.tokens[self.at - 1] != "}" or inner == [self.peek()]
            if not inner or not inner[0]:
                raise Unreadable("an index is missing")
            name += "_" + "".join(each[6:-1] if word_of(each) else each.lstrip("\\") for each in inner)
        return name

    def command(self) -> str:
        token = self.peek()
        self.at += 1
        if token == "\\frac" and (name := self.derivative()):
            return _symbol(name)
        if token == "\\frac" or token == "\\binom":
            return f"{token}{{{self.argument()}}}{{{self.argument()}}}"
        if token == "\\sqrt":
            root = self.inner(self.group()) if self.peek() == "[" else ""
            inside = self.inner(self.group()) if self.peek() == "(" else self.argument()
            return f"\\sqrt[{root}]{{{inside}}}" if root else f"\\sqrt{{{inside}}}"
        if token in ("\\pi", "\\infty"):
            return token
        if token in _FUNCTIONS:
            return self.function(token)
        if token in _SEVERAL and self.peek() in ("(", "\\{"):
            arguments = ",".join(self.inner(part) for part in _arguments(self.group()))
            return f"{token}({arguments})" if token != "\\lcm" else f"\\operatorname{{lcm}}({arguments})"
        if token == "|":
            self.bars += 1
            inner = self.sum()
            if self.peek() != "|":
                raise Unreadable("a bar is not closed")
            self.bars, self.at = self.bars - 1, self.at + 1
            return f"|{inner}|"
        if token in ("\\lfloor", "\\lceil"):
            self.at -= 1
            return f"{token} {self.inner(self.group())}\\r{token[2:]} "
        if token in ("\\sum", "\\prod"):
            return self.series(token)
        if token == "\\int":
            return self.integral()
        if token == "\\lim":
            return self.limit()
        if token in _MATRICES:
            self.at -= 1
            return self.matrix(token)
        raise Unreadable(f"{token} is no part of an expression")

    def derivative(self) -> str:
        r"""The name of ``\frac{dy}{dx}``, which is no quotient of products; empty for another fraction."""
        match = re.match(r"\{d([a-zA-Z]?)\}\{d([a-zA-Z])\}", "".join(self.tokens[self.at : self.at + 8]))
        if match is None:
            return ""
        self.at += 6 + len(match[1])
        return f"derivative of {match[1]} by {match[2]}"

    def function(self, name: str) -> str:
        base = power = ""
        while self.peek() in ("_", "^"):
            is_index = self.peek() == "_"
            self.at += 1
            if is_index:
                base = self.argument(whole_number=False)
            else:
                power = self.argument(whole_number=True)
        if power == "-1" and name in _INVERSE:
            name, power = _INVERSE[name], ""
        inside = self.inner(self.group()) if self.peek() in _BRACKETS else self.without_brackets()
        index = f"_{{{base}}}" if base else ""
        found = f"{name}{index}({inside})" if name != "\\exp" else f"e^{{{inside}}}"
        return f"({found})^{{{power}}}" if power else found

    def without_brackets(self) -> str:
        r"""The argument of ``\sin 2x``: factors side by side, up to the next sign or function."""
        found = [self.signed_factor()]
        while True:
            token = self.peek()
            if token in ("/", "\\cdot") and "\\pi" in found[-1] and self.peek(1).isdigit():
                self.at += 1
                found.append(f"\\frac{{1}}{{{self.factor()}}}" if token == "/" else self.factor())
            elif self.begins_factor(token) and token not in _FUNCTIONS and token != "(":
                found.append(self.factor())
            else:
                return "\\cdot ".join(found)

    def series(self, token: str) -> str:
        lower: list[str] = []
        upper: list[str] = []
        while self.peek() in ("_", "^"):
            index = self.peek() == "_"
            self.at += 1
            group = self.group() if self.peek() == "{" else [self.peek()]
            self.at += len(group) == 1 and self.tokens[self.at - 1] != "}"
            lower, upper = (group, upper) if index else (lower, group)
        name, start = _parted(lower, "=")
        if len(name) != 1 or not name[0].isalpha() or not upper:
            raise Unreadable("a sum or product without its limits")
        bound = frozenset(name)
        variable = _symbol(name[0])
        outer, self.bound = self.bound, self.bound | bound
        body = self.product()
        self.bound = outer
        return f"{token}_{{{variable}={self.inner(start)}}}^{{{self.inner(upper)}}} ({body})"

    def integral(self) -> str:
        limits = {}
        while self.peek() in ("_", "^"):
            kind = self.peek()
            self.at += 1
            limits[kind] = self.argument(whole_number=True)
        depth = 0
        for end in range(self.at, len(self.tokens) - 1):
            depth += depth_change(self.tokens[end])
            if depth == 0 and self.tokens[end] == "d" and self.tokens[end + 1] in _PLAIN_LETTERS:
                body = self.inner(self.tokens[self.at : end])
                variable = self.tokens[end + 1]
                self.at = end + 2
                if set(limits) != {"_", "^"}:
                    raise Unreadable("an integral without its limits")
                return f"\\int_{{{limits['_']}}}^{{{limits['^']}}} ({body}) d{variable}"
        raise Unreadable("an integral without its variable")

    def limit(self) -> str:
        if self.peek() != "_" or self.peek(1) != "{":
            raise Unreadable("a limit without its point")
        self.at += 1
        name, point = _parted(self.group(), "\\to")
        if len(name) != 1 or name[0] not in _PLAIN_LETTERS:
            raise Unreadable("a limit of no variable")
        return f"\\lim_{{{name[0]}\\to {self.inner(point)}}} ({self.product()})"

    def matrix(self, begin: str) -> str:
        rows = [[self.inner(cell) for cell in row] for row in rows_of(self.group_of_matrix())]
        return begin + "\\\\".join("&".join(row) for row in rows) + _MATRICES[begin]

    def group_of_matrix(self) -> list[str]:
        end = group_end(self.tokens, self.at)
        inner = self.tokens[self.at + 1 : end]
        self.at = end + 1
        return inner


def rows_of(tokens: Sequence[str]) -> list[list[list[str]]]:
    """The cells of a matrix, row by row."""
    rows: list[list[list[str]]] = [[[]]]
    depth = 0
    for token in tokens:
        depth += depth_change(token)
        if depth == 0 and token == "\\\\":
            rows.append([[]])
        elif depth == 0 and token == "&":
            rows[-1].append([])
        else:
            rows[-1][-1].append(token)
    return [row for row in rows if row != [[]] and any(without_spaces(cell) for cell in row)]


def _arguments(tokens: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += depth_change(token)
        if token == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _parted(tokens: list[str], at: str) -> tuple[list[str], list[str]]:
    if tokens.count(at) != 1:
        raise Unreadable(f"{at} is missing or twice there")
    place = tokens.index(at)
    return tokens[:place], tokens[place + 1 :]


def _chosen(kind: str, top: str, bottom: str) -> str:
    if "C" in kind:
        return f"\\binom{{{top}}}{{{bottom}}}"
    return f"\\frac{{({top})!}}{{({top}-{bottom})!}}"


def _number(token: str) -> str:
    if len(token) > MAX_DIGITS:
        raise Unreadable("a number of too many digits")
    if "." not in token:
        return token.lstrip("0") or "0"
    whole, behind = token.split(".")
    digits = (whole + behind).lstrip("0") or "0"
    return f"\\frac{{{digits}}}{{1{'0' * len(behind)}}}"


def _is_letter(token: str) -> bool:
    return len(token) == 1 and token.isascii() and token.isalpha()


def _is_simple(text: str) -> bool:
    return text.isdigit() or (len(text) == 1 and text != "I") or (text[:3] == "x_{" and text[3:-1].isdigit())


def _is_proper(fraction: str) -> bool:
    top, _, bottom = fraction.removeprefix("\\frac{").removesuffix("}").partition("}{")
    return top.isdigit() and bottom.isdigit() and 0 < int(top) < int(bottom)
