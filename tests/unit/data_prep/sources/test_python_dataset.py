"""Data sets that are Python objects: torchvision's, pairs in a list, and what is wrong with some."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import CIFAR10, DatasetFolder, ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import ToTensor

from data_prep import convert_dataset
from data_prep.__main__ import main
from data_prep.convert import convert_image_folder
from data_prep.formats.jpeg import LOSSLESS
from data_prep.formats.sample_table import read_sample_table
from data_prep.formats.sidecars import read_manifest
from data_prep.sources.python_dataset import python_dataset
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
    with pytest.raises(UserError, match=r"pictures are float32, expected uint8.*PILToTensor") as caught:
        convert_dataset(ImageFolder(str(tmp_path / "f"), transform=ToTensor()), tmp_path / "b.beton")
    assert "\n" not in str(caught.value)


class Moved(ImageFolder):
    """Other labels than its list's."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image, 1 - label


class Grey(ImageFolder):
    """Other pixels than its files'."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image.convert("L").convert("RGB"), label


class Seen(Subset[Any]):
    """The usual subset with a transform of its own."""

    def __getitem__(self, idx: Any) -> Any:
        image, label = super().__getitem__(idx)
        return image.transpose(Image.Transpose.ROTATE_90), 1 - label

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Joined(ConcatDataset[Any]):
    """Parts with labels of their own."""

    def __getitem__(self, idx: int) -> Any:
        image, _ = super().__getitem__(idx)
        return image, int(idx >= len(self.datasets[0]))  # pyright: ignore[reportArgumentType]


def opened_grey(path: str) -> Image.Image:
    return Image.open(path).convert("L").convert("RGB")


def edited(folder: ImageFolder) -> ImageFolder:
    folder.samples = [(path, 1 - label) for path, label in folder.samples]  # `targets` stay as they were
    return folder


@pytest.mark.parametrize(
    ("make", "are_files"),
    [
        (lambda f: ImageFolder(f), True),
        (lambda f: ImageFolder(f, target_transform=lambda label: 1 - label), True),
        (lambda f: edited(ImageFolder(f)), True),
        (lambda f: DatasetFolder(f, pil_loader, ("jpg",)), True),
        (lambda f: ConcatDataset([Subset(ImageFolder(f), [20, 3]), ImageFolder(f)]), True),
        (lambda f: Subset(ConcatDataset([ImageFolder(f), ImageFolder(f)]), [30, -1, 2]), True),
        (lambda f: Moved(f), False),
        (lambda f: Grey(f), False),
        (lambda f: ImageFolder(f, loader=opened_grey), False),
        (lambda f: ImageFolder(f, transform=lambda image: image.resize((70, 70))), False),
        (lambda f: Seen(ImageFolder(f), [0, 23]), False),
        (lambda f: Subset(Seen(ImageFolder(f), [0, 23, 4]), [2, 1]), False),
        (lambda f: Subset(Moved(f), [23, 0]), False),
        (lambda f: Joined([ImageFolder(f), Subset(ImageFolder(f), [0, 1])]), False),
    ],
)
def test_what_is_stored_is_what_the_items_are(tmp_path, make, are_files):
    write_folder(tmp_path / "f")
    dataset = make(str(tmp_path / "f"))
    source = python_dataset(dataset)
    assert [source.classes[s.label] for s in source.samples] == [
        ("flower", "temple")[dataset[n][1]] if source.classes == ("flower", "temple") else str(dataset[n][1])
        for n in range(len(dataset))
    ]
    assert source.can_resume == are_files
    for sample in source.samples:
        picture = source.read(sample)
        assert isinstance(picture, Path) == are_files
        shown = Image.open(picture).convert("RGB") if isinstance(picture, Path) else picture
        assert (np.asarray(shown) == np.asarray(dataset[sample.row][0])).all()


def test_names_of_joined_and_wrapped_sets_are_kept_or_missed_aloud(tmp_path):
    write_folder(tmp_path / "f")
    (tmp_path / "g" / "fish").mkdir(parents=True)
    Image.fromarray(pixels(0)).save(tmp_path / "g" / "fish" / "0.png")
    folder = ImageFolder(str(tmp_path / "f"))
    same = python_dataset(ConcatDataset([folder, folder]))
    assert (same.classes, same.remarks) == (("flower", "temple"), ())
    other = python_dataset(ConcatDataset([folder, ImageFolder(str(tmp_path / "g"))]))
    assert other.classes == ("0", "1")
    assert "joins sets of different classes (flower, temple; fish)" in other.remarks[0]
    wrapped = Seen(folder, [0, 23])
    assert "classes have no names: Seen" in python_dataset(wrapped).remarks[0]
    vars(wrapped)["classes"] = folder.classes
    assert (python_dataset(wrapped).classes, python_dataset(wrapped).remarks) == (("flower", "temple"), ())
    assert "pictures of Grey are decoded" in python_dataset(Grey(str(tmp_path / "f"))).remarks[0]
    with pytest.raises(UserError, match="the label of item 1 cannot be read"):
        python_dataset(Subset(folder, [0, 99]))


@pytest.mark.parametrize("form", ["array", "tensor", "image", "dict", "one in a list", "longer", "bytes", "path"])
def test_items_of_every_kind(tmp_path, form):
    for n in range(4):
        Image.fromarray(pixels(n)).save(tmp_path / f"{n}.png")
    make: dict[str, Any] = {
        "array": lambda n: (pixels(n), n % 2),
        "tensor": lambda n: (torch.from_numpy(pixels(n)).permute(2, 0, 1), torch.tensor(n % 2)),
        "image": lambda n: (Image.fromarray(pixels(n)), np.int64(n % 2)),
        "dict": lambda n: {"image": pixels(n), "label": n % 2},
        "one in a list": lambda n: (pixels(n), [torch.tensor([n % 2])]),
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
        ([(pixels(0), [0, 1])], "is not a single label"),
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
