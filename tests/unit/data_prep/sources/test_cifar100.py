"""CIFAR-100's archives: both forms give one source; pickles cannot run code; damage is an error of ours."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.__main__ import main
from data_prep.formats.beton import MODE_RAW
from data_prep.formats.sidecars import read_manifest
from data_prep.formats.tables import read_tables
from data_prep.sources.cifar100 import RECORD_BYTES, cifar100, download
from data_prep.sources.samples import Source
from lowrank_vit.common.errors import UserError

FINE = [f"fine_{i:02d}" for i in range(100)]
COARSE = [f"coarse_{i:02d}" for i in range(20)]
MEMBERS = {"train": 130, "test": 110}


def content(member: str) -> tuple[np.ndarray, list[int], list[int]]:
    """Planes uint8 (N, 3072), fine and coarse labels; every class is there."""
    rng = np.random.default_rng(len(member))
    fine = rng.permutation(np.arange(MEMBERS[member]) % 100)
    return rng.integers(0, 256, (len(fine), 3072), np.uint8), fine.tolist(), (fine * 7 % 20).tolist()


class Python2Pickle:
    """Writes protocol 2 with the opcodes that Python 2 wrote, as the official archive has them."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")

    def add(self, value: object) -> Python2Pickle:
        if isinstance(value, bytes):
            short = len(value) < 256
            self.out += b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))
            self.out += value
        elif isinstance(value, int):
            self.out += b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)
        elif isinstance(value, list):
            self.out += b"]("
            for item in value:
                self.add(item)
            self.out += b"e"
        elif isinstance(value, dict):
            self.out += b"}("
            for item in (x for pair in value.items() for x in pair):
                self.add(item)
            self.out += b"u"
        elif isinstance(value, np.ndarray):
            self.out += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R("
            self.out += b"K\x01"
            self.add(value.shape[0]).add(value.shape[1])
            self.out += (
                b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            )
            self.out += b"\x89"
            self.add(value.tobytes())
            self.out += b"tb"
        return self

    def done(self) -> bytes:
        return bytes(self.out + b".")


def pickled(member: str) -> bytes:
    if member == "meta":
        names = {b"fine_label_names": [n.encode() for n in FINE], b"coarse_label_names": [n.encode() for n in COARSE]}
        return Python2Pickle().add(names).done()
    pixels, fine, coarse = content(member)
    files = [f"image_s_{i:06d}.png".encode() for i in range(len(fine))]
    batch = {b"filenames": files, b"batch_label": b"training batch 1 of 1", b"fine_labels": fine}
    return Python2Pickle().add({**batch, b"coarse_labels": coarse, b"data": pixels}).done()


def binary(member: str) -> bytes:
    pixels, fine, coarse = content(member)
    return b"".join(bytes([c, f]) + row.tobytes() for c, f, row in zip(coarse, fine, pixels, strict=True))


PYTHON_FORM = {name: pickled(name) for name in ("train", "test", "meta")}
BINARY_FORM = {
    **{f"{name}.bin": binary(name) for name in ("train", "test")},
    "fine_label_names.txt": "\n".join(FINE).encode(),
    "coarse_label_names.txt": "\r\n".join([*COARSE, ""]).encode(),
}


def write_folder(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in members.items():
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, members: dict[str, bytes], folder: str) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every way the archives may lie about."""
    root, found = tmp_path_factory.mktemp("cifar"), {}
    for name, members in (("python", PYTHON_FORM), ("binary", BINARY_FORM)):
        folder = f"cifar-100-{name}"
        found[f"{name} folder"] = write_folder(root / name / folder, members)
        found[f"{name} folder's parent"] = root / name
        for suffix in (".tar", ".tar.gz"):
            (root / f"{name}{suffix}").mkdir()
            tar = write_tar(root / f"{name}{suffix}" / f"{folder}{suffix}", members, folder)
            found[f"{name}{suffix}"], found[f"{name}{suffix}'s parent"] = tar, tar.parent
    return found


def images(source: Source) -> np.ndarray:
    return np.stack([sample.pixels for sample in source.samples if sample.pixels is not None])


PLACES = [f"{n}{p}" for n in ("python", "binary") for p in (" folder", " folder's parent", ".tar", ".tar.gz's parent")]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_form_gives_the_same_source(places: dict[str, Path], place: str, split) -> None:
    source, twin = cifar100(places[place], split), cifar100(places["python.tar.gz"], split)
    planes, fine, coarse = content("train" if split == "train" else "test")
    assert source.classes == twin.classes == tuple(FINE)
    assert source.superclasses == twin.superclasses
    assert source.superclasses is not None
    assert [source.superclasses.of_class[label] for label in fine] == coarse
    assert source.superclasses.names == tuple(COARSE)
    assert [(s.label, s.name) for s in source.samples] == [(label, f"{split}/{i:05d}") for i, label in enumerate(fine)]
    for i, sample in enumerate(source.samples):
        pixels = sample.pixels
        assert pixels is not None
        assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((32, 32, 3), np.uint8, True)
        assert pixels[5, 9].tolist() == [planes[i, 1024 * c + 32 * 5 + 9] for c in range(3)]


def test_torchvision_reads_the_same(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that nobody here wrote, on the same small archive (its checksum is not the official one's)."""
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    for split in ("train", "val"):
        twin = torchvision.datasets.CIFAR100(str(places["python folder's parent"]), train=split == "train")
        source = cifar100(places["binary.tar.gz"], split)
        assert twin.classes == list(source.classes)
        assert twin.targets == [sample.label for sample in source.samples]
        assert np.array_equal(twin.data, images(source))


def test_python_3_pickles_are_read_too(places: dict[str, Path], tmp_path: Path) -> None:
    pixels, fine, coarse = content("test")
    batch = {"fine_labels": fine, "coarse_labels": coarse, "data": pixels}
    folder = write_folder(tmp_path / "cifar-100-python", PYTHON_FORM)
    (folder / "test").write_bytes(pickle.dumps(batch, protocol=4))
    assert np.array_equal(images(cifar100(tmp_path, "val")), images(cifar100(places["binary folder"], "val")))


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def evil(target: Path) -> dict[str, bytes]:
    command = f"touch {target}".encode()
    objects = np.array([Touch(target)], dtype=object)
    return {
        "os.system": b"\x80\x02cos\nsystem\n" + Python2Pickle().add(command).out[2:] + b"\x85R.",
        "builtins.eval": b"\x80\x02cbuiltins\neval\nU\x04open\x85R.",
        "reduce": pickle.dumps({"data": Touch(target)}),
        "object array": pickle.dumps({"data": objects}),
        "object array, 2": pickle.dumps({"data": objects}, protocol=2),
        "numpy loader": b"\x80\x02cnumpy\nload\nU\x06a.file\x85R.",
        "numpy test runner": b"\x80\x02cnumpy.testing._private.utils\nrunstring\nU\x01x}\x86R.",
        "inst": b"(S'touch x'\nios\nsystem\n.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "persistent": b"\x80\x02U\x03abcQ.",
        "extension": b"\x80\x02\x82\x01.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",
        "array constructor": b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R.",
        "object dtype": b"\x80\x02cnumpy\ndtype\nU\x01OK\x00K\x01\x87R.",
    }


@pytest.mark.parametrize("name", evil(Path("x")))
@pytest.mark.parametrize("member", ["test", "meta"])
def test_a_pickle_that_tries_to_run_code_is_refused(tmp_path: Path, name: str, member: str) -> None:
    folder, target = write_folder(tmp_path / "cifar-100-python", PYTHON_FORM), tmp_path / "it ran"
    (folder / member).write_bytes(evil(target)[name])
    with pytest.raises(UserError, match=f"{member} (asks for .*, which was not run|is not a whole pickle)"):
        cifar100(folder, "val")
    assert not target.exists()


@settings(max_examples=300)
@given(
    member=st.sampled_from(sorted(PYTHON_FORM)),
    length=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5),
)
def test_damaged_pickles_never_crash(tmp_path: Path, member: str, length: float, flips: list) -> None:
    folder = tmp_path / "cifar-100-python"
    if not folder.exists():
        write_folder(folder, PYTHON_FORM)
    data = bytearray(PYTHON_FORM[member])
    # Pixels may take any value: aim at the rest, which is at both ends.
    for where, value in flips:
        near = int(where * 600)
        data[near if value % 2 else -near - 1] = value
    (folder / member).write_bytes(data[: int(len(data) * max(length, 0.5) if length < 0.9 else len(data))])
    for split in ("train", "val"):
        try:
            assert len(cifar100(folder, split).samples) > 0
        except UserError as error:
            assert "CIFAR-100" in str(error)  # noqa: PT017
    (folder / member).write_bytes(PYTHON_FORM[member])


@settings(max_examples=200)
@given(
    suffix=st.sampled_from([".tar", ".tar.gz"]),
    length=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_damaged_archives_never_crash(places: dict[str, Path], tmp_path: Path, suffix, length, flips) -> None:
    data = bytearray(places[f"binary{suffix}"].read_bytes())
    for where, value in flips:
        data[int(where * len(data))] = value
    path = tmp_path / f"cifar-100-binary{suffix}"
    path.write_bytes(data[: int(len(data) * length)] if length < 0.7 else data)
    try:
        assert len(cifar100(path, "val").samples) == 110
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017


def changed(member: str, **changes: object) -> bytes:
    pixels, fine, coarse = content(member)
    batch = {"fine_labels": fine, "coarse_labels": coarse, "data": pixels, **changes}
    return pickle.dumps({key: value for key, value in batch.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "`data` of test is not a uint8 array of 3072 columns"),
        ({"data": [1, 2]}, "`data` of test is not a uint8 array"),
        ({"data": content("test")[0][:, :-1]}, "`data` of test is not a uint8 array of 3072"),
        ({"data": content("test")[0][:50]}, "it has 50 images, 110 fine and 110 coarse labels"),
        ({"fine_labels": [*content("test")[1][:-1], 100]}, r"a fine label is outside 0\.\.99"),
        ({"fine_labels": [*content("test")[1][:-1], -1]}, r"a fine label is outside 0\.\.99"),
        ({"fine_labels": [*content("test")[1][:-1], 1 << 70]}, "`fine_labels` of test is not a list of integers"),
        ({"fine_labels": "abc"}, "`fine_labels` of test is not a list of integers"),
        ({"coarse_labels": [20] * 110}, r"a coarse label is outside 0\.\.19"),
        ({"coarse_labels": [3, 4] * 55}, r"images of the class fine_\d\d have different coarse labels"),
        ({"fine_labels": [0] * 110, "coarse_labels": [0] * 110}, "no image of the class fine_01"),
    ],
)
def test_wrong_content_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    folder = write_folder(tmp_path / "cifar-100-python", PYTHON_FORM)
    (folder / "test").write_bytes(changed("test", **changes))
    with pytest.raises(UserError, match=message):
        cifar100(folder, "val")


def test_missing_members_and_sizes_are_named(places: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(places["binary folder"], tmp_path / "cifar-100-binary")
    (folder / "test.bin").write_bytes(BINARY_FORM["test.bin"][:-1])
    with pytest.raises(UserError, match=f"test.bin has {110 * RECORD_BYTES - 1:,} bytes, not a multiple of 3,074"):
        cifar100(folder, "val")
    (folder / "fine_label_names.txt").write_text("only\nthree\nnames\n")
    with pytest.raises(UserError, match="it names 3 fine classes, expected 100"):
        cifar100(folder, "train")
    (folder / "test.bin").unlink()
    with pytest.raises(UserError, match=r"test.bin cannot be read \(No such file"):
        cifar100(tmp_path, "val")
    tar = write_tar(tmp_path / "x.tar", {"train": b""}, "cifar-100-python")
    with pytest.raises(UserError, match="it lacks cifar-100-python/test"):
        cifar100(tar, "val")
    tar = write_tar(tmp_path / "y.tar", {"train": b""}, "something")
    with pytest.raises(UserError, match="it holds neither of the folders"):
        cifar100(tar, "val")
    (tmp_path / "z.tar.gz").write_text("not a tar")
    with pytest.raises(UserError, match=r"it does not unpack|it cannot be read"):
        cifar100(tmp_path / "z.tar.gz", "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no CIFAR-100. Give cifar-100-python.tar.gz or"):
        cifar100(tmp_path / "empty", "val")
    with pytest.raises(UserError, match="nowhere does not exist"):
        cifar100(tmp_path / "nowhere", "val")


def test_the_command_writes_both_splits(places: dict[str, Path], tmp_path: Path, capsys) -> None:
    for form in ("python.tar.gz", "binary folder"):
        main(["cifar100", "--src", str(places[form]), "--out", str(tmp_path / form)])
        assert capsys.readouterr().out.count("100 classes") == 2
    for name, member in (("train", "train"), ("val", "test")):
        path = tmp_path / "python.tar.gz" / f"{name}.beton"
        assert path.read_bytes() == (tmp_path / "binary folder" / f"{name}.beton").read_bytes()
        tables, manifest = read_tables(path), read_manifest(path)
        assert tables.labels.tolist() == content(member)[1]
        assert (tables.modes == MODE_RAW).all()
        assert manifest.superclasses is not None
        assert manifest.superclasses.of_class == tuple(i * 7 % 20 for i in range(100))


@pytest.mark.parametrize("arguments", [[], ["--src", "x", "--download"]])
def test_one_origin_must_be_given(tmp_path: Path, capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cifar100", "--out", str(tmp_path), *arguments])
    assert "Give one of --src ARCHIVE_OR_DIR and --download" in capsys.readouterr().err


def test_download_uses_torchvisions_checksum(places: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    calls = []

    def fetch(url: str, root: Path, filename: str, md5: str) -> None:
        calls.append((url, filename, md5))
        shutil.copy(places["python.tar.gz"], root / filename)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    main(["cifar100", "--download", "--out", str(tmp_path)])
    kind = torchvision.datasets.CIFAR100
    assert calls == [(kind.url, "cifar-100-python.tar.gz", kind.tgz_md5)]
    assert len(read_tables(tmp_path / "val.beton").labels) == 110


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("File not found or corrupted.")])
def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch, error: Exception) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    with pytest.raises(UserError, match=r"could not be fetched into .*--src cifar-100-python.tar.gz"):
        download(tmp_path)
