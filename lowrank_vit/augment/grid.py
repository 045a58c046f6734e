"""Places of a batch's pixels, in whatever order these lie, for normalising, mixing and erasing.

A patch embedding reads pixels patch by patch. If they are computed in that order, torch.compile makes the embedding's
input of uint8 images in one pass; else it writes whole images first, in float32, and reads them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The axes of a batch of images after the first: (C, H, W), or (h, w, P * Q * C) for h x w patches of P x Q."""

    rows: Tensor
    columns: Tensor
    channels: Tensor
    """int64, to be broadcast over the axes: the place of each pixel in its image."""
    height: int
    width: int
    patch: tuple[int, int] | None

    @classmethod
    def of(cls, images: Tensor, patch: tuple[int, int] | None = None) -> Grid:
        """The grid of (B, C, H, W) images; by patches of (P, Q) if these fill the images exactly."""
        _, C, H, W = images.shape
        rows, columns, channels = (torch.arange(n, device=images.device) for n in (H, W, C))
        if patch is None or H % patch[0] or W % patch[1]:
            return cls(rows[:, None], columns, channels[:, None, None], H, W, None)
        P, Q = patch
        inside = torch.arange(P * Q * C, device=images.device)
        rows = rows[::P, None, None] + inside // (Q * C)
        return cls(rows, columns[::Q, None] + inside // C % Q, inside % C, H, W, patch)

    @property
    def index(self) -> Tensor:
        """int64: the number of each pixel of a (C, H, W) image."""
        return (self.channels * self.height + self.rows) * self.width + self.columns

    def spread(self, values: Tensor) -> Tensor:
        """Values of the images, (B,), to be broadcast over the axes."""
        return values.view(-1, 1, 1, 1)

    def along_channels(self, values: Tensor) -> Tensor:
        """Values of the channels, C in all, to be broadcast over the axes."""
        if self.patch is None:
            return values.view(-1, 1, 1)
        return values.flatten().repeat(self.patch[0] * self.patch[1])

    def is_inside(self, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Bool: whether each pixel is in a box, whose edges `spread` gave."""
        return (self.rows >= top) & (self.rows < bottom) & (self.columns >= left) & (self.columns < right)

    def of_images(self, images: Tensor) -> Tensor:
        """The pixels of (B, C, H, W) images, with the axes of the grid."""
        if self.patch is None:
            return images
        P, Q = self.patch
        return images.unflatten(3, (-1, Q)).unflatten(2, (-1, P)).permute(0, 2, 4, 3, 5, 1).flatten(3)

    def to_images(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) images, in channels_last, of pixels with the axes of the grid."""
        if self.patch is None:
            return pixels
        pixels_BhPwQC = pixels.unflatten(3, (*self.patch, -1)).transpose(2, 3)
        return pixels_BhPwQC.reshape(len(pixels), self.height, self.width, -1).permute(0, 3, 1, 2)
