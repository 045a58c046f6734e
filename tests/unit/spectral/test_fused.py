"""Whose rows are Q, K and V: what is known of each attention, against what its forward computes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.fused import KNOWN, fused_qkv, fused_qkv_of_state
from lowrank_vit.spectral.layers import targets_of_model
from tests.spectra import tiny_vit

TOKENS, IMAGE = (2, 16, 24), (2, 24, 4, 4)
CALLS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[Any, ...]]] = {
    "timm.layers.attention.Attention": ({"num_heads": 3}, TOKENS, ()),
    "timm.layers.attention.AttentionRope": ({"num_heads": 3}, TOKENS, ()),
    "timm.layers.attention2d.Attention2d": ({"num_heads": 3}, IMAGE, ()),
    "timm.layers.attention_pool2d.AttentionPool2d": ({"num_heads": 3, "head_dim": None, "feat_size": 4}, IMAGE, ()),
    "timm.layers.attention_pool2d.RotAttentionPool2d": ({"num_heads": 2, "head_dim": 16}, IMAGE, ()),
    "timm.layers.diff_attention.DiffAttention": ({"num_heads": 3}, TOKENS, ()),
    "timm.models.beit.Attention": ({"num_heads": 3}, TOKENS, ()),
    "timm.models.cait.TalkingHeadAttn": ({"num_heads": 3}, TOKENS, ()),
    "timm.models.coat.FactorAttnConvRelPosEnc": (
        {"num_heads": 3, "shared_crpe": lambda q, v, size: torch.zeros(())},
        (2, 17, 24),
        ((4, 4),),
    ),
    "timm.models.convit.MHSA": ({"num_heads": 3}, TOKENS, ()),
    "timm.models.davit.ChannelAttention": ({"num_heads": 3}, TOKENS, ()),
    "timm.models.davit.ChannelAttentionV2": ({"num_heads": 3}, TOKENS, ()),
    "timm.models.davit.WindowAttention": ({"num_heads": 3, "window_size": (4, 4)}, TOKENS, ()),
    "timm.models.edgenext.CrossCovarianceAttn": ({"num_heads": 3}, TOKENS, ()),
    "timm.models.eva.EvaAttention": ({"num_heads": 3, "scale_norm": False}, TOKENS, ()),
    "timm.models.fastvit.Attention": ({"head_dim": 8}, IMAGE, ()),
    "timm.models.hiera.MaskUnitAttention": ({"dim_out": 24, "heads": 3}, TOKENS, ()),
    "timm.models.hieradet_sam2.MultiScaleAttention": ({"dim_out": 24, "num_heads": 3}, (2, 4, 4, 24), ()),
    "timm.models.maxxvit.Attention2d": ({"dim_head": 8, "head_first": False}, IMAGE, ()),
    "timm.models.maxxvit.AttentionCl": ({"dim_head": 8, "head_first": False}, (2, 4, 4, 24), ()),
    "timm.models.metaformer.Attention": ({"head_dim": 8}, TOKENS, ()),
    "timm.models.mvitv2.MultiScaleAttention": (
        {"dim_out": 24, "feat_size": (4, 4), "num_heads": 3, "has_cls_token": False, "residual_pooling": False},
        TOKENS,
        ((4, 4),),
    ),
    "timm.models.nest.Attention": ({"num_heads": 3}, (2, 1, 16, 24), ()),
    "timm.models.swin_transformer.WindowAttention": ({"num_heads": 3, "window_size": 4}, TOKENS, ()),
    "timm.models.swin_transformer_v2.WindowAttention": ({"num_heads": 3, "window_size": (4, 4)}, TOKENS, ()),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": (
        {"num_heads": 3, "window_size": (4, 4)},
        TOKENS,
        (),
    ),
    "timm.models.twins.LocallyGroupedAttn": ({"num_heads": 3, "ws": 2}, TOKENS, ((4, 4),)),
    "timm.models.visformer.Attention": ({"num_heads": 3}, IMAGE, ()),
    "timm.models.vision_transformer_relpos.RelPosAttention": ({"num_heads": 3}, TOKENS, ()),
    "timm.models.vision_transformer_sam.Attention": ({"num_heads": 3}, (2, 4, 4, 24), ()),
    "timm.models.volo.Attention": ({"num_heads": 3}, (2, 4, 4, 24), ()),
    "timm.models.xcit.XCA": ({"num_heads": 3}, TOKENS, ()),
}
"""By class: arguments after `dim` of 24, the shape of an input, and what else its forward takes."""


def make(name: str) -> nn.Module:
    module, _, cls = name.rpartition(".")
    torch.manual_seed(0)
    made = getattr(importlib.import_module(module), cls)(24, **CALLS[name][0]).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # some begin as 0 or 1
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return made


def run(module: nn.Module, name: str, factors: tuple[float, float, float]) -> Tensor:
    """The output with the thirds of what `qkv` gives multiplied by these."""
    weight, bias = module.get_parameter("qkv.weight"), getattr(module.qkv, "bias", None)
    kept = [(p, p.detach().clone()) for p in (weight, bias) if p is not None]
    by_row = torch.tensor(factors).repeat_interleave(len(weight) // 3)
    with torch.no_grad():
        for parameter, value in kept:
            parameter.copy_(value * by_row.view(-1, *[1] * (value.ndim - 1)))
        for own, factor in zip(("q_bias", "k_bias", "v_bias"), factors, strict=True):
            if isinstance(found := getattr(module, own, None), Tensor):
                found.mul_(factor)
        x = torch.randn(CALLS[name][1], generator=torch.Generator().manual_seed(1))
        out = module(x, *CALLS[name][2])
        out = out[0] if isinstance(out, tuple) else out
        for parameter, value in kept:
            parameter.copy_(value)
    return out


def test_every_known_class_is_tried() -> None:
    assert set(CALLS) == KNOWN


NOT_A_PRODUCT = {
    "timm.models.coat.FactorAttnConvRelPosEnc",  # softmax of the keys alone
    "timm.models.mvitv2.MultiScaleAttention",  # LayerNorm with a bias after queries and keys
}
VALUES = {"timm.models.davit.ChannelAttention": 0}
"""The third whose part is the values', where it is not the last: there K and V are multiplied first, and then Q."""


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_third_is_what_the_forward_takes_for_values_and_the_others_for_queries_and_keys(name: str) -> None:
    def out(*factors: float) -> Tensor:
        """With these factors of queries, keys and values."""
        order = factors[2:] + factors[:2] if name in VALUES else factors
        return run(make(name), name, (order[0], order[1], order[2]))

    assert fused_qkv(make(name)) == {"qkv"}
    whole, without_values = out(1, 1, 1), out(1, 1, 0)
    assert not torch.allclose(whole, without_values, atol=1e-3)
    # With the values 0 queries and keys change nothing.
    torch.testing.assert_close(without_values, out(3, 5, 0))
    # Queries meet keys in a product or a cosine.
    if name not in NOT_A_PRODUCT:
        torch.testing.assert_close(out(2, 0.5, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", True),
        ("deit_tiny_distilled_patch16_224", True),
        ("beit_base_patch16_224", True),
        ("swin_tiny_patch4_window7_224", True),
        ("eva02_base_patch14_448", False),
        ("tiny_vit_5m_224", False),
        ("maxvit_tiny_tf_224", True),
        ("maxvit_nano_rw_256", False),
        ("efficientformer_l1", False),
        ("levit_128", False),
    ],
)
def test_whose_qkv_may_be_split_is_known_of_a_model_and_of_its_state_alike(name: str, expected: bool) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = fused_qkv(model)
    assert bool(found) is expected
    assert fused_qkv_of_state(model.state_dict(), name) == found
    has_fused = any(key.endswith("qkv.weight") for key in model.state_dict())
    if has_fused and not expected:
        with pytest.raises(UserError, match=r'not known.*without --spec-split-qkv: --spec-targets "qkv"'):
            targets_of_model(model, "qkv", split_qkv=True)
        assert not any(target.is_fused for target in targets_of_model(model, "qkv").values())


def test_a_state_of_no_known_model_is_judged_by_a_plain_vits_names() -> None:
    state = tiny_vit().state_dict()
    named = {f"blocks.{b}.attn.qkv" for b in (0, 1)}
    assert fused_qkv_of_state(state, "") == fused_qkv_of_state(state, "my_own") == named
    assert fused_qkv_of_state(state, "vit_base_patch16_224") == named  # which is deeper and wider
    other = {f"stages.{key}": w for key, w in state.items()}
    assert fused_qkv_of_state(other, "") == frozenset()
    assert fused_qkv_of_state({"blocks.0.attn.qkv.weight": torch.ones(48, 16)}, "") == frozenset()


class ByHead(nn.Module):
    """An attention of one's own, with the rows of each head together."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


def test_an_attention_of_ones_own_is_not_known_and_one_that_inherits_the_forward_is() -> None:
    class Renamed(type(tiny_vit().blocks[0].attn)):  # type: ignore[misc]
        pass

    class Changed(Renamed):
        def forward(self, x: Tensor, *_: Any) -> Tensor:
            return x

    assert fused_qkv(ByHead()) == frozenset()
    assert fused_qkv(nn.ModuleDict({"a": Renamed(8, 2), "b": Changed(8, 2)})) == {"a.qkv"}
