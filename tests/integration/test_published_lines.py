"""Published training lines of timm's kind: each parses or is refused with its reason, and some train, made small."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest

from lowrank_vit import train as train_command
from lowrank_vit import validate
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.config.option_types import aliases, hints_of, without_dashes
from lowrank_vit.config.options import Config
from lowrank_vit.config.other_flags import OTHERS
from lowrank_vit.config.timm_flags import FLAGS
from lowrank_vit.data.sets.datasets import kind_of
from tests.published_lines import DOCUMENT, UPDATES, PublishedLine, published_lines, written
from tests.runs import losses, spectral_records
from tests.sources import write_splits

LINES = published_lines()
TRAINED = [line for line in LINES if line.small]
QUICK = ("Swin-T from scratch", "EVA-02-L/14 of CLIP, fine-tuned on iNaturalist 2021", "ViT-S/16 from scratch")


@pytest.mark.parametrize("line", LINES, ids=[line.trains for line in LINES])
def test_it_parses_or_is_refused_with_its_reason(line: PublishedLine):
    if line.refused:
        with pytest.raises(UserError) as caught:
            parse(line.words)
        message = re.sub(r"^\d+ options cannot be taken: ", "", " ".join(str(caught.value).split()))
        assert message.startswith(line.refused)
        for word in line.words:
            name = without_dashes(word.partition("=")[0])
            assert not word.startswith("--") or name not in OTHERS or f"{word.partition('=')[0]} is " in message
        return
    config = parse(line.words)
    assert config.model.model == line.model
    if line.data:
        with pytest.raises(UserError) as caught:
            kind_of(config.data.dataset)
        assert str(caught.value).startswith(line.data)
    else:
        kind_of(config.data.dataset)


def test_there_are_enough_and_none_twice():
    assert len(LINES) >= 50
    assert len(TRAINED) >= 10
    assert len({line.line for line in LINES}) == len({line.trains for line in LINES}) == len(LINES)
    assert set(QUICK) < {line.trains for line in TRAINED}


def test_the_document_has_the_tables_of_now():
    """`python -m tests.published_lines` writes them."""
    document = DOCUMENT.read_text(encoding="utf-8")
    assert written(document) == document


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("photos"))


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name:UserWarning")  # timm's, of a line with an old name
@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=[] if line.trains in QUICK else pytest.mark.slow) for line in TRAINED],
    ids=[line.trains for line in TRAINED],
)
def test_it_trains_and_its_matrices_are_watched(line: PublishedLine, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_command.main(line.made_small(photos))
    run = Path("output/run")
    assert sorted(losses(run)) == list(range(1, UPDATES + 1))
    assert all(math.isfinite(loss) for loss in losses(run).values())
    refresh = spectral_records(run)[-1]
    assert any("sigma_max" in name for name in refresh)


def test_all_that_cannot_be_taken_is_told_at_once_in_80_columns(tmp_path):
    """Of another program, of timm, misspelt, with a wrong value; each once."""
    line = "--apex-amp 1 --token-label --foo a b --sched onecycle --data-path=x --data-path y"
    line += " --amp true --experiment -x -q"
    with pytest.raises(UserError) as caught:
        parse(line.split())
    first, *lines = str(caught.value).splitlines()
    assert first == "8 options cannot be taken:"
    assert max(map(len, lines)) <= 80
    told = [one.split()[0] for one in lines if re.match("  [^ ]", one)]
    assert told == "--apex-amp --token-label --data-path --foo --sched --amp --experiment -q".split()
    assert " ".join(lines[-2:]).startswith("Options that its command line leaves out")
    assert lines[-1].endswith(" --help lists all.")
    path = tmp_path / "recipe.yaml"
    path.write_text("apex_amp: true\ntoken_label: true\nfoo: 1\nepochs: many\nlr: 0.1\n")
    with pytest.raises(UserError) as caught:
        parse(["--config", str(path)])
    text = str(caught.value)
    assert text.startswith("4 options cannot be taken:\n")
    assert re.findall(r": `(\w+)`", " ".join(text.split())) == ["apex_amp", "token_label", "foo", "epochs"]
    with pytest.raises(UserError, match=r"(?s)3 options.* --model-dtype .* --input-size .* --batch-size "):
        validate.main(shlex.split("--model-dtype float16 --input-size 1 2 3 --batch-size x --fuser x"))


@pytest.mark.parametrize("name", ["data-path", "ThreeAugment", "repeated-aug", "blr", "lr-scheduler"])
def test_a_flag_of_another_program_names_what_is_here(name, tmp_path):
    for argv in ([f"--{name}"], ["-b", "8", f"--{name}=x"], [f"--{name.replace('-', '_')}", "x"]):
        with pytest.raises(UserError, match=rf"^--{name.replace('-', '[-_]')} is .+; here: ") as caught:
            parse(argv)
        assert "\n" not in str(caught.value)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{name.replace('-', '_')}: 1\n")
    with pytest.raises(UserError, match=r"--config .*recipe.yaml: `\w+` is .+; here: "):
        parse(["--config", str(path)])


def test_flags_of_other_programs_are_none_of_ours_or_timms():
    hints = hints_of(Config)
    assert not {*OTHERS} & {*FLAGS, *hints, *(alias.lstrip("-") for alias in aliases(hints))}


def test_timms_none_for_a_schedule_is_ours():
    assert parse(["--sched", "None"]) == parse(["--sched", "none"])
