"""Which device a flag means, alone and as one of several processes."""

from __future__ import annotations

import pytest
import torch

from lowrank_vit.common.devices import pick_device
from lowrank_vit.common.errors import UserError


@pytest.mark.parametrize(
    ("name", "local_rank", "index"), [("cuda", None, 0), ("cuda:1", None, 1), ("cuda:1", "2", 2), ("cuda", "3", 3)]
)
def test_which_gpu(name, local_rank, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert pick_device(name, int(local_rank or 0)) == torch.device("cuda", index)
    with (
        pytest.raises(UserError, match="--device cuda:7: there is no GPU left, torch sees 4")
        if not local_rank
        else (pytest.raises(UserError, match="process 8 of this machine has no GPU left"))
    ):
        pick_device("cuda:7", 7 if local_rank else 0)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:-1", "cpu:0"])
def test_devices_that_are_not_known(name):
    with pytest.raises(UserError, match=f"--device takes .*, not `{name}`"):
        pick_device(name)
