"""Every command with wrong words, with nothing and with --help: errors in one form, before torch is loaded."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import subprocess
import sys

import pytest

from benchmarks.__main__ import main as bench_main
from data_prep import __main__ as prep
from lowrank_vit.common import program
from lowrank_vit.common.errors import UserError

EVERY = {
    "train": (
        "lowrank_vit.train",
        "Nothing says what to train on.*--config quickstart.*--help",
        "--data-dir wrong does",
    ),
    "validate": ("lowrank_vit.validate", "Give --checkpoint FILE", "Give --checkpoint FILE"),
    "inference": ("lowrank_vit.inference", "Name at least one image or folder", "--input wrong does not exist"),
    "analyze-spectrum": ("lowrank_vit.analyze_spectrum", "Give one of --checkpoint", "`wrong` belongs to no option"),
    "compress": ("lowrank_vit.compress", "Give --checkpoint FILE, or --model NAME", "--data DIR is missing"),
    "report": ("lowrank_vit.report.__main__", "needs RUN .*--help tells more", "no run directory at wrong"),
    "augment": ("lowrank_vit.augment.__main__", None, "--preview FILE.png is missing"),
    "completion": ("lowrank_vit.config.completion", None, "`wrong` is not a shell of"),
    "bench": ("lowrank_vit.bench", "benches are no longer part of the installed package", "python -m benchmarks wrong"),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_command_with_nothing_with_help_and_with_one_wrong_word(name, tmp_path, monkeypatch, capsys):
    module, with_nothing, with_a_word = EVERY[name]
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(module).main
    if with_nothing is None:
        with contextlib.suppress(SystemExit):
            main([])
        assert "usage: " in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=with_nothing) as caught:
            main([])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=with_a_word):
        main(["wrong"])
    if name != "bench":
        with contextlib.suppress(SystemExit):
            main(["wrong", "--help"])
        assert "usage: " in capsys.readouterr().out


PREP = {
    "": "needs a command: digits, cifar100, imagefolder, list, hfds, wds, torch, verify, info",
    "wrong": "`wrong` is not a command of",
    "digitz": "Did you mean digits?",
    "digits": "digits needs --out DIR",
    "digits wrong": "`wrong` belongs to no option",
    "digits --out": "--out takes a path, and none is given",
    "digits --quality 3": "--quality is not an option",
    "cifar100": "cifar100 needs --out DIR",
    "imagefolder": "imagefolder needs --src DIR",
    "imagefolder --src a --out b --nested-classes lef": "--nested-classes takes one of leaf, merge, top, not `lef`",
    "imagefolder --src a --out b --workers x": "--workers takes a whole number, not `x`",
    "imagefolder --src a --out b --raw=": "--raw takes a whole number, not an empty text",
    "imagefolder --src a --out b --no-lossless": "--no-lossless is not an option",
    "verify": "verify needs FILE.beton",
    "verify a b": "`b` belongs to no option",
    "info a --plt x": "--plt is not an option. Did you mean --plot?",
}


@pytest.mark.parametrize("line", PREP)
def test_data_prep_speaks_so_too(line: str, capsys):
    with pytest.raises(SystemExit, match="2"):
        prep.main(line.split())
    out, err = capsys.readouterr()
    assert PREP[line] in err
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [("", "needs a command: prep, loader"), ("lodaer", "Did you mean loader?"), ("loader --count x", "--count takes")],
)
def test_the_benches_speak_so_too(line: str, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_main(line.split())
    assert said in capsys.readouterr().err


def test_the_script_names_its_commands(capsys):
    from lowrank_vit.__main__ import run

    run([])
    run(["--help"])
    assert capsys.readouterr().out.count("usage: lowrank-vit COMMAND") == 2
    with pytest.raises(UserError, match=r"`trian` is not a command\. Did you mean train\? There are: train, validate"):
        run(["trian"])


@pytest.mark.parametrize("command", [name for name in program.COMMANDS if name not in ("augment", "completion")])
def test_all_that_is_wrong_is_told_at_once(command, capsys):
    main = importlib.import_module(program.COMMANDS[command][0]).main
    with pytest.raises((UserError, SystemExit)) as caught:
        main(["imagefolder"] * (command == "prep") + ["--nonsense", "7", "--foo=1", "--bar"])
    first, *others = (capsys.readouterr().err or str(caught.value)).splitlines()
    assert first.removeprefix("error: ") == "3 options cannot be taken:"
    assert re.findall(r"--[a-z]+(?= is not an option)", " ".join(others)) == ["--nonsense", "--foo", "--bar"]


def test_what_is_wrong_is_told_before_torch_is_loaded(tmp_path):
    """By all commands of training and scoring, in one process."""
    lines = {
        "train": ["--lr abc", "--config quickstrt", "--epochs 0", "--amp=false", "--scale 1 0.5 DIR", ""],
        "validate": ["--batch-size x", "--tta 1", "", "--input-size 3 1"],
        "inference": ["--topk 0 a", "nowhere --checkpoint x", ""],
        "analyze_spectrum": ["--topk 0", "wrong", ""],
        "compress": ["a", "a --budget 2 --save b", "a --method svdd", ""],
        "report.__main__": ["a --port 1", "a b --watch", ""],
        "augment.__main__": ["wrong", "--preview a.jpg", "--preview a.png --lr abc"],
    }
    code = f"""
import importlib, sys
from lowrank_vit.common.errors import UserError
for name, lines in {lines!r}.items():
    main = importlib.import_module("lowrank_vit." + name).main
    for line in lines:
        try:
            main(line.split())
        except UserError:
            continue
        raise SystemExit(f"{{name}} {{line}} was taken")
print([name for name in ("torch", "timm", "numpy") if name in sys.modules])
"""
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
