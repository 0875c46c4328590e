"""The tiny world: templated multi-step word problems with an exact step checker.

A problem is a dependency graph of quantities, one per name:

    Bob has 12. Cal has 7 more than Bob. Eve has 3 times Cal. How many has Eve?

and a right solution derives every quantity that the query needs, once, after the quantities it is made of:

    <think>Cal has 12+7=19. So Eve has 19*3=57. </think>\\boxed{57}

Each problem has many right solutions: independent steps in any order, operands of sums and products in either
order, a product written as a repeated sum, and three phrasings of a step ("Cal has 12+7=19. ", "So Cal has
12+7=19. ", "12+7=19 for Cal. ").

A wrong derivation seldom gives the right answer: a sum is made of products or base values and a product of a
sum or a base value (chains of one kind commute), and no two numbers of different steps can be swapped without
changing the answer. All numbers of a problem are within 1..99 and all its quantities have different values,
so that a wrong step can be told by its numbers. Splits are disjoint: the split is a hash of the query's
expression tree, which renaming, shuffling and distractors leave unchanged.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from random import Random
from types import MappingProxyType

from pns.errors import UserError
from pns.records import Problem

NAMES: tuple[str, ...] = ("Ann", "Bob", "Cal", "Dan", "Eve", "Fay", "Gus", "Hal")
MAX_STEPS = 4
MAX_BASE = 20
MAX_VALUE = 99

# Split -> its buckets of 100.
SPLITS = {"train": range(0, 52), "reward": range(52, 68), "preference": range(68, 84), "test": range(84, 100)}

# What can be wrong with a step, or with the box, which counts as the step after the last.
_ERRORS = {
    "arithmetic": "the right expression (or a wrong one) with a wrong result",
    "operator": "the right numbers, another operator",
    "operand": "a wrong number that is nobody's value",
    "order": "uses a quantity that only a later step derives",
    "entity": "takes the value of the wrong person, or names the wrong person",
    "answer": "the box is neither the derived answer nor anybody's value",
    "query": "the box holds the value of somebody else",
    "duplicate": "derives a quantity a second time",
    "surplus": "derives a quantity that the query does not need",
    "missing": "uses a quantity that no step derives",
    "format": "not of the form <think>steps</think>\\boxed{integer}",
    "garbage": "no solution at all (for `corrupt` only: the checker says format)",
}
ERROR_KINDS = tuple(_ERRORS)


@dataclass(frozen=True)
class SuiteRule:
    """What the problems of a suite have in common. `steps` is the (lowest, highest) number of steps;
    `min_answer` the least answer; `min_products` the least number of "times" and "half" relations;
    `distractor` adds one fact that the query does not need."""

    steps: tuple[int, int]
    distractor: bool = False
    shuffled: bool = False
    min_answer: int = 0
    min_products: int = 0


_RULES: dict[str, SuiteRule] = {
    "short": SuiteRule((1, 2)),
    "base": SuiteRule((2, 3)),
    "long": SuiteRule((4, 4)),
    "distract": SuiteRule((2, 3), distractor=True),
    "big": SuiteRule((2, 3), min_answer=50),
    "mul": SuiteRule((3, 3), min_products=2),
    "shuffle": SuiteRule((2, 3), shuffled=True),
}
SUITES: tuple[str, ...] = tuple(_RULES)


# Of a fact: {0} its name, {1} its number, {2} and {3} the names it refers to.
_SENTENCES = {
    "base": "{0} has {1}. ",
    "more": "{0} has {1} more than {2}. ",
    "fewer": "{0} has {1} fewer than {2}. ",
    "times": "{0} has {1} times {2}. ",
    "half": "{0} has half of {2}. ",
    "plus": "{0} has {2} plus {3}. ",
}


@dataclass(frozen=True)
class Fact:
    """One sentence of a problem. `relation` is base, more, fewer, times, half or plus; `number` its constant
    (None for half and plus), `parts` the names it refers to."""

    name: str
    relation: str
    number: int | None = None
    parts: tuple[str, ...] = ()

    def text(self) -> str:
        return _SENTENCES[self.relation].format(self.name, self.number, *self.parts)

    def compute(self, value: Mapping[str, int]) -> int | None:
        """This quantity, given the values of its parts; None where it is not an integer."""
        number, a, b = self.number or 0, *[value[part] for part in self.parts], *[0] * (2 - len(self.parts))
        if self.relation == "half":
            return None if a % 2 else a // 2
        results = {
            "base": number,
            "more": a + number,
            "fewer": a - number,
            "times": a * number,
            "plus": a + b,
        }
        return results[self.relation]

    def expressions(self, value: Mapping[str, int]) -> list[str]:
        """Every right way to write this quantity, given its parts' values; the first is the plain one."""
        a, *others = [value[part] for part in self.parts]
        match self.relation:
            case "more":
                return [f"{a}+{self.number}", f"{self.number}+{a}"]
            case "fewer":
                return [f"{a}-{self.number}"]
            case "times":
                return [f"{a}*{self.number}", f"{self.number}*{a}", "+".join([str(a)] * (self.number or 0))]
            case "half":
                return [f"{a}/2"]
            case _:
                return [f"{a}+{others[0]}", f"{others[0]}+{a}"]


@dataclass(frozen=True)
class WordProblem:
    """A parsed problem: facts in the order of the text, and the name asked for."""

    facts: dict[str, Fact]
    query: str

    def text(self) -> str:
        return "".join(fact.text() for fact in self.facts.values()) + f"How many has {self.query}? "

    def is_base(self, name: str) -> bool:
        return self.facts[name].relation == "base"

    def needed(self, name: str | None = None) -> set[str]:
        """The names that `name` (default: the query) is made of, itself included."""
        name = name or self.query
        return {name}.union(*(self.needed(part) for part in self.facts[name].parts))

    def values(self, stated: Mapping[str, int] | None = None) -> dict[str, int]:
        """Every quantity's value, where `stated` values replace derived ones and carry on to what is made of
        them; quantities that do not come out as an integer, and what is made of them, are left out. Raises
        UserError when facts are circular."""
        value = dict(stated or {})
        rest = [fact for fact in self.facts.values() if fact.name not in value]
        failed: set[str] = set()
        while rest:
            ready = [fact for fact in rest if all(part in value or part in failed for part in fact.parts)]
            if not ready:
                fault = f"tiny world: circular facts in {self.text()!r}"
                raise UserError(f"{fault}: write each quantity in terms of earlier ones")
            for fact in ready:
                result = None if failed.intersection(fact.parts) else fact.compute(value)
                if result is None:
                    failed.add(fact.name)
                else:
                    value[fact.name] = result
            rest = [fact for fact in rest if fact not in ready]
        return value

    def tree(self, name: str | None = None) -> str:
        """The query's expression tree, which names, the order of facts and distractors leave unchanged."""
        fact = self.facts[name or self.query]
        parts = sorted(self.tree(part) for part in fact.parts)
        return f"({fact.relation} {fact.number} {' '.join(parts)})"

    def split(self) -> str:
        """The split of SPLITS that the problem belongs to, from its expression tree alone."""
        bucket = int.from_bytes(hashlib.sha256(self.tree().encode()).digest()[:8], "big") % 100
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def expression_value(expression: str) -> Fraction | None:
    """The value of integers joined by + - * / with the usual precedence; None for a division by zero."""
    total = Fraction(0)
    for sign, product in re.findall(r"(^|[+-])(-?\d+(?:[*/]-?\d+)*)", expression):
        value = Fraction(1)
        for operator, digits in re.findall(r"(^|[*/])(-?\d+)", product):
            number = Fraction(int(digits))
            if operator == "/" and number == 0:
                return None
            value = value / number if operator == "/" else value * number
        total += -value if sign == "-" else value
    return total


_NAME = "(" + "|".join(NAMES) + ")"
_INTEGER = r"-?(?:0|[1-9][0-9]{0,8})"  # sampled text may have thousands of digits
_EXPRESSION = rf"({_INTEGER}(?:[+\-*/]{_INTEGER})+)"
_FACT = re.compile(
    rf"{_NAME} has (?:([0-9]+)|([0-9]+) (more|fewer) than {_NAME}|([0-9]+) (times) {_NAME}|"
    rf"(half) of {_NAME}|{_NAME} (plus) {_NAME})\. ?"
)
_QUERY = re.compile(rf"How many has {_NAME}\? ?")
_STEP = re.compile(
    rf"(?:So )?{_NAME} has {_EXPRESSION}=({_INTEGER})\. |{_EXPRESSION}=({_INTEGER}) for {_NAME}\. "
)
_BOX = re.compile(rf"</think>\\boxed\{{({_INTEGER})\}}")
_ANY_BOX = re.compile(r"\\boxed\{([^}]*)\}")


# A problem is asked for again with each of its completions.
@lru_cache(maxsize=65536)
def parse_problem(text: str) -> WordProblem:
    """Read a problem's text. Raises UserError when it is not a problem of the tiny world."""
    facts: dict[str, Fact] = {}
    position = 0
    while match := _FACT.match(text, position):
        name, base, number, comparison, other, factor, times, multiplied, half, halved, left, plus, right = (
            match.groups()
        )
        constant = base or number or factor
        relation = "base" if base else comparison or times or half or plus
        parts = tuple(part for part in (other, multiplied, halved, left, right) if part)
        if name in facts:
            raise UserError(f"tiny world: {name} is defined twice in {text!r}: give each name one fact")
        facts[name] = Fact(name, relation, int(constant) if constant else None, parts)
        position = match.end()
    query = _QUERY.fullmatch(text, position)
    if query is None:
        fault = f"tiny world: cannot read {text[position:]!r} in problem {text!r}"
        raise UserError(f"{fault}: use the sentences of pns.tiny.world")
    named = {part for fact in facts.values() for part in fact.parts} | {query[1]}
    if unknown := ", ".join(sorted(named - facts.keys())):
        raise UserError(f"tiny world: no fact about {unknown} in {text!r}: add one")
    world = WordProblem(facts, query[1])
    world.values()
    return world


def problems(split: str, suite: str | None, num: int, seed: int, max_steps: int = MAX_STEPS) -> list[Problem]:
    """`num` different problems of a split, the same for the same arguments; the first problems of a longer
    list.

    `suite` None takes the suites in turn (those that have problems of at most `max_steps` steps: the warm
    start's curriculum). Each problem has one right solution, drawn at random. The id is a hash of the text.
    Raises UserError for an unknown split or suite, for a `max_steps` that leaves no suite, and when the suite
    runs out of different problems."""
    if split not in SPLITS:
        raise UserError(f"tiny world: unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if suite is not None and suite not in _RULES:
        raise UserError(f"tiny world: unknown suite {suite!r}: use one of {', '.join(SUITES)}")
    wanted = [name for name in SUITES if suite in (None, name) and _RULES[name].steps[0] <= max_steps]
    if not wanted:
        fault = f"max_steps={max_steps} leaves no problem in suite {suite or 'all'}"
        raise UserError(f"tiny world: {fault}: raise max_steps")
    rng = Random(f"{split}/{suite}/{seed}/{max_steps}")
    found: dict[str, Problem] = {}
    tries = 0
    while len(found) < num:
        name = wanted[len(found) % len(wanted)]
        world = _draw(_RULES[name], max_steps, rng)
        tries += 1
        if tries > 1000 * (num + 100):
            fault = f"suite {name} of split {split} has no {num} different problems"
            raise UserError(f"tiny world: {fault}: ask for fewer")
        if world is None or world.split() != split or world.text() in found:
            continue
        text = world.text()
        identity = f"tiny-{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        found[text] = Problem(identity, text, str(world.values()[world.query]), name, _right(world, rng))
    return list(found.values())


def _draw(rule: SuiteRule, max_steps: int, rng: Random) -> WordProblem | None:
    """One try at a problem: None when what came up breaks a rule."""
    num_steps = rng.randint(rule.steps[0], min(rule.steps[1], max_steps))
    names = rng.sample(NAMES, len(NAMES))
    num_bases = rng.randint(1, min(3, num_steps + 1))  # a step joins two quantities at most
    facts = [Fact(names.pop(), "base", rng.randint(2, MAX_BASE)) for _ in range(num_bases)]
    value = {fact.name: fact.number or 0 for fact in facts}
    for remaining in reversed(range(num_steps)):
        used = {part for fact in facts for part in fact.parts}
        free = [fact.name for fact in facts if fact.name not in used]
        if len(free) > remaining + 2:
            return None
        fact = _relate(names.pop(), facts, free, must_join=len(free) == remaining + 2, rng=rng)
        result = None if fact is None else fact.compute(value)
        if fact is None or result is None or not 0 < result <= MAX_VALUE:
            return None
        value[fact.name] = result
        facts.append(fact)
    query = facts[-1].name
    num_products = sum(fact.relation in _PRODUCTS for fact in facts)
    if value[query] < rule.min_answer or num_products < rule.min_products:
        return None
    if rule.distractor:
        name, plain = names.pop(), rng.random() < 0.3
        base = Fact(name, "base", rng.randint(2, MAX_BASE)) if plain else None
        extra = base or _relate(name, facts, [], False, rng)
        if extra is None:
            return None
        order = [fact.name for fact in facts]
        after = max((order.index(part) + 1 for part in extra.parts), default=0)
        facts.insert(rng.randint(after, len(facts)), extra)
    if rule.shuffled:
        rng.shuffle(facts)
    world = WordProblem({fact.name: fact for fact in facts}, query)
    return world if len(world.needed()) == len(facts) - rule.distractor and _fair(world) else None


_PRODUCTS = ("times", "half")
_SUMS = ("more", "fewer", "plus")


def _relate(name: str, facts: list[Fact], free: list[str], must_join: bool, rng: Random) -> Fact | None:
    """A derived quantity made of `facts`, of both `free` ones if `must_join`; None when the draw breaks the
    rule of sums and products."""
    summands = [fact.name for fact in facts if fact.relation not in _SUMS]
    known = [fact.name for fact in facts]
    # Mostly what nothing uses yet: chains get long, and fewer draws are thrown away.
    first = rng.choice(free if free and (must_join or rng.random() < 0.7) else known)
    relations: tuple[str, ...] = _PRODUCTS if first not in summands else _SUMS
    if first in summands and next(fact for fact in facts if fact.name == first).relation == "base":
        relations = _PRODUCTS + _SUMS
    relation = "plus" if must_join else rng.choice(relations)
    if relation == "plus":
        others = [other for other in (free if must_join else known) if other != first and other in summands]
        if not others or first not in summands:
            return None
        return Fact(name, relation, None, (first, rng.choice(others)))
    number = {"times": rng.randint(2, 4), "half": None}.get(relation, rng.randint(1, MAX_BASE))
    return Fact(name, relation, number, (first,))


def _fair(world: WordProblem) -> bool:
    """Whether no wrong step can pass for a right one."""
    value = world.values()
    if not len(set(value.values())) == len(value) == len(world.facts):
        return False
    if not all(0 < number <= MAX_VALUE for number in value.values()):
        return False
    for fact in (fact for fact in world.facts.values() if fact.relation != "base"):
        left, operator, right = re.split(r"([+\-*/])", fact.expressions(value)[0])
        a, b = int(left), int(right)
        # Such as 2+2 and 2*2, where the wrong operator would be right.
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}
        if list(results.values()).count(results[operator]) > 1 or (fact.relation == "more" and a == b):
            return False
    return not _swappable(world, value[world.query])


def _swappable(world: WordProblem, answer: int) -> bool:
    """Whether two numbers that do not meet in one step can change places without changing the answer."""
    facts = world.facts.values()
    together = [{fact.name, *filter(world.is_base, fact.parts)} for fact in facts]
    numbered = [fact for fact in facts if fact.number is not None]
    for left, right in combinations(numbered, 2):
        if left.number == right.number or any({left.name, right.name} <= names for names in together):
            continue
        swapped = replace(left, number=right.number), replace(right, number=left.number)
        changed = world.facts | {fact.name: fact for fact in swapped}
        if WordProblem(changed, world.query).values().get(world.query) == answer:
            return True
    return False


_PHRASES: tuple[Callable[[str, str, int], str], ...] = (
    lambda name, expression, result: f"{name} has {expression}={result}. ",
    lambda name, expression, result: f"So {name} has {expression}={result}. ",
    lambda name, expression, result: f"{expression}={result} for {name}. ",
)


def random_solution(problem: Problem, rng: Random) -> str:
    """One right solution, drawn at random."""
    return _right(parse_problem(problem.prompt), rng)


# Kinds of mistakes of `mixed_solution`, beside misconceptions of a relation.
SLIP, MISREADING = "arithmetic", "entity"
_ADDS = "addition"  # the two numbers of a step, whatever its relation


def mixed_solution(
    problem: Problem, rng: Random, misconceptions: Mapping[str, float], slips: float, misreadings: float
) -> str:
    """A solution by one who often errs and carries on: in a share of the steps of each relation in
    `misconceptions` they add instead, in `slips` of the others they miscalculate, in `misreadings` they take
    another person's number. Right where 20 draws give no solution with numbers of 0..99."""
    world = parse_problem(problem.prompt)
    for _ in range(20):
        mistakes = {}
        for name in sorted(world.needed()):
            kinds = {
                _ADDS: misconceptions.get(world.facts[name].relation, 0),
                SLIP: slips,
                MISREADING: misreadings,
            }
            drawn = [kind for kind, share in kinds.items() if rng.random() < share]
            if drawn and not world.is_base(name):
                mistakes[name] = drawn[0]
        steps = _derive(world, rng, mistakes)
        if steps is not None:
            return _render(steps, steps[-1][2], rng)
    return _right(world, rng)


def _right(world: WordProblem, rng: Random) -> str:
    steps = _derive(world, rng)
    assert steps is not None, "a fair problem has an integer value for every quantity"
    return _render(steps, steps[-1][2], rng)


_Derivation = list[tuple[str, str, int]]


def _render(steps: _Derivation, box: int | str, rng: Random) -> str:
    sentences = "".join(rng.choice(_PHRASES)(*step) for step in steps)
    return f"<think>{sentences}</think>\\boxed{{{box}}}"


def _derive(
    world: WordProblem, rng: Random, mistakes: Mapping[str, str] = MappingProxyType({})
) -> _Derivation | None:
    """Steps (name, expression, result) in a random valid order, with an error of a kind in the steps of the
    names in `mistakes`, carried on by the steps after it; None where a carried value is not an integer of
    0..99."""
    stated: dict[str, int] = {}
    steps: _Derivation = []
    pending = sorted(name for name in world.needed() if not world.is_base(name))
    while pending:
        name = rng.choice([name for name in pending if not set(world.facts[name].parts) & set(pending)])
        pending.remove(name)
        value = world.values(stated)
        if any(part not in value for part in world.facts[name].parts):
            return None
        # Without repeated sums: long ones are no use to a model that cannot carry a total.
        forms = [text for text in world.facts[name].expressions(value) if text.count("+") < 2]
        expression = rng.choice(forms)
        kind = mistakes.get(name)
        if kind and kind != SLIP:
            expression = _wrong_expression(world, value, name, expression, kind, rng)
        result = expression_value(expression)
        if kind == SLIP and result is not None:
            result += rng.choice((-10, -2, -1, 1, 2, 10))
        if result is None or result.denominator != 1 or not 0 <= result <= MAX_VALUE:
            return None
        stated[name] = int(result)
        steps.append((name, expression, int(result)))
    return steps


def _wrong_expression(
    world: WordProblem, value: Mapping[str, int], name: str, expression: str, kind: str, rng: Random
) -> str:
    left, operator, right = re.split(r"([+\-*/])", expression)
    if kind == _ADDS:
        return f"{left}+{right}"
    if kind == "operator":
        return f"{left}{rng.choice([other for other in '+-*/' if other != operator])}{right}"
    if kind == "entity":
        bases = [other for other in sorted(world.needed()) if world.is_base(other)]
        others = [value[other] for other in bases if other not in world.facts[name].parts]
        new = str(rng.choice(others)) if others else left
    else:
        new = str(max(1, int(rng.choice((left, right))) + rng.choice((-3, -2, -1, 1, 2, 3, 10))))
    return f"{new}{operator}{right}" if rng.random() < 0.5 else f"{left}{operator}{new}"


@dataclass(frozen=True)
class SolutionStep:
    """One parsed step of a solution; text[start:end] is its sentence with the space after it. `kinds` are its
    own errors (empty: none); `carried` says that it is free of own errors but states a wrong value because an
    earlier step did."""

    name: str
    expression: str
    result: int
    start: int
    end: int
    kinds: tuple[str, ...] = ()
    carried: bool = False

    @property
    def right(self) -> bool:
        return not self.kinds and not self.carried


@dataclass(frozen=True)
class Check:
    """What the checker found. A step that is consistent with an earlier wrong value is carried, not an error
    of its own.

    `correct`: the text is one of the problem's right solutions. `answer_correct`: the (last) box holds the
    gold answer. `first_wrong_step`: index of the first step with an own error, len(steps) for the box or the
    place where the format breaks, None if there is none; `first_wrong_end` its end in characters of the text.
    `kinds`: all own errors in the order of the text. `single_error`: exactly one, all else consistent with
    it, the box included."""

    steps: tuple[SolutionStep, ...]
    correct: bool
    answer_correct: bool
    first_wrong_step: int | None
    first_wrong_end: int | None
    kinds: tuple[str, ...]
    single_error: bool
    format_ok: bool


def check(problem: Problem, text: str) -> Check:
    """Check a solution (without the end token) step by step against the problem's text; the record's answer
    is not used.

    Raises UserError when the problem is not one of the tiny world; any solution text is accepted as input."""
    world = parse_problem(problem.prompt)
    gold = world.values()
    matches: list[re.Match[str]] = []
    position = len("<think>") if text.startswith("<think>") else 0
    while text.startswith("<think>") and (match := _STEP.match(text, position)):
        matches.append(match)
        position = match.end()
    named = [match[1] or match[6] for match in matches]

    stated: dict[str, int] = {}
    reported: set[str] = set()
    steps: list[SolutionStep] = []
    for index, match in enumerate(matches):
        expression, result = match[2] or match[4], int(match[3] or match[5])
        name, later = named[index], set(named[index + 1 :])
        kinds, meant = _judge_step(world, stated, name, later, expression, result, reported)
        if meant is not None:
            stated[meant] = result  # wrong or not: later steps are held to what this one says
        carried = not kinds and result != gold[name]
        steps.append(SolutionStep(name, expression, result, *match.span(), tuple(kinds), carried))

    box = _BOX.fullmatch(text, position)
    if box is not None:
        last_kinds, last_end = _judge_box(world, stated, int(box[1]), reported), len(text)
    else:
        sentence = text.find(". ", position)
        last_kinds, last_end = ["format"], sentence + 2 if sentence >= 0 else len(text)
    boxes = _ANY_BOX.findall(text)
    answer_correct = bool(boxes) and boxes[-1].lstrip("0") == str(gold[world.query])

    kinds_of = [step.kinds for step in steps] + [tuple(last_kinds)]
    ends = [step.end for step in steps] + [last_end]
    first = next((index for index, kinds in enumerate(kinds_of) if kinds), None)
    all_kinds = tuple(kind for kinds in kinds_of for kind in kinds)
    return Check(
        steps=tuple(steps),
        correct=first is None and answer_correct,
        answer_correct=answer_correct,
        first_wrong_step=first,
        first_wrong_end=None if first is None else ends[first],
        kinds=all_kinds,
        single_error=box is not None and len(all_kinds) == 1,
        format_ok=box is not None,
    )


def _judge_step(
    world: WordProblem,
    stated: Mapping[str, int],
    name: str,
    later: set[str],
    expression: str,
    result: int,
    reported: set[str],
) -> tuple[list[str], str | None]:
    """The step's own errors and the quantity it states (None: none). `later` are the names of the steps after
    it; `reported` collects the underived quantities already counted."""
    implied = world.values(stated)
    pending = [other for other in world.facts if other not in stated and not world.is_base(other)]
    known = {other: implied[other] for other in world.facts if other in stated or world.is_base(other)}

    def fits(other: str) -> bool:
        fact = world.facts[other]
        return all(part in implied for part in fact.parts) and expression in fact.expressions(implied)

    meant: str | None = name
    kinds: list[str] = []
    # Quantities that this step would state rightly under their own name, and that no later step states.
    unnamed = [other for other in pending if other not in later and other != name]
    mislabelled = [o for o in unnamed if fits(o) and not set(world.facts[o].parts) - known.keys()]
    if name in pending and fits(name):
        kinds += [] if name in world.needed() else ["surplus"]
    elif mislabelled:
        kinds.append("entity")
        meant = min(mislabelled, key=lambda other: other not in world.needed())
    elif name not in pending:
        kinds.append("duplicate" if name in stated else "entity")
        meant = None
    elif name not in world.needed():
        kinds.append("surplus")
    else:
        kinds += _judge_expression(world.facts[name], implied, known, expression)
    if meant == name:
        for part in world.facts[name].parts:
            if part not in known and part not in reported:
                kinds.append("order" if part in later else "missing")
                reported.add(part)
    if expression_value(expression) != result:
        kinds.append("arithmetic")
    return kinds, meant


def _judge_expression(
    fact: Fact, implied: Mapping[str, int], known: Mapping[str, int], expression: str
) -> list[str]:
    """Why an expression is none of the right ones of a quantity."""
    if any(part not in implied for part in fact.parts):
        return ["operand"]
    forms = fact.expressions(implied)
    extra = Counter(re.findall(r"\d+", expression)) - Counter(re.findall(r"\d+", forms[0]))
    operators = set(re.sub(r"\d", "", expression))
    if not extra:
        return ["operator" if operators != set(re.sub(r"\d", "", forms[0])) else "operand"]
    same_operators = any(operators == set(re.sub(r"\d", "", form)) for form in forms)
    others = {str(value) for name, value in known.items() if name not in fact.parts}
    return ["entity" if extra.keys() & others else "operand"] + ([] if same_operators else ["operator"])


def _judge_box(world: WordProblem, stated: Mapping[str, int], box: int, reported: set[str]) -> list[str]:
    implied = world.values(stated)
    if world.query in stated and box == stated[world.query]:
        return []
    known = [name for name in world.facts if name in stated or world.is_base(name)]
    if any(implied[name] == box for name in known if name != world.query):
        return ["query"]
    answer = [] if box == implied.get(world.query) else ["answer"]
    if world.query in stated:
        return answer
    return answer + ["missing" for name in world.needed() if name not in known and name not in reported]


def rubric(problem: Problem, text: str) -> tuple[int, int, int, int]:
    """The judge's label: (relevance, logical coherence, completeness, clarity), each 0-3.

    It does not grade numbers: arithmetic and operator errors cost nothing. With o operand errors and m
    missing steps:

        any format, entity, order, query, duplicate or surplus error: (0, 0, 0, 0)
        box contradicts the derivation (answer): (3, 0, max(0, 3 - 2m), 0)
        otherwise: (3, max(0, 3 - 2o - m), max(0, 3 - 2m), 3)

    Strict on purpose: with partial credit a generator learns to finish a right solution and append a
    redundant wrong step."""
    kinds = check(problem, text).kinds
    if set(kinds) & {"format", "entity", "order", "query", "duplicate", "surplus"}:
        return (0, 0, 0, 0)
    operands, missing = kinds.count("operand"), kinds.count("missing")
    completeness = max(0, 3 - 2 * missing)
    if "answer" in kinds:
        return (3, 0, completeness, 0)
    return (3, max(0, 3 - 2 * operands - missing), completeness, 3)


class StepChecker:
    """The world's `pns.data.checker.Checker`."""

    check = staticmethod(check)
    rubric = staticmethod(rubric)


_HARMLESS = ("order", "duplicate", "surplus", "missing")  # to the answer


def corrupt(problem: Problem, rng: Random, kind: str) -> str:
    """A solution with one error of `kind` (one of ERROR_KINDS), carried on by all later steps; "garbage" is
    no solution at all.

    Where the problem admits no such error (order needs two dependent steps, surplus a derived distractor,
    entity another person's number), the kind is replaced by another, drawn at random; `check` tells which.
    Errors of kind order, duplicate, surplus and missing leave the answer right; the others make it wrong
    (format and garbage may). Raises UserError for an unknown kind."""
    if kind not in ERROR_KINDS:
        raise UserError(f"tiny world: unknown kind of error {kind!r}: use one of {', '.join(ERROR_KINDS)}")
    world = parse_problem(problem.prompt)
    # A draw may miss: a wrong number can be somebody's value, or right by another way.
    for _ in range(40):
        text = _corrupt_once(world, rng, kind)
        if text is None:
            continue
        found = check(problem, text)
        as_asked = found.kinds == (kind,) and found.answer_correct == (kind in _HARMLESS)
        if not found.format_ok if kind in ("format", "garbage") else as_asked:
            return text
    return corrupt(problem, rng, rng.choice(ERROR_KINDS))


def _corrupt_once(world: WordProblem, rng: Random, kind: str) -> str | None:
    needed = world.needed()
    derived = sorted(name for name in world.facts if not world.is_base(name))
    in_step = kind in ("arithmetic", "operator", "operand", "entity")
    wrong = rng.choice([name for name in derived if name in needed]) if in_step else None
    steps = _derive(world, rng, {wrong: kind} if wrong else {})
    if steps is None:
        return None
    value = world.values()
    box = steps[-1][2]
    match kind:
        case "entity" if rng.random() < 0.3:
            return _mislabel(world, rng)
        case "order":
            rng.shuffle(steps)
        case "missing":
            del steps[rng.randrange(len(steps))]
        case "duplicate":
            again = rng.randrange(len(steps))
            steps.insert(rng.randint(again + 1, len(steps)), steps[again])
        case "surplus":
            extra = [name for name in derived if name not in needed]
            if not extra:
                return None
            name = extra[0]
            new = (name, rng.choice(world.facts[name].expressions(value)[:2]), value[name])
            steps.insert(rng.randint(0, len(steps)), new)
        case "query":
            box = rng.choice([value[name] for name in sorted(needed) if name != world.query])
            if box == (steps[-2][2] if len(steps) > 1 else None) and rng.random() < 0.7:
                steps.pop()
        case "answer":
            box = max(0, box + rng.choice((-10, -2, -1, 1, 2, 10)))
    text = _render(steps, box, rng)
    if kind == "format":
        return rng.choice(_FORMAT_BREAKS)(text, rng)
    if kind == "garbage":
        return rng.choice(_GARBAGE)(world.text(), text, rng)
    return text


def _mislabel(world: WordProblem, rng: Random) -> str | None:
    """A right derivation that calls one quantity by a wrong name and answers with that name's value."""
    steps = _derive(world, rng)
    if steps is None or len(steps) < 2:
        return None
    position = rng.randrange(len(steps) - 1)
    _, expression, result = steps[position]
    steps[position] = (rng.choice(sorted(set(world.facts) - {steps[position][0]})), expression, result)
    return _render(steps, steps[-1][2], rng)


_FORMAT_BREAKS: tuple[Callable[[str, Random], str], ...] = (
    lambda text, rng: text.removeprefix("<think>"),
    lambda text, rng: text.replace("</think>", ""),
    lambda text, rng: text[: text.index("\\boxed{")],
    lambda text, rng: text + text[text.index("\\boxed{") :],
    lambda text, rng: text + "<think>",
    lambda text, rng: text[: rng.randrange(1, len(text))],
    lambda text, rng: text.replace("=", "", 1),
)
_GARBAGE: tuple[Callable[[str, str, Random], str], ...] = (
    lambda prompt, text, rng: "",
    lambda prompt, text, rng: prompt,
    lambda prompt, text, rng: f"<think>{prompt}</think>\\boxed{{0}}",
    lambda prompt, text, rng: "".join(_shuffled(re.findall(r"\d|[A-Z][a-z]+| has | for |\. |.", text), rng)),
    lambda prompt, text, rng: "<think>" + str(rng.randint(0, 9)) * rng.randint(5, 40),
    lambda prompt, text, rng: "<think>" + "".join(_shuffled(re.findall(r"[^ ]+ ", prompt), rng)) + "</think>",
)


def _shuffled(pieces: Iterable[str], rng: Random) -> list[str]:
    result = list(pieces)
    rng.shuffle(result)
    return result
