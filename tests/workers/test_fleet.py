"""The fleet with real roles that need no model: the verifier's processes, and pools that wait for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psutil
import pytest
from ray.util.placement_group import placement_group_table

from pns.config import Config, Endpoint, Placement, RewardConfig, RewardTerm, ServicePool, TermKind
from pns.errors import UserError
from pns.records import Verdict
from workers.fleet import Fleet
from workers.rewards.judge import JudgePool
from workers.rewards.reward_model import RewardModelPool
from workers.runtime import Runtime

RUNTIME = Runtime(start_timeout_seconds=1800)
SMALL = ServicePool(replicas=1, cpus=0.1)


@pytest.fixture
def make_fleet(ray_session: None) -> Iterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []

    def make(**terms: RewardTerm) -> Fleet:
        config = Config(placement=Placement(verifier_processes=1), reward=RewardConfig(terms=terms))
        fleets.append(Fleet(config, RUNTIME))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.shutdown()


def test_a_term_is_a_pool_of_its_kind_and_starts_when_it_is_used(
    make_fleet: Callable[..., Fleet], actor_processes: Callable[..., set[psutil.Process]]
) -> None:
    before = actor_processes("ScoringActor")
    fleet = make_fleet(
        plausibility=RewardTerm(TermKind.reward_model, 0.5, pool=SMALL),
        coherence=RewardTerm(TermKind.judge, 0.5, pool=SMALL),
        unused=RewardTerm(TermKind.judge, 0.0, model="/nowhere", pool=SMALL),
    )
    fleet.start(["verifier", "plausibility", "coherence", "policy"])  # the policy waits for its first use
    assert isinstance(fleet.scorer("plausibility"), RewardModelPool)
    assert isinstance(fleet.scorer("coherence"), JudgePool)
    assert len(actor_processes("ScoringActor") - before) == 2
    (result,) = fleet.verifier.collect(fleet.verifier.submit([("1/2", r"\boxed{0.5}")]))
    assert result.verdict is Verdict.CORRECT
    with pytest.raises(UserError, match="no term 'judge'"):
        fleet.start(["judge"])


def test_the_policy_has_its_place_from_the_start_and_gives_it_back(make_fleet: Callable[..., Fleet]) -> None:
    def places() -> list[str]:
        return [group["state"] for group in placement_group_table().values()]

    before = places().count("CREATED")
    fleet = make_fleet()
    fleet.start(["policy"])
    assert places().count("CREATED") == before + 1
    fleet.shutdown()
    assert places().count("CREATED") == before


def test_a_judge_behind_an_endpoint_is_no_actor(
    make_fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", retries=0)  # where nothing listens
    fleet = make_fleet(coherence=RewardTerm(TermKind.judge, 0.5, model="grader", endpoint=endpoint))
    with pytest.raises(UserError, match=r"coherence: http:.* does not serve grader: APIConnection"):
        fleet.scorer("coherence")


def test_a_role_that_cannot_start_is_said_wherever_the_fleet_is_used_next_and_nothing_stays(
    make_fleet: Callable[..., Fleet], actor_processes: Callable[..., set[psutil.Process]]
) -> None:
    before = actor_processes("ScoringActor")
    fleet = make_fleet(
        coherence=RewardTerm(TermKind.judge, 0.5, model="/nowhere", pool=SMALL),
        plausibility=RewardTerm(TermKind.reward_model, 0.5, pool=SMALL),
    )
    fleet.start(["coherence", "plausibility"])
    with pytest.raises(UserError, match="judge /nowhere"):
        fleet.scorer("coherence")
    with pytest.raises(UserError, match="judge /nowhere"):
        fleet.scorer("plausibility")
    fleet.shutdown()
    _, alive = psutil.wait_procs(actor_processes("ScoringActor") - before, timeout=600)
    assert alive == []
