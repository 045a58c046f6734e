"""Files of weights are read in every form, by every command."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_vit import analyze_spectrum
from lowrank_vit.common.errors import UserError
from lowrank_vit.model.create import create_model
from lowrank_vit.model.fit import load_initial
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.run.checkpoints import write_checkpoint
from lowrank_vit.score.scorer import ModelOptions, Scorer, load_scorer
from tests.unit.model.small_vit import EMA, KWARGS, NAME, OWN, same

CPU = torch.device("cpu")
PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
"""What DDP, torch.compile and both put before the names, in either order."""
FORMS = ("this program", "timm", "DeiT", "MAE", "bare", "safetensors")


def trained_optimizer() -> dict[str, Any]:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    return optimizer.state_dict()


def save(folder: Path, form: str, prefix: str = "", dtype: torch.dtype = torch.float32) -> Path:
    """A file as one of the programs writes it, with the EMA where that program keeps one."""
    own, ema = ({f"{prefix}{key}": value.to(dtype) for key, value in one.items()} for one in (OWN, EMA))
    args = argparse.Namespace(model=NAME, lr=np.float32(0.5), output_dir="out", drop_path=None, eval=False)
    common = {"optimizer": trained_optimizer(), "epoch": 3, "args": args, "scaler": {"scale": 65536.0}}
    contents: dict[str, Any] = {
        "this program": {"arch": NAME, "epoch": 3, "state_dict": own, "state_dict_ema": ema, "args": {"lr": 0.5}},
        "timm": {**common, "arch": NAME, "state_dict": own, "state_dict_ema": ema, "metric": np.float64(71.5)},
        "DeiT": {**common, "model": own, "model_ema": ema, "lr_scheduler": {"best": np.int64(4)}},
        "MAE": {**common, "model": own},
        "bare": own,
    }
    path = folder / f"w{'.safetensors' if form == 'safetensors' else '.pth'}"
    if form == "safetensors":
        save_file(own, path)
    else:
        torch.save(contents[form], path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_the_models_whatever_the_form_and_the_prefix(tmp_path, form):
    for prefix, dtype in itertools.product(PREFIXES, (torch.float32, torch.float16, torch.bfloat16)):
        checkpoint = read_checkpoint(save(tmp_path, form, prefix, dtype))
        assert checkpoint.epoch == (-1 if form in ("bare", "safetensors") else 3)
        assert checkpoint.arch == ("" if form in ("bare", "safetensors") else NAME)
        assert checkpoint.args == ({"lr": 0.5} if form == "this program" else {})  # others have other names
        assert same(checkpoint.weights(use_ema=False), {key: value.to(dtype).float() for key, value in OWN.items()})
        assert checkpoint.has_ema == (form in ("this program", "timm", "DeiT"))
        if checkpoint.has_ema:
            assert same(checkpoint.weights(use_ema=True), {key: value.to(dtype).float() for key, value in EMA.items()})


@pytest.mark.parametrize(("form", "prefix"), [*((form, "") for form in FORMS), ("DeiT", "module._orig_mod.")])
def test_every_command_takes_every_form(tmp_path, form, prefix, capsys):
    path = save(tmp_path, form, prefix)
    has_ema = form in ("this program", "timm", "DeiT")

    def scored(**options: Any) -> dict[str, Tensor]:  # validate and inference
        return load_scorer(
            ModelOptions(model=NAME, model_kwargs=KWARGS, img_size=32, **options), CPU
        ).model.state_dict()

    assert same(scored(checkpoint=path), OWN)
    assert same(scored(pretrained_path=path), EMA if has_ema else OWN)
    analyze_spectrum.main(["--checkpoint", str(path), "--model", NAME, "--save-dir", str(tmp_path)])
    found = json.loads((tmp_path / f"{NAME}_spectral.json").read_text())["layers"]["blocks.0.mlp.fc1"]["sigma_max"]
    assert found == pytest.approx(float(torch.linalg.matrix_norm(OWN["blocks.0.mlp.fc1.weight"].double(), 2)))
    if has_ema:
        assert same(scored(checkpoint=path, use_ema=True), EMA)
        analyze_spectrum.main(["--checkpoint", str(path), "--use-ema", "--model", NAME, "--save-dir", str(tmp_path)])
    # train
    model = create_model(NAME, 7, img_size=32, model_kwargs=KWARGS)
    load_initial(model, path, NAME, print)
    assert same(model.state_dict(), EMA if has_ema else OWN)
    file = read_checkpoint(path, "--pretrained-path")
    said = list[str]()
    model = create_model(NAME, 7, img_size=32, model_kwargs=KWARGS, pretrained_file=file, say=said.append)
    assert same(model.state_dict(), EMA if has_ema else OWN)
    assert said == [f"pretrained weights: {'the EMA of' if has_ema else 'those of'} {path}"]
    assert "state_dict" not in vars(model)["pretrained_cfg"]  # no second copy of the weights
    with pytest.raises(UserError, match=r"cannot be resumed: it lacks `.*--initial-checkpoint"):
        file.training_state("optimizer")


@pytest.mark.parametrize("better", ["ema", "model", None])
def test_a_start_is_made_from_whichever_scored_higher(tmp_path, better):
    path, said = tmp_path / "model_best.pth.tar", list[str]()
    torch.save({"state_dict": OWN, "state_dict_ema": EMA, "better": better}, path)
    wanted = OWN if better == "model" else EMA
    file = read_checkpoint(path, "--pretrained-path")
    model = create_model(NAME, 7, img_size=32, model_kwargs=KWARGS, pretrained_file=file, say=said.append)
    assert same(model.state_dict(), wanted)
    assert said == [f"pretrained weights: {'those of' if better == 'model' else 'the EMA of'} {path}"]
    load_initial(model, path, NAME, said.append)
    assert same(model.state_dict(), wanted)


def test_a_file_may_hold_an_ema_alone(tmp_path):
    torch.save({"model_ema": EMA}, tmp_path / "w.pth")
    checkpoint = read_checkpoint(tmp_path / "w.pth")
    assert same(checkpoint.weights_to_start_from()[0], EMA)
    assert checkpoint.num_outputs(("head",)) == 7
    with pytest.raises(UserError, match=r"has only EMA weights\. Add --use-ema"):
        checkpoint.weights(use_ema=False)


@pytest.mark.parametrize("is_pretrained_path", [False, True])
def test_another_image_size_interpolates_the_position_embedding(tmp_path, is_pretrained_path):
    """Everywhere to the same bits: those of timm."""
    path, said = save(tmp_path, "bare"), list[str]()
    torch.manual_seed(0)
    overlay = {"file": str(path), "num_classes": 7}
    kwargs: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 48}
    twin = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, **kwargs)

    def scored(img_size: int) -> Scorer:
        file: dict[str, Any] = {"pretrained_path" if is_pretrained_path else "checkpoint": path}
        options = ModelOptions(model=NAME, model_kwargs=KWARGS, img_size=img_size, **file)
        return load_scorer(options, CPU, said.append)

    assert same(scored(48).model.state_dict(), twin.state_dict())
    said = [line for line in said if "position" in line]
    if not is_pretrained_path:
        assert said == [f"note: the position embedding of {path} is interpolated from 4 x 4 patches to 6 x 6"]
        model = create_model(NAME, 7, img_size=48, model_kwargs=KWARGS)
        load_initial(model, path, NAME, said.append)
        assert same(model.state_dict(), twin.state_dict())
        torch.save({**OWN, "pos_embed": torch.zeros(1, 12, 32)}, path)
        with pytest.raises(UserError, match=r"another shape \(pos_embed is"):  # no square of patches
            load_initial(model, path, NAME, said.append)


def test_the_image_size_of_a_run_gives_way_to_the_flag(tmp_path):
    """Wherever the run had it from: --img-size or --model-kwargs."""
    for args in ({"img-size": 32, "model-kwargs": list(KWARGS)}, {"model-kwargs": [*KWARGS, "img_size=32"]}):
        path = tmp_path / "last.pth.tar"
        torch.save({"arch": NAME, "state_dict": OWN, "class_names": None, "args": args}, path)
        assert load_scorer(ModelOptions(path), CPU).spec.img_size == 32
        assert load_scorer(ModelOptions(path, img_size=48), CPU).spec.img_size == 48


def test_round_trip(tmp_path):
    content = {"state_dict": {"w": torch.arange(3.0)}, "arch": "m", "epoch": 4, "args": {"lr": 0.1}}
    write_checkpoint(tmp_path / "last.pth.tar", content)
    checkpoint = read_checkpoint(tmp_path / "last.pth.tar")
    assert (checkpoint.arch, checkpoint.epoch, checkpoint.args) == ("m", 4, {"lr": 0.1})
    assert torch.equal(checkpoint.weights(use_ema=False)["w"], torch.arange(3.0))
    with pytest.raises(UserError, match="has no EMA"):
        checkpoint.weights(use_ema=True)
    with pytest.raises(UserError, match="lacks `optimizer`"):
        checkpoint.training_state("optimizer")


@pytest.mark.parametrize(
    "value",
    [np.float64(0.5), np.float16(0.5), np.int64(-3), np.bool_(True), np.str_("ä"), np.dtype(">f4").type(2), None],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_numbers_of_numpy_are_pythons(tmp_path, value, is_zip):
    path = tmp_path / "w.pth"
    torch.save({"model": OWN, "best": value}, path, _use_new_zipfile_serialization=is_zip)
    found = read_checkpoint(path).content["best"]
    assert found == value
    assert isinstance(found, float | int | str | None)
    assert not isinstance(found, np.generic)


@pytest.mark.parametrize(
    "wrapped",
    [
        "blocks.0._orig_mod.attn.qkv.weight",  # each block compiled
        "_orig_mod.blocks._orig_mod.0.attn.qkv.weight",
        "blocks.0._checkpoint_wrapped_module.attn.qkv.weight",
        "module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.attn.qkv.weight",
    ],
)
def test_wrappers_within_a_name_go_too(tmp_path, wrapped):
    torch.save(
        {wrapped if key == "blocks.0.attn.qkv.weight" else key: value for key, value in OWN.items()}, tmp_path / "w.pth"
    )
    assert same(read_checkpoint(tmp_path / "w.pth").weights(use_ema=False), OWN)


def test_a_model_that_is_called_module_keeps_its_name(tmp_path):
    weights = {"encoder.module.weight": torch.ones(2), "modules.weight": torch.ones(3)}
    torch.save(weights, tmp_path / "w.pth")
    assert same(read_checkpoint(tmp_path / "w.pth").weights(use_ema=False), weights)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"head.weight": torch.eye(7, 32).to_sparse()}, r"`head.weight` is a sparse_coo tensor"),
        ({"head.weight": torch.zeros(7, 32, dtype=torch.complex64)}, r"`head.weight` is a tensor of complex64"),
        (
            {"module.head.weight": torch.zeros(7, 32)},
            r"has `head.weight` and `module.head.weight`, which are the same tensor",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about sparse tensors
def test_tensors_that_are_no_weights_are_named(tmp_path, odd, message):
    torch.save({"model": {**OWN, **odd}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"--pretrained-path .*w\.pth:? {message}"):
        read_checkpoint(tmp_path / "w.pth", "--pretrained-path")


def test_whole_numbers_are_no_weights(tmp_path):
    torch.save({"model": {**OWN, "head.weight": OWN["head.weight"].to(torch.int8)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"1 have another dtype \(head.weight is torch.int8\)"):
        load_initial(create_model(NAME, 7, img_size=32, model_kwargs=KWARGS), tmp_path / "w.pth", NAME, print)


def test_two_files_of_one_model_are_compared_whatever_their_forms(tmp_path):
    (tmp_path / "other").mkdir()
    before, after = save(tmp_path, "bare", "module._orig_mod."), save(tmp_path / "other", "safetensors")
    analyze_spectrum.main(["--compare", str(before), str(after), "--model", NAME, "--save-dir", str(tmp_path)])
    drift = json.loads((tmp_path / f"{NAME}_drift.json").read_text())["layers"]
    assert set(drift) == {f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert all(numbers["update_normF"] == 0 for numbers in drift.values())


@pytest.mark.parametrize(
    "args",
    [
        {"img-size": "32"},
        {"img-size": -1},
        {"crop-pct": float("nan")},
        {"model-kwargs": 3},
        {"model-kwargs": [3]},
        {"data-dir": torch.zeros(2)},
        {"nested-classes": None},
    ],
)
def test_mistyped_flags_of_a_run_are_named(tmp_path, args):
    torch.save({"arch": NAME, "state_dict": OWN, "class_names": None, "args": args}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=rf"w.pth is damaged .* for --{next(iter(args))}, which does not take this value"
    ):
        load_scorer(ModelOptions(tmp_path / "w.pth"), CPU)


def test_files_without_weights_missing_files_and_folders_are_refused(tmp_path):
    torch.save({"teacher": {"w": torch.zeros(1)}, "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"Checkpoint .*other.pth has no `state_dict`.*has teacher, epoch\."):
        read_checkpoint(tmp_path / "other.pth")
    torch.save([3], tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"has no `state_dict`"):
        read_checkpoint(tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"--pretrained-path .*absent.pth does not exist"):
        read_checkpoint(tmp_path / "absent.pth", "--pretrained-path")
    with pytest.raises(UserError, match=r"is not a file. That folder has: .*other.pth"):
        read_checkpoint(tmp_path)


def test_files_of_other_kinds_are_told_what_takes_them(tmp_path):
    for name, where in (
        ("args.yaml", "options, which --config takes"),
        ("val.beton", "images, which --data takes"),
        ("photo.JPG", "an image, which `lowrank_vit.inference` takes"),
        ("metrics.jsonl", "`lowrank_vit.report` takes the directory"),
    ):
        (tmp_path / name).write_text("epochs: 3")
        with pytest.raises(UserError, match=f"{name} cannot be read: it holds no weights, but .*{where}"):
            read_checkpoint(tmp_path / name)
    torch.save({"update": 3, "weights": {"a": torch.ones(1)}, "before": None}, tmp_path / "weights_00000003.pth")
    with pytest.raises(UserError, match="is the spectral monitor's own file beside a checkpoint"):
        read_checkpoint(tmp_path / "weights_00000003.pth")


def test_googles_arrays_are_left_to_timm(tmp_path):
    np.savez(tmp_path / "w.npz", **{"head/bias": np.zeros(21)})  # type: ignore[arg-type]
    checkpoint = read_checkpoint(tmp_path / "w.npz")
    assert checkpoint.num_outputs(("head",)) == 21
    with pytest.raises(UserError, match=r"w.npz has Google's arrays.*--pretrained-path"):
        checkpoint.weights(use_ema=False)


@pytest.mark.parametrize("ema", [{"module": EMA, "decay": 0.9}, {}, None, 3, "no weights"])
def test_an_ema_that_is_no_state_dict_is_none(tmp_path, ema):
    torch.save({"state_dict": OWN, "state_dict_ema": ema}, tmp_path / "w.pth")
    checkpoint = read_checkpoint(tmp_path / "w.pth")
    assert not checkpoint.has_ema
    weights, is_ema = checkpoint.weights_to_start_from()
    assert (same(weights, OWN), is_ema) == (True, False)
    with pytest.raises(UserError, match="has no EMA weights"):
        checkpoint.weights(use_ema=True)


@pytest.mark.parametrize("place", ["state_dict", "model", "bare"])
@pytest.mark.parametrize("value", [3, None, 0.5])
def test_a_counter_among_the_weights_is_left_out_and_said(tmp_path, place, value):
    weights = {**OWN, "n_averaged": value}
    torch.save(weights if place == "bare" else {place: weights, "model_ema": EMA}, tmp_path / "w.pth")
    checkpoint = read_checkpoint(tmp_path / "w.pth", "--pretrained-path")
    assert same(checkpoint.weights(use_ema=False), OWN)
    for num_classes in (7, 3):
        said: list[str] = []
        create_model(NAME, num_classes, img_size=32, model_kwargs=KWARGS, pretrained_file=checkpoint, say=said.append)
        assert "pretrained weights: their n_averaged has no place in the model and is not used" in said


@pytest.mark.parametrize(
    ("odd", "read"),
    [
        ({"epoch": float("nan")}, lambda one: one.epoch == -1),
        ({"epoch": float("inf")}, lambda one: one.epoch == -1),
        ({"arch": torch.ones(2)}, lambda one: one.arch == ""),
        ({"class_names": [1, 2]}, lambda one: one.class_names is None),
        ({"state_dict": {**OWN, "head.weight": torch.tensor(1.0)}}, lambda one: one.num_outputs(("head",)) is None),
        ({"state_dict": {**OWN}, "mean": torch.ones(3), "std": torch.ones(3)}, lambda one: "mean" in one.content),
    ],
)
def test_odd_values_beside_the_weights_do_no_harm(tmp_path, odd, read):
    torch.save({"state_dict": OWN, **odd}, tmp_path / "w.pth")
    assert read(read_checkpoint(tmp_path / "w.pth"))
