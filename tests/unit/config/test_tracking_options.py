"""Which trackers are meant."""

from __future__ import annotations

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse, to_yaml
from lowrank_vit.config.tracking_options import trackers


@pytest.mark.parametrize(
    ("line", "chosen"),
    [
        ("", ()),
        ("--tracker none", ()),
        ("--log-wandb", ("wandb",)),
        ("--tracker wandb --log-wandb", ("wandb",)),
        ("--tracker tensorboard wandb tensorboard --log-wandb", ("tensorboard", "wandb")),
        ("--tracker=mlflow --no-log-wandb", ("mlflow",)),
    ],
)
def test_each_once(line, chosen, tmp_path):
    config = parse(line.split())
    assert trackers(config.tracking) == chosen
    file = tmp_path / "args.yaml"
    file.write_text(to_yaml(config))
    assert trackers(parse(["--config", str(file)]).tracking) == chosen


@pytest.mark.parametrize("value", ["tensorboard", "[tensorboard]"])
def test_a_file_names_one_or_several(value, tmp_path):
    file = tmp_path / "args.yaml"
    file.write_text(f"tracker: {value}\n")
    assert trackers(parse(["--config", str(file)]).tracking) == ("tensorboard",)
    assert trackers(parse(["--config", str(file), "--tracker", "none"]).tracking) == ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--log-wandb --tracker none", "--log-wandb means --tracker wandb, and --tracker none says otherwise.* wandb"),
        ("--log-wandb --tracker mlflow", "--tracker mlflow says otherwise.* write --tracker wandb mlflow"),
        ("--tracker none wandb", "none stands alone"),
        ("--tracker tensorbord", "takes one of wandb, tensorboard, trackio, mlflow, none, not .* mean tensorboard"),
    ],
)
def test_what_contradicts_is_refused(line, said):
    with pytest.raises(UserError, match=said):
        parse(line.split())
