"""Checkpoints appear whole or not at all."""

from __future__ import annotations

import argparse
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.checkpoint import read_checkpoint, write_checkpoint


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


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pth.tar"
    write_checkpoint(path, {"state_dict": {"w": torch.zeros(2)}})
    before = path.read_bytes()
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old_limit[1]))
    try:
        with pytest.raises(UserError, match=r"last.pth.tar cannot be written: File too large\. The older"):
            write_checkpoint(path, {"state_dict": {"w": torch.zeros(1_000_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth.tar"]


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "last.pth.tar"
    write_checkpoint(path, {"state_dict": {"w": torch.zeros(1000)}})
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"last\.pth\.tar cannot be read"):
            read_checkpoint(path)


def test_a_full_disk_is_named(tmp_path):
    """A real one: a file system in memory, which takes the rights to mount it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        path = tmp_path / "last.pth.tar"
        write_checkpoint(path, {"state_dict": {"w": torch.zeros(2)}})
        with pytest.raises(UserError, match=r"cannot be written: No space left on device\. The older last.pth.tar is"):
            write_checkpoint(path, {"state_dict": {"w": torch.zeros(1_000_000)}})
        assert [p.name for p in tmp_path.iterdir()] == ["last.pth.tar"]
        assert len(read_checkpoint(path).content["state_dict"]["w"]) == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_killed_in_the_middle_of_writing_the_old_file_is_there(tmp_path):
    code = f"""
import os, pathlib, signal, torch
from lowrank_vit.model import checkpoint
path = pathlib.Path({str(tmp_path)!r}) / "last.pth.tar"
checkpoint.write_checkpoint(path, {{"state_dict": {{"w": torch.ones(3)}}}})
write = checkpoint._Output.write
def and_die(self, data):
    written = write(self, data)
    if self._file.tell() > 100_000:
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return written
checkpoint._Output.write = and_die
checkpoint.write_checkpoint(path, {{"state_dict": {{"w": torch.zeros(1_000_000)}}}})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (unfinished,) = tmp_path.glob(".*.part")
    assert unfinished.stat().st_size > 100_000
    assert torch.equal(read_checkpoint(tmp_path / "last.pth.tar").content["state_dict"]["w"], torch.ones(3))
