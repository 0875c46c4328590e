"""Preference pairs from files, the Hub's loader and the run's own stage: the same token ids whichever way,
and every bad input named."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pns.config import BadPairs, Config, Data, Layout, PreferenceConfig, PreferenceData
from pns.data.decontamination import Overlaps
from pns.data.preference import (
    CAUSES,
    LoadedPairs,
    TokenPair,
    data_hash,
    encode_pair,
    encode_row,
    filter_pairs,
    load_pairs,
    pair_rows,
    pair_tokens,
    question,
    read_rows,
)
from pns.data.prompts import Prompts, load_tokenizer
from pns.errors import UserError
from pns.files import write_jsonl
from pns.recipe import load
from pns.records import PreferencePair, Problem

ROOT = Path(__file__).parents[2]
END = "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '\n\n' + (m['content'] | trim) + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n\n' }}{% endif %}"
)
# The generation prompt opens a thought that past turns do not show.
UNSTABLE = CHATML.replace("assistant\n'", "assistant\n<think>'")
# As Qwen's base models: the turn ends with a mark, texts with another token.
BASE = CHATML


def tokenizer(template: str | None, end: str = END, begin: str | None = None) -> Any:
    """Bytes as tokens, with the special tokens of the templates."""
    specials = ["<|im_start|>", END, "<|head|>", "<|eot|>", "<|end_of_text|>", "<|begin|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    if begin:
        core.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, core.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, bos_token=begin, pad_token=END, chat_template=template
    )


def chat(prompt: str, chosen: str, rejected: str, **extra: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **extra,
    }


def texts(tok: Any, pair: TokenPair) -> tuple[str, str, str]:
    prompt, chosen, rejected = (
        tok.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    )
    return prompt, chosen, rejected


def without_where(pair: TokenPair) -> TokenPair:
    return replace(pair, where="")


def test_chatml_turn_ends_with_one_end_token() -> None:
    tok = tokenizer(CHATML)
    pair = encode_row(tok, chat("1+1?", "2", "3"), "w")
    assert texts(tok, pair) == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
        "2<|im_end|>",
        "3<|im_end|>",
    )
    assert pair.chosen_ids.count(tok.eos_token_id) == 1
    assert (pair.margin_tokens, pair.score_gap, pair.where) == (None, None, "w")


def test_llama_has_one_begin_token() -> None:
    tok = tokenizer(LLAMA, end="<|eot|>", begin="<|begin|>")
    pair = encode_row(tok, chat("1+1?", "2", " 3"), "w")
    prompt = "<|begin|><|head|>user\n\n1+1?<|eot|><|head|>assistant\n\n"
    assert texts(tok, pair) == (prompt, "2<|eot|>", "3<|eot|>")  # the template trims
    plain = {"prompt": "1+1?", "chosen": "2", "rejected": "3"}
    assert texts(tok, encode_row(tok, plain, "w")) == ("<|begin|>1+1?", "2<|eot|>", "3<|eot|>")
    assert encode_row(tok, plain | {"prompt": prompt}, "w").prompt_ids == pair.prompt_ids


def test_plain_strings_become_turns_where_they_have_been_in_no_template() -> None:
    plain, turns = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, chat("Hi", "Yes", "No")
    chatml = tokenizer(CHATML)
    assert encode_row(chatml, plain, "", plain_in_template=True) == encode_row(chatml, turns, "")
    rendered = plain | {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"}
    assert encode_row(chatml, rendered, "", plain_in_template=True) == encode_row(chatml, turns, "")
    for own, row in ((tokenizer(None), plain), (chatml, rendered)):
        assert encode_row(own, row, "", plain_in_template=True) == encode_row(own, row, "")


def test_plain_prompt_of_a_tokenizer_that_ends_every_text() -> None:
    tok = tokenizer(None)
    end = (END, tok.eos_token_id)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[end]
    )
    pair = encode_row(tok, {"prompt": "q", "chosen": "a", "rejected": f"b{END}"}, "w")
    assert texts(tok, pair) == ("q", f"a{END}", f"b{END}")  # an end token the text brings is not doubled


def test_template_that_does_not_keep_the_prompt() -> None:
    with pytest.raises(UserError, match=r"^f, line 3: .*'<think>.* becomes 'a<\|im_end.*plain strings"):
        encode_row(tokenizer(UNSTABLE), chat("q", "a", "b"), "f, line 3")


def test_template_with_another_end_of_turn() -> None:
    """The rollout stops at the tokenizer's end token, so that is what ends the completion."""
    tok = tokenizer(BASE, end="<|end_of_text|>")
    assert texts(tok, encode_row(tok, chat("q", "x = 1", "x = 2"), "w"))[1:] == (
        "x = 1<|end_of_text|>",
        "x = 2<|end_of_text|>",
    )
    hides = tokenizer(CHATML.replace("m['content']", "(m['content'] | upper)"), end="<|end_of_text|>")
    with pytest.raises(UserError, match="cannot be found in the turn"):
        encode_row(hides, chat("q", "a", "b"), "w")


def test_prompt_inside_the_conversations() -> None:
    tok = tokenizer(CHATML)
    before = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    sides = {
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    explicit = {"prompt": before, **sides}
    implicit = {key: before + value for key, value in sides.items()}
    assert encode_row(tok, implicit, "w") == encode_row(tok, explicit, "w")
    same = dict.fromkeys(sides, before + sides["chosen"])
    assert encode_row(tok, same, "w").chosen_ids == encode_row(tok, same, "w").rejected_ids


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("qwen2", Data()),
        ("llama", Data()),
        ("chatml", Data(system_prompt="Think.", instruction="\nBox it.")),
        ("chatml", Data(assistant_prefix="<think>\n")),
        ("llama-like", Data(instruction=" please")),
        ("base", Data(system_prompt="s")),
    ],
)
def test_exported_rows_are_the_run_s_own_pairs(name: str, data: Data) -> None:
    tok = {
        "chatml": lambda: tokenizer(CHATML),
        "llama-like": lambda: tokenizer(LLAMA, end="<|eot|>", begin="<|begin|>"),
        "base": lambda: tokenizer(BASE, end="<|end_of_text|>"),
    }.get(name, lambda: load_tokenizer(str(ROOT / "recipes" / "tiny" / name)))()
    prompts, problem = Prompts(tok, data), Problem("p1", "n3+n4", "n7")
    prefix = data.assistant_prefix
    pair = PreferencePair(
        "p1", problem.prompt, f"{prefix}n3+n4=n7", f"{prefix}n3+n4=n8;n8", "pns", len(prefix) + 7, 1.5, -0.25
    )
    own = encode_pair(prompts, problem, pair, "w")
    assert own.prompt_ids == prompts.encode(problem)
    assert own.margin_tokens is not None
    assert 0 < own.margin_tokens < len(own.rejected_ids) - 1
    assert own.score_gap == 1.75
    (row,) = pair_rows([pair], data)
    assert encode_row(tok, row, "w", data.assistant_prefix) == own


def test_margin_end_counts_characters_of_the_row_s_text() -> None:
    tok = tokenizer(
        CHATML.replace("m['content']", "('<t></t>' if m['role'] == 'assistant' else '') + m['content']")
    )
    row = chat("q", "aß", "ßb c", margin_end=2)
    assert encode_row(tok, row, "w").margin_tokens == len("<t></t>") + 3  # ß has two bytes
    plain = {"prompt": "q", "chosen": "aß", "rejected": "ßb c", "margin_end": 2}
    assert encode_row(tok, plain, "w").margin_tokens == 3
    trims = tokenizer(LLAMA, end="<|eot|>")
    with pytest.raises(UserError, match=r"w: the chat template changes the rejected text"):
        encode_row(trims, chat("q", "a", " b", margin_end=1), "w")


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"chosen": "a", "rejected": "b"}, "'prompt' is missing, 'chosen' is str"),
    "no rejected": ({"prompt": "q", "chosen": "a", "rejected": None}, "'rejected' is missing"),
    "a number": ({"prompt": "q", "chosen": 3, "rejected": "b"}, "'chosen' is int"),
    "mixed": (chat("q", "a", "b") | {"prompt": "q"}, "'prompt' is str, 'chosen' is list"),
    "no role": (chat("q", "a", "b") | {"prompt": [{"content": "q"}]}, "'prompt' must be a list of messages"),
    "no messages": (chat("q", "a", "b") | {"chosen": []}, "'chosen' must be a list of messages"),
    "parts": (
        chat("q", "a", "b") | {"prompt": [{"role": "user", "content": [{"type": "text"}]}]},
        "'prompt' must be",
    ),
    "two turns": (
        chat("q", "a", "b") | {"rejected": chat("q", "a", "b")["chosen"] * 2},
        r"'rejected' must be one .* 2 \(assistant, assistant\)",
    ),
    "user turn": (
        chat("q", "a", "b") | {"chosen": [{"role": "user", "content": "a"}]},
        r"'chosen' must be one assistant .*\(user\)",
    ),
    "prompt ends with the assistant": (
        chat("q", "a", "b") | {"prompt": chat("q", "a", "b")["chosen"]},
        "prompt ends with an assistant",
    ),
    "nothing in common": (
        {k: v for k, v in chat("q", "a", "b").items() if k != "prompt"},
        "do not begin with the same",
    ),
    "one score": (chat("q", "a", "b", score_chosen=1.0), "score_chosen is 1.0 and score_rejected None"),
    "score that is none": (
        chat("q", "a", "b", score_chosen=1.0, score_rejected=float("nan")),
        "two finite numbers",
    ),
    "margin beyond the text": (chat("q", "a", "b", margin_end=2), "margin_end is 2; .* from 1 to 1"),
    "margin that is no number": (chat("q", "a", "b", margin_end=True), "margin_end is True"),
    "tools": (chat("q", "a", "b", tools=[{"name": "f"}]), "'tools' cannot be rendered"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_rows(case: str) -> None:
    row, message = MALFORMED[case]
    with pytest.raises(UserError, match=rf"^f\.jsonl, line 7: .*{message}"):
        encode_row(tokenizer(CHATML), row, "f.jsonl, line 7")


def test_template_that_refuses() -> None:
    tok = load_tokenizer(str(ROOT / "recipes" / "tiny" / "qwen2"))
    row = chat("q", "a", "b")
    row["prompt"].insert(0, {"role": "system", "content": "s"})
    with pytest.raises(UserError, match=r"w: the model's chat template refuses the messages: .* not system"):
        encode_row(tok, row, "w")
    with pytest.raises(UserError, match="no chat template"):
        encode_row(tokenizer(None), row, "w")


PAIR = TokenPair((1, 2), (3, 9), (4, 9), None, None, "f, line 1")
BAD = {
    "empty_side": (replace(PAIR, rejected_ids=()), "'rejected' is blank"),
    "end_token_inside": (replace(PAIR, chosen_ids=(3, 9, 4, 9)), "token 2 of 4 of 'chosen' is the end token"),
    "identical_sides": (replace(PAIR, rejected_ids=(3, 9)), "the same 2 tokens"),
    "prompt_too_long": (
        replace(PAIR, prompt_ids=(1,) * 4),
        "the prompt has 4 tokens, data.max_prompt_tokens is 3",
    ),
    "pair_too_long": (
        replace(PAIR, chosen_ids=(3,) * 8 + (9,)),
        "takes 13 tokens, policy.max_tokens_per_micro_batch is 12",
    ),
}


@pytest.mark.parametrize("cause", BAD)
def test_bad_pairs(cause: str) -> None:
    bad, message = BAD[cause]
    bad = replace(bad, where="f, line 2")
    with pytest.raises(
        UserError, match=rf"^f, line 2: .*{message}.*preference\.data\.bad_pairs=drop"
    ) as caught:
        filter_pairs([PAIR, bad], 3, 12, BadPairs.error)
    assert "\n" not in str(caught.value)
    kept, dropped = filter_pairs([PAIR, bad, bad], 3, 12, BadPairs.drop)
    assert kept == [PAIR]
    assert dropped == dict.fromkeys(CAUSES, 0) | {cause: 2}
    with pytest.raises(UserError, match=rf"no pair is left to train on \({cause} 1\)"):
        filter_pairs([bad], 3, 12, BadPairs.drop)


def test_the_end_token_alone_is_an_empty_side() -> None:
    assert filter_pairs([PAIR, replace(PAIR, chosen_ids=(9,))], 3, 12, BadPairs.drop)[1]["empty_side"] == 1


def test_limits_are_inclusive_and_count_what_the_layout_holds() -> None:
    assert [pair_tokens(PAIR, layout) for layout in (Layout.padded, Layout.packed, Layout.shared)] == [
        8,
        8,
        6,
    ]
    assert filter_pairs([PAIR], 2, 8, BadPairs.error, Layout.packed)[0] == [PAIR]
    assert filter_pairs([PAIR], 2, 6, BadPairs.error, Layout.shared)[0] == [PAIR]
    assert set(BAD) == set(CAUSES)


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("plain", [True, False])
def test_blank_text_is_an_empty_side(side: str, plain: bool) -> None:
    values = {"prompt": "q", "chosen": "a", "rejected": "b"} | {side: " \n"}
    tok = tokenizer(CHATML, begin="<|begin|>")
    pair = encode_row(tok, values if plain else chat(**values), "w")
    with pytest.raises(UserError, match=f"w: '{side}' is blank"):
        filter_pairs([pair], 100, 100, BadPairs.error)


def test_end_token_in_the_text() -> None:
    for row in (chat("q", f"a{END}c", "b"), {"prompt": "q", "chosen": f"a{END}c", "rejected": "b"}):
        with pytest.raises(UserError, match="w: token 2 of 4 of 'chosen' is the end token"):
            filter_pairs([encode_row(tokenizer(CHATML), row, "w")], 100, 100, BadPairs.error)


ROWS = [
    chat("1+1?", "2", "3", problem_id="a", score_chosen=1, score_rejected=-0.5, margin_end=1),
    chat("2+2?", "4", "5ß", problem_id="b"),
    chat("3+3?", "6", "7"),
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, PreferenceData]:
    """The same rows, as everything that `read_rows` reads."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines.replace("\n", "\n\n", 1), encoding="utf-8")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (tmp_path / "set").mkdir()
    table = pyarrow.Table.from_pydict(
        {key: [row.get(key) for row in ROWS] for key in ROWS[0]} | {"other": [1, 2, 3]}
    )
    for path in ("rows.parquet", "set/train-00000.parquet"):
        parquet.write_table(table, tmp_path / path, row_group_size=2)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = {
        name: PreferenceData(path=str(tmp_path / name))
        for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet")
    }
    return found | {
        "hub": PreferenceData(hub=str(tmp_path / "set"), revision="0123456789abcdef" * 2 + "01234567")
    }


def test_every_format_gives_the_same_pairs(files: dict[str, PreferenceData]) -> None:
    tok = tokenizer(CHATML)
    expected = [without_where(encode_row(tok, row, "")) for row in ROWS]
    for name, settings in files.items():
        found = list(read_rows(settings))
        assert [without_where(encode_row(tok, row, where)) for where, row in found] == expected, name
        assert data_hash(row for _, row in found) == data_hash(ROWS), name
        assert len(list(read_rows(replace(settings, limit=2)))) == 2, name
    where = {
        name: [where.rsplit("/", 1)[-1] for where, _ in read_rows(settings)]
        for name, settings in files.items()
    }
    assert where == {
        "rows.jsonl": ["rows.jsonl, line 1", "rows.jsonl, line 3", "rows.jsonl, line 4"],
        "rows.jsonl.gz": ["rows.jsonl.gz, line 1", "rows.jsonl.gz, line 2", "rows.jsonl.gz, line 3"],
        "rows.parquet": ["rows.parquet, row 1", "rows.parquet, row 2", "rows.parquet, row 3"],
        "hub": ["set@0123456789ab, row 1", "set@0123456789ab, row 2", "set@0123456789ab, row 3"],
    }


def test_hash_knows_every_column() -> None:
    assert data_hash(ROWS) != data_hash(ROWS[:2])
    for changed in (ROWS[0] | {"margin_end": 2}, ROWS[0] | {"score_chosen": 1.5}, chat("1+1?", "2", "4")):
        assert data_hash([changed]) != data_hash(ROWS[:1])
    assert data_hash([ROWS[2] | {"margin_end": None, "unknown": 1}]) == data_hash(ROWS[2:])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: no pairs in it"),
        ("a.jsonl", b'{"prompt": "q"}\n{"prompt"\n', "a.jsonl, line 2: not a JSON object"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: not a JSON object"),
        ("a.jsonl", b"\xff\n", "a.jsonl, line 1: not a JSON object .not UTF-8 text"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: cannot be read"),
        ("a.parquet", b"no parquet", "a.parquet: cannot be read as Parquet"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(PreferenceData(path=str(tmp_path / name))))


def test_hub_data_set_that_cannot_be_loaded(files: dict[str, PreferenceData]) -> None:
    with pytest.raises(
        UserError, match=r"preference\.data\.hub: split 'test' of .*set@0123456789ab cannot be loaded"
    ):
        list(read_rows(replace(files["hub"], split="test")))


OWN = [PreferencePair("a", "1+1?", "2", "3", "pns", 1, 0.5, 0.25), PreferencePair("b", "2+2?", "4", "5")]


def loaded_as_in_the_stage(
    config: Config,
    prompts: Prompts,
    own_pairs: Path | None = None,
    problems: dict[str, Problem] | None = None,
    overlaps: Overlaps | None = None,
) -> LoadedPairs:
    """`load_pairs` as the stage calls it; no `own_pairs`: those of `preference.data`."""
    policy = config.policy
    longest, layout = policy.max_tokens_per_micro_batch, policy.layout
    return load_pairs(config.preference, longest, layout, prompts, problems or {}, own_pairs, overlaps)


def test_load_own_pairs(tmp_path: Path) -> None:
    own = tmp_path / "pairs.jsonl"
    write_jsonl(own, OWN)
    config = Config(data=Data(system_prompt="s", instruction="!"))
    prompts = Prompts(tokenizer(CHATML), config.data)
    problems = {pair.problem_id: Problem(pair.problem_id, pair.prompt, "") for pair in OWN}
    loaded = loaded_as_in_the_stage(config, prompts, own, problems)
    assert [pair.where for pair in loaded.pairs] == [f"{own}, line 1", f"{own}, line 2"]
    assert loaded.pairs[0].prompt_ids == prompts.encode(problems["a"])
    assert loaded.summary() == {
        "source": "the run's pair stage",
        "sha256": data_hash(pair_rows(OWN, config.data)),
        "rows": 2,
        "pairs": 2,
        "dropped": dict.fromkeys(("in_a_suite", *CAUSES), 0),
    }
    config.preference = PreferenceConfig(loss="offset")
    with pytest.raises(UserError, match=r"pairs.jsonl, line 2: no score_chosen and score_rejected"):
        loaded_as_in_the_stage(config, prompts, own, problems)
    own.write_text("")
    with pytest.raises(UserError, match=r"pairs.jsonl has no pairs"):
        loaded_as_in_the_stage(config, prompts, own, problems)


def test_load_external_pairs(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [*ROWS, chat("q", "same", "same"), chat("q" * 90, "a", "b"), chat("q", "a" * 300, "b")]
    write_jsonl(path, rows)
    data = PreferenceData(path=str(path), bad_pairs=BadPairs.drop)
    config = Config(
        data=Data(system_prompt="not for these", max_prompt_tokens=90), preference=PreferenceConfig(data=data)
    )
    config.policy.max_tokens_per_micro_batch = 300
    prompts = Prompts(tokenizer(CHATML), config.data)
    loaded = loaded_as_in_the_stage(config, prompts)
    assert [without_where(pair) for pair in loaded.pairs] == [
        without_where(encode_row(prompts.tokenizer, row, "")) for row in ROWS
    ]
    assert loaded.dropped == dict.fromkeys(("in_a_suite", *CAUSES), 0) | {
        "identical_sides": 1,
        "prompt_too_long": 1,
        "pair_too_long": 1,
    }
    assert (loaded.source, loaded.num_rows, loaded.sha256) == (str(path), 6, data_hash(rows))
    asked = question(rows[0])
    assert asked
    loaded = loaded_as_in_the_stage(config, prompts, overlaps=Overlaps([Problem("benchmark/1", asked, "1")]))
    assert loaded.dropped["in_a_suite"] == sum(question(row) == asked for row in rows)
    data.bad_pairs = BadPairs.error
    with pytest.raises(UserError, match=r"x\.jsonl, line 4: .*same 5 tokens"):
        loaded_as_in_the_stage(config, prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "{tmp}/x.jsonl", "hub": "a/b"}, "both set"),
        ({"path": "{tmp}/x.txt"}, "not a .jsonl"),
        ({"path": "{tmp}/absent.jsonl"}, "is not a file"),
        ({"hub": "a/b"}, "''.*not the full hash"),
        ({"hub": "a/b", "revision": "main"}, "'main'.*a branch or tag may move"),
        ({"hub": "a/b", "revision": "a" * 39}, "not the full hash"),
        ({"hub": "{tmp}", "revision": "a" * 40}, "is a path here"),
        ({"revision": "a" * 40}, "hub is empty"),
        ({"hub": "a/b", "revision": "a" * 40, "split": "''"}, "split is empty"),
        ({"limit": "-1"}, "limit: -1 must be 0 or more"),
        ({"bad_pairs": "ignore"}, "bad_pairs"),
    ],
)
def test_settings(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    (tmp_path / "x.jsonl").touch()
    (tmp_path / "x.txt").touch()
    (tmp_path / "r.yaml").write_text("models: {backbone: a/b}\n")
    overrides = [f"preference.data.{key}={value.format(tmp=tmp_path)}" for key, value in settings.items()]
    with pytest.raises(UserError, match=rf"preference\.data\..*{message}") as caught:
        load(tmp_path / "r.yaml", overrides)
    assert "\n" not in str(caught.value)


def test_settings_that_are_right(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").touch()
    (tmp_path / "r.yaml").write_text("models: {backbone: a/b}\n")
    for overrides in (
        [f"path={tmp_path / 'x.parquet'}", "bad_pairs=drop"],
        ["hub=a/b", f"revision={'0f' * 20}"],
    ):
        config = load(tmp_path / "r.yaml", [f"preference.data.{override}" for override in overrides])
        assert config.preference.data.split == "train"
