"""Services asked again: only for what is lacking, kept as it comes, and not for long where they fail."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pns.algo.judging import Judgement
from pns.algo.masks import TooManyMaskedError
from pns.algo.rescoring import rewarded_anew
from pns.algo.reward import reward_rules
from pns.config import Config, RewardConfig, RewardTerm, TermKind
from pns.errors import UserError
from pns.files import read_jsonl
from pns.records import Completion, Reward, Rollout, Verdict
from pns.stages import rescoring
from pns.stages.rescoring import Rescorer

TERMS = {
    "wrong": RewardTerm(TermKind.verdict, 0.5),
    "plausibility": RewardTerm(TermKind.reward_model, 0.25),
    "coherence": RewardTerm(TermKind.judge, 0.25, model="judge"),
}
RULES = reward_rules(Config(reward=RewardConfig(terms=TERMS)))


def wrong(bench: Any, number: int, step: int = 0, **known: Any) -> Rollout:
    """A wrong completion of p0 that ends in `number`; `known`: raw values and missing terms."""
    [problem] = bench.problems(1).problems
    text = bench.solution(number)
    token_ids = bench.prompts.encode_completion(text)
    completion = Completion(f"p0#{number}", problem.id, text, token_ids, (), "stop")
    return Rollout(step, problem, completion, Reward(None, True, Verdict.WRONG, **known))


@pytest.fixture
def services(bench: Any) -> Any:
    """r = log(3) of everything, and the best of grades."""
    bench.fleet.scorer("plausibility").value = lambda item: math.log(3)
    bench.fleet.scorer("coherence").value = lambda item: Judgement((3, 3, 3, 3))
    return bench.fleet


def rescorer(bench: Any, unfinished: Path, notes: list[str] | None = None) -> Rescorer:
    note = (notes if notes is not None else []).append
    return Rescorer(RULES, bench.prompts, bench.fleet.scorer, unfinished, note)


def test_only_what_is_lacking_is_asked(bench: Any, services: Any, tmp_path: Path) -> None:
    rows = [
        wrong(bench, 11, raw={"plausibility": 0.0}),
        wrong(bench, 12, raw={"plausibility": 0.0}, missing={"coherence": "too_long"}),
        wrong(bench, 13),
    ]
    notes: list[str] = []
    answered = rescorer(bench, tmp_path / "rows", notes).answer(rows, 3, "reverse_rl")
    judgement = {"scores": [3, 3, 3, 3], "probabilities": []}
    assert [row.reward.raw for row in answered] == [
        {"plausibility": 0.0, "coherence": judgement},
        {"plausibility": 0.0},
        {"plausibility": math.log(3), "coherence": judgement},
    ]
    problem, prompt_ids = rows[0].problem, bench.prompts.encode(rows[0].problem)
    assert services.scorer("coherence").asked == [
        (problem.prompt, row.completion.text) for row in (rows[0], rows[2])
    ]
    assert services.scorer("plausibility").asked == [(*prompt_ids, *rows[2].completion.token_ids)]
    assert notes == ["2/2 completions answered"]
    values = [row.reward.value for row in rewarded_anew(answered, 3, RULES, "reverse_rl")]
    assert values == [pytest.approx(0.875), None, pytest.approx(0.5 + 0.25 * 0.75 + 0.25)]


def test_an_interrupted_call_goes_on(
    bench: Any, services: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that breaks down in the second of two parts: what the first gave is not asked again."""
    monkeypatch.setattr(rescoring, "_PART_ROWS", 2)
    rows = [wrong(bench, 11 + i, step=i // 2) for i in range(4)]
    judge, unfinished = services.scorer("coherence"), tmp_path / "rows"
    submit = judge.submit

    def breaks(items: Any) -> Any:
        if len(judge.asked) == 2:
            judge.fails = UserError("coherence: replica 1 died")
        return submit(items)

    judge.submit = breaks
    with pytest.raises(UserError, match="replica 1 died"):
        rescorer(bench, unfinished).answer(rows, 2, "reverse_rl")
    assert [row["step"] for row in read_jsonl(unfinished)] == [0, 0]
    judge.submit, judge.fails = submit, None
    judge.asked.clear()
    answered = rescorer(bench, unfinished).answer(rows, 2, "reverse_rl")
    assert all(row.reward.raw.keys() == {"plausibility", "coherence"} for row in answered)
    assert [text for _, text in judge.asked] == [row.completion.text for row in rows[2:]]
    # Rows of completions that were sampled again since are not taken.
    others = [wrong(bench, 21 + i, step=i // 2) for i in range(4)]
    rescorer(bench, unfinished).answer(others, 2, "reverse_rl")
    assert len(judge.asked) == 6


def test_a_failure_is_missing_and_not_kept(bench: Any, services: Any, tmp_path: Path) -> None:
    judge = services.scorer("coherence")
    judge.value = lambda item: None if "{11}" in item[1] else Judgement((3, 3, 3, 3))
    rows = [wrong(bench, 11 + i) for i in range(6)]
    answered = rescorer(bench, tmp_path / "rows").answer(rows, 6, "reverse_rl")
    assert [row.reward.missing for row in answered] == [{"coherence": "too_long"}] + [{}] * 5
    assert len(read_jsonl(tmp_path / "rows")) == 5


def test_a_service_that_fails_is_not_asked_to_the_end(
    bench: Any, services: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescoring, "_PART_ROWS", 2)
    services.scorer("coherence").value = lambda item: None
    rows = [wrong(bench, 11 + i, step=i // 2) for i in range(8)]
    with pytest.raises(TooManyMaskedError, match="reverse_rl, step 0: coherence failed for 2 of the 2"):
        rescorer(bench, tmp_path / "rows").answer(rows, 2, "reverse_rl")
    assert len(services.scorer("coherence").asked) == 2
