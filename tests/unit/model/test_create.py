"""Model creation: pretrained weights as timm itself fits them, gradient checkpointing, image sizes."""

from __future__ import annotations

import copy
import itertools
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.create import create_model, input_spec, set_head
from lowrank_vit.model.weights import read_checkpoint

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
KWARGS = tuple(f"{name}={value}" for name, value in TINY.items())
HEAD = ("head.weight", "head.bias")


def seeded(seed: int, num_classes: int = 7, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(NAME, num_classes=num_classes, img_size=32, **{**TINY, **kwargs})


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Those of a small model of 7 classes at 32 pixels."""
    return seeded(1).state_dict()


@pytest.fixture
def file(weights, tmp_path) -> Path:
    path = tmp_path / "small.pth"
    torch.save(weights, path)
    return path


class Said(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def load(path: Path | None, num_classes: int = 7, img_size: int = 32, **more: Any) -> tuple[dict[str, Tensor], Said]:
    """The state of a model made with a file's weights, and what was said."""
    said = Said()
    more = {"model_kwargs": KWARGS, **more}
    file = read_checkpoint(path, "--pretrained-path") if path else None
    model = create_model(NAME, num_classes, img_size=img_size, pretrained_file=file, say=said, **more)
    return model.state_dict(), said


def same(a: dict[str, Tensor], b: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a.keys() - set(but))


def test_a_file_of_the_same_shape_is_taken_whole(file, weights):
    state, said = load(file)
    assert same(state, weights)
    assert said == [f"pretrained weights: those of {file}"]


def test_another_size_interpolates_the_position_embedding_as_timm_does(file, weights):
    state, said = load(file, img_size=48)
    expected = resample_abs_pos_embed(weights["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    assert torch.equal(state["pos_embed"], expected)
    assert same(state, weights | {"pos_embed": expected})
    overlay = {"file": str(file), "num_classes": 7}
    twin = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, img_size=48, **TINY
    ).state_dict()
    assert same(state, twin)
    assert said == [f"pretrained weights: those of {file}"]


def test_another_class_count_makes_the_head_anew_as_timm_does(file, weights):
    torch.manual_seed(5)
    state, said = load(file, num_classes=12)
    assert state["head.weight"].shape == (12, 32)
    assert same({k: v for k, v in state.items() if k not in HEAD}, {k: weights[k] for k in weights if k not in HEAD})
    assert said[:-1] == ["pretrained weights: head of 7 classes replaced by one of 12"]
    overlay = {"file": str(file), "num_classes": -1}  # as in timm's train.py
    torch.manual_seed(5)
    twin = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=12, img_size=32, **TINY
    ).state_dict()
    assert same(state, twin)


def test_a_file_without_a_head_gets_one(weights, tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save({key: value for key, value in weights.items() if key not in HEAD}, path)
    state, said = load(path)
    assert same(state, weights, but=HEAD)
    assert said[:-1] == ["pretrained weights: they have no head; the model gets a new one with 7 classes"]


def test_a_pooling_of_its_own_is_named(file, weights):
    """Common in fine-tuning: class token weights, average pooling with a norm of its own."""
    state, said = load(file, num_classes=12, model_kwargs=(*KWARGS, "global_pool=avg"))
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], weights["blocks.1.mlp.fc1.weight"])
    assert "pretrained weights: they have no fc_norm, which stays randomly initialised" in said
    assert "pretrained weights: their norm has no place in the model and is not used" in said


def test_a_decoder_in_the_file_is_left_unused(weights, tmp_path):
    path = tmp_path / "mae.pth"
    torch.save({"model": weights | {"decoder_blocks.0.weight": torch.zeros(2)}}, path)
    state, said = load(path, num_classes=12)
    assert same(state, weights, but=HEAD)
    assert "pretrained weights: their decoder_blocks has no place in the model and is not used" in said


@pytest.mark.parametrize("num_classes", [7, 12])
@pytest.mark.parametrize("depth", [1, 3])
def test_weights_of_another_depth_are_refused(file, depth, num_classes):
    kwargs = (*KWARGS, f"depth={depth}")
    with pytest.raises(UserError, match=r"--pretrained-path .*small.pth does not fit the model") as caught:
        load(file, num_classes, model_kwargs=kwargs)
    assert "--model-kwargs" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_classes", [7, 12])
def test_weights_of_another_architecture_are_refused(tmp_path, num_classes):
    path = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet18", num_classes=7).state_dict(), path)
    with pytest.raises(UserError, match=r"resnet.pth does not fit the model"):
        load(path, num_classes)


def google_npz(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The weights in the names and layouts of Google's ViT files (github.com/google-research/vision_transformer)."""
    heads, width = TINY["num_heads"], TINY["embed_dim"]
    dim = width // heads
    w = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for n in range(TINY["depth"]):
        block, out = f"blocks.{n}.", f"Transformer/encoderblock_{n}/"
        attention = f"{out}MultiHeadDotProductAttention_1/"
        qkv, bias = state[f"{block}attn.qkv.weight"].chunk(3), state[f"{block}attn.qkv.bias"].chunk(3)
        for m, name in enumerate(("query", "key", "value")):
            w[f"{attention}{name}/kernel"] = qkv[m].T.reshape(width, heads, dim)
            w[f"{attention}{name}/bias"] = bias[m].reshape(heads, dim)
        w[f"{attention}out/kernel"] = state[f"{block}attn.proj.weight"].T.reshape(heads, dim, width)
        w[f"{attention}out/bias"] = state[f"{block}attn.proj.bias"]
        for m, name in itertools.product((0, 1), ("kernel", "bias")):
            value = state[f"{block}mlp.fc{m + 1}.{'weight' if name == 'kernel' else 'bias'}"]
            w[f"{out}MlpBlock_3/Dense_{m}/{name}"] = value.T if name == "kernel" else value
        for m, norm in ((0, "norm1"), (2, "norm2")):
            w[f"{out}LayerNorm_{m}/scale"] = state[f"{block}{norm}.weight"]
            w[f"{out}LayerNorm_{m}/bias"] = state[f"{block}{norm}.bias"]
    return {key: value.numpy() for key, value in w.items()}


def test_googles_npz_files(weights, tmp_path):
    path = tmp_path / "google.npz"
    np.savez(path, **google_npz(weights))  # type: ignore[arg-type]
    state, said = load(path)
    assert same(state, weights)
    assert not said
    state, said = load(path, num_classes=12)
    assert same({k: v for k, v in state.items() if k not in HEAD}, {k: weights[k] for k in weights if k not in HEAD})
    assert said == ["pretrained weights: head of 7 classes replaced by one of 12"]
    with pytest.raises(UserError, match=r"google.npz does not fit the model"):
        load(path, model_kwargs=(*KWARGS, "depth=3"))


def test_convolutional_models_take_files_and_any_image_size(tmp_path):
    source = timm.create_model("resnet18", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    said = Said()
    file = read_checkpoint(tmp_path / "resnet.pth")
    made = create_model("resnet18", 5, img_size=64, pretrained_file=file, say=said)
    head = ("fc.weight", "fc.bias")
    before = {k: v for k, v in source.state_dict().items() if k not in head}
    assert same({k: v for k, v in made.state_dict().items() if k not in head}, before)
    assert said[:-1] == ["pretrained weights: head of 7 classes replaced by one of 5"]
    assert input_spec(made, 64, None).img_size == 64
    assert made(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(("img_size", "said"), [(30, "6 rows at the bottom and 6 columns .* 24 or 32"), (32, "")])
def test_pixels_that_no_patch_covers_are_told(img_size, said):
    lines = Said()
    create_model(NAME, 7, img_size=img_size, model_kwargs=KWARGS, say=lines)
    assert [bool(re.search(said, line)) for line in lines] == [True] * bool(said)


def test_a_wrong_argument_is_still_refused_with_an_image_size():
    with pytest.raises(UserError, match=r"--model resnet18 .*cannot be built: .*nonsense"):
        create_model("resnet18", 5, img_size=64, model_kwargs=("nonsense=1",))
    with pytest.raises(UserError, match=r"--model-kwargs num_classes=3: give it as --num-classes 3"):
        create_model("resnet18", 5, model_kwargs=("num_classes=3",))


def test_mean_and_std_are_those_of_the_published_weights():
    for name in ("vit_tiny_patch16_224", "vit_small_patch16_224.dino"):
        spec = input_spec(create_model(name, 3, model_kwargs=("depth=1",)), None, None)
        cfg = timm.get_pretrained_cfg(name)
        assert cfg
        assert (spec.mean, spec.std) == (cfg.mean, cfg.std)


@pytest.fixture
def no_network(monkeypatch, tmp_path) -> None:
    """No way to the hub, and nothing in its cache."""
    from huggingface_hub import constants

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_network")
def test_published_weights_without_network_name_the_other_way(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tries again and again"))
    with pytest.raises(UserError, match=r"no network.*--pretrained-path FILE") as caught:
        create_model(NAME, 7, pretrained=True)
    assert "\n" not in str(caught.value)
    assert not constants.HF_HUB_OFFLINE  # nothing is changed for good


@pytest.mark.usefixtures("no_network")
def test_a_model_without_published_weights_names_the_other_way():
    cfg = timm.get_pretrained_cfg("lcnet_035")
    assert cfg
    assert not cfg.has_weights
    with pytest.raises(UserError, match=r"timm has no weights for lcnet_035.*--pretrained-path FILE"):
        create_model("lcnet_035", 7, pretrained=True)


def test_published_weights_come_through_timm(monkeypatch, weights):
    """The hub's answer is put in by hand; all the rest is timm's."""
    from timm.models import _builder

    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: socket.socket())
    published = weights | {"head.weight": torch.zeros(1000, 32), "head.bias": torch.zeros(1000)}
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *args, **kwargs: copy.copy(published))
    said = Said()
    model = create_model(NAME, 7, img_size=32, model_kwargs=KWARGS, pretrained=True, say=said)
    assert same(model.state_dict(), weights, but=HEAD)
    assert said == ["pretrained weights: head of 1000 classes replaced by one of 7"]
    with pytest.raises(UserError, match=r"--pretrained does not fit the model: it lacks 12 tensors"):
        create_model(NAME, 7, img_size=32, model_kwargs=(*KWARGS, "depth=3"), pretrained=True, say=said)


def test_gradient_checkpointing_changes_no_gradient():
    plain, saving = seeded(3), create_model(NAME, 7, img_size=32, model_kwargs=KWARGS, grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 32, 32)
    stored: list[int] = []
    for model in (plain, saving):
        count: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=count: (n.append(t.numel()), t)[1], lambda t: t):
            loss = model.train()(images).square().sum()
        stored.append(sum(count))
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(
            b.grad, a.grad, msg=lambda text, name=name: f"{name}: {text}"
        )  # not on every CPU the same bits
    assert stored[1] < stored[0] / 2
    with pytest.raises(UserError, match="--grad-checkpointing: --model dla46_c does not support it"):
        create_model("dla46_c", 7, grad_checkpointing=True)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("in_chans=1", "--model-kwargs in_chans=1 is not possible: images are RGB"),
        ("pretrained_cfg=3", "--model-kwargs pretrained_cfg=3 is not possible: .*--pretrained"),
        ("img_size=(32,64)", "images are square"),
        ("num_heads=0", "cannot be built: integer modulo by zero"),
        ("norm_layer=3", "cannot be built: AssertionError|cannot be built: "),
        ("embed_dim=wide", "cannot be built"),
    ],
)
def test_arguments_of_the_constructor_that_make_no_sense_are_named(pair, said):
    with pytest.raises(UserError, match=said) as caught:
        create_model(NAME, 7, model_kwargs=(pair,))
    assert ": . Check" not in str(caught.value)


@pytest.mark.parametrize("pair", ["img_size=48", "img_size=(48,48)", "img_size=[48, 48]"])
def test_the_size_may_stand_among_the_arguments(pair):
    for size in (None, 48):
        model = create_model(NAME, 7, img_size=size, model_kwargs=(*KWARGS, pair, "in_chans=3"))
        assert model.state_dict()["pos_embed"].shape == (1, 37, 32)
    with pytest.raises(UserError, match="--img-size 32 and --model-kwargs img_size=48 differ"):
        create_model(NAME, 7, img_size=32, model_kwargs=(*KWARGS, pair))


def test_mean_and_std_replace_the_models():
    model = seeded(1)
    assert input_spec(model, 32, None, (0.1, 0.2, 0.3), (0.5,)).mean == (0.1, 0.2, 0.3)
    assert input_spec(model, 32, None, (0.1, 0.2, 0.3), [0.25]).std == (0.25, 0.25, 0.25)
    assert input_spec(model, 32, None).mean == (0.5, 0.5, 0.5)


def test_the_heads_first_values_are_timms():
    model, before = seeded(1), seeded(1).state_dict()
    nn.init.ones_(model.head.bias)  # type: ignore[arg-type, union-attr]
    set_head(model, 0.5, None)
    assert torch.equal(model.state_dict()["head.weight"], before["head.weight"] * 0.5)
    assert torch.equal(model.state_dict()["head.bias"], torch.full((7,), 0.5))
    set_head(model, None, -3.0)
    assert torch.equal(model.state_dict()["head.bias"], torch.full((7,), -3.0))
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    with pytest.raises(UserError, match="need a model with one classifier"):
        set_head(seeded(1, num_classes=0), 0.5, None)


def test_timms_own_lines_about_keys_are_held_back(file, caplog):
    with caplog.at_level("INFO"):
        load(file, num_classes=12, model_kwargs=(*KWARGS, "global_pool=avg"))
    assert not [record for record in caplog.records if "keys" in record.getMessage()]
