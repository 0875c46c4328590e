"""What can be wrong with models, before anything starts."""

from __future__ import annotations

import pytest

from pns.config import Config, Endpoint, Models, RewardConfig, RewardTerm, TermKind
from pns.errors import UserError
from pns.preflight import check_models


def test_the_model_behind_an_endpoint_is_a_name_there_and_no_directory() -> None:
    def config(url: str) -> Config:
        judge = RewardTerm(TermKind.judge, 0.5, model="grader", endpoint=Endpoint(url=url))
        return Config(models=Models(backbone="owner/name"), reward=RewardConfig(terms={"coherence": judge}))

    check_models(config("http://host:8000/v1"), ["reverse_rl"])
    with pytest.raises(UserError, match=r"reward\.terms\.coherence\.model: grader is neither a directory"):
        check_models(config(""), ["reverse_rl"])
