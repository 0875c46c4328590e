r"""The benchmarks and training sets known by name: where they come from, how many records they have, and a
hash of their content.

A local file must have exactly the counted records with exactly the hashed content. A Hub data set is fetched
at a pinned commit, whose hash stands for its content; there the count is checked, and the content's hash too
where another commit is asked for.

OlympiadBench (text-only, mathematics, English) has 674 records on the Hub and 675 in the copies of the
Qwen2.5-Math evaluation, which the local count follows.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pns.answers.extract import boxed_span
from pns.config import DECODING_OFF, Config, Decoding
from pns.data.prompts import generation_config
from pns.errors import UserError


def _after_marks(value: Any) -> str:
    """GSM8K: the final answer stands after four number signs."""
    return str(value).rpartition("####")[2].strip()


def _integer(value: Any) -> str:
    """AMC23: floats such as 27.0."""
    return str(int(value)) if float(value) == int(float(value)) else str(value)


def _boxed(value: Any) -> str:
    """The content of the solution's last box; empty where it has none."""
    text = str(value)
    span = boxed_span(text)
    return text[span[0] : span[1]] if span else ""


def _only(value: Any) -> str:
    """OlympiadBench: a list of one."""
    if len(value) != 1:
        fault = f"olympiadbench: a record has {len(value)} final answers, one is expected"
        raise UserError(f"{fault}; use a local copy with data.root=DIR")
    return str(value[0])


_GREEDY = Decoding(1, 0.0, 1.0)
_SAMPLED = Decoding(32, 0.6, 0.95)  # of sets so small that one sample a problem says little


@dataclass(frozen=True)
class Hub:
    """A Hub data set at a commit: `configs` (one after the other), `split`, the `fields` of a record here by
    their names there, and how the answer is taken from its field. `count` is the Hub copy's where it differs
    from the local one (0: the same)."""

    repository: str
    revision: str
    fields: dict[str, str]
    answer: Callable[[Any], str] = str
    configs: tuple[str | None, ...] = (None,)
    split: str = "test"
    count: int = 0


@dataclass(frozen=True)
class ProblemSet:
    """`count` records whose `content_hash` is `sha256`; `hub` None: local files only. `decoding` is complete
    but for max_new_tokens. `parts`: files that are the set together, where it has none of its own name.
    `license`: as the Hub spells it; empty where it is not known for certain."""

    count: int
    sha256: str
    hub: Hub | None = None
    decoding: Decoding = field(default_factory=lambda: _GREEDY)
    parts: tuple[str, ...] = ()
    license: str = ""


# Fields of a record here, by their names there.
_QUESTION = {"problem": "question", "answer": "answer"}
_PROBLEM = {"problem": "problem", "answer": "answer"}
_SOLUTION = {"problem": "problem", "answer": "solution"}
_MATH500 = _PROBLEM | {"id": "unique_id", "solution": "solution", "subject": "subject", "level": "level"}
_MATH_TRAIN = _SOLUTION | {"solution": "solution", "subject": "type", "level": "level"}
_OLYMPIAD = {"problem": "question", "answer": "final_answer", "subject": "subfield"} | {
    "multiple": "is_multiple_answer",
    "unit": "unit",
    "error": "error",  # an absolute tolerance
}
_GSM8K = "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866"
_MATH_REVISION = "EleutherAI/hendrycks_math", "21a5633873b6a120296cce3e2df9d5550074f4a3"
_MATH = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"

BENCHMARKS: dict[str, ProblemSet] = {
    "gsm8k": ProblemSet(
        1319,
        "c7e88feeaf55ce07b7f233fc33e7ecc98c176d7c6205725c6e51b53336989b26",
        Hub(*_GSM8K, _QUESTION, _after_marks, ("main",)),
    ),
    "math500": ProblemSet(
        500,
        "9b34dbfc465f4c3ddea6135a4bf4a00deb26430c2576d244b9747b4cf79b7bec",
        Hub("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", _MATH500),
    ),
    "math": ProblemSet(  # the whole test split
        5000,
        "6baf2cbe7e45d6be98977e2b0a8d3e2598e3cfde4423f428e784981c8594586d",
        Hub(*_MATH_REVISION, _MATH_TRAIN, _boxed, tuple(_MATH.split())),
        parts=("math500", "math_test_minus_math500"),
    ),
    "amc23": ProblemSet(
        40,
        "2746ea8f1a2869e53e76918b29dc84cd6661700487a5ad9b87a5f061bd357e9c",
        Hub("math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", _QUESTION, _integer),
        _SAMPLED,
    ),
    "minerva_math": ProblemSet(
        272,
        "a0318ee87140a32d0d2f2129fdb75898ce476604208015257958b1121cfa50d4",
        Hub("math-ai/minervamath", "ee46ddc498933b1977577953250ca5c66be64f96", _QUESTION),
    ),
    "olympiadbench": ProblemSet(
        675,
        "7e3355c154df8d0ad7fad73cdd77779dc887cf3c84e69d2f6f84e7147bc9c625",
        Hub("math-ai/olympiadbench", "4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84", _OLYMPIAD, _only, count=674),
    ),
    "aime24": ProblemSet(
        30,
        "8c928377e52063470ebc55435ec0c55a05a3bb020d5bb31fb3c77dd98d2e6cae",
        Hub("math-ai/aime24", "83a7f387baaa524a8bda0022eac0541582297103", _SOLUTION, _boxed),
        _SAMPLED,
    ),
    "aime25": ProblemSet(
        30,
        "a5797ae1a4cb13d2395175b56c8fa7dcc913eaa0d47391346cf309169ab0f9c5",
        Hub("math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", _PROBLEM),
        _SAMPLED,
    ),
    "college_math": ProblemSet(2818, "76102432b297cc42811767921164a863faf8a2d77cf75404f16cc4d5a5064639"),
    "gaokao2023en": ProblemSet(385, "e65dbe5bdcc15391ae42272337d6f3926b3e26384d17c156ffbc659d3faf6d8d"),
}

TRAINING_SETS: dict[str, ProblemSet] = {
    "gsm8k_train": ProblemSet(
        7473,
        "48c9ad8d3d9b10383f9e290909b76a150b58187745c598788cb0f1346f2ed01e",
        Hub(*_GSM8K, _QUESTION | {"solution": "answer"}, _after_marks, ("main",), "train"),
        license="mit",
    ),
    "math_train": ProblemSet(
        7500,
        "a895859a390e8720903abdb3db93fc2979b950e03517fa0e9a6aa0251bd4d25c",
        Hub(*_MATH_REVISION, _MATH_TRAIN, _boxed, tuple(_MATH.split()), "train"),
        license="mit",
    ),
    "dapo_math_17k": ProblemSet(17917, "2f6680a6f81627ee59a6af0a4814a179452e0f5fbff6d8e7455c428c7a03cc58"),
}


def content_hash(pairs: Iterable[tuple[str, str]]) -> str:
    """sha256 over the (problem, answer) pairs of a set, in any order: their JSON, one a line, sorted; spaces
    at the ends and the form of newlines do not count."""
    canonical = ([_canonical(problem), _canonical(answer)] for problem, answer in pairs)
    lines = sorted(json.dumps(pair, ensure_ascii=False) for pair in canonical)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _canonical(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def decodings(config: Config, suites: Iterable[str]) -> dict[str, Decoding]:
    """`decoding` of each suite. Raises UserError also for a key of evaluate.per_suite that is no suite."""
    by_suite = {suite: decoding(config, suite) for suite in suites}
    for name in config.evaluate.per_suite:
        if name not in by_suite:
            raise UserError(f"evaluate.per_suite.{name}: no such suite; there are {', '.join(by_suite)}")
    return by_suite


def decoding(config: Config, suite: str) -> Decoding:
    """How `suite` is decoded, complete: evaluate.per_suite.<suite> before evaluate.* before the benchmark's
    own (greedy, once, for suites that are no named benchmark) before rollout.max_new_tokens. Raises UserError
    for several greedy samples, which would be the same."""
    named = suite in config.data.benchmarks
    own = config.evaluate.per_suite.get(suite, Decoding())
    models_own = generation_decoding(config) if config.evaluate.from_generation_config else Decoding()
    chain = (own, config.evaluate, models_own, BENCHMARKS[suite].decoding if named else _GREEDY)
    values: dict[str, Any] = {}
    for name in ("samples_per_problem", "temperature", "top_p", *DECODING_OFF):
        stated = (getattr(layer, name) for layer in chain)
        values[name] = next((value for value in stated if value is not None), None)  # 0 is a temperature
    tokens = own.max_new_tokens or config.evaluate.max_new_tokens or config.rollout.max_new_tokens
    complete = replace(Decoding(**values), max_new_tokens=tokens)
    if complete.temperature == 0 and complete.samples_per_problem != 1:
        fault = f"{suite} asks for {complete.samples_per_problem} samples at temperature 0"
        way_out = f"set evaluate.per_suite.{suite}.temperature above 0 or its samples_per_problem to 1"
        raise UserError(f"evaluate: {fault}, which would all be the same: {way_out}")
    if complete.top_p == 0:
        raise UserError(f"evaluate: top_p of {suite} is 0; it lies in (0, 1]")
    if (budget := complete.thinking_budget or 0) >= tokens:
        fault = f"{budget} leaves no token of max_new_tokens, {tokens}, for the answer ({suite})"
        raise UserError(f"evaluate.thinking_budget: {fault}: lower it, or raise max_new_tokens")
    if "" in (values["stop"] or []):
        raise UserError(f"evaluate: a stop of {suite} is empty, and would end every completion: leave it out")
    return complete


def generation_decoding(config: Config) -> Decoding:
    """What the backbone's generation_config.json says of sampling; without do_sample it is greedy. Raises
    UserError where there is no such file."""
    said = generation_config(config.models.backbone)
    if said is None:
        fault = f"{config.models.backbone} has no generation_config.json"
        raise UserError(f"evaluate.from_generation_config: {fault}; leave it false, and set evaluate.*")
    if not said.get("do_sample"):
        return Decoding(temperature=0.0, repetition_penalty=said.get("repetition_penalty"))
    # What a file leaves out is what transformers takes.
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return Decoding(**{name: said.get(name, defaults.get(name)) for name in names})
