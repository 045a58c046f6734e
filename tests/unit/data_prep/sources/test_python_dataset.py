"""Data sets that are Python objects: torchvision's, pairs in a list, and what is wrong with some."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import ToTensor

from data_prep import convert_dataset
from data_prep.__main__ import main
from data_prep.convert import convert_image_folder
from data_prep.formats.jpeg import LOSSLESS
from data_prep.formats.sidecars import read_manifest, read_sample_table
from data_prep.writing.bad_images import BadImagesError
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.sets.beton import Beton
from tests.photos import write_folder


def pixels(seed: int, side: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def stored(beton: Path, sample: int, side: int = 20) -> np.ndarray:
    return np.asarray(Beton(beton).sample(sample)).reshape(side, side, 3)


def test_an_image_folder_gives_its_files_bytes(tmp_path):
    write_folder(tmp_path / "f")
    folder = convert_image_folder(tmp_path / "f", tmp_path / "folder.beton")
    found = convert_dataset(ImageFolder(str(tmp_path / "f")), tmp_path / "a.beton")
    assert (found.manifest.sha256, found.manifest.classes) == (folder.manifest.sha256, ("flower", "temple"))
    assert read_sample_table(found.beton).names[0] == "item 0 (00.jpg)"
    assert convert_dataset(ImageFolder(str(tmp_path / "f")), tmp_path / "a.beton").was_finished
    part = Subset(Subset(ImageFolder(str(tmp_path / "f")), range(10, 20)), [5, 0])
    some = Beton(convert_dataset(part, tmp_path / "b.beton").beton)
    whole = Beton(folder.beton)
    assert [bytes(some.sample(n)) for n in (0, 1)] == [bytes(whole.sample(n)) for n in (15, 10)]
    assert (some.labels.tolist(), some.classes) == ([1, 0], ["flower", "temple"])


def test_a_transform_is_applied_and_one_to_floats_refused(tmp_path):
    write_folder(tmp_path / "f")
    small = ImageFolder(str(tmp_path / "f"), transform=lambda image: image.resize((20, 20)))
    found = convert_dataset(small, tmp_path / "a.beton")
    assert found.manifest.reasons == {"raw": 24}
    assert (stored(found.beton, 3) == np.asarray(small[3][0])).all()
    with pytest.raises(BadImagesError, match="pixels are float32, expected uint8"):
        convert_dataset(ImageFolder(str(tmp_path / "f"), transform=ToTensor()), tmp_path / "b.beton")


@pytest.mark.parametrize("form", ["array", "tensor", "image", "dict", "longer", "bytes", "path"])
def test_items_of_every_kind(tmp_path, form):
    for n in range(4):
        Image.fromarray(pixels(n)).save(tmp_path / f"{n}.png")
    make: dict[str, Any] = {
        "array": lambda n: (pixels(n), n % 2),
        "tensor": lambda n: (torch.from_numpy(pixels(n)).permute(2, 0, 1), torch.tensor(n % 2)),
        "image": lambda n: (Image.fromarray(pixels(n)), np.int64(n % 2)),
        "dict": lambda n: {"image": pixels(n), "label": n % 2},
        "longer": lambda n: (pixels(n), n % 2, "more"),
        "bytes": lambda n: ((tmp_path / f"{n}.png").read_bytes(), n % 2),
        "path": lambda n: (str(tmp_path / f"{n}.png"), n % 2),
    }
    items = [make[form](n) for n in range(4)]
    convert_dataset(items, tmp_path / "a.beton", image=LOSSLESS)
    found = convert_dataset(items, tmp_path / "a.beton", image=LOSSLESS)
    assert not found.was_finished  # without a fingerprint all is written anew
    assert all((stored(found.beton, n) == pixels(n)).all() for n in range(4))
    assert Beton(found.beton).labels.tolist() == [0, 1, 0, 1]
    named: dict[str, Any] = {"name": "mine", "fingerprint": "1"}
    assert convert_dataset(items, tmp_path / "a.beton", image=LOSSLESS, **named).manifest.source == "mine"
    assert convert_dataset(items, tmp_path / "a.beton", image=LOSSLESS, **named).was_finished
    named["fingerprint"] = "2"
    assert not convert_dataset(items, tmp_path / "a.beton", image=LOSSLESS, **named).was_finished


class Named(list[Any]):
    """Pairs with names of classes."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        super().__init__(items)
        vars(self).update(attributes)


def test_names_of_classes_are_kept(tmp_path):
    items = [(pixels(n), n) for n in range(3)]
    for attributes, expected in (
        ({"classes": ["b", "<i>", "b"]}, ("b (0)", "<i>", "b (2)")),
        ({"class_to_idx": {"x": 2, "y": 0, "z": 1}}, ("y", "z", "x")),
        ({"classes": [("crane", "bird"), "c", "d"]}, ("crane, bird", "c", "d")),
        ({}, ("0", "1", "2")),
    ):
        assert convert_dataset(Named(items, **attributes), tmp_path / "a.beton").manifest.classes == expected
    with pytest.raises(UserError, match="class_to_idx are not 0 to 0"):
        convert_dataset(Named(items, class_to_idx={"x": 5}), tmp_path / "a.beton")
    words = convert_dataset([(pixels(0), "z"), (pixels(1), "a")], tmp_path / "a.beton")
    assert words.manifest.classes == ("a", "z")


def test_bad_items_are_listed_or_left_out(tmp_path):
    class Broken(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise OSError("no such record")
            return super().__getitem__(index)

    items = Broken([(pixels(n), n % 2) for n in range(6)])
    items[3] = (None, 1)
    items[4] = (pixels(4), None)
    with pytest.raises(BadImagesError) as caught:
        convert_dataset(items, tmp_path / "a.beton")
    for line in ("item 1: ", "item 3: there is no image", "item 4: it has no label"):
        assert line in str(caught.value)
    assert convert_dataset(items, tmp_path / "a.beton", on_bad="skip").manifest.num_samples == 3


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ([pixels(0)], "item 0 is of the kind ndarray, expected a pair"),
        (iter([]), "has no length"),
        ([], "has no rows"),
        ([(pixels(0), [0, 1])], "is no single label"),
        ({"train": []}, "a dict of data sets"),
    ],
)
def test_what_is_no_data_set_is_refused(tmp_path, dataset, said):
    with pytest.raises(UserError, match=said):
        convert_dataset(dataset, tmp_path / "a.beton")
    with pytest.raises(UserError, match=r"does not end in \.beton"):
        convert_dataset(dataset, tmp_path / "a")


def test_torchvisions_own_sets_keep_pixels_and_names(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "__init__", lambda self: None)
    cifar = CIFAR10()  # pyright: ignore[reportCallIssue]
    cifar.data, cifar.targets = np.stack([pixels(n, 32) for n in range(4)]), [0, 1, 1, 0]
    cifar.transform = cifar.target_transform = None
    cifar.classes = ["plane", "car"]
    found = convert_dataset(cifar, tmp_path / "a.beton")
    assert (stored(found.beton, 2, 32) == pixels(2, 32)).all()
    assert found.manifest.classes == ("plane", "car")


def test_the_command_takes_a_function_of_a_module_here(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_pictures.py").write_text(
        "import numpy as np\ndef train():\n    return [(np.full((8, 8, 3), n, np.uint8), n % 2) for n in range(4)]\n"
        "def fails():\n    raise ValueError('no disk. At all')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    main(["torch", "my_pictures:train", "--out", "train.beton"])
    assert "4 images, 2 classes" in capsys.readouterr().out
    assert read_manifest(tmp_path / "train.beton").source == "my_pictures:train"
    for factory, said in (
        ("my_pictures", "is not MODULE:FUNCTION"),
        ("my_pictures:nope", "has no attribute 'nope'"),
        ("not_there_at_all:x", "there is no module not_there_at_all"),
        ("my_pictures:fails", "ValueError: no disk"),
    ):
        with pytest.raises(SystemExit):
            main(["torch", factory, "--out", "x.beton"])
        assert said in capsys.readouterr().err
