"""A step of reverse RL on the tiny models: rollout and rewards together, beside each of them alone.

    python tests/bench/streaming_tiny.py

The tiny recipe's rollout engine, verifier, reward model and judge, as real actors. `rollout` is a step that
asks no term, `reward` the services' time for what the whole step asked of them, `wall` the whole step.
On two cores they take turns at the processor, so that `wall` can come near `rollout` + `reward` and not near
the larger; `processor` = wall / (rollout + reward) says what is lost between them. Prints one JSON line.
"""

import argparse
import io
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoModelForSequenceClassification

from pns.algo.reward import KINDS, Question, reward_rules, service_terms
from pns.config import Tracking
from pns.data.problems import load_problem_sets
from pns.driver import load_prompts
from pns.recipe import load
from pns.records import Rollout
from pns.run.place import Place
from pns.run.terminal import PlainTerminal
from pns.run.tracking import Tracker
from pns.stages.context import Context
from pns.stages.scoring import Draws, roll_out, unfinished_rollouts
from workers.cluster import Cluster
from workers.fleet import Fleet
from workers.rollout.engine import Sampling
from workers.runtime import Runtime

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny-qwen2.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=40, help="of a step (default %(default)s)")
    num_problems = parser.parse_args().problems
    # Every sample is wrong or malformed by the backbone: nearly all go on to the services.
    config = load(RECIPE, ["reward.gates.correct=null"])
    rules, prompts = reward_rules(config), load_prompts(config)
    problems = list(load_problem_sets(config).train)[:num_problems]
    names = service_terms(rules)
    with TemporaryDirectory() as directory, Cluster(config, ["rollout", "verifier", *names]) as device:
        fleet = Fleet(config, Runtime(device))
        fleet.start(["rollout", "verifier", *names])
        tracker = Tracker(Path(directory), Tracking(), lambda *_: None, terminal=PlainTerminal(io.StringIO()))
        place = Place(Path(directory) / "step")
        sampling = Sampling(1.0, 1.0, config.rollout.max_new_tokens)
        fleet.rollout.load(config.models.backbone)
        # With a random head: how long a score takes does not depend on it.
        scorer = AutoModelForSequenceClassification.from_pretrained(config.models.reward_model, num_labels=1)
        scorer.save_pretrained(Path(directory) / "reward_model")
        fleet.scorer("plausibility").load(f"{directory}/reward_model")
        with place.making({"inputs": []}):
            ctx = Context(0, place, fleet, prompts, tracker, Path(directory))

            def step_seconds(name: str, composite: bool) -> tuple[float, list[Rollout]]:
                draws = Draws("bench", 8, sampling, 1.0, rules if composite else None)
                unfinished = unfinished_rollouts(ctx, name)  # of its own: nothing is there already
                began = time.monotonic()
                rollouts = roll_out(ctx, draws, problems, unfinished)
                return time.monotonic() - began, rollouts

            step_seconds("warm-up", True)  # models are loaded
            rollout, _ = step_seconds("rollout", False)
            wall, rollouts = step_seconds("whole", True)
            asked: dict[str, list[Any]] = {name: [] for name in names}
            for r in rollouts:
                question = Question(
                    prompts.encode(r.problem), prompts.messages(r.problem), r.problem, r.completion
                )
                for name in names:
                    if name in r.reward.raw:
                        asked[name].append(KINDS[rules.terms[name].kind].item(rules.terms[name], question))
            began = time.monotonic()
            handles = {name: fleet.scorer(name).submit(items) for name, items in asked.items()}
            for name, handle in handles.items():
                fleet.scorer(name).collect(handle)
            reward = time.monotonic() - began
        fleet.shutdown()
    figures = {
        "completions": len(rollouts),
        "scored": {name: len(items) for name, items in asked.items()},
        "rollout": rollout,
        "reward": reward,
        "wall": wall,
        "ratio": wall / max(rollout, reward),
        "processor": wall / (rollout + reward),
    }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}))


if __name__ == "__main__":
    main()
