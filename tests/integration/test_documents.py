"""Every command in README.md and docs/ does what it says, in a shortened form; links lead somewhere.

The blocks' commands run here in the documents' order, made small by flags at their end. Those that cannot run here are
parsed: benchmarks, several ranks, what is inside Docker, W&B's own commands, sketches with parts left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import timm
from PIL import Image
from timm.models import VisionTransformer
from torch.distributed.run import get_args_parser as torchrun_parser

from lowrank_vit import train as train_command
from lowrank_vit.common.program import COMMANDS as COMMAND_MODULES
from lowrank_vit.config.flags import parse
from lowrank_vit.model.weights import read_checkpoint
from tests.documents import ROOT, Block, blocks, calls_of, calls_of_job, tool, write_recorders
from tests.integration.test_published_commands import COMMANDS
from tests.photos import write_folder
from tests.sources import write_archive
from tests.waiting import LONG_S

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for name in ("*.md", "docs/**/*.md", "docs/**/*.ipynb")
    for path in ROOT.glob(name)
)
ENGLISH, CHINESE = "docs/guide.md", "docs/guide_zh.md"
TINY_OPTIONS: dict[str, Any] = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
TINY = " ".join(f"{name}={value}" for name, value in TINY_OPTIONS.items())
SHRINK = f"""
--img-size 32 --model-kwargs {TINY} --epochs 1 --warmup-epochs 0 -b 10 -vb 10 --grad-accum-steps 1 --workers 1
--no-compile --no-amp --device cpu --loader resident --spec-every 10 --larger-head
"""
MANY_IMAGES = "-b 120 -vb 120 --spec-every 4"
"""Beside SHRINK, of the digits: a dozen updates, not a hundred."""
SMALLER = {
    "lowrank_vit.validate": "--device cpu --loader resident -b 120 --workers 1",
    "lowrank_vit.inference": "--device cpu --workers 1",
    "lowrank_vit.augment": "--img-size 32",
    "lowrank_vit.report": "--no-png",
    "lowrank_vit.compress": "SIZE --device cpu --loader resident -b 120 --workers 1 --calibration-images 20",
}
"""Flags that make a command small; what they name is the only part of it that does not run as it stands."""
NOT_OURS = ("pytest", "ruff", "pyright")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the documents' names mean something: recorders, configurations, images, an archive, a run."""
    folder = tmp_path_factory.mktemp("reader")
    write_recorders(folder)
    (folder / "configs").symlink_to(ROOT / "configs")
    for split in ("train", "val", "test"):
        write_folder(folder / "photos" / split)
    for name in ("imagenet", "imagenet100"):
        write_imagenet(folder / "other_disks" / "data" / name)
    for archive in (folder, folder / "data"):
        write_archive(archive)
    shutil.copytree(folder / "photos" / "test" / "temple", folder / "folder")
    shutil.copy(folder / "folder" / "00.jpg", folder / "photo.jpg")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        train_command.main(shlex.split(f"photos --spec-monitor --experiment a {SHRINK}"))
    shutil.copytree(folder / "output" / "a", folder / "output" / "b")
    for name in ("epoch10.pth.tar", "epoch90.pth.tar"):
        shutil.copy(folder / "output" / "a" / "last.pth.tar", folder / name)
    return folder


def write_imagenet(root: Path) -> None:
    """The hundred classes of ImageNet-100 with an image each."""
    names = (ROOT / "configs" / "imagenet100_classes.txt").read_text().split()
    for split in ("train", "val"):
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 36), (number, 2 * number, 90)).save(root / split / name / f"{name}.JPEG")


class Reader:
    """Runs or parses what the blocks of a document call, in its order."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self._monkeypatch = place, monkeypatch
        self._names: dict[str, Any] = {}
        """Of a notebook: what its cells have defined."""

    def read(self, block: Block) -> None:
        """A block of any language; one of an unknown kind is an error."""
        if block.language == "yaml":
            path = self.place / "block.yaml"
            path.write_text(block.text)
            parse(["--config", str(path)])
        elif block.language == "python":
            if "import submitit" in block.text or "import ray" in block.text:
                compile(block.text, f"line {block.line}", "exec")  # test_batch_jobs.py runs them
            elif "pandas" not in block.text or importlib.util.find_spec("pandas"):
                exec(compile(block.text, f"line {block.line}", "exec"), {})
        elif block.language == "cell":
            exec(compile(block.text, f"cell {block.line}", "exec"), self._names)
        elif block.language == "text":  # a drawing, or what a command has printed
            pass
        else:
            assert block.language == "bash", f"line {block.line}: no test knows what to do with {block.language}"
            calls = calls_of(block.text, self.place)
            assert calls, f"line {block.line}: it calls nothing"
            for call in calls:
                self.call(*call)

    def call(self, name: str, arguments: list[str], told: dict[str, str]) -> None:
        """A command that bash has called."""
        if name == "python":
            assert arguments[0] == "-m"
            self.module(arguments[1], arguments[2:], told)
        elif name == "lowrank-vit":
            self.module(COMMAND_MODULES[arguments[0]][0].removesuffix(".__main__"), arguments[1:], told)
        elif name == "make":
            for call in calls_of(self.recipe(arguments), self.place):
                self.call(*call)
        elif name == "torchrun":
            launch = torchrun_parser().parse_args(arguments)
            assert (launch.module, launch.training_script) == (True, "lowrank_vit.train")
            parse(launch.training_script_args)
        elif name == "sbatch":
            for call in calls_of_job(arguments, told, self.place):
                self.call(*call)
        elif name == "wandb":
            assert arguments == ["login"] or (arguments[0] == "sync" and "/wandb/" in arguments[1])
        elif name == "tensorboard":
            assert arguments == ["--logdir", "output"]
        elif name == "docker" and arguments[0] == "build":
            assert (ROOT / arguments[-1] / "Dockerfile").exists()
        else:
            assert (name, arguments[0]) == ("docker", "run")
            if inside := arguments[arguments.index("lowrank-vit") + 1 :]:
                assert inside[0] == "make"
                assert "lowrank_vit" in self.recipe(inside[1:])  # its data lie in the container

    def recipe(self, arguments: list[str]) -> str:
        """What make itself would run; nothing where it would install or remove something."""
        told = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = [tool("make"), "--dry-run", *arguments, "PY=python"]
        done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, timeout=LONG_S, check=False)
        assert done.returncode == 0, f"make {arguments}: {done.stderr}"
        return "" if {"setup", "clean", "dist", "docs"} & set(arguments) else done.stdout

    def module(self, module: str, arguments: list[str], told: dict[str, str]) -> None:
        """`python -m MODULE ARGUMENTS`."""
        is_sketch = "..." in arguments  # with parts left out, and others optional
        if is_sketch:
            arguments = [argument.strip("[]") for argument in arguments if argument != "..."]
        arguments = [re.sub(r"^/(data|local)/", rf"{self.place}/other_disks/\1/", one) for one in arguments]
        if module == "lowrank_vit.train":
            self.train(arguments, told, is_sketch=is_sketch)
        elif module == "benchmarks":
            self.parse_bench(arguments)
        elif module in NOT_OURS:
            assert importlib.util.find_spec(module)
        elif module == "data_prep":
            self.prepare(arguments)
        else:
            size = "--budget" if "--budget" in arguments else "--budgets"  # most of so small a model is no target
            more = shlex.split(SMALLER.get(module, "").replace("SIZE", f"{size} 0.9"))
            with self._monkeypatch.context() as patch:
                if "--pretrained" in arguments:  # there may be no network
                    patch.setattr(timm, "create_model", lambda name, **_: VisionTransformer(**TINY_OPTIONS))
                run(module, arguments + more)

    def train(self, arguments: list[str], told: dict[str, str], *, is_sketch: bool) -> None:
        """For one epoch of a tiny model, two where layers go in factors between, or one more of a resumed run."""
        if "--help" in arguments:
            with pytest.raises(SystemExit, match="0"):
                parse(arguments)
            return
        config = parse(arguments)
        is_online = {"--log-wandb", "wandb"} & set(arguments) and "WANDB_MODE" not in told
        if not is_sketch and not is_online:
            for name, value in told.items():
                self._monkeypatch.setenv(name, value)
            is_of_digits = "digits" in f"{config.data.dataset} {config.data.data_dir}"
            more = f"{SHRINK} {MANY_IMAGES}" if is_of_digits else SHRINK
            if config.lowrank.lowrank_schedule:  # at the one epoch's end that there is before the last
                more += " --epochs 2 --lowrank-schedule 1=0.6"
            if "--resume" in arguments:
                last = read_checkpoint(Path(arguments[arguments.index("--resume") + 1]))
                more = f"--epochs {last.epoch + 2} --warmup-epochs 0"
            # What --pretrained fetches is tested with the published commands.
            words = [one for one in arguments if one != "--pretrained"] + shlex.split(more)
            if config.run.seeds:  # a process each, but for here: two of its runs, as it would start them
                at, name = words.index("--seeds"), config.run.experiment
                words[at : at + 1 + len(config.run.seeds)] = []
                for seed in config.run.seeds[:2]:
                    run("lowrank_vit.train", [*words, "--seed", str(seed), "--experiment", f"{name}-seed{seed}"])
                return
            run("lowrank_vit.train", words)

    def prepare(self, arguments: list[str]) -> None:
        """What would be downloaded is there already, and small."""
        if "--download" in arguments:
            with self._monkeypatch.context() as patch:
                patch.setattr("data_prep.commands.convert_cifar100", lambda *_, **__: ())
                run("data_prep", arguments)
            arguments = [*(one for one in arguments if one != "--download"), "--src", "cifar-100-python.tar.gz"]
        run("data_prep", arguments)

    def parse_bench(self, arguments: list[str]) -> None:
        """It takes minutes, so only its command line is read."""
        called: list[object] = []
        with self._monkeypatch.context() as patch:
            patch.setattr("benchmarks.commands._bench", lambda *given, **_: called.append(given))
            patch.setattr("benchmarks.gpu_check.run", lambda *given, **_: called.append(given) or ("page", True))
            run("benchmarks", arguments)
        assert called


def run(module: str, arguments: list[str]) -> None:
    """In this process, since importing torch takes longer than anything here."""
    found = importlib.import_module(module)
    if not hasattr(found, "main"):
        found = importlib.import_module(f"{module}.__main__")
    found.main(arguments)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(document, place, monkeypatch, sketched):
    monkeypatch.chdir(place)
    latest = place / "output" / "latest"  # each document begins with a run that is there
    latest.unlink()
    latest.symlink_to("a")
    for name, value in {"WANDB_SILENT": "true", "WANDB_DIR": str(place), "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    if document.endswith(".ipynb"):
        plt.switch_backend("agg")
        monkeypatch.setattr("matplotlib.pyplot.show", lambda: plt.close("all"))
    if document == CHINESE:
        return  # the same blocks as the English ones, see below
    reader = Reader(place, monkeypatch)
    for block in blocks(document):
        reader.read(block)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.endswith(".ipynb")])
def test_a_notebook_shows_what_it_printed_and_drew(document):
    cells = json.loads((ROOT / document).read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    shown = sum("plt.show()" in "".join(cell["source"]) for cell in cells)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == shown > 0
    runs = [cell for cell in cells if cell["cell_type"] == "code" and "lowrank_vit." in "".join(cell["source"])]
    assert runs
    assert all(cell["outputs"] for cell in runs)
    printed = "".join("".join(output.get("text", ())) for output in outputs)
    assert "top-1" in printed
    assert not re.search(r"\x1b|Traceback|(?m:^| )/\w", printed)  # no control sequence, and no path of a machine


@pytest.mark.parametrize(
    "text",
    ["```\ncurl x\n```", "```ruby\n1\n```", "```bash\necho $(curl x)\n```", "    make nothing", "    python -m x"],
)
def test_a_block_of_an_unknown_kind_is_an_error(text, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    (tmp_path / "a.md").write_text(f"Text:\n\n{text}\n\nMore.\n")
    (block,) = blocks(str(tmp_path / "a.md"))
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        Reader(place, monkeypatch).read(block)


def test_both_guides_have_the_same_commands():
    english, chinese = (
        [(block.language, re.sub(r"(?m)(^|[ ]+)# .*$", "", block.text)) for block in blocks(name)]
        for name in (ENGLISH, CHINESE)  # comments are translated
    )
    assert english
    assert english == chinese


def test_the_guide_has_every_published_command(place):
    bash = [block.text for block in blocks(ENGLISH) if block.language == "bash"]
    calls = [call for text in bash for call in calls_of(text, place)]
    told = [arguments[2:] for name, arguments, _ in calls if name == "python" and arguments[1] == "lowrank_vit.train"]
    found = [parse(arguments) for arguments in told if "--experiment" in arguments]
    for name, text in COMMANDS.items():
        assert parse(shlex.split(text)) in found, name


@pytest.mark.parametrize("document", [ENGLISH, CHINESE])
def test_messages_in_the_guide_are_the_programs(document):
    table = (ROOT / document).read_text(encoding="utf-8").rpartition("\n## ")[2]
    messages = re.findall(r"(?m)^\| `([^`]+)` \|", table)
    sources = [*ROOT.glob("lowrank_vit/**/*.py"), *ROOT.glob("data_prep/**/*.py"), *ROOT.glob("scripts/*.sh")]
    said = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert len(messages) > 8
    assert [message for message in messages if message not in said] == []


def text_of(path: Path) -> str:
    """A document without its code."""
    return re.sub(r"(?s)```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"(?m)^#+ +(.+)$", re.sub(r"(?s)```.*?```", "", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    text = re.sub(r"https?://\S+", "", (ROOT / document).read_text(encoding="utf-8"))
    for name in re.findall(
        r"\b(?:configs|data_prep|docs|lowrank_vit|scripts|tests)/[\w./{},*-]+\.(?:md|py|sh|txt|ya?ml)", text
    ):
        assert any(ROOT.glob(re.sub(r"\{[^}]*\}", "*", name))), name
