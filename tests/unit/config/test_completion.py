"""Completion as bash itself does it, from the printed script alone; and the commands of the script `lowrank-vit`."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from lowrank_vit import __version__, train
from lowrank_vit.__main__ import run
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.program import COMMANDS
from lowrank_vit.config import completion
from lowrank_vit.config.data_options import LoaderName
from tests.waiting import LONG_S

ROOT = Path(__file__).parents[3]
SHELL = shutil.which("bash")


@pytest.fixture(scope="module")
def script() -> str:
    return completion.script("bash", completion.all_words())


def complete(script: str, *words: str) -> list[str]:
    """What bash proposes for the last of `words`, with no program at hand that it could ask."""
    assert SHELL
    line = " ".join(shlex.quote(word) for word in ("lowrank-vit", *words))
    driver = f"\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _lowrank_vit; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    command = [SHELL, "--norc", "-uc", script + driver]
    done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=True, timeout=LONG_S)
    assert not done.stderr
    return done.stdout.split()


def test_commands(script):
    assert complete(script, "") == list(COMMANDS)
    assert complete(script, "tr") == ["train"]
    assert complete(script, "prep", "i") == ["imagefolder", "info"]
    assert complete(script, "completion", "") == ["bash", "zsh"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--spec-mon"], ["--spec-monitor"]),
        (["train", "photos", "--conf"], ["--config"]),
        (["validate", "--use"], ["--use-ema"]),
        (["inference", "--top"], ["--topk"]),
        (["analyze_spectrum", "--sav"], ["--save-vectors", "--save-dir"]),
        (["report", "--h"], ["--help"]),
        (["augment", "--prev"], ["--preview"]),
        (["validate", "--js"], ["--json"]),
        (["prep", "imagefolder", "--on"], ["--on-bad"]),
    ],
)
def test_flags(words, expected, script):
    assert complete(script, *words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--loader", ""], list(get_args(LoaderName))),
        (["train", "--loader", "=", "da"], ["dali"]),
        (["train", "--tracker", "te"], ["tensorboard"]),
        (["train", "photos", "--tracker", "wandb", "trackio", "te"], ["tensorboard"]),
        (["train", "--tracker", "wandb", "--log-w"], ["--log-wandb"]),
        (["train", "--loader", "="], list(get_args(LoaderName))),
        (["augment", "--config", "quick"], ["quickstart", "quickstart_lowrank", "quickstart_muon"]),
        (["prep", "imagefolder", "--on-bad", "s"], ["skip"]),
        (["prep", "imagefolder", "--classes", ""], ["imagenet100_classes.txt", "imagenet1k_classes.txt"]),
        (["analyze-spectrum", "--format", ""], ["npz", "pt"]),
    ],
)
def test_choices(words, expected, script):
    assert complete(script, *words) == expected


@pytest.mark.parametrize("words", [["train", "--data-dir", ""], ["validate", ""], ["train", "--config", "configs/q"]])
def test_names_of_files_are_left_to_the_shell(words, script):
    assert complete(script, *words) == []
    assert "complete -o default -F _lowrank_vit lowrank-vit" in script


def test_the_script_of_zsh_is_that_of_bash(script):
    assert completion.script("zsh", completion.all_words()).endswith(script)


def test_another_shell_is_an_error():
    with pytest.raises(UserError, match=r"^`bsh` is not a shell of .*\. Did you mean bash\? There are: bash, zsh\.$"):
        completion.main(["bsh"])
    with pytest.raises(UserError, match=r"^`zsh` belongs to no option"):
        completion.main(["bash", "zsh"])


def test_tyros_own_script_is_printed_alone(capsys):
    with pytest.raises(SystemExit):
        train.main(["--tyro-print-completion", "bash"])
    assert capsys.readouterr().out.startswith("#")


def test_the_version(capsys):
    run(["--version"])
    assert capsys.readouterr().out == f"lowrank-vit {__version__}\n"


def test_a_misspelt_command_names_the_nearest():
    with pytest.raises(UserError, match=r"`trian` is not a command\. Did you mean train\?"):
        run(["trian"])


def test_a_command_may_be_spelt_as_its_module(capsys):
    with pytest.raises(SystemExit, match="0"):
        run(["analyze_spectrum", "--help"])
    assert "--checkpoint" in capsys.readouterr().out
