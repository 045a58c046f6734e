"""The patch embedding as a matrix product, with the weight of timm's convolution."""

from __future__ import annotations

from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F


class PatchProduct(nn.Conv2d):
    """A convolution over patches that do not overlap, computed in training as one matrix product.

    Weight and bias are the convolution's, (D, C, P, Q) and (D,), so their names stay the same. A patch's pixels are
    taken by row, column and channel, which is the memory order of channels_last weights, so weights are not copied.
    Images are copied once, in one pass with whatever torch.compile fuses before it. In evaluation the layer is the
    convolution, so scores are bit-identical to timm's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H // P, W // Q) in channels_last; pixels that fill no patch are left out."""
        if not self.training:
            return super().forward(input)
        (P, Q), (B, C, H, W), D = self.kernel_size, input.shape, self.out_channels
        h, w = H // P, W // Q
        pixels_BhPwQC = input[:, :, : h * P, : w * Q].permute(0, 2, 3, 1).reshape(B, h, P, w, Q, C)
        patches = pixels_BhPwQC.transpose(2, 3).reshape(B, h, w, P * Q * C)
        weight = self.weight.permute(0, 2, 3, 1).reshape(D, P * Q * C)
        return F.linear(patches, weight, self.bias).permute(0, 3, 1, 2)


def set_patch_embedding(model: nn.Module, *, as_product: bool) -> bool:
    """Make the patch embedding a `PatchProduct` or timm's convolution, in place; returns whether it is a product now.

    Its parameters stay the same objects. Only timm's plain `PatchEmbed` is changed: stems of several layers, patches
    that overlap, other classes and convolutions with hooks are left as they are.
    """
    embed = getattr(model, "patch_embed", None)
    if type(embed) is not PatchEmbed:
        return False
    old, wanted = embed.proj, PatchProduct if as_product else nn.Conv2d
    if type(old) is not wanted and _is_plain(old):
        P, Q = old.kernel_size
        new = wanted(old.in_channels, old.out_channels, (P, Q), (P, Q), bias=old.bias is not None, device="meta")
        new.weight, new.bias = old.weight, old.bias
        embed.proj = new.train(old.training)
    return isinstance(embed.proj, PatchProduct)


def patch_of_product(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the patches if the model's embedding is a `PatchProduct` in training mode, otherwise None."""
    layer = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(layer, PatchProduct) or not layer.training:
        return None
    P, Q = layer.kernel_size
    return P, Q


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) not in (nn.Conv2d, PatchProduct) or not isinstance(layer, nn.Conv2d):
        return False
    if any(vars(layer)[f"_{name}_hooks"] for name in ("forward", "forward_pre", "backward", "backward_pre")):
        return False
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return geometry == (layer.kernel_size, (0, 0), (1, 1), 1)
