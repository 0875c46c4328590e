"""What can be wrong with the inputs of a run, found in a second and before anything heavy is imported."""

import os
import re
import socket
import tempfile
from collections.abc import Collection
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

import yaml

from pns.config import (
    Config,
    DataSource,
    Device,
    GeneratorStart,
    PromptFamily,
    TermKind,
    Thinking,
    TrackingBackend,
    external_pairs,
    services,
    step_services,
    to_dict,
)
from pns.data.benchmarks import BENCHMARKS, TRAINING_SETS, decodings
from pns.data.preference import check_rows
from pns.data.problems import TRAINING, load_named, read_problems, read_training_problems
from pns.data.prompts import apply_family, read_examples
from pns.errors import UserError, did_you_mean
from pns.model_files import HEADS, ModelDirectory
from pns.planning.shapes import cached_config
from pns.planning.work import work_of
from pns.run.page import linked_places
from pns.run.place import STORE, Place, lock_holder
from pns.tiny.world import SUITES
from workers.placement import bundles

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SECONDS = 5.0  # for the Hub to answer
RAY_SECONDS = 10.0  # for the head of a cluster to answer
_MOST_SHARE = 8  # a process's threads by the machine's cores: recipes for servers are tried on laptops
_LEAST_GB = 0.3  # of memory that a process with torch takes, whatever it does
_PACKAGES = {TrackingBackend.tensorboard: "tensorboard", TrackingBackend.wandb: "wandb"} | {
    TrackingBackend.mlflow: "mlflow",
    TrackingBackend.trackio: "trackio",
}


class ModelKind(StrEnum):
    """What a model is asked for: text, a score, or to begin training from."""

    language_model = "language_model"
    scorer = "scorer"
    start = "start"


def check_inputs(config: Config, stages: Collection[str]) -> None:
    """Models, prompts, problems, pairs, metric backends and the directory of runs, as far as they are here:
    no network is asked. Raises UserError for the first fault."""
    check_runs(config)
    check_tracking(config)
    check_models(config, stages)
    check_backbone(config)
    check_policy(config)
    check_problems(config)
    if external_pairs(config) and "preference" in stages and config.preference.data.path:
        check_rows(config.preference.data)


def check_start(config: Config, stages: Collection[str], first: str | None = None) -> None:
    """What is needed beside `check_inputs` to start here and now. Raises UserError."""
    page = Path(config.runs) / config.name
    if first and not any(re.fullmatch(f"{first}(_.*)?", name) for name in page_links(page)):
        raise UserError(f"--from {first}: {page} has made no {first} yet: leave --from out")
    if holder := lock_holder(page / "lock"):
        way_out = "wait for it to end, or choose another run with name=NAME"
        raise UserError(f"{page} is in use by {holder}: {way_out}")
    if not first:
        check_finished(config, page)
    if address := os.environ.get("RAY_ADDRESS"):
        check_address(address)
    else:
        check_machine(config, stages)
    for key, (value, _) in named_models(config, stages).items():
        if not Path(value).exists():
            check_hub(key, value)


def check_finished(config: Config, page: Path) -> None:
    """What the finished stages wrote is there and as it was, where the page was made with this configuration
    (of another the run may use other stages). Raises UserError."""
    if not (page / "config.yaml").is_file():
        return
    kept = yaml.safe_load((page / "config.yaml").read_text(encoding="utf-8"))
    said = to_dict(config)
    if config.data.prompt is PromptFamily.auto:  # the page has the family that it came to
        said["data"]["prompt"] = kept["data"]["prompt"]
    if said != kept:
        return
    for name, directory in page_links(page).items():
        place = Place(directory)
        if manifest := place.manifest():
            place.check_outputs(manifest, f"make it again with --from {name}")


def page_links(page: Path) -> dict[str, Path]:
    return linked_places(page) if page.is_dir() else {}


def named_models(config: Config, stages: Collection[str]) -> dict[str, tuple[str, ModelKind]]:
    """Key -> model that `stages` use, and what for."""
    named = {"models.backbone": (config.models.backbone, ModelKind.language_model)}
    if "reward_model" in stages and config.models.reward_model:
        named["models.reward_model"] = config.models.reward_model, ModelKind.start
    if "reverse_rl" in stages:
        for name, term in config.reward.terms.items():
            if term.weight > 0 and term.model and not term.endpoint.url:
                judges = term.kind is TermKind.judge
                kind = ModelKind.language_model if judges else ModelKind.scorer
                named[f"reward.terms.{name}.model"] = term.model, kind
        if GeneratorStart.path in (config.reverse_rl.start, *config.mixture.starts):
            named["models.generator"] = config.models.generator, ModelKind.language_model
    if "label_steps" in stages:
        for name in step_services(config):
            service = services(config)[name]
            if not service.url:
                kind = ModelKind.language_model if service.judges else ModelKind.scorer
                named[f"{service.key}.model"] = service.model, kind
    return named


def check_models(config: Config, stages: Collection[str]) -> None:
    """Every model that `stages` use is a whole, sound checkpoint with a tokenizer, or a Hub id.

    Raises UserError.
    """
    for key, (value, kind) in named_models(config, stages).items():
        check_model(key, value, kind)
        judges = kind is ModelKind.language_model and key not in ("models.backbone", "models.generator")
        if judges and Path(value).is_dir():
            check_judge(key, Path(value))


def check_model(key: str, value: str, kind: ModelKind = ModelKind.language_model) -> None:
    """One model directory or Hub id, named by the configuration's `key`. Raises UserError."""
    path = Path(value)
    if not value:
        raise UserError(f"{key} is empty: name a model directory or a Hub id")
    if not path.exists():
        # In a directory that is there, `models/absnt` is a path with a slip, not a Hub id.
        if HUB_ID.fullmatch(value) and not path.parent.is_dir():
            return
        raise UserError(f"{key}: {value} is neither a directory that exists nor a Hub id (owner/name)")
    model = ModelDirectory(key, path)
    model.check_architecture(kind is ModelKind.language_model)
    model.check_weights(kind is ModelKind.language_model)
    if kind is ModelKind.scorer and not any(name.startswith(HEADS[1:]) for name in model.tensors):
        heads = ", ".join(head.rstrip(".") for head in HEADS[1:])
        raise model.fault(f"has no reward head ({heads})", "name a reward model, not a language model")
    model.check_vocabulary()


def check_judge(key: str, path: Path) -> None:
    """The judge has a chat template, and it takes a question."""
    judge = ModelDirectory(key, path)
    if judge.chat_template is None:
        raise judge.fault("has no chat template", "name an instruction-tuned model")
    judge.render([{"role": "user", "content": "A question."}])


def check_backbone(config: Config) -> None:
    """Chat template and prompt keys of a backbone that is a directory. Raises UserError."""
    backbone = ModelDirectory("models.backbone", Path(config.models.backbone))
    if not backbone.path.is_dir():
        return
    data = replace(config.data)
    family = apply_family(data, backbone.chat_template)
    if data.chat_template:
        if backbone.chat_template is None:
            way_out = "of a base model set data.prompt=base, else add its chat_template.jinja"
            raise backbone.fault("has no chat template", way_out)
        messages = [{"role": "user", "content": "A problem."}]
        values = {}
        if data.thinking is not Thinking.auto:
            values["enable_thinking"] = data.thinking is Thinking.on
        backbone.render(messages, **values)
        if data.system_prompt:
            try:
                backbone.render([{"role": "system", "content": data.system_prompt}, *messages], **values)
            except UserError as error:
                said = f"data.prompt={family}" if family is not PromptFamily.none else "data.system_prompt"
                way_out = "put the instruction into data.instruction, with data.prompt=none"
                raise UserError(f"{said}: the chat template takes no system turn: {way_out}") from error
    if data.thinking is not Thinking.auto and "enable_thinking" not in (backbone.chat_template or ""):
        fault = f"{data.thinking}, and the model's chat template names no enable_thinking"
        raise UserError(f"data.thinking: {fault}: leave it auto")


def check_policy(config: Config) -> None:
    """A backbone that is a directory has room for completions, and what the adapters are for: every target is
    the end of a linear layer's name. Raises UserError."""
    backbone = ModelDirectory("models.backbone", Path(config.models.backbone))
    if not backbone.path.is_dir():
        return
    longest, context = config.rollout.max_new_tokens, backbone.context
    if context and longest >= context:
        fault = f"{longest} tokens, and the context of {backbone.path} is {context}, prompt and all"
        raise UserError(f"rollout.max_new_tokens: {fault}: lower it")
    lora = config.policy.lora
    if not lora.rank:
        return
    layers = backbone.linear_layers()
    for target in lora.targets:
        if target != "all-linear" and not any(f".{name}".endswith(f".{target}") for name in layers):
            ends = sorted({name.rpartition(".")[2] for name in layers})
            fault = f"{target!r} is no linear layer of {backbone.path}"
            raise UserError(f"policy.lora.targets: {fault}: there are {', '.join(ends)}, or all-linear")


def check_problems(config: Config, training: bool = True) -> None:
    """Files are read line by line, and sets looked up by their names and below data.root; the Hub is not
    asked. Raises UserError."""
    data = config.data
    read_examples(data)
    if data.source is DataSource.tiny:
        decodings(config, SUITES)
        return
    if data.root and not Path(data.root).is_dir():
        raise UserError(
            f"data.root: {data.root} is no directory: name one with [benchmarks/]NAME.jsonl in it"
        )
    for name in data.benchmarks:
        check_set("data.benchmarks", name, config, in_training=False)
    for suite, path in data.jsonl.suites.items():
        read_problems(Path(path), suite, data.jsonl.limit, data.jsonl.fields)
    if unknown := [name for name in data.revisions if name not in (*BENCHMARKS, *TRAINING_SETS)]:
        hint = (
            did_you_mean(unknown[0], (*BENCHMARKS, *TRAINING_SETS)) or f"; there are {', '.join(BENCHMARKS)}"
        )
        raise UserError(f"data.revisions.{unknown[0]}: no set of that name{hint}")
    names = (*data.benchmarks, *data.jsonl.suites)
    if not config.evaluate.from_generation_config:
        decodings(config, names)
    if not training or external_pairs(config):
        return
    own = {part: getattr(data.jsonl, part) for part in TRAINING}
    for part, name in own.items():
        if name and Path(name).is_file():
            read_training_problems(Path(name), part, data)
        elif name:
            check_set(f"data.jsonl.{part}", name, config, in_training=True)


def check_set(key: str, name: str, config: Config, in_training: bool) -> None:
    """A set that `key` names is known, and whole where it is below data.root. Raises UserError."""
    table = TRAINING_SETS if in_training else BENCHMARKS
    if name not in table:
        hint = did_you_mean(name, table) or f"; there are {', '.join(table)}"
        own = "a file nor a training set" if in_training else "a benchmark (own files: data.jsonl.suites)"
        raise UserError(f"{key}: {name!r} is {'neither' if in_training else 'not'} {own}{hint}")
    if config.data.root:
        load_named(name, config.data, table)
    elif table[name].hub is None:
        way_out = f"name a directory that has {name}.jsonl with data.root=DIR"
        raise UserError(f"{key}: {name}: no Hub copy of it is known; {way_out}")


def check_tracking(config: Config) -> None:
    for backend in config.tracking.backends:
        package = _PACKAGES.get(backend)
        if package and find_spec(package) is None:
            way_out = f"pip install {package}, or remove it"
            raise UserError(f"tracking.backends: {package} is not installed: {way_out}")


def check_runs(config: Config) -> None:
    """The run's directory can be made and written. Nothing is left there. Raises UserError."""
    runs = Path(config.runs)
    page = runs / config.name
    for directory in (page, runs / STORE):
        there = next(path for path in (directory, *directory.parents) if path.exists() or path.is_symlink())
        if not there.is_dir():
            way_out = "move it away, or choose another place with runs=DIR or name=NAME"
            raise UserError(f"runs: {there} is a file, where a directory of the run has to be: {way_out}")
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            way_out = "choose a directory that can be written with runs=DIR"
            raise UserError(f"runs: {there} cannot be written ({error.strerror}): {way_out}") from error


def check_machine(config: Config, stages: Collection[str]) -> None:
    """This machine alone has the cores and the memory for the processes of the roles, however little they do.
    Raises UserError."""
    work = work_of(config)
    used = {role for stage in work if stage in stages for role in work[stage].roles}
    device = "cpu" if config.placement.device is Device.cpu else "cuda"
    asked, cores = bundles(config, used, device), len(os.sched_getaffinity(0))
    for b in asked:
        if b.amounts["CPU"] > _MOST_SHARE * cores:
            fault = f"{b.amounts['CPU']:g} cores for a process, and this machine has {cores}"
            raise UserError(f"{b.key}.cpus: {fault}: lower it, or name a cluster with RAY_ADDRESS")
    num = sum(b.replicas for b in asked)
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if num * _LEAST_GB > memory_gb:
        largest = max(asked, key=lambda b: b.replicas)
        fault = (
            f"{num} processes take more than {num * _LEAST_GB:.0f} GB, and this machine has {memory_gb:.0f}"
        )
        raise UserError(f"{largest.key}.replicas: {fault}: lower it, or name a cluster with RAY_ADDRESS")


def check_address(address: str, seconds: float = RAY_SECONDS, name: str = "RAY_ADDRESS") -> None:
    """A head that the variable `name` names by host and port answers within `seconds`. Raises UserError."""
    if address in ("auto", "local"):
        return
    found = re.fullmatch(r"(?:ray://)?([\w.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", address)
    if not found or int(found[2]) > 65535:
        way_out = "set it to HOST:PORT of the cluster's head, or unset it to start Ray here"
        raise UserError(f"{name}: {address!r} is no address: {way_out}")
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), seconds).close()
    except OSError as error:
        way_out = f"start the cluster, or unset {name} to start Ray here"
        raise UserError(f"{name}: {address} does not answer ({error}): {way_out}") from error


def check_hub(key: str, name: str) -> None:
    """The Hub can be asked for a model that it has not given yet. Raises UserError."""
    if cached_config(name) is not None:
        return
    way_out = "download it where there is network, and name its directory"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise UserError(f"{key}: {name} is not in the Hub's cache, and HF_HUB_OFFLINE is set: {way_out}")
    if any(os.environ.get(proxy) for proxy in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return  # it answers for the Hub
    endpoint = re.match(
        r"(https?)://([^/:]+)(?::(\d+))?", os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    )
    if not endpoint:
        raise UserError(f"HF_ENDPOINT: {os.environ['HF_ENDPOINT']!r} is no URL: unset it, or mend it")
    port = int(endpoint[3] or (443 if endpoint[1] == "https" else 80))
    try:
        socket.create_connection((endpoint[2], port), HUB_SECONDS).close()
    except OSError as error:
        fault = f"{name} is no directory here, and {endpoint[2]} does not answer ({error})"
        raise UserError(f"{key}: {fault}: {way_out}") from error
