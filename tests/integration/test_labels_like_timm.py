"""A timm model that is right in timm is right here, whatever the class folders are called; and the other way round."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform

from data_prep.convert import convert_image_folder
from data_prep.formats.sidecars import manifest_path
from lowrank_vit import train, validate
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.sets.datasets import DataOptions, locate, open_datasets
from lowrank_vit.model.weights import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
"""timm leaves the closing of its image files to Python."""
NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
MODEL = (
    f"--model {NAME} --img-size 16 --model-kwargs patch_size=8 embed_dim=32 depth=1 num_heads=2 --device cpu".split()
)
STILL = """-b 12 -j 1 --epochs 1 --warmup-epochs 0 --opt sgd --lr 1e-12 --weight-decay 0 --no-aug --no-model-ema
--loader resident""".split()
NUMBERS, MIXED = [str(n) for n in range(12)], ["apple", "Bear", "cat", "Dog"]
NESTED = ["animal/cat", "animal/Dog", "plant/10", "plant/9"]


def write(root: Path, names: list[str], of: list[str] | None = None) -> Path:
    """One plain PNG in each class folder, of a colour that belongs to the name's place in `of`."""
    for name in names:
        place = (of or names).index(name)
        (root / name).mkdir(parents=True)
        colour = (place * 20, 255 - place * 20, place * 97 % 256)
        Image.new("RGB", (16, 16), colour).save(root / name / "1.png")
    return root


def timms_samples(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    half = (0.5, 0.5, 0.5)  # the model's own
    dataset = ImageDataset(str(root), transform=create_transform((3, 16, 16), mean=half, std=half, crop_pct=0.9))
    images, labels = zip(*(dataset[n] for n in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def perfect(root: Path, path: Path) -> Path:
    """A timm checkpoint that scores 100 % on a folder as timm labels it: each row of its head knows one image."""
    torch.manual_seed(0)
    images, labels = timms_samples(root)
    model: Any = timm.create_model(NAME, num_classes=len(labels), **TINY).eval()
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    features = features[labels.argsort()]
    model.head.weight.copy_(2e3 * features)  # the nearest of them wins
    model.head.bias.copy_(-1e3 * features.square().sum(1))
    assert (model(images).argmax(1) == labels).all()
    torch.save({"arch": NAME, "state_dict": model.state_dict()}, path)
    return path


def top1(capsys, *argv: object) -> tuple[float, str]:
    capsys.readouterr()
    validate.main([*map(str, argv), "--device", "cpu"])
    said = capsys.readouterr().out
    return float(said.split("top-1 ")[1].split(" %")[0]), said


def trained(output: Path, *argv: object) -> Path:
    """The last checkpoint of a run that changes no weight."""
    train.main([*STILL, *MODEL, *map(str, argv), "--output", str(output)])
    return max(output.glob("*/last.pth.tar"), key=lambda path: path.stat().st_mtime_ns).resolve()


@pytest.mark.parametrize("names", [NUMBERS, MIXED, NESTED], ids=["numbers", "mixed case", "nested"])
def test_a_timm_model_scores_as_in_timm(tmp_path, capsys, names):
    checkpoint = perfect(write(tmp_path / "val", names), tmp_path / "timm.pth.tar")
    score, said = top1(capsys, tmp_path / "val", "--checkpoint", checkpoint, *MODEL)
    assert score == 100
    assert ("is taken in timm's order" in said.replace("are taken", "is taken")) == (
        names != sorted(names) or names == MIXED
    )


def test_names_go_with_the_weights(tmp_path, capsys, monkeypatch):
    """Through training, an older set in another order, fewer classes, and back into timm."""
    folder = tmp_path / "images"
    for split in ("train", "val"):
        write(folder / split, NUMBERS)
    start = perfect(folder / "val", tmp_path / "timm.pth.tar")
    run = trained(tmp_path / "output", folder, "--initial-checkpoint", start)
    assert "top-1 100.00" in capsys.readouterr().out
    assert read_checkpoint(run).class_names == NUMBERS

    model = timm.create_model(NAME, num_classes=12, **TINY).eval()
    model.load_state_dict(torch.load(run, weights_only=True)["state_dict"])
    images, labels = timms_samples(folder / "val")
    assert (model(images).argmax(1) == labels).all()

    older = Path(shutil.copytree(folder, tmp_path / "older", ignore=shutil.ignore_patterns(".lowrank_vit")))
    with monkeypatch.context() as earlier:
        earlier.setattr("data_prep.sources.image_folder.in_timms_order", sorted)
        locate(DataOptions(data_dir=older))
        score, said = top1(capsys, older, "--checkpoint", run)
    assert score == 100
    assert "in another order: its labels are mapped by name" in said
    assert top1(capsys, older, "--checkpoint", start, *MODEL)[0] == 100
    assert top1(capsys, older, "--pretrained-path", run, *MODEL)[0] == 100

    old_run = trained(tmp_path / "output", older, "--initial-checkpoint", run)
    assert "rows, in the order of" in capsys.readouterr().out
    new_run = trained(tmp_path / "output", folder, "--resume", old_run, "--epochs", 2)
    assert read_checkpoint(new_run).class_names == read_checkpoint(old_run).class_names
    assert "top-1 100.00" in capsys.readouterr().out

    few = ["11", "2", "10"]
    for split in ("train", "val"):
        write(tmp_path / "few" / split, few, of=NUMBERS)
    score, said = top1(capsys, tmp_path / "few", "--checkpoint", run)
    assert score == 100
    assert "has 3 of the 12 classes of the model" in said
    score, said = top1(capsys, tmp_path / "few", "--pretrained-path", run, *MODEL)
    assert score == 100
    assert "has 3 of the 12 classes of the model" in said
    trained(tmp_path / "output", tmp_path / "few", "--initial-checkpoint", run, "-b", 3)
    said = capsys.readouterr().out
    assert "3 of the head's 12 rows" in said
    assert "top-1 100.00" in said
    with pytest.raises(UserError, match="was trained on other classes"):
        trained(tmp_path / "output", tmp_path / "few", "--resume", run, "--epochs", 2)
    with pytest.raises(UserError, match=r"12 outputs, without names.*--trust-labels"):
        top1(capsys, tmp_path / "few", "--checkpoint", start, *MODEL)
    assert top1(capsys, tmp_path / "few", "--checkpoint", start, *MODEL, "--trust-labels")[0] == 0


@pytest.mark.parametrize(
    ("names", "labels", "line"),
    [(["a", "c"], [0, 2], "(b)"), (["x", "y"], [0, 1], "(--trust-labels)")],
    ids=["they match", "they do not"],
)
@pytest.mark.parametrize("is_converted", [False, True], ids=["folders", "converted before"])
def test_trust_is_for_names_that_cannot_be_matched(tmp_path, names, labels, line, is_converted):
    folder, said = tmp_path / "images", list[str]()
    write(folder / "train", ["a", "b", "c"])
    write(folder / "val", names, of=["a", "b", "c", "x", "y"])
    if is_converted:
        for split in ("train", "val"):
            convert_image_folder(folder / split, tmp_path / f"{split}.beton", workers=1)
        folder = tmp_path
    _, val, num_classes = open_datasets(DataOptions("", folder, trust_labels=True), None, say=said.append)
    assert (val.labels.tolist(), num_classes) == (labels, 3)
    assert any(line in text for text in said)


FEW, MANY = ["a", "b", "c"], ["a", "b", "c", "d", "e", "f"]


def pair(place: Path, train: list[str], val: list[str], *, named: str) -> Path:
    """Both sets; those that `named` does not name have lost their manifests."""
    for split, names in (("train", train), ("val", val)):
        convert_image_folder(write(place / "images" / split, names, of=MANY), place / f"{split}.beton", workers=1)
        if split not in named:
            manifest_path(place / f"{split}.beton").unlink()
    return place


@pytest.mark.parametrize(
    ("train", "val", "named", "trusted"),
    [
        (FEW, MANY, "val", 6),
        (MANY, FEW, "val", 6),
        (FEW, MANY, "", 6),
        (FEW, MANY, "train", None),
        (FEW, MANY, "train val", None),
    ],
)
def test_a_set_without_names_must_have_as_many_classes(tmp_path, train, val, named, trusted):
    place, said = pair(tmp_path, train, val, named=named), list[str]()
    with pytest.raises(UserError, match="The two sets have different") as caught:
        open_datasets(DataOptions("", place), None)
    assert all(str(place / f"{split}.beton") in str(caught.value) for split in ("train", "val"))
    assert ("give --trust-labels" in str(caught.value)) == (named != "train")
    options = DataOptions("", place, trust_labels=True)
    if trusted is None:
        with pytest.raises(UserError, match="different"):
            open_datasets(options, None)
        return
    of_train, of_val, num_classes = open_datasets(options, None, say=said.append)
    assert num_classes == trusted
    assert of_val.labels.tolist() == list(range(len(val)))
    assert of_train.classes == (MANY if val is MANY and "val" in named else None)
    assert "(--trust-labels)" in said[0]


def test_outputs_without_a_class_may_be_labels_without_names(tmp_path):
    place = pair(tmp_path, FEW, MANY, named="")
    assert open_datasets(DataOptions("", place), 6, larger_head=True)[2] == 6
    with pytest.raises(UserError, match="--num-classes 5 is too small"):
        open_datasets(DataOptions("", place), 5, larger_head=True)


def test_a_set_without_names_gets_those_of_the_other(tmp_path, monkeypatch, capsys):
    place, said = pair(tmp_path, FEW, FEW, named="val"), list[str]()
    of_train, of_val, num_classes = open_datasets(DataOptions("", place), None, say=said.append)
    assert (of_train.classes, of_val.classes, num_classes) == (FEW, FEW, 3)
    assert "train.beton names no classes: its labels are taken in the order of" in said[0]
    run = trained(tmp_path / "output", place, "-b", 3)
    assert read_checkpoint(run).class_names == FEW
    older = run.with_name("older.pth.tar")
    torch.save({**torch.load(run, weights_only=True), "class_names": None}, older)
    monkeypatch.setattr("lowrank_vit.model.class_match.in_timms_order", lambda names: sorted(names)[::-1])
    trained(tmp_path / "output", place, "-b", 3, "--resume", older, "--epochs", 2)
    assert "taken in timm's order" not in capsys.readouterr().out
    fewer = pair(tmp_path / "fewer", MANY, FEW, named="")
    assert open_datasets(DataOptions("", fewer), None)[2] == 6
