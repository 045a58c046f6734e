"""The patch embedding as a product is timm's convolution: values, gradients, names, and what it may stand in for."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm, PatchEmbed, PatchEmbedWithSize
from torch import nn

from lowrank_vit.config.options import Optim
from lowrank_vit.model.optimizer import create_optimizer
from lowrank_vit.model.patches import PatchProduct, set_patch_embedding

KINDS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "square": ({"img_size": 24, "patch_size": 8}, (24, 24)),
    "long image": ({"img_size": (16, 40), "patch_size": 8}, (16, 40)),
    "long patches": ({"img_size": (12, 20), "patch_size": (3, 5)}, (12, 20)),
    "pixels left over": ({"img_size": 27, "patch_size": 8}, (27, 27)),
    "padded": ({"img_size": 24, "patch_size": 8, "strict_img_size": False, "dynamic_img_pad": True}, (19, 30)),
    "any size": ({"img_size": None, "patch_size": 4}, (8, 12)),
    "not flattened": ({"img_size": 16, "patch_size": 4, "flatten": False}, (16, 16)),
    "NHWC": ({"img_size": 16, "patch_size": 4, "output_fmt": "NHWC"}, (16, 16)),
    "NLC": ({"img_size": 16, "patch_size": 4, "output_fmt": "NLC"}, (16, 16)),
    "normed": ({"img_size": 16, "patch_size": 4, "norm_layer": LayerNorm}, (16, 16)),
    "without bias": ({"img_size": 16, "patch_size": 4, "bias": False}, (16, 16)),
    "five channels": ({"img_size": 16, "patch_size": 4, "in_chans": 5}, (16, 16)),
}


class Model(nn.Module):
    """Nothing but a patch embedding."""

    def __init__(self, patch_embed: nn.Module) -> None:
        super().__init__()
        self.patch_embed = patch_embed


def computed(embed: PatchEmbed, images: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of images and parameters, of a loss that weighs each output differently."""
    images = images.clone().requires_grad_()
    out = embed(images)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    found = [out.detach(), images.grad, *(p.grad for p in embed.parameters())]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_values_and_gradients_are_the_convolutions(kind, layout):
    arguments, size = KINDS[kind]
    torch.manual_seed(1)
    conv = PatchEmbed(embed_dim=6, **arguments).to(torch.float64, memory_format=layout)  # type: ignore[call-overload]
    product = deepcopy(conv)
    assert set_patch_embedding(Model(product), as_product=True)
    images = torch.randn(3, arguments.get("in_chans", 3), *size, dtype=torch.float64).to(memory_format=layout)
    expected, found = computed(conv, images), computed(product, images)
    assert len(found) == 2 + len(list(conv.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    low = [computed(deepcopy(one).bfloat16(), images.bfloat16()) for one in (conv, product)]
    for exact, *rounded in zip(expected, *low, strict=True):  # neither is further from the exact numbers
        errors = [float((one.double() - exact).norm() / exact.norm()) for one in rounded]
        assert errors[1] < max(1.5 * errors[0], 4e-3)


def check_low_precision(device: torch.device) -> None:
    """Of a loss and its gradients, computed compiled and with bf16 autocast; by the convolution, not compiled."""
    torch.manual_seed(1)
    conv = PatchEmbed(32, 8, embed_dim=96).to(device)
    product = deepcopy(conv)
    assert set_patch_embedding(Model(product), as_product=True)
    images = torch.randn(16, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    weights = torch.linspace(-1, 1, 16 * 16 * 96, device=device).view(16, 16, 96)

    def loss_of(embed: PatchEmbed, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=images.dtype is torch.float32):
            out = embed(images)
        return (out.to(images.dtype) * weights).square().sum()

    found: list[list[torch.Tensor]] = []
    for embed, computed_by in ((deepcopy(conv).double(), loss_of), (conv, loss_of), (product, torch.compile(loss_of))):
        loss = computed_by(embed, images.to(next(embed.parameters()).dtype))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in embed.parameters() if p.grad is not None)])
    assert len(found[0]) == 3
    for exact, *rounded in zip(*found, strict=True):
        errors = [float((one.double() - exact).norm() / exact.norm()) for one in rounded]
        assert errors[1] < max(1.5 * errors[0], 4e-3)


def test_what_others_see_is_timms():
    """Names, objects and their order; so weights, optimizer and layer decay are as without it."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_classes=10)
    parameters, names = list(model.parameters()), list(model.state_dict())
    groups = partial(create_optimizer, Optim(opt="adamw", weight_decay=0.05, layer_decay=0.65), model, 1e-3)
    before = [[id(p) for p in group["params"]] for group in groups().param_groups]
    assert set_patch_embedding(model, as_product=True)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    assert [[id(p) for p in group["params"]] for group in groups().param_groups] == before
    assert isinstance(model.patch_embed.proj, nn.Conv2d)  # type: ignore[union-attr]
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_classes=10)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), plain.eval()(images))  # scores are timm's bits
    assert not set_patch_embedding(model, as_product=False)
    assert type(model.patch_embed.proj) is nn.Conv2d  # type: ignore[union-attr]
    assert torch.equal(model.train()(images), plain.train()(images))


def changed(**attributes: Any) -> PatchEmbed:
    embed = PatchEmbed(16, 4, embed_dim=6)
    embed.proj = nn.Conv2d(**{"in_channels": 3, "out_channels": 6, "kernel_size": 4, "stride": 4, **attributes})
    return embed


def with_hook() -> PatchEmbed:
    embed = PatchEmbed(16, 4, embed_dim=6)
    embed.proj.register_forward_hook(lambda *_: None)
    return embed


def parametrized() -> PatchEmbed:
    embed = PatchEmbed(16, 4, embed_dim=6)
    torch.nn.utils.parametrizations.weight_norm(embed.proj)
    return embed


@pytest.mark.parametrize(
    "make",
    [
        partial(changed, stride=2),
        partial(changed, padding=1),
        partial(changed, padding="valid"),
        partial(changed, dilation=2),
        partial(changed, groups=3),
        with_hook,
        parametrized,
        partial(PatchEmbedWithSize, 16, 4, embed_dim=6),
        partial(nn.Conv2d, 3, 6, 4, 4),
    ],
    ids="overlap padding valid dilation groups hook parametrized subclass stem".split(),
)
def test_what_is_not_the_plain_embedding_is_left_alone(make):
    model = Model(make())
    before = list(model.modules())
    assert not set_patch_embedding(model, as_product=True)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert not any(isinstance(module, PatchProduct) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_r_s16_p8_224", "swinv2_tiny_window8_256"])
def test_models_of_other_kinds(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert set_patch_embedding(model, as_product=True) == ("swin" in name)
