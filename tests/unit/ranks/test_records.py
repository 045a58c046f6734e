"""What is compared between ranks: every option, what computes, what the sets hold and the first weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lowrank_vit.config.flags import parse
from lowrank_vit.config.option_types import is_per_rank, leaves
from lowrank_vit.config.options import Config, Run
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.datasets import DataOptions, open_datasets
from lowrank_vit.ranks import records
from lowrank_vit.ranks.agree import _verdict, differences
from lowrank_vit.ranks.records import data_record, run_record

CPU = torch.device("cpu")


def compared(ours: Config, theirs: Config) -> str:
    return differences(run_record(ours, CPU), run_record(theirs, CPU))


@dataclass(frozen=True)
class RunWithMore(Run):
    """The options of a later version."""

    nobody_has_heard_of: float = 0.5


def test_a_new_option_is_compared_without_anybodys_doing():
    def config(value: float) -> Config:
        older = Config()
        known = {option.name: getattr(older.run, option.name) for option in fields(Run)}
        return replace(older, run=RunWithMore(**known, nobody_has_heard_of=value))

    assert compared(config(0.5), config(0.5)) == ""
    assert compared(config(0.5), config(0.25)) == "--nobody-has-heard-of is 0.5, there 0.25"


def test_options_are_told_by_their_flags_with_both_values():
    assert compared(parse(["--lr", "0.1", "-b", "16"]), parse(["--grad-accum-steps", "2", "--opt", "adamw"])) == (
        "--batch-size is 16, there 128; --opt is sgd, there adamw; --lr is 0.1, there None; "
        "--grad-accum-steps is 1, there 2"
    )
    assert compared(parse(["--scale", "0.1", "1"]), parse([])) == "--scale is 0.1 1.0, there 0.08 1.0"


def test_what_belongs_to_a_node_may_differ():
    """And nothing else: whoever adds an option to these must know that no update follows from it."""
    own = "data-dir beton-dir stage-dir workers prefetch hw-decoder-load pretrained-path initial-checkpoint device"
    own += " compile-cache spec-cpu-threads"
    assert [name for name, hint, _ in leaves(Config()) if is_per_rank(hint)] == own.split()
    ours, theirs = parse(["--data-dir", "/a", "-j", "8", "--stage-dir", "/tmp/1"]), parse(["--data-dir", "/b"])
    assert compared(ours, theirs) == ""


def test_versions_code_and_device_are_compared(monkeypatch, tmp_path):
    before = run_record(Config(), CPU)
    monkeypatch.setattr(records.metadata, "version", lambda name: "9.9")
    assert "timm is 9.9, there " in differences(run_record(Config(), CPU), before)
    monkeypatch.undo()
    assert differences(run_record(Config(), torch.device("cuda")), before) == "the device is cuda, there cpu"
    (tmp_path / "changed.py").write_text("")
    monkeypatch.setattr(records.data_prep, "__file__", str(tmp_path / "__init__.py"))
    assert differences(run_record(Config(), CPU), before).startswith("the code (/")


def folders(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
                image.save(root / split / name / f"{n}.png")
    return root


def sets_in(root: Path) -> dict[str, Beton]:
    train, val, _ = open_datasets(DataOptions(data_dir=root), None, say=lambda line: None)
    return {"training set": train, "validation set": val}


def replace_a_picture(root: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(root / "train" / "cat" / "3.png")


def lose_a_picture(root: Path) -> None:
    (root / "val" / "dog" / "1.png").unlink()


def swap_the_classes(root: Path) -> None:
    for split in ("train", "val"):
        for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
            (root / split / old).rename(root / split / new)


def rename_a_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "dog").rename(root / split / "emu")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda root: None, ""),
        (replace_a_picture, "other images in the training set ("),
        (lose_a_picture, "the number of images of the validation set is 3, there 4; other labels in the validation"),
        (swap_the_classes, "other images in the training set ("),
        (rename_a_class, "other classes in the training set ("),
    ],
)
def test_other_content_of_a_set_is_told(tmp_path, change, told):
    ours, theirs = folders(tmp_path / "ours"), folders(tmp_path / "theirs")
    change(ours)
    model = nn.Linear(2, 2)
    found = differences(data_record(sets_in(ours), model), data_record(sets_in(theirs), model))
    assert found.startswith(told)
    assert bool(found) == bool(told)
    assert not told or f"{tmp_path}/ours" in found or "images of" in told


@pytest.mark.parametrize("whole", [1 << 26, 100])
def test_a_changed_image_without_a_manifest_is_told_where_it_is_read(tmp_path, monkeypatch, whole):
    """Of a large set only some images are read."""
    monkeypatch.setattr(records, "_READ_BYTES", whole)
    path = next(beton.path for beton in sets_in(folders(tmp_path)).values())
    path.with_name(path.name + ".json").unlink()
    before, first = records._fingerprint(Beton(path)), Beton(path)
    content = bytearray(path.read_bytes())
    content[int(first.pointers[0]) + 5] ^= 1
    path.with_name("other.beton").write_bytes(content)
    assert records._fingerprint(Beton(path)) == before
    assert records._fingerprint(Beton(path.with_name("other.beton"))) != before


def test_other_first_weights_are_told():
    torch.manual_seed(0)
    one, other = nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16)
    assert differences(data_record({}, one), data_record({}, one)) == ""
    found = differences(data_record({}, one), data_record({}, other))
    assert re.fullmatch(r"other weights to begin with \(of the model, drawn by the CPU's \w+ code\)", found)


def test_cpus_that_draw_other_weights_are_told_with_the_way_out(monkeypatch):
    """And where both draw the same, nothing is."""
    torch.manual_seed(0)
    one, other, kinds = nn.Linear(2, 2), nn.Linear(2, 2), ("AVX2", "DEFAULT")

    def told(*models: nn.Module) -> tuple[int, str] | None:
        ranks = []
        for kind, model in zip(kinds, models, strict=True):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda kind=kind: kind)
            ranks.append({"host": f"with {kind}", "record": data_record({}, model)})
        return _verdict(ranks)

    assert told(one, one) is None
    verdict = told(one, other)
    assert verdict is not None
    assert (
        "(of the model, drawn by the CPU's DEFAULT code, there of the model, drawn by the CPU's AVX2 code)"
        in verdict[1]
    )
    assert "ATEN_CPU_CAPABILITY=default on all nodes, or begin with weights from a file, --initial-ch" in verdict[1]
