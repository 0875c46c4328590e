"""`pns export`: a run's pairs as a data set, and its trained model, each with a card. Every figure comes from
the run's own files; what no stage has written is left out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pns.config import Config, to_dict
from pns.data.preference import canonical_line, data_hash, pair_rows, read_pairs, read_rows
from pns.errors import UserError
from pns.files import read_jsonl
from pns.preflight import HUB_ID
from pns.run.directory import RunDirectory
from pns.run.report import build

PAPER = "arXiv:2602.03516"
_SIZES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
}
_COLUMN_MEANINGS = {
    "prompt": "the conversation before the answer (or its text)",
    "chosen": "the preferred answer",
    "rejected": "the answer to be avoided",
    "problem_id": "the problem the pair belongs to",
    "source": "how the rejected answer was made",
    "margin_end": "leading characters of the rejected answer, up to and including the first wrong step",
    "score_chosen": "raw reward-model score of the chosen answer",
    "score_rejected": "raw reward-model score of the rejected answer",
}


@dataclass(frozen=True)
class _Run:
    """A run with its configuration; `external`: where the pairs come from, where it is not the run's own pair
    stage."""

    directory: RunDirectory
    config: Config
    external: str

    @property
    def name(self) -> str:
        return self.config.name or self.directory.path.resolve().name

    def finished(self, stage: str) -> dict[str, Any]:
        """The stage's manifest. Raises UserError while it has none."""
        manifest = self.directory.manifest(stage)
        if manifest is None:
            raise UserError(
                f"{self.directory.path}: stage {stage} is not finished; run its recipe again, until {stage} at least"
            )
        return manifest


def export(run_path: Path, out: Path, pairs: bool = True, model: bool = True) -> None:
    """Write `out/pairs` (train.jsonl, train.parquet, README.md) and `out/model` (the preference-trained
    checkpoint, hard-linked where the file system can, and README.md).

    `out` appears whole or not at all. Raises UserError for an `out` that exists and is not an empty directory
    or lies in the run directory, a `run_path` that is not a run directory, a stage that is not finished, and
    external pairs that are no longer those the run has read.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty directory; choose another, or remove it")
    run = _open(run_path)
    if out.is_relative_to(run_path.resolve()):
        raise UserError(f"{out} is inside the run directory {run_path}; choose a place outside")
    if model:
        run.finished("preference")
    if pairs or not run.external:
        run.finished("preference" if run.external else "pair")
    rows = _rows(run) if pairs or not run.external else []
    sha256 = _trained_on(run)["sha256"] if run.external else data_hash(rows)
    if run.external and rows and data_hash(rows) != sha256:
        raise UserError(
            f"{run.external} is not what stage preference of {run_path} has read (data hash {sha256}): restore it"
        )
    partial = out.with_name(f".partial-{out.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir()
        if pairs:
            _write_pairs(run, partial / "pairs", rows, sha256)
        if model:
            _write_model(run, partial / "model", sha256)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(
        f"{out}: {' and '.join(name for name, wanted in (('pairs', pairs), ('model', model)) if wanted)}; data hash {sha256}"
    )


def _open(path: Path) -> _Run:
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is not a run directory (no config.yaml); name one like runs/tiny-qwen2")
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path / "config.yaml"))
        config = cast(Config, OmegaConf.to_object(loaded))
    except OmegaConfBaseException as error:
        raise UserError(
            f"{path / 'config.yaml'}: {str(error).splitlines()[0]}; export with the version of pns that made the run"
        ) from error
    data = config.preference.data
    external = data.path or (f"{data.hub}, revision {data.revision}, split {data.split}" if data.hub else "")
    return _Run(RunDirectory(path), config, external)


def _rows(run: _Run) -> list[dict[str, Any]]:
    """The pairs as rows of the standard format: the run's own, or the external ones as they are given."""
    if run.external:
        return [row for _, row in read_rows(run.config.preference.data)]
    return pair_rows(read_pairs(run.directory.stage_dir("pair") / "pairs.jsonl"), run.config.data)


def _trained_on(run: _Run) -> dict[str, Any]:
    """What the preference stage recorded of its pairs (`LoadedPairs.summary`); nothing where it has not run."""
    path = run.directory.stage_dir("preference") / "data.json"
    return run.directory.read_json(path) if path.is_file() or run.external else {}


def _write_pairs(run: _Run, directory: Path, rows: Sequence[Mapping[str, Any]], sha256: str) -> None:
    import pyarrow
    from pyarrow import parquet

    directory.mkdir()
    lines = [canonical_line(row) for row in rows]
    with open(directory / "train.jsonl", "w", encoding="utf-8") as file:
        file.writelines(lines)
    written = [json.loads(line) for line in lines]
    columns = [name for name in _COLUMN_MEANINGS if any(name in row for row in written)]
    try:
        table = pyarrow.Table.from_pydict({name: [row.get(name) for row in written] for name in columns})
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{run.external or run.directory.path}: the rows have no common Parquet type ({error})"
        ) from error
    parquet.write_table(table, directory / "train.parquet")
    (directory / "README.md").write_text(_pairs_card(run, columns, len(rows), sha256), encoding="utf-8")


def _write_model(run: _Run, directory: Path, sha256: str) -> None:
    shutil.copytree(run.directory.stage_dir("preference") / "model", directory, copy_function=_link_or_copy)
    card = directory / "README.md"
    card.unlink(missing_ok=True)  # it may be a link to the run's own file
    card.write_text(_model_card(run, sha256), encoding="utf-8")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _pairs_card(run: _Run, columns: Sequence[str], num_rows: int, sha256: str) -> str:
    """The data-set card: YAML front matter as the Hub and `datasets` read it, and how the pairs were made."""
    report = build(run.directory)
    front = {
        "pretty_name": f"Preference pairs of {run.name}",
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", "reasoning", "pns", PAPER.lower()],
        "size_categories": [next((name for limit, name in _SIZES.items() if num_rows < limit), "n>10M")],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "train.parquet"}]}],
    }
    parts = [_front_matter(front), f"# Preference pairs of {run.name}"]
    parts.append(
        f"{num_rows} pairs in the standard preference format; `train.parquet` and `train.jsonl` hold the same rows. SHA-256 of the data "
        f"(of `train.jsonl`):\n\n`{sha256}`"
    )
    parts.append(_table(["column", "meaning"], [[f"`{name}`", _COLUMN_MEANINGS[name]] for name in columns]))
    parts.append(
        '```python\nfrom datasets import load_dataset\n\npairs = load_dataset(DIRECTORY, split="train")\n```'
    )
    parts.append("## How they were made")
    if run.external:
        parts.append(
            f"Not by this run: it read them from `{run.external}`, and they are given here as they were there (columns of the standard "
            "format only). Origin, licence and limits are those of that source."
        )
    else:
        parts.append(
            f"By plausible negative samples (PNS, {PAPER}). Chosen: a solution of the RL-trained backbone itself whose final answer a "
            "verifier found correct. Rejected: a solution of a generator trained by reverse RL to look right and end wrong, kept where two "
            "verifiers found its answer wrong."
        )
        parts += _models_used(run, report)
        parts += _stages(report, ("rl", "reward_model", "reverse_rl", "synthesize", "pair"))
        parts += _figures(
            "Quality of the pairs",
            {key: value for key, value in report.get("pairs", {}).items() if key != "counts"},
        )
    trained_on = _trained_on(run)
    if trained_on:
        parts += _figures(
            "Use by the run's preference stage",
            {key: trained_on[key] for key in ("rows", "pairs", "dropped")},
        )
    parts += _recipe(run)
    if not run.external:
        parts += _versions(run.finished("pair"))
        parts += [
            "## Limits of use",
            "The rejected side is wrong on purpose and made to convince: never use it as a demonstration, and label it where it is shown. "
            "A verified side has the right final answer; its derivation was not proved. The problems and their licence are those of the "
            "sources named in the recipe; whether they overlap with a benchmark was not examined.",
        ]
    return "\n\n".join(parts) + "\n"


def _model_card(run: _Run, sha256: str) -> str:
    """The model card: YAML front matter as the Hub reads it, what the model was trained from and on, and its
    scores."""
    report, manifest = build(run.directory), run.finished("preference")
    base = _hub_base(run)
    front: dict[str, Any] = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["preference", "dpo", "reasoning", "pns", PAPER.lower()],
    }
    parts = [_front_matter(front), f"# {run.name}"]
    parts.append(
        f"A reasoning model after preference optimisation, trained with plausible negative samples (PNS, {PAPER})."
    )
    parts += _models_used(run, report)
    trained_on = _trained_on(run)
    parts += [
        "## Data",
        f"Pairs from {f'`{run.external}`' if run.external else 'the run itself'}; SHA-256 of the data: `{sha256}`",
    ]
    if trained_on:
        parts += _figures(None, {key: trained_on[key] for key in ("rows", "pairs", "dropped")})
    parts += _scores(run, report)
    parts += _training(run, manifest)
    parts += _stages(report, tuple(report["stages"]))
    parts += _recipe(run)
    parts += _versions(manifest)
    data = run.config.data
    shapes = {
        "system turn": data.system_prompt,
        "text after the problem": data.instruction,
        "beginning of the answer": data.assistant_prefix,
    }
    shape = [f"; {name}: `{json.dumps(text, ensure_ascii=False)}`" for name, text in shapes.items() if text]
    parts += [
        "## Use",
        f"Prompts go through the chat template beside the weights{''.join(shape)}.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)\n"
        'model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype="auto")\n'
        'messages = [{"role": "user", "content": PROBLEM}]\n'
        'prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=512)[0]))\n```",
        "```python\nfrom vllm import LLM, SamplingParams\n\n"
        'messages = [{"role": "user", "content": PROBLEM}]\n'
        "print(LLM(DIRECTORY).chat(messages, SamplingParams(max_tokens=512))[0].outputs[0].text)\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _hub_base(run: _Run) -> str | None:
    """The backbone's Hub id; None where it was a directory, or made by the run's own warm start."""
    backbone = run.config.models.backbone
    manifests = [run.directory.read_json(path) for path in run.directory.path.glob("*/manifest.json")]
    local = any("models.backbone" in manifest["files"] for manifest in manifests)
    return backbone if HUB_ID.fullmatch(backbone) and not local and not run.config.warm_start.steps else None


def _models_used(run: _Run, report: Mapping[str, Any]) -> list[str]:
    base = (
        f"`{run.config.models.backbone}`"
        if not run.config.warm_start.steps
        else "trained from random weights by the warm start of the run"
    )
    text = f"Backbone: {base}"
    if "rl" in report["stages"]:
        text += f", then RL on verified answers (GRPO, {run.config.rl.steps} steps)"
    return [text + "."]


def _scores(run: _Run, report: Mapping[str, Any]) -> list[str]:
    suites, manifest = report.get("suites"), run.directory.manifest("evaluate")
    if not suites or manifest is None:
        return []
    models = list(dict.fromkeys(name for scores in suites.values() for name in scores))
    rows = [
        [suite, *(_interval(scores.get(name)) for name in models), _sizes(scores)]
        for suite, scores in suites.items()
    ]
    return [
        "## Scores",
        "Accuracy in % with a 95 % interval, over n problems; `start` is the backbone, `rl` the model before and `preference` after "
        "preference optimisation.",
        _table(["suite", *models, "n"], rows),
        *_figures(
            None,
            {key: value for key, value in _settings(manifest, "evaluate.").items() if "generator" not in key},
        ),
    ]


def _interval(score: Mapping[str, float] | None) -> str:
    return (
        f"{100 * score['accuracy']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
        if score
        else "-"
    )


def _sizes(scores: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(str(score["n"]) for score in scores.values()))


def _settings(manifest: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The keys of a section a stage was made with, but those that were left empty."""
    return {
        key: value
        for key, value in manifest["config"].items()
        if key.startswith(section) and value not in (None, "")
    }


def _training(run: _Run, manifest: Mapping[str, Any]) -> list[str]:
    """Hyper-parameters of the preference stage, and its metrics at its first and its last step."""
    parts = ["## Training", *_figures(None, _settings(manifest, "preference."))]
    metrics = run.directory.path / "metrics.jsonl"
    steps = [row for row in read_jsonl(metrics) if row["stage"] == "preference"] if metrics.is_file() else []
    if steps:
        first, last = steps[0]["values"], steps[-1]["values"]
        rows = [[name, *(_number(values.get(name)) for values in (first, last))] for name in last]
        parts.append(
            _table(["metric", f"step {steps[0]['step'] + 1}", f"step {steps[-1]['step'] + 1}"], rows)
        )
    return parts


def _stages(report: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Time and counts (samples, drops by cause) of the finished stages among `names`."""
    rows = []
    for name, stage in report["stages"].items():
        if name in names:
            counts = ", ".join(f"{key} {count}" for key, count in stage["counts"].items())
            rows.append([name, f"{stage['seconds']:.0f}", counts])
    return ["## Stages", _table(["stage", "seconds", "counts"], rows)] if rows else []


def _recipe(run: _Run) -> list[str]:
    """Every key that differs from the schema's default, as a recipe `pns run` takes."""
    changed = _changed(to_dict(run.config), to_dict(Config(runs=run.config.runs)))
    text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True, width=120)
    return ["## Recipe", "Every key that differs from its default:", f"```yaml\n{text}```"]


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            value = _changed(value, default)
            if value:
                found[key] = value
        elif value != default:
            found[key] = value
    return found


def _versions(manifest: Mapping[str, Any]) -> list[str]:
    found = {name: version for name, version in manifest["versions"].items() if version is not None}
    return ["## Versions", ", ".join(f"{name} {version}" for name, version in found.items())]


def _figures(title: str | None, values: Mapping[str, Any]) -> list[str]:
    """A table of named figures; nested ones have dotted names. Nothing where there are none."""
    rows = [[key, _number(value)] for key, value in _leaves("", values)]
    if not rows:
        return []
    return [*([f"## {title}"] if title else []), _table(["figure", "value"], rows)]


def _leaves(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _leaves(f"{prefix}{key}.", value) if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _front_matter(values: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---"
