"""validate and inference on several ranks of torchrun: the results of one process, said and written once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from lowrank_vit import inference, validate
from tests.forked import Forked, torchrun
from tests.photos import write_folder
from tests.waiting import LONG_S

KWARGS: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
PROGRAM = """
import os, sys
from lowrank_vit import inference, validate
from lowrank_vit.common.errors import exit_cleanly

def main():
    to_validate, to_infer = sys.argv[1].split("|"), sys.argv[2].split("|")
    validate.main([*to_validate, *(["-b", "7"] if "DIFFERENT" in os.environ and os.environ["RANK"] == "2" else [])])
    inference.main(to_infer)

exit_cleanly(main)
"""


@pytest.fixture(scope="module")
def lines(digits_dir, tmp_path_factory) -> Any:
    """The two command lines, but for the folder that files go to."""
    root = tmp_path_factory.mktemp("scoring")
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=16, **KWARGS)
    args = {"img-size": 16, "crop-pct": 1.0, "model-kwargs": [f"{name}={value}" for name, value in KWARGS.items()]}
    names = [str(number) for number in range(10)]
    content = {"arch": "vit_tiny_patch16_224", "state_dict": model.state_dict(), "class_names": names, "args": args}
    torch.save(content, root / "w.pth")
    images = write_folder(root / "images")
    (images / "broken.jpg").write_bytes(b"no image")
    common = ["--checkpoint", str(root / "w.pth"), "--device", "cpu"]

    def of(folder: Path) -> tuple[list[str], list[str]]:
        files = ["--per-class", f"{folder}/c.csv", "--json", f"{folder}/s.json"]
        scored = ["--data", str(digits_dir), *common, "-b", "50", *files]
        return scored, [str(images), *common, "-b", "5", "--output", f"{folder}/p.json"]

    return of


def ranks(folder: Path, argv: tuple[list[str], list[str]], **more: str) -> tuple[int | None, str, str]:
    """How both commands end on three ranks, and what they print."""
    (folder / "program.py").write_text(PROGRAM)
    program = [str(folder / "program.py"), *("|".join(line) for line in argv)]
    process = Forked(torchrun, "--nproc-per-node=3", "--run-path", *program, environment=more)
    out, err = process.communicate(timeout=LONG_S)
    return process.returncode, out, err


def test_ranks_score_as_one_process(lines, tmp_path, capsys):
    one, three = tmp_path / "one", tmp_path / "three"
    one.mkdir()
    three.mkdir()
    scored, predicted = lines(one)
    validate.main(scored)
    inference.main(predicted)
    said = capsys.readouterr()
    code, out, err = ranks(three, lines(three))
    assert code == 0, err
    assert out.replace(str(three), str(one)) == said.out
    assert err.count("broken.jpg") == said.err.count("broken.jpg") == 1
    ours, theirs = (json.loads((folder / "s.json").read_text()) for folder in (three, one))
    assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-6)
    assert ours == theirs
    for name in ("c.csv", "p.json"):
        assert (three / name).read_text() == (one / name).read_text()


@pytest.mark.slow
def test_a_rank_with_another_command_line_is_named_once(lines, tmp_path):
    code, _, err = ranks(tmp_path, lines(tmp_path), DIFFERENT="1")
    assert code != 0
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(r"rank 2: on \S+ it would start another run than rank 0 .*--batch-size is 7, there 50", error)
