"""Segment any Text (SaT, arXiv 2406.16678) as a splitter of completions; its library is the extra `sat`."""

import json
import logging
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pns.algo.segments import Splitter
from pns.errors import UserError

KEY = "bcpg.segments.sat_model"
_MODEL_TYPE = "xlm-token"
_LINE_END = re.compile(r"[\r\n]\s*+")
_SPACE = re.compile(r"\s*+")


def sat_splitter(model_path: str, threshold: float = 0.25) -> Splitter:
    """The splitter of a SaT model: a directory with its `config.json` and weights, and beside them the
    `tokenizer.json` and `tokenizer_config.json` of its tokenizer, XLM-RoBERTa's. It runs on the CPU.

    A boundary is where the model gives more than `threshold` (0.25 is the library's for the models sat-*-sm;
    it takes 0.025 for the others), and at every line end, as in the library.
    `pns.algo.segments.segment` keeps boundaries off formulas, as it does for any splitter. Raises UserError
    where the directory is no such model or the library is missing."""
    directory = Path(model_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise UserError(
                f"{KEY}: {model_path} has no {name}: name the directory of a Segment-any-Text model with its "
                "tokenizer (that of xlm-roberta-base) in it"
            )
    found = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    if found != _MODEL_TYPE:
        raise UserError(
            f"{KEY}: {model_path} is a model of type {found}: name one of {_MODEL_TYPE} (Segment any Text)"
        )
    if find_spec("wtpsplit") is None:
        raise UserError(
            "bcpg.segments.splitter: sat needs the library wtpsplit: pip install 'pns[sat]', or set "
            "bcpg.segments.splitter=sentences"
        )
    # wtpsplit loads skops, which looks at every name of the loaded modules; transformers warns of each.
    warner = logging.getLogger("transformers")
    level = warner.level
    warner.setLevel(logging.ERROR)
    try:
        from wtpsplit import SaT

        model = SaT(model_path, tokenizer_name_or_path=model_path)
    finally:
        warner.setLevel(level)

    def split(text: str) -> list[int]:
        if not text.strip():
            return []
        last_characters = np.flatnonzero(model.predict_proba(text) > threshold)
        line_ends = {match.end() for match in _LINE_END.finditer(text)}
        ends = {_behind_space(text, int(last) + 1) for last in last_characters}
        return sorted((ends | line_ends) - {0, len(text)})

    return split


def _behind_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None, "it matches nothing, too"
    return match.end()
