"""Small models, layers and moments that the tests of low rank share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_vit.lowrank.calibration import Moments

IMAGES, TOKENS = 12, 5


class TinyModel(nn.Module):
    """Images (N, 3, 4, 4) as four tokens of 12 numbers through two blocks of Linears, to logits of three classes."""

    def __init__(self, *, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(12, width), "fc2": nn.Linear(width, 12, bias=i == 0)}) for i in range(2)
        )
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        x = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(len(images), 4, 12)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + self.drop(block["fc2"](torch.tanh(block["fc1"](x))))
        return self.head(x.mean(dim=1))

    def targets(self) -> dict[str, nn.Linear]:
        """The layers of its blocks, in order."""
        named = dict(self.blocks.named_modules(prefix="blocks"))
        return {name: layer for name, layer in named.items() if isinstance(layer, nn.Linear)}


def model_and_images(images: int = 10, classes: int = 3) -> tuple[TinyModel, Tensor]:
    """A model in float64, in training mode, and its images."""
    torch.manual_seed(0)
    return TinyModel(classes=classes).double(), torch.randn(images, 3, 4, 4, dtype=torch.float64)


def samples(rows: int, cols: int, images: int = IMAGES, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Inputs (N, T, C), with a mean and columns of unlike scale, and gradients (N, T, R); float64."""
    made = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=made)

    x_NTC = (normal(images, tokens, cols) @ normal(cols, cols) + normal(cols)) * 3.0 ** normal(cols)
    g_NTR = normal(images, tokens, rows) @ normal(rows, rows) * 0.01
    return x_NTC, g_NTR


def moments_of(x_NTC: Tensor, g_NTR: Tensor, pieces: int = 1) -> Moments:
    """The moments as they are defined, one image and token after another."""
    (images, tokens, cols), rows = x_NTC.shape, g_NTR.shape[2]
    flat = x_NTC.reshape(-1, cols)
    input_CC = sum((torch.outer(x, x) for x in flat), torch.zeros(cols, cols).double()) / len(flat)
    gradient = sum((torch.outer(g, g) for g in g_NTR.reshape(-1, rows)), torch.zeros(rows, rows).double()) / images
    fisher_RC = torch.zeros(rows, cols).double()
    for x_TC, g_TR in zip(x_NTC, g_NTR, strict=True):
        per_weight = sum((torch.outer(g, x) for x, g in zip(x_TC, g_TR, strict=True)), torch.zeros(rows, cols).double())
        fisher_RC += per_weight**2 / images
    fisher_PC = fisher_RC.reshape(pieces, -1, cols).sum(dim=1)
    return Moments(images, images * tokens, input_CC, flat.mean(dim=0), flat.abs().mean(dim=0), gradient, fisher_PC)


def matrix(rows: int, cols: int, seed: int = 0) -> Tensor:
    """A weight, float64."""
    return torch.randn(rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
