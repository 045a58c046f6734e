"""A model in factors from its checkpoint to the next: tuned, stopped, resumed, scored and analyzed as any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import timm
import torch
from torch import nn

from lowrank_vit import analyze_spectrum, compress, validate
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
from tests.runs import losses, records, same_weights, spectral_records, stop_after

RANK = 5
SIZE: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "avg",
}
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


def plain_vit() -> nn.Module:
    """A model of the small command's, by timm alone."""
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **SIZE)


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

    ranks = {
        v for r in spectral_records(whole) for k, v in r.items() if k.endswith("/numerical_rank") and "blocks" in k
    }
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
    (line,) = [line for line in whole.setup.description if line.startswith("--lowrank-init 0.2: 8 layers factorised")]
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
    with pytest.raises(UserError, match="The model is factorised already"):
        Trainer(parse(small(*share, "--initial-checkpoint", str(stopped / "last.pth.tar"))), "again")


def test_adapters_are_tuned_watched_resumed_and_merged_by_every_reader(
    small: Callable[..., list[str]], digits_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(3)
    drawn, start = plain_vit(), tmp_path / "start.pth"
    torch.save(drawn.state_dict(), start)
    flags = "--lora 3 --lora-alpha 6 --lora-dropout 0.1 --lr 1e-2 --spec-every 11".split()
    tuning = small("--initial-checkpoint", str(start), *TUNE, *flags)
    whole = Trainer(parse(tuning), "whole").run().run_dir
    line = "adapters beside 8 layers, scaled by 2: 3,072 parameters of the adapters and 330 of the head are trained"
    assert line in capsys.readouterr().out
    last = whole / "last.pth.tar"
    content = torch.load(last, weights_only=True)
    assert content["lora"] == {"rank": 3, "alpha": 6.0, "layers": list(find_targets(drawn, say=lambda line: None))}
    of_start = drawn.state_dict()
    for key in ("state_dict", "state_dict_ema"):  # the layers' own weights are the start's
        kept = {name.replace("base_layer.", ""): one for name, one in content[key].items() if ".lora_" not in name}
        changed = [name for name, tensor in kept.items() if not torch.equal(tensor, of_start[name])]
        assert changed == ["head.weight", "head.bias"]

    part = Trainer(parse(tuning), "part")
    stop_after(part, UPDATES // 2)
    stopped = part.run().run_dir / "last.pth.tar"
    Trainer(parse([*tuning, "--resume", str(stopped)]), "part").run()
    assert losses(stopped.parent) == losses(whole)
    assert same_weights(stopped, last)

    logged, spectra = records(whole, "eval")[-1], spectral_records(whole)[-1]
    assert spectra["update"] == UPDATES
    for more, prefix in (((), ""), (("--use-ema",), "_ema")):
        weights = read_checkpoint(last).weights(use_ema=bool(more))
        assert weights.keys() == of_start.keys()
        top = float(np.linalg.svd(weights["blocks.1.mlp.fc2.weight"].double().numpy(), compute_uv=False)[0])
        assert spectra[f"spec{prefix}/blocks.1.mlp.fc2/sigma_max"] == pytest.approx(top, rel=1e-6)
        found = scores(last, digits_dir, tmp_path, *more)
        assert found["top1"] == pytest.approx(logged[f"eval{prefix}_top1"])
        merged = tmp_path / f"merged{prefix}.pth.tar"
        compress.main([str(last), "--method", "svd", "--budget", "1", "--merge", str(merged), "--device", "cpu", *more])
        plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, checkpoint_path=str(merged), **SIZE)
        images, tuned = torch.randn(4, 3, 16, 16), tuned_vit(content["state_dict_ema" if more else "state_dict"])
        torch.testing.assert_close(plain.eval()(images), tuned.eval()(images), atol=1e-5, rtol=0)

    analyze_spectrum.main(["--checkpoint", str(last), "--save-dir", str(tmp_path / "spectra")])
    (file,) = (tmp_path / "spectra").glob("*.json")
    assert "blocks.1.mlp.fc2" in json.loads(file.read_text())["layers"]
    on = Trainer(parse(small("--initial-checkpoint", str(last), *TUNE)), "on").setup.model.state_dict()
    expected = read_checkpoint(last).weights_to_start_from()[0]
    assert all(torch.equal(on[name], tensor) for name, tensor in expected.items())
    for more, words in (("--lora 4", "--lora was 3, now 4"), ("", "--lora was 3, now None")):
        with pytest.raises(UserError, match=f"belongs to a run with other options: .*{words}"):
            Trainer(parse([*small(*TUNE), *more.split(), "--resume", str(last)]), "other")
    Trainer(parse(small("--lora", "2", *TUNE)), "drawn")
    assert "warning: --lora trains adapters beside frozen weights, and" in capsys.readouterr().out
    del content["lora"]
    torch.save(content, last)
    for read in (Trainer, lambda config, _: load_scorer(ModelOptions(checkpoint=last), torch.device("cpu"))):
        with pytest.raises(UserError, match=r"has adapters \(.*but no `lora` with their scale"):
            read(parse([*tuning, "--resume", str(last)]), "damaged")


def tuned_vit(state: dict[str, torch.Tensor]) -> nn.Module:
    """The model of a run with adapters, by timm and PEFT alone."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["qkv", "proj", "fc1", "fc2"], exclude_modules="patch.*")
    model = peft.inject_adapter_in_model(config, plain_vit())
    model.load_state_dict(state)
    return model
