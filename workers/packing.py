"""Whether processes fit on the nodes of a cluster: pure arithmetic, no Ray.

Processes are laid on nodes in the order in which they are created: policy ranks, processes of several GPUs,
of one, of fractions, of none. A process lies on one node, and a share of a GPU on one GPU.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bundles:
    """`replicas` processes of a role, each with `amounts` of "GPU", "CPU" and custom resources, on nodes with
    `labels`; `key` is its pool in the configuration, `most` what the pool may grow to. Every `together` of
    them lie on one node; those `inside` another role take nothing that is not that role's."""

    role: str
    key: str
    replicas: int
    amounts: dict[str, float]
    labels: dict[str, str]
    most: int
    together: int = 1
    inside: str = ""


@dataclass(frozen=True)
class Node:
    """A node by its name (its address, unless it was started with another), what it has of every resource,
    in use or not, and its labels; None: not known, and taken to be what is asked for."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Misfit:
    """The first process that no node has room for: the role's, counted from 0; `left` is what the node that
    comes nearest has, of what the process needs with those that lie on its node."""

    bundles: Bundles
    index: int
    node: str
    left: dict[str, float]


def counted(asked: Iterable[Bundles]) -> list[Bundles]:
    """Those that take something of a node."""
    return [bundles for bundles in asked if not bundles.inside]


def creation_order(asked: Iterable[Bundles]) -> list[Bundles]:
    """Those first that fit in fewest places: afterwards fractions cannot be scattered over GPUs that a larger
    process needs together."""

    def turn(bundles: Bundles) -> tuple[bool, float, bool]:
        return bundles.role != "policy", -bundles.amounts["GPU"], not bundles.labels

    return sorted(asked, key=turn)


def has_labels(node: Node, selector: Mapping[str, str]) -> bool:
    """Whether a node has the labels of one of Ray's selectors: VALUE, !VALUE, in(A, B) or !in(A, B)."""
    for label, asked in selector.items() if node.labels is not None else ():
        said = asked.removeprefix("!")
        inner = said.removeprefix("in(").removesuffix(")") if said.startswith("in(") else said
        values = [value.strip() for value in inner.split(",")]
        is_in = (node.labels or {}).get(label) in values
        if is_in == asked.startswith("!"):
            return False
    return True


def first_misfit(asked: Iterable[Bundles], nodes: Sequence[Node]) -> Misfit | None:
    """The first process without room; None: all fit. Some node has to have the labels of each.

    Ranks fill the emptiest node, then the next, as Ray packs a placement group; of several groups each is
    packed by itself. The others take the fullest node that has room; Ray may spread them more, which matters
    only where fractions differ.
    """
    rooms = [_Room(node) for node in nodes]
    for bundles in creation_order(asked):
        allowed = [room for room in rooms if has_labels(room.node, bundles.labels)]
        together, amounts = bundles.together, needed_together(bundles)
        chosen = allowed[0]
        for index in range(0, bundles.replicas, together):
            open_rooms = [room for room in allowed if room.fits(amounts)]
            if not open_rooms:
                nearest = max(allowed, key=lambda room: room.nearness(amounts))
                return Misfit(bundles, index, nearest.node.name, nearest.left_of(amounts))
            if bundles.role != "policy":
                chosen = min(open_rooms, key=lambda room: room.tightness(amounts))
            elif together > 1 or index == 0 or chosen not in open_rooms:
                chosen = max(open_rooms, key=lambda room: room.emptiness(amounts))
            for _ in range(together):
                chosen.take(bundles.amounts)
    return None


def needed_together(bundles: Bundles) -> dict[str, float]:
    """What the processes that lie on one node need of it. Several are ranks: no two of them share a GPU."""
    if bundles.together == 1:
        return bundles.amounts
    num = bundles.together
    return {unit: num * (math.ceil(own) if unit == "GPU" else own) for unit, own in bundles.amounts.items()}


class _Room:
    """What is left of a node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._gpus = [1.0] * int(node.resources.get("GPU", 0))  # the free share of each
        self._left = {unit: amount for unit, amount in node.resources.items() if unit != "GPU"}

    def left_of(self, amounts: Mapping[str, float]) -> dict[str, float]:
        """Of what is asked for. Of GPUs those that nobody uses; for a share of one the largest."""
        return {unit: self._left_of(unit, amount) for unit, amount in amounts.items() if amount}

    def fits(self, amounts: Mapping[str, float]) -> bool:
        return all(amounts[unit] <= left for unit, left in self.left_of(amounts).items())

    def nearness(self, amounts: Mapping[str, float]) -> float:
        """Up to 1: the resource that is shortest, as a share of what is asked for."""
        return min((left / amounts[unit] for unit, left in self.left_of(amounts).items()), default=1.0)

    def emptiness(self, amounts: Mapping[str, float]) -> float:
        """What Ray orders nodes by: the shares that would stay free, summed over what is asked for."""
        return sum(1 - amounts[unit] / left for unit, left in self.left_of(amounts).items() if left)

    def tightness(self, amounts: Mapping[str, float]) -> tuple[float, float]:
        """Small where little is left over, of GPUs first."""
        return self.left_of(amounts).get("GPU", 0.0), self.emptiness(amounts)

    def take(self, amounts: Mapping[str, float]) -> None:
        for unit, amount in amounts.items():
            if unit != "GPU":
                self._left[unit] = _rounded(self._left.get(unit, 0.0) - amount)
        gpus = amounts.get("GPU", 0.0)
        if gpus >= 1:
            for _ in range(int(gpus)):
                self._gpus.remove(1.0)
        elif gpus:
            # The fullest that has room, as Ray does.
            share = min(share for share in self._gpus if share >= gpus)
            self._gpus[self._gpus.index(share)] = _rounded(share - gpus)

    def _left_of(self, unit: str, amount: float) -> float:
        if unit != "GPU":
            return self._left.get(unit, 0.0)
        return float(self._gpus.count(1.0)) if amount >= 1 else max(self._gpus, default=0.0)


def _rounded(amount: float) -> float:
    return round(amount, 4)  # Ray counts in ten-thousandths
