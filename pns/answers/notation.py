r"""Reading final answers as models and benchmarks write them: LaTeX, plain text and the code notation of
Minerva, in one grammar.

An answer is a list of relations; a relation is a chain of unions; a union joins sums. Sums, products and
powers become trees of tuples (`Tree`, evaluated in `pns.answers.exact`); brackets, matrices, relations and
words become the records below. What does not fit the grammar raises `Unreadable`; nothing is skipped in order
to make it fit. Length and nesting are limited, so reading is cheap on any text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]
MAX_CHARACTERS = 2000
_MAX_DEPTH = 30
_MAX_DIGITS = 2000  # of one number
_MAX_EXPONENT = 3000  # of scientific notation


class Unreadable(Exception):
    """The text is not an answer in this grammar."""


@dataclass(frozen=True)
class Expr:
    """A number or an expression. `step` is the place value of the last digit of a plain decimal (1/100 for
    2.54), None for anything else. `ambiguous`: conventions differ (1/2x, f(x)), so that a difference found
    under one reading proves nothing."""

    tree: Tree
    unit: str = ""
    percent: bool = False
    degrees: bool = False
    ambiguous: bool = False
    step: Fraction | None = None


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Based:
    """Digits with a base as subscript: `204_5`."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """`7:32`; `clock` where it may be a time of day: two digits after the colon."""

    parts: tuple[Node, ...]
    clock: bool = False


@dataclass(frozen=True)
class Group:
    """`brackets` "()", "[]", "[)", "(]" ordered, "{}" a set, "" a bare list ("or": its separator was "or")."""

    brackets: str
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Relation:
    """sides[0] operators[0] sides[1] ...; operators are =, <, >, <=, >=, !=, in."""

    operators: tuple[str, ...]
    sides: tuple[Node, ...]


@dataclass(frozen=True)
class Union:
    parts: tuple[Node, ...]


Node = Expr | Words | Based | Ratio | Group | Matrix | Relation | Union

_UNICODE = {
    **dict.fromkeys("−–—", "-"),
    **dict.fromkeys("×✕", r"\times "),
    **dict.fromkeys("\u00a0\u2009\u202f\u2007\u2002\u2003\u3000\t\n\r", " "),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("°º", r"^\circ "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    "€": r"\euro ", "£": r"\pounds ", "÷": "/",
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "⩽": r"\le ", "⩾": r"\ge ",
    "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ",
    "∓": r"\mp ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "ω": r"\omega ",
    "φ": r"\phi ", "ℝ": r"\mathbb{R}", "½": r"\frac12 ", "⅓": r"\frac13 ", "⅔": r"\frac23 ", "¼": r"\frac14 ", "¾": r"\frac34 ",
    "²": "^2", "³": "^3", "⁻": "^-", "’": "'", "′": "'", "，": ",", "（": "(", "）": ")", "∣": "|", "≈": r"\approx ", "⌊": r"\lfloor ",
    "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
}  # fmt: skip
_TRANSLATION = str.maketrans(_UNICODE)
_DECORATION = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|nolimits|[bB]ig{1,2}[lrm]?)(?![A-Za-z])\s*\.?(?<!\d\.)|\\!|(?<!\\)\\[()\[\]]|(?<!\\)\$"
)
_SPACING = re.compile(r"(?<!\\)\\(?:[,;: ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|hspace\{[^{}]*\})|(?<!\\)~")
_TEXT = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mbox|operatorname|rm)\s*\{([^{}]*)\}"
_CODE = re.compile(r"\b(?:np|numpy|math|sympy|sp|cmath)\.(?=[a-z])")
_GROUPED = re.compile(
    r"(?<![\w.,}'])(?:\d{1,3}(?:,\d{3})+|[1-9]\d{0,2}(?: +\d{3})+|\d{1,3}(?:'\d{3})+|\d{1,3}(?:_\d{3})+"
    r"|\d{1,2}(?:,\d{2})+,\d{3})(?![\d,'_]|\.\d*,)"
    r"|(?<![\w.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,])"
)
_TOKEN = re.compile(
    rf"\s*(?:(?P<text>{_TEXT})|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)|(?P<command>\\[A-Za-z]+\*?|\\[{{}}|%#&\\$])"
    r"|(?P<letters>[A-Za-z]+)|(?P<operator>\*\*|<=|>=|!=|==|<>|[-+*/^_(){}\[\]|,;:=<>!%'.&@#?\\\"`])|(?P<other>\S))"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_GREEK = _words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell odot prime partial nabla mho Re Im"
)
FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "ln", "exp", "abs", "floor", "ceil")},
    **{"arc" + name: "a" + name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")},
    **{"a" + name: "a" + name for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    "log": "log", "lg": "lg", "factorial": "factorial", "ceiling": "ceil", "cosec": "csc", "tg": "tan", "ctg": "cot",
}  # fmt: skip
_RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "<>": "!=", r"\le": "<=", r"\leq": "<=",
    r"\leqslant": "<=", r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=", r"\lt": "<", r"\gt": ">", r"\ne": "!=", r"\neq": "!=",
    r"\in": "in", r"\equiv": "=",
    r"\approx": "~", r"\simeq": "~", r"\doteq": "~",
}  # fmt: skip
_OPENING = {"(": "(", "[": "[", r"\{": "{", r"\lbrace": "{", r"\langle": "("}
_CLOSING = {")": ")", "]": "]", r"\}": "}", r"\rbrace": "}", r"\rangle": ")"}
_SEPARATORS = {",": "", ";": "", "and": "", "or": "or"}
_PROSE = _words(
    "and or the of for are is not per yes no odd red one two six ten all any day man men cup pig cow hen pen dog cat egg box way km sq pct"
)
_UNITS: dict[str, tuple[Fraction, str]] = {
    **dict.fromkeys(("m", "meter", "metre"), (Fraction(1), "length")),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), (Fraction(1, 100), "length")),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), (Fraction(1, 1000), "length")),
    **dict.fromkeys(("km", "kilometer", "kilometre"), (Fraction(1000), "length")),
    **dict.fromkeys(("in", "inch", "inches"), (Fraction(254, 10000), "length")),
    **dict.fromkeys(("ft", "foot", "feet"), (Fraction(3048, 10000), "length")),
    **dict.fromkeys(("yd", "yard"), (Fraction(9144, 10000), "length")),
    **dict.fromkeys(("mi", "mile"), (Fraction(1609344, 1000), "length")),
    **dict.fromkeys(("g", "gram"), (Fraction(1), "mass")),
    **dict.fromkeys(("mg", "milligram"), (Fraction(1, 1000), "mass")),
    **dict.fromkeys(("kg", "kilogram"), (Fraction(1000), "mass")),
    **dict.fromkeys(("s", "sec", "second"), (Fraction(1), "time")),
    **dict.fromkeys(("ms", "millisecond"), (Fraction(1, 1000), "time")),
    **dict.fromkeys(("min", "minute"), (Fraction(60), "time")),
    **dict.fromkeys(("h", "hr", "hour"), (Fraction(3600), "time")),
    "day": (Fraction(86400), "time"), "week": (Fraction(604800), "time"),
    **dict.fromkeys(("l", "liter", "litre"), (Fraction(1), "volume")),
    **dict.fromkeys(("ml", "milliliter", "millilitre"), (Fraction(1, 1000), "volume")),
    **dict.fromkeys(("dollar", "usd", "buck"), (Fraction(1), "dollar")),
    **dict.fromkeys(("cent", "penny", "pennies"), (Fraction(1, 100), "dollar")),
    **{name: (Fraction(1), name) for name in ("lb", "oz", "pound", "ounce", "hz", "rad", "kj", "ev", "kev", "mev", "au", "ly", "pc", "kpc",
       "mph", "kph", "kmh", "gal", "gallon", "euro", "acre", "pa", "kpa", "atm", "hp", "mol", "kw", "cc", "unit", "degree")},
}  # fmt: skip
_CURRENCIES = {r"\$": "dollar", r"\euro": "euro", r"\pounds": "pound sterling"}
UNIT_LETTERS = "mgslLNJWVKCFhA"
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
_NUMBERS = {word: value for value, word in enumerate(_NUMBER_WORDS.split())}


def clean(answer: str) -> str:
    """The text without wrappers and spacing commands that carry no meaning, in ASCII and LaTeX only."""
    text = re.sub(r"(?<=\d)\u066c(?=\d)", ",", answer).translate(_TRANSLATION)
    text = text.replace("{,}", ",")
    text = re.sub(r",\\!\s*(?=\d)", ",", text)
    text = _SPACING.sub(" ", _DECORATION.sub("", text))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:boxed|fbox)\s*\{(.*)\}", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"\\degrees?(?![A-Za-z])", r"^\\circ ", text)
    text = re.sub(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))", r"\\times ", text)
    text = re.sub(r"(?<=[\d ])([aApP])\.\s?[mM]\b\.?", r"\1m", text)
    text = re.sub(r"\\var(?=epsilon|phi|theta|rho|sigma|kappa)", r"\\", text)
    text = re.sub(r"^([A-Za-z])\s*(\([^()\[\]]*\]|\[[^()\[\]]*\))$", r"\1\\in \2", text.strip())  # t(0,4]
    return text.rstrip(".").strip()


def spelling(answer: str) -> str:
    """One spelling of the text itself: no decoration and spaces, words in lower case. Idempotent on what it
    returns within ten rounds."""
    text = answer
    for _ in range(10):
        previous, text = text, _spell(text)
        if text == previous:
            break
    return text


def _spell(text: str) -> str:
    text = re.sub(_TEXT, r" \1 ", clean(text))
    text = re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s+(?![\dA-Za-z])|(?<![\dA-Za-z])\s+", "", text))
    if is_prose(text):
        return re.sub(r"[.,;!]+(?=\s|$)", "", text.casefold())
    return re.sub(
        r"(?<!\d)\s+|\s+(?!\d)", lambda m: " " if re.match(r"\\[A-Za-z]+$", text[: m.start()]) else "", text
    ).rstrip(".")


def is_prose(text: str) -> bool:
    """Words rather than a formula: letters, spaces and punctuation, with a word that cannot be a product of
    variables."""
    if not re.fullmatch(r"[A-Za-z' .,;!?-]+", text):
        return False
    words = re.findall(r"[A-Za-z']+", text)
    return any(
        (len(word) >= 4 or word.casefold() in _PROSE) and word not in FUNCTIONS and word not in _GREEK
        for word in words
    )


def readings(answer: str) -> list[Node]:
    """Every sensible reading of the answer, the likeliest first: `1,234` is a number and a list. Empty where
    it cannot be read."""
    if len(answer) > MAX_CHARACTERS:
        return []
    text = clean(answer)
    texts = [text]
    if not text.startswith(("(", "[", r"\{")):  # (1,234) is a pair
        joined = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
        if joined != text:
            texts = [joined, text] if "," in text else [joined]
    elif not text.startswith(r"\{"):
        spaced = re.sub(
            r"(?<![\w.,])[1-9]\d{0,2}(?: +\d{3})+(?![\d,])", lambda match: match[0].replace(" ", ""), text
        )
        texts = [spaced]
    if re.fullmatch(r"-?\d+,\d+", text) and (
        text.split(",")[0] in ("0", "-0") or len(text.split(",")[1]) != 3
    ):
        texts.append(text.replace(",", "."))  # a decimal comma
    found: list[Node] = []
    for candidate in texts:
        node = _read(candidate)
        if node is not None and node not in found:
            found.append(node)
    return found


def _read(text: str) -> Node | None:
    if not text or re.fullmatch(r"[-+*/^_=,.;:\s]*", text):
        return None
    bare = re.sub(_TEXT, r" \1 ", text).strip().strip("\"'`").strip()
    if choice := re.fullmatch(r"\(\s*([A-Za-z])\s*\)|([A-Z])\s*[.)]", bare):
        return Words(choice[1] or choice[2])
    if match := re.fullmatch(r"\(?\s*([A-Za-z])\s*\)?", bare):
        return Words(match[1]) if match[1].isupper() or re.search(_TEXT, text) else Expr(_letter(match[1]))
    word = bare.casefold()
    if word in _NUMBERS:
        return Expr(("n", Fraction(_NUMBERS[word])))
    if word in ("infinity", "\\infty", "+\\infty", "infinite"):
        return Expr(("inf",))
    if is_prose(bare):
        return Words(re.sub(r"\s+", " ", re.sub(r"[.,;!?]+(?=\s|$)", "", word)).strip())
    if match := re.fullmatch(
        r"(.*\d)\s*_?\s*[({]?\s*(?:base|\\text\{\s*base)\s*[-~]?\s*(\d+|[a-z]+)\s*[)}]*", bare
    ):
        base = match[2] if match[2].isdigit() else str(_NUMBERS.get(match[2], ""))
        text = f"{match[1].rstrip(' ({')}_{{{base}}}"
    try:
        return _Parser(_tokens(text)).answer()
    except (Unreadable, RecursionError):
        return None


@dataclass(frozen=True)
class _Token:
    kind: str  # number, command, letter, word, text, operator
    value: str
    spaced: bool = False  # white space before it


def _tokens(text: str) -> list[_Token]:
    text = _CODE.sub("", text)
    tokens: list[_Token] = []
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if not match or match["other"]:
            raise Unreadable
        start, position = position, match.end()
        spaced = text[start : start + 1].isspace()
        if match["text"] is not None:
            tokens.append(
                _Token("text", match["text"][match["text"].index("{") + 1 : -1].strip(" ~"), spaced)
            )
        elif match["letters"] is not None:
            tokens += _split_letters(match["letters"], spaced)
        else:
            kind = "number" if match["number"] else "command" if match["command"] else "operator"
            tokens.append(_Token(kind, match["number"] or match["command"] or match["operator"], spaced))
    return tokens


def _split_letters(run: str, spaced: bool) -> list[_Token]:
    if (
        run in FUNCTIONS
        or run in ("sqrt", "pi", "cbrt", "infty", "binom")
        or (run in _GREEK and len(run) > 2)
    ):
        return [_Token("command", "\\" + run, spaced)]
    if run.casefold() in ("inf", "oo", "infinity"):
        return [_Token("command", r"\infty", spaced)]
    if len(run) >= 4 or (len(run) > 1 and (run.casefold() in _PROSE or run.casefold() in _UNITS)):
        return [_Token("word", run, spaced)]
    return [_Token("letter", letter, spaced and index == 0) for index, letter in enumerate(run)]


def _letter(letter: str) -> Tree:
    return ("e",) if letter == "e" else ("i",) if letter == "i" else ("s", letter)


def is_number(tree: Tree) -> bool:
    """Whether the tree has no free symbol."""
    return not symbols(tree)


def symbols(tree: Tree) -> frozenset[str]:
    if tree[0] == "s":
        return frozenset((tree[1],))
    if tree[0] in ("sum", "prod"):
        _, variable, low, high, body = tree
        return symbols(low) | symbols(high) | (symbols(body) - {variable})
    found: frozenset[str] = frozenset()
    for part in tree[1:]:
        if isinstance(part, tuple):
            found |= symbols(part)
    return found


class _Parser:
    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0
        self.percent = self.degrees = self.ambiguous = False
        self.unit = ""

    # ---------------------------------------------------------------------------------------------------------------- tokens

    def peek(self, ahead: int = 0) -> _Token:
        index = self.position + ahead
        return self.tokens[index] if 0 <= index < len(self.tokens) else _Token("end", "")

    def take(self) -> _Token:
        token = self.peek()
        if token.kind == "end":
            raise Unreadable
        self.position += 1
        return token

    def at(self, *values: str) -> bool:
        token = self.peek()
        return token.kind not in ("text", "end") and token.value in values

    def accept(self, *values: str) -> bool:
        found = self.at(*values)
        self.position += found
        return found

    def expect(self, *values: str) -> None:
        if not self.accept(*values):
            raise Unreadable

    # --------------------------------------------------------------------------------------------------- lists and relations

    def answer(self) -> Node:
        node = self.items()
        if self.peek().kind != "end":
            raise Unreadable
        found = both_signs(node)
        return found[0] if len(found) == 1 else Group("", tuple(found))

    def items(self) -> Node:
        """One relation, or a bare list of them."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable
        found = [self.relation()]
        kind = ""
        while (separator := self.separator()) is not None:
            if self.peek().kind == "end" or self.peek().value in _CLOSING:
                break
            kind = kind or separator
            found.append(self.relation())
        self.depth -= 1
        return found[0] if len(found) == 1 else Group(kind, tuple(found))

    def separator(self) -> str | None:
        found = None
        while True:
            token = self.peek()
            value = token.value.strip().casefold() if token.kind in ("text", "word") else token.value
            if token.kind not in ("text", "word", "operator") or value not in _SEPARATORS:
                return found
            self.position += 1
            found = found or _SEPARATORS[value]

    def relation(self) -> Node:
        operators: list[str] = []
        if self.accept(r"\approx", "="):
            pass
        sides = [self.union()]
        while self.peek().kind in ("operator", "command") and (operator := _RELATIONS.get(self.peek().value)):
            self.take()
            if operator == "=" and self.accept(r"\pm", r"\mp"):
                self.position -= 1
            operators.append(operator)
            sides.append(self.union())
        while "~" in operators:  # what follows is rounded
            index = operators.index("~")
            if index == 0 and isinstance(sides[0], Expr) and not is_number(sides[0].tree):
                operators[0] = "="
                continue
            operators, sides = operators[:index], sides[: index + 1]
        if not operators:
            return sides[0]
        if self.accept(":"):  # an inequality with its interval: -1<x<=1:(-1,1]
            self.union()
        return Relation(tuple(operators), tuple(sides))

    def union(self) -> Node:
        parts = [self.ratio()]
        while self.accept(r"\cup") or (self.at("U") and isinstance(parts[-1], Group) and self.accept("U")):
            parts.append(self.ratio())
        return parts[0] if len(parts) == 1 else Union(tuple(parts))

    def ratio(self) -> Node:
        parts = [self.term_node()]
        while (
            self.at(":")
            and isinstance(parts[-1], Expr)
            and self.peek(1).kind != "end"
            and self.peek(1).value != "("
        ):
            self.take()
            parts.append(self.term_node())
            if not isinstance(parts[-1], Expr):
                raise Unreadable
        if len(parts) == 1:
            return parts[0]
        clock = (
            len(parts) == 2
            and self.peek(-2).value == ":"
            and re.fullmatch(r"[0-5]\d", self.peek(-1).value) is not None
        )
        return Ratio(tuple(parts), clock)

    def term_node(self) -> Node:
        """A sum with its unit, or a bracket, a matrix, words."""
        saved = self.percent, self.degrees, self.ambiguous, self.unit
        self.percent = self.degrees = self.ambiguous = False
        self.unit = ""
        start = self.position
        value = self.sum()
        if isinstance(value, tuple):
            scale = self.units(value)
            tree = value if scale == 1 else ("*", value, ("n", Fraction(scale)))
            node: Node = Expr(
                tree,
                self.unit,
                self.percent,
                self.degrees,
                self.ambiguous,
                _last_place(self.tokens[start : self.position]),
            )
        else:
            node = value
        self.percent, self.degrees, self.ambiguous, self.unit = saved
        return node

    def units(self, tree: Tree) -> int:
        """Read a unit after a number into `self.unit`; returns the factor of words like "million"."""
        scale, parts = 1, []
        if self.accept(r"\%", "%"):
            self.percent = True
        if self.peek().value in _CURRENCIES and not self.unit:
            self.unit = _CURRENCIES[self.take().value]
        if not is_number(tree):
            if (
                self.peek().kind in ("text", "word")
                and self.peek().value.strip().casefold() not in _SEPARATORS
            ):
                parts.append(self.unit_text())
                self.unit = " ".join(parts)
                self.ambiguous = True
            return 1
        while True:
            token = self.peek()
            words = token.value.casefold().split() if token.kind in ("text", "word") else []
            if token.kind == "letter" and not parts and self.unit_letter():
                words = [token.value.casefold()]
                self.ambiguous = True
            if token.value == "/" and parts and self.peek(1).kind in ("text", "word", "letter"):
                self.take()
                parts.append("/")
                continue
            if not words or (len(words) == 1 and words[0] in _SEPARATORS):
                break
            if words[0].rstrip(".") in ("percent", "pct", "percentage") and not parts:
                self.percent = True
                self.take()
                continue
            while words and words[0] in _SCALES:
                scale *= _SCALES[words.pop(0)]
            self.take()
            power = ""
            if self.at("^") and self.peek(1).value != r"\circ":
                self.take()
                power = "^" + self.braced_digits()
            if words:
                parts.append(" ".join(words) + power)
            self.accept(".")
        if parts:
            self.unit = (self.unit + " " + " ".join(parts)).strip()
        return scale

    def unit_letter(self) -> bool:
        """Whether a single letter after a number may be its unit: `5 m`, `5 m^2` and nothing behind it."""
        token = self.peek()
        ahead = 1
        if self.peek(ahead).value == "^":
            ahead += 4 if self.peek(ahead + 1).value == "{" else 2
        behind = self.peek(ahead)
        closed = (
            behind.kind == "end"
            or behind.value in (",", ";", ")", "]")
            or (behind.value == "/" and self.peek(ahead + 1).kind in ("text", "letter"))
        )
        return token.kind == "letter" and token.spaced and token.value in UNIT_LETTERS and closed

    def unit_text(self) -> str:
        return self.take().value.casefold()

    def braced_digits(self) -> str:
        braced = self.accept("{")
        sign = "-" if self.accept("-") else ""
        token = self.take()
        if token.kind != "number":
            raise Unreadable
        if braced:
            self.expect("}")
        return sign + token.value

    # -------------------------------------------------------------------------------------------------------------- arithmetic

    def sum(self) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable
        terms: list[Tree] = []
        first = True
        while True:
            sign = ""
            while self.at("+", "-", r"\pm", r"\mp"):
                value = self.take().value
                if value in (r"\pm", r"\mp"):
                    if sign:
                        raise Unreadable
                    sign = value
                elif value == "-":
                    sign = "-" if sign == "" else "" if sign == "-" else sign
                if self.at("/") and self.peek(1).value == "-" and value == "+":  # +/-
                    self.position += 2
                    sign = r"\pm"
            if not first and not sign and self.tokens[self.position - 1].value != "+":
                break
            value = self.product()
            if not isinstance(value, tuple):
                if first and not sign and not self.at("+", "-"):
                    self.depth -= 1
                    return value
                raise Unreadable
            terms.append(
                ("-", value) if sign == "-" else ("pm", value, 1 if sign == r"\pm" else -1) if sign else value
            )
            first = False
            if not self.at("+", "-", r"\pm", r"\mp"):
                break
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def product(self) -> Any:
        value = self.signed_power()
        if not isinstance(value, tuple):
            if self.starts_factor() or self.at("*", "/", r"\cdot", r"\times"):
                raise Unreadable
            return value
        factors = [value]
        divided = False
        while True:
            if self.accept("*", r"\cdot", r"\times", r"\ast"):
                value = self.signed_power()
            elif self.at("/", r"\div") and not (self.unit and self.peek(1).kind == "text"):
                self.take()
                divisor = self.signed_power()
                if not isinstance(divisor, tuple):
                    raise Unreadable
                numerator = factors[0] if len(factors) == 1 else ("*", *factors)
                factors = [("/", numerator, divisor)]
                divided = True
                continue
            elif self.starts_factor() and not self.starts_unit(factors):
                if divided:
                    self.ambiguous = True  # 1/2x
                value = self.power()
            else:
                return factors[0] if len(factors) == 1 else ("*", *factors)
            if not isinstance(value, tuple):
                raise Unreadable
            factors.append(value)

    def starts_unit(self, factors: list[Tree]) -> bool:
        token = self.peek()
        if token.kind == "text":
            return not (
                token.value in ("e", "i") or (len(token.value) == 1 and not all(map(is_number, factors)))
            )
        if token.kind == "letter":
            return len(factors) == 1 and _is_literal(factors[0]) and self.unit_letter()
        return token.kind == "word" and all(map(is_number, factors))

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind in ("letter", "text", "word"):
            return token.value.strip().casefold() not in _SEPARATORS and not (
                token.value == "U" and self.peek(1).value in "(["
            )
        if token.kind == "number":
            return self.tokens[self.position - 1].kind != "number"
        if token.kind == "operator":
            return token.value in ("(", "{", "[") or (token.value == "|" and not self.bars)
        return token.kind == "command" and (
            token.value[1:] in FUNCTIONS
            or token.value[1:] in _GREEK
            or token.value in _PREFIXES
            or (token.value == r"\lvert")
        )

    def signed_power(self) -> Any:
        negative = False
        while self.at("+", "-"):
            negative ^= self.take().value == "-"
        value = self.power()
        if negative and not isinstance(value, tuple):
            raise Unreadable
        return ("-", value) if negative else value

    def power(self) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable
        base = self.atom()
        while True:
            if self.at("^", "**"):
                self.take()
                if self.accept(r"\circ") or (
                    self.at("{") and self.peek(1).value == r"\circ" and self.skip(2)
                ):
                    self.accept("}")
                    self.degrees = True
                    continue
                if not isinstance(base, tuple):
                    raise Unreadable
                base = ("^", base, self.exponent())
            elif self.at("!") and self.peek(1).value != "=" and isinstance(base, tuple):
                self.take()
                if self.at("!"):
                    raise Unreadable
                base = ("f", "factorial", base)
            elif self.at(r"\%", "%") and isinstance(base, tuple):
                self.take()
                self.percent = True
            else:
                self.depth -= 1
                return base

    def skip(self, count: int) -> bool:
        self.position += count
        return True

    def exponent(self) -> Tree:
        negative = False
        while self.at("+", "-"):
            negative ^= self.take().value == "-"
        value = self.atom()
        if self.at("^", "**") and isinstance(value, tuple):  # 9^9^9 is 9^(9^9)
            self.take()
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise Unreadable
            value = ("^", value, self.exponent())
            self.depth -= 1
        if not isinstance(value, tuple):
            raise Unreadable
        return ("-", value) if negative else value

    def atom(self) -> Any:
        token = self.take()
        if token.kind == "number":
            return self.number(token)
        if token.kind == "letter":
            return self.symbol(token.value)
        if token.kind == "word":
            if token.value.casefold() in _SEPARATORS:
                raise Unreadable
            if (
                len(token.value) < 4 and token.value.casefold() in _UNITS
            ):  # a unit's name, read as a product of letters
                return ("*", *(_letter(letter) for letter in token.value))
            if token.value.isupper() or self.at("=") or self.peek(-2).value == "=":
                return self.symbol(token.value)
            raise Unreadable  # a sentence
        if token.kind == "text":
            if not re.fullmatch(r"[A-Za-z]+", token.value):
                raise Unreadable
            if len(token.value) == 1:
                return self.symbol(token.value)
            if is_prose(token.value):
                return Words(token.value.casefold())
            self.ambiguous = True
            return ("*", *(_letter(letter) for letter in token.value))
        if token.value in _OPENING:
            return self.bracket(_OPENING[token.value])
        if token.value == "{":
            node = self.items()
            self.expect("}")
            return node.tree if isinstance(node, Expr) and self.inherit(node) else node
        if token.value in ("|", r"\lvert", r"\vert", r"\|") and not (self.bars and token.value == "|"):
            self.bars += 1
            value = self.sum()
            self.bars -= 1
            if not isinstance(value, tuple):
                raise Unreadable
            self.expect("|", r"\rvert", r"\vert", r"\|")
            return ("f", "abs", value)
        if token.kind == "command":
            return self.command(token.value[1:])
        raise Unreadable

    def inherit(self, node: Expr) -> bool:
        """Take over what a grouped expression carries besides its tree."""
        self.percent |= node.percent
        self.degrees |= node.degrees
        self.ambiguous |= node.ambiguous
        if node.unit:
            if self.unit:
                raise Unreadable
            self.unit = node.unit
        return True

    def number(self, token: _Token) -> Any:
        value = _number(token.value)
        if self.at("_"):
            self.take()
            braced = self.accept("{")
            bracketed = self.accept("(")
            base = self.take()
            number = _NUMBERS.get(base.value.casefold(), 0) if base.kind in ("text", "word") else 0
            if base.kind == "number" and base.value.isdigit():
                number = int(base.value[:4])
            if bracketed:
                self.expect(")")
            if braced:
                self.expect("}")
            if not 2 <= number <= 36 or not re.fullmatch(r"\d+", token.value):
                raise Unreadable
            return Based(token.value.lstrip("0") or "0", number)
        if (token.value.isdigit() and self.at(r"\frac")) or (
            self.peek().kind == "number" and self.peek(1).value == "/"
        ):
            mixed = self.mixed(value)
            if mixed:
                return mixed
        if "." in token.value and self.at(r"\overline", r"\bar", r"\dot"):
            return self.repeating(token.value)
        return ("n", value)

    def mixed(self, whole: Fraction) -> Tree | None:
        """`1\\frac{4}{5}` and `3 1/2`: a proper fraction of two plain numbers after a whole number adds to
        it."""
        saved = self.position
        if self.accept(r"\frac"):
            digits = [self.fraction_digits(), self.fraction_digits()]
        else:
            digits = [self.take().value, (self.skip(1) and self.take().value) or ""]
        if all(part is not None and re.fullmatch(r"\d{1,9}", part) for part in digits) and not self.at(
            "^", "!"
        ):
            numerator, denominator = (int(part or 0) for part in digits)
            if 0 < numerator < denominator:
                return ("n", whole + Fraction(numerator, denominator))
        self.position = saved
        return None

    def fraction_digits(self) -> str | None:
        """The digits of a `\\frac` argument; None where it is anything else."""
        token = self.peek()
        if token.kind == "number":
            if len(token.value) > 1 and token.value.isdigit():  # \frac12
                self.tokens[self.position] = replace(token, value=token.value[1:], spaced=False)
                self.tokens.insert(self.position, replace(token, value=token.value[0]))
            return self.take().value
        if token.value == "{" and self.peek(1).kind == "number" and self.peek(2).value == "}":
            self.position += 3
            return self.peek(-2).value
        return None

    def repeating(self, written: str) -> Tree:
        self.take()
        digits = self.fraction_digits()
        if digits is None or not digits.isdigit() or len(digits) > 50:
            raise Unreadable
        places = len(written.partition(".")[2])
        return ("n", _number(written) + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places))

    def symbol(self, name: str) -> Tree:
        plain = name
        if self.at("_"):
            self.take()
            name += "_" + self.raw_group()
        while self.at("'") or (
            self.at("^")
            and (
                self.peek(1).value == r"\prime"
                or (self.peek(1).value == "{" and self.peek(2).value == r"\prime")
            )
        ):
            if self.accept("'"):
                name += "'"
                continue
            self.take()
            name += "'" * self.raw_group().count("prime")
        if plain in tuple("fghFGH") and [self.peek(n).value for n in range(6)] == [
            "^",
            "{",
            "-",
            "1",
            "}",
            "(",
        ]:
            self.position += 5
            name += "^-1"
        if self.at("(") and (call := self.call(plain)):
            self.ambiguous |= plain not in "fghFGH"
            return ("s", name + call)
        return _letter(name)

    def call(self, name: str) -> str:
        """The argument of `f(x)`, `I(0)` as text; "" where the bracket is a factor: `n(n+1)`."""
        if name in ("e", "i"):
            return ""
        inner = 1
        if name in tuple("fghFGH"):
            depth = 1
            while depth and self.peek(inner).kind != "end":
                depth += {"(": 1, ")": -1}.get(self.peek(inner).value, 0)
                inner += 1
            if depth:
                raise Unreadable
            inner -= 1
        else:
            if self.peek(1).kind not in ("number", "letter") and self.peek(1).value[1:] not in _GREEK:
                return ""
            inner = 2
            if self.peek(inner).value != ")":
                return ""
        argument = "".join(token.value for token in self.tokens[self.position + 1 : self.position + inner])
        self.position += inner + 1
        return f"({argument})"

    def raw_group(self) -> str:
        """The next token or group as text, without spaces."""
        if not self.accept("{"):
            return self.take().value
        depth = 1
        parts: list[str] = []
        while True:
            token = self.take()
            depth += {"{": 1, "}": -1}.get(token.value, 0) if token.kind == "operator" else 0
            if not depth:
                return "".join(parts)
            if token.value not in ("{", "}"):
                parts.append(token.value.strip())

    def bracket(self, opening: str) -> Any:
        closing = tuple(key for key, value in _CLOSING.items() if (opening == "{") == (value == "}"))
        bars, self.bars = self.bars, 0
        if opening == "{":
            if self.accept(*closing):
                self.bars = bars
                return Group("{}", ())
            self.set_builder()
        elif self.at(*closing):
            raise Unreadable
        node = self.items()
        end = self.take()
        if end.kind == "text" or end.value not in closing:
            raise Unreadable
        self.bars = bars
        brackets = opening + _CLOSING[end.value]
        if isinstance(node, Group) and node.brackets in ("", "or"):
            return Group(brackets, node.items)
        if opening == "{":
            return node if isinstance(node, Relation) and node.operators[0] != "=" else Group("{}", (node,))
        if brackets not in ("()", "[]"):
            raise Unreadable
        if isinstance(node, Expr):
            self.inherit(node)
            return node.tree
        return node

    def set_builder(self) -> None:
        """Skip `x |` and `x \\in R :` of a set given by a condition."""
        start = self.position
        if self.peek().kind != "letter":
            return
        self.take()
        if self.accept(r"\in"):
            self.take()
            if self.at("{"):
                self.raw_group()
        if not self.accept("|", r"\mid", ":", r"\vert"):
            self.position = start

    # ---------------------------------------------------------------------------------------------------------------- commands

    def argument(self) -> Tree:
        """A TeX argument: a group, a command, or one digit or letter."""
        token = self.peek()
        if token.kind == "number" and len(token.value) > 1 and token.value.isdigit():
            self.tokens[self.position] = replace(token, value=token.value[1:], spaced=False)
            return ("n", Fraction(int(token.value[0])))
        value = self.atom()
        if not isinstance(value, tuple):
            raise Unreadable
        return value

    def command(self, name: str) -> Any:
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        if name == "pi":
            return ("pi",)
        if name == "infty":
            return ("inf",)
        if name in ("emptyset", "varnothing", "oslash"):
            return Group("{}", ())
        if name in ("frac", "dfrac"):
            if derivative := self.derivative():
                return ("s", derivative)
            numerator = self.argument()
            return ("/", numerator, self.argument())
        if name in ("sqrt", "cbrt"):
            degree: Tree = ("n", Fraction(3 if name == "cbrt" else 2))
            if self.accept("["):
                value = self.sum()
                self.expect("]")
                if not isinstance(value, tuple):
                    raise Unreadable
                degree = value
            digits = self.peek()
            if digits.kind == "number":
                self.take()
                return ("root", ("n", _number(digits.value)), degree)
            return ("root", self.argument(), degree)
        if name in ("binom", "dbinom", "tbinom"):
            if self.accept("("):
                first = self.sum()
                self.expect(",")
                second = self.sum()
                self.expect(")")
            else:
                first = self.argument()
                second = self.argument()
            if not isinstance(first, tuple) or not isinstance(second, tuple):
                raise Unreadable
            return ("f", "binomial", first, second)
        if name in ("lfloor", "lceil"):
            value = self.sum()
            self.expect(r"\rfloor" if name == "lfloor" else r"\rceil")
            if not isinstance(value, tuple):
                raise Unreadable
            return ("f", "floor" if name == "lfloor" else "ceil", value)
        if name in ("sum", "prod"):
            return self.series(name)
        if name == "begin":
            return self.matrix()
        if name == "mathbb":
            content = self.raw_group()
            if content == "R":
                return Group("()", (Expr(("-", ("inf",))), Expr(("inf",))))
            return ("s", "mathbb" + content)
        if name in ("mathbf", "boldsymbol", "mathit", "mathcal", "mathsf", "bm"):
            return self.symbol(self.raw_group())
        if name in _ACCENTS:
            return self.symbol(f"\\{name} {self.raw_group()}")
        if name == "angle":
            parts = []
            while self.peek().kind == "letter":
                parts.append(self.take().value + ("_" + self.raw_group() if self.accept("_") else ""))
            return ("s", "angle " + "".join(parts))
        if "\\" + name in _CURRENCIES:
            value = self.atom()
            if not isinstance(value, tuple) or self.unit:
                raise Unreadable
            self.unit = _CURRENCIES["\\" + name]
            return value
        if name in _GREEK:
            return self.symbol("\\" + name)
        raise Unreadable

    def function(self, name: str) -> Tree:
        power: Tree | None = None
        base: Tree | None = None
        while self.at("^", "_") or (self.at("**")):
            if self.take().value == "_":
                base = self.argument()
            else:
                power = self.exponent()
        if self.at("(", "{", "["):
            opening = self.take().value
            value = self.sum()
            if opening == "(" and self.accept(","):  # log(8, 2)
                base = self.sum()
            self.expect({"(": ")", "{": "}", "[": "]"}[opening])
        else:
            value = self.function_argument()
        if not isinstance(value, tuple) or (base is not None and not isinstance(base, tuple)):
            raise Unreadable
        if name == "exp":
            call: Tree = ("^", ("e",), value)
        elif name in ("log", "lg", "ln"):
            call = ("f", "ln", value)
            if name == "lg":
                base = ("n", Fraction(10))
            if base is not None:
                call = ("/", call, ("f", "ln", base))
            elif name == "log":
                call = ("/", call, ("s", "log base"))
        else:
            if power == ("-", ("n", Fraction(1))) and name in _INVERTIBLE:
                name, power = "a" + name, None
            call = ("f", name, value)
        return call if power is None else ("^", call, power)

    def function_argument(self) -> Tree:
        """What a function without brackets applies to: `\\sin 2 t` takes the factors up to the next function,
        sign or slash."""
        factors = []
        if self.at("-"):
            self.take()
            factors.append(("n", Fraction(-1)))
        while (
            not factors
            or factors == [("n", Fraction(-1))]
            or (
                self.starts_factor()
                and self.peek().value[1:] not in FUNCTIONS
                and not self.at("(", "{", "[", "|")
                and self.peek().kind not in ("text", "word")
            )
        ):
            value = self.power()
            if not isinstance(value, tuple):
                raise Unreadable
            factors.append(value)
        if self.at("/", "*", "(", r"\cdot", r"\times"):
            self.ambiguous = True
        return factors[0] if len(factors) == 1 else ("*", *factors)

    def derivative(self) -> str:
        r"""`\frac{dM}{dt}` as one symbol: as a fraction its d would cancel. "" where it is a fraction."""
        saved = self.position
        if self.peek().value != "{" or self.peek(1).value not in ("d", r"\partial"):
            return ""
        first = self.raw_group()
        if self.peek().value == "{" and self.peek(1).value in ("d", r"\partial"):
            return f"{first}/{self.raw_group()}"
        self.position = saved
        return ""

    def series(self, name: str) -> Tree:
        self.expect("_")
        self.expect("{")
        variable = self.take()
        if variable.kind != "letter":
            raise Unreadable
        self.expect("=")
        low = self.sum()
        self.expect("}")
        self.expect("^")
        high = self.exponent()
        body = self.product()
        if not isinstance(low, tuple) or not isinstance(body, tuple):
            raise Unreadable
        return (name, variable.value, low, high, body)

    def matrix(self) -> Node:
        name = self.raw_group()
        if name not in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "Bmatrix"):
            raise Unreadable
        if name == "array":
            self.raw_group()
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while True:
            if self.accept(r"\end"):
                break
            row.append(self.ratio())
            if self.accept("&"):
                continue
            rows.append(tuple(row))
            row = []
            if not self.accept("\\\\") and not self.at(r"\end"):
                raise Unreadable
        if row or not rows or self.raw_group() != name:
            raise Unreadable
        return Matrix(tuple(rows))


_ACCENTS = ("vec", "hat", "bar", "dot", "ddot", "tilde", "overline", "overrightarrow", "widehat", "underline")
_INVERTIBLE = ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")
_PREFIXES = frozenset(
    "\\" + name
    for name in _words(
        "pi infty frac sqrt cbrt binom dbinom tbinom lfloor lceil sum prod mathbf boldsymbol mathit mathcal mathsf bm "
        "vec hat bar dot ddot tilde overline overrightarrow widehat underline mathbb langle angle begin"
    )
)


def _number(written: str) -> Fraction:
    mantissa, _, exponent = written.replace("E", "e").partition("e")
    if len(mantissa) > _MAX_DIGITS or abs(int(exponent[:9] or 0)) > _MAX_EXPONENT:
        raise Unreadable
    whole, _, decimals = mantissa.partition(".")
    return Fraction(int((whole + decimals) or 0), 10 ** len(decimals)) * Fraction(10) ** int(exponent or 0)


def _is_literal(tree: Tree) -> bool:
    return tree[0] == "n" or (tree[0] == "-" and _is_literal(tree[1]))


def _last_place(tokens: list[_Token]) -> Fraction | None:
    """The place value of the last digit of a decimal, plain or scientific; None where the tokens are anything
    else."""
    values = [
        token.value
        for token in tokens
        if token.value not in ("-", "+", "$", r"\$", r"\%", "%", "{", "}") and token.kind != "text"
    ]
    if not values or "." not in values[0] or not re.fullmatch(r"[\d.]+(?:[eE][+-]?\d+)?", values[0]):
        return None
    mantissa, _, exponent = values[0].casefold().partition("e")
    power = int(exponent or 0)
    if len(values) > 1 and values[1] not in ("^", r"\circ"):
        if (
            len(values) != 5
            or values[1] not in (r"\times", r"\cdot", "*")
            or values[2] != "10"
            or not values[4].isdigit()
        ):
            return None
        sign = -1 if any(token.value == "-" for token in tokens[-4:]) else 1
        power = sign * int(values[4][:4])
    return Fraction(10) ** (power - len(mantissa.partition(".")[2])) if abs(power) <= _MAX_EXPONENT else None


def both_signs(node: Node) -> list[Node]:
    """The two values of an answer with plus-minus signs, [node] for any other; in a list they are two more
    items."""
    if isinstance(node, Group) and node.brackets in ("", "or", "{}"):
        return [replace(node, items=tuple(sign for item in node.items for sign in both_signs(item)))]
    signed = [_with_sign(node, sign) for sign in (1, -1)]
    return signed if signed[0] != signed[1] else [node]


def _with_sign(node: Node, sign: int) -> Node:
    if isinstance(node, Expr):
        return replace(node, tree=rebuild(node.tree, lambda tree: _signed(tree, sign)))
    if isinstance(node, Relation):
        return replace(node, sides=tuple(_with_sign(side, sign) for side in node.sides))
    if isinstance(node, Group):
        return replace(node, items=tuple(_with_sign(item, sign) for item in node.items))
    return node


def _signed(tree: Tree, sign: int) -> Tree:
    return tree if tree[0] != "pm" else tree[1] if tree[2] == sign else ("-", tree[1])


def walk(tree: Tree) -> Iterator[Tree]:
    yield tree
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from walk(part)


def rebuild(tree: Tree, change: Callable[[Tree], Tree]) -> Tree:
    """The tree with `change` applied to every node, leaves first."""
    return change(
        (tree[0], *(rebuild(part, change) if isinstance(part, tuple) else part for part in tree[1:]))
    )


def unit_size(unit: str) -> tuple[Fraction, tuple[tuple[str, int], ...], bool]:
    """Factor to the base units, dimensions with their powers, and whether every word of it is a known unit."""
    factor, known, sign = Fraction(1), True, 1
    powers: dict[str, int] = {}
    text = re.sub(r"\bper\b", "/", unit.casefold())
    text = re.sub(r"\b(?:square|sq)\s*\.?\s*([a-z]+)", r"\1^2", text)
    text = re.sub(r"\bcubic\s*([a-z]+)", r"\1^3", text)
    for word in re.findall(r"/|[a-z]+(?:\^-?\d+)?", text):
        if word == "/":
            sign = -1
            continue
        name, _, power = word.partition("^")
        exponent = sign * max(-9, min(9, int(power or 1)))
        found = next(
            (_UNITS[key] for key in (name, name.removesuffix("s"), name.removesuffix("es")) if key in _UNITS),
            None,
        )
        known &= found is not None
        size, dimension = found or (Fraction(1), name.removesuffix("s") if len(name) > 3 else name)
        factor *= size**exponent
        powers[dimension] = powers.get(dimension, 0) + exponent
    return factor, tuple(sorted((key, value) for key, value in powers.items() if value)), known
