"""Preference pairs as token ids, from the standard format (files, the Hub) or from the run's own pair stage.

A row of the standard format has `prompt`, `chosen` and `rejected`: three strings (plain), or three lists of
{"role", "content"} messages (conversational), where `prompt` may be left out if `chosen` and `rejected` hold
the whole conversation. Optional columns: `problem_id`, `source`, `score_chosen` and `score_rejected` (raw
reward-model scores), `margin_end` (leading characters of the rejected text that take part in the margin).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from pns.algo.pairs import num_margin_tokens, preference_rows
from pns.config import BadPairs, Data, Layout, PreferenceConfig, PreferenceData
from pns.data.decontamination import Overlaps
from pns.data.prompts import Prompts
from pns.errors import UserError
from pns.files import json_lines, read_jsonl
from pns.preference_losses import PREFERENCE_LOSSES
from pns.records import PreferencePair, Problem, from_json

SIDES = ("chosen", "rejected")
# The standard three and those that describe the pair, with what a card says of each.
COLUMNS = {
    "prompt": "the conversation before the answer (or its text)",
    "chosen": "the preferred answer",
    "rejected": "the answer to be avoided",
    "problem_id": "the problem the pair belongs to",
    "source": "how the rejected answer was made",
    "margin_end": "leading characters of the rejected answer, up to and including the first wrong step",
    "score_chosen": "raw reward-model score of the chosen answer",
    "score_rejected": "raw reward-model score of the rejected answer",
}
CAUSES = ("empty_side", "end_token_inside", "identical_sides", "prompt_too_long", "pair_too_long")
_UNSUPPORTED = ("tools", "images")  # columns that change what a chat template renders
_SHORT_REVISION = 12

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class TokenPair:
    """A pair as token ids (T,). The completions end with the end token; a blank side, or a blank prompt, is
    an empty tuple.

    `margin_tokens`: leading tokens of `rejected_ids`, up to and including the first wrong step, that take
    part in the margin; None: all. `score_gap`: reward-model score of chosen minus that of rejected. `where`:
    "FILE, line N" or "HUB@REVISION, row N", from 1.
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    margin_tokens: int | None
    score_gap: float | None
    where: str


@dataclass(frozen=True)
class LoadedPairs:
    """The pairs to train on, in order; how many of `num_rows` rows were dropped per cause; where they come
    from and their `data_hash`."""

    pairs: list[TokenPair]
    dropped: dict[str, int]
    source: str
    num_rows: int
    sha256: str
    in_template: int = 0  # rows of plain strings that became turns of the chat template

    def summary(self) -> dict[str, Any]:
        """All but the pairs, as JSON values."""
        counts = {"rows": self.num_rows, "pairs": len(self.pairs), "dropped": self.dropped}
        return {"source": self.source, "sha256": self.sha256, **counts}


def load_pairs(
    settings: PreferenceConfig,
    max_pair_tokens: int,
    layout: Layout,
    prompts: Prompts,
    problems: Mapping[str, Problem],
    own_pairs: Path | None,
    overlaps: Overlaps | None = None,
) -> LoadedPairs:
    """The pairs in the run's own file `own_pairs`, of the problems in `problems` by id, or (None) those of
    `settings.data`.

    Rows from outside whose prompt is a problem in `overlaps` are dropped and counted as `in_a_suite`; the
    run's own problems have been decontaminated before. `data.system_prompt` and `data.instruction` are put
    around the run's own problems only: other rows are taken as they are. Raises UserError, naming file and
    line, for what cannot be read, for a bad pair (see `filter_pairs`), and for a pair without scores where
    the loss reads them.
    """
    data = settings.data
    if own_pairs is None:
        source = data.path or f"{data.hub}@{data.revision}, split {data.split}"
        placed = list(read_rows(data))
        rows = [row for _, row in placed]
        if overlaps is not None:
            placed = [(at, row) for at, row in placed if not overlaps.of(Problem(at, question(row), ""))]
        prefix = prompts.data.assistant_prefix
        turns = data.chat_template
        encoded = [encode_row(prompts.tokenizer, row, where, prefix, turns) for where, row in placed]
    else:
        source = "the run's pair stage"
        pairs = read_pairs(own_pairs)
        rows = pair_rows(pairs, prompts.data)
        encoded = []
        for number, pair in enumerate(pairs, start=1):
            where = f"{own_pairs}, line {number}"
            encoded.append(encode_pair(prompts, problems[pair.problem_id], pair, where))
    in_template = 0
    if own_pairs is None and data.chat_template:
        in_template = sum(goes_into_template(prompts.tokenizer, row) for _, row in placed)
    in_a_suite = len(rows) - len(encoded)
    max_prompt_tokens = prompts.data.max_prompt_tokens
    kept, dropped = filter_pairs(encoded, max_prompt_tokens, max_pair_tokens, data.bad_pairs, layout)
    if PREFERENCE_LOSSES[settings.loss].needs_score_gaps:
        for token_pair in kept:
            if token_pair.score_gap is None:
                fault = f"no score_chosen and score_rejected, which preference.loss={settings.loss} needs"
                raise UserError(f"{token_pair.where}: {fault}; choose another loss")
    dropped = {"in_a_suite": in_a_suite, **dropped}
    return LoadedPairs(kept, dropped, source, len(rows), data_hash(rows), in_template)


def question(row: Mapping[str, Any]) -> str:
    """What the user asks in a row, as text; empty where the row is malformed."""
    asked = row.get("prompt") or row.get("chosen")
    if not isinstance(asked, list):
        return asked if isinstance(asked, str) else ""
    messages = [message for message in asked if isinstance(message, dict)]
    return "\n".join(str(message.get("content")) for message in messages if message.get("role") == "user")


def read_pairs(path: Path) -> list[PreferencePair]:
    """The run's own pairs. Raises UserError if there are none."""
    pairs = [from_json(PreferencePair, row) for row in read_jsonl(path)]
    if not pairs:
        way_out = "raise synthesize.samples_per_problem or pair.samples_per_problem"
        raise UserError(f"preference: {path} has no pairs; {way_out}")
    return pairs


def pair_rows(pairs: Sequence[PreferencePair], data: Data) -> list[dict[str, Any]]:
    """The run's own pairs as conversational rows, with every column they have a value for."""
    asked = [replace(pair, prompt=pair.prompt + data.instruction) for pair in pairs]
    rows: list[dict[str, Any]] = []
    for row, pair in zip(preference_rows(asked, data.system_prompt), pairs, strict=True):
        values = {key: getattr(pair, key) for key in list(COLUMNS)[3:]}
        rows.append(row | {key: value for key, value in values.items() if value is not None})
    return rows


def read_rows(settings: PreferenceData) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of `settings.path` or `settings.hub`, at most `settings.limit` (0: all). Raises UserError
    for a file or a data set that cannot be read or holds no row, and for a line that is not a JSON object."""
    if settings.hub:
        rows = _hub_rows(settings)
    elif settings.path.endswith(".parquet"):
        rows = _parquet_rows(Path(settings.path))
    else:
        lines = json_lines(settings.path)
        rows = ((f"{settings.path}, line {number}", row) for number, row in lines)
    empty = True
    for placed in islice(rows, settings.limit or None):  # None: all
        empty = False
        yield placed
    if empty:
        raise UserError(f"{settings.path or settings.hub}: no pairs in it")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            # Other columns may hold megabytes a row.
            for batch in file.iter_batches(columns=_known(file.schema_arrow.names)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error})") from error


def _hub_rows(settings: PreferenceData) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    name = f"{settings.hub}@{settings.revision[:_SHORT_REVISION]}"
    try:
        rows = datasets.load_dataset(settings.hub, revision=settings.revision, split=settings.split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        message = next(iter(str(error).splitlines()), type(error).__name__)
        fault = f"split {settings.split!r} of {name} cannot be loaded"
        raise UserError(f"preference.data.hub: {fault}: {message}") from error
    for number, row in enumerate(rows.select_columns(_known(rows.column_names)), start=1):
        yield f"{name}, row {number}", row


def _known(names: Iterable[str]) -> list[str]:
    return [name for name in names if name in COLUMNS or name in _UNSUPPORTED]


def check_rows(settings: PreferenceData) -> None:
    """Every row of `settings.path` or `settings.hub` has the standard format, as far as no tokenizer is
    needed. Raises UserError, naming file and line."""
    for where, row in read_rows(settings):
        values, plain = _checked_values(row, where)
        if not plain:
            for key, value in values.items():
                if value is not None:
                    _messages(value, key, where)
        if settings.bad_pairs is BadPairs.error:
            blank = [key for key, value in values.items() if plain and not value.strip()]
            way_out = (
                "mend or remove the pair, or drop and count such pairs with preference.data.bad_pairs=drop"
            )
            if blank:
                raise UserError(f"{where}: {blank[0]!r} is blank: {way_out}")
            if values["chosen"] == values["rejected"]:
                raise UserError(f"{where}: 'chosen' and 'rejected' are the same: {way_out}")
        _margin_end(row, values["rejected"], where)
        _score_gap(row, where)


def _checked_values(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], bool]:
    """prompt, chosen and rejected, and whether they are plain. Raises UserError for other types."""
    for column in _UNSUPPORTED:
        if row.get(column):
            fault = f"a pair with {column!r} cannot be rendered"
            raise UserError(f"{where}: {fault}; remove the column or the row")
    values: dict[str, Any] = {key: row.get(key) for key in ("prompt", *SIDES)}
    if all(isinstance(value, str) for value in values.values()):
        return values, True
    if all(isinstance(values[side], list) for side in SIDES) and isinstance(values["prompt"], list | None):
        return values, False
    types = {key: "missing" if value is None else type(value).__name__ for key, value in values.items()}
    kinds = ", ".join(f"{key!r} is {name}" for key, name in types.items())
    way_out = "a pair is three strings or three lists of messages ('prompt' may then be left out)"
    there = ", ".join(row) or "none"
    raise UserError(f"{where}: {kinds} (fields: {there}); {way_out}")


def goes_into_template(tokenizer: Any, row: Mapping[str, Any]) -> bool:
    """Whether a row is plain and has not been through a template: its prompt holds no special token."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not all(isinstance(row.get(side), str) for side in SIDES):
        return False
    if not (tokenizer.chat_template and prompt.strip()):
        return False
    # Not `all_special_tokens`, which leaves out the marks of turns in some tokenizers.
    marks = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return not any(mark in prompt for mark in marks)


def _as_turns(values: Mapping[str, str], end_token: str) -> dict[str, Any]:
    """A plain pair as a conversation."""
    turns = {side: [{"role": "assistant", "content": values[side].removesuffix(end_token)}] for side in SIDES}
    return {"prompt": [{"role": "user", "content": values["prompt"]}], **turns}


def encode_row(
    tokenizer: Any,
    row: Mapping[str, Any],
    where: str,
    assistant_prefix: str = "",
    plain_in_template: bool = False,
) -> TokenPair:
    """A row of the standard format as token ids.

    Plain: the prompt as the tokenizer encodes a text (with its own begin token, once), and the completions
    with the end token. Conversational: the prompt as the chat template renders it with its generation prompt,
    and what the template adds for the assistant's turn up to its end token; where a template ends the turn
    otherwise, the end token (what a rollout stops at) takes the place of what follows the turn's text. A
    completion has exactly one assistant message. An `assistant_prefix` that both sides begin with counts as
    prompt, as in rollouts. `plain_in_template`: a plain pair becomes such a conversation, where the tokenizer
    has a template and the prompt no special token.

    Raises UserError, naming `where`, for a missing or mistyped field, a template that refuses the messages,
    and one that does not render the prompt as the beginning of the conversation.
    """
    values, plain = _checked_values(row, where)
    if plain_in_template and goes_into_template(tokenizer, row):
        values, plain = _as_turns(values, tokenizer.eos_token), False
    if plain:
        prompt = values["prompt"] if values["prompt"].strip() else ""
        # Some files have the end token in the text; it is added once to all.
        sides = [_Side(values[side].removesuffix(tokenizer.eos_token), 0) for side in SIDES]
    else:
        prompt, sides = _render(tokenizer, values, where)
    prefix = assistant_prefix if all(side.text.startswith(assistant_prefix) for side in sides) else ""
    texts = [side.text.removeprefix(prefix) for side in sides]
    chosen_ids, rejected_ids = (_completion_ids(tokenizer, text) for text in texts)
    margin_tokens = None
    margin_end = _margin_end(row, values["rejected"], where)
    if margin_end is not None and rejected_ids:
        if sides[1].start is None:
            fault = "the chat template changes the rejected text, so that margin_end has no place in it"
            raise UserError(f"{where}: {fault}; remove margin_end")
        offsets = tokenizer(texts[1], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        token_starts = [start + len(prefix) for start, _ in offsets]
        margin_tokens = num_margin_tokens(token_starts, sides[1].start + margin_end)
    prompt_ids = _prompt_ids(tokenizer, prompt + prefix, plain) if prompt else ()
    return TokenPair(prompt_ids, chosen_ids, rejected_ids, margin_tokens, _score_gap(row, where), where)


def encode_pair(prompts: Prompts, problem: Problem, pair: PreferencePair, where: str) -> TokenPair:
    """A pair of the run as token ids, the prompt as in its rollouts."""
    sides = (pair.chosen, pair.rejected)
    chosen_ids, rejected_ids = (prompts.encode_completion(text) if text.strip() else () for text in sides)
    margin_tokens = None
    if pair.margin_end is not None:
        margin_tokens = num_margin_tokens(prompts.token_starts(pair.rejected), pair.margin_end)
    return TokenPair(prompts.encode(problem), chosen_ids, rejected_ids, margin_tokens, pair.score_gap, where)


@dataclass(frozen=True)
class _Side:
    """What follows the prompt, without the end token ("": blank), and where in it the row's own text starts
    (None: the template has changed that text)."""

    text: str
    start: int | None


def _render(tokenizer: Any, values: Mapping[str, Any], where: str) -> tuple[str, list[_Side]]:
    """The prompt's text ("": blank) and both sides of a conversational row."""
    if not tokenizer.chat_template:
        fault = "the pair is conversational and the model's tokenizer has no chat template"
        raise UserError(f"{where}: {fault}; give plain strings")
    turns = [_messages(values[side], side, where) for side in SIDES]
    if values["prompt"] is None:
        longest = min(map(len, turns)) - 1  # a completion stays on either side
        common = next((i for i in range(longest) if turns[0][i] != turns[1][i]), longest)
        prompt, turns = turns[0][:common], [side[common:] for side in turns]
        if not prompt:
            fault = "'prompt' is missing, and 'chosen' and 'rejected' do not begin with the same messages"
            raise UserError(f"{where}: {fault}")
    else:
        prompt = _messages(values["prompt"], "prompt", where)
    if prompt[-1]["role"] == "assistant":
        fault = "the prompt ends with an assistant message"
        raise UserError(f"{where}: {fault}; the assistant's turn belongs to 'chosen' and 'rejected'")
    for side, messages in zip(SIDES, turns, strict=True):
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in messages)
            wanted = f"{side!r} must be one assistant message after the prompt"
            raise UserError(f"{where}: {wanted}; it is {len(messages)} ({roles})")
    try:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        wholes = [tokenizer.apply_chat_template([*prompt, *messages], tokenize=False) for messages in turns]
    except TemplateError as error:
        raise UserError(f"{where}: the model's chat template refuses the messages: {error}") from error
    contents = [messages[0]["content"] for messages in turns]
    both = zip(wholes, contents, strict=True)
    sides = [_side(tokenizer, before, whole, content, where) for whole, content in both]
    return before if prompt[-1]["content"].strip() else "", sides


def _side(tokenizer: Any, before: str, whole: str, content: str, where: str) -> _Side:
    """What a template adds to the prompt `before` in the conversation `whole`, up to the end token."""
    if not whole.startswith(before):
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
        start = len(list(same))
        change = f"{before[start : start + 20]!r} becomes {whole[start : start + 20]!r}"
        fault = "the chat template renders the prompt otherwise once the assistant's turn follows"
        place = f"from character {start}: {change}"
        raise UserError(f"{where}: {fault} ({place}); give the pair as plain strings")
    if not content.strip():
        return _Side("", 0)
    added = whole.removeprefix(before)
    text, end_token, after = added.rpartition(tokenizer.eos_token)
    if end_token and not after.strip():
        return _Side(text, len(text) - len(content) if text.endswith(content) else None)
    if added.count(content) != 1:
        fault = f"the chat template ends the assistant's turn without the end token {tokenizer.eos_token!r}"
        way_out = "give the pair as plain strings"
        raise UserError(f"{where}: {fault}, and its text cannot be found in the turn; {way_out}")
    start = added.index(content)
    return _Side(added[: start + len(content)], start)


def _messages(value: Any, key: str, where: str) -> Messages:
    """The messages without keys that are null (a Parquet file has every key in every message)."""
    messages = [message for message in value or () if isinstance(message, dict)]
    texts = [text for message in messages for text in (message.get("role"), message.get("content"))]
    if not value or len(messages) != len(value) or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: {key!r} must be a list of messages {{"role": TEXT, "content": TEXT}}')
    return [_without_nulls(message) for message in value]


def _prompt_ids(tokenizer: Any, text: str, plain: bool) -> tuple[int, ...]:
    """A chat template has written the begin token itself, as a plain text may have."""
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = tokenizer.encode(text, add_special_tokens=plain and not begins)
    if plain and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers end every text
    return tuple(ids)


def _completion_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id) if text.strip() else ()


def _margin_end(row: Mapping[str, Any], rejected: Any, where: str) -> int | None:
    value = row.get("margin_end")
    length = len(rejected if isinstance(rejected, str) else rejected[-1]["content"])
    # Not `isinstance`: true is an int, too.
    if value is not None and (type(value) is not int or not 0 < value <= length):
        wanted = f"it counts characters of the rejected text, from 1 to {length}"
        raise UserError(f"{where}: margin_end is {value!r}; {wanted}")
    return value


def _score_gap(row: Mapping[str, Any], where: str) -> float | None:
    scores: list[Any] = [row.get(f"score_{side}") for side in SIDES]
    if scores == [None, None]:
        return None
    chosen, rejected = scores
    if not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        fault = f"score_chosen is {chosen!r} and score_rejected {rejected!r}"
        raise UserError(f"{where}: {fault}; give two finite numbers or neither")
    return float(chosen) - float(rejected)


def pair_tokens(pair: TokenPair, layout: Layout) -> int:
    """Tokens that a pair's two rows take in a micro-batch; in the shared layout at most, as completions may
    begin alike, too."""
    prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
    if layout is Layout.padded:
        return 2 * (prompt + max(chosen, rejected))
    return (1 if layout is Layout.shared else 2) * prompt + chosen + rejected


def filter_pairs(
    pairs: Iterable[TokenPair],
    max_prompt_tokens: int,
    max_pair_tokens: int,
    bad: BadPairs,
    layout: Layout = Layout.shared,
) -> tuple[list[TokenPair], dict[str, int]]:
    """The pairs that can be trained on, and how many were dropped for each of `CAUSES` (the first that
    applies).

    `max_pair_tokens` is counted as `layout` holds a pair. Raises UserError at the first bad pair where `bad`
    is error, and where no pair remains.
    """
    kept: list[TokenPair] = []
    dropped = dict.fromkeys(CAUSES, 0)
    for pair in pairs:
        cause, message = _fault(pair, max_prompt_tokens, max_pair_tokens, pair_tokens(pair, layout))
        if not cause:
            kept.append(pair)
        elif bad is BadPairs.drop:
            dropped[cause] += 1
        else:
            way_out = "or drop and count such pairs with preference.data.bad_pairs=drop"
            raise UserError(f"{pair.where}: {message}, {way_out}")
    if not kept:
        counts = ", ".join(f"{cause} {count}" for cause, count in dropped.items() if count)
        way_out = "mend the data, or raise the limits that were exceeded"
        raise UserError(f"preference: no pair is left to train on ({counts or 'there were none'}); {way_out}")
    return kept, dropped


def _fault(pair: TokenPair, max_prompt_tokens: int, max_pair_tokens: int, num_tokens: int) -> tuple[str, str]:
    """(cause, message) of a bad pair; both empty for a good one."""
    sides = {"chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
    mend = "mend or remove the pair"
    if not pair.prompt_ids:
        return "empty_side", f"'prompt' is blank: {mend}"
    for name, ids in sides.items():
        if len(ids) < 2:  # a completion has the end token at least
            return "empty_side", f"{name!r} is blank: {mend}"
    for name, ids in sides.items():
        end_at = ids.index(ids[-1]) + 1
        if end_at < len(ids):
            return "end_token_inside", f"token {end_at} of {len(ids)} of {name!r} is the end token: {mend}"
    if pair.chosen_ids == pair.rejected_ids:
        length = len(pair.chosen_ids)
        return "identical_sides", f"'chosen' and 'rejected' are the same {length} tokens: {mend}"
    if (length := len(pair.prompt_ids)) > max_prompt_tokens:
        limit = f"data.max_prompt_tokens is {max_prompt_tokens}"
        return "prompt_too_long", f"the prompt has {length} tokens, {limit}: raise it"
    if num_tokens > max_pair_tokens:
        limit = f"policy.max_tokens_per_micro_batch is {max_pair_tokens}"
        return "pair_too_long", f"the pair takes {num_tokens} tokens, {limit}: raise it"
    return "", ""


def canonical_line(row: Mapping[str, Any]) -> str:
    """One line of JSON, the same for the same pair read from JSONL, from Parquet or from the Hub: the known
    columns that have a value, keys sorted, scores as floats."""
    known = {key: row[key] for key in COLUMNS if row.get(key) is not None}
    known |= {key: float(known[key]) for key in ("score_chosen", "score_rejected") if key in known}
    values = _without_nulls(known)
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False, default=str)
    return f"{text}\n"


def data_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256, in hexadecimal digits, of the rows' canonical lines."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_line(row).encode())
    return digest.hexdigest()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
