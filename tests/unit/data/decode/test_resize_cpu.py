"""Batched crop, resize and flip against PIL on real photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from lowrank_vit.common.filters import BICUBIC, BILINEAR
from lowrank_vit.data.decode.resize_cpu import resize_batch

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def crop_resize_flip(images, windows, flips, kernels, size):
    low, length = windows[:, :2].double(), windows[:, 2:].double()
    spans = torch.stack([low, length / size, low, length], 2)
    B, H, W, _ = images.shape
    resized = np.empty((B, size, size, 3), np.uint8)
    addresses, num_bytes = images.data_ptr() + np.arange(B) * H * W * 3, np.full(B, H * W * 3)
    planned = spans.numpy(), kernels.numpy().astype(np.int8), flips.numpy()
    assert resize_batch(addresses, num_bytes, np.full(B, W * 3), *planned, resized).all()
    return torch.from_numpy(resized)


def both(photo, window, flip, size, kernel):
    """The same crop by us and by PIL, int64 (size, size, 3) each."""
    top, left, height, width = window
    kernels = torch.tensor([list(FILTERS).index(kernel)])
    images, windows, flips = torch.from_numpy(photo)[None], torch.tensor([window]), torch.tensor([flip])
    ours = crop_resize_flip(images, windows, flips, kernels, size)[0].numpy()
    image = Image.fromarray(photo).crop((left, top, left + width, top + height)).resize((size, size), FILTERS[kernel])
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ours.astype(int), np.asarray(image).astype(int)


@pytest.fixture(scope="module", params=[0, 1], ids=["temple", "flower"])
def photo(request):
    return np.ascontiguousarray(load_sample_images().images[request.param][::2, ::2])


@pytest.mark.parametrize("kernel", FILTERS)
@pytest.mark.parametrize("flip", [False, True])
def test_enlarging_is_pils_within_one_level(photo, kernel, flip):
    for window in [(0, 0, 32, 32), (10, 20, 17, 29), (5, 5, 1, 40), (100, 200, 3, 3)]:
        ours, pil = both(photo, window, flip, 64, kernel)
        assert np.abs(ours - pil).max() <= 1


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_shrinking_is_pils_but_for_the_order_of_passes(photo, kernel):
    for window in [(0, 0, 200, 300), (3, 7, 180, 90), (20, 20, 100, 290)]:
        ours, pil = both(photo, window, False, 64, kernel)
        assert np.abs(ours - pil).max() <= 8
        assert np.mean((ours - pil) ** 2) < 255**2 / 10**4.8  # a PSNR above 48 dB


def test_same_size_copies_the_pixels(photo):
    crop = photo[4:36, 8:40]
    images, windows = torch.from_numpy(photo)[None], torch.tensor([[4, 8, 32, 32]])
    ours = crop_resize_flip(images, windows, torch.tensor([False]), torch.tensor([BICUBIC]), 32)
    assert np.array_equal(ours[0].numpy(), crop)


def test_samples_of_a_batch_do_not_mix(photo):
    images = torch.from_numpy(np.stack([photo[:64, :64], photo[64:128, 64:128]]))
    windows, flips = torch.tensor([[0, 0, 30, 40], [9, 9, 50, 20]]), torch.tensor([True, False])
    kernels = torch.tensor([BILINEAR, BICUBIC])
    together = crop_resize_flip(images, windows, flips, kernels, 24)
    for n in range(2):
        one = slice(n, n + 1)
        alone = crop_resize_flip(images[one], windows[one], flips[one], kernels[one], 24)
        assert torch.equal(together[n], alone[0])


def test_a_window_that_leaves_the_memory_is_not_read():
    """Sizes that an index invents: the kernel is told how much memory there is, and writes nothing."""
    pixels = np.full((20, 30, 3), 7, np.uint8)
    whole = [[0, 20 / 8, 0, 20], [0, 30 / 8, 0, 30]]
    wrong = [[0, 21 / 8, 0, 21], [0, 31 / 8, 0, 31]], [[-3, 2, -3, 20], [0, 3, 0, 30]], [[np.nan] * 4, [0, 3, 0, 30]]
    spans = np.array([whole, [wrong[0][0], whole[1]], [whole[0], wrong[0][1]], *wrong[1:], [[0, 1e9, 0, 8e9]] * 2])
    B, resized = len(spans), np.full((len(spans), 8, 8, 3), 99, np.uint8)
    of_all = np.full(B, pixels.ctypes.data), np.full(B, pixels.nbytes), np.full(B, 3 * 30)
    is_written = resize_batch(*of_all, spans, np.ones(B, np.int8), np.zeros(B, bool), resized)
    assert is_written.tolist() == [True] + [False] * (B - 1)
    assert (resized[0] == 7).all()
    assert (resized[1:] == 99).all()
