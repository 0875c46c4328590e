r"""Steps of a completion: where sentences end, what is never cut, lengths, and the characters of each token."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pns.algo.formulas import cuts, wholes
from pns.algo.segments import Segment, segment, sentences, token_offsets
from pns.tiny import world
from small_models import REASONINGS, build_tokenizer

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ["PNS_DATA"]) / "train"

Offsets = list[tuple[int, int]]


def pieces(text: str) -> list[str]:
    return [text[start:end] for start, end in pairwise([0, *sentences(text), len(text)])]


# Sentences, divided by |.
SENTENCES = [
    # Marks, what closes them, white space.
    "One. |Two!  |Three? |Four",
    "He said “Go.” |Then (it is so.) |Next **Done.** |Last",
    '"Why?" he asked. |"Stop!" she said. |End',
    "So three… and four... then. |Wait... |No",
    "A colon: no end; nor a semicolon, nor a comma.",
    "a.b is x.y and www.example.com.",
    # Full stops that end none.
    "It is 3.14 or .5 or 1,000.5. |Then 7.",
    "See e.g. Fig. 2, i.e. the left one, cf. Eq. 3 vs. Eq. 4. |So it is.",
    "Dr. Smith met John F. Kennedy and J. R. Tolkien. |They spoke.",
    "It meets Point A. |Then it turns to B. |It ends.",
    "He ran 5 mi. and 3 ft. more. |It took 3 hr. |Then he slept.",
    "Fruit, nuts, etc. are sold. |So are pears, etc. |All is sold.",
    "No. |It is no. 5 of them.",
    "We have 5! = 120 and (n-1)! ways. |Great! |So 5 is it!",
    # Lists.
    "1. Add. |2. Subtract 3. |Done.",
    "Steps:\n|1. Add\n|2. Divide\n\n|a) So\n|**Step 3.** End",
    # Lines.
    "One\n|Two\r\n\r\n  |Three\n \n|Four\n\n",
    "\n\nOne. \n|Two",
    # Without spaces.
    "我们有三个。|那么“好！”|对吗？|是的。",
    # Formulas.
    "Let $x = 3. Then y$ be. |So $$a. B$$ and \\(a. B\\) and \\[a.\n\n B\\] hold. |End",
    "We get \\[x = 3.\\] |Then $y=2.$ |Next \\(z=1.\\) |So $z.$ holds",
    "As \\[x = 3.\\]|Next $$y = 3.$$|Note \\begin{align}\nz = 3.\n\\end{align}|Now \\[x.\\]holds.",
    "As\n|\\begin{align*}\nx &= 1. \\\\\n\ny &= 2.\n\\begin{align*}\n\\end{align*}\n\\end{align*}\n|we are done",
    "It is \\boxed{4. Or 5}. |And \\text{a {nested. B} group. C} too.",
    "Open $x. |Then a { brace. |Then \\{ another. |End",
    "A cut \\[ x = 1. Then y\n\n|New. |And \\begin{cases} 1. B",
    "She has $5. |He has $10. |They have $15 in all.",
    "5+10=$<<5+10=15>>15. |So 3 * 2=$<<3*2=6>>6. |And \\$5. |Then $x$ is.",
    # Code.
    "Run:\n|```python\nx = 1. \n\ny = 2\n```\n|Done. |Use `a. B` now",
    "[asy]\ndraw(a);\n\ndot(b);\n[/asy]\n|So. |```\nnever closed. Yes",
    # Reasoning.
    "<think>\nOne. |Two.\n|</think>\n\nSo. It is \\boxed{3}.\nYes.",
    "<think>$x. |</think>It is $5. Yes$",
    "<think>\n\n</think>\n\nThe answer. It is 3.",
    "<think>One. |Two",
    "One. |Two. |</think>So. Yes",
]


@pytest.mark.parametrize("marked", SENTENCES)
def test_sentences(marked: str) -> None:
    assert pieces(marked.replace("|", "")) == marked.split("|")


def characters(text: str) -> Offsets:
    return [(index, index + 1) for index in range(len(text))]


def steps(text: str, min_tokens: int, max_tokens: int, offsets: Offsets | None = None) -> list[str]:
    offsets = offsets or characters(text)
    return [text[step.start : step.end] for step in segment(text, offsets, min_tokens, max_tokens)]


@pytest.mark.parametrize(
    ("marked", "min_tokens", "max_tokens"),
    [
        ("One. Two. |Three.", 6, 12),  # joined until there are six
        ("One. |Twelve. |Six. Four.", 6, 12),
        ("It is long. |Ab.", 4, 12),  # a short last one that finds no room
        ("It is so. Ab.", 4, 20),
        ("<think>It is so. |</think>5", 30, 40),  # never joined with the answer
        ("<think>It is so. |</think>The answer is long. Yes.", 1, 20),  # the answer stays whole
        ("One and two; |three, |four five six", 1, 14),  # the last of the strongest
        ("aaa bbb ccc |ddd eee fff", 1, 14),
        ("abcdefgh|ijklmnop", 1, 8),
        ("我们有三，|但是没有四", 1, 6),
        ("So |$a + b + c$| and so", 1, 8),  # a longer formula stays
        ("```\nab cd\n|ef gh\n```", 1, 11),  # code at its lines
    ],
)
def test_lengths(marked: str, min_tokens: int, max_tokens: int) -> None:
    assert steps(marked.replace("|", ""), min_tokens, max_tokens) == marked.split("|")


def test_boundaries_move_to_edges_of_tokens() -> None:
    text = "One. Two.</think>5"
    assert segment(text, [(0, 4), (4, 8), (8, 11), (11, 17), (17, 18), (18, 18)], 1, 9) == [
        Segment(0, 4, 0, 1),  # the space is of the next token
        Segment(4, 8, 1, 2),  # the full stop and half a tag are one token
        Segment(8, 18, 2, 6),
    ]
    # The tokens of one character stay together; what stands before the first token is of the first step.
    assert segment(
        "<think>Yes. 好. No", [(7, 12), (12, 12), (12, 12), (12, 13), (13, 15), (15, 17)], 1, 9
    ) == [Segment(0, 12, 0, 1), Segment(12, 15, 1, 5), Segment(15, 17, 5, 6)]
    # "。$" is one token: the boundary goes before it, not into the formula.
    assert steps("三。$x$ 四", 1, 9, [(0, 1), (1, 3), (3, 4), (4, 5), (5, 7)]) == ["三", "。$x$ 四"]
    assert segment("", [], 1, 9) == []
    assert segment("", [(0, 0)], 1, 9) == [Segment(0, 0, 0, 1)]


def test_any_splitter_is_kept_off_formulas_and_the_answer() -> None:
    def everywhere(text: str) -> list[int]:
        return list(range(1, len(text)))

    text = "<think> a$b c$ d</think> e f"
    found = segment(text, characters(text), 1, 50, everywhere)
    assert [text[step.start : step.end] for step in found] == [
        "<think> a", "$b c$", " d", "</think> e f",
    ]  # fmt: skip


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"steps of 3\.\.2 tokens"):
        segment("a", [(0, 1)], 3, 2)
    with pytest.raises(ValueError, match="beyond the text of 1 characters"):
        segment("a", [(0, 2)], 1, 2)


FRAGMENTS = st.sampled_from(
    [
        "Then we add. ", "So it is! ", "Is it? ", "One", " two,", "; ", "\n", "\r\n", "\n\n", " \n \n", "  ", ". ", "1. ",
        "$x = 3. Then$", "$$a. B$$", "\\(a. B\\)", "\\[x.\n y\\]", "\\begin{align}\nx. Y\n\\end{align}", "\\boxed{4. B}",
        "$5", "\\$", "$", "$$", "{", "}", "\\{", "\\[", "\\)", "\\begin{a}", "```\nx = 1. B\n\ny\n```\n", "```", "`", "[asy]",
        "<think>", "</think>", "👨‍👩‍👧", "🇫🇷. ", "好。", "“对！”", "e\u0301", "\u200d", "\u3000", "\x00", "Fig. 2 ", "J. Doe ", "…",
    ]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS | st.text(max_size=4), max_size=30).map("".join)


@given(TEXTS, st.integers(1, 30), st.integers(0, 40), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_steps_tile_text_and_tokens(text: str, min_tokens: int, more: int, rng: random.Random) -> None:
    ends = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, len(text)))) + [len(text)] * rng.randint(
        1, 3
    )
    offsets = list(pairwise([0, *ends]))
    max_tokens = min_tokens + more
    found = segment(text, offsets, min_tokens, max_tokens)
    assert "".join(text[step.start : step.end] for step in found) == text
    assert [token for step in found for token in range(step.first_token, step.end_token)] == list(
        range(len(offsets))
    )
    parts = wholes(text)
    formulas = [part for part in parts if not part.code]
    for step in found:
        assert step.first_token < step.end_token
        own = offsets[step.first_token : step.end_token]
        assert all(step.start <= start <= end <= step.end for start, end in own)
    answer = text.rfind("</think>")
    # Inside a token the answer's beginning moves to an edge of the token, at most to its end.
    answer_edge = min(edge for edge in (0, *ends) if edge >= answer)
    for step in found[1:]:
        assert not cuts(step.start, formulas) or (answer >= 0 and step.start <= answer_edge)
        assert answer < 0 or step.start <= answer_edge
    fine = segment(text, characters(text), min_tokens, max_tokens)  # every place is an edge
    for step in fine[:-1]:
        assert not cuts(step.end, formulas)
        if step.end - step.start > max_tokens:  # only what nothing but formulas make so long
            inner = range(step.start + 1, step.end)
            free = [place for place in inner if not cuts(place, formulas)]
            assert all(step.end - place > max_tokens or place - step.start > max_tokens for place in free)
    boundaries = sentences(text)
    assert boundaries == sorted(set(boundaries) - {0, len(text)})
    assert not any(cuts(place, parts) for place in boundaries)


@given(st.text("$\\[](){}`.! \nab<", max_size=60))
@settings(max_examples=300, deadline=None)
def test_wholes_are_apart_and_in_order(text: str) -> None:
    found = wholes(text)
    assert all(part.start < part.end <= len(text) for part in found)
    assert all(left.end <= right.start for left, right in pairwise(found))


@pytest.mark.parametrize(
    "unit", ["$", "\\[", "{", "...", ". ", "\n", "\\begin{a}", "```", "$5 ", "</think>", "a", "!)"]
)
def test_a_degenerate_text_costs_no_more(unit: str) -> None:
    text = unit * (40_000 // len(unit))
    found = segment(text, characters(text), 30, 200)
    assert found[-1].end == len(text)


# The characters of tokens.


def metaspace(model: Any, *, strip: bool) -> PreTrainedTokenizerFast:
    """As SentencePiece models are converted: spaces are ▁, bytes stand for unknown characters."""
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(chain + [decoders.Strip(" ", 1, 0)] * strip)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(REASONINGS * 3, trainer)
    scored = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    scored += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    return metaspace(models.Unigram(scored, 0, byte_fallback=True), strip=True)


def byte_fallback_pairs() -> PreTrainedTokenizerFast:
    words = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abdehinorstwxy.=13",
        "th",
        "the",
    ]
    vocabulary = {word: index for index, word in enumerate([*words, "▁the"])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return metaspace(model, strip=False)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: build_tokenizer(list(REASONINGS), ["<eos>"], ["<think>", "</think>"], eos_token="<eos>"),
    "bytes, spaces cleaned": lambda: build_tokenizer(
        list(REASONINGS),
        ["<eos>"],
        eos_token="<eos>",
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    ),
    "unigram": unigram,
    "pairs with byte fallback": byte_fallback_pairs,
    "tiny qwen2": lambda: AutoTokenizer.from_pretrained(ROOT / "recipes/tiny/qwen2"),
    "tiny llama": lambda: AutoTokenizer.from_pretrained(ROOT / "recipes/tiny/llama"),
}
SAMPLES = (
    *REASONINGS,
    "你好，世界。 👨‍👩‍👧 naïve \r\n\r\n it's fine , we do not know . \ufffd end",
    "  two spaces\n\n\nthree lines",
    "x" * 40 + "👨‍👩‍👧" * 20 + " the end." * 20,
    "",
    "<think>Bob has 3+4=7. </think>\\boxed{7}",
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_offsets_are_those_of_decoding_each_beginning(name: str) -> None:
    tokenizer = TOKENIZERS[name]()

    def decode(token_ids: Sequence[int]) -> str:
        return "<think>" + str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

    rng = random.Random(0)
    end = tokenizer.eos_token_id
    completions = [[*tokenizer.encode(sample, add_special_tokens=False), end, end] for sample in SAMPLES]
    completions += [rng.choices(range(len(tokenizer)), k=rng.randint(0, 70)) for _ in range(60)]
    for token_ids in completions:
        text = decode(token_ids)
        written = 7
        expected = []
        for index in range(len(token_ids)):
            now = len(os.path.commonprefix([decode(token_ids[: index + 1]), text]))  # noqa: RUF071
            expected.append((written, max(written, now)))
            written = max(written, now)
        assert token_offsets(token_ids, decode, text) == expected


def test_a_character_is_of_the_token_that_completes_it() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    ids = tokenizer.encode("a好", add_special_tokens=False)
    assert token_offsets(ids, tokenizer.decode, "a好") == [(0, 1), (1, 1), (1, 1), (1, 2)]


def test_ids_of_another_text() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    ids = tokenizer.encode("Half of them. " * 50, add_special_tokens=False)
    for text in ("Half of it.", "Half of them. " * 51, "Half of them. " * 49, ""):
        with pytest.raises(ValueError, match="do not decode to the text: they differ at character"):
            token_offsets(ids, tokenizer.decode, text)


# Whole completions.


def assert_round_trip(tokenizer: Any, text: str, min_tokens: int, max_tokens: int) -> list[Segment]:
    """The steps of a completion, after encoding and decoding."""
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

    found = segment(text, token_offsets(ids, decode, text), min_tokens, max_tokens)
    assert "".join(text[step.start : step.end] for step in found) == text
    assert "".join(decode(ids[step.first_token : step.end_token]) for step in found) == text
    assert [found[0].first_token, *(step.end_token for step in found)] == [
        *(step.first_token for step in found),
        len(ids),
    ]
    return found


def test_steps_of_the_tiny_world_are_the_checkers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/tiny/qwen2")
    rng = random.Random(0)
    count = 0
    for problem in world.problems("train", None, 300, seed=0):
        for kind in (None, rng.choice(["arithmetic", "operator", "entity", "missing", "order", "answer"])):
            text = world.corrupt(problem, rng, kind) if kind else world.random_solution(problem, rng)
            check = world.check(problem, text)
            if not check.format_ok:  # what stands in where the problem admits no such error
                continue
            count += 1
            found = assert_round_trip(tokenizer, text, 1, 40)
            assert [(step.start or len("<think>"), step.end) for step in found[:-1]] == [
                (step.start, step.end) for step in check.steps
            ]
            assert text[found[-1].start :].removeprefix("<think>").startswith("</think>\\boxed{")
    assert count > 590


def solutions(name: str, limit: int) -> Iterator[str]:
    path = DATA / name
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for line in content.decode("utf-8").split("\n")[:limit]:
        yield json.loads(line)["solution"]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no training problems in {DATA} (set PNS_DATA)")
def test_real_solutions_are_their_steps() -> None:
    """Solutions of GSM8K and MATH, in the form of a reasoning model's completion."""
    texts = [*solutions("gsm8k_train.jsonl", 500), *solutions("math_train.jsonl.gz", 500)]
    tokenizer = build_tokenizer(texts, ["<eos>"], ["<think>", "</think>"], eos_token="<eos>")
    lengths = []
    for text in texts:
        # The tokenizer normalises text.
        text = tokenizer.decode(
            tokenizer.encode(f"<think>\n{text}\n</think>\n\nSo it is $x$.", add_special_tokens=False)
        )
        found = assert_round_trip(tokenizer, text, 30, 200)
        formulas = [part for part in wholes(text) if not part.code]
        assert not any(cuts(step.end, formulas) for step in found)
        assert text[found[-1].start :] == "</think>\n\nSo it is $x$."
        lengths += [step.end_token - step.first_token for step in found[:-1]]
    assert len(texts) == 1000
    assert sum(30 <= length <= 200 for length in lengths) > 0.9 * len(lengths)
