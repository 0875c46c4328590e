"""Variants of gold answers whose relation to them is known by construction: other values, other spellings."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

SETS = ("gsm8k", "math500", "amc23", "minerva_math", "olympiadbench", "aime24", "aime25", "college_math")
SETS = (*SETS, "gaokao2023en")
DATA = Path(os.environ.get("PNS_DATA", ""))

_NUMBER = re.compile(r"-?\d{1,12}(?:\.\d{1,9})?")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d{1,6})\}\{(\d{1,6})\}")
_SIGN = re.compile(r"(?<=[\w}) ])[+-](?=[\w\\( ])")


def gold_answers(name: str) -> list[str]:
    text = (DATA / "benchmarks" / f"{name}.jsonl").read_text(encoding="utf-8")
    answers = (str(json.loads(line)["answer"]) for line in text.split("\n") if line)
    return [answer for answer in (answer.strip().strip("$").strip() for answer in answers) if answer]


def other_values(gold: str, rng: random.Random) -> Iterator[str]:
    """Texts that differ from the gold answer in a digit, a sign, an exponent, the parts of a fraction, an item
    or the kind of an end; few of them still state its value (0/5 and 0/6)."""
    digits = [match.start() for match in re.finditer(r"\d", gold)]
    if digits:
        place = rng.choice(digits)
        other = rng.choice([digit for digit in "0123456789" if digit != gold[place]])
        yield gold[:place] + other + gold[place + 1 :]
        yield gold[:place] + gold[place] + rng.choice("123456789") + gold[place + 1 :]
    if _NUMBER.fullmatch(gold) and Fraction(gold):
        yield gold[1:] if gold.startswith("-") else f"-{gold}"
        yield str(Fraction(gold) + rng.choice([1, -1, Fraction(1, 2), 100]))
    if signs := list(_SIGN.finditer(gold)):
        sign = rng.choice(signs)
        yield gold[: sign.start()] + ("-" if sign[0] == "+" else "+") + gold[sign.end() :]
    if match := _FRACTION.search(gold):
        swapped = rf"\frac{{{match[2]}}}{{{match[1]}}}"
        if abs(int(match[1])) != int(match[2]):
            yield gold.replace(match[0], swapped, 1)
    if gold[0] in "([" and gold[-1] in ")]" and gold.count(",") == 1:
        yield ("[" if gold[0] == "(" else "(") + gold[1:] if gold[-1] == "]" else gold[:-1] + "]"
        first, second = gold[1:-1].split(",")
        if first.strip() != second.strip():
            yield f"{gold[0]}{second},{first}{gold[-1]}"
    elif re.fullmatch(r"-?\d+(, ?-?\d+)+", gold) and not re.search(r",\d{3}(?!\d)", gold):
        yield gold.rpartition(",")[0]
    if "^2" in gold:
        yield gold.replace("^2", "^3", 1)
    yield f"{gold}+{rng.randint(1, 9)}" if re.fullmatch(r"[\w\\{}^+\-*/ ]+", gold) else f"{gold}, 8191"


def other_spellings(gold: str, rng: random.Random) -> Iterator[str]:
    """Texts that state the same answer."""
    yield f"${gold}$"
    yield rf"\boxed{{{gold}}}"
    yield f" {gold} ."
    if gold.count("(") == gold.count(")") == 1 and r"\left" not in gold:
        yield gold.replace("(", r"\left(").replace(")", r"\right)")
    for old, new in ((r"\frac", r"\dfrac"), (r"\dfrac", r"\frac"), (", ", ","), (r"\le ", r"\leq ")):
        if old in gold:
            yield gold.replace(old, new)
    if match := _FRACTION.search(gold):
        top, bottom, factor = int(match[1]), int(match[2]), rng.randint(2, 9)
        yield gold.replace(match[0], rf"\frac{{{factor * top}}}{{{factor * bottom}}}", 1)
        if match[0] == gold:
            yield f"{top}/{bottom}"
            yield rf"\frac{{{-top}}}{{{-bottom}}}"
    if _NUMBER.fullmatch(gold):
        value = Fraction(gold)
        yield f"x={gold}"
        yield rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        shift = rng.randint(2, 99)
        yield f"({value + shift})-{shift}" if value.denominator == 1 else f"2\\cdot {gold}-{gold}"
        if value.denominator == 1:
            yield f"{value.numerator}.0"
            yield f"{value.numerator:,}"
            yield f"{value.numerator * shift}/{shift}"
    elif re.fullmatch(r"[-+*/^(){}\w\\ ]+", gold) and not re.search(
        r"text|mathrm|[A-Za-z]{4}(?<!frac|sqrt)", gold
    ):
        number = rng.randint(2, 9)
        yield f"{gold}+{number}-{number}"
        yield rf"\frac{{{number}({gold})}}{{{number}}}"
        yield rf"\left({gold}\right)"
