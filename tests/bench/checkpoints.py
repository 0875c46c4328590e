"""How long a training step is held by a checkpoint, and how large that is: verl's own, and ours.

    python tests/bench/checkpoints.py

A Qwen2 of random weights is trained in float32 on a CPU (SFT on rows of random tokens), by processes of the class
and with the settings of our policy processes. Three ways of writing a checkpoint take turns, `--repeats` times in
one run:

- `verl`: verl's own, a file a rank, and every file synced to disk as the driver did;
- `waited`: ours, waited for until it is whole;
- `beside`: ours, while training goes on.

`held_seconds` is what passes before the next step begins, `whole_seconds` until all of it is on disk,
`next_step_seconds` how long the first step after it takes (`undisturbed` one without a checkpoint); medians.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from policy_memory import CASES, Case, loaded, run_ranks

CASE = CASES["74M, checkpointing"]
WAYS = ("verl", "waited", "beside")


def measure(case: Case, directory: Path, repeats: int) -> dict[str, Any]:
    """In a rank's process."""
    import torch

    from workers.training.rank import Rank

    torch.set_num_threads(1)
    rank = Rank()
    step = loaded(rank, case, directory / "measured")
    step()
    seconds: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    undisturbed = [timed(step) for _ in range(2)]
    sizes = {}
    for number in range(repeats):
        for way in WAYS:
            place = directory / f"{way}-{number}"
            began = time.monotonic()
            if way == "verl":
                rank.training.save_checkpoint(str(place))
                sync_files(place)
            else:
                rank.begin_save(str(place))
                if way == "waited":
                    rank.is_saved(waits=True)
            own = seconds[way]
            own.setdefault("held_seconds", []).append(time.monotonic() - began)
            own.setdefault("next_step_seconds", []).append(timed(step))
            if way == "beside":
                rank.is_saved(waits=True)
                own.setdefault("whole_seconds", []).append(time.monotonic() - began)
            else:
                own["whole_seconds"] = own["held_seconds"]
            sizes[way] = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            undisturbed.append(timed(step))
            if way == "verl":
                own.setdefault("read_seconds", []).append(
                    timed(lambda place=place: rank.training.load_checkpoint(str(place)))
                )
            elif way == "waited":
                own.setdefault("read_seconds", []).append(timed(lambda place=place: rank.restore(str(place))))
    return {
        "undisturbed_step_seconds": statistics.median(undisturbed),
        "ways": {
            way: {name: statistics.median(values) for name, values in own.items()} | {"bytes": sizes[way]}
            for way, own in seconds.items()
        },
    }


def timed(call: Any) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def sync_files(directory: Path) -> None:
    for path in directory.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    repeats = int(os.environ.get("REPEATS", arguments.repeats))
    if arguments.worker:
        told, directory = arguments.worker
        print(json.dumps(measure(Case(**json.loads(told)), Path(directory), repeats)), flush=True)
        return
    case = replace(CASE, ranks=arguments.ranks)
    measured: dict[str, Any] = run_ranks(__file__, case, {"REPEATS": str(repeats)})
    versions = {name: version(name) for name in ("torch", "transformers", "verl")}
    print(json.dumps({"case": asdict(case), "repeats": repeats, **measured, "versions": versions}))


if __name__ == "__main__":
    main()
