"""`pns export`: a run's pairs as a data set, and its trained model, each with a card (`templates/`). Every
figure comes from the run's own files; what no stage has written is left out."""

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import jinja2
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pns.config import Config, DataSource, to_dict
from pns.data.benchmarks import TRAINING_SETS
from pns.data.preference import COLUMNS, canonical_line, data_hash, pair_rows, read_pairs, read_rows
from pns.errors import UserError
from pns.fields import walk_keys
from pns.files import PARTIAL, read_json, read_jsonl
from pns.preflight import HUB_ID
from pns.records import leaves
from pns.report.run_report import build_report, interval
from pns.run.page import linked_places
from pns.run.place import Place
from pns.run.tracking import METRICS

PAPER = "arXiv:2602.03516"
# First words of a license's text, and how the Hub spells it.
_LICENSES = {"Apache License": "apache-2.0", "MIT License": "mit"}
_ENGLISH = ("gsm8k_train", "math_train")
# The Hub's names of sizes, each with the first number of rows that is too many for it.
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}


@dataclass(frozen=True)
class _Run:
    """A run with its configuration; `external`: where its pairs come from (for others to read), empty for its
    own pair stage."""

    path: Path
    config: Config
    external: str

    @property
    def name(self) -> str:
        return self.config.name or self.path.resolve().name

    @cached_property
    def shown(self) -> Config:
        """The configuration for others to read: of a local path its last part alone."""
        config = copy.deepcopy(self.config)
        for key in walk_keys(config):
            if key.field.metadata.get("path"):
                setattr(key.section, key.field.name, _last_part(key.value))
        return config

    def finished(self, stage: str) -> dict[str, Any]:
        """The stage's manifest. Raises UserError while it has none."""
        manifest = Place(self.path / stage).manifest()
        if manifest is None:
            way_out = f"run its recipe again, until {stage} at least"
            raise UserError(f"{self.path}: stage {stage} is not finished; {way_out}")
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
    if blocked := next((path for path in out.parents if path.is_file()), None):
        raise UserError(f"{out}: {blocked} is a file, and no directory; choose another")
    run = _open(run_path)
    own = [run_path.resolve(), *linked_places(run_path).values()]
    if any(out.is_relative_to(directory) for directory in own):
        raise UserError(f"{out} is inside the run directory {run_path}; choose a place outside")
    if model:
        run.finished("preference")
    if pairs or not run.external:
        run.finished("preference" if run.external else "pair")
    rows = _rows(run) if pairs or not run.external else []
    sha256 = _trained_on(run)["sha256"] if run.external else data_hash(rows)
    if run.external and rows and data_hash(rows) != sha256:
        source = run.config.preference.data.path or run.external
        fault = f"{source} is not what stage preference of {run_path} has read"
        raise UserError(f"{fault} (data hash {sha256}): restore it")
    partial = out.with_name(f"{PARTIAL}{out.name}")
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
    print(f"{out}: {' and '.join(['pairs'] * pairs + ['model'] * model)}; data hash {sha256}")


def _open(path: Path) -> _Run:
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError(f"{path} is not a run directory (no config.yaml); name one like runs/tiny-qwen2")
    try:
        loaded = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(file))
        config = cast(Config, OmegaConf.to_object(loaded))
    except OmegaConfBaseException as error:
        fault = str(error).splitlines()[0]
        raise UserError(f"{file}: {fault}; export with the version of pns that made the run") from error
    data = config.preference.data
    external = Path(data.path).name or (
        f"{data.hub}, revision {data.revision}, split {data.split}" if data.hub else ""
    )
    return _Run(path, config, external)


def _rows(run: _Run) -> list[dict[str, Any]]:
    """The pairs as rows of the standard format: the run's own, or the external ones as they are given."""
    if run.external:
        return [row for _, row in read_rows(run.config.preference.data)]
    return pair_rows(read_pairs(run.path / "pair" / "pairs.jsonl"), run.config.data)


def _trained_on(run: _Run) -> dict[str, Any]:
    """What the preference stage recorded of its pairs (`LoadedPairs.summary`); empty where it has not run."""
    path = run.path / "preference" / "data.json"
    return read_json(path) if path.is_file() or run.external else {}


def _write_pairs(run: _Run, directory: Path, rows: Sequence[Mapping[str, Any]], sha256: str) -> None:
    import pyarrow
    from pyarrow import parquet

    directory.mkdir()
    lines = [canonical_line(row) for row in rows]
    (directory / "train.jsonl").write_bytes("".join(lines).encode())
    # As JSON gives them back: both files hold the same values.
    written = [json.loads(line) for line in lines]
    columns = [name for name in COLUMNS if any(name in row for row in written)]
    try:
        table = pyarrow.Table.from_pydict({name: [row.get(name) for row in written] for name in columns})
    except pyarrow.ArrowException as error:
        source = run.config.preference.data.path or run.external or run.path
        raise UserError(f"{source}: the rows have no common Parquet type ({error})") from error
    parquet.write_table(table, directory / "train.parquet")

    report = build_report(run.path)
    front = {
        "pretty_name": f"Preference pairs of {run.name}",
        **_data_front(run),
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", *_method_tags(run)],
        "size_categories": [next((name for limit, name in _SIZES.items() if len(rows) < limit), "n>10M")],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "train.parquet"}]}],
    }
    quality = report.get("pairs", {}).items()
    values = {
        "manifest": None if run.external else run.finished("pair"),
        "quality": {name: value for name, value in quality if name != "counts"},
        "columns": [[f"`{name}`", COLUMNS[name]] for name in columns],
        "num_rows": len(rows),
    }
    card = _card("pairs", run, report, sha256, front, values)
    (directory / "README.md").write_text(card, encoding="utf-8")


def _write_model(run: _Run, directory: Path, sha256: str) -> None:
    shutil.copytree(run.path / "preference" / "model", directory, copy_function=_link_or_copy)
    report, manifest = build_report(run.path), run.finished("preference")
    front: dict[str, Any] = {}
    if base_license := _base_license(run.config.models.backbone):
        front = {"license": base_license}
    if HUB_ID.fullmatch(run.config.models.backbone):  # a directory's path is absolute, and no id
        front |= {"base_model": run.config.models.backbone, "base_model_relation": "finetune"}
    if sources := _hub_sources(run):
        front["datasets"] = sources
    if language := _data_front(run).get("language"):
        front["language"] = language
    own_tags = ["dpo"] if run.config.preference.loss == "sigmoid" else []
    tags = ["preference-optimization", *own_tags, *_method_tags(run)]
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    values = {
        "manifest": manifest,
        "scores": _scores(run, report),
        "settings": _settings({"preference": _shown_settings(run, manifest["settings"]["preference"])}),
        **_first_and_last_metrics(run.path / "preference" / METRICS),
    }
    readme = directory / "README.md"
    readme.unlink(missing_ok=True)  # it may be a link to the run's own file
    readme.write_text(_card("model", run, report, sha256, front, values), encoding="utf-8")


def _last_part(value: Any) -> Any:
    """Of a local path, or of those of a dict, the last part; a name stays."""
    if isinstance(value, dict):
        return {name: _last_part(entry) for name, entry in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _shown_settings(run: _Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the preference stage, with its path as `shown` has it."""
    shown = copy.deepcopy(dict(settings))
    if "path" in shown.get("data", {}):
        shown["data"]["path"] = _last_part(shown["data"]["path"])
    return shown


def _method_tags(run: _Run) -> list[str]:
    """What is true of the run's pairs: those from elsewhere have nothing of the paper's."""
    if run.external:
        return []
    negatives = run.config.negatives
    of_paper = "pns" in (run.config.mixture.sources if negatives == "mixed" else [negatives])
    return ["reasoning", *(["pns", PAPER.lower()] if of_paper else [])]


def _named_sets(run: _Run) -> list[str]:
    """Names of the sets, or files, that the problems of the run's pairs and RL come from."""
    if run.external or run.config.data.source is DataSource.tiny:
        return []
    jsonl = run.config.data.jsonl
    return list(dict.fromkeys(name for name in (jsonl.train, jsonl.reward, jsonl.preference) if name))


def _problems(run: _Run) -> str:
    """A clause on the problems of the run's own pairs, with what is known of their license."""
    if run.config.data.source is DataSource.tiny:
        return "word problems of PNS's tiny world, made by a program"
    said = []
    for name in _named_sets(run):
        known = TRAINING_SETS.get(name)
        if known is None:
            said.append(f"`{_last_part(name)}` (a file of the run's; its license is not known here)")
        else:
            where = f", `{known.hub.repository}`" if known.hub else ""
            said.append(f"`{name}`{where} (license: {known.license or 'not known here'})")
    return ", ".join(said)


def _hub_sources(run: _Run) -> list[str]:
    """Hub data sets that the run has trained on."""
    if run.external:
        return [run.config.preference.data.hub] if run.config.preference.data.hub else []
    known = [TRAINING_SETS[name].hub for name in _named_sets(run) if name in TRAINING_SETS]
    return list(dict.fromkeys(hub.repository for hub in known if hub))


def _data_front(run: _Run) -> dict[str, Any]:
    """`license` and `language` of the pairs: left out unless those of all problems are known."""
    if run.external:
        return {}
    if run.config.data.source is DataSource.tiny:
        return {"language": ["en"]}
    names = _named_sets(run)
    if any(name not in TRAINING_SETS for name in names):
        return {}
    front: dict[str, Any] = {}
    licenses = {TRAINING_SETS[name].license for name in names} | {_base_license(run.config.models.backbone)}
    if len(licenses) == 1 and "" not in licenses:  # of the problems and of the model whose solutions they are
        front["license"] = licenses.pop()
    if names and all(name in _ENGLISH for name in names):
        front["language"] = ["en"]
    return front


def _base_license(backbone: str) -> str:
    """The license that a model directory's own card or LICENSE names, as the Hub spells it; else empty."""
    directory = Path(backbone)
    card, text = directory / "README.md", directory / "LICENSE"
    if card.is_file():
        parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
        if len(parts) == 3 and not parts[0].strip():
            try:
                front = yaml.safe_load(parts[1])
            except yaml.YAMLError:
                front = None
            if isinstance(front, dict) and isinstance(front.get("license"), str):
                return str(front["license"])
    if text.is_file():
        head = text.read_text(encoding="utf-8", errors="replace")[:200]
        return next((name for words, name in _LICENSES.items() if words in head), "")
    return ""


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _card(
    kind: str,
    run: _Run,
    report: Mapping[str, Any],
    sha256: str,
    front: Mapping[str, Any],
    values: Mapping[str, Any],
) -> str:
    """The card `templates/<kind>.md.jinja`: `front` is the YAML that the Hub and `datasets` read."""
    # Strict: a card with a hole in it would be published.
    loader, strict = jinja2.PackageLoader("pns.commands"), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, undefined=strict, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": _cell, "leaves": leaves, "yaml": _yaml, "json": _json}
    trained_on = _trained_on(run)
    return environment.get_template(f"{kind}.md.jinja").render(
        paper=PAPER,
        name=run.name,
        config=run.shown,
        problems=_problems(run),
        base_license=_base_license(run.config.models.backbone),
        external=run.external,
        report=report,
        sha256=sha256,
        front=front,
        trained_on={key: trained_on[key] for key in ("rows", "pairs", "dropped")} if trained_on else {},
        changed=_changed(to_dict(run.shown), to_dict(Config(runs=run.shown.runs))),
        **values,
    )


def _scores(run: _Run, report: Mapping[str, Any]) -> dict[str, Any]:
    """The table of accuracies, a row a suite, and how it was evaluated; nothing where it was not."""
    suites, manifest = report.get("suites"), Place(run.path / "evaluate").manifest()
    if not suites or manifest is None:
        return {}
    models = list(dict.fromkeys(model for scores in suites.values() for model in scores))
    rows = []
    for suite, scores in suites.items():
        sizes = dict.fromkeys(str(score["n"]) for score in scores.values())
        rows.append([suite, *(interval(scores.get(model)) for model in models), ", ".join(sizes)])
    settings = _settings({"evaluate": to_dict(run.config)["evaluate"]})
    asked = {key: value for key, value in settings.items() if "generator" not in key}
    return {"head": ["suite", *models, "n"], "rows": rows, "settings": asked}


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of nested settings, but those that were left empty."""
    return {key: value for key, value in leaves(values).items() if value not in (None, "")}


def _first_and_last_metrics(path: Path) -> dict[str, Any]:
    """The preference stage's `steps`, and a row [name, first value, last value] for each of its `metrics`."""
    steps = read_jsonl(path) if path.is_file() else []
    if not steps:
        return {"steps": [], "metrics": []}
    first, last = steps[0]["values"], steps[-1]["values"]
    return {"steps": steps, "metrics": [[name, first.get(name), last[name]] for name in last]}


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that differ from their defaults, as a recipe that `pns run` takes."""
    changed: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            value, default = _changed(value, default), {}
        if value != default:
            changed[key] = value
    return changed


def _cell(value: Any) -> str:
    """A value in a Markdown table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
