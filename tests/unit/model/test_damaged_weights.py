"""Files of weights that are damaged or hold code: refused, and no code in them is run."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_vit import analyze_spectrum
from lowrank_vit.common.errors import UserError
from lowrank_vit.model.weight_files import SUFFIXES
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.run.checkpoints import write_checkpoint
from lowrank_vit.score.scorer import ModelOptions, load_scorer
from tests.unit.model.small_vit import NAME, OWN, same

CPU = torch.device("cpu")


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", ["posix.mkdir", "eval", "numpy.dtype"])
def test_code_in_a_file_is_named_and_not_run(tmp_path, name, is_zip):
    path, mark = tmp_path / "w.pth", tmp_path / "was-run"
    call = {
        "posix.mkdir": Runs(os.mkdir, str(mark)),
        "eval": Runs(eval, f"open({str(mark)!r}, 'w')"),
        "numpy.dtype": Runs(np.dtype, "O"),  # a type of numbers is all that is taken of it
    }[name]
    torch.save({"model": OWN, "args": call}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match=r"--initial-checkpoint .*w.pth cannot be read: it .*") as caught:
        read_checkpoint(path, "--initial-checkpoint")
    assert name in str(caught.value) or name == "numpy.dtype"
    assert not mark.exists()
    with pytest.raises(UserError, match=r"w.pth cannot be read"):
        load_scorer(ModelOptions(path, model=NAME), CPU)
    with pytest.raises(UserError, match=r"w.pth cannot be read"):
        analyze_spectrum.main(["--checkpoint", str(path), "--save-dir", str(tmp_path)])
    assert not mark.exists()


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "last.pth.tar"
    write_checkpoint(path, {"state_dict": {"w": torch.zeros(1000)}})
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"last\.pth\.tar cannot be read"):
            read_checkpoint(path)


def flipped(path: Path, whole: bytes, bit: int) -> None:
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)


def test_a_flipped_bit_anywhere_changes_nothing_or_is_told(tmp_path):
    """No checksum is compared by torch itself."""
    path, numbers = tmp_path / "last.pth.tar", torch.arange(6.0)
    write_checkpoint(path, {"state_dict": {"w": numbers, "b": numbers[:2]}, "epoch": 4, "args": {"lr": 0.1}})
    whole, told = path.read_bytes(), 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 250):
        flipped(path, whole, bit)
        try:
            found = read_checkpoint(path)
        except UserError:
            told += 1
        else:
            assert (found.epoch, found.args, list(found.content)) == (4, {"lr": 0.1}, ["epoch", "args", "state_dict"])
            assert same(found.weights(use_ema=False), {"w": numbers, "b": numbers[:2]}), bit
    assert told > 100  # the others are in names and padding that nothing reads
    start = whole.find(numbers.numpy().tobytes())
    flipped(path, whole, 8 * start + 40)
    with pytest.raises(UserError, match=r"the checksum of its part `archive/data/0` is wrong"):
        read_checkpoint(path)


def test_no_member_is_taken_for_a_folder(tmp_path):
    """Of one that is marked as a folder torch gives memory as it finds it."""
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"w": torch.ones(2)}}, path)
    whole = path.read_bytes()
    for entry in range(len(whole)):
        if whole[entry : entry + 4] == b"PK\x01\x02" and b"data/0" in whole[entry : entry + 64]:
            flipped(path, whole, 8 * (entry + 38) + 4)
            with pytest.raises(UserError, match=r"its part `w/data/0`"):
                read_checkpoint(path)


def test_an_archive_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(OWN, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_checkpoint(tmp_path / "w.pth").weights(use_ema=False), OWN)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04damaged"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"--pretrained-path .*w\{suffix} cannot be read: it is damaged"):
        read_checkpoint(path, "--pretrained-path")
