"""Known attention classes: those whose layer named qkv has Q, K and V as the thirds of its rows.

Names and shapes do not tell: in tiny_vit, MaxViT and EfficientFormer the three parts of head 1 come first, then those
of head 2. So a layer counts only where the forward of the module that holds it is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from lowrank_vit.model.low_rank import LowRankLinear

_BY_HEAD = "head_first"
"""The attribute of a class that supports both orders; true where the rows are head by head."""
KNOWN = frozenset(
    """timm.layers.attention.Attention timm.layers.attention.AttentionRope timm.layers.attention2d.Attention2d
    timm.layers.attention_pool2d.AttentionPool2d timm.layers.attention_pool2d.RotAttentionPool2d
    timm.layers.diff_attention.DiffAttention timm.models.beit.Attention timm.models.cait.TalkingHeadAttn
    timm.models.coat.FactorAttnConvRelPosEnc timm.models.convit.MHSA timm.models.davit.ChannelAttention
    timm.models.davit.ChannelAttentionV2 timm.models.davit.WindowAttention timm.models.edgenext.CrossCovarianceAttn
    timm.models.eva.EvaAttention timm.models.fastvit.Attention timm.models.hiera.MaskUnitAttention
    timm.models.hieradet_sam2.MultiScaleAttention timm.models.maxxvit.Attention2d timm.models.maxxvit.AttentionCl
    timm.models.metaformer.Attention timm.models.mvitv2.MultiScaleAttention timm.models.nest.Attention
    timm.models.swin_transformer.WindowAttention timm.models.swin_transformer_v2.WindowAttention
    timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention timm.models.twins.LocallyGroupedAttn
    timm.models.visformer.Attention timm.models.vision_transformer_relpos.RelPosAttention
    timm.models.vision_transformer_sam.Attention timm.models.volo.Attention timm.models.xcit.XCA""".split()
)
"""The classes whose forward reshapes the outputs of `qkv` to (3, heads, dim), or takes three equal parts of them."""
PLAIN = frozenset({"timm.layers.attention.Attention"})
"""Of these the classes whose probabilities are softmax(scale q k^T), q and k through `q_norm` and `k_norm`, over tokens
(N, T, C): without a bias by position, rotation, windows or a second softmax."""

_ATTENTION_OF_TORCH, _OF_TORCH = "torch.nn.modules.activation.MultiheadAttention", "in_proj_weight"
"""torch's attention, and its parameter of three equal parts where queries, keys and values are of one width."""

# The parameters of a block of timm's plain ViT, DeiT, MAE and BEiT: such a state dict tells its layout without a class.
_QKV_OF_PLAIN_VIT = re.compile(r"(blocks\.\d+\.)attn\.qkv")
_PLAIN_VIT = ("norm1.weight", "attn.proj.weight", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight")


def is_named_qkv(name: str) -> bool:
    """Whether the name is that of a layer that computes queries, keys and values at once, in whatever order."""
    return name.rpartition(".")[2] in ("qkv", _OF_TORCH)


def fused_qkv(model: nn.Module) -> frozenset[str]:
    """Names of the modules whose weight's rows are Q, K and V, a third each; for torch's attention the parameter's."""
    modules = dict(model.named_modules())
    found = {f"{name}.qkv".lstrip(".") for name, module in modules.items() if _is_known(module)}
    of_torch = {
        f"{name}.{_OF_TORCH}".lstrip(".")
        for name, module in modules.items()
        if forward_of(module) == _ATTENTION_OF_TORCH and isinstance(module.in_proj_weight, Tensor)
    }
    return frozenset(name for name in found if _has_weight(model, name)) | of_torch


def fused_qkv_of_state(state: Mapping[str, Tensor], arch: str) -> frozenset[str]:
    """`fused_qkv` of a state dict: from timm's model `arch`, or where timm has none, from the names of a plain ViT."""
    of_torch = frozenset(key for key, weight in state.items() if key.endswith(_OF_TORCH) and _is_of_torch(weight))
    named = [name for key in state if key not in of_torch and is_named_qkv(name := key.removesuffix(".weight"))]
    outline = _outline(arch) if named else None
    if outline is None:
        return of_torch.union(name for name in named if _is_plain(state, name))
    # The file's model may have another depth.
    by_place = {_place(name): name in fused_qkv(outline) for name, _ in outline.named_modules() if is_named_qkv(name)}
    return of_torch.union(name for name in named if by_place.get(_place(name), False))


def has_plain_attention(module: nn.Module) -> bool:
    """Whether a module is an attention of `PLAIN` with one layer for Q, K and V."""
    return forward_of(module) in PLAIN and isinstance(getattr(module, "qkv", None), nn.Module)


def _is_known(module: nn.Module) -> bool:
    return not getattr(module, _BY_HEAD, False) and forward_of(module) in KNOWN


def forward_of(module: nn.Module) -> str:
    """The class that defines a module's forward, with its package: "timm.layers.attention.Attention"."""
    owner = next((c for c in type(module).__mro__ if "forward" in vars(c)), nn.Module)
    return f"{owner.__module__}.{owner.__qualname__}"


def _has_weight(model: nn.Module, name: str) -> bool:
    try:
        layer = model.get_submodule(name)
        return isinstance(layer, LowRankLinear) or isinstance(getattr(layer, "weight", None), Tensor)
    except AttributeError:  # an attention with separate layers
        return False


def _outline(arch: str) -> nn.Module | None:
    """The model with its weights on the device meta; None where timm does not know it or cannot build it so."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            return timm.create_model(arch) if timm.is_model(arch) else None
    except Exception:  # some constructors read values, which meta tensors lack
        return None


def _is_of_torch(weight: Tensor) -> bool:
    return weight.ndim == 2 and weight.shape[0] == 3 * weight.shape[1]


def _place(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


def _is_plain(state: Mapping[str, Tensor], name: str) -> bool:
    found = _QKV_OF_PLAIN_VIT.fullmatch(name)
    if not found or any(found[1] + part not in state for part in _PLAIN_VIT):
        return False
    return len(state[f"{name}.weight"]) == 3 * state[f"{found[1]}attn.proj.weight"].shape[-1]
