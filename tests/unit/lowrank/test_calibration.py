"""Calibration against definitions in plain loops, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.calibration import Moments, blocks_of, calibrate, calibrate_in_turn, squared_gradients
from lowrank_vit.plan.philox import Stream, philox, to_unit
from tests.unit.lowrank.examples import TinyModel, model_and_images, moments_of, samples


def assert_same(found: Moments, expected: Moments, rtol: float = 1e-10) -> None:
    assert (found.images, found.tokens) == (expected.images, expected.tokens)
    for field in dataclasses.fields(Moments)[2:]:
        torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), rtol=rtol, atol=1e-14)
        assert getattr(found, field.name).dtype == torch.float64


def by_definition(model: TinyModel, images: Tensor, name: str, seed: int) -> Moments:
    """Labels, gradients and moments of one layer, an image at a time."""
    layer = model.targets()[name]
    inputs: list[Tensor] = []
    gradients: list[Tensor] = []
    fisher = torch.zeros_like(layer.weight)
    model.eval()
    for n, image in enumerate(images):
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _, args, output, seen=seen: seen.extend([args[0], output]))
        logits = model(image[None])
        hook.remove()
        u = to_unit(philox(np.uint64(seed), 0, n, 0, Stream.LABEL)[0])
        label = int(np.searchsorted(np.cumsum(torch.softmax(logits[0], 0).detach().numpy()), u))
        loss = functional.cross_entropy(logits[0], torch.tensor(label))
        of_weight, of_output = torch.autograd.grad(loss, [layer.weight, seen[1]])
        fisher += of_weight**2 / len(images)
        inputs.append(seen[0].detach()[0])
        gradients.append(of_output[0])
    moments = moments_of(torch.stack(inputs), torch.stack(gradients))
    torch.testing.assert_close(moments.fisher_PC, fisher.sum(dim=0, keepdim=True))
    return moments


def test_moments_are_those_of_plain_loops_however_images_are_batched():
    model, images = model_and_images()
    found = calibrate(model, images.split(4), model.targets(), seed=7)
    for name in model.targets():
        assert_same(found[name], by_definition(model, images, name, seed=7))
    for size in (1, 10):
        again = calibrate(model, images.split(size), model.targets(), seed=7)
        for name in found:
            assert_same(again[name], found[name])
    other = calibrate(model, [images], model.targets(), seed=8)
    assert not torch.allclose(other["blocks.0.fc1"].gradient_RR, found["blocks.0.fc1"].gradient_RR)


def test_labels_are_drawn_from_the_models_own_softmax():
    """With one token an image, the gradient at the logits is p minus the label's unit vector: its mean tends to 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    images = torch.randn(1, 3, 2, 2, dtype=torch.float64).expand(4000, -1, -1, -1)
    moments = calibrate(model, [images], {"1": model.get_submodule("1")})["1"]  # pyright: ignore[reportArgumentType]
    p = model(images[:1]).softmax(dim=1)[0].detach()
    torch.testing.assert_close(moments.gradient_RR, p.diag() - torch.outer(p, p), atol=0.02, rtol=0.0)


def test_a_model_is_left_as_it_was():
    model, images = model_and_images()
    layers = list(model.targets().values())
    layers[0].weight.requires_grad_(False)
    model.blocks[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        calibrate(model, [images], model.targets())
    assert model.training
    assert model.drop.training
    assert not layers[2].training
    assert layers[0].training
    assert not layers[0].weight.requires_grad
    assert layers[0].bias.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert images.grad is None
    assert not any(layer._forward_hooks for layer in layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("tokens", "pieces"), [(2, 1), (2, 3), (40, 1), (40, 3)])
def test_squared_gradients_with_and_without_the_gradients_themselves(tokens: int, pieces: int):
    x_NTC, g_NTR = samples(9, 7, images=4, tokens=tokens)
    per_weight = torch.einsum("ntr,ntc->nrc", g_NTR, x_NTC) ** 2
    expected = per_weight.sum(dim=0).reshape(pieces, -1, 7).sum(dim=1)
    torch.testing.assert_close(squared_gradients(x_NTC, g_NTR, pieces), expected)


def test_pieces_of_rows_have_the_moments_of_a_layer_of_those_rows():
    model, images = model_and_images()
    name = "blocks.0.fc1"
    moments = calibrate(model, [images], model.targets(), pieces={name: 3})[name]
    assert moments.fisher_PC.shape == (3, 12)
    x_NTC, g_NTR = samples(6, 4)
    assert_same(moments_of(x_NTC, g_NTR, pieces=3).rows(2, 4), moments_of(x_NTC, g_NTR[:, :, 2:4]))
    with pytest.raises(ValueError, match="not whole pieces of 2"):
        moments.rows(0, 3)
    with pytest.raises(UserError, match="6 rows, which cannot be split into 4 equal pieces"):
        calibrate(model, [images], model.targets(), pieces={name: 4})


def test_sums_are_the_same_whatever_is_chunked(monkeypatch: pytest.MonkeyPatch):
    model, images = model_and_images()
    expected = calibrate(model, [images], model.targets())
    monkeypatch.setattr("lowrank_vit.lowrank.calibration._CHUNK", 30)
    monkeypatch.setattr("lowrank_vit.lowrank.calibration._BLOCK", 5)
    for name, moments in calibrate(model, [images], model.targets()).items():
        assert_same(moments, expected[name])


def test_nothing_of_a_forward_pass_is_alive_in_the_next():
    model, images = model_and_images()
    alive: list[StorageWeakRef] = []
    counts: list[int] = []

    def look(*_: object) -> None:
        counts.append(sum(not one.expired() for one in alive))

    def keep(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        alive.append(StorageWeakRef(inputs[0].untyped_storage()))

    model.register_forward_pre_hook(look)
    for layer in model.targets().values():
        layer.register_forward_pre_hook(keep)
    calibrate(model, images.split(2), model.targets())
    assert len(alive) == 4 * len(counts)
    assert counts[2:] == [0] * 5  # behind the two passes that look at how much one image takes


@pytest.mark.parametrize(("room", "passes"), [(1, 1), (5 * 4 * (12 + 6 + 12 + 6) * 8, 5), (2**40, 10)])
def test_a_forward_pass_takes_as_many_images_as_there_is_room_for(
    room: int, passes: int, monkeypatch: pytest.MonkeyPatch
):
    """The inputs of an image's layers are four tokens of 12 and of 6 numbers; their outputs and more are kept, too."""
    model, images = model_and_images()
    expected = calibrate(model, images.split(4), model.targets())
    monkeypatch.setattr("lowrank_vit.lowrank.calibration._ROOM_BYTES", room)
    heard: list[int] = []
    found = calibrate(model, [images], model.targets(), progress=heard.append)
    steps = [after - before for before, after in zip([0, *heard], heard, strict=False)]
    assert sum(steps) == 10
    assert passes / 4 <= max(steps) <= passes
    for name, moments in found.items():
        assert_same(moments, expected[name])


class _Laid(nn.Module):
    """A layer that four tokens of 12 numbers come to in one layout or another."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.layer, self.head = layout, nn.Linear(12, 6).double(), nn.Linear(6, 3).double()
        self.table = nn.Parameter(torch.randn(4, 12, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 3)."""
        x_NTC = images.reshape(len(images), 4, 12)
        if self.layout == "tokens first":
            y_NTR = self.layer(x_NTC.transpose(0, 1)).transpose(0, 1)
        elif self.layout == "windows":
            y_NTR = self.layer(x_NTC.reshape(-1, 2, 2, 12)).reshape(-1, 4, 6)
        elif self.layout == "flat":
            y_NTR = self.layer(x_NTC.reshape(-1, 12)).reshape(-1, 4, 6)
        else:
            y_NTR = self.layer(self.table) + x_NTC[..., :6]
        return self.head(y_NTR.mean(dim=1))


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_a_layer_to_which_tokens_do_not_come_image_by_image_is_refused(count: int):
    images = torch.randn(count, 3, 4, 4, dtype=torch.float64)
    for layout in ("tokens first", "of no image"):
        model = _Laid(layout)
        with pytest.raises(UserError, match="layer does not take one image's tokens after another's"):
            calibrate(model, [images], {"layer": model.layer})
    flat, windows = (_Laid(layout) for layout in ("flat", "windows"))
    expected = calibrate(flat, [images], {"layer": flat.layer})["layer"]
    assert_same(calibrate(windows, [images], {"layer": windows.layer})["layer"], expected)


def test_in_turn_each_block_sees_those_before_it_compressed():
    model, images = model_and_images()
    plain = calibrate(model, [images], model.targets())
    seen: dict[str, Moments] = {}
    heard: list[int] = []

    def compress(moments: dict[str, Moments]) -> None:
        seen.update(moments)
        with torch.no_grad():
            for name in moments:
                model.targets()[name].weight *= 0.5

    calibrate_in_turn(model, lambda: images.split(5), model.targets(), compress, progress=heard.append)
    assert heard == [5, 10, 15, 20]
    assert list(seen) == list(plain)
    torch.testing.assert_close(seen["blocks.0.fc1"].input_CC, plain["blocks.0.fc1"].input_CC)
    assert not torch.allclose(seen["blocks.1.fc1"].input_CC, plain["blocks.1.fc1"].input_CC)
    torch.manual_seed(0)
    fresh = TinyModel().double()
    with torch.no_grad():
        for name in ("blocks.0.fc1", "blocks.0.fc2"):
            fresh.targets()[name].weight *= 0.5
    again = calibrate(fresh, [images], fresh.targets())
    for name in ("blocks.1.fc1", "blocks.1.fc2"):
        assert_same(seen[name], again[name])


def test_blocks_are_names_that_agree_up_to_their_last_number():
    names = ["stem.0", "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "head"]
    assert blocks_of(names) == [["stem.0"], names[1:3], ["blocks.1.attn.qkv"], ["head"]]


def test_one_class_and_one_image_have_moments_too():
    model, images = model_and_images(images=1, classes=1)
    moments = calibrate(model, [images, images[:0]], model.targets())["blocks.0.fc1"]
    assert (moments.images, moments.tokens) == (1, 4)
    assert not moments.gradient_RR.any()


def test_what_cannot_be_calibrated_is_said():
    model, images = model_and_images()
    with pytest.raises(UserError, match="calibration set is empty"):
        calibrate(model, [], model.targets())
    with pytest.raises(UserError, match="targets match nothing"):
        calibrate(model, [images], {})
    with pytest.raises(UserError, match=r"unused cannot be calibrated: the model's forward pass does not call it"):
        calibrate(model, [images], {"unused": nn.Linear(3, 3).double()})
    with pytest.raises(UserError, match="logits are not finite: the images hold a NaN"):
        calibrate(model, [images, images / 0], model.targets())
    with torch.no_grad():
        model.targets()["blocks.1.fc1"].weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"logits are not finite: blocks\.1\.fc1\.weight holds a NaN"):
        calibrate(model, [images], model.targets())
    with pytest.raises(UserError, match=r"needs a model in float32, but .* is bfloat16"):
        calibrate(model.bfloat16(), [images], model.targets())
