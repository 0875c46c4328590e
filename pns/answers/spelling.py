r"""The text of an answer: without what carries no meaning, and in one spelling."""

from __future__ import annotations

import re
from collections.abc import Callable

_UNICODE = {
    **dict.fromkeys("−–—", "-"),
    **dict.fromkeys("×✕", r"\times "),
    **dict.fromkeys("\u00a0\u2009\u202f\u2007\u2002\u2003\u3000\t\n\r", " "),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("°º", r"^\circ "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    "€": r"\euro ", "£": r"\pounds ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "⩽": r"\le ", "⩾": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ",
    "∓": r"\mp ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "ω": r"\omega ",
    "φ": r"\phi ", "ℝ": r"\mathbb{R}", "½": r"\frac12 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ",
    "¾": r"\frac34 ", "²": "^2", "³": "^3", "⁻": "^-", "’": "'", "′": "'", "，": ",", "（": "(", "）": ")",
    "∣": "|", "≈": r"\approx ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
}  # fmt: skip
_TRANSLATION = str.maketrans(_UNICODE)
_DECORATION = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|nolimits|[bB]ig{1,2}[lrm]?)(?![A-Za-z])\s*\.?(?<!\d\.)"
    r"|\\!|(?<!\\)\\[()\[\]]|(?<!\\)\$"
)
_SPACING = re.compile(r"(?<!\\)\\(?:[,;: ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|hspace\{[^{}]*\})|(?<!\\)~")
TEXT = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mbox|operatorname|rm)\s*\{([^{}]*)\}"

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
pig cow hen pen dog cat egg box way km sq pct"""
SHORT_WORDS = frozenset(_SHORT_WORDS.split())  # of under four letters, that are no product of variables
_NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty"""
NUMBER_WORDS = {word: value for value, word in enumerate(_NUMBER_WORDS.split())}


def clean(answer: str) -> str:
    """The text without wrappers and spacing commands that carry no meaning, in ASCII and LaTeX only."""
    text = re.sub(r"(?<=\d)\u066c(?=\d)", ",", answer).translate(_TRANSLATION)
    text = text.replace("{,}", ",").replace("+/-", r"\pm ")
    text = re.sub(r",\\!\s*(?=\d)", ",", text)
    text = _SPACING.sub(" ", _DECORATION.sub("", text))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:boxed|fbox)\s*\{(.*)\}", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"\\degrees?(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}", r"^\\circ ", text)
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))", r"\\times ", text)
    text = re.sub(r"(?<=[\d ])([aApP])\.\s?[mM]\b\.?", r"\1m", text)
    text = re.sub(r"\\var(?=epsilon|phi|theta|rho|sigma|kappa)", r"\\", text)
    text = re.sub(r"^([A-Za-z])\s*(\([^()\[\]]*\]|\[[^()\[\]]*\))$", r"\1\\in \2", text.strip())  # t(0,4]
    return text.rstrip(".").strip()


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
    for word in re.findall(r"[A-Za-z']+", text):
        is_word = len(word) >= 4 or word.casefold() in SHORT_WORDS
        if is_word and word not in FUNCTIONS and word not in GREEK:
            return True
    return False
