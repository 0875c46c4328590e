"""The grammar of answers.

An answer is a list of relations; a relation is a chain of unions; a union joins sums. What does not fit the
grammar raises `Unreadable`; nothing is skipped in order to make it fit. Nesting is limited, so reading is
cheap on any text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from pns.answers.atoms import (
    Marks,
    at_unit_letter,
    last_place,
    number_value,
    read_derivative,
    read_number,
    read_symbol,
    read_unit,
    skip_set_builder,
)
from pns.answers.spelling import FUNCTIONS, GREEK, TRIGONOMETRIC, is_prose
from pns.answers.tokens import SEPARATORS, Cursor, Token, Unreadable
from pns.answers.tree import (
    EMPTY_SET,
    INFINITY,
    LOG_BASE,
    ONE,
    REALS,
    TEN,
    Answer,
    Call,
    Constant,
    Expression,
    Group,
    Matrix,
    Negative,
    Number,
    PlusMinus,
    Product,
    Ratio,
    Relation,
    Root,
    Series,
    Sum,
    Symbol,
    Tree,
    Union,
    Words,
    both_signs,
    letter,
    product_of,
    whole,
)
from pns.answers.units import CURRENCIES, UNITS

_RELATIONS = {
    "=": "=", "==": "=", r"\equiv": "=", "!=": "!=", "<>": "!=", r"\ne": "!=", r"\neq": "!=", r"\in": "in",
    "<": "<", r"\lt": "<", "<=": "<=", r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=",
    ">": ">", r"\gt": ">", ">=": ">=", r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=",
    r"\approx": "~", r"\simeq": "~", r"\doteq": "~",
}  # fmt: skip
_OPENING = {"(": "(", "[": "[", r"\{": "{", r"\lbrace": "{", r"\langle": "("}
_CLOSING = {")": ")", "]": "]", r"\}": "}", r"\rbrace": "}", r"\rangle": ")"}
_BARS = ("|", r"\|", r"\vert")
_MATRICES = ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "Bmatrix")


def as_tree(value: Tree | Answer) -> Tree:
    """What an operator or a function is applied to must be an expression."""
    if not isinstance(value, Tree):
        raise Unreadable
    return value


class Parser(Cursor):
    """Reads the tokens of one answer. Its rules return a tree, or an answer of another form where a bracket,
    words or a matrix are no part of an expression; what the tree cannot hold goes into `marks`."""

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__(tokens)
        self.marks = Marks()
        self.bars = 0  # absolute values that are open here
        self.has_signs = False

    def answer(self) -> Answer:
        answer = self.items()
        if self.peek().kind != "end":
            raise Unreadable
        values = both_signs(answer) if self.has_signs else [answer]
        return values[0] if len(values) == 1 else Group("", tuple(values))

    def items(self) -> Answer:
        """One relation, or a bare list of them."""
        self.deepen()
        items = [self.relation()]
        kind = ""
        while (separator := self.separator()) is not None:
            if self.peek().kind == "end" or self.peek().value in _CLOSING:  # "1, 2,"
                break
            kind = kind or separator
            items.append(self.relation())
        self.depth -= 1
        return items[0] if len(items) == 1 else Group(kind, tuple(items))

    def separator(self) -> str | None:
        kind = None
        while True:
            token = self.peek()
            value = token.value if token.kind == "operator" else token.word
            if value not in SEPARATORS:
                return kind
            self.position += 1
            kind = kind or SEPARATORS[value]

    def relation(self) -> Answer:
        operators: list[str] = []
        self.accept(r"\approx", "=")  # "= 5"
        sides = [self.union()]
        while self.peek().kind in ("operator", "command") and (operator := _RELATIONS.get(self.peek().value)):
            self.take()
            operators.append(operator)
            sides.append(self.union())
        while "~" in operators:  # what follows is rounded
            index = operators.index("~")
            if index == 0 and isinstance(sides[0], Expression) and sides[0].tree.symbols:
                operators[0] = "="  # x \approx 0.3
            else:
                operators, sides = operators[:index], sides[: index + 1]
        if not operators:
            return sides[0]
        if self.accept(":"):  # an inequality with its interval: -1<x<=1:(-1,1]
            self.union()
        return Relation(tuple(operators), tuple(sides))

    def union(self) -> Answer:
        parts = [self.ratio()]
        while self.accept(r"\cup") or (isinstance(parts[-1], Group) and self.accept("U")):  # [0,1)U(2,3)
            parts.append(self.ratio())
        return parts[0] if len(parts) == 1 else Union(tuple(parts))

    def ratio(self) -> Answer:
        parts = [self.quantity()]
        while self.at(":") and isinstance(parts[-1], Expression) and self.peek(1).value not in ("", "("):
            self.take()
            parts.append(self.quantity())
            if not isinstance(parts[-1], Expression):
                raise Unreadable
        if len(parts) == 1:
            return parts[0]
        is_two_digits = re.fullmatch(r"[0-5]\d", self.peek(-1).value) is not None
        return Ratio(tuple(parts), len(parts) == 2 and self.peek(-2).value == ":" and is_two_digits)

    def quantity(self) -> Answer:
        """A sum with its unit, or a bracket, a matrix, words."""
        outer, self.marks = self.marks, Marks()  # those of a part do not hold for the whole
        start = self.position
        value: Tree | Answer = self.sum()
        if isinstance(value, Tree):
            scale = read_unit(self, self.marks, value)
            tree = value if scale == 1 else value * whole(scale)
            value = Expression(tree, **vars(self.marks), step=last_place(self.tokens[start : self.position]))
        self.marks = outer
        return value

    def sum(self) -> Tree | Answer:
        self.deepen()
        terms: list[Tree] = []
        while True:
            sign = self.term_sign()
            if terms and not sign and self.peek(-1).value != "+":  # two minuses after a term are no sign
                break
            value = self.product()
            has_next = self.at("+", "-", r"\pm", r"\mp")
            if not isinstance(value, Tree) and not (terms or sign or self.at("+", "-")):
                self.depth -= 1
                return value
            term = as_tree(value)
            if sign == "-":
                term = -term
            elif sign:
                self.has_signs = True
                term = PlusMinus((term,), 1 if sign == r"\pm" else -1)
            terms.append(term)
            if not has_next:
                break
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def term_sign(self) -> str:
        r"""Read the signs before a term: "-", "\pm", "\mp", or "" for a plus or none."""
        sign = ""
        while self.at("+", "-", r"\pm", r"\mp"):
            value = self.take().value
            if value in (r"\pm", r"\mp"):
                if sign:
                    raise Unreadable
                sign = value
            elif value == "-" and sign in ("", "-"):
                sign = "" if sign else "-"
            elif value == "+" and self.at("/") and self.peek(1).value == "-":  # +/-
                self.position += 2
                sign = r"\pm"
        return sign

    def product(self) -> Tree | Answer:
        value = self.signed_power()
        if not isinstance(value, Tree):
            if self.starts_factor() or self.at("*", "/", r"\cdot", r"\times"):  # (1, 2) x
                raise Unreadable
            return value
        factors = [value]
        divided = False
        while True:
            if self.accept("*", r"\cdot", r"\times", r"\ast"):
                factors.append(as_tree(self.signed_power()))
            elif self.at("/", r"\div") and not (self.marks.unit and self.peek(1).kind == "text"):
                self.take()
                factors = [product_of(factors) / as_tree(self.signed_power())]
                divided = True
            elif self.starts_factor() and not self.starts_unit(factors):
                self.marks.ambiguous |= divided  # 1/2x
                factors.append(as_tree(self.power()))
            else:
                return product_of(factors)

    def starts_unit(self, factors: list[Tree]) -> bool:
        token = self.peek()
        if token.kind == "letter":
            first = factors[0]
            while isinstance(first, Negative):
                first = first.parts[0]
            return len(factors) == 1 and isinstance(first, Number) and at_unit_letter(self)
        are_numbers = not any(factor.symbols for factor in factors)
        if token.kind == "text":
            return token.value not in ("e", "i") and (len(token.value) != 1 or are_numbers)  # \text{e} is e
        return token.kind == "word" and are_numbers

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind in ("letter", "text", "word"):
            is_union = token.value == "U" and self.peek(1).value in "(["
            return not is_union and token.word not in SEPARATORS
        if token.kind == "number":
            return self.peek(-1).kind != "number"  # "3 4" is no product
        if token.kind == "operator":
            return token.value in ("(", "{", "[") or (token.value == "|" and not self.bars)  # else it closes
        is_opening = token.value in (r"\lvert", r"\langle")
        return token.kind == "command" and (is_opening or token.value[1:] in _FACTORS)

    def signed_power(self) -> Tree | Answer:
        negative = self.sign()
        value = self.power()
        return -as_tree(value) if negative else value

    def power(self) -> Tree | Answer:
        self.deepen()
        base = self.atom()
        while True:
            if self.accept("^", "**"):
                if self.accept(r"\circ") or self.accept_both("{", r"\circ"):  # 90^\circ, 90^{\circ}
                    self.accept("}")
                    self.marks.degrees = True
                else:
                    base = as_tree(base) ** self.exponent()
            elif isinstance(base, Tree) and self.at("!") and self.peek(1).value != "=":  # 5!, not 5 != 6
                self.take()
                if self.at("!"):  # a double factorial
                    raise Unreadable
                base = Call((base,), "factorial")
            elif isinstance(base, Tree) and self.accept(r"\%", "%"):
                self.marks.percent = True
            else:
                self.depth -= 1
                return base

    def accept_both(self, first: str, second: str) -> bool:
        accepted = self.at(first) and self.peek(1).value == second
        self.position += 2 * accepted
        return accepted

    def exponent(self) -> Tree:
        negative = self.sign()
        value = as_tree(self.atom())
        if self.accept("^", "**"):  # 9^9^9 is 9^(9^9)
            self.deepen()
            value = value ** self.exponent()
            self.depth -= 1
        return -value if negative else value

    def atom(self) -> Tree | Answer:
        token = self.take()
        if token.kind == "number":
            return read_number(self, token)
        if token.kind == "letter":
            return self.symbol(token.value)
        if token.kind in ("text", "word"):
            return self.text(token) if token.kind == "text" else self.word(token)
        if token.value in _OPENING:
            return self.bracket(_OPENING[token.value])
        if token.value == "{":
            answer = self.items()
            self.expect("}")
            return self.inside(answer)
        if token.value in (*_BARS, r"\lvert") and not (self.bars and token.value == "|"):
            self.bars += 1
            value = as_tree(self.sum())
            self.bars -= 1
            self.expect(*_BARS, r"\rvert")
            return Call((value,), "abs")
        command = _COMMANDS.get(token.value[1:]) if token.kind == "command" else None
        if not command:
            raise Unreadable
        return command(self, token.value[1:])

    def word(self, token: Token) -> Tree:
        word = token.word
        if word in SEPARATORS:
            raise Unreadable
        if len(word) < 4 and word in UNITS:  # a unit's name, read as a product of letters
            return Product(tuple(letter(name) for name in token.value))
        if token.value.isupper() or self.at("=") or self.peek(-2).value == "=":  # AB, speed = 5
            return self.symbol(token.value)
        raise Unreadable  # a sentence

    def text(self, token: Token) -> Tree | Words:
        if not re.fullmatch(r"[A-Za-z]+", token.value):
            raise Unreadable
        if len(token.value) == 1:
            return self.symbol(token.value)
        if is_prose(token.value):
            return Words(token.word)
        self.marks.ambiguous = True
        return Product(tuple(letter(name) for name in token.value))

    def symbol(self, name: str) -> Tree:
        return read_symbol(self, name, self.marks)

    def inside(self, answer: Answer) -> Tree | Answer:
        """The tree of an expression in brackets, whose marks are passed on; any other answer as it is."""
        if not isinstance(answer, Expression):
            return answer
        self.marks.percent |= answer.percent
        self.marks.degrees |= answer.degrees
        self.marks.ambiguous |= answer.ambiguous
        if self.marks.unit and answer.unit:
            raise Unreadable
        self.marks.unit = self.marks.unit or answer.unit
        return answer.tree

    def bracket(self, opening: str) -> Tree | Answer:
        bars, self.bars = self.bars, 0  # a bar in here closes none that was opened outside
        closing = (r"\}", r"\rbrace") if opening == "{" else (")", "]", r"\rangle")
        if opening == "{":
            if self.accept(*closing):
                self.bars = bars
                return EMPTY_SET
            skip_set_builder(self)
        elif self.at(*closing):
            raise Unreadable
        answer = self.items()
        end = self.take()
        if end.kind == "text" or end.value not in closing:
            raise Unreadable
        self.bars = bars
        brackets = opening + _CLOSING[end.value]
        if isinstance(answer, Group) and answer.brackets in ("", "or"):
            return Group(brackets, answer.items)
        if opening == "{":
            is_condition = isinstance(answer, Relation) and answer.operators[0] != "="  # \{x : x > 1\}
            return answer if is_condition else Group("{}", (answer,))
        if brackets not in ("()", "[]"):  # an interval has two ends
            raise Unreadable
        return self.inside(answer)

    def argument(self) -> Tree:
        """A TeX argument: a group, a command, or one digit or letter."""
        token = self.peek()
        if token.kind == "number" and len(token.value) > 1 and token.value.isdigit():
            self.tokens[self.position] = replace(token, value=token.value[1:], spaced=False)
            return whole(int(token.value[0]))
        return as_tree(self.atom())


def _function(parser: Parser, written: str) -> Tree:
    name = FUNCTIONS[written]
    power: Tree | None = None
    base: Tree | None = None
    while parser.at("^", "_", "**"):
        if parser.take().value == "_":
            base = parser.argument()
        else:
            power = parser.exponent()
    if parser.at("(", "{", "["):
        opening = parser.take().value
        value = as_tree(parser.sum())
        if opening == "(" and parser.accept(","):  # log(8, 2)
            base = as_tree(parser.sum())
        parser.expect({"(": ")", "{": "}", "[": "]"}[opening])
    else:
        value = _bare_argument(parser)
    if name in TRIGONOMETRIC and power == -ONE:  # \sin^{-1} x is the angle, not 1/\sin x
        name, power = "a" + name, None
    call: Tree
    if name == "exp":
        call = Constant("e") ** value
    elif name in ("log", "lg", "ln"):
        call = _logarithm(name, value, base)
    else:
        call = Call((value,), name)
    return call if power is None else call**power


def _logarithm(name: str, value: Tree, base: Tree | None) -> Tree:
    logarithm = Call((value,), "ln")
    if name == "lg":  # log to the base 10
        base = TEN
    if base is not None:
        return logarithm / Call((base,), "ln")
    return logarithm / Symbol(LOG_BASE) if name == "log" else logarithm


def _bare_argument(parser: Parser) -> Tree:
    r"""What a function without brackets applies to: `\sin 2 t` takes the factors up to the next function,
    sign or slash."""
    factors: list[Tree] = [whole(-1)] if parser.accept("-") else []
    factors.append(as_tree(parser.power()))
    while parser.starts_factor() and not parser.at("(", "{", "[", "|"):
        token = parser.peek()
        if token.value[1:] in FUNCTIONS or token.kind in ("text", "word"):
            break
        factors.append(as_tree(parser.power()))
    if parser.at("/", "*", "(", r"\cdot", r"\times"):  # \sin x/2
        parser.marks.ambiguous = True
    return product_of(factors)


def _fraction(parser: Parser, _name: str) -> Tree:
    return read_derivative(parser) or parser.argument() / parser.argument()


def _root(parser: Parser, name: str) -> Tree:
    degree: Tree = whole(3 if name == "cbrt" else 2)
    if parser.accept("["):
        degree = as_tree(parser.sum())
        parser.expect("]")
    if parser.peek().kind == "number":  # \sqrt12 is \sqrt{12}, though not in TeX
        return Root((Number(number_value(parser.take().value)), degree))
    return Root((parser.argument(), degree))


def _binomial(parser: Parser, _name: str) -> Tree:
    if not parser.accept("("):
        return Call((parser.argument(), parser.argument()), "binomial")
    top = as_tree(parser.sum())
    parser.expect(",")
    bottom = as_tree(parser.sum())
    parser.expect(")")
    return Call((top, bottom), "binomial")


def _rounded(parser: Parser, name: str) -> Tree:
    value = as_tree(parser.sum())
    parser.expect({"lfloor": r"\rfloor", "lceil": r"\rceil"}[name])
    return Call((value,), name[1:])


def _series(parser: Parser, kind: str) -> Tree:
    parser.expect("_")
    parser.expect("{")
    variable = parser.take()
    if variable.kind != "letter":
        raise Unreadable
    parser.expect("=")
    low = as_tree(parser.sum())
    parser.expect("}")
    parser.expect("^")
    high = parser.exponent()
    return Series((low, high, as_tree(parser.product())), kind, variable.value)


def _matrix(parser: Parser, _name: str) -> Matrix:
    name = parser.raw_group()
    if name not in _MATRICES:
        raise Unreadable
    if name == "array":  # its columns
        parser.raw_group()
    rows: list[tuple[Answer, ...]] = []
    row: list[Answer] = []
    while not parser.accept(r"\end"):
        row.append(parser.ratio())
        if parser.accept("&"):
            continue
        rows.append(tuple(row))
        row = []
        if not parser.accept("\\\\") and not parser.at(r"\end"):
            raise Unreadable
    if row or not rows or parser.raw_group() != name:
        raise Unreadable
    return Matrix(tuple(rows))


def _blackboard(parser: Parser, _name: str) -> Tree | Answer:
    content = parser.raw_group()
    return REALS if content == "R" else Symbol("mathbb" + content)


def _angle(parser: Parser, _name: str) -> Tree:
    name = "angle "
    while parser.peek().kind == "letter":
        name += parser.take().value
        if parser.accept("_"):
            name += "_" + parser.raw_group()
    return Symbol(name)


def _money(parser: Parser, name: str) -> Tree:
    value = as_tree(parser.atom())
    if parser.marks.unit:  # \$5 \$
        raise Unreadable
    parser.marks.unit = CURRENCIES["\\" + name]
    return value


_STYLES = "mathbf boldsymbol mathit mathcal mathsf bm"
_ACCENTS = "vec hat bar dot ddot tilde overline overrightarrow widehat underline"
_Command = Callable[[Parser, str], Tree | Answer]
_FACTORS: dict[str, _Command] = {  # commands that may follow a factor without a sign between
    **dict.fromkeys(GREEK, lambda parser, name: parser.symbol("\\" + name)),
    **dict.fromkeys(FUNCTIONS, _function),
    **dict.fromkeys(_STYLES.split(), lambda parser, _name: parser.symbol(parser.raw_group())),
    **dict.fromkeys(_ACCENTS.split(), lambda parser, name: parser.symbol(f"\\{name} {parser.raw_group()}")),
    "pi": lambda _parser, name: Constant(name),
    "infty": lambda _parser, _name: INFINITY,
    "frac": _fraction,
    **dict.fromkeys(("sqrt", "cbrt"), _root),
    **dict.fromkeys(("binom", "dbinom", "tbinom"), _binomial),
    **dict.fromkeys(("lfloor", "lceil"), _rounded),
    **dict.fromkeys(("sum", "prod"), _series),
    "begin": _matrix,
    "mathbb": _blackboard,
    "angle": _angle,
}
_COMMANDS: dict[str, _Command] = {
    **_FACTORS,
    **dict.fromkeys(("emptyset", "varnothing", "oslash"), lambda _parser, _name: EMPTY_SET),
    **dict.fromkeys((command[1:] for command in CURRENCIES), _money),
}
