"""What others import: names and signatures are frozen, each has an example that runs, and importing them is light.

A change here is a change for everybody who uses the library: see CHANGELOG.md.
"""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lowrank_vit
from data_prep.convert import convert_image_folder
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.batch import Batch
from lowrank_vit.data.loader import Loader
from lowrank_vit.spectral.watching.stored import Spectra
from tests.spectra import tiny_vit

NAMES = "Augment Beton EvalPlan SpectralMonitor SpectralSettings TrainPlan open_loader open_spectra".split()
GIVEN = {"Batch": Batch, "Loader": Loader, "Spectra": Spectra}
"""What the public names give."""
SIGNATURES: dict[str, str] = {
    "Beton": "(path: str | os.PathLike[str] | list[Path]) -> None",
    "Beton.sample": "(self, sample_id: int) -> np.ndarray",
    "TrainPlan": (
        "(heights: np.ndarray, widths: np.ndarray, rules: TrainRules, *, seed: int, img_size: int, batch_size: "
        "int, rank: int = 0, world_size: int = 1, accum_steps: int = 1) -> None"
    ),
    "TrainPlan.of": (
        "(images: Sizes, *, img_size: int, batch_size: int, seed: int = 42, aa: str = 'none', scale: "
        "tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (0.75, 1.3333333333333333), hflip: "
        "float = 0.5, reprob: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0, rank: int = 0, world_size: "
        "int = 1, accum_steps: int = 1, order: OrderName = 'keyed', repeats: int = 1) -> TrainPlan"
    ),
    "TrainPlan.ids": "(self, epoch: int) -> np.ndarray",
    "TrainPlan.step_ids": "(self, epoch: int, step: int, without: Collection[int] = ()) -> np.ndarray",
    "TrainPlan.batch": "(self, epoch: int, step: int, ids: np.ndarray) -> BatchPlan",
    "EvalPlan": (
        "(heights: np.ndarray, widths: np.ndarray, *, img_size: int, crop_pct: float, batch_size: int, rank: int "
        "= 0, world_size: int = 1, interpolation: int = 2, samples: np.ndarray | None = None) -> None"
    ),
    "EvalPlan.of": (
        "(images: Sizes, *, img_size: int, batch_size: int, crop_pct: float = 0.875, rank: int = 0, world_size: "
        "int = 1) -> EvalPlan"
    ),
    "EvalPlan.ids": "(self, epoch: int) -> list[np.ndarray]",
    "EvalPlan.step_ids": "(self, epoch: int, step: int, without: Collection[int] = ()) -> np.ndarray",
    "EvalPlan.batch": "(self, epoch: int, step: int, ids: np.ndarray) -> BatchPlan",
    "open_loader": (
        "(beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device | str = 'auto', options: LoaderOptions "
        "| None = None, *, workers: int = 4, prepare: Prepare | None = None, say: Callable[[str], object] = ...) "
        "-> tuple[Loader, str]"
    ),
    "Loader.batches": "(self, epoch: int, first_step: int | None = None) -> Iterator[Batch]",
    "Loader.close": "(self) -> None",
    "Batch": "(images: Tensor, targets: Tensor, plan: BatchPlan) -> None",
    "SpectralMonitor": (
        "(model: nn.Module, ema_model: nn.Module | None = None, *, store_dir: str | os.PathLike[str], targets: "
        "Targets = None, every: int = 100, settings: SpectralSettings | None = None, split_qkv: bool = False, "
        "circuits: Circuits = 'none', limit_gb: float = 2.0, resumed_update: int | None = None, recorded_update: int "
        "| None = None, last_update: int | None = None, ranks: Channel | None = None, optimizer: Optimizer | None = "
        "None, rename: Rename | None = None, on_full: OnFull | None = None, prepare: Prepare | "
        "None = None, say: Callable[[str], object] = ...) -> None"
    ),
    "SpectralMonitor.observe": "(self, num_updates: int) -> None",
    "SpectralMonitor.records": "(self) -> list[SpectralRecord]",
    "SpectralMonitor.wait": "(self) -> None",
    "SpectralMonitor.close": "(self, cancel: bool = False) -> None",
    "SpectralSettings": (
        "(topk: int = 8, interval: int = 1, solver: Solver = 'gram64', on_cpu: bool = False, cpu_threads: int = "
        "1, full_every: int = 1, updates: bool = False) -> None"
    ),
    "open_spectra": "(run: str | os.PathLike[str]) -> Spectra",
    "Spectra.values": "(self, name: str, update: int | None = None, *, ema: bool = False) -> np.ndarray",
    "Spectra.series": "(self, name: str, *, ema: bool = False) -> tuple[np.ndarray, np.ndarray]",
    "Spectra.vectors": (
        "(self, name: str, update: int | None = None, *, ema: bool = False) -> tuple[Triplets, Triplets]"
    ),
    "Spectra.refresh": "(self, update: int) -> StoredSpectra",
    "Spectra.refresh_vectors": "(self, update: int) -> StoredVectors",
    "Augment": (
        "(mean: tuple[float, ...], std: tuple[float, ...], num_classes: int, smoothing: float = 0.1, remode: "
        "Mode = 'const', *, erase_first: bool = False) -> None"
    ),
    "Augment.prepare": "(self, images: Tensor, plan: BatchPlan) -> Tensor",
    "Augment.begin": (
        "(self, images: Tensor, plan: BatchPlan, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | "
        "None, Tensor | None]"
    ),
    "Augment.normalize": "(self, images: Tensor, grid: Grid | None = None) -> Tensor",
    "Augment.inputs": "(self, images: Tensor, targets: Tensor, plan: BatchPlan) -> tuple[Tensor, Tensor]",
    "Augment.forward": (
        "(self, images: Tensor, targets: Tensor, mix: Tensor, boxes: Tensor | None = None, keys: Tensor | None = "
        "None, *, patch: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]"
    ),
}


def write_images(root: Path, count: int) -> None:
    from PIL import Image

    for n in range(count):
        folder = root / ("cat" if n < count // 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (40 + n, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:02d}.jpg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.beton, val.beton, and the spectra of a run of two updates."""
    root = tmp_path_factory.mktemp("public")
    for split, count in (("train", 20), ("val", 12)):
        write_images(root / "images" / split, count)
        convert_image_folder(root / "images" / split, root / f"{split}.beton", workers=1)
    options = {"targets": "attn.qkv,head", "every": 2, "settings": lowrank_vit.SpectralSettings(topk=2)}
    store_dir = root / "run" / "spectra"
    with lowrank_vit.SpectralMonitor(tiny_vit(), tiny_vit(1), store_dir=store_dir, **options) as monitor:
        for update in (0, 2):
            monitor.observe(update)
            monitor.wait()
    (root / "run" / "last.pth.tar").touch()
    return root


class Plain(str):
    """A text that is shown without quotes."""

    def __repr__(self) -> str:
        return str(self)


def plain(annotation: Any) -> Any:
    return Plain(annotation) if isinstance(annotation, str) else annotation


def signature(name: str) -> str:
    """Of a public name, or of a method of it; functions that are defaults are shown as `...`."""
    first, *rest = name.split(".")
    found = GIVEN.get(first) or getattr(lowrank_vit, first)
    for part in rest:
        found = getattr(found, part)
    signed = inspect.signature(found)
    parameters = [
        one.replace(
            annotation=plain(one.annotation), default=Plain("...") if inspect.isroutine(one.default) else one.default
        )
        for one in signed.parameters.values()
    ]
    return str(signed.replace(parameters=parameters, return_annotation=plain(signed.return_annotation)))


def test_names_are_frozen():
    assert {*lowrank_vit.__all__} - {"__version__"} == {*NAMES}
    assert {*NAMES, "__version__"} <= {*dir(lowrank_vit)}
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        lowrank_vit.Trainer  # noqa: B018


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_frozen(name):
    assert signature(name) == SIGNATURES[name]


def test_each_name_has_a_frozen_signature():
    assert {*NAMES} <= {*SIGNATURES}


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    public = getattr(lowrank_vit, name)
    known = {one: getattr(lowrank_vit, one) for one in lowrank_vit.__all__} | {"model": tiny_vit(), "torch": torch}
    example = textwrap.dedent(inspect.getdoc(public) or "").partition("Example:")[2]
    test = doctest.DocTestParser().get_doctest(example, known, name, None, None)
    assert test.examples
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


def test_importing_the_package_is_light():
    code = (
        "import sys, lowrank_vit; print('numpy' in sys.modules, 'torch' in sys.modules); "
        "from lowrank_vit import EvalPlan; print('torch' in sys.modules, EvalPlan.__name__)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == "False False False EvalPlan".split()


def test_stored_spectra_by_name_and_update(folder):
    for place in ("run", "run/last.pth.tar", "run/spectra"):
        spectra = lowrank_vit.open_spectra(folder / place)
        assert spectra.updates == spectra.vector_updates == [0, 2]
        assert spectra.names == [*(f"blocks.{n}.attn.qkv" for n in range(2)), "head"]
    weights = tiny_vit().get_parameter("blocks.1.attn.qkv.weight").detach().double().numpy()
    exact = np.linalg.svd(weights)
    np.testing.assert_allclose(spectra.values("blocks.1.attn.qkv"), exact.S, rtol=1e-10)
    top, last = spectra.vectors("blocks.1.attn.qkv", 0)
    np.testing.assert_allclose(top.s, exact.S[:2], rtol=1e-10)
    np.testing.assert_allclose(np.abs(np.sum(top.u * exact.U[:, :2], 0)), 1, rtol=1e-9)
    np.testing.assert_allclose(last.s, exact.S[[n - 1 for n in spectra.indices["blocks.1.attn.qkv"].last]], rtol=1e-7)
    updates, values_TK = spectra.series("head", ema=True)
    assert (updates.tolist(), values_TK.shape) == ([0, 2], (2, 3))
    assert np.any(values_TK[0] != spectra.values("head"))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.values("block.1.attn.qkv"), "no block.1.attn.qkv of the model. There are blocks.1.attn.qkv"),
        (lambda s: s.values("head", 1), "nothing stored of update 1. There are 0, 2"),
        (lambda s: s.vectors("head", 3, ema=True), "nothing stored of update 3"),
    ],
)
def test_what_is_not_stored_is_told(folder, ask, message):
    with pytest.raises(UserError, match=message):
        ask(lowrank_vit.open_spectra(folder / "run"))


def test_a_run_without_spectra_is_told(tmp_path):
    with pytest.raises(UserError, match="has no spectra: no monitor has stored any"):
        lowrank_vit.open_spectra(tmp_path)
    with pytest.raises(UserError, match=r"does not exist\. Give the directory"):
        lowrank_vit.open_spectra(tmp_path / "gone")
