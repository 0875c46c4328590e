"""Segment any Text as a splitter: what is asked of the model's directory, and a model of random weights where
the library is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pns.algo.formulas import cuts, wholes
from pns.algo.segments import segment
from pns.data.sat import sat_splitter
from pns.errors import UserError

TEXT = "We add 3.14 and 2. Then $x = 3. So y$ holds.\nIt is \\boxed{4. 5} now. "
needs_library = pytest.mark.skipif(find_spec("wtpsplit") is None, reason="needs the extra sat")


def write_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """As XLM-RoBERTa's: Unigram over ▁, a token at the beginning and one at the end."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    tokens = dict(zip(names, special, strict=True)) | {"cls_token": "<s>", "sep_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.save_pretrained(directory)
    return tokenizer


def test_a_directory_that_is_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"bcpg\.segments\.sat_model: .* has no config\.json: name the directory"
    ):
        sat_splitter(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        sat_splitter(str(tmp_path))
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match="is a model of type bert: name one of xlm-token"):
        sat_splitter(str(tmp_path))


@pytest.mark.skipif(find_spec("wtpsplit") is not None, reason="the extra sat is installed")
def test_without_the_library(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlm-token"}))
    with pytest.raises(UserError, match=r"needs the library wtpsplit: pip install 'pns\[sat\]', or set"):
        sat_splitter(str(tmp_path))


@needs_library
def test_a_model_splits_and_formulas_stay(tmp_path: Path) -> None:
    import torch
    from wtpsplit.configs import SubwordXLMConfig
    from wtpsplit.models import SubwordXLMForTokenClassification

    tokenizer = write_tokenizer(tmp_path)
    config = SubwordXLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=514,
        num_labels=1,
        pad_token_id=1,
        type_vocab_size=1,
        lookahead=48,
    )
    torch.manual_seed(0)
    model = SubwordXLMForTokenClassification(config)
    with torch.no_grad():
        model.classifier.weight.normal_(0, 3)  # probabilities on both sides of the threshold
    model.save_pretrained(tmp_path)

    split = sat_splitter(str(tmp_path))
    text = TEXT * 20
    boundaries = split(text)
    assert boundaries == sorted(set(boundaries) - {0, len(text)})
    assert split(text) == boundaries
    assert {place + 1 for place, character in enumerate(text) if character == "\n"} <= set(boundaries)
    assert len(boundaries) > 40
    assert split("") == split(" \n ") == []
    offsets = [(place, place + 1) for place in range(len(text))]
    found = segment(text, offsets, 1, 200, split)
    parts = wholes(text)
    assert 20 < len(found) < len(boundaries) + 1
    assert "".join(text[step.start : step.end] for step in found) == text
    assert not any(cuts(step.end, parts) for step in found)
