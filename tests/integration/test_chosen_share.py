"""What was chosen to decode with, loader and share of the JPEG engine, belongs to the run and is kept when resumed."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from lowrank_vit.config.flags import parse
from lowrank_vit.data.jpeg_engine import EngineShare
from lowrank_vit.plan.plans import TrainPlan
from lowrank_vit.training import loading, trainer
from lowrank_vit.training.trainer import Trainer
from tests.runs import stop_after


@pytest.fixture
def opened(monkeypatch) -> list[float | None]:
    """Each `hw_decoder_load` that a loader is opened with, on what would be a GPU, where 0.5 is chosen."""
    shares, open_loader = [], loading.open_loader

    def open_and_choose(beton, plan, device, options, **more):
        loader, line = open_loader(beton, plan, device, options, **more)
        shares.append(options.hw_decoder_load)
        if isinstance(plan, TrainPlan) and options.hw_decoder_load is None:
            loader.engine_share = EngineShare(0.5, "", {0.5: 1e9, 0.2: 2e9}, beton, {}, None)
        return loader, line

    monkeypatch.setattr(loading, "open_loader", open_and_choose)
    return shares


def test_a_chosen_share_is_the_runs_own_and_is_looked_at_again(small, opened, monkeypatch, capsys):
    seen = []
    recheck = EngineShare.recheck
    monkeypatch.setattr(EngineShare, "recheck", lambda self, *found: seen.append(found) or recheck(self, 1e8, 0.6))
    monkeypatch.setattr(trainer, "_RECHECKED_UPDATES", 6)
    first = Trainer(parse(small("--experiment", "run")), "x")
    stop_after(first, 13)
    run = first.run().run_dir
    assert opened == [None, 0.35]  # validation decodes as `validate` does
    assert yaml.safe_load((run / "args.yaml").read_text())["hw-decoder-load"] == 0.5
    ((img_per_s, waited, read_bytes),) = seen
    assert 0 < img_per_s < 1e6
    assert 0 <= waited <= 1
    assert read_bytes >= 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("the run waits for the loader 60% of the time: 100,000,000 img/s") == 1
    again = Trainer(parse(small("--resume", str(run / "last.pth.tar"))), "x")
    assert opened[2:] == [0.5, 0.35]
    assert again.config.data.hw_decoder_load == 0.5
    assert sum("resident loader (as the run has decoded so far)" in line for line in again.setup.description) == 2
    again.run_dir.close()
    for loader in (again.setup.train_loader, again.setup.val_loader):
        assert loader is not None
        loader.close()
    assert dataclasses.replace(again.config.data, workers=4) == again.config.data  # a CPU's
