"""The slow twin of reading: FFCV's own `Loader` reads what `data_prep` writes, and the other way round.

FFCV's code is as it comes, but for one type: `OSCacheManager.state_type` changes numba's interned array type, for the
whole process, after which other compiled code no longer finds its own types. A type of the same meaning is put in its
place, and the same reader is compiled with it, so that this file may run in one process with others.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import cv2
import numba
import numpy as np
import pytest
import skimage.data
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.writer import DatasetWriter
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_images

from data_prep.convert import convert_digits, convert_image_folder
from data_prep.formats.beton import MODE_JPEG, MODE_RAW
from data_prep.formats.jpeg import ImageOptions
from data_prep.formats.tables import read_tables
from data_prep.sources.image_folder import image_folder
from data_prep.sources.samples import digits_indices
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.decode.jpeg import FAST, decode_jpeg
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import EvalPlan

JPEG_TOLERANCE = 2.0
"""Mean difference in grey levels: FFCV asks libjpeg-turbo for its fast inverse DCT, PIL for the exact one."""


@pytest.fixture(autouse=True)
def _types_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data, table = numba.types.Array(numba.uint8, 1, "C", readonly=True), numba.uint64[::1]
    state_type = numba.types.Tuple([data, table, table])

    def read(address, state):
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address : address + size]

    monkeypatch.setattr(OSCacheManager, "state_type", state_type)
    monkeypatch.setattr(
        OSCacheManager, "compile_reader", lambda manager: Compiler.compile(read, data(numba.uint64, state_type))
    )


def read_all(beton: Path, decoder: Operation, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, 3) and labels int64 (N,), in file order, through the stock loader."""
    loader = Loader(
        str(beton),
        batch_size=batch_size,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [decoder], "label": [IntDecoder()]},
    )
    # The loader re-uses its buffers, so copy every batch.
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    return np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])[:, 0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs that ship with scikit-image and scikit-learn, as JPEG and PNG of various sizes, in two classes."""
    root = tmp_path_factory.mktemp("photos")
    china, flower = load_sample_images().images
    images = {
        "animal/astronaut.png": skimage.data.astronaut(),
        "animal/chelsea.jpg": skimage.data.chelsea(),
        "thing/china.jpg": china,
        "thing/coffee.png": skimage.data.coffee(),
        "thing/flower.jpg": flower,
        "thing/rocket.jpg": skimage.data.rocket(),
    }
    for name, pixels in images.items():
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / name, quality=92)
    return root


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("digits")
    convert_digits(directory)
    return directory


@pytest.mark.parametrize("split", ["train", "val"])
def test_digits_are_read_exactly(digits_dir: Path, split: Literal["train", "val"]) -> None:
    expected, labels = load_digits(return_X_y=True)
    indices = digits_indices(split, len(labels))
    images, read_labels = read_all(digits_dir / f"{split}.beton", SimpleRGBImageDecoder(), 100)
    assert np.array_equal(read_labels, labels[indices])
    grey = np.floor(expected[indices].reshape(-1, 8, 8) * 255 / 16 + 0.5).astype(np.uint8)
    assert np.array_equal(images, np.repeat(grey[..., None], 3, axis=-1))


def test_photographs_of_one_size_match_pil_and_are_the_pixels_that_we_train_on(photos: Path, tmp_path: Path) -> None:
    """Three 640 x 427 JPEGs stored byte for byte: FFCV's decode against PIL's of the source files, and against ours."""
    names = ["china.jpg", "flower.jpg", "rocket.jpg"]
    (tmp_path / "src" / "view").mkdir(parents=True)
    for name in names:
        (tmp_path / "src" / "view" / name).symlink_to(photos / "thing" / name)
    out = tmp_path / "view.beton"
    conversion = convert_image_folder(tmp_path / "src", out, image=ImageOptions(max_side=640), workers=1)
    assert conversion.manifest.reasons == {"passthrough": 3}
    images, labels = read_all(out, SimpleRGBImageDecoder(), 3)
    assert labels.tolist() == [0, 0, 0]
    beton = Beton(out)
    for n, (image, name) in enumerate(zip(images, names, strict=True)):
        with Image.open(photos / "thing" / name) as source:
            difference = np.abs(image.astype(np.int64) - np.asarray(source))
        assert difference.mean() < JPEG_TOLERANCE
        ours = np.empty(image.size, np.uint8)
        assert decode_jpeg(beton.sample(n), ours, image.shape[0], image.shape[1], FAST)
        assert np.array_equal(ours.reshape(image.shape), image)


def test_photographs_of_many_sizes_match_pil(photos: Path, tmp_path: Path) -> None:
    """Mixed formats and sizes, resized to 256: FFCV's centre crop against PIL's decode with the same crop."""
    conversion = convert_image_folder(
        photos, tmp_path / "photos.beton", image=ImageOptions(max_side=256, quality=95), workers=1
    )
    assert conversion.manifest.reasons == {"png": 2, "resized": 4}
    images, labels = read_all(tmp_path / "photos.beton", CenterCropRGBImageDecoder((96, 96), 1.0), 6)
    source = image_folder(photos)
    assert labels.tolist() == [sample.label for sample in source.samples]
    for image, sample in zip(images, source.samples, strict=True):
        with Image.open(photos / sample.name) as original:
            original.thumbnail((256, 256), Image.Resampling.LANCZOS, reducing_gap=None)
            pixels = np.asarray(original.convert("RGB"))
        height, width, _ = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        crop = np.ascontiguousarray(pixels[top : top + side, left : left + side])
        expected = cv2.resize(crop, (96, 96), interpolation=cv2.INTER_AREA)
        assert np.abs(image.astype(np.int64) - expected).mean() < 2 * JPEG_TOLERANCE, sample.name


def test_lossless_baseline_is_read_as_the_progressive_source_is(photos: Path, tmp_path: Path) -> None:
    """FFCV decodes the rewritten JPEGs to the very pixels of the progressive ones."""
    (tmp_path / "src" / "view").mkdir(parents=True)
    for name in ("china.jpg", "flower.jpg", "rocket.jpg"):
        with Image.open(photos / "thing" / name) as image:
            image.save(tmp_path / "src" / "view" / name, quality=92, progressive=True)
    images = []
    for baseline in (False, True):
        options = ImageOptions(max_side=640, baseline=baseline)
        manifest = convert_image_folder(tmp_path / "src", tmp_path / "a.beton", image=options, workers=1).manifest
        assert manifest.reasons == {"baseline" if baseline else "passthrough": 3}
        images.append(read_all(tmp_path / "a.beton", SimpleRGBImageDecoder(), 3)[0])
    assert np.array_equal(*images)


def test_raw_photographs_are_read_exactly(photos: Path, tmp_path: Path) -> None:
    convert_image_folder(photos, tmp_path / "raw.beton", image=ImageOptions(raw=64), workers=2)
    images, labels = read_all(tmp_path / "raw.beton", SimpleRGBImageDecoder(), 4)
    source = image_folder(photos)
    assert labels.tolist() == [sample.label for sample in source.samples]
    for image, sample in zip(images, source.samples, strict=True):
        with Image.open(photos / sample.name) as original:
            twin = ImageOps.fit(original.convert("RGB"), (64, 64), Image.Resampling.HAMMING)
        assert np.abs(image.astype(np.int64) - np.asarray(twin)).mean() < 2.5, sample.name


def test_parts_are_read_one_by_one(photos: Path, tmp_path: Path) -> None:
    whole = convert_image_folder(photos, tmp_path / "whole.beton", image=ImageOptions(raw=48), workers=1)
    expected = read_all(whole.beton, SimpleRGBImageDecoder(), 6)
    parts = [
        convert_image_folder(photos, tmp_path / "a.beton", image=ImageOptions(raw=48), part=(i, 3), workers=1)
        for i in (1, 2, 3)
    ]
    read = [read_all(part.beton, SimpleRGBImageDecoder(), 2) for part in parts]
    assert np.array_equal(np.concatenate([images for images, _ in read]), expected[0])
    assert np.array_equal(np.concatenate([labels for _, labels in read]), expected[1])


def test_files_of_the_stock_writer_are_understood(photos: Path, tmp_path: Path) -> None:
    samples = []
    for sample in image_folder(photos).samples:
        with Image.open(photos / sample.name) as image:
            samples.append((np.asarray(image.convert("RGB")), sample.label))
    # Users of FFCV name fields as they like; the types tell what they are.
    fields = {"picture": RGBImageField(write_mode="smart", smart_threshold=500_000), "target": IntField()}
    DatasetWriter(str(tmp_path / "stock.beton"), fields, num_workers=1).from_indexed_dataset(samples)
    beton = Beton(tmp_path / "stock.beton")
    plan = EvalPlan(beton.heights, beton.widths, img_size=16, crop_pct=0.9, batch_size=4)
    loader, _ = open_loader(beton, plan, torch.device("cpu"), LoaderOptions("ffcv", 2))
    assert np.concatenate([batch.targets for batch in loader.batches(0)]).tolist() == beton.labels.tolist()
    tables = read_tables(tmp_path / "stock.beton")
    assert tables.labels.tolist() == [label for _, label in samples]
    assert list(zip(tables.heights, tables.widths, strict=True)) == [image.shape[:2] for image, _ in samples]
    assert set(tables.modes) == {MODE_JPEG, MODE_RAW}
    data = (tmp_path / "stock.beton").read_bytes()
    for i in np.flatnonzero(tables.modes == MODE_JPEG):
        with Image.open(io.BytesIO(data[tables.pointers[i] :][: tables.sizes[i]])) as image:
            assert image.size == (tables.widths[i], tables.heights[i])
