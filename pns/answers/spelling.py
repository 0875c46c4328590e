r"""The text of an answer: without what carries no meaning, and in one spelling."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable


def _in_tex(character: str) -> str:
    """A vulgar fraction as `\frac`, a squared unit as text, a styled letter or digit without its style."""
    plain = unicodedata.normalize("NFKC", character)
    if "⁄" in plain:
        return r"\frac{{{}}}{{{}}} ".format(*plain.split("⁄"))
    is_unit = "\u3380" <= character <= "\u33df"
    return r"\text{ " + re.sub(r"(\d)", r"^\1", plain).replace("μ", "u") + "}" if is_unit else plain


_STYLED = [*range(0x1D400, 0x1D800), *range(0x3380, 0x33E0), *range(0xFF01, 0xFF5F), *range(0xBC, 0xBF)]
_UNICODE = {
    **{chr(code): _in_tex(chr(code)) for code in [*_STYLED, *range(0x2150, 0x215F)]},
    **dict.fromkeys("−–—", "-"),
    **dict.fromkeys("×✕", r"\times "),
    **dict.fromkeys("\u00a0\u2009\u202f\u2007\u2002\u2003\u3000\t\n\r", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("°º", r"^\circ "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    "€": r"\euro ", "£": r"\pounds ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "⩽": r"\le ", "⩾": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ",
    "∓": r"\mp ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "ω": r"\omega ",
    "φ": r"\phi ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "∠": r"\angle ",
    "’": "'", "′": "'", "″": "''", "∣": "|", "≈": r"\approx ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⁄": "/", "⌈": r"\lceil ", "⌉": r"\rceil ", "∛": r"\cbrt ", "Ω": r"\Omega ", "\u2126": r"\Omega ",
    "µ": r"\mu ", "μ": r"\mu ", "℃": r"^\circ C", "℉": r"^\circ F", "∧": r"\land ",
    "∨": r"\lor ", "∖": r"\setminus ",
}  # fmt: skip
_TRANSLATION = str.maketrans(_UNICODE)
_RAISED, _LOWERED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+")
_DECORATION = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|nolimits|[bB]ig{1,2}[lrm]?)(?![A-Za-z])\s*\.?(?<!\d\.)"
    r"|\\(?:bf|it|cal|bfseries|hline)(?![A-Za-z])|\\rm(?![A-Za-z]|\s*\{)"
    r"|\\!|(?<!\\)\\[()\[\]]|(?<!\\)\$"
)
_SPACING = re.compile(r"(?<!\\)\\(?:[,;: ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|hspace\{[^{}]*\})|(?<!\\)~")
_TEXTS = "text|textbf|textit|textrm|textnormal|textsf|texttt|mathrm|mbox|operatorname|rm"
TEXT_OPENING = rf"\\(?:{_TEXTS})\s*\{{"
TEXT = TEXT_OPENING + r"([^{}]*)\}"
STYLES = "mathbf boldsymbol mathit mathcal mathsf mathtt bm bold".split()
_INDEX = r"(\{[^{}]{1,9}\}|\w)"  # a short group, a digit or a letter
_LETTER = r"([A-Za-z]|\\[a-z]+ ?)"
_PLACE = r"(?:\\\w+\s*\{[^{}]*\}|\\?\w+)"  # \mathbb{R}
_N, _K = (rf"\s*(?P<{name}>\{{[^{{}}]{{1,9}}\}}|\w)" for name in "nk")
_COUNTED = rf"(?:\\(?:{_TEXTS})\s*\{{\s*)?(?P<kind>[CAP])\s*\}}?\s*"  # combinations and permutations
_HALF_OF_DAY = rf"(?:\\(?:{_TEXTS})\s*\{{\s*)?([aApP])\.?\s?[mM]\b\.?\s*\}}?"
CHOSEN = re.compile(r"(?<![A-Za-z\\])(?P<kind>[CP])\((?P<n>[\dnmNp+-]{1,9}), ?(?P<k>[\dkrmn+-]{1,9})\)")


def counted(match: re.Match[str]) -> str:
    r"""`\binom{5}{2}` or `\perm{5}{2}` for combinations or permutations in another notation; the notation
    where it rather is a power of a name, as `C_1^2`, or a point."""
    n, k, kind = match["n"].strip("{}"), match["k"].strip("{}"), match["kind"]
    is_number = n.isdigit() and k.isdigit() and int(n) >= max(3, int(k))
    if not (is_number or (not n.isdigit() and (kind == "C" or not k.isdigit()))):
        return match[0]
    return rf"\{'binom' if kind == 'C' else 'perm'}{{{n}}}{{{k}}}"


_Change = tuple[str, str | Callable[[re.Match[str]], str]]
_SPELLINGS: tuple[_Change, ...] = (
    (r"\\text\s*\{\s*:\s*\}", ":"),
    (r"(?<=\d)\u066c(?=\d)", ","),
    (r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|ex|em|mm|cm|in|mu)\s*\]", r"\\\\ "),  # the space behind a row
    (r"\\(?:cr|tabularnewline)(?![A-Za-z])", r"\\\\ "),
    (r"(?<!\d)(\d{1,3})\{,\}(?=\d{3}(?!\d))", r"\1,"),
    (r"(?<![\d}.,])(-?\d+)\{,\}(?=\d+(?!\d|\{,))", r"\1."),  # the decimal comma of TeX
    (r"\{,\}|,\\!\s*(?=\d)", ","),
    (_DECORATION.pattern, ""),
    (_SPACING.pattern, " "),
    (r"^\s*#{1,6}\s+", ""),  # markdown
    (r"(?<![\w)}\]*])\*\*(?=[^\s*])([^*]+)\*\*(?![\w({\\*])", r"\1"),
    (r"^\s*(__|`{1,3}|[*_\"])(?=[^\s*_`])([^`*\"]*)\1\s*$", r"\2"),
    (r"\\(?:boxed|fbox)\s*\{(.*)\}", r"\1"),
    (r"\\(?:boxed|fbox)\s*\{(.*)\}", r"\1"),
    (r"^\s*\\(?:boxed|fbox)(?![A-Za-z{])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (rf"\\(?:{_TEXTS}|{'|'.join(STYLES)})\s*\{{([-+\d.,/\s]*\d[\d.,/\s]*)\}}", r" \1 "),  # \mathbf{5}
    (rf"^\s*\\(?:{_TEXTS}|{'|'.join(STYLES)})\s*\{{([^{{}}]*\d[^{{}}]*)\}}\s*$", r"\1"),  # \text{x = 5}
    (rf"(\\(?:{_TEXTS})\s*\{{[^{{}}]{{0,30}}\^)\{{(-?\d)\}}", r"\1\2 "),  # \text{m^{2}}
    (rf"(\\(?:{_TEXTS})\s*\{{[^{{}}]{{0,30}}\^)\{{(-?\d)\}}", r"\1\2 "),
    (rf"(\\(?:{_TEXTS})\s*\{{[^{{}}]{{0,20}})\\mu\s*", r"\1u"),  # \text{\mu m}
    (rf"(\\(?:{_TEXTS})\s*\{{[^{{}}]{{0,20}})\\Omega\s*", r"\1ohm"),
    (rf"(?<=[\d}} ])\\mu\s*\\(?:{_TEXTS})\s*\{{\s*", r"\\text{u"),
    (r"(?<=[\d}])\s+\\mu\s*([mgsLAFCVW])$", r"\\text{ u\1}"),
    (r"(?<=[\d} ])([kM]?)\s*\\Omega\s*$", r"\\text{ \1ohm}"),
    (r"\\degrees?(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
    (rf"\^\s*\\circ\s*(?:\\(?:{_TEXTS})\s*\{{\s*C\s*\}}|C(?!\w))", r"\\text{ celsius}"),
    (rf"\^\s*\\circ\s*(?:\\(?:{_TEXTS})\s*\{{\s*F\s*\}}|F(?!\w))", r"\\text{ fahrenheit}"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))", r"\\times "),
    (rf"^\s*(1?\d)\s*{_HALF_OF_DAY}\s*$", r"\1:00\\text{\2meridiem}"),
    (rf"(?<!\d)(\d{{1,2}})\s*:\s*([0-5]\d)\s*{_HALF_OF_DAY}", r"\1:\2\\text{\3meridiem}"),
    (r"\\(?:land|wedge)(?![A-Za-z])", r"\\text{ and }"),
    (r"\\(?:lor|vee)(?![A-Za-z])", r"\\text{ or }"),
    (r"\+/-", r"\\pm "),
    (r"\\var(?=epsilon|phi|theta|rho|sigma|kappa)", r"\\"),
    (rf"(?<![A-Za-z\\])d(\^{_INDEX})?\s?{_LETTER}/d{_LETTER}(\^{_INDEX})?(?![A-Za-z])",
     r"\\frac{d\1\3}{d\4\5}"),
    (r"\\frac\{(d|\\partial)(\^\d|\^\{\d\})?\}\{(\1[^{}]+(?:\{\d\})?)\}\s*"
     rf"(?:{_LETTER}|\({_LETTER}\))(?![A-Za-z(])", r"\\frac{\1\2\4\5}{\3}"),  # \frac{d}{dx} y
    (r"(?<=[A-Za-z}])\^\s*\{?\s*((?:\\prime\s*)+)\}?", lambda match: "'" * match[1].count("prime")),
    (rf"\\(?:\{{|lbrace)\s*[A-Za-z](?:\s*\\in\s*{_PLACE})?\s*(?:[|:]|\\(?:mid|vert)(?![A-Za-z]))",
     r"\\{ "),  # \{x | x > 1\}
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (rf"(?<![\w)}}])(?:\{{\s*\}})?\s*[_^]{_N}\s*{_COUNTED}_{_K}", counted),  # {}_5C_2
    (r"(?<![\w.])(?P<n>\d+)(?P<kind>[CP])(?P<k>\d+)(?!\w)", counted),  # 5C2
    (rf"(?<![A-Za-z\\]){_COUNTED}(?:_{_N}\s*\^{_K})(?!\s*[\^_'(])", counted),  # C_5^2
    (rf"(?<![A-Za-z\\]){_COUNTED}(?:\^{_K}\s*_{_N})(?!\s*[\^_'(])", counted),  # C^2_5
    (r"(?<![\w)}])\(\s*(\d+)\s*\)\s*_", r"\1_"),  # (101)_2
    (r"^\s*([A-Za-z])\s*(\([^()\[\]]*\]|\[[^()\[\]]*\))\s*$", r"\1\\in \2"),  # t(0,4]
    (r"\s+", " "),
)  # fmt: skip
_PATTERNS = [(re.compile(pattern, re.DOTALL), replacement) for pattern, replacement in _SPELLINGS]


TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")
FUNCTIONS = {  # as written: its name in a tree
    **{name: name for name in (*TRIGONOMETRIC, "ln", "exp", "abs", "floor", "ceil", "log", "lg")},
    **{"arc" + name: "a" + name for name in TRIGONOMETRIC},
    **{"a" + name: "a" + name for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    "ceiling": "ceil", "factorial": "factorial", "cosec": "csc", "tg": "tan", "ctg": "cot",
}  # fmt: skip
_GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon
phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell odot prime partial
nabla mho Re Im"""
GREEK = frozenset(_GREEK.split())
_SHORT_WORDS = """and or the of for are is not per yes no odd red one two six ten all any day man men cup
pig cow hen pen dog cat egg box way old km sq pct to we so if get cis rpm usd deg"""
SHORT_WORDS = frozenset(_SHORT_WORDS.split())  # of under four letters, that are no product of variables


def clean(answer: str) -> str:
    """The text without wrappers and spacing commands that carry no meaning, in ASCII and LaTeX only."""
    text = answer
    if not answer.isascii():
        text = _RAISED.sub(lambda match: "^" + _index(match[0]), answer)
        text = _LOWERED.sub(lambda match: "_" + _index(match[0]), text).translate(_TRANSLATION)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".").strip()


def _index(raised: str) -> str:
    """Unicode's raised or lowered characters in their place: `-2 `, `{n+1}`."""
    plain = unicodedata.normalize("NFKC", raised).replace("\u2212", "-")
    return f"{plain} " if re.fullmatch(r"-?\d+", plain) else f"{{{plain}}}"


def spelling(answer: str) -> str:
    """One spelling of the text itself: no decoration and spaces, words in lower case. Idempotent on what it
    returns within ten rounds."""
    return stable(_spell, answer)


def stable(change: Callable[[str], str], text: str) -> str:
    """The text changed again and again until it stays the same, at most ten times."""
    for _ in range(10):
        previous, text = text, change(text)
        if text == previous:
            break
    return text


def _spell(answer: str) -> str:
    text = re.sub(TEXT, r" \1 ", clean(answer))
    text = re.sub(r"\s+(?![\dA-Za-z])|(?<![\dA-Za-z])\s+", "", text)
    text = re.sub(r"\{(\w)\}", r"\1", text)
    if is_prose(text):
        return re.sub(r"[.,;!]+(?=\s|$)", "", text.casefold())

    def between(space: re.Match[str]) -> str:  # a command ends where a letter cannot belong to it
        return " " if re.match(r"\\[A-Za-z]+$", text[: space.start()]) else ""

    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", between, text).rstrip(".")


def is_prose(text: str) -> bool:
    """Words rather than a formula: letters, spaces and punctuation, with a word that cannot be a product of
    variables."""
    if not re.fullmatch(r"[A-Za-z' .,;!?-]+", text):
        return False
    for word in re.findall(r"[A-Za-z]+(?:'[A-Za-z]+)?", text):
        is_word = len(word) >= 4 or word.casefold() in SHORT_WORDS
        if is_word and word not in FUNCTIONS and word not in GREEK:
            return True
    return False
