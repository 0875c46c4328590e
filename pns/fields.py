"""Keys of a configuration: each dataclass field carries its meaning, the range of its number and whether it
names a file, so that one walk can check, document and resolve all of them."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from pns.errors import UserError


@dataclass(frozen=True)
class Range:
    """An interval; NaN and the infinities are in none."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above_low = value > self.low if self.open_low else value >= self.low
        below_high = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above_low and below_high

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "finite" if self.high == math.inf else f"{self.high} or less"
        if self.high == math.inf:
            return f"greater than {self.low}" if self.open_low else f"{self.low} or more"
        opening, closing = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {opening}{self.low}, {self.high}{closing}"


FINITE = Range()


def at_least(low: float) -> Range:
    return Range(low)


def at_most(high: float) -> Range:
    return Range(high=high)


def above(low: float) -> Range:
    return Range(low, open_low=True)


def between(low: float, high: float) -> Range:
    return Range(low, high)


def below(high: float) -> Range:
    """[0, high)"""
    return Range(0, high, open_high=True)


def up_to(high: float) -> Range:
    """(0, high]"""
    return Range(0, high, open_low=True)


def key(default: Any, meaning: str, allowed: Range | None = None, **metadata: Any) -> Any:
    """A dataclass field with its `meaning` (units, what 0, empty or null stand for) and a number's range."""
    metadata |= {"meaning": meaning, "range": allowed}
    # Dataclasses take no mutable defaults, and two configurations must not share one.
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def path_key(default: Any, meaning: str) -> Any:
    """A key that names a file or a directory (or a dict of them)."""
    return key(default, meaning, path=True)


def path_or_name(default: Any, meaning: str) -> Any:
    """A key that names a file or a directory, or something by a name of its own, such as a Hub id."""
    return key(default, meaning, path=True, named=True)


def section(make: Callable[[], Any]) -> Any:
    """A dataclass field that holds keys; its meaning is the docstring of their class."""
    return field(default_factory=make)


@dataclass(frozen=True)
class Key:
    name: str  # with dots, from the root: reward.terms.coherence.weight
    field: Field[Any]
    value: Any
    section: Any  # the dataclass that holds it

    @property
    def meaning(self) -> str:
        return self.field.metadata["meaning"]

    @property
    def allowed(self) -> Range | None:
        """The range of a number."""
        return self.field.metadata["range"]

    @property
    def numbers(self) -> dict[str, float | None]:
        """Where there is a range: the number by the key's name, or those of a dict or list by theirs."""
        if self.allowed is None:
            return {}
        if isinstance(self.value, dict):
            return {f"{self.name}.{name}": number for name, number in self.value.items()}
        if isinstance(self.value, list):
            return {f"{self.name}.{place}": number for place, number in enumerate(self.value)}
        return {self.name: self.value}


def walk_keys(settings: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of a configuration dataclass, those of nested sections and of dicts of sections included."""
    for config_field in fields(settings):
        name, value = prefix + config_field.name, getattr(settings, config_field.name)
        sections = value if isinstance(value, dict) else {}
        if is_dataclass(value):
            yield from walk_keys(value, f"{name}.")
        # A dict of sections, such as reward.terms.
        elif any(is_dataclass(entry) for entry in sections.values()):
            for entry_name, entry in sections.items():
                yield from walk_keys(entry, f"{name}.{entry_name}.")
        else:
            yield Key(name, config_field, value, settings)


def check_ranges(settings: Any) -> None:
    """Raises UserError for the first number that is outside its range."""
    for checked in walk_keys(settings):
        for name, number in checked.numbers.items():
            allowed = checked.allowed
            if allowed is None or number is None or number in allowed:  # null: another key's value is taken
                continue
            finite = "" if math.isfinite(number) or allowed == FINITE else "finite and "
            raise UserError(f"{name}: {number} must be {finite}{allowed}")
