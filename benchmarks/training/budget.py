"""The budget of a step: ms by kind of work, as limits from the device's peaks and as measured by a profile.

`python -m benchmarks.training.budget` prints the limits of ViT-S and ViT-B on an H100.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from benchmarks.harness.limits import copy_case, products_case
from benchmarks.harness.measure import measure

PRODUCTS, ATTENTION, NORMS = "matrix products", "attention", "norms and activations"
OPTIMIZER, EMA, REST = "optimizer", "EMA", "the rest"
GROUPS = (PRODUCTS, ATTENTION, NORMS, OPTIMIZER, EMA, REST)

_OF_TRITON = re.compile(r"triton_(poi|per|red)_")
_KINDS = (
    (ATTENTION, re.compile(r"sdpa|fmha|flash|scaled_dot_product|attention")),
    (EMA, re.compile(r"lerp")),
    (OPTIMIZER, re.compile(r"adam|sgd|multi_tensor_apply|_foreach")),
    (NORMS, re.compile(r"layer_?norm|gamma_?beta|gelu|silu|relu|tanh|batch_?norm")),
    (
        PRODUCTS,
        re.compile(r"gemm|nvjet|cutlass|cublas|xmma|splitk|triton_(tem|mm)|conv(?!ert)|wgrad|dgrad|::b?mm$|addmm"),
    ),
)
"""Groups, and parts of their kernels' or operators' names in lower case; the first match counts."""


@dataclass(frozen=True)
class Ceilings:
    """Peak speeds of a device, measured with one large product and one large copy."""

    flops_per_s: float
    """FLOP/s of bfloat16 products; a multiply-add counts as two."""
    bytes_per_s: float
    """Bytes read plus bytes written, per second."""

    def ms(self, flops: float = 0.0, moved: float = 0.0) -> float:
        """The least time for so many FLOPs and bytes, which can overlap."""
        return 1e3 * max(flops / self.flops_per_s, moved / self.bytes_per_s)


H100 = Ceilings(781e12, 2.98e12)
"""H100 80GB HBM3, torch 2.11: a product of 8192 x 8192 matrices, a copy on the device."""


def ceilings_of(device: torch.device) -> Ceilings:
    """Measure a device's peaks, in bfloat16."""
    size, flops = (1 << 30, 1e10) if device.type == "cuda" else (1 << 26, 1e8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    cases = {
        "product": products_case(flops, 1, "TFLOP/s", device, torch.bfloat16, unit_flops=1e12),
        "copy": copy_case(source, torch.zeros_like(source), 1),
    }
    found = measure("ceilings", cases, {}, environment={}).cases
    return Ceilings(1e12 * found["product"].median, 1e9 * found["copy"].median)


def group_of(name: str) -> str:
    """The group of a kernel, or of a torch operator, by its name.

    A kernel that torch.compile has fused from several operators belongs to norms and activations if it contains one,
    otherwise to the rest.
    """
    lower = name.lower()
    if _OF_TRITON.match(lower):
        return NORMS if _KINDS[3][1].search(lower) else REST
    return next((group for group, pattern in _KINDS if pattern.search(lower)), REST)


def groups_of(spans: Iterable[tuple[str, float]], steps: int) -> dict[str, float]:
    """Milliseconds per step of each group, from names and microseconds of `steps` steps."""
    found: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    for name, took in spans:
        found[group_of(name)] += took / 1e3 / steps
    return found


def limits_ms(model: nn.Module, batch_size: int, ceilings: Ceilings) -> dict[str, float] | None:
    """The least milliseconds per step of each group for one of timm's plain ViTs; None for another model.

    The step uses bfloat16 autocast: weights, their gradients and the residual stream are float32; inputs and outputs of
    products are bfloat16. Each kind of work is one pass that reads and writes each number once, forward and backward.
    Without recomputation, the backward pass has two products for each one of the forward pass, except for the images,
    which need no gradient.
    """
    blocks, plain = getattr(model, "blocks", None), cast(Any, model)
    mlp: Any = getattr(blocks[0], "mlp", None) if isinstance(blocks, nn.Sequential) and len(blocks) else None
    if not isinstance(blocks, nn.Sequential) or not hasattr(model, "patch_embed") or not hasattr(mlp, "fc1"):
        return None
    embed = plain.patch_embed
    D, depth, patches = plain.embed_dim, len(blocks), embed.num_patches
    tokens = patches + plain.num_prefix_tokens
    layers = [layer for layer in blocks.modules() if isinstance(layer, nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    params = sum(p.numel() for p in model.parameters())
    head = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)) - weights
    hidden, outputs = mlp.fc1.out_features, sum(layer.out_features for layer in layers)
    pixels = embed.proj.in_channels * embed.img_size[0] * embed.img_size[1]
    of_all = batch_size * tokens * D * depth
    ms = ceilings.ms
    return {
        PRODUCTS: ms(2 * batch_size * (3 * (tokens * weights + head) + 2 * patches * embed.proj.weight.numel())),
        # q, k, v and the output, and their gradients: 12 times bfloat16; two products forward, five backward.
        ATTENTION: ms(7 * 2 * tokens * of_all, 12 * 2 * of_all),
        # Two norms a block with the sum before them: 12 bytes forward, 16 backward. Activations: 4 and 6.
        NORMS: ms(moved=2 * 28 * of_all + 10 * batch_size * tokens * hidden * depth),
        OPTIMIZER: ms(moved=7 * 4 * params),
        EMA: ms(moved=3 * 4 * params),
        # Weights to bfloat16 and their gradients back; biases' gradients, which read those of all outputs; two uint8
        # images mixed into one; the position embedding.
        REST: ms(moved=12 * params + 2 * batch_size * tokens * outputs + 4 * batch_size * pixels + 12 * of_all / depth),
    }


def rows_of(
    columns: Mapping[str, Mapping[str, float] | None], batch_size: int, clock_ms: Mapping[str, float] | None = None
) -> list[list[str]]:
    """Rows of a table by group, followed by sum and img/s; a column that is None was not measured.

    With `clock_ms`, the wall time of a step in some of the columns, further rows give it and the device's idle time.
    """
    sums = {name: None if one is None else sum(one.values()) for name, one in columns.items()}
    rows = [[group, *(_ms(None if one is None else one[group]) for one in columns.values())] for group in GROUPS]
    rows.append(["together", *map(_ms, sums.values())])
    rows.append(["as img/s, if the device were never idle", *(_img_per_s(t, batch_size) for t in sums.values())])
    if not clock_ms:
        return rows
    idle, clock, speed = ["the device is idle"], ["by the clock"], ["as img/s"]
    for name, of_device in sums.items():
        took = clock_ms.get(name)
        if of_device is not None and took is None:  # a limit has no wall time
            cells = "", "", ""
        else:
            not_at_work = None if of_device is None or took is None else took - of_device
            cells = _ms(not_at_work), _ms(took), _img_per_s(took, batch_size)
        for row, cell in zip((idle, clock, speed), cells, strict=True):
            row.append(cell)
    return [*rows, idle, clock, speed]


def _ms(value: float | None) -> str:
    return "not yet measured" if value is None else f"{value:.2f}"


def _img_per_s(ms: float | None, batch_size: int) -> str:
    return "not yet measured" if ms is None else f"{1e3 * batch_size / ms:,.0f}"


def main() -> None:
    """Print the limits for an H100."""
    import timm

    for name in ("vit_small_patch16_224", "vit_base_patch16_224"):
        with torch.device("meta"):
            model = timm.create_model(name)
        tables = [rows_of({"limit": limits_ms(model, batch_size, H100)}, batch_size) for batch_size in (256, 512)]
        print(f"{name}: ms a step at batch 256, 512")
        for row, other in zip(*tables, strict=True):
            print(f"{row[0]:42}{row[1]:>10}{other[1]:>10}")


if __name__ == "__main__":
    main()
