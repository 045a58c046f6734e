"""Labels of rows: what is one, what is none, and what they are called; and pictures that are decoded already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.formats.jpeg import BadImageError, ImageOptions
from data_prep.sources.rows import encode_picture, files_fingerprint, read_labels
from lowrank_vit.common.errors import UserError


def labels(values: list[Any], **options: Any) -> tuple[list[int], tuple[str, ...], dict[int, str]]:
    found = read_labels(values, "SET", "label", **options)
    return found.values.tolist(), found.classes, found.bad


def test_words_get_labels_in_timms_order_and_numbers_keep_theirs():
    assert labels(["b10", "B2", "b10", b"b1"]) == ([2, 1, 2, 0], ("b1", "B2", "b10"), {})
    assert labels([2, 0, np.int64(1), 2.0, True]) == ([2, 0, 1, 2, 1], ("0", "1", "2"), {})
    assert labels([1, 0], names=["<b>", "ü\n"]) == ([1, 0], ("<b>", "ü\n"), {})
    remark = read_labels([1, 3], "SET", "label").remarks[0]
    assert "no row for 2 of its 4 numbers (0, 2)" in remark


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "it has no label"),
        (float("nan"), "it has no label"),
        (-1, "its label is -1: it has none"),
        (0.5, "0.5 is not a whole number"),
        (2, "its label 2 is too large: there are 2 classes"),
        ("", "its label is empty"),
        (object, "of the kind type"),
    ],
)
def test_a_value_that_is_no_label_is_told_with_its_row(value, why):
    found, classes, bad = labels([0, value, 1], names=["a", "b"])
    assert (found, classes) == ([0, -1, 1], ("a", "b"))
    assert why in bad[1]
    with pytest.raises(UserError, match=r"SET has no labels: in all 2 rows label is unusable \(row 0: .*inference"):
        labels([value, value], names=["a", "b"])


def test_an_id_is_no_label_and_words_do_not_mix_with_numbers():
    assert "below 65,536" in labels([0, 1_000_000])[2][1]
    assert labels(["a", 3])[2] == {1: "label is the number 3, while other rows have names"}


@pytest.mark.parametrize("value", [[0, 1], (1, 2), {"a": 1}, {"a": 1, "b": 2}, np.array([0.0, 1.0])])
def test_several_labels_a_row_are_refused(value):
    with pytest.raises(UserError, match="label of row 1 is not a single label"):
        labels([0, value])


def test_a_class_map_orders_names_and_names_numbers(tmp_path):
    lines = tmp_path / "classes.txt"
    lines.write_text("dog\ncat\nbird\n")
    assert labels(["cat", "dog", "fish"], class_map=lines) == (
        [1, 0, -1],
        ("dog", "cat", "bird"),
        {2: "label is fish, which --class-map does not name"},
    )
    assert labels([0, 2], class_map=lines)[:2] == ([0, 2], ("dog", "cat", "bird"))
    assert labels([0, 1], names=["cat", "dog"], class_map=lines)[:2] == ([1, 0], ("dog", "cat", "bird"))
    with pytest.raises(UserError, match=r"none of its classes .* is in --class-map"):
        labels(["x"], class_map=lines)
    for text in ("a\na\n", "", "a\n\nb\n"):
        lines.write_text(text)
        with pytest.raises(UserError, match="must name each class once"):
            labels(["a"], class_map=lines)


@pytest.mark.parametrize("shape", [(30, 20), (30, 20, 1), (30, 20, 3), (30, 20, 4)])
def test_small_decoded_pictures_are_stored_as_they_are(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if shape[-1] == 4:
        pixels[..., 3] = 255
    image = encode_picture(pixels, "x", ImageOptions())
    rgb = pixels[..., :3] if pixels.ndim == 3 and shape[2] > 1 else np.repeat(pixels.reshape(30, 20, 1), 3, -1)
    assert (image.reason, image.width, image.height) == ("raw", 20, 30)
    assert image.data == np.ascontiguousarray(rgb).tobytes()
    assert encode_picture(np.zeros((90, 90, 3), np.uint8), "x", ImageOptions()).reason == "other"


@pytest.mark.parametrize(
    ("picture", "why"),
    [
        (np.zeros((4, 4, 3), np.float32), "pixels are float32, expected uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"the shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), "."),
        (None, "there is no image"),
        (b"", "no bytes"),
        (b"rubbish", "not an image"),
        (Path("/nowhere_at_all.jpg"), "there is no /nowhere_at_all.jpg"),
        (Image.new("F", (4, 4)), "floating-point"),
    ],
)
def test_what_is_no_picture_is_a_bad_image(picture, why):
    with pytest.raises(BadImageError, match=why):
        encode_picture(picture, "row 3", ImageOptions())


def test_a_fingerprint_is_of_names_sizes_and_times(tmp_path):
    (tmp_path / "a").write_text("x")
    first = files_fingerprint(tmp_path)
    (tmp_path / ".hidden").write_text("y")
    assert files_fingerprint(tmp_path) == first
    (tmp_path / "a").write_text("xy")
    assert files_fingerprint(tmp_path) != first
