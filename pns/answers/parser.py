"""The grammar of answers.

An answer is a list of relations; a relation is a chain of unions; a union joins sums. What does not fit the
grammar raises `Unreadable`; nothing is skipped in order to make it fit. Nesting is limited, so reading is
cheap on any text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from pns.answers.atoms import (
    Marks,
    at_unit,
    both_hold,
    in_degrees,
    is_domain,
    last_place,
    number_value,
    read_derivative,
    read_number,
    read_symbol,
    read_unit,
    without_points,
)
from pns.answers.spelling import FUNCTIONS, GREEK, STYLES, TRIGONOMETRIC, is_prose
from pns.answers.tokens import SEPARATORS, Cursor, Token, Unreadable
from pns.answers.tree import (
    DEGREE,
    EMPTY_SET,
    INFINITY,
    LOG_BASE,
    ONE,
    REALS,
    Answer,
    Call,
    Constant,
    Expression,
    Group,
    Matrix,
    Number,
    Power,
    Product,
    Quotient,
    Ratio,
    Relation,
    Series,
    Sum,
    Symbol,
    Tree,
    Union,
    Words,
    both_signs,
    letter,
    product_of,
    walk,
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
_TWO_SIGNS = {r"\pm": (False, True), r"\mp": (True, False)}  # whether the upper and the lower one are a minus
_SIGNS = {"+": (False, False), "-": (True, True), **_TWO_SIGNS}
# Of each logarithm by its name, what the natural one is divided by.
_LOGARITHMS = {"ln": None, "lg": Call((whole(10),), "ln"), "log": Symbol(LOG_BASE)}
_PLAIN = (Number, Product, Power, Quotient)  # what a number before a unit of letters is made of
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

    def __init__(self, tokens: list[Token], is_lower: bool) -> None:
        super().__init__(tokens)
        self.is_lower = is_lower  # of the two signs of a plus-minus
        self.marks = Marks()
        self.bars = 0  # absolute values that are open here

    def items(self) -> Answer:
        """One relation, or a bare list of them."""
        items = [self.relation()]
        kind = ""
        while (separator := self.separator()) is not None:
            if self.peek().kind == "end" or self.peek().value in _CLOSING:  # "1, 2,"
                break
            kind = kind or separator
            items.append(self.relation())
        items = [item for item in items if not is_domain(item)] or items  # k \in \mathbb{Z}
        return items[0] if len(items) == 1 else both_hold(Group(kind, tuple(items)))

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
        while sign := self.accept(*_RELATIONS):
            operators.append(_RELATIONS[sign])
            sides.append(self.union())
        if operators[:1] == ["~"] and isinstance(sides[0], Expression) and sides[0].tree.symbols:
            operators[0] = "="  # x \approx 0.3
        if "~" in operators:  # what follows is rounded
            index = operators.index("~")
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
        if self.accept(r"\setminus", r"\backslash"):
            return without_points(parts, self.ratio())
        return parts[0] if len(parts) == 1 else Union(tuple(parts))

    def ratio(self) -> Answer:
        parts = [self.quantity()]
        minutes = ""
        while self.at(":") and isinstance(parts[-1], Expression) and self.peek(1).value not in ("", "("):
            self.take()
            minutes = self.peek().value
            parts.append(self.quantity())
            if not isinstance(parts[-1], Expression):
                raise Unreadable
        if len(parts) == 1:
            return parts[0]
        are_numbers = all(isinstance(part, Expression) and isinstance(part.tree, Number) for part in parts)
        is_clock = len(parts) == 2 and are_numbers and re.fullmatch(r"[0-5]\d", minutes)
        return Ratio(tuple(parts), clock=bool(is_clock))

    def quantity(self) -> Answer:
        """A sum with its unit, or a bracket, a matrix, words."""
        outer, self.marks = self.marks, Marks()  # those of a part do not hold for the whole
        start = self.position
        value: Tree | Answer = self.sum()
        if isinstance(value, Tree):
            has_degrees = DEGREE in walk(value)
            degrees = in_degrees(value) if has_degrees else None
            if degrees is not None:
                value, self.marks.degrees = degrees, True
            elif value.symbols and has_degrees:  # 90^\circ - x, where x may be in degrees too
                self.marks.ambiguous = True
            scale = read_unit(self, self.marks, value)
            if self.marks.unit and self.marks.degrees:
                raise Unreadable
            tree = value if scale == 1 else value * whole(scale)
            value = Expression(tree, **vars(self.marks), step=last_place(self.tokens[start : self.position]))
        self.marks = outer
        return value

    def sum(self) -> Tree | Answer:
        terms: list[Tree] = []
        while not terms or self.at(*_SIGNS):
            is_negative = self.signs()
            if terms and not is_negative and self.peek(-1).value == "-":  # 5--8 is a range
                raise Unreadable
            value = self.product()
            if not (terms or is_negative or self.at(*_SIGNS)):
                return value
            terms.append(-as_tree(value) if is_negative else as_tree(value))
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def signs(self) -> bool:
        """Read plus and minus signs; whether they make a minus."""
        is_negative = False
        while sign := self.accept(*_SIGNS):
            if sign in _TWO_SIGNS and self.peek(-2).value in ("-", *_TWO_SIGNS):  # "-\pm"
                raise Unreadable
            is_negative ^= _SIGNS[sign][self.is_lower]
        return is_negative

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
        are_numbers = not any(factor.symbols for factor in factors)
        if token.kind == "letter" or token.value == r"\frac":
            if not are_numbers or not (unit := at_unit(self)):
                return False
            allowed = (Number,) if unit.is_one_letter else _PLAIN
            is_one = len(factors) == 1 or not unit.is_one_letter
            return is_one and all(isinstance(part, allowed) for factor in factors for part in walk(factor))
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
        return token.value in _FACTORS and not (token.value == "|" and self.bars)  # else it closes

    def signed_power(self) -> Tree | Answer:
        is_negative = self.signs()
        value = self.power()
        return -as_tree(value) if is_negative else value

    def power(self) -> Tree | Answer:
        base = self.atom()
        while True:
            if self.accept("^", "**"):
                base = as_tree(base) * DEGREE if self.accept(r"\circ") else as_tree(base) ** self.exponent()
            elif isinstance(base, Tree) and self.at("!") and self.peek(1).value != "=":  # 5!, not 5 != 6
                self.take()
                if self.at("!"):  # a double factorial
                    raise Unreadable
                base = Call((base,), "factorial")
            elif isinstance(base, Tree) and self.accept(r"\%", "%"):
                self.marks.percent = True
            else:
                return base

    def exponent(self) -> Tree:
        self.deepen()
        is_negative = self.signs()
        value = as_tree(self.atom())
        if self.accept("^", "**"):  # 9^9^9 is 9^(9^9)
            value = value ** self.exponent()
        self.depth -= 1
        return -value if is_negative else value

    def until(self, *closing: str, most: int = 1) -> tuple[Tree, ...]:
        """An expression, or up to `most` with commas between, and the bracket that closes them."""
        values = [as_tree(self.sum())]
        while len(values) < most and self.accept(","):
            values.append(as_tree(self.sum()))
        self.expect(*closing)
        return tuple(values)

    def atom(self) -> Tree | Answer:
        self.deepen()
        token = self.take()
        rule = _OF_KIND.get(token.kind) or _RULES.get(token.value)
        if not rule:
            raise Unreadable
        value = rule(self, token.value)
        self.depth -= 1
        return value

    def word(self, written: str) -> Tree:
        word = written.casefold()
        if word in SEPARATORS:
            raise Unreadable
        if len(word) < 4 and word in UNITS:  # a unit's name, read as a product of letters
            return Product(tuple(map(letter, written)))
        if written.isupper() or self.at("=") or self.peek(-2).value == "=":  # AB, speed = 5
            return self.symbol(written)
        raise Unreadable  # a sentence

    def text(self, written: str) -> Tree | Words:
        if not re.fullmatch(r"[A-Za-z]+", written):
            raise Unreadable
        if len(written) == 1:
            return self.symbol(written)
        if is_prose(written):
            return Words(written.casefold())
        self.marks.ambiguous = True
        return Product(tuple(map(letter, written)))

    def symbol(self, name: str) -> Tree:
        return read_symbol(self, name, self.marks)

    def absolute(self, bar: str) -> Tree:
        if self.bars and bar == "|":  # it closes another
            raise Unreadable
        self.bars += 1
        value = Call(self.until(*_BARS, r"\rvert"), "abs")
        self.bars -= 1
        return value

    def group(self, _brace: str) -> Tree | Answer:
        answer = self.items()
        self.expect("}")
        return self.inside(answer)

    def inside(self, answer: Answer) -> Tree | Answer:
        """The tree of an expression in brackets, whose marks are passed on; any other answer as it is."""
        if not isinstance(answer, Expression):
            return answer
        self.marks.percent |= answer.percent
        self.marks.ambiguous |= answer.ambiguous
        if self.marks.unit and answer.unit:
            raise Unreadable
        self.marks.unit = self.marks.unit or answer.unit
        return answer.tree * DEGREE if answer.degrees else answer.tree

    def bracket(self, written: str) -> Tree | Answer:
        opening = _OPENING[written]
        bars, self.bars = self.bars, 0  # a bar in here closes none that was opened outside
        closing = [end for end, bracket in _CLOSING.items() if (bracket == "}") == (opening == "{")]
        answer: Answer = Group("", ())
        if opening != "{" or not self.at(*closing):
            answer = self.items()
        brackets = opening + _CLOSING[self.expect(*closing)]
        self.bars = bars
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
        if self.at_digit():
            return whole(int(self.take().value))
        return as_tree(self.atom())


def read_answer(tokens: list[Token]) -> Answer:
    """The answer that the tokens are. Raises Unreadable where they are none."""
    answers = []
    has_both_signs = any(token.value in _TWO_SIGNS for token in tokens)
    for is_lower in (False, True)[: 1 + has_both_signs]:
        parser = Parser(list(tokens), is_lower)
        answers.append(parser.items())
        if parser.peek().kind != "end":
            raise Unreadable
    values = both_signs(*answers)
    return values[0] if len(values) == 1 else Group("", tuple(values))


def _function(parser: Parser, written: str) -> Tree:
    name = FUNCTIONS[written[1:]]
    power: Tree | None = None
    base: Tree | None = None
    while parser.at("^", "_", "**"):
        if parser.take().value == "_":
            base = parser.argument()
        else:
            power = parser.exponent()
    if opening := parser.accept("(", "{", "["):
        most = 2 if opening == "(" else 1  # log(8, 2)
        value, *bases = parser.until({"(": ")", "{": "}", "[": "]"}[opening], most=most)
        base = bases[0] if bases else base
    else:
        value = _bare_argument(parser)
    if name in TRIGONOMETRIC and power == -whole(1):  # \sin^{-1} x is the angle, not 1/\sin x
        name, power = "a" + name, None
    call: Tree = Call((value,), "ln" if name in _LOGARITHMS else name)
    divisor = Call((base,), "ln") if base else _LOGARITHMS.get(name)
    if name == "exp":
        call = Constant("e") ** value
    elif name in _LOGARITHMS and divisor:
        call = call / divisor
    return call if power is None else call**power


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


def _root(parser: Parser, name: str) -> Tree:
    degree: Tree = whole(3 if name == r"\cbrt" else 2)
    if parser.accept("["):
        [degree] = parser.until("]")
    # \sqrt12 is \sqrt{12}, though not in TeX
    is_number = parser.peek().kind == "number"
    radicand = Number(number_value(parser.take().value)) if is_number else parser.argument()
    return radicand ** (ONE / degree)


def _binomial(parser: Parser, _name: str) -> Tree:
    if not parser.accept("("):
        return Call((parser.argument(), parser.argument()), "binomial")
    top, *rest = parser.until(")", most=2)
    if not rest:
        raise Unreadable
    return Call((top, *rest), "binomial")


def _arrangements(parser: Parser, _name: str) -> Tree:
    """The ways to put some of so many things into an order."""
    things, places = parser.argument(), parser.argument()
    return Call((things,), "factorial") / Call((things - places,), "factorial")


def _series(parser: Parser, kind: str) -> Tree:
    parser.expect("_")
    parser.expect("{")
    variable = parser.take()
    if variable.kind != "letter":
        raise Unreadable
    parser.expect("=")
    [low] = parser.until("}")
    parser.expect("^")
    high = parser.exponent()
    return Series((low, high, as_tree(parser.product())), kind[1:], variable.value)


def _matrix(parser: Parser, _name: str) -> Matrix:
    name = parser.raw_group()
    if name not in _MATRICES:
        raise Unreadable
    if name == "array":  # its columns
        parser.raw_group()
    rows: list[list[Answer]] = [[]]
    while True:
        rows[-1].append(parser.ratio())
        is_row = parser.accept("\\\\")
        if parser.accept(r"\end"):
            break
        if is_row:
            rows.append([])
        else:
            parser.expect("&")
    if parser.raw_group() != name or len({len(row) for row in rows}) > 1:
        raise Unreadable
    return Matrix(tuple(map(tuple, rows)))


def _styled(parser: Parser, _name: str) -> Tree | Answer:
    """What stands in bold: a name in letters, or any other expression."""
    start = parser.position
    if not parser.at_digit() and re.fullmatch("[A-Za-z]+", name := parser.raw_group()):
        return parser.symbol(name)
    parser.position = start
    return parser.argument()


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
    parser.marks.unit = CURRENCIES[name]
    return value


def _named(names: Iterable[str], rule: _Rule) -> dict[str, _Rule]:
    """The rule for each of these commands."""
    return {"\\" + name: rule for name in names}


_Rule = Callable[[Parser, str], Tree | Answer]  # what a token begins, by its value
_SETS = {"R": REALS}
_ACCENTS = "vec hat bar dot ddot tilde overline overrightarrow widehat underline"
_WORDS: dict[str, _Rule] = {"letter": Parser.symbol, "text": Parser.text, "word": Parser.word}
_OF_KIND: dict[str, _Rule] = {"number": read_number, **_WORDS}
_FACTORS: dict[str, _Rule] = {  # what may follow a factor without a sign between
    **dict.fromkeys(("(", "[", r"\langle"), Parser.bracket),
    **dict.fromkeys(("|", r"\lvert"), Parser.absolute),
    "{": Parser.group,
    **_named(GREEK, Parser.symbol),
    **_named(FUNCTIONS, _function),
    **_named(STYLES, _styled),
    **_named(_ACCENTS.split(), lambda parser, name: parser.symbol(f"{name} {parser.raw_group()}")),
    r"\pi": lambda _parser, _name: Constant("pi"),
    r"\infty": lambda _parser, _name: INFINITY,
    r"\frac": lambda parser, _name: read_derivative(parser) or parser.argument() / parser.argument(),
    **_named(("sqrt", "cbrt"), _root),
    **_named(("binom", "dbinom", "tbinom"), _binomial),
    r"\lfloor": lambda parser, _name: Call(parser.until(r"\rfloor"), "floor"),
    r"\lceil": lambda parser, _name: Call(parser.until(r"\rceil"), "ceil"),
    r"\perm": _arrangements,
    **_named(("sum", "prod"), _series),
    r"\begin": _matrix,
    r"\mathbb": lambda parser, _name: _SETS.get(name := parser.raw_group()) or Symbol("mathbb" + name),
    r"\angle": _angle,
}
_RULES: dict[str, _Rule] = {
    **_FACTORS,
    **dict.fromkeys((r"\{", r"\lbrace"), Parser.bracket),
    **dict.fromkeys(_BARS[1:], Parser.absolute),
    **_named(("emptyset", "varnothing", "oslash"), lambda _parser, _name: EMPTY_SET),
    **dict.fromkeys(CURRENCIES, _money),
}
