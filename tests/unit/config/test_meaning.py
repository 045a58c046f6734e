"""An older run keeps its meaning, or is refused with a reason; nothing changes in silence."""

from __future__ import annotations

import pytest
import yaml

from lowrank_vit.common.errors import UserError
from lowrank_vit.config import meaning
from lowrank_vit.config.flags import parse, to_yaml
from lowrank_vit.config.meaning import Change
from lowrank_vit.training.resume import as_resumed
from tests.runs import checkpoint_of

CHANGES = (
    Change("boxes come in threes, before singly", {"recount": 1}, concerns=lambda args: bool(args.get("reprob"))),
    Change("mirrors are rarer", {"vflip": 0.75}),
    Change("mirrors are rarer still", {"vflip": 0.5}),
)


@pytest.fixture(autouse=True)
def _changed(monkeypatch):
    monkeypatch.setattr(meaning, "CHANGES", CHANGES)


def resumed(argv, args, **content):
    """What a run becomes that goes on from a checkpoint of these options, and what is said of it."""
    lines = []
    return as_resumed(parse(argv), checkpoint_of(args, **content), lines.append), lines


def configured(tmp_path, text, *argv):
    path = tmp_path / "args.yaml"
    path.write_text(text)
    return parse(["--config", str(path), *argv])


def of_a_run(without=("vflip", "recount"), **changed):
    """What args.yaml of a run holds that knew nothing of the options `without`."""
    content = yaml.safe_load(to_yaml(parse([]))) | changed
    return yaml.safe_dump({name: value for name, value in content.items() if name not in (*without, meaning.KEY)})


def test_a_run_of_now_is_left_alone():
    config, lines = resumed(["--reprob", "0.5"], {"reprob": 0.5}, meaning=meaning.now())
    assert (config, lines) == (parse(["--reprob", "0.5"]), [])


def test_options_that_an_older_run_knows_nothing_of_get_its_meaning():
    config, lines = resumed(["--reprob", "0.5"], {"reprob": 0.5})
    assert config.data.vflip == 0.75  # of the first change since, although a later one names the option too
    assert "boxes come in threes" in lines[0]
    assert "--recount 1" in lines[0]
    config, lines = resumed([], {"seed": 42}, meaning=3)
    assert config.data.vflip == 0.5
    assert len(lines) == 1


def test_what_does_not_concern_a_run_is_not_said():
    assert not any("boxes" in line for line in resumed([], {"reprob": 0})[1])


def test_what_an_older_run_says_stays_and_what_the_user_says_is_not_overruled():
    assert resumed(["--vflip", "0.1"], {"vflip": 0.1}) == (parse(["--vflip", "0.1"]), [])
    with pytest.raises(UserError, match=r"--vflip was 0\.75, now 0\.1"):
        resumed(["--vflip", "0.1"], {"seed": 42})


@pytest.mark.parametrize(
    ("line", "said"), [("--train-crop-mode whole", "--train-crop-mode was rrc, now whole"), ("--vflip 0.1", "was 0.75")]
)
def test_an_option_that_came_later_makes_another_run_of_an_older_one(line, said):
    with pytest.raises(UserError, match=f"belongs to a run with other options: .*{said}"):
        resumed(line.split(), {"seed": 42})
    assert resumed(["--workers", "3"], {"seed": 42})[0].data.workers == 3


def test_a_resumed_run_keeps_the_share_that_was_chosen_for_it():
    assert resumed([], {"hw-decoder-load": 0.5})[0].data.hw_decoder_load == 0.5
    assert resumed(["--hw-decoder-load", "0.2"], {"hw-decoder-load": 0.5})[0].data.hw_decoder_load == 0.2
    assert resumed([], {"hw-decoder-load": None})[0].data.hw_decoder_load is None  # it was on a CPU


@pytest.mark.parametrize(
    ("before", "line", "is_same"),
    [
        ((1, 0), "--epochs 2", True),
        ((1, 0), "--epochs 100", True),
        ((3, 2), "--epochs 100", True),
        ((100, 5), "--epochs 3", True),
        ((100, 3), "--epochs 50", False),
        ((100, 5), "--epochs 50 --warmup-epochs 3", False),
        ((3, 1), "--epochs 3", False),
        ((3, 1), "--epochs 3 --warmup-epochs 1", True),
    ],
)
def test_a_warm_up_that_was_shortened_is_compared_as_it_was_asked_for(before, line, is_same):
    args = dict(zip(("epochs", "warmup-epochs"), before, strict=True))
    if is_same:
        assert resumed(line.split(), args, meaning=meaning.now())[0] == parse(line.split())
        return
    with pytest.raises(UserError, match="--warmup-epochs was"):
        resumed(line.split(), args, meaning=meaning.now())


def test_what_cannot_go_on_is_refused_with_the_reason(monkeypatch):
    gone = Change("noise is drawn by sample", cannot="the old noise is no longer there")
    monkeypatch.setattr(meaning, "CHANGES", (*CHANGES, gone))
    with pytest.raises(UserError, match=r"last\.pth\.tar is of an older run.*old noise is no longer there.*--initial"):
        resumed([], {"seed": 42})


def test_a_newer_number_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"newer lowrank-vit.*has the number 5.*knows up to 4. Update"):
        resumed([], {"seed": 42}, meaning=5)
    with pytest.raises(UserError, match=r"args\.yaml was written by a newer"):
        configured(tmp_path, "meaning: 5\n")
    for wrong in ("0", "two", "true"):
        with pytest.raises(UserError, match=r"must be a whole number, 1 to 4"):
            configured(tmp_path, f"meaning: {wrong}\n")


def test_a_new_run_of_an_older_file_means_what_that_meant(tmp_path, capsys):
    config = configured(tmp_path, of_a_run(reprob=0.5))
    assert (config.data.vflip, config.augment.recount) == (0.75, 1)
    assert "is of an older run: boxes come in threes, before singly. Its old meaning is kept: --recount=1" in (
        " ".join(capsys.readouterr().out.split())
    )
    assert configured(tmp_path, of_a_run(reprob=0.5), "--vflip", "0.3").data.vflip == 0.3
    said = capsys.readouterr().out
    assert "--recount=1" in said
    assert "--vflip" not in said  # which is overruled
    assert configured(tmp_path, of_a_run(without=())).data.vflip == parse([]).data.vflip  # as it says itself


def test_a_file_of_ones_own_means_what_is_meant_now(tmp_path, capsys):
    assert configured(tmp_path, "spec-every: 10\nepochs: 20\n").data.vflip == parse([]).data.vflip
    assert "older" not in capsys.readouterr().out
    assert configured(tmp_path, "meaning: 1\nepochs: 20\n").data.vflip == 0.75


def test_args_yaml_holds_the_number():
    assert yaml.safe_load(to_yaml(parse([])))[meaning.KEY] == len(CHANGES) + 1
