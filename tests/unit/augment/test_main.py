"""The preview shows what training would see."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank_vit.augment.__main__ import main
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.numba_code import NOTE
from lowrank_vit.plan.operations import parse_policy
from lowrank_vit.report.augment_preview import LEVELS, by_level, caption
from tests.unit.augment.test_pipeline import photographs


def test_the_grid_has_every_operation_of_the_policy_at_every_level():
    image = photographs(1, 48)[0]
    policy = parse_policy("rand-m9-inc1")
    assert policy is not None
    grid = by_level(image, policy, np.array([1, 2, 3], np.uint8))
    assert list(grid) == [row[0].name for row in policy.rows]
    assert all(images.shape == (len(LEVELS), 48, 48, 3) for images in grid.values())
    for name in ("Rotate", "SolarizeIncreasing", "ColorIncreasing", "TranslateXRel"):  # nothing at level 0
        assert np.array_equal(grid[name][0], image)
        assert not np.array_equal(grid[name][-1], image)
    assert not grid["PosterizeIncreasing"][-1].any()
    assert np.array_equal(grid["Invert"][3], 255 - image)


def test_captions_name_the_shares():
    classes = ["cat", "dog", "fox"]
    smooth = 0.1 / 3
    assert caption(np.array([0.9 + smooth, smooth, smooth]), 0.1, classes) == "cat"
    assert caption(np.array([0.27 + smooth, 0.63 + smooth, smooth]), 0.1, classes) == "dog 0.70 + cat 0.30"


def test_a_picture_of_the_users_data(digits_dir, tmp_path, capsys):
    path = tmp_path / "new" / "p.png"
    flags = "--aa rand-m9-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1 --img-size 32 --batch-size 6"
    main(["--preview", str(path), "--data-dir", str(digits_dir), *flags.split()])
    picture = Image.open(io.BytesIO(path.read_bytes()))
    assert min(picture.size) > 600
    said = capsys.readouterr().out.splitlines()  # of compiling, too, where this is the first call on a machine
    assert [line for line in said if line != NOTE] == [f"wrote {path}"]
    first = path.read_bytes()
    torch.manual_seed(1)
    main([f"--preview={path}", "--data-dir", str(digits_dir), *flags.split()])
    assert path.read_bytes() == first


def test_photographs_where_there_is_no_data(tmp_path):
    main(["--preview", str(tmp_path / "p.png"), "--data-dir", str(tmp_path), "--img-size", "32", "--aa", "3a"])
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--aa", "3a"], "--preview FILE.png is missing"),
        (["--preview", "p.jpg"], r"p\.jpg does not end in \.png"),
        (["--preview", "p.png", "--aa", "augmix"], "`augmix` is not known"),
        (["--preview", "p.png", "--reprob", "2"], "--reprob takes a number from 0 to 1, not `2`"),
        (["--preview", "/proc/p.png", "--img-size", "16"], "cannot be written"),
    ],
)
def test_errors(argv, message, sketched):
    with pytest.raises(UserError, match=message):
        main(argv)


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--foo", "--foo is not an option"),
        ("--preview --foo", "--foo is not an option"),
        ("--foo --preview", "--foo is not an option"),
        ("--preview --lr 1", "--preview FILE.png is missing"),
        ("--lr 1 --preview", "--preview FILE.png is missing"),
    ],
)
def test_a_wrong_flag_is_named_before_a_missing_picture(line: str, said: str):
    with pytest.raises(UserError, match=said):
        main(line.split())
