"""Gold answers changed at random: mutations, whose value is shown to differ by an evaluation that shares no
code with the verifier, and rewritings, which keep the value by construction."""

from __future__ import annotations

import cmath
import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import sympy
from sympy.parsing.sympy_parser import implicit_multiplication, parse_expr, standard_transformations

from pns.records import AnswerRule

SETS = (
    "gsm8k",
    "math500",
    "amc23",
    "minerva_math",
    "olympiadbench",
    "aime24",
    "aime25",
    "college_math",
    "gaokao2023en",
)
Changed = tuple[str, str, str, str, AnswerRule]  # set, kind of change, gold, changed, rule
POINT = {
    letter: Fraction(17 + 3 * index, 29 + index) for index, letter in enumerate("abdefghijlmnopqrstuvwxyz")
}
TOKEN = re.compile(r"sqrt|\d+\.?\d*|\.\d+|[a-zP]|\*\*|[-+*/()]")


def golds(data: Path) -> list[tuple[str, str, AnswerRule]]:
    """Every gold of the benchmark sets under `data`, with its set and rule."""
    found = []
    for name in SETS:
        for line in (data / "benchmarks" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n"):
            row: dict[str, Any] = json.loads(line) if line else {}
            if row.get("answer"):
                found.append((name, row["answer"], AnswerRule(bool(row.get("multiple")))))
    return found


def value(latex: str) -> Fraction | complex | None:
    """The value at `POINT` of a number or of an expression in single letters; None where it is not read. The
    letters of arbitrary constants (C, c, k) are not read: two answers that differ by them may be the same."""
    text = (
        re.sub(r"\\left|\\right|\\[!,;: ]|[\s$]", "", latex).replace("dfrac", "frac").replace("tfrac", "frac")
    )
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^[a-z]=", "", text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    for _ in range(4):
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", text)
        text = re.sub(r"\^\{([^{}]*)\}", r"**(\1)", text)
    text = re.sub(r"\^(\w)", r"**\1", re.sub(r"\\cdot|\\times", "*", text)).replace(r"\pi", "P")
    tokens = TOKEN.findall(text)
    if not tokens or "".join(tokens) != text or re.search(r"(?!sqrt)[a-z]{3}|[ck]|\*\*\(?-?\d{4}", text):
        return None
    code: list[str] = []
    for token in tokens:
        starts = token[0] not in "+-*/)"
        if code and starts and code[-1][-1] not in "+-*/(" and code[-1] != "sqrt":
            code.append("*")
        code.append(f"F('{token}')" if token[0] in "0123456789." else token)
    names = {"__builtins__": {}, "F": Fraction, "sqrt": cmath.sqrt, "P": cmath.pi, **POINT}
    try:
        found = eval("".join(code), names)  # made of the tokens above only
    except (ArithmeticError, SyntaxError, TypeError, ValueError):
        return None
    return found if isinstance(found, Fraction) else complex(found)


def items(latex: str) -> list[str]:
    """The items of a bracketed list without inner brackets; none where it is not one."""
    found = re.fullmatch(r"\$?\s*(?:\\left)?\(([^()\[\]]+,[^()\[\]]+?)(?:\\right)?\)\s*\$?", latex)
    return found[1].split(",") if found else []


PLAIN_LEFT_OUT = 0.7  # of the draws that are plain numbers, which are most of six sets
HALF_OPEN = re.compile(r"\$?\s*(\[.*\)|\(.*\])\s*\$?")


def differ(left: str, right: str) -> bool:
    """Whether both are read and their values are not the same; two lists, where one has a value that the
    other has not; two intervals, where only the brackets differ."""
    if HALF_OPEN.fullmatch(left) and re.sub(r"[\[(]", "(", left) == re.sub(r"[\[(]", "(", right):
        return left != right
    many, others = items(left), items(right)
    if many and others:
        return any(all(differ(one, other) for other in others) for one in many) or any(
            all(differ(other, one) for one in many) for other in others
        )
    a, b = value(left), value(right)
    if a is None or b is None:
        return False
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a != b
    return abs(complex(a) - complex(b)) > 1e-9 * (1 + abs(complex(a)))


def mutate(gold: str, chance: random.Random) -> tuple[str, str]:
    """The kind of the change and the changed gold (the gold itself where the kind does not apply)."""
    kind = chance.choice(
        ["digit", "sign", "swap", "exponent", "digit lost", "digit more", "operator", "item", "bracket"]
    )
    numbers = list(re.finditer(r"\d", gold))
    if not numbers:
        return kind, gold
    spot = chance.choice(numbers).start()
    before, digit, after = gold[:spot], gold[spot], gold[spot + 1 :]
    if kind == "digit":
        return kind, before + chance.choice([other for other in "0123456789" if other != digit]) + after
    if kind == "digit lost":
        return kind, before + after
    if kind == "digit more":
        return kind, before + digit + chance.choice("0123456789") + after
    if kind == "swap":
        return kind, re.sub(r"frac\{([^{}]*)\}\{([^{}]*)\}", r"frac{\2}{\1}", gold, count=1)
    if kind == "item":
        return kind, re.sub(r",[^,()]*(?=(\\right)?\))", "", gold, count=1)
    if kind == "bracket":
        return kind, gold.replace("(", "[", 1) if "]" in gold else gold.replace("[", "(", 1)
    if kind == "exponent":
        return kind, re.sub(r"\^\{?(\d)\}?", lambda power: f"^{{{int(power[1]) + 1}}}", gold, count=1)
    if kind == "operator":
        return kind, gold.translate(str.maketrans("+-", "-+")) if gold[:1] != "-" else gold[1:]
    inner = gold.strip().strip("$")
    return kind, inner[1:] if inner.startswith("-") else f"-({inner})" if "+" in inner else f"-{inner}"


def rewrite(  # noqa: C901
    gold: str, rule: AnswerRule, chance: random.Random
) -> tuple[str, str]:
    """The kind of the rewriting and the gold in another spelling (itself where the kind does not apply)."""
    inner = gold.strip().strip("$").strip()
    number = re.fullmatch(r"-?\d+(\.\d+)?", inner)
    kinds = ["dollars", "period", "spaces", "dfrac", "left-right", "box"]
    if number:
        kinds += ["fraction", "commas", "name", "zero", "bold", "sum"] * 2
    if re.fullmatch(r"-?\\frac\{\d+\}\{\d+\}", inner):
        kinds += ["slash", "doubled"] * 3
    if rule.unordered and "$,$" in gold:
        kinds += ["permuted"] * 6
    if (
        value(gold) is not None
        and re.fullmatch(r"[^+\-=]+(\+[^+\-=]+)+", inner)
        and "{" not in inner
        and "(" not in inner
    ):
        kinds += ["terms"] * 6
    if re.fullmatch(r"[-+\da-z^{}()\s]+", inner) and len(set(re.findall("[a-z]", inner))) == 1:
        kinds += ["factor", "expand"] * 3
    kind = chance.choice(kinds)
    if kind in ("factor", "expand"):
        return kind, _polynomial(inner, kind) or gold
    if kind == "dollars":
        return kind, f"${inner}$" if "$" not in inner else gold
    if kind == "period":
        return kind, f"{gold.strip()}."
    if kind == "spaces":
        return kind, re.sub(r"(?<=[\w})]) ?([+=]) ?", r" \1 ", gold)
    if kind == "dfrac":
        return kind, gold.replace(r"\frac", r"\dfrac")
    if kind == "left-right":
        plain = re.sub(r"\\left|\\right", "", gold)
        balanced = plain.count("(") == plain.count(")") and "[" not in plain and "]" not in plain
        return kind, plain.replace("(", r"\left(").replace(")", r"\right)") if balanced else gold
    if kind == "box":
        return kind, f" {gold} "
    if kind == "fraction":
        exact = Fraction(inner)
        return kind, rf"\frac{{{3 * exact.numerator}}}{{{3 * exact.denominator}}}"
    if kind == "commas":
        return kind, f"{int(inner):,}" if "." not in inner else gold
    if kind == "name":
        return kind, f"x = {inner}"
    if kind == "zero":
        return kind, f"{inner}.0" if "." not in inner else f"{inner}0"
    if kind == "bold":
        return kind, rf"\mathbf{{{inner}}}"
    if kind == "sum":
        part = chance.randint(1, 50)
        return kind, f"{Fraction(inner) - part}+{part}" if "." not in inner else gold
    if kind in ("slash", "doubled"):
        top, bottom = re.findall(r"\d+", inner)
        sign = "-" if inner[0] == "-" else ""
        return (
            kind,
            f"{sign}{top}/{bottom}"
            if kind == "slash"
            else rf"{sign}\frac{{{2 * int(top)}}}{{{2 * int(bottom)}}}",
        )
    if kind == "permuted":
        return kind, "$,$".join(reversed(gold.strip().strip("$").split("$,$"))).join("$$")
    return kind, "+".join(reversed(inner.split("+")))


def _polynomial(inner: str, kind: str) -> str | None:
    """A polynomial in one letter factored or expanded by sympy; None where its value was not kept."""
    text = inner.replace("{", "(").replace("}", ")").replace("^", "**")
    rules = (*standard_transformations, implicit_multiplication)
    read = parse_expr(text, transformations=rules)
    changed = sympy.latex(sympy.factor(read) if kind == "factor" else sympy.expand(read))
    return changed if value(inner) is not None and value(inner) == value(changed) else None


def mutations(data: Path, num: int, seed: int = 0) -> Iterator[Changed]:
    """`num` golds whose value was changed, drawn over the sets evenly."""
    yield from _drawn(data, num, seed, keeps=False)


def rewritings(data: Path, num: int, seed: int = 0) -> Iterator[Changed]:
    """`num` golds in another spelling, drawn over the sets evenly."""
    yield from _drawn(data, num, seed, keeps=True)


def _drawn(data: Path, num: int, seed: int, keeps: bool) -> Iterator[Changed]:
    chance = random.Random(seed)
    by_set: dict[str, list[tuple[str, str, AnswerRule]]] = {}
    for item in golds(data):
        by_set.setdefault(item[0], []).append(item)
    made = 0
    while made < num:
        name, gold, rule = chance.choice(by_set[chance.choice(SETS)])
        if re.fullmatch(r"[-$\s\d.,]*", gold) and chance.random() < PLAIN_LEFT_OUT:
            continue
        kind, changed = rewrite(gold, rule, chance) if keeps else mutate(gold, chance)
        if changed != gold and (keeps or differ(gold, changed)):
            made += 1
            yield name, kind, gold, changed, rule
