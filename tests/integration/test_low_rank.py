"""A model in factors from its checkpoint to the next: tuned, stopped, resumed, scored and analyzed as any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_vit import analyze_spectrum, validate
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.lowrank.layers import even_factors, factorise, save_compressed
from lowrank_vit.lowrank.targets import find_targets
from lowrank_vit.model.low_rank import merge, ranks_of, with_products
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.score.options import ModelOptions
from lowrank_vit.score.scorer import load_scorer
from lowrank_vit.training.trainer import Result, Trainer
from tests.integration.conftest import UPDATES
from tests.runs import losses, records, same_weights, stop_after

RANK = 5
TUNE = "--epochs 1 --warmup-epochs 0 --lr 5e-4 --spec-every 5 --layer-decay 0.8 --log-interval 1".split()


def compressed(of: Path, folder: Path) -> tuple[Path, Path]:
    """A checkpoint in factors of the run's own weights, and the merged one."""
    scorer = load_scorer(ModelOptions(checkpoint=of), torch.device("cpu"))
    model, factors, source = scorer.model, {}, read_checkpoint(of)
    for name, layer in find_targets(model, img_size=scorer.spec.img_size).items():
        u, s, vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        factors[name] = (*even_factors(u[:, :RANK], s[:RANK], vh[:RANK].mT), layer.bias)
    factorise(model, factors)
    paths = folder / "small.pth.tar", folder / "merged.pth.tar"
    save_compressed(model, paths[0], source, scorer.name, {"method": "svd"})
    merge(model)
    save_compressed(model, paths[1], source, scorer.name, {"method": "svd"})
    return paths


def scores(checkpoint: Path, digits_dir: Path, folder: Path, *more: str) -> dict[str, float]:
    results = folder / "scores.json"
    argv = ["--checkpoint", str(checkpoint), "--data-dir", str(digits_dir), "--device", "cpu"]
    validate.main([*argv, "--results-file", str(results), "--results-format", "json", *more])
    found = json.loads(results.read_text())
    return {name: found[name] for name in ("top1", "top5", "loss")}


def test_a_compressed_checkpoint_is_tuned_resumed_scored_and_analyzed(
    train: Callable[..., Result], small: Callable[..., list[str]], digits_dir: Path, tmp_path: Path
):
    first = train("--no-spec-monitor", "--epochs", "1", "--warmup-epochs", "0").run_dir
    start, merged = compressed(first / "last.pth.tar", tmp_path)
    of_factors, of_merged = (scores(path, digits_dir, tmp_path) for path in (start, merged))
    assert of_factors == pytest.approx(of_merged, rel=1e-5)

    tuning = [*small("--initial-checkpoint", str(start), *TUNE)]
    whole = Trainer(parse(tuning), "whole").run().run_dir
    content = torch.load(whole / "last.pth.tar", weights_only=True)
    assert set(content["lowrank_ranks"].values()) == {RANK}
    assert len(content["lowrank_ranks"]) == 8
    assert content["state_dict"].keys() == content["state_dict_ema"].keys()

    part = Trainer(parse(tuning), "part")
    stop_after(part, UPDATES // 2)
    stopped = part.run().run_dir
    Trainer(parse([*tuning, "--resume", str(stopped / "last.pth.tar")]), "part").run()
    assert losses(stopped) == losses(whole)
    assert same_weights(stopped / "last.pth.tar", whole / "last.pth.tar")

    ranks = {v for r in records(whole, "spec") for k, v in r.items() if k.endswith("/numerical_rank") and "blocks" in k}
    assert ranks == {float(RANK)}
    for more in ((), ("--use-ema",)):
        logged = records(whole, "eval")[-1]
        found = scores(whole / "last.pth.tar", digits_dir, tmp_path, *more)
        assert found["top1"] == pytest.approx(logged["eval_ema_top1" if more else "eval_top1"])
    analyze_spectrum.main(["--checkpoint", str(whole / "last.pth.tar"), "--save-dir", str(tmp_path / "spectra")])
    (file,) = (tmp_path / "spectra").glob("*.json")
    layers = json.loads(file.read_text())["layers"]
    assert {name: layer["numerical_rank"] for name, layer in layers.items()} == dict.fromkeys(layers, float(RANK))
    assert "blocks.0.attn.qkv" in layers


def test_a_run_begins_in_factors_of_the_weights_that_it_would_have_had_and_is_resumed(
    small: Callable[..., list[str]], tmp_path: Path
):
    drawn = Trainer(parse(small("--no-spec-monitor")), "drawn").setup.model.state_dict()
    share = ["--lowrank-init", "0.2", *TUNE]
    whole = Trainer(parse(small(*share)), "whole")
    (line,) = [line for line in whole.setup.description if line.startswith("--lowrank-init 0.2: 8 layers in factors")]
    assert "of their 24,576 parameters" in line
    first, average = whole.setup.model.state_dict(), whole.setup.ema.module.state_dict() if whole.setup.ema else {}
    ranks = ranks_of(whole.setup.model)
    for name, tensor in with_products(first).items():
        rank = ranks.get(name.removesuffix(".weight"))
        expected = drawn[name]
        if rank:
            u, s, vh = np.linalg.svd(expected.double().numpy())
            expected = torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0, check_dtype=False)
    assert first.keys() == average.keys()
    assert all(torch.equal(first[name], average[name]) for name in first)
    stepped = {parameter for group in whole.setup.optimizer.param_groups for parameter in group["params"]}
    assert stepped == set(whole.setup.model.parameters())
    of_whole = whole.run().run_dir
    part = Trainer(parse(small(*share)), "part")
    stop_after(part, UPDATES // 2)
    stopped = part.run().run_dir
    Trainer(parse(small(*share, "--resume", str(stopped / "last.pth.tar"))), "part").run()
    assert losses(stopped) == losses(of_whole)
    assert same_weights(stopped / "last.pth.tar", of_whole / "last.pth.tar")
    for other in (["--lowrank-init", "0.3", *TUNE], TUNE):
        with pytest.raises(UserError, match=r"other options: --lowrank-init was 0.2, now (0.3|None)"):
            Trainer(parse(small(*other, "--resume", str(stopped / "last.pth.tar"))), "other")
    with pytest.raises(UserError, match="The model is in factors already"):
        Trainer(parse(small(*share, "--initial-checkpoint", str(stopped / "last.pth.tar"))), "again")
