"""What a stranger may type to `compress`, and what is told of it before anything is read."""

from __future__ import annotations

import pytest

from lowrank_vit import compress
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.command_line import read_options
from lowrank_vit.lowrank.options import METHODS, CompressOptions


def options(line: str) -> CompressOptions:
    return read_options(CompressOptions, line.split(), "compress")


def test_defaults_are_all_methods_and_five_budgets():
    curve = options("c.pth --data d")
    curve.check()
    assert (curve.methods, curve.allocations, curve.budgets) == (METHODS, ("greedy",), (0.5, 0.3, 0.2, 0.12, 0.08))
    one = options("c.pth --data d --budget 0.2 --save s.pth")
    one.check()
    assert (one.methods, one.budgets) == (("kfac",), (0.2,))


def test_a_list_before_the_checkpoint_and_values_that_come_twice():
    curve = options("--data d --method svd kfac svd --budgets 0.1 0.4 0.1 --ranks energy uniform c.pth")
    assert (str(curve.source.checkpoint), curve.methods) == ("c.pth", ("svd", "kfac"))
    assert (curve.budgets, curve.allocations) == ((0.4, 0.1), ("energy", "uniform"))


def test_only_svd_that_is_saved_needs_no_data():
    options("c.pth --budget 0.2 --method svd --save s.pth").check()
    options("c.pth --budget 0.2 --method svd --merge s.pth").check()
    for line in ("c.pth", "c.pth --method svd", "c.pth --budget 0.2 --save s.pth", "c.pth --out o"):
        with pytest.raises(UserError, match="--data DIR is missing"):
            options(line).check()


@pytest.mark.parametrize(
    "flag",
    [
        "--out o",
        "--measure-layers",
        "--calibration-images 8",
        "--sequential",
        "--dataset digits",
        "--val-split test",
        "--trust-labels",
        "-b 4",
        "--loader ffcv",
    ],
)
def test_a_flag_about_images_is_refused_without_them(flag):
    with pytest.raises(UserError, match=r"^--[a-z-]+ needs images: add --data DIR"):
        options(f"c.pth --budget 0.2 --method svd --save s.pth {flag}").check()


def test_one_file_by_two_names_is_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.pth").symlink_to("s.pth")
    for other in (tmp_path / "s.pth", "./s.pth", "folder/../s.pth", "link.pth"):
        with pytest.raises(UserError, match="Give two different files"):
            options(f"c.pth --data d --budget 0.2 --save s.pth --merge {other}").check()
    options("c.pth --data d --budget 0.2 --save s.pth --merge folder/s.pth").check()


WRONG = {
    "--budget 0.2": "makes one checkpoint: add --save FILE",
    "--budget 0.2 --out o": "add --save FILE",
    "--save s.pth": "The size of s.pth is missing",
    "--merge s.pth --budgets 0.2": "The size of s.pth is missing",
    "--budget 0.2 --save s.pth --method svd kfac": "give one --method, not svd, kfac",
    "--budget 0.2 --save s.pth --ranks greedy uniform": "give one --ranks, not greedy, uniform",
    "--budget 0.2 --save s.pth --budgets 0.3": "Leave one of them out",
    "--budget 0.2 --save s.json": "s.json does not end like a checkpoint",
    "--budget 0.2 --save s.pth --merge s.pth": "Give two different files",
    "--budget 1.5 --save s.pth": "--budget takes a number above 0, up to 1, not `1.5`",
    "--budget nan --save s.pth": "--budget takes",
    "--budgets 0.5 0": "--budgets takes",
    "--budgets": "--budgets takes numbers above 0, up to 1, and none is given",
    "--ranks": "--ranks needs a value",
    "--method": "--method needs a value",
    "--measure-layers": "--measure-layers only writes to files: add --out DIR",
    "--calibration-images 0": "--calibration-images takes a whole number of at least 1",
    "--ranks best": "--ranks takes one of uniform, energy, greedy, not `best`",
    "--by size": "--by takes one of params, flops, not `size`",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_names_the_flag(line):
    with pytest.raises(UserError) as caught:
        compress.main(["c.pth", "--data", "d", *line.split()])
    assert WRONG[line] in str(caught.value)
