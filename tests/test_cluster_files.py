"""The files of `cluster/`: what a scheduler would refuse is refused here, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from pns.config import Config, TermKind
from pns.recipe import load
from workers.placement import Bundles, bundles, check_placement

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
PLACEMENTS = sorted(CLUSTER.glob("placements/*.yaml"))


def roles(config: Config) -> list[str]:
    services = (TermKind.reward_model, TermKind.judge)
    terms = config.reward.terms.items()
    return [
        "rollout",
        "policy",
        "verifier",
        *(name for name, term in terms if term.kind in services and term.weight > 0),
    ]


def pack(asked: list[Bundles], nodes: int, gpus: int) -> bool:
    """Whether every process finds its GPUs on one node, the largest first."""
    free = [float(gpus)] * nodes
    shares = sorted((b.gpus for b in asked for _ in range(b.replicas)), reverse=True)
    for share in shares:
        node = next((i for i, left in enumerate(free) if left >= share), None)
        if node is None:
            return False
        free[node] -= share
    return True


def test_there_are_placements() -> None:
    assert {path.stem for path in PLACEMENTS} == {"1x1", "1x8", "2x8", "8x8"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda path: path.stem)
def test_a_placement_fills_the_gpus_that_its_name_says(placement: Path, recipe: Path) -> None:
    """With every recipe that keeps the three terms of the schema."""
    num_nodes, num_gpus = map(int, placement.stem.split("x"))
    config = load(recipe, over=[placement])
    asked = bundles(config, roles(config), "cuda")
    assert sum(b.replicas * b.gpus for b in asked) == num_nodes * num_gpus
    assert pack(asked, num_nodes, num_gpus)
    policy = config.placement.policy.replicas
    assert policy % num_gpus == 0 or policy < num_gpus  # whole nodes, or one
    cpus = sum(b.replicas * b.cpus for b in asked)
    assert cpus <= num_nodes * num_gpus * 12
    check_placement(config, roles(config), {"GPU": num_nodes * num_gpus, "CPU": cpus}, "cuda")


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda path: path.stem)
def test_a_placement_changes_no_result(placement: Path) -> None:
    """Only where roles run, and how much memory an engine takes."""
    recipe = RECIPES[0]
    plain, placed = load(recipe), load(recipe, over=[placement])
    placed.placement = plain.placement
    placed.rollout.memory_fraction = plain.rollout.memory_fraction
    for name, term in placed.reward.terms.items():
        term.pool = plain.reward.terms[name].pool
    assert placed == plain
