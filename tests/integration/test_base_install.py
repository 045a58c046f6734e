"""The base alone, without any extra: what it does, and how each missing extra is named when it is needed.

Extras and their packages are read from pyproject.toml, so one that is added is hidden here too.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Generator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from data_prep.formats import jpeg, turbojpeg
from data_prep.formats.sidecars import read_manifest
from lowrank_vit import __main__ as script
from lowrank_vit import open_spectra
from lowrank_vit.common import packages
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.decode import dali
from tests.hidden_packages import canonical, hidden_packages, owners

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OF_THE_WORK = {"bench-peers", "dev", "docs"}
"""Extras that only the project's own work needs."""
WITH_SERVERS = {"trackio", "mlflow"}
TINY = """--model vit_tiny_patch16_224 --model-kwargs patch_size=8 embed_dim=16 depth=1 num_heads=2 --img-size 16
 --epochs 1 --batch-size 480 --workers 1 --device cpu --spec-monitor --sched none""".split()


def distributions(requirements: list[str]) -> set[str]:
    """The packages of requirements, those of the project's own extras among them; not what these need in turn."""
    found = set[str]()
    for one in map(Requirement, requirements):
        own = canonical(one.name) == PROJECT["name"]
        found |= distributions([r for extra in one.extras for r in EXTRAS[extra]]) if own else {canonical(one.name)}
    return found


def with_what_they_need(names: set[str]) -> set[str]:
    found, left = set[str](), [*names]
    while left:
        if (name := canonical(left.pop())) in found:
            continue
        found.add(name)
        try:
            lines = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            continue
        left += [one.name for one in lines if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def modules_of_extras() -> set[str]:
    """As they are imported: what the extras bring and the base does not."""
    dotted = {name: module for module, name in packages._DISTRIBUTIONS.items()}
    base = with_what_they_need(distributions(PROJECT["dependencies"]))
    extra = distributions([r for name in EXTRAS.keys() - OF_THE_WORK for r in EXTRAS[name]]) - base
    found = {dotted[name] for name in extra & dotted.keys()}
    for module, names in owners().items():
        own = {canonical(name) for name in names}
        if own & (extra - dotted.keys()) and not own & base:
            found.add(module)
    return found


MODULES = modules_of_extras()


@pytest.fixture
def base_only(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    for kept in (dali.why_no_dali, jpeg._opencv):
        kept.cache_clear()
    with hidden_packages(*MODULES):
        yield
    for kept in (dali.why_no_dali, jpeg._opencv):
        kept.cache_clear()


def run(*words: object) -> None:
    script.run([str(word) for word in words])


def test_the_extras_are_known_by_their_modules():
    assert {"ffcv", "cv2", "nvidia.dali", "wandb", "sklearn", "peft", "tensorboard", "pandas", "pyarrow"} <= MODULES
    assert not MODULES & {"torch", "timm", "numpy", "numba", "nvidia", "PIL", "scipy", "matplotlib"}


def test_all_means_all():
    assert distributions(["lowrank-vit[all]"]) == distributions(
        [f"lowrank-vit[{name}]" for name in EXTRAS.keys() - OF_THE_WORK - WITH_SERVERS]
    )
    assert distributions(["lowrank-vit[all]"]) <= distributions(["lowrank-vit[dev]"])
    assert distributions(["lowrank-vit[dali]"]) <= distributions(["lowrank-vit[train]"])


def test_what_an_extra_brings_is_imported_where_it_is_needed():
    for package in ("lowrank_vit", "data_prep"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                hidden = [n for n in names if any(f"{n}.".startswith(f"{module}.") for module in MODULES)]
                assert not hidden, f"{path.relative_to(ROOT)}: {hidden}"


@pytest.mark.usefixtures("base_only")
def test_the_base_trains_on_raw_images_scores_and_watches_spectra(digits_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(turbojpeg, "_load", lambda: pytest.fail("raw images need no JPEG library"))
    turbojpeg._library.cache_clear()
    run("train", *TINY, "--data-dir", digits_dir, "--output", tmp_path, "--experiment", "run")
    checkpoint = tmp_path / "run" / "last.pth.tar"
    run("validate", "--checkpoint", checkpoint, "--device", "cpu")
    run("analyze-spectrum", "--checkpoint", checkpoint, "--save-dir", tmp_path / "spectrum")
    run("report", "run")
    assert open_spectra(tmp_path / "run").updates
    assert (tmp_path / "run" / "report.html").exists()
    assert "top-1" in capsys.readouterr().out
    turbojpeg._library.cache_clear()


@pytest.mark.usefixtures("base_only")
def test_the_base_converts_what_it_need_not_resize(tmp_path, capsys):
    for name, mode, kind in (("0.jpg", "RGB", "JPEG"), ("1.jpg", "L", "JPEG"), ("2.png", "RGB", "PNG")):
        (tmp_path / "src" / "a").mkdir(parents=True, exist_ok=True)
        Image.new(mode, (60, 40)).save(tmp_path / "src" / "a" / name, kind)
    script.run(["prep", "imagefolder", "--src", str(tmp_path / "src"), "--out", str(tmp_path / "x.beton")])
    manifest = read_manifest(tmp_path / "x.beton")
    assert manifest.reasons == {"passthrough": 1, "gray": 1, "png": 1}
    assert "opencv" not in manifest.libraries
    assert "3 images" in capsys.readouterr().out


@pytest.mark.usefixtures("base_only")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prep digits --out {tmp}", "handwritten digits needs the package scikit-learn, .*lowrank-vit[quickstart]"),
        (
            "prep imagefolder --src {tmp}/src --out {tmp}/x.beton",
            "Resizing images needs the package opencv-python, .*[train]",
        ),
        ("train --loader dali --data-dir {digits}", "--loader dali needs the package nvidia-dali-cuda130, .*[dali]"),
        ("train --log-wandb --data-dir {digits}", "--tracker wandb needs the package wandb, .*[wandb]"),
        ("train --tracker mlflow --data-dir {digits}", "--tracker mlflow needs the package mlflow, .*[mlflow]"),
        ("train --lora 2 --data-dir {digits}", "--lora needs the package peft, .*[lora]"),
    ],
)
def test_each_extra_is_named_when_it_is_needed(line, said, digits_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src" / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((600, 600, 3), np.uint8)).save(tmp_path / "src" / "a" / "0.jpg")
    words = line.format(tmp=tmp_path, digits=digits_dir).split()
    if words[0] == "train":
        words += [*TINY, "--output", str(tmp_path), "--experiment", "run"]
    with pytest.raises((UserError, SystemExit)) as found:  # prep ends its process itself
        run(*words)
    assert re.search(re.escape(said).replace(r"\.\*", ".*"), f"{found.value} {capsys.readouterr().err}")
