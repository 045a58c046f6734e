"""Facts about a machine and an installation for a bug report, line by line; each line can fail on its own.

Each import, also of torch, happens in the line that needs it. Lines contain nothing about the user: home directory,
folders, user and host are removed from every line.
"""

from __future__ import annotations

import contextlib
import getpass
import mmap
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from lowrank_vit import __version__
from lowrank_vit.common.begin import SCRIPT
from lowrank_vit.common.packages import install_line

Page = dict[str, dict[str, str]]
"""Lines by section and name."""
Lines = Iterator[tuple[str, Callable[[], str]]]
TIMEOUT_S = 20.0
"""Time limit for a line, such as one about a file system that does not answer."""
_OF_WORK = ("dev", "docs", "all")
_OTHER_PATHS = (
    re.compile(r"(?<=')/(?:[^'/\n]+/)+(?=[^'\n]*')"),
    re.compile(r'(?<=")/(?:[^"/\n]+/)+(?=[^"\n]*")'),
    re.compile(r"(?<![\w.~])(?<!:/)/(?:[^\s/:;'\"]+(?: [^\s/:;'\"]+)*/)+"),
)
"""Folders of an absolute path: with any names inside quotation marks, otherwise with single spaces in names."""
_TOLD = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "NUMBA_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "WANDB_MODE")
"""Environment variables that affect a run and contain nothing personal."""


def diagnosis(output: Path, data_dir: Path) -> Page:
    """All lines. If `output` or `data_dir` does not exist, the nearest existing parent folder is examined.

    If the working directory was removed, the process changes to /, since torch's libraries abort without one.
    """
    was_in = _lost_folder()
    if was_in:
        os.chdir("/")
        output, data_dir = was_in / output, was_in / data_dir
    sections: dict[str, Callable[[], Lines]] = {
        "versions": _versions,
        "extras": _extras,
        "machine": _machine,
        "gpu": _gpu,
        "output": lambda: _files(output),
        "data": lambda: _files(data_dir),
        "auto": lambda: _auto(data_dir),
    }
    hide = _Hider(output, data_dir, *([was_in] if was_in else []))
    page: Page = {}
    for section, lines in sections.items():
        entries = page[section] = dict[str, str]()
        try:
            for name, look in lines():
                entries[name] = hide(_told(look))
        except Exception as error:  # the list of lines itself failed
            entries["and more"] = hide(_failed(error))
    if was_in:
        page["machine"]["working directory"] = "it does not exist any more"
    return page


def _lost_folder() -> Path | None:
    """The shell's name of the working directory if it was removed; None if it exists."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return Path("/", os.environ.get("PWD", ""))
    return None


def _told(look: Callable[[], str]) -> str:
    """The text of a line, or why it failed, or that it took too long."""
    found = list[str]()

    def work() -> None:
        try:
            found.append(look())
        except BaseException as error:  # a library may do anything
            found.append(_failed(error))

    _do_in_time([work])
    return found[0] if found else f"no answer within {TIMEOUT_S:g} s"


def _do_in_time(works: Iterable[Callable[[], None]]) -> None:
    """Do all at once; work that takes longer than `TIMEOUT_S` is abandoned, since it cannot be stopped."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    end = time.monotonic() + TIMEOUT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


def _failed(error: BaseException) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


class _Hider:
    """Removes folders, user, host and keys from a text, since a bug report is public."""

    def __init__(self, *given: Path) -> None:
        self._paths: list[tuple[str, str]] = []
        self._names: list[str] = []
        places: list[tuple[Callable[[], object], str]] = [
            *((lambda path=path: path, "DIR") for path in given),
            (lambda: sys.prefix, "ENV"),
            (lambda: sys.base_prefix, "PYTHON"),
            (Path.cwd, "."),
            (Path.home, "~"),
            (tempfile.gettempdir, "TMP"),
        ]
        looks = [lambda place=place, short=short: self._find_place(place, short) for place, short in places]
        _do_in_time([*looks, self._find_names])
        self._places = sorted({one for one in [*self._paths] if len(one[0]) > 1}, key=lambda one: -len(one[0]))
        names = "|".join(map(re.escape, sorted([*self._names], key=len, reverse=True)))
        self._who = re.compile(rf"(?<!\w)(?:{names})(?!\w)" if names else "(?!)")

    def _find_place(self, place: Callable[[], object], short: str) -> None:
        """Note the name of a folder, as given and with links resolved, as far as possible."""
        with contextlib.suppress(OSError, RuntimeError):  # it does not exist, or there is no home
            path = Path(str(place())).absolute()
            self._paths.append((str(path), short))
            self._paths.append((str(path.resolve()), short))

    def _find_names(self) -> None:
        host = socket.gethostname()
        self._names += filter(None, {host, host.partition(".")[0]})
        with contextlib.suppress(Exception):  # a user without a name
            self._names.append(getpass.getuser())

    def __call__(self, text: str) -> str:
        for path, short in self._places:
            text = text.replace(path, short)
        for pattern in _OTHER_PATHS:  # keep only the last part of any other absolute path
            text = pattern.sub(".../", text)
        return re.sub(r"(://)[^/\s@]+@", r"\1", self._who.sub("...", text))


def _versions() -> Lines:
    yield SCRIPT, lambda: __version__
    yield "python", lambda: f"{platform.python_version()}, {platform.system()} {platform.release()}"
    yield "torch", _torch
    for name in _requirements().get("", []):
        if name != "torch":
            yield name, lambda name=name: metadata.version(name)


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"


def _extras() -> Lines:
    for extra, names in _requirements().items():
        if extra and extra not in _OF_WORK:
            yield extra, lambda extra=extra, names=names: _of_extra(extra, names)


def _of_extra(extra: str, names: list[str]) -> str:
    found, lacking = list[str](), list[str]()
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lacking.append(name)
    without = f"{', '.join(lacking)} not installed ({install_line(extra).strip('`')})" if lacking else ""
    return "; ".join(filter(None, [", ".join(found), without]))


def _requirements() -> dict[str, list[str]]:
    """The required packages, under "", and those of each extra; in a source tree from its pyproject.toml."""
    found: dict[str, list[str]] = {"": []}
    lines = _requirements_of_sources() or metadata.requires(SCRIPT) or []
    own = dict[str, list[str]]()
    for line in lines:
        spec, _, marker = line.partition(";")
        extra = re.search(r"extra *== *['\"]([\w-]+)", marker)
        name, of = re.match(r"[\w.-]+", spec), extra[1] if extra else ""
        if not name:
            continue
        if name[0] == SCRIPT:
            own[of] = re.findall(r"[\w-]+", spec.partition("[")[2])
            found.setdefault(of, [])
        else:
            found.setdefault(of, []).append(name[0])
    for of, others in own.items():
        found[of] = [*(one for other in others for one in found.get(other, [])), *found[of]]
    return found


def _requirements_of_sources() -> list[str]:
    path = Path(__file__).parents[2] / "pyproject.toml"
    if not path.is_file():
        return []
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    return [*project["dependencies"], *(f"{line}; extra == '{extra}'" for extra, lines in extras for line in lines)]


def _machine() -> Lines:
    yield "cores", _cores
    yield "memory", _memory
    yield "shared memory", lambda: _room(Path("/dev/shm"))
    yield "libturbojpeg", _turbojpeg
    told = " ".join(f"{name}={os.environ[name]}" for name in _TOLD if name in os.environ)
    yield "environment", lambda: told or f"none of {', '.join(_TOLD)} is set"


def _cores() -> str:
    from lowrank_vit.common.resources import available_cores, cpu_name

    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    usable = available_cores()
    quota = f"a cgroup's quota of {usable}" if usable < (affinity or 1) else "no cgroup's quota"
    return f"{usable} usable: {os.cpu_count()} there, affinity to {affinity}, {quota}; {cpu_name()}"


def _memory() -> str:
    import psutil

    from lowrank_vit.common.resources import memory

    usable, host = memory(), psutil.virtual_memory().total
    limit = f", a cgroup's limit; the machine has {_size(host)}" if usable.total < host else ", no cgroup's limit"
    return f"{_size(usable.free)} of {_size(usable.total)} free{limit}"


def _room(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return f"{_size(usage.free)} of {_size(usage.total)} free"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _turbojpeg() -> str:
    from data_prep.formats import turbojpeg

    return turbojpeg.identity()


def _gpu() -> Lines:
    yield "driver", _driver
    yield "devices", _devices


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return "none (no nvidia-smi)"
    done = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT_S / 2, check=False)
    return done.stdout.partition("\n")[0].strip() or f"nvidia-smi fails: {(done.stderr or 'no message')[:200]}"


def _devices() -> str:
    import torch

    from lowrank_vit.common.devices import has_cuda, why_no_cuda
    from lowrank_vit.data.jpeg_engine import has_jpeg_engine

    if not has_cuda():
        return f"none{': ' + '. '.join(why) if (why := why_no_cuda()) else ''}"
    told = list[str]()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        engine = "a JPEG engine" if has_jpeg_engine(torch.device("cuda", index)) else "no JPEG engine"
        told.append(f"{index}: {properties.name}, {_size(properties.total_memory)}, {engine}")
    return "; ".join(told)


def _files(folder: Path) -> Lines:
    above = ", of the nearest folder above"
    yield "file system", lambda: f"{_type_of(_there(folder))}{'' if folder.is_dir() else above}"
    yield "room", lambda: _room(_there(folder))
    yield "locks", lambda: _locks(_there(folder))
    yield "mappings", lambda: _mappings(_there(folder))


def _there(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    there = folder.absolute()
    while not there.is_dir() and there != there.parent:
        there = there.parent
    return there


def _type_of(folder: Path) -> str:
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, place, type_, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if folder.resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, type_
    return kind


def _locks(folder: Path) -> str:
    from lowrank_vit.common.locks import SOFT_LOCK, lock_folder

    try:
        scratch = tempfile.TemporaryDirectory(prefix=".lowrank-vit-doctor-", dir=folder)
    except OSError as error:
        return f"cannot be written ({error.strerror}): nothing is locked there"
    with scratch as name:
        lock = lock_folder(Path(name))
        assert lock is not None, "a new folder is locked already"
        is_soft = (Path(name) / SOFT_LOCK).exists()
        lock.release()
    return "soft ones, a file each: the file system has no flock" if is_soft else "flock"


def _mappings(folder: Path) -> str:
    """How files in the folder can be mapped: tried with a new file, otherwise with an existing one."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".lowrank-vit-doctor-", dir=folder))
            file.write(b"0")
            file.flush()
            path = Path(file.name)
        except OSError:
            path = next((one for one in sorted(folder.iterdir()) if one.is_file() and one.stat().st_size), None)
            if path is None:
                return "not tried: the folder has no file to read and cannot be written"
        reading = stack.enter_context(path.open("rb"))
        for kind, flag in (("shared", mmap.MAP_SHARED), ("private", mmap.MAP_PRIVATE)):
            with contextlib.suppress(OSError):
                mmap.mmap(reading.fileno(), 0, flags=flag, prot=mmap.PROT_READ).close()
                return kind
    return "none: files there cannot be mapped, and neither can .beton files"


def _auto(data_dir: Path) -> Lines:
    yield "--device", _device
    yield "--amp, --compile", _step
    yield "--workers", _workers
    yield "--loader", lambda: _loader(data_dir)


def _device() -> str:
    from lowrank_vit.common.devices import pick_device, why_on_cpu

    device = pick_device("auto")
    return "; ".join(filter(None, [str(device), why_on_cpu("auto", device)]))


def _step() -> str:
    from lowrank_vit.config.options import Step

    step = Step()
    amp = step.amp_dtype if step.amp else f"off, {'TF32' if step.tf32 else 'float32'}"
    return f"amp {amp}; compile {step.compile_mode if step.compile else 'off'}"


def _workers() -> str:
    from lowrank_vit.common.devices import pick_device
    from lowrank_vit.data.decode.backend import usual_workers

    return f"{usual_workers(pick_device('auto'))} threads that decode, for one process on this machine"


def _loader(data_dir: Path) -> str:
    """The loader by the rules of `choose_backend`, without its measurement, which writes beside the set."""
    from lowrank_vit.common.devices import cuda_path, pick_device
    from lowrank_vit.data.choose import RESIDENT_SHARE, memory_bytes, why_not_resident
    from lowrank_vit.data.decode.dali import why_no_dali
    from lowrank_vit.data.decode.resident_set import free_bytes
    from lowrank_vit.data.sets.beton import Beton

    device = pick_device("auto")
    total, free = memory_bytes(device), free_bytes(device)
    if why := why_no_dali(device):
        other = f"ffcv ({why})"
    else:
        other = "dali" if cuda_path(device) else "ffcv or dali, whichever decodes the set faster"
    path = data_dir / "train.beton"
    if path.is_file():
        too_big = why_not_resident(Beton(path).decoded_bytes, total, free, device)
        return f"{other}; train.beton: {too_big}" if too_big else "resident for train.beton"
    return f"resident for sets of up to {_size(min(RESIDENT_SHARE * total, free / 2))} decoded, else {other}"
