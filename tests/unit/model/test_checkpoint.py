"""Checkpoints appear whole or not at all."""

from __future__ import annotations

import argparse

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.checkpoint import read_checkpoint
from lowrank_vit.run.checkpoint_writer import write_checkpoint


def test_round_trip(tmp_path):
    content = {"state_dict": {"w": torch.arange(3.0)}, "arch": "m", "epoch": 4, "args": {"lr": 0.1}}
    write_checkpoint(tmp_path / "last.pth.tar", content)
    checkpoint = read_checkpoint(tmp_path / "last.pth.tar")
    assert (checkpoint.arch, checkpoint.epoch, checkpoint.args) == ("m", 4, {"lr": 0.1})
    assert torch.equal(checkpoint.weights(use_ema=False)["w"], torch.arange(3.0))
    with pytest.raises(UserError, match="holds no EMA"):
        checkpoint.weights(use_ema=True)
    with pytest.raises(UserError, match="lacks `optimizer`"):
        checkpoint.training_state("optimizer")


def test_a_bare_state_dict_is_a_checkpoint_too(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "bare.pth")
    assert list(read_checkpoint(tmp_path / "bare.pth").weights(use_ema=False)) == ["w"]


def test_a_checkpoint_of_timms_is_read(tmp_path):
    """It has its arguments as a Namespace."""
    args = argparse.Namespace(model="vit_tiny_patch16_224", lr=0.1)
    torch.save(
        {"state_dict": {"w": torch.zeros(2)}, "arch": "vit_tiny_patch16_224", "args": args}, tmp_path / "t.pth.tar"
    )
    checkpoint = read_checkpoint(tmp_path / "t.pth.tar")
    assert checkpoint.arch == "vit_tiny_patch16_224"
    assert checkpoint.args == {}  # other names than ours


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "last.pth.tar"
    write_checkpoint(path, {"state_dict": {"w": torch.zeros(1000)}})
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"last\.pth\.tar cannot be read"):
            read_checkpoint(path)
