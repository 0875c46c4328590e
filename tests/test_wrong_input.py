"""Wrong input: exit code 2 and one line that says what, where and the way out; nothing is written or lost. All in
one process, where `pns.driver`, which imports what is heavy, cannot be imported; some in fresh ones."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pns
from pns import cli
from pns.preference_losses import PREFERENCE_LOSSES

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "tiny"
HEAVY = ("torch", "ray", "verl", "vllm", "transformers")
Edit = Callable[[Path], object]
GOOD = '{"problem": "1+1?", "answer": "2"}\n'
PAIR = {"prompt": "1 + 1 ?", "chosen": "2", "rejected": "3"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory. It is on this file system alone: models are links, and copies where they change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pns.driver", None)
    monkeypatch.delattr(pns, "driver", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def listing(directory: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()}


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command, which fails, says: one line; nothing is written."""
    before = listing(Path.cwd())
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse, after its usage
        code = error.code
        message = capsys.readouterr().err.splitlines()[-1]
    else:
        printed = capsys.readouterr()
        message = printed.err.rstrip("\n")
        assert code == 2, printed.out
        assert printed.out == ""
    assert code == 2
    assert "\n" not in message
    assert message.startswith("pns")
    assert listing(Path.cwd()) == before
    return message


def check(message: str, words: str) -> None:
    """`words` are parts of the message, with ... between them, in order."""
    begin = 0
    for part in words.split(" ... "):
        begin = message.find(part, begin)
        assert begin >= 0, f"{part!r} is not in {message!r}"


# Content of a recipe -> what is said of it.
RECIPES: list[tuple[bytes, str]] = [
    (b"", "r.yaml is empty ... keys and values"),
    (b"hello", "r.yaml is the str 'hello' ... keys and values"),
    (b"3", "r.yaml is the int '3' ... keys and values"),
    (b"- a\n- b\n", "r.yaml is a list ... keys and values"),
    (b"name: \xe9\n", "r.yaml is not UTF-8 text ... save it as UTF-8"),
    (b"\x89PNG\r\n\x1a\n\0\0", "r.yaml is not UTF-8 text ... name a YAML file"),
    (b"rl: {steps: 3\n", "r.yaml is not valid YAML ... line"),
    (b"rl:\n\tsteps: 3\n", "r.yaml is not valid YAML ... line 2"),
    (b"seed: 1\nseed: 2\n", "r.yaml is not valid YAML ... seed"),
    (b"extends: r.yaml\n", "r.yaml extends r.yaml ... name another"),
    (b"extends: 3\n", "extends: 3 must be the path of another recipe"),
    (b"extends: none.yaml\n", "none.yaml does not exist (in r.yaml)"),
    (b"seed: 1\n", "models.backbone is empty ... Hub id"),
    (b'models: {backbone: "${nope}"}\n', "'nope' not found"),
    (b"rl: 3\n", "rl: 3 is no section ... rl.steps"),
]


@pytest.mark.parametrize(("content", "words"), RECIPES)
def test_recipe(capsys: pytest.CaptureFixture[str], here: Path, content: bytes, words: str) -> None:
    (here / "r.yaml").write_bytes(content)
    check(said(capsys, "plan", "r.yaml"), words)


# A key of a recipe that is right without it.
KEYS: list[tuple[str, str]] = [
    ("rl=3", "rl: 3 is no section ... rl.steps ... pns config rl"),
    ("data=FILE", "data: FILE is no section"),
    ("data.jsonl=FILE", "data.jsonl: FILE is no section ... data.jsonl.train"),
    ("=3", "'=3' ... key=value"),
    ("models.judge=", "models.judge: unknown key ... did you mean reward.terms.coherence.model?"),
    ("pair.prefer_shared_prefix=true", "pair.prefer_shared_prefix: unknown key ... did you mean pair.prefer"),
    ("--rl.steps=3", "unrecognized ... without dashes: rl.steps=3"),
    ("data.train=x", "data.train: unknown key ... data.jsonl.train?"),
    ("data.path=x", "data.path: unknown key ... preference.data.path?"),
    ("rl.stpes=3", "rl.stpes: unknown key ... rl.steps?"),
    ("tracking.backends=tensorboard", "tracking.backends ... must be a list: tracking.backends=[VALUE]"),
    ("tracking.backends=[carbon]", "tracking.backends ... 'carbon' ... tensorboard"),
    ("preference.loss=dpo", "'dpo' is not the name of a loss; DPO is sigmoid"),
    ("preference.loss=sigmiod", "'sigmiod' ... did you mean sigmoid?"),
    ("rl.steps=ten", "rl.steps ... 'ten'"),
    ("rl.steps=0", "rl.steps: 0 must be 1 or more"),
    ("rl.optimizer.learning_rate=nan", "learning_rate: nan must be finite"),
    ("rl.optimizer.learning_rate=inf", "learning_rate: inf must be finite"),
    ("rl.optimizer.learning_rate=-1", "learning_rate: -1.0 must be ... 0 or more"),
    ("rl.optimizer.beta1=2", "beta1: 2.0 must be in [0, 1)"),
    ("seed=-1", "seed: -1 must be in [0, 4294967295]"),
    ("seed=4294967296", "seed: 4294967296 must be in"),
    ("rl.clip_low=-1", "rl.clip_low: -1.0 must be in [0, 1]"),
    ("rl.top_p=0", "rl.top_p: 0.0 must be in (0, 1]"),
    ("rl.top_p=0.9", "rl.top_p: 0.9 ... set it to 1"),
    ("rl.temperature=0", "rl.temperature: 0.0 must be greater than 0"),
    ("rl.completions_per_problem=1", "rl.completions_per_problem: 1 must be 2 or more"),
    ("name=a/b", "name: 'a/b' ... without slashes"),
    ("name=..", "name: '..' ... without slashes"),
    (f"name={'x' * 300}", "name: 300 bytes are too long ... at most 200"),
    ("data.jsonl.train=/nowhere", "data.jsonl.train: '/nowhere' is not read ... data.source=jsonl"),
    ("data.jsonl.suites.own=own.jsonl", "data.jsonl.suites ... is not read ... data.source=jsonl"),
    ("data.root=/nowhere", "data.root: '/nowhere' is not read ... data.source=jsonl"),
    ("data.benchmarks=[gsm8k]", "data.benchmarks ... data.source=jsonl"),
    ("data.prompt=chatgpt", "data.prompt ... 'chatgpt' ... llama"),
    ("data.prompt=auto", "data.prompt ... no known family ... data.prompt=none"),
    ('data.thinking="on"', "data.thinking ... enable_thinking ... leave it auto"),
    ("data.few_shot=none.jsonl", "none.jsonl does not exist"),
    ("evaluate.per_suite.nosuch.temperature=1", "per_suite.nosuch: no such suite; there are short"),
    ("evaluate.samples_per_problem=4", "samples at temperature 0 ... temperature above 0"),
    ("rollout.max_new_tokens=5000", "max_new_tokens: 5000 ... context ... is 512 ... lower it"),
    ("placement.rollout.replicas=0", "placement.rollout.replicas: 0 must be 1 or more"),
    ("placement.rollout.replicas=2000", "placement.rollout.replicas ... processes ... lower it"),
    ("placement.policy.replicas=2000", "placement.policy.replicas ... processes ... RAY_ADDRESS"),
    ("placement.rollout.cpus=6400", "placement.rollout.cpus: 6400 cores ... lower it"),
    ("reward.terms.coherence.pool.cpus=6400", "coherence.pool.cpus: 6400 cores ... lower it"),
    ("models.backbone=./nowhere", "models.backbone ... neither a directory ... Hub id"),
    ("models.reward_model=./nowhere", "models.reward_model ... neither a directory ... Hub id"),
    ("reward.terms.coherence.model=./nowhere", "coherence.model ... neither a directory ... Hub id"),
    ("reward.terms.own={weight: 1, model: MODEL}", "own.model ... no reward head ... reward model"),
    ("models.backbone=PROCESS_REWARD", "models.backbone ... Classification ... language model"),
    ("runs=a_file", "runs ... a_file is a file ... runs=DIR"),
    ("runs=/proc/none", "runs: /proc cannot be written ... runs=DIR"),
    ("preference.data.path=none.jsonl", "preference.data.path: ... none.jsonl' is not a file"),
    ("preference.data.path=a.csv", "preference.data.path ... a.csv' is not a .jsonl"),
    ("preference.data.hub=owner/name", "preference.data.revision ... full hash"),
    ("negatives=pnss", "negatives: 'pnss' is no source of negatives ... pns"),
    ("policy.lora={rank: 4, targets: [foo]}", "lora.targets: 'foo' ... there are down_proj ... all-linear"),
]


@pytest.mark.parametrize(("key", "words"), KEYS, ids=[key[:40] for key, _ in KEYS])
def test_key(capsys: pytest.CaptureFixture[str], here: Path, key: str, words: str) -> None:
    (here / "a_file").touch()
    key = key.replace("MODEL", str(TINY / "judge")).replace("PROCESS_REWARD", str(TINY / "process_reward"))
    check(said(capsys, "plan", "tiny-qwen2", key), words)


def test_key_of_the_wrong_kind_of_model(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    wrong = f"reward.terms.coherence.model={TINY / 'process_reward'}"
    check(said(capsys, "run", "tiny-qwen2", wrong), "coherence.model ... Classification ... language model")


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
@pytest.mark.parametrize("recipe", ["tiny-qwen2"])
def test_every_loss_works_over_a_recipe(here: Path, recipe: str, loss: str) -> None:
    assert cli.main(["config", recipe, f"preference.loss={loss}"]) == 0


def change(name: str, edit: Callable[[bytes], bytes]) -> Edit:
    return lambda directory: (directory / name).write_bytes(edit((directory / name).read_bytes()))


def change_config(**values: object) -> Edit:
    return change("config.json", lambda content: json.dumps(json.loads(content) | values).encode())


def without_tensor(name: str) -> Edit:
    """The file with a header that does not have it."""

    def edit(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        left = json.dumps({key: value for key, value in header.items() if name not in key}).encode()
        return len(left).to_bytes(8, "little") + left + content[8 + length :]

    return change("model.safetensors", edit)


def not_finite(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    values = np.frombuffer(content[8 + length :], "<f4").copy()
    values[: len(values) // 2 : 100] = np.nan
    return content[: 8 + length] + values.tobytes()


MODELS: dict[str, tuple[Edit, str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json: name a directory"),
    "config cut": (change("config.json", lambda content: content[:100]), "config.json that is no JSON (line"),
    "config a list": (change("config.json", lambda content: b"[1]"), "no JSON object: copy it again"),
    "architecture": (change_config(model_type="qwen99"), "model_type 'qwen99' ... transformers ... another"),
    "classifier": (
        change_config(architectures=["Qwen2ForSequenceClassification"]),
        "is a Qwen2ForSequenceClassification: name a language model",
    ),
    "encoder": (change_config(architectures=["BertForMaskedLM"]), "BertForMaskedLM: name a language model"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no *.safetensors: save"),
    "weights cut": (
        change("model.safetensors", lambda c: c[: len(c) // 2]),
        "damaged ... ends in the middle",
    ),
    "weights random": (change("model.safetensors", lambda c: bytes(range(1, 255)) * 9), "damaged ... copy"),
    "weights empty": (change("model.safetensors", lambda c: b""), "damaged model.safetensors ... copy"),
    "header no JSON": (change("model.safetensors", lambda c: c[:8] + b"x" + c[9:]), "header is no JSON"),
    "a layer missing": (
        without_tensor("layers.2.mlp"),
        "lacks the tensor layers.2.mlp.gate_proj.weight and 2 more: it would be drawn at random",
    ),
    "a norm missing": (without_tensor("model.norm"), "lacks the tensor norm.weight: it would be drawn"),
    "no head": (change_config(tie_word_embeddings=False), "lacks the tensor lm_head.weight"),
    "more layers": (change_config(num_hidden_layers=5), "lacks the tensor layers.4.input_layernorm.weight"),
    "other shape": (change_config(intermediate_size=100), "shape [384, 128] ... asks for [100, 128]"),
    "NaN": (change("model.safetensors", not_finite), "numbers that are not finite in ... name a checkpoint"),
    "no tokenizer": (
        lambda path: (path / "tokenizer.json").unlink(),
        "no tokenizer.json: save the tokenizer",
    ),
    "tokenizer cut": (change("tokenizer.json", lambda c: c[:99]), "tokenizer.json that is no JSON"),
    "tokenizer larger": (change_config(vocab_size=20), "shape [46, 128] ... asks for [20, 128]"),
    "no template": (
        lambda path: (path / "chat_template.jinja").unlink(),
        "has no chat template: of a base model set data.prompt=base",
    ),
    "broken template": (
        change("chat_template.jinja", lambda content: content + b"{% if %}"),
        "chat template that fails ... line ... mend it",
    ),
    "refusing template": (
        change("chat_template.jinja", lambda content: b"{{ raise_exception('no users') }}"),
        "chat template that fails (no users): mend it",
    ),
    "index names a file": (
        lambda path: (
            (path / "model.safetensors").rename(path / "model-1.safetensors"),
            (path / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-2.safetensors"}}'
            ),
        ),
        "lacks model-2.safetensors ... fetch the whole checkpoint",
    ),
    "index names a tensor": (
        lambda path: (
            (path / "model.safetensors").rename(path / "model-1.safetensors"),
            (path / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-1.safetensors"}}'
            ),
        ),
        "lacks a, which model.safetensors.index.json names",
    ),
    "an adapter": (
        lambda path: ((path / "model.safetensors").unlink(), (path / "adapter_config.json").touch()),
        "has no *.safetensors: merge the adapter",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_model(capsys: pytest.CaptureFixture[str], here: Path, case: str) -> None:
    edit, words = MODELS[case]
    shutil.copytree(TINY / "qwen2-mixed", here / "model")
    edit(here / "model")
    check(
        said(capsys, "plan", "tiny-qwen2", "models.backbone=model"), f"models.backbone: ... model ... {words}"
    )


@pytest.mark.parametrize("case", ["a layer missing", "weights cut", "broken template"])
def test_judge_that_a_later_stage_asks(capsys: pytest.CaptureFixture[str], here: Path, case: str) -> None:
    edit, words = MODELS[case]
    shutil.copytree(TINY / "judge", here / "model")
    edit(here / "model")
    message = said(capsys, "run", "tiny-qwen2", "reward.terms.coherence.model=model")
    check(message, f"reward.terms.coherence.model: ... model ... {words}")


def test_template_without_a_system_turn(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    shutil.copytree(TINY / "qwen2", here / "model")
    template = here / "model" / "chat_template.jinja"
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refuse + template.read_text())
    message = said(capsys, "plan", "tiny-qwen2", "models.backbone=model", "data.system_prompt=Think.")
    check(message, "data.system_prompt: the chat template takes no system turn: put ... data.instruction")


# Name and content of a file of problems -> what is said of it.
PROBLEMS: list[tuple[str, bytes, str]] = [
    ("p.jsonl", b"", "p.jsonl: no problems in it"),
    ("p.jsonl", GOOD.encode() + b'{"problem": ', "line 2: not a JSON object ... mend or remove"),
    (
        "p.jsonl",
        b'{"question": "1+1?", "answer": "2"}\n',
        "line 1 ... question, answer ... fields.problem=question",
    ),
    (
        "p.jsonl",
        b'{"problem": "1+1?", "solution": "2"}\n',
        "line 1 ... problem, solution ... fields.answer=solution",
    ),
    ("p.jsonl", b'{"problem": "1+1?", "x": "2"}\n', "'answer' is missing (there are: problem, x)"),
    ("p.jsonl", b'{"problem": "1+1?", "answer": null}\n', "'answer' is null, and has to be text"),
    ("p.jsonl", b'{"problem": "1+1?", "answer": [2]}\n', "'answer' is [2], and has to be text"),
    ("p.jsonl", b'{"problem": "1+1?", "answer": true}\n', "'answer' is true, and has to be text"),
    ("p.jsonl", b'{"problem": "1+1?", "answer": " "}\n', "line 1: empty problem or answer"),
    ("p.jsonl", b'{"problem": 3, "answer": "2"}\n', "'problem' is 3, and has to be text"),
    ("p.jsonl", b'{"problem": "1", "answer": "2", "id": 1}\n' * 2, "line 2: id '1' occurs twice"),
    (
        "p.jsonl",
        GOOD.encode() + b'{"problem": "1+1? ", "answer": "3"}\n',
        "p.jsonl: problems p/1 and p/2 are the same text with different answers, '2' and '3': mend",
    ),
    ("p.jsonl", b'[{"problem": "1+1?"}]\n', "line 1 ... name the file .json"),
    ("p.jsonl", GOOD.encode("utf-16"), "line 1 ... not UTF-8 text ... save the file as UTF-8"),
    ("p.jsonl", '{"problem": "é", "answer": "2"}\n'.encode("latin-1"), "line 1 ... not UTF-8 ... save"),
    ("p.jsonl", b"\0\0\0\n", "line 1: not a JSON object"),
    ("p.jsonl.gz", b"plain", "p.jsonl.gz: cannot be read ... name another"),
    ("p.json", GOOD.encode() * 2, "p.json: cannot be read as JSON ... .jsonl"),
    ("p.json", b'{"a": 1}', "p.json: has no list of objects ... dict"),
    ("p.json", b"[1]", "p.json, row 1: not a JSON object"),
    ("p.csv", b"problem,answer\n1+1?\n", "p.csv, line 2: has not the 2 fields"),
    ("p.csv", b"problem,answer\n1+1?,2,3\n", "p.csv, line 2: has not the 2 fields ... quotes"),
    ("p.csv", b"question,answer\n1+1?,2\n", "p.csv, line 2 ... fields.problem=question"),
    ("p.parquet", b"PAR", "p.parquet: cannot be read as Parquet"),
]


@pytest.mark.parametrize(("name", "content", "words"), PROBLEMS)
def test_problems(
    capsys: pytest.CaptureFixture[str], here: Path, name: str, content: bytes, words: str
) -> None:
    (here / name).write_bytes(content)
    (here / "suite.jsonl").write_text(GOOD)
    suite = "data.jsonl.suites.own=suite.jsonl"
    check(said(capsys, "plan", "tiny-qwen2", "data.source=jsonl", f"data.jsonl.train={name}", suite), words)


# Keys of data.* beside a good file of problems.
DATA: list[tuple[str, str]] = [
    ("data.jsonl.train=none.jsonl", "data.jsonl.train ... none.jsonl' is not a file"),
    ("data.jsonl.train=.", "data.jsonl.train ... is not a file"),
    ("data.jsonl.train=gsm8k_trian", "'gsm8k_trian' ... did you mean gsm8k_train?"),
    ("data.jsonl.train=dapo_math_17k", "dapo_math_17k: no Hub copy ... data.root=DIR"),
    ("data.jsonl.suites.own=none.jsonl", "data.jsonl.suites.own ... none.jsonl' is not a file"),
    ("data.jsonl.suites.mean=p.jsonl", "data.jsonl.suites.mean: the name is taken"),
    ("data.benchmarks=[gsm9k]", "data.benchmarks: 'gsm9k' ... did you mean gsm8k?"),
    ("data.benchmarks=[college_math]", "data.benchmarks: college_math: no Hub copy ... data.root=DIR"),
    ("data.root=nowhere", "data.root: ... nowhere is no directory"),
    ("data.revisions.gsm9k=1", "data.revisions.gsm9k: no set of that name ... gsm8k"),
    ("evaluate.per_suite.nosuch.temperature=1", "per_suite.nosuch: no such suite; there are own"),
]


@pytest.mark.parametrize(("key", "words"), DATA)
def test_data(capsys: pytest.CaptureFixture[str], here: Path, key: str, words: str) -> None:
    (here / "p.jsonl").write_text(GOOD)
    keys = ["data.source=jsonl", "data.jsonl.train=p.jsonl", "data.jsonl.suites.own=p.jsonl", key]
    check(said(capsys, "plan", "tiny-qwen2", *keys), words)


def test_set_that_the_root_lacks(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "sets").mkdir()
    (here / "p.jsonl").write_text(GOOD)
    keys = ["data.source=jsonl", "data.jsonl.train=p.jsonl", "data.benchmarks=[gsm8k]", "data.root=sets"]
    check(
        said(capsys, "run", "tiny-qwen2", *keys), "gsm8k ... gsm8k.jsonl does not exist ... data.root names"
    )
    (here / "sets" / "gsm8k.jsonl").write_text(GOOD)
    check(said(capsys, "run", "tiny-qwen2", *keys), "has 1 records, 1319 are expected ... whole set again")


READ: dict[str, bytes] = {
    "bom.jsonl": b"\xef\xbb\xbf" + GOOD.encode(),
    "crlf.jsonl": GOOD.replace("\n", "\r\n\r\n").encode(),
    "number.jsonl": b'{"problem": "1+1?", "answer": 2}\n',
    "gsm8k.jsonl": b'{"question": "1+1?", "answer": "It is 2.\\n#### 2"}\n',
    "boxed.jsonl": b'{"prompt": "1+1?", "answer": "It is $\\\\boxed{2}$."}\n',
    "list.json": b'[{"problem": "1+1?", "answer": "2"}]',
    "table.csv": b'\xef\xbb\xbfproblem,answer,level\r\n"1+1?",2,\r\n',
}


@pytest.mark.parametrize("name", READ)
def test_what_is_no_fault_is_read(tmp_path: Path, name: str) -> None:
    from pns.data.problems import read_problems

    (tmp_path / name).write_bytes(READ[name])
    other = {"gsm8k.jsonl": "question", "boxed.jsonl": "prompt"}
    (problem,) = read_problems(tmp_path / name, "own", fields={"problem": other.get(name, "problem")})
    assert (problem.prompt, problem.answer) == ("1+1?", "2")
    assert (problem.solution is not None) == (name in other)


PAIRS: dict[str, tuple[object, str]] = {
    "a field missing": (
        {"prompt": "a", "chosen": "b"},
        "line 2 ... 'rejected' is missing (fields: prompt, chosen)",
    ),
    "other names": ({"question": "a", "good": "b", "bad": "c"}, "line 2 ... fields: question, good, bad"),
    "a number": (PAIR | {"chosen": 3}, "line 2 ... 'chosen' is int"),
    "null": (PAIR | {"chosen": None}, "line 2 ... 'chosen' is missing"),
    "equal sides": (PAIR | {"chosen": "3"}, "line 2 ... are the same ... bad_pairs=drop"),
    "a blank side": (PAIR | {"chosen": " "}, "line 2: 'chosen' is blank ... bad_pairs=drop"),
    "no role": (
        PAIR | {side: [{"content": "a"}] for side in PAIR},
        "line 2: 'prompt' must be a list of messages",
    ),
    "tools": (PAIR | {"tools": ["x"]}, "line 2 ... 'tools' ... remove the column"),
    "one score": (PAIR | {"score_chosen": 1.0}, "line 2 ... score_rejected None ... neither"),
    "margin": (PAIR | {"margin_end": 9}, "line 2: margin_end is 9 ... from 1 to 1"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(capsys: pytest.CaptureFixture[str], here: Path, case: str) -> None:
    row, words = PAIRS[case]
    (here / "pairs.jsonl").write_text(f"{json.dumps(PAIR)}\n{json.dumps(row)}\n")
    check(said(capsys, "plan", "tiny-qwen2", "preference.data.path=pairs.jsonl"), f"pairs.jsonl, {words}")


@pytest.mark.parametrize(
    ("name", "words"), [("p.parquet", "cannot be read as Parquet"), ("p.jsonl", "no pairs")]
)
def test_files_of_pairs(capsys: pytest.CaptureFixture[str], here: Path, name: str, words: str) -> None:
    (here / name).touch()
    check(said(capsys, "run", "tiny-qwen2", f"preference.data.path={name}"), f"{name}: {words}")


def test_start(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `pns run` alone."""
    check(said(capsys, "run", "tiny-qwen2", "--from", "pair"), "--from pair ... has made no pair yet ... out")
    check(said(capsys, "run", "tiny-qwen2", "--from", "pairs"), "unknown stage 'pairs'; did you mean pair?")
    check(said(capsys, "run", "tiny-qwen2", "--from", "pair", "--until", "rl"), "exchange them")
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = server.getsockname()[1]
    for address, words in {
        "foo bar": "RAY_ADDRESS: 'foo bar' is no address ... HOST:PORT",
        "host:99999": "RAY_ADDRESS: 'host:99999' is no address ... HOST:PORT",
        f"127.0.0.1:{nobody}": "does not answer ... unset RAY_ADDRESS",
        f"ray://127.0.0.1:{nobody}": "does not answer ... unset RAY_ADDRESS",
    }.items():
        monkeypatch.setenv("RAY_ADDRESS", address)
        check(said(capsys, "run", "tiny-qwen2"), words)
    monkeypatch.delenv("RAY_ADDRESS")
    hub = "models.backbone=owner/name"
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{nobody}")
    monkeypatch.setenv("HF_HOME", str(here))
    check(
        said(capsys, "run", "tiny-qwen2", hub),
        "models.backbone: owner/name ... does not answer ... directory",
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check(said(capsys, "run", "tiny-qwen2", hub), "models.backbone: owner/name ... HF_HUB_OFFLINE is set")


def test_run_in_use(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    from pns.run.place import locked

    page = here / "runs" / "tiny-qwen2"
    page.mkdir(parents=True)
    with locked(page / "lock", "wait"):
        check(said(capsys, "run", "tiny-qwen2"), f"is in use by process {os.getpid()} ... name=NAME")


def test_a_finished_stage_that_was_altered(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    from pns.recipe import load
    from pns.run.page import RunPage
    from pns.run.place import Place

    place = here / "runs" / "stages" / "rl-1"
    with Place(place).making({"inputs": []}):
        (place / "model.safetensors").write_bytes(b"weights")
    page = here / "runs" / "tiny-qwen2"
    page.mkdir()
    (page / "rl").symlink_to(place)
    config = load(TINY.parent / "tiny-qwen2.yaml", [])
    RunPage(page).begin(config, {})
    (place / "model.safetensors").write_bytes(b"Weights")
    words = "rl-1/model.safetensors is not what the stage wrote ... restore it, or make it ... --from rl"
    check(said(capsys, "run", "tiny-qwen2"), words)
    (place / "model.safetensors").unlink()
    check(said(capsys, "run", "tiny-qwen2"), "model.safetensors is missing ... --from rl")


def test_cases_of_verify(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    for field, shown in {"null": "null", "[1]": "[1]", "true": "true"}.items():
        (here / "cases.jsonl").write_text(f'{{"gold": {field}, "prediction": "1"}}\n')
        message = said(capsys, "verify", "cases.jsonl", "--out", "/dev/null", "--force")
        check(message, f"cases.jsonl, line 1: gold is {shown}; it must be a string: mend")


def test_numbers_and_standard_input_of_verify(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pns.cli", "verify", "-", "--out", str(tmp_path / "out.jsonl")]
    cases = '{"gold": 2, "prediction": "2"}\n{"gold": "0.5", "prediction": 1.5}\n'
    done = subprocess.run(command, input=cases, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
    verdicts = [json.loads(line)["verdict"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert verdicts == ["correct", "wrong"]


def test_on_and_off_are_words(here: Path) -> None:
    from pns.config import Thinking
    from pns.recipe import load

    (here / "r.yaml").write_text(f"extends: {TINY.parent / 'tiny-qwen3.yaml'}\ndata: {{thinking: off}}\n")
    assert load(here / "r.yaml", []).data.thinking is Thinking.off
    assert load(here / "r.yaml", ["data.thinking=on"]).data.thinking is Thinking.on


def test_other_commands(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "p.jsonl").write_text(GOOD)
    (here / "a_file").touch()
    model, suite = TINY / "qwen2", "data.jsonl.suites.own=p.jsonl"
    for arguments, words in {
        ("evaluate", "nowhere", suite): "MODEL: nowhere is neither a directory",
        ("evaluate", model): "name at least one suite",
        ("evaluate", model, "benchmarks=[gsm9k]"): "'gsm9k' ... did you mean gsm8k?",
        ("evaluate", model, suite, "out=a_file/x", "data.prompt=none"): "a_file is a file ... runs=DIR",
        ("evaluate", model, suite, "out=a_file", "data.prompt=none"): "a_file is a file ... runs=DIR",
        ("evaluate", model, suite): "data.prompt ... no known family ... data.prompt=none",
        ("evaluate", TINY / "process_reward", suite): "MODEL ... Classification ... language model",
        ("export", "nowhere", "out"): "nowhere is not a run directory ... name one like",
        ("export", "nowhere", "a_file/x"): "a_file is a file ... choose another",
        ("export", "nowhere", "a_file"): "exists and is not an empty directory ... choose another",
        ("report", "nowhere"): "nowhere is not a run directory ... name one like",
        ("report", "a_file"): "a_file is not a run directory",
        ("init", "a/b"): "'a/b' names a recipe",
        ("init", "own", "--suite", "p.jsonl"): "--suite p.jsonl is not of the form NAME=FILE",
        ("init", "own", "--out", "a_file"): "a recipe's file ends in .yaml",
        ("plan", "tiny-qwen"): "'tiny-qwen' is no file ... did you mean tiny-qwen",
        ("plan", "recipes/none.yaml"): "recipes/none.yaml does not exist",
        ("plan", "."): "is a directory",
        ("plan", "tiny-qwen2", "--with", "none.yaml"): "none.yaml does not exist",
    }.items():
        check(said(capsys, *arguments), words)


def test_a_full_disk_is_one_line(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "runs/x/metrics.jsonl")

    monkeypatch.setattr(cli, "print_recipes", full)
    check(said(capsys, "recipes"), "runs/x/metrics.jsonl: No space left on device; make room ... goes on")

    def full_for_safetensors(*arguments: object) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cli, "print_recipes", full_for_safetensors)
    check(said(capsys, "recipes"), "storage: No space left on device; make room")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["plan", "tiny-qwen2", "models.backbone=cut"], "damaged model.safetensors"),
        (["run", "tiny-qwen2", "models.backbone=cut"], "damaged model.safetensors"),
        (["run", "tiny-qwen2", "preference.data.path=empty.jsonl"], "no pairs in it"),
        (["evaluate", "cut", "data.jsonl.suites.own=good.jsonl"], "damaged model.safetensors"),
    ],
)
def test_nothing_heavy_is_imported(here: Path, command: list[str], words: str) -> None:
    shutil.copytree(TINY / "qwen2", here / "cut")
    os.truncate(here / "cut" / "model.safetensors", 10_000)
    (here / "empty.jsonl").touch()
    (here / "good.jsonl").write_text(GOOD)
    code = (
        f"import sys; from pns.cli import main; code = main({command!r}); "
        f"sys.exit(repr([name for name in {HEAVY} if name in sys.modules]) if code == 2 else code)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    message, loaded = done.stderr.strip().splitlines()
    assert words in message
    assert loaded == "[]"
