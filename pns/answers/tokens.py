"""An answer's text as tokens, and a place among them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pns.answers.spelling import FUNCTIONS, GREEK, SHORT_WORDS, TEXT
from pns.answers.units import UNITS

_MAX_DEPTH = 30  # of atoms in atoms: answers have under ten, and Python's stack is far larger
_CODE = re.compile(r"\b(?:np|numpy|math|sympy|sp|cmath)\.(?=[a-z])")
_TOKEN = re.compile(
    rf"\s*(?:(?P<text>{TEXT})|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\d.]))?)"
    r"|(?P<command>\\[A-Za-z]+\*?|\\[{}|%#&\\$])|(?P<letters>[A-Za-z]+)"
    r"|(?P<operator>\*\*|<=|>=|!=|==|<>|[-+*/^_(){}\[\]|,;:=<>!%'.&@#?\\\"`]))"
)
_COMMANDS = {*FUNCTIONS, "sqrt", "pi", "cbrt", "infty", "binom", *(name for name in GREEK if len(name) > 2)}
SEPARATORS = {",": "", ";": "", "and": "", "or": "or"}  # the kind of list that each makes


class Unreadable(Exception):
    """The text is not an answer in this grammar."""


@dataclass(frozen=True)
class Token:
    kind: str  # number, digit, command, letter, word, text, operator; end behind the last one
    value: str
    spaced: bool = False  # white space before it

    @property
    def word(self) -> str:
        """The text or word in lower case; "" for a token of another kind."""
        return self.value.strip().casefold() if self.kind in ("text", "word") else ""


_END = Token("end", "")


def split_tokens(answer: str) -> list[Token]:
    """The tokens of a cleaned text. Raises Unreadable at a character that no answer has."""
    text = _CODE.sub("", answer).rstrip()
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise Unreadable
        spaced = text[position].isspace()
        position = match.end()
        kind = match.lastgroup or "text"
        value = match[kind]
        if kind == "text":
            value = value[value.index("{") + 1 : -1].strip(" ~")
        if kind == "letters":
            tokens += _split_letters(value, spaced)
        else:
            tokens.append(Token(kind, value, spaced))
    return tokens


def _split_letters(run: str, spaced: bool) -> list[Token]:
    if run in _COMMANDS:
        return [Token("command", "\\" + run, spaced)]  # sin, \sin
    word = run.casefold()
    if word in ("inf", "oo", "infinity"):
        return [Token("command", r"\infty", spaced)]
    is_unit = run in UNITS and (spaced or (run.islower() and run[0] not in "nu"))
    if len(run) >= 4 or (len(run) > 1 and (word in SHORT_WORDS or is_unit)):
        return [Token("word", run, spaced)]  # apples, cm
    return [Token("letter", letter, spaced and index == 0) for index, letter in enumerate(run)]


class Cursor:
    """A place in a list of tokens. What it takes and does not find raises Unreadable."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> Token:
        index = self.position + ahead
        return self.tokens[index] if 0 <= index < len(self.tokens) else _END

    def take(self) -> Token:
        token = self.peek()
        if token is _END:
            raise Unreadable
        self.position += 1
        return token

    def at(self, *values: str) -> bool:
        token = self.peek()
        return token.value in values and token.kind not in ("text", "end")

    def accept(self, *values: str) -> str:
        """Take the next token if it is one of these; its value, or "" """
        if not self.at(*values):
            return ""
        return self.take().value

    def expect(self, *values: str) -> str:
        if not self.at(*values):
            raise Unreadable
        return self.take().value

    def at_digit(self) -> bool:
        r"""Whether the next token is the first of several digits, as in `\frac12`, and now by itself."""
        token = self.peek()
        if token.kind == "number" and len(token.value) > 1 and token.value.isdigit():
            digits = [Token("digit", token.value[0], token.spaced), Token("number", token.value[1:])]
            self.tokens[self.position : self.position + 1] = digits
        return self.peek().kind == "digit"

    def deepen(self) -> None:
        """Go one level into the grammar; `depth` is put back at the end of the level."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable

    def raw_group(self) -> str:
        """The next token or group as text, without spaces."""
        if not self.accept("{"):
            return self.take().value
        level = 1
        parts: list[str] = []
        while True:
            token = self.take()
            if token.kind == "operator":
                level += {"{": 1, "}": -1}.get(token.value, 0)
            if not level:
                return "".join(parts)
            if token.value not in ("{", "}"):
                parts.append(token.value.strip())
