"""Of the ranks that share folders one looks at what is there, makes what is not, and tells the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.forked import Forked, torchrun
from tests.rows import photos, write_shards
from tests.sources import write_archive, write_splits
from tests.waiting import LONG_S

PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from data_prep.formats.image_formats import image_suffixes
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.sets import staging
from lowrank_vit.data.sets.datasets import DataOptions, locate_validation, open_datasets
from lowrank_vit.ranks.agree import once
from lowrank_vit.ranks.joining import environment_world, joined

world, (out, dataset, folder) = environment_world(), sys.argv[1:]
looked, copied = [], []
suffixes = (*image_suffixes(), ".tar", ".tar.gz", "temple", "flower")

def counted(call):
    def counting(path, *given, **named):
        if str(path).endswith(suffixes) and ".lowrank_vit" not in str(path):
            looked.append(str(path))
        return call(path, *given, **named)
    return counting

def attempt():
    looked.clear(), copied.clear()
    say = print if world.is_first else lambda line: None
    options, fast = DataOptions(dataset, Path(folder)), Path(out) / "fast"
    try:
        train, val, count = open_datasets(options, None, fast, say, one_of=one_of)
        alone = locate_validation(None, options, say, fast, one_of)
        told = [str(train.path), str(val.path), train.num_samples, count, str(alone)]
    except UserError as error:
        told = [str(error), *getattr(error, "__notes__", ())]
    world.wait_for_all()
    return [told, len(looked), sorted(copied)]

os.stat, os.scandir = counted(os.stat), counted(os.scandir)
copy = staging._copy_set
staging._copy_set = lambda one, advance: (copied.append(one.beton.stem), copy(one, advance))
with joined(world, torch.device("cpu")):
    one_of = once(world, "sets", "opening the data")
    found = [attempt(), attempt()]
    for bad in Path(folder).glob("train/temple/0[34].jpg") if world.is_first else ():
        bad.write_bytes(b"no image")
    world.wait_for_all()
    (Path(out) / str(world.rank)).write_text(json.dumps([*found, attempt()]))
"""


def folders(root: Path) -> str:
    write_splits(root)
    return ""


def rows(root: Path) -> str:
    some = photos(root.parent / "photos")
    for split in ("train", "val"):
        write_shards(root, some, name=f"x-{split}")
    return "wds/"


def cifar(root: Path) -> str:
    write_archive(root)
    return "torch/cifar100"


@pytest.mark.parametrize("kind", [folders, rows, cifar])
def test_one_rank_looks_at_the_source_converts_and_copies(kind, tmp_path):
    """Three ranks open the sets, open them again, and then meet images that are damaged: all in the same words."""
    dataset = kind(tmp_path / "data")
    (tmp_path / "program.py").write_text(PROGRAM)
    program = [str(tmp_path / "program.py"), str(tmp_path), dataset, str(tmp_path / "data")]
    process = Forked(torchrun, "--nproc-per-node=3", "--run-path", *program)
    _, err = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, err
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    for attempt, (first, *others) in enumerate(zip(*found, strict=True)):
        assert [told for told, _, _ in others] == [first[0]] * 2
        assert [rest for _, *rest in others] == [[0, []]] * 2
        assert first[1] > 0
        assert first[2] == ([Path(told).stem for told in first[0][:2]] if attempt == 0 else [])
        if kind is folders and attempt == 2:
            assert "2 of 24 images cannot be converted" in first[0][0]
        else:
            assert first[0][2:4] == found[0][0][0][2:4]
