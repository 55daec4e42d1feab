"""Readings as expressions of sympy, made by math-verify's parser."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

from entropy_fork.reward.readings import Exact, Formula, Reading


@cache
def _parser() -> Any:
    from latex2sympy2_extended.antlr_parser import PSParser
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    # Hydra pins antlr 4.9. The grammar that latex2sympy2_extended 1.11 has for it is older than the code that reads its
    # trees and calls this method: without it, some expressions fail.
    if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
        PSParser.AtomContext.FUNC_GAMMA = lambda self: None
    config = ConversionConfig(lowercase_symbols=False)

    def parse(latex: str) -> Any:
        return latex2sympy(
            latex, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=config
        )

    return parse


@lru_cache(maxsize=512)
def parsed(latex: str) -> Any:
    """What math-verify's parser makes of the LaTeX of :func:`entropy_fork.reward.expression.expression_of`.

    None if it cannot read it. The ground truth of a question is parsed once for all its answers.
    """
    from sympy import Basic, MatrixBase

    try:
        found = _parser()(latex)
    except (PermissionError, MemoryError):
        raise
    except Exception:  # antlr and latex2sympy2_extended raise the class Exception itself
        return None
    if isinstance(found, Basic) and ("\\sqrt[" in latex or "^{\\frac" in latex):
        return found.replace(_is_odd_root, _real_root)
    return found if isinstance(found, (Basic, MatrixBase)) else None


def _is_odd_root(part: Any) -> bool:
    """Whether it is a cube root, or another odd one, of a negative number: that is a real number here."""
    return bool(part.is_Pow and part.exp.is_Rational and part.exp.q > 1 and part.exp.q % 2 and part.base.is_negative)


def _real_root(part: Any) -> Any:
    return (-1) ** part.exp.p * (-part.base) ** part.exp


def value_of(reading: Reading) -> Any:
    """The expression of a number or formula; None for another reading, and for a formula that cannot be parsed."""
    import sympy

    if isinstance(reading, Exact):
        return sympy.Rational(reading.number.value.numerator, reading.number.value.denominator)
    return parsed(reading.latex) if isinstance(reading, Formula) else None
