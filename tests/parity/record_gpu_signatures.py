"""Record the signatures of the GPU environment's functions that this project calls, in
`../cases/gpu_signatures.json`.

    python tests/parity/record_gpu_signatures.py            # downloads 0.8 GB, installs nothing
    python tests/parity/record_gpu_signatures.py --wheels DIR   # of wheels that are there already

What is called is found in the sources of `pns` and `workers`, and what it takes in the sources of the wheels,
with `ast`: nothing is imported, so neither a GPU nor CUDA is needed. A name that a wheel does not have is an
error. `tests/workers/test_gpu_contract.py` binds every call to what is recorded.

Libraries whose version is the same in both environments (Ray, tensordict, PEFT) run in the other tests.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "cases" / "gpu_signatures.json"
VERSIONS = {
    "flash-attn": "2.8.3",
    "torch": "2.11.0",
    "transformers": "5.9.0",
    "verl": "0.9.1",
    "vllm": "0.24.0",
}
# Of torch the modules whose signatures move; the rest is in C++ or has been stable for years.
FOREIGN = ("flash_attn", "torch.distributed.checkpoint", "torch.nn.attention", "transformers", "verl", "vllm")

_TRAINER = "verl.workers.engine_workers.TrainingWorker"
_ENGINE = "verl.workers.engine.fsdp.transformer_impl.FSDPEngineWithLMHead"
_LLM_ENGINE = "vllm.v1.engine.llm_engine.LLMEngine"
# Objects that a foreign library made: file -> expression -> class.
OBJECTS = {
    "workers/rollout/engine_vllm.py": {
        "engine": _LLM_ENGINE,
        "self.engine": _LLM_ENGINE,
        "self.engine.engine_core": "vllm.v1.engine.core_client.EngineCoreClient",
        "engine.model_config": "vllm.config.ModelConfig",
        "runner": "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
        "runner.model_config": "vllm.config.ModelConfig",
        "worker": "vllm.v1.worker.worker_base.WorkerBase",
        "head.quant_method": "vllm.model_executor.layers.quantization.base_config.QuantizeMethodBase",
        "output": "vllm.outputs.RequestOutput",
        "completion": "vllm.outputs.CompletionOutput",
        "entry[token]": "vllm.logprobs.Logprob",
        "params": "vllm.sampling_params.SamplingParams",
    },
    "workers/rewards/vllm_grades.py": {
        "engine": _LLM_ENGINE,
        "self.engine": _LLM_ENGINE,
        "self.engine.model_config": "vllm.config.ModelConfig",
        "request": "vllm.outputs.RequestOutput",
        "request.outputs[0]": "vllm.outputs.CompletionOutput",
        "own": "vllm.logprobs.Logprob",
    },
    "workers/training/policy.py": {
        "resources": "verl.single_controller.ray.RayResourcePool",
        "rank_class": "verl.single_controller.ray.RayClassWithInitArgs",
    },
    "workers/training/rank.py": {
        "training_worker": _TRAINER,
        "self.training": _TRAINER,
        "model": _TRAINER,
        "model.engine": _ENGINE,
        "self.training.engine": _ENGINE,
        "self.training.model_config": "verl.workers.config.HFModelConfig",
        "engine": _ENGINE,
    },
    "workers/training/state_files.py": {
        "engine": _ENGINE,
        "engine.checkpoint_manager": "verl.utils.checkpoint.fsdp_checkpoint_manager.FSDPCheckpointManager",
    },
    "workers/training/verl_engine.py": {
        "self.engine_config": "verl.workers.config.FSDPEngineConfig",
        "self.model_config": "verl.workers.config.HFModelConfig",
    },
}
# Models that are called: file -> expression -> what is called, of one of the architectures.
_CAUSAL = "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM.forward"
CALLED = {
    "workers/rollout/engine_transformers.py": {"self.model": _CAUSAL},
    "workers/rewards/verdict_model.py": {"self._model": _CAUSAL},
    "workers/rewards/reward_model.py": {
        "self._body": "transformers.models.qwen2.modeling_qwen2.Qwen2Model.forward"
    },
}
# Methods of our subclasses that override nothing.
OURS = {f"{_ENGINE}._compile_elementwise"}
# Classes whose subclasses here are made here: their constructors are ours.
MADE_HERE = ("transformers.cache_utils.DynamicLayer", "verl.single_controller.base.Worker")
# A dictionary of requests that has the name of one of the objects.
NOT_OBJECTS = {"params.items", "params.get"}
# What takes its keywords out of `**kwargs`, with the functions that it hands them on to. Others hand them to
# what cannot be known here.
_FROM_PRETRAINED = ("transformers.modeling_utils.PreTrainedModel.from_pretrained",)
CLOSED: dict[str, tuple[str, ...]] = {
    "transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained": _FROM_PRETRAINED,
    "transformers.models.auto.modeling_auto.AutoModelForCausalLM.from_pretrained": _FROM_PRETRAINED,
    "transformers.models.auto.configuration_auto.AutoConfig.from_pretrained": (),
    "transformers.models.auto.tokenization_auto.AutoTokenizer.from_pretrained": (),
    "transformers.utils.hub.cached_file": ("transformers.utils.hub.cached_files",),
    "verl.single_controller.ray.base.RayWorkerGroup": (),
}
# Whose calls of an attention function `packed_attention` has to answer.
ATTENTION_CALLERS = tuple(
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}Attention.forward"
    for name in ("Qwen2", "Qwen3", "Llama")
)

Keywords = frozenset[str]


@dataclass(frozen=True)
class Use:
    """A place where a foreign name is called, read or overridden. `alternatives` are the (number of
    positional arguments, keywords) that the call may have; None: it is no call. `optional` keywords are those
    of a dictionary that grows on a condition."""

    path: str
    line: int
    name: str
    alternatives: tuple[tuple[int, Keywords], ...] | None = None
    optional: Keywords = frozenset()
    override: Signature | None = None


# Our side: what is used.


class Reader(ast.NodeVisitor):
    """The uses of one of our files."""

    def __init__(self, path: str, source: str | None = None) -> None:
        self.path = path
        self.tree = ast.parse(source or (ROOT / path).read_text(encoding="utf-8"))
        self.uses: list[Use] = []
        self._names = dict(_imports(self.tree))
        self._objects = OBJECTS.get(path, {})
        self._scopes: list[ast.AST] = [self.tree]
        self.visit(self.tree)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [self._names[ast.unparse(base)] for base in node.bases if ast.unparse(base) in self._names]
        foreign = [base for base in bases if base.startswith(FOREIGN)]
        if foreign:
            own = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            own |= {target.attr for target in _self_targets(node)}
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef) and part in node.body:
                    if part.name == "__init__" and foreign[0] in MADE_HERE:
                        continue
                    override = _signature(part, is_method=not _is_static(part))
                    self.uses.append(
                        Use(self.path, part.lineno, f"{foreign[0]}.{part.name}", None, override=override)
                    )
                elif isinstance(part, ast.Attribute):
                    above = ast.unparse(part.value)
                    if above == "super()" or (above == "self" and part.attr not in own):
                        self._use(f"{foreign[0]}.{part.attr}", part, _parent(node, part))
        self._enter(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._enter(node)

    def _enter(self, node: ast.AST) -> None:
        self._scopes.append(node)
        self.generic_visit(node)
        self._scopes.pop()

    def visit_Call(self, node: ast.Call) -> None:
        called = CALLED.get(self.path, {}).get(ast.unparse(node.func))
        if name := called or self._foreign(node.func):
            self._use(name, node.func, node)
            for part in [*node.args, *node.keywords]:
                self.visit(part)
            if isinstance(node.func, ast.Attribute):
                self.visit(node.func.value)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self._foreign(node):
            self._use(name, node, None)
        self.visit(node.value)

    def visit_Name(self, node: ast.Name) -> None:
        name = self._names.get(node.id, "")
        if name.startswith(FOREIGN):
            self._use(name, node, None)

    def _foreign(self, node: ast.expr) -> str | None:
        """The dotted foreign name of an expression, if it is one."""
        if isinstance(node, ast.Name):
            name = self._names.get(node.id, "")
            return name if name.startswith(FOREIGN) else None
        if isinstance(node, ast.Attribute):
            if ast.unparse(node) in NOT_OBJECTS:
                return None
            if owner := self._objects.get(ast.unparse(node.value)):
                return f"{owner}.{node.attr}"
            above = self._foreign(node.value) if isinstance(node.value, ast.Name | ast.Attribute) else None
            # Of an object's attribute the class is not known, unless OBJECTS says it.
            in_imports = above and ast.unparse(node.value).split(".")[0] in self._names
            return f"{above}.{node.attr}" if in_imports else None
        return None

    def _use(self, name: str, node: ast.expr, parent: ast.AST | None) -> None:
        alternatives, optional = None, frozenset[str]()
        if isinstance(parent, ast.Call) and parent.func is node:
            alternatives, optional = self._arguments(parent)
        self.uses.append(Use(self.path, node.lineno, name, alternatives, optional))

    def _arguments(self, call: ast.Call) -> tuple[tuple[tuple[int, Keywords], ...], Keywords]:
        count, optional = 0, frozenset[str]()
        keyword_sets: list[Keywords] = [frozenset()]
        for argument in call.args:
            if isinstance(argument, ast.Starred):
                [value] = self._values(argument.value)
                assert isinstance(value, ast.Tuple), f"{self.path}:{call.lineno}: unknown number of arguments"
                count += len(value.elts)
            else:
                count += 1
        for keyword in call.keywords:
            if keyword.arg is not None:
                keyword_sets = [names | {keyword.arg} for names in keyword_sets]
                continue
            choices, grown = self._dictionaries(keyword.value)
            keyword_sets = [names | choice for names in keyword_sets for choice in choices]
            optional |= grown
        return tuple((count, names) for names in keyword_sets), optional

    def _dictionaries(self, node: ast.expr) -> tuple[list[Keywords], Keywords]:
        """The keys of the dictionary literals that an expression may be; those that are added later."""
        choices, grown = [], frozenset[str]()
        for value in self._values(node):
            for literal in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
                assert isinstance(literal, ast.Dict), f"{self.path}:{node.lineno}: unknown keywords"
                choices.append(frozenset(key.value for key in literal.keys if isinstance(key, ast.Constant)))
        text = ast.unparse(node)
        for scope in reversed(self._scopes):
            for part in ast.walk(scope):
                if isinstance(part, ast.AugAssign) and ast.unparse(part.target) == text:
                    assert isinstance(part.value, ast.Dict)
                    grown |= {key.value for key in part.value.keys if isinstance(key, ast.Constant)}
        return choices, grown

    def _values(self, node: ast.expr) -> list[ast.expr]:
        """What is assigned to the name `node`, in the innermost scope that assigns it; itself, if none."""
        text = ast.unparse(node)
        for scope in reversed(self._scopes):
            values = []
            for part in ast.walk(scope):
                if isinstance(part, ast.Assign | ast.AnnAssign) and part.value is not None:
                    targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                    if text in map(ast.unparse, targets):
                        values.append(part.value)
            if values:
                return values
        return [node]


def uses() -> list[Use]:
    """Every use in `pns` and `workers`."""
    files = [path for room in ("pns", "workers") for path in sorted((ROOT / room).rglob("*.py"))]
    return [use for file in files for use in Reader(file.relative_to(ROOT).as_posix()).uses]


def names_used() -> dict[str, bool]:
    """Every name that is used, and whether anything calls or overrides it."""
    bound: dict[str, bool] = {}
    for use in uses():
        if use.name not in OURS:
            is_bound = use.alternatives is not None or use.override is not None
            bound[use.name] = bound.get(use.name, False) or is_bound
    return dict(sorted(bound.items()))


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name in the file, dotted name) of every import, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def _self_targets(node: ast.AST) -> Iterator[ast.Attribute]:
    for part in ast.walk(node):
        is_stored = isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
        if is_stored and ast.unparse(part.value) == "self":
            yield part


def _parent(tree: ast.AST, child: ast.AST) -> ast.AST | None:
    return next((node for node in ast.walk(tree) if child in ast.iter_child_nodes(node)), None)


def _is_static(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return "staticmethod" in map(ast.unparse, function.decorator_list)


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> Signature:
    """Names, kinds and whether there is a default (`...`); without self."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    without = len(positional) - len(given.defaults)
    parameters = []
    for i, argument in enumerate(positional):
        only = i < len(given.posonlyargs)
        kind = Parameter.POSITIONAL_ONLY if only else Parameter.POSITIONAL_OR_KEYWORD
        default = Parameter.empty if i < without else ...
        parameters.append(Parameter(argument.arg, kind, default=default))
    if is_method:
        parameters = parameters[1:]
    if given.vararg:
        parameters.append(Parameter(given.vararg.arg, Parameter.VAR_POSITIONAL))
    for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        default = Parameter.empty if value is None else ...
        parameters.append(Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=default))
    if given.kwarg:
        parameters.append(Parameter(given.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


# Their side: what there is.


@dataclass(frozen=True)
class Definition:
    """A class, function or value of a foreign module."""

    module: str
    node: ast.AST | None  # None: a module
    owner: ast.ClassDef | None = None

    @property
    def name(self) -> str:
        parts = [self.module, self.owner.name if self.owner else "", getattr(self.node, "name", "")]
        return ".".join(part for part in parts if part)


@dataclass
class Library:
    """Sources below `roots`: directories, or wheels as `zipfile.Path`."""

    roots: Sequence[Any]
    _trees: dict[str, ast.Module | None] = field(default_factory=dict)

    def tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            self._trees[module] = None
            for root in self.roots:
                for tail in ("/__init__.py", ".py"):
                    file = root.joinpath(module.replace(".", "/") + tail)
                    if file.is_file():
                        self._trees[module] = ast.parse(file.read_text(encoding="utf-8"))
                        return self._trees[module]
        return self._trees[module]

    def has(self, package: str) -> bool:
        return self.tree(package) is not None

    def find(self, name: str) -> Definition | None:
        """The definition of a dotted name, through the imports of packages."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            module = ".".join(parts[:length])
            if self.tree(module) is None:
                continue
            definition: Definition | None = Definition(module, None)
            for part in parts[length:]:
                definition = definition and self._member(definition, part)
            return definition
        return None

    def _member(self, definition: Definition, name: str) -> Definition | None:
        if definition.node is None:
            return self._in_module(definition.module, name, set())
        if isinstance(definition.node, ast.ClassDef):
            return next(self._in_classes(definition, name), None) or self._registered(definition, name)
        if isinstance(definition.node, ast.FunctionDef) and name in ("options", "remote"):  # Ray's
            return Definition(definition.module, ast.Name(name))
        return None

    def _registered(self, definition: Definition, name: str) -> Definition | None:
        """A member of a class that its module adds with `CLASS.register("NAME")`."""
        assert isinstance(definition.node, ast.ClassDef)
        call = f"{definition.node.name}.register('{name}')"
        tree = self.tree(definition.module)
        assert tree is not None
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        added = any(ast.unparse(node) == call for node in calls)
        return Definition(definition.module, ast.Name(name)) if added else None

    def _in_module(self, module: str, name: str, seen: set[str]) -> Definition | None:
        tree = self.tree(module)
        if tree is None or module in seen:
            return None
        seen.add(module)
        stars = []
        for node in _statements(tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return Definition(module, node)
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if name in map(ast.unparse, targets):
                    other = isinstance(node.value, ast.Name) and self.find(f"{module}.{node.value.id}")
                    return other or Definition(module, node)
            if isinstance(node, ast.ImportFrom):
                origin = self._origin(module, node)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(origin)
                    elif (alias.asname or alias.name) == name:
                        return self.find(f"{origin}.{alias.name}")
        found = (self._in_module(origin, name, seen) for origin in stars)
        return next((definition for definition in found if definition), None)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return str(node.module)
        is_package = any(
            root.joinpath(module.replace(".", "/") + "/__init__.py").is_file() for root in self.roots
        )
        parts = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
        return ".".join([*parts, node.module] if node.module else parts)

    def classes(self, definition: Definition) -> Iterator[Definition]:
        """The class and what it inherits, in order."""
        assert isinstance(definition.node, ast.ClassDef)
        yield definition
        for base in definition.node.bases:
            text = ast.unparse(base).split("[")[0]
            above = self._in_module(definition.module, text.split(".")[0], set())
            for part in text.split(".")[1:]:
                above = above and self._member(above, part)
            if above and isinstance(above.node, ast.ClassDef):
                yield from self.classes(above)

    def _in_classes(self, definition: Definition, name: str) -> Iterator[Definition]:
        for owner in self.classes(definition):
            assert isinstance(owner.node, ast.ClassDef)
            for node in _statements(owner.node.body):
                named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
                if named or name in _assigned(node):
                    yield Definition(owner.module, node, owner.node)
            if any(target.attr == name for target in _self_targets(owner.node)):
                yield Definition(owner.module, ast.Name(name), owner.node)

    def record(self, name: str, is_bound: bool = True) -> str:
        """What the tests bind to: "(a, b, *, c=..., **rest) + d, e" of a function or a class's constructor,
        where d and e are taken out of `rest`; "value" of anything else. Raises LookupError."""
        definition = self.find(name)
        if definition is None:
            raise LookupError(f"{name}: it is used here, and the library has none")
        if not is_bound:
            return "value"
        if name.endswith((".options", ".remote")):  # Ray's
            return "(*args, **kwargs)"
        node, is_method = definition.node, definition.owner is not None
        if isinstance(node, ast.ClassDef):
            constructor = next(self._in_classes(definition, "__init__"), None)
            fields = self._fields(definition)
            # A dataclass below a class with a constructor has its own.
            own = constructor is not None and constructor.owner is node
            if fields and not own:
                return _text(Signature(fields))
            if constructor is None:
                return "()"
            node, is_method = constructor.node, True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return "value"
        if any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list):
            return "value"
        signature = _signature(node, is_method and not _is_static(node))
        if definition.name not in CLOSED:
            return _text(signature)
        taken = _taken(node)
        for behind in CLOSED[definition.name]:
            further = self.find(behind)
            assert further is not None
            assert isinstance(further.node, ast.FunctionDef)
            taken |= _taken(further.node) | set(
                _signature(further.node, further.owner is not None).parameters
            )
        return f"{_text(signature)} + {', '.join(sorted(taken))}"

    def _fields(self, definition: Definition) -> list[Parameter]:
        fields: dict[str, Parameter] = {}
        for owner in reversed(list(self.classes(definition))):
            assert isinstance(owner.node, ast.ClassDef)
            for node in owner.node.body:
                if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
                    continue
                if node.value is not None and "init=False" in ast.unparse(node.value):
                    continue
                name = ast.unparse(node.target)
                default = Parameter.empty if node.value is None else ...
                if not name.startswith("_"):
                    fields[name] = Parameter(name, Parameter.KEYWORD_ONLY, default=default)
        return list(fields.values())

    def calls_of_attention(self, name: str) -> tuple[int, list[str]]:
        """Positional arguments and keywords with which a model's layer calls its attention function."""
        definition = self.find(name)
        assert definition is not None
        assert definition.node is not None
        for node in ast.walk(definition.node):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "attention_interface":
                return len(node.args), [keyword.arg for keyword in node.keywords if keyword.arg]
        raise LookupError(name)

    @cached_property
    def packages(self) -> set[str]:
        return {package.split(".")[0] for package in FOREIGN if self.has(package.split(".")[0])}


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Also those in `if`, `try` and `with`."""
    for node in body:
        yield node
        for part in ("body", "orelse", "handlers", "finalbody"):
            below = getattr(node, part, None)
            if below and not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                handlers = [handler.body for handler in below if isinstance(handler, ast.ExceptHandler)]
                for statements in handlers or [below]:
                    yield from _statements(statements)


def _assigned(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        return set(map(ast.unparse, node.targets))
    return {ast.unparse(node.target)} if isinstance(node, ast.AnnAssign) else set()


def _text(signature: Signature) -> str:
    return str(signature).replace("=Ellipsis", "=...")


def _taken(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The names that a function takes out of its `**keywords` by `pop`, `get` or `[...]`."""
    if function.args.kwarg is None:
        return set()
    rest, names = function.args.kwarg.arg, set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (f"{rest}.pop", f"{rest}.get"):
            names |= {part.value for part in node.args[:1] if isinstance(part, ast.Constant)}
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == rest:
            names |= {part.value for part in [node.slice] if isinstance(part, ast.Constant)}
    return {name for name in names if isinstance(name, str)}


def parse(text: str) -> tuple[Signature, set[str]]:
    """The signature and the further keywords of a recorded entry."""
    text, _, further = text.partition(" + ")
    [function] = ast.parse(f"def f{text}: ...").body
    assert isinstance(function, ast.FunctionDef)
    return _signature(function, is_method=False), set(further.split(", ")) - {""}


def _download(wheels: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    there = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", f"--dest={wheels}"]
    there += [f"--platform=manylinux_{version}_x86_64" for version in ("2_35", "2_31", "2_28", "2_17")]
    for package, version in VERSIONS.items():
        pin = f"{package}=={version}"
        if package == "flash-attn":  # source alone, and its setup.py imports torch
            options = ["--no-binary=:all:", "--no-build-isolation", f"--dest={wheels}"]
            environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
            subprocess.run([*pip, *options, pin], check=True, env=environment)
        else:
            subprocess.run([*pip, *there, pin], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="a directory of the wheels and flash-attn's archive")
    given = parser.parse_args().wheels
    with tempfile.TemporaryDirectory() as directory:
        wheels = given or Path(directory, "wheels")
        if given is None:
            _download(wheels)
        roots: list[Any] = [zipfile.Path(wheel) for wheel in sorted(wheels.glob("*.whl"))]
        for archive in sorted(wheels.glob("*.tar.gz")):
            with tarfile.open(archive) as packed:
                packed.extractall(directory, filter="data")
            roots.append(Path(directory, archive.name.removesuffix(".tar.gz")))
        library = Library(roots)
        names = {name: library.record(name, is_bound) for name, is_bound in names_used().items()}
        calls = {name: library.calls_of_attention(name) for name in ATTENTION_CALLERS}
    record = {"versions": VERSIONS, "names": names, "attention_calls": calls}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{RECORD}: {len(names)} names")


if __name__ == "__main__":
    main()
