"""The bench `prep`: all its cases run, check what they wrote, and leave nothing behind. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import prep
from benchmarks.__main__ import main
from benchmarks.harness import peak_memory
from benchmarks.harness.sets import ensure_photos
from benchmarks.prep import ImageFiles, write_with_ffcv
from data_prep.formats.tables import read_tables
from lowrank_vit.common.errors import UserError

OURS = ["passthrough_decode", "passthrough_header", "reencode"]
CASES = [*OURS, "ffcv_500", "ffcv_400", "cp", "cp_one_file", "decode_limit", "disk_limit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to stand in, with 24 photographs where the bench looks for them."""
    folder = tmp_path_factory.mktemp("bench")
    ensure_photos(folder / prep.CACHE / "photos_24", 24)
    return folder


@pytest.fixture
def samples(folder: Path) -> list[tuple[str, int]]:
    root = folder / prep.CACHE / "photos_24"
    return [(str(path.relative_to(root)), i % 3) for i, path in enumerate(sorted(root.rglob("*.jpg")))]


def test_smoke(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    main(["prep", *"--count 24 --workers 2 --repeats 1 --json prep.json --plot prep.png".split()])
    result = json.loads((folder / "prep.json").read_text())
    assert result["bench"] == "prep"
    assert list(result["cases"]) == list(result["settings"]) == CASES
    assert set(result["ratios"]) == {
        "passthrough_decode_vs_ffcv",
        "passthrough_header_vs_ffcv",
        "reencode_vs_ffcv",
        "passthrough_header_vs_cp",
        "passthrough_header_vs_cp_one_file",
        "passthrough_decode_share_of_decode_limit",
        "passthrough_header_share_of_disk_limit",
        "reencode_share_of_decode_limit",
        "ffcv_500_share_of_decode_limit",
    }
    for case in result["cases"].values():
        assert case["unit"] == "img/s"
        assert len(case["samples"]) == 1
    for name, (over, under) in prep.RATIOS.items():
        expected = result["cases"][over]["median"] / result["cases"][under]["median"]
        assert result["ratios"][name]["median"] == pytest.approx(expected)
    assert result["stored"] == {
        "passthrough_decode": {"passthrough": 24},
        "passthrough_header": {"passthrough": 24},
        "reencode": {"resized": 24},
    }
    assert result["source"]["images"] == 24
    assert (folder / "prep.png").stat().st_size > 0
    assert [path.name for path in (folder / prep.CACHE).iterdir()] == ["photos_24"]
    out, err = capfd.readouterr()
    assert "passthrough_header_vs_cp" in out
    assert "it/s" not in err  # FFCV's own bar
    assert "round 1 of 1" in err


def test_an_own_folder_and_scratch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"cases": {"10000": {"peak_bytes": 2_000_000, "bytes_per_image": 120.4}}}
    monkeypatch.setattr(prep, "measure_memory", lambda *args, **kwargs: memory)
    root = folder / prep.CACHE / "photos_24"
    result = prep.run(prep.Options(data=root, scratch=tmp_path / "new", workers=1, repeats=1, memory=True))
    assert result.extra["source"]["images"] == 24
    assert result.to_dict()["memory"] == memory
    assert "120 at 10,000 images" in result.limits[-1]
    assert list((tmp_path / "new").iterdir()) == []
    assert (root / "class_00").is_dir()


def test_a_bad_image_is_named_before_ffcv_sees_it(tmp_path: Path, folder: Path) -> None:
    good = next((folder / prep.CACHE).rglob("*.jpg")).read_bytes()
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "good.jpg").write_bytes(good)
    (tmp_path / "data" / "cat" / "bad.jpg").write_bytes(good[:5000])
    with pytest.raises(UserError, match=r"cat/bad\.jpg"):
        prep.run(prep.Options(data=tmp_path / "data", scratch=tmp_path / "scratch", workers=1, repeats=1))
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (prep.Options(workers=0), "--workers is 0"),
        (prep.Options(count=3), "--count is 3"),
        (prep.Options(data=Path("nowhere")), "--data nowhere does not exist"),
    ],
)
def test_wrong_options(options: prep.Options, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        prep.run(options)


def test_a_short_output_is_found(folder: Path, samples: list[tuple[str, int]], tmp_path: Path) -> None:
    root = folder / prep.CACHE / "photos_24"
    bench = prep._Bench(root, tmp_path, ImageFiles(root, [*samples, samples[0]]), workers=1)
    case = bench.cases()["passthrough_header"]
    case.run()
    with pytest.raises(UserError, match="holds 24 samples, expected 25"):
        case.after()


def test_ffcv_writes_every_sample(folder: Path, samples: list[tuple[str, int]], tmp_path: Path) -> None:
    files = ImageFiles(folder / prep.CACHE / "photos_24", samples)
    write_with_ffcv(files, tmp_path / "out.beton", max_resolution=400, quality=90, workers=2)
    tables = read_tables(tmp_path / "out.beton")
    assert tables.labels.tolist() == [label for _, label in samples]
    assert set(zip(tables.heights.tolist(), tables.widths.tolist(), strict=True)) == {(300, 400)}


def test_a_dead_ffcv_worker_is_an_error(folder: Path, tmp_path: Path) -> None:
    files = ImageFiles(folder, [("missing.jpg", 0)])
    with pytest.raises(UserError, match="a worker of FFCV's DatasetWriter stopped"):
        write_with_ffcv(files, tmp_path / "out.beton", max_resolution=400, quality=90, workers=1)


def test_peak_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "BASELINE_COUNT", 10)
    memory = peak_memory.measure_memory(tmp_path, 1, counts=(30,))
    assert memory["baseline"]["images"] == 10
    assert memory["baseline"]["peak_bytes"] > 1 << 20
    assert set(memory["cases"]["30"]) == {"peak_bytes", "bytes_per_image"}
    assert not list(tmp_path.glob("tiny-*"))


def test_tiny_images_fill_a_page(tmp_path: Path) -> None:
    peak_memory._write_tiny_images(tmp_path, 3)
    sizes = {path.stat().st_size for path in tmp_path.rglob("*.jpg")}
    assert sizes == {peak_memory.PAGE_SIZE // peak_memory.PAGE_COUNT}
