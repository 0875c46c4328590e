"""Sampled text as safe HTML: all of it is escaped, and formulas become MathML of a few allowed elements."""

import re
from functools import lru_cache
from xml.etree import ElementTree

from markupsafe import Markup, escape

_MAX_FORMULA = 2000  # characters; longer ones stay LaTeX
_ELEMENTS = frozenset(
    "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr "
    "mtd mstyle mpadded mphantom menclose merror".split()
)
_ATTRIBUTES = frozenset(
    "display mathvariant stretchy fence separator lspace rspace width height depth linethickness columnalign "
    "rowspacing columnspacing columnlines rowlines displaystyle scriptlevel accent accentunder movablelimits "
    "largeop form minsize maxsize notation symmetric".split()
)
# A formula between single dollars begins and ends with no space and has no digit after it: amounts of money
# stay text.
_FORMULA = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)"
    r"|(?<!\\)\$(?P<d>(?!\s)(?:[^$\\\n]|\\.|\n(?!\n))+?)(?<!\s)\$(?!\d)",
    re.DOTALL,
)


def render(text: str) -> Markup:
    """Text with formulas between dollars, `\\\\(`, `\\\\[` as safe HTML."""
    pieces, end = [], 0  # escaped text and safe formulas in turn
    for match in _FORMULA.finditer(text):
        block = match["a"] or match["b"]
        latex = block or match["c"] or match["d"]
        pieces += [escape(text[end : match.start()]), formula(latex, block is not None) or escape(match[0])]
        end = match.end()
    return Markup("").join([*pieces, escape(text[end:])])


def render_answer(answer: str) -> Markup:
    """A final answer: a formula as a whole, or its text."""
    return formula(answer.strip().strip("$"), False) or escape(answer)


# Samples of one problem have most formulas in common.
@lru_cache(maxsize=20_000)
def formula(latex: str, block: bool) -> Markup | None:
    """Presentation MathML of a formula, None where it cannot be read (it is shown as it is then)."""
    from latex2mathml.converter import convert

    if len(latex) > _MAX_FORMULA:
        return None
    try:
        root = ElementTree.fromstring(convert(latex, display="block" if block else "inline"))
    except Exception:  # sampled text need not be LaTeX: the converter raises whatever its parser runs into
        return None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # without the namespace, which ElementTree puts first
        if element.tag not in _ELEMENTS:
            return None
        element.attrib = {key: value for key, value in element.attrib.items() if key in _ATTRIBUTES}
    return Markup(ElementTree.tostring(root, encoding="unicode", method="html"))
