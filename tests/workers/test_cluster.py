from __future__ import annotations

import pytest
import ray
import torch

from pns.config import Config, Device, Placement
from pns.errors import UserError
from workers.cluster import Cluster


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_placement_that_cannot_be_met_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    running = ray.is_initialized()
    config = Config(placement=Placement(device=Device.cuda))
    with pytest.raises(UserError, match="the cluster offers no GPU"), Cluster(config, ["rollout"]):
        pass
    assert ray.is_initialized() == running
