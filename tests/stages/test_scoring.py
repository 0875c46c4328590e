"""Rewards of completions: what each gate asks for, which causes mask, and that each goes on by itself."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest

from pns.algo.judging import Judgement
from pns.algo.masks import TooManyMaskedError
from pns.algo.reward import reward_rules
from pns.config import Config, Endpoint, RewardConfig, RewardTerm, ServicePool, TermKind
from pns.errors import UserError
from pns.records import Rollout, Verdict
from pns.stages.context import Context
from pns.stages.scoring import Draws, by_problem, by_verdict, load_terms, roll_out
from workers.rollout.engine import Sampling

SAMPLING = Sampling(1.0, 1.0, 30)
GATES = ["malformed", "correct", "unverified", "wrong"]


def rules_of(terms: dict[str, RewardTerm], **numbers: Any) -> RewardConfig:
    """As stages get them: through `reward_rules`."""
    terms = {"wrong": RewardTerm(TermKind.verdict, 0.5), **terms}
    return reward_rules(Config(reward=RewardConfig(terms=terms, **numbers)))


def two_terms(plausibility: float = 0.25, coherence: float = 0.25) -> dict[str, RewardTerm]:
    return {
        "plausibility": RewardTerm(TermKind.reward_model, plausibility),
        "coherence": RewardTerm(TermKind.judge, coherence, model="judge"),
    }


def scored(bench: Any, texts: list[str], rules: RewardConfig | None) -> list[Rollout]:
    """The rollouts of one problem, whose answer is 10, with these completions."""
    with bench.making() as ctx:
        return scored_in(ctx, bench, texts, rules)


def scored_in(ctx: Context, bench: Any, texts: list[str], rules: RewardConfig | None) -> list[Rollout]:
    bench.fleet.rollout.write = lambda problem, sample, model: texts[sample]
    bench.fleet.rollout.chunk = 1
    problems = list(bench.problems(1).problems)
    return roll_out(ctx, Draws("name", len(texts), SAMPLING, 1.0, rules), problems)


def every_gate(bench: Any) -> list[str]:
    return [bench.malformed, *(bench.solution(answer) for answer in (10, bench.undecided, 11))]


@pytest.mark.parametrize("late", [False, True])
def test_the_ordinary_reward_asks_no_term(bench: Any, late: bool) -> None:
    bench.fleet.verifier.late = late
    rewards = [rollout.reward for rollout in scored(bench, every_gate(bench), None)]
    assert [reward.value for reward in rewards] == [0.0, 1.0, None, 0.0]
    assert [reward.format_ok for reward in rewards] == [False, True, True, True]
    assert rewards[2].missing == {"verdict": "timeout"}
    assert len(bench.fleet.verifier.asked) == 3  # a malformed one is not verified
    assert not bench.fleet.scorers


@pytest.mark.parametrize("late", [False, True])
def test_each_gate_of_the_composite_reward(bench: Any, late: bool) -> None:
    bench.fleet.verifier.late = late
    bench.fleet.scorer("plausibility").value = lambda item: math.log(3)
    bench.fleet.scorer("coherence").value = lambda item: Judgement((3, 3, 0, 0))
    rollouts = scored(bench, every_gate(bench), rules_of(two_terms()))
    rewards = dict(zip(GATES, (rollout.reward for rollout in rollouts), strict=True))
    assert rewards["malformed"].value == -1.0
    assert rewards["correct"].value == 0.0
    assert (rewards["unverified"].value, rewards["unverified"].missing) == (None, {"verdict": "timeout"})
    assert rewards["wrong"].value == pytest.approx(0.5 + 0.25 * 0.75 + 0.25 * 0.5)
    assert rewards["wrong"].terms == {"wrong": 1.0, "plausibility": pytest.approx(0.75), "coherence": 0.5}
    # What services gave is kept as it was.
    judgement = {"scores": [3, 3, 0, 0], "probabilities": []}
    assert rewards["wrong"].raw == {"plausibility": math.log(3), "coherence": judgement}
    assert not any(rewards[gate].terms for gate in ("malformed", "correct", "unverified"))
    # Only the wrong one is asked about, with what each kind of service reads.
    wrong = rollouts[3]
    prompt_ids = bench.prompts.encode(wrong.problem)
    assert bench.fleet.scorer("plausibility").asked == [(*prompt_ids, *wrong.completion.token_ids)]
    assert bench.fleet.scorer("coherence").asked == [(wrong.problem.prompt, wrong.completion.text)]


def test_without_the_gate_a_right_completion_earns_the_terms(bench: Any) -> None:
    bench.fleet.scorer("coherence").value = lambda item: Judgement((3, 3, 3, 3))
    rollouts = scored(
        bench, every_gate(bench), rules_of(two_terms(), gates={"malformed": -1.0, "correct": None})
    )
    values = [rollout.reward.value for rollout in rollouts]
    assert values == [-1.0, pytest.approx(0.375), None, pytest.approx(0.875)]
    assert len(bench.fleet.scorer("coherence").asked) == 2


def test_a_completion_that_was_cut_off_is_malformed(bench: Any) -> None:
    [rollout] = scored(bench, [bench.solution(11) + "..."], rules_of(two_terms()))
    assert rollout.completion.finish_reason == "length"
    assert rollout.reward.value == -1.0
    assert not bench.fleet.verifier.asked


def test_a_term_of_weight_0_is_not_asked(bench: Any) -> None:
    rollouts = scored(bench, [bench.solution(11)] * 20, rules_of(two_terms(coherence=0.0)))
    assert len(bench.fleet.scorer("plausibility").asked) == 20
    assert "coherence" not in bench.fleet.scorers
    assert all(rollout.reward.terms.keys() == {"wrong", "plausibility"} for rollout in rollouts)
    assert [rollout.reward.value for rollout in rollouts] == [pytest.approx(0.5 + 0.25 * 0.5)] * 20


def test_rules_are_without_what_does_not_bear_on_the_reward() -> None:
    terms = two_terms(coherence=0.0)
    terms["plausibility"].pool = ServicePool(replicas=7)
    terms["far"] = RewardTerm(TermKind.judge, 0.1, model="name", endpoint=Endpoint("http://a/v1", retries=9))
    rules = rules_of(terms)
    far = RewardTerm(TermKind.judge, 0.1, model="name", endpoint=Endpoint("http://a/v1"))
    own = {"plausibility": RewardTerm(TermKind.reward_model, 0.25), "far": far}
    assert rules.terms == {"wrong": RewardTerm(TermKind.verdict, 0.5), **own}
    assert terms["plausibility"].pool.replicas == 7


def test_two_reward_models_and_a_judge(bench: Any) -> None:
    """Another term is data: each is asked in its own service, loaded with its own model."""
    terms = two_terms() | {"style": RewardTerm(TermKind.reward_model, 0.125, model="other/model")}
    rules = rules_of(terms)
    bench.fleet.scorer("plausibility").value = lambda item: math.log(3)
    bench.fleet.scorer("style").value = lambda item: -math.log(3)
    bench.fleet.scorer("coherence").value = lambda item: Judgement((1, 1, 1, 0))
    with bench.making("loading") as ctx:
        load_terms(ctx, rules, "own/main")
    assert bench.fleet.scorer("plausibility").loaded == ["own/main"]
    # The others name their models: the fleet has loaded them.
    assert not bench.fleet.scorer("style").loaded
    assert not bench.fleet.scorer("coherence").loaded
    [rollout] = scored(bench, [bench.solution(11)], rules)
    expected = {"wrong": 1.0, "plausibility": 0.75, "coherence": 0.25, "style": 0.25}
    assert rollout.reward.terms == pytest.approx(expected)
    assert rollout.reward.value == pytest.approx(0.5 + 0.25 * 0.75 + 0.25 * 0.25 + 0.125 * 0.25)
    # A named model reads the chat, which is for its own tokenizer, and the run's own the policy's tokens.
    messages = bench.prompts.messages(rollout.problem)
    answer = {"role": "assistant", "content": rollout.completion.text}
    assert bench.fleet.scorer("style").asked == [(*messages, answer)]
    prompt_ids = bench.prompts.encode(rollout.problem)
    assert bench.fleet.scorer("plausibility").asked == [(*prompt_ids, *rollout.completion.token_ids)]


def test_a_missing_term_masks_with_its_cause(bench: Any) -> None:
    """The other term is kept, and a completion that has both is not touched."""
    long = bench.solution(11, "So Ann=3. So Ann=3. ")
    bench.fleet.scorer("coherence").value = lambda item: None if item[1] == long else Judgement((3, 3, 3, 3))
    masked, whole = scored(bench, [long, bench.solution(12)], rules_of(two_terms()))
    assert (masked.reward.value, masked.reward.missing) == (None, {"coherence": "too_long"})
    assert masked.reward.terms == {"wrong": 1.0, "plausibility": 0.5}
    assert (whole.reward.value, whole.reward.missing) == (pytest.approx(0.875), {})


def test_rows_come_while_a_service_hangs(bench: Any) -> None:
    """What needs no term is whole, and kept, before the services are waited for."""
    bench.fleet.scorer("plausibility").hangs = bench.fleet.scorer("coherence").hangs = True
    rules = rules_of(two_terms())
    with bench.making() as ctx:
        rollouts = scored_in(ctx, bench, [bench.solution(11), bench.malformed, bench.solution(10)], rules)
        kept = (ctx.directory / "rollouts.unfinished.jsonl").read_text().splitlines()
    assert [rollout.reward.value for rollout in rollouts] == [None, -1.0, 0.0]
    assert len(kept) == 2  # the masked one is asked again after an interruption


@pytest.mark.parametrize("late", [False, True])
def test_services_that_give_nothing_mask_with_their_cause(bench: Any, late: bool) -> None:
    for name in ("plausibility", "coherence"):
        bench.fleet.scorer(name).hangs = True
    bench.fleet.verifier.late = late
    rollouts = scored(bench, [bench.solution(11)] * 10, rules_of(two_terms()))
    causes = {"plausibility": "deadline", "coherence": "deadline"}
    assert all(rollout.reward.missing == causes for rollout in rollouts)


def test_a_pool_that_fails_ends_the_stage(bench: Any) -> None:
    bench.fleet.scorer("coherence").fails = UserError("coherence: replica 1 died")
    with pytest.raises(UserError, match="coherence: replica 1 died"):
        scored(bench, [bench.solution(11)] * 3, rules_of(two_terms()))


def test_a_verdict_asks_the_services_at_once(bench: Any) -> None:
    """Not when the next completion comes: the second one does not come before the first has been asked."""
    scorer = bench.fleet.scorer("plausibility")
    bench.fleet.scorer("coherence").value = lambda item: Judgement((3, 3, 3, 3))
    bench.fleet.verifier.late = True
    stream = bench.fleet.rollout.stream

    def one_after_the_other(requests: Any, sampling: Any) -> Any:
        for number, samples in enumerate(stream(requests, sampling)):
            end = time.monotonic() + 60
            while len(scorer.asked) < number:
                assert time.monotonic() < end, "the completion before was not asked"
                time.sleep(0.001)
            yield samples

    bench.fleet.rollout.stream = one_after_the_other
    rollouts = scored(bench, [bench.solution(11)] * 4, rules_of(two_terms()))
    assert [rollout.reward.masked for rollout in rollouts] == [False] * 4


def test_a_failure_of_the_engine_is_masked_and_no_completion(bench: Any) -> None:
    """Neither a log-probability that is not a number nor a request that the engine dropped becomes -1."""
    sample = bench.fleet.rollout.sample

    def broken(request: Any) -> Any:
        given = sample(request)
        if request.id.endswith("#0"):
            return replace(given, log_probs=(math.nan, *given.log_probs[1:]))
        return replace(given, finish_reason="abort") if request.id.endswith("#1") else given

    bench.fleet.rollout.sample = broken
    rollouts = scored(bench, [bench.solution(10)] * 3, rules_of(two_terms()))
    missing = [rollout.reward.missing for rollout in rollouts]
    assert missing == [{"rollout": "log_probs_not_finite"}, {"rollout": "abort"}, {}]
    assert [rollout.reward.value for rollout in rollouts] == [None, None, 0.0]


def test_too_many_failures_of_what_was_asked_stop_the_stage(bench: Any) -> None:
    """Eight right ones and two whose judge never answers: a fifth of all, and all that it was asked."""
    bench.fleet.scorer("coherence").hangs = True
    texts = [bench.solution(10)] * 8 + [bench.solution(11)] * 2
    bench.fleet.rollout.write = lambda problem, sample, model: texts[sample]
    draws = Draws("name", 10, SAMPLING, 0.5, rules_of(two_terms()))
    with bench.making() as ctx, pytest.raises(TooManyMaskedError, match=r"coherence failed for 2 of the 2"):
        roll_out(ctx, draws, list(bench.problems(1).problems))


def test_rollouts_by_verdict_and_problem(bench: Any) -> None:
    rollouts = scored(bench, [*every_gate(bench), bench.solution(12)], None)
    assert by_verdict(rollouts, Verdict.WRONG) == [rollouts[3], rollouts[4]]
    assert by_verdict(rollouts, Verdict.CORRECT) == [rollouts[1]]
    assert by_verdict(rollouts, Verdict.UNVERIFIED) == [rollouts[2]]  # not the malformed one
    assert by_problem(rollouts[:2]) == {"p0": [rollouts[0].completion, rollouts[1].completion]}
