"""The blocks of code in the documents, and what bash calls when it runs them.

Bash itself takes a block apart: it runs with a PATH on which there are only recorders of their own arguments, so
quoting, variables and continued lines mean what they mean to a user, and a command that nobody thought of is an error.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import LONG_S

ROOT = Path(__file__).parents[1]
RECORDED = ("python", "torchrun", "make", "docker", "wandb", "tensorboard", "lowrank-vit", "sbatch")
RECORDER = """#!{python} -IS
import json, os, sys
names = ("WANDB_MODE", "RUN", "OUTPUT", "PARTS")
told = {{name: os.environ[name] for name in names if name in os.environ}}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], told]) + "\\n")
"""
SLURM = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": '[ "$1" != requeue ] || echo "$*" >>requeued.txt; echo node1',
    "head": 'read -r line; echo "$line"',
}
"""What a batch script calls, as one of its tasks sees it."""
SBATCH = set(
    """
    --account --array --cpus-per-gpu --cpus-per-task --dependency --error --exclude --exclusive --export --gpus
    --gpus-per-node --gpus-per-task --gres --hint --job-name --mail-type --mail-user --mem --mem-per-cpu --mem-per-gpu
    --nodelist --nodes --ntasks --ntasks-per-node --open-mode --output --partition --qos --requeue --reservation
    --signal --time --time-min --wait --wrap
    """.split()
)
"""Options of sbatch by its manual (https://slurm.schedmd.com/sbatch.html), as far as one may want them."""
Call = tuple[str, list[str], dict[str, str]]
"""A command's name, its arguments, and what its environment tells."""
NOTE_UNKNOWN = 'command_not_found_handle() { echo "$1" >>"$UNKNOWN"; }; export -f command_not_found_handle\n'


@dataclass(frozen=True)
class Block:
    """A block of code of a document."""

    line: int
    language: str
    """As the fence tells; "bash" for an indented block; "cell" for one of a notebook in Python."""
    text: str


def blocks(document: str) -> list[Block]:
    """All blocks of code, fenced or indented; of a notebook its cells, by number."""
    if document.endswith(".ipynb"):
        cells = json.loads((ROOT / document).read_text(encoding="utf-8"))["cells"]
        texts = {n: "".join(cell["source"]) for n, cell in enumerate(cells, 1) if cell["cell_type"] == "code"}
        bash = "%%bash\n"
        return [
            Block(n, "bash" if text.startswith(bash) else "cell", text.removeprefix(bash)) for n, text in texts.items()
        ]
    found: list[Block] = []
    fence: tuple[int, str] | None = None
    lines: list[str] = []
    before = ""
    for number, line in enumerate([*(ROOT / document).read_text(encoding="utf-8").splitlines(), ""], 1):
        if line.startswith("```"):
            if fence:
                found.append(Block(*fence, "\n".join(lines)))
            fence, lines = None if fence else (number, line[3:].strip()), []
        elif fence:
            lines.append(line)
        elif line.startswith("    ") and (lines or not before.strip()):
            lines.append(line[4:])
        elif lines:
            found.append(Block(number - len(lines), "bash", "\n".join(lines)))
            lines = []
        before = line
    assert fence is None, f"{document}: the fence of line {fence} is not closed"
    return found


def spans(document: str) -> list[str]:
    """The pieces of code within its prose, each in one line."""
    prose = (ROOT / document).read_text(encoding="utf-8")
    if document.endswith(".ipynb"):
        cells = json.loads(prose)["cells"]
        prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    prose = re.sub(r"(?ms)^```.*?^```|^    .*?$", "", prose)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def header_commands(path: Path) -> str:
    """The commands in a file's leading comment: its indented lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = lines[: next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return "\n".join(line[1:].strip().partition("   ")[0] for line in comment if line.startswith("#   "))


def calls_of(text: str, folder: Path) -> list[Call]:
    """What bash calls when it runs `text` in `folder`."""
    record, unknown = folder / "record.jsonl", folder / "unknown.txt"
    for file in (record, unknown):
        file.write_text("")
    told = {"PATH": str(folder / "bin"), "RECORD": str(record), "UNKNOWN": str(unknown)}
    slurm = {
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "96",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "16",
    }
    command = [tool("bash"), "-euo", "pipefail", "-c", NOTE_UNKNOWN + text]
    done = subprocess.run(
        command, cwd=folder, env=told | slurm, capture_output=True, text=True, timeout=LONG_S, check=False
    )
    missed = unknown.read_text().split()
    assert not missed, f"no test knows what to do with {', '.join(missed)}"
    assert done.returncode == 0, f"bash stops at\n{text}\n{done.stderr}"
    return [tuple(json.loads(line)) for line in record.read_text().splitlines()]


def tool(name: str) -> str:
    """Where a program of this machine is."""
    path = shutil.which(name)
    assert path, f"{name} is not installed"
    return path


def write_recorders(folder: Path) -> None:
    """Commands that only note how they were called, in `folder`/bin and in `folder`/.venv/bin."""
    for bin_dir in (folder / "bin", folder / ".venv" / "bin"):
        bin_dir.mkdir(parents=True)
        scripts = {name: RECORDER.format(python=sys.executable) for name in RECORDED}
        scripts |= {name: f"#!{tool('bash')}\n{line}\n" for name, line in SLURM.items()}
        for name, script in scripts.items():
            (bin_dir / name).write_text(script)
            (bin_dir / name).chmod(0o755)
    (folder / "bin" / "bash").symlink_to(tool("bash"))
    (folder / ".venv" / "bin" / "activate").touch()
    (folder / "scripts").symlink_to(ROOT / "scripts")


def calls_of_job(arguments: list[str], told: dict[str, str], folder: Path) -> list[Call]:
    """What the batch script that an sbatch command line names calls in one of its tasks."""
    at = next(n for n, one in enumerate(arguments) if not one.startswith("--"))
    assert {one.split("=")[0] for one in arguments[:at]} <= SBATCH, arguments
    assert arguments[at].startswith("scripts/slurm/")
    words = [*(f"{name}={value}" for name, value in told.items()), "bash", *arguments[at:]]
    return calls_of(shlex.join(words), folder)
