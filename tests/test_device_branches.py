"""Every branch on a device's type is taken by a test on a CPU, or the record says why only a GPU can show it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from lowrank_vit.common.devices import cuda_path
from tests.device_branches import ROOT, branches, covered, find, only_on_a_gpu

HOW = (
    "ask `devices.cuda_path`, take the branch in a test by the fixture `on_cuda_path`, compare numbers with the CPU's "
    "way, and name the test in tests/device_branches.toml (see docs/architecture.md, Branches on a device's type)"
)


def test_every_branch_is_taken_by_a_test_or_said_to_need_a_gpu():
    known, named = {branch.key for branch in branches()}, covered().keys() | only_on_a_gpu().keys()
    assert not known - named, f"new: {HOW}"
    assert not named - known, "no longer in the source: take it out of tests/device_branches.toml"
    assert not covered().keys() & only_on_a_gpu().keys()


def test_tests_of_branches_exist_and_go_cudas_way():
    """Those that ask `cuda_path` by the fixture, which fails where a branch of the test's was not taken."""
    asking = {branch.key for branch in branches() if branch.asks_the_path}
    for key, name in covered().items():
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{key} is said to be taken by {name}, which does not exist"
        if key in asking:
            assert _goes_cudas_way(functions[function], functions), f"{name} takes {key} without `on_cuda_path`"


def _goes_cudas_way(function: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> bool:
    """Whether a test has the fixture `on_cuda_path`, itself or by a fixture of its file."""
    marks = [
        node.value for part in function.decorator_list for node in ast.walk(part) if isinstance(node, ast.Constant)
    ]
    needed = {argument.arg for argument in function.args.args} | {mark for mark in marks if isinstance(mark, str)}
    return "on_cuda_path" in needed or any(
        _goes_cudas_way(functions[name], functions) for name in needed & functions.keys() if name != function.name
    )


def test_reasons_are_sentences():
    assert all(len(reason.split()) > 4 for reason in only_on_a_gpu().values())


@pytest.mark.parametrize(
    "planted",
    [
        "def f(x):\n    return 1 if cuda_path(x) else 2",
        "def f(x):\n    if x.is_cuda:\n        return 1",
        "def f(x):\n    return [y for y in x if not y.is_cuda]",
        "def f(x):\n    if x.device.type == 'cuda':\n        return 1",
        "def f(x):\n    if x.device.type in ('cuda', 'mps'):\n        return 1",
        "def f(x):\n    return {'cuda': 1, 'cpu': 2}[x.device.type]",
        "def f(x):\n    if str(x.device).startswith('cuda'):\n        return 1",
        "def f(x):\n    if 'cuda' in str(x.device):\n        return 1",
        "def f(x, device):\n    assert device == torch.device('cpu')",
        "CPU = torch.device('cpu')\ndef f(device):\n    return 1 if device != CPU else 2",
        "def f(x):\n    while x.device.index is not None:\n        pass",
        "def f(x):\n    return x.get_device() >= 0",
        "def f(x):\n    return getattr(x, 'is_cuda', False)",
        "def f(x):\n    match x.device.type:\n        case 'cuda':\n            return 1",
        "def f(kind):\n    match kind:\n        case 'cuda' | 'mps':\n            return 1",
        "import torch\ndef f():\n    if torch.cuda.is_available():\n        return 1",
        "from torch import cuda\ndef f():\n    return cuda.is_available() and 1",
        "from torch.cuda import is_available as there\ndef f():\n    return 1 if there() else 2",
        "import torch.cuda as tc\ndef f():\n    return tc.device_count() > 1",
        "import torch\ndef f():\n    return torch.accelerator.is_available()",
        "import torch\ndef f():\n    if torch.version.cuda:\n        return 1",
        "import torch\ndef f(s):\n    if isinstance(s, torch.cuda.Stream):\n        return 1",
        "import torch\ndef f(self):\n    return 1 if self._stream else 2",
        "import torch\ndef f(copy_stream):\n    if copy_stream is not None:\n        return 1",
        "def f(x, device):\n    return x.to(device, non_blocking=True)",
        "def f(x):\n    return x.pin_memory()",
        "try:\n    import triton\nexcept ImportError:\n    triton = None",
        "try:\n    from lowrank_vit.augment import ops_triton\nexcept ImportError:\n    pass",
        "X = 1 if torch.backends.cuda.is_built() else 2\nimport torch",
        "def f(x, g=lambda y: y.is_cuda):\n    return g(x)",
        "def f(kind):\n    return kind.startswith(('cuda', 'mps'))",
        "def f():\n    return hasattr(torch, 'cuda')",
        "import torch\ntry:\n    torch.cuda.current_device()\nexcept RuntimeError:\n    pass",
        "def f():\n    with contextlib.suppress(ImportError):\n        import triton",
        "def f():\n    return importlib.util.find_spec('triton') is not None",
        "def f(x, is_cuda):\n    return 1 if is_cuda else 2",
        "def f(device):\n    return device.index or 0",
    ],
)
def test_a_new_branch_is_found_however_it_is_written(planted):
    assert find({ROOT / "lowrank_vit" / "new.py": ast.parse(planted)}, ROOT)


@pytest.mark.parametrize(
    "planted",
    [
        "def f(x):\n    return 1 if cuda_path(x) else 2",
        "from lowrank_vit.common import devices\ndef f(x):\n    return 1 if devices.cuda_path(x) else 2",
        "from lowrank_vit.common.devices import cuda_path as goes\ndef f(x):\n    return 1 if goes(x) else 2",
    ],
)
def test_what_asks_for_the_way_is_known_under_any_name(planted):
    (branch,) = find({ROOT / "lowrank_vit" / "new.py": ast.parse(planted)}, ROOT)
    assert branch.asks_the_path


@pytest.mark.parametrize(
    ("planted", "texts"),
    [
        ("def f(x):\n    fast = x.is_cuda\n    if fast:\n        return 1", ["x.is_cuda", "fast"]),
        ("class A:\n    def __init__(self, device):\n        self._fast = not cuda_path(device)\n    def f(self):\n"
         "        return 1 if self._fast else 2", ["cuda_path(device)", "self._fast"]),
        ("def on_gpu(x):\n    return x.is_cuda\ndef f(x):\n    return 1 if on_gpu(x) else 2",
         ["x.is_cuda", "on_gpu(x)"]),
        ("class A:\n    @property\n    def fast(self):\n        return self.x.is_cuda\n    def f(self):\n"
         "        return self.fast and 1", ["self.x.is_cuda", "self.fast"]),
        ("def f(device):\n    return Shape(resize=device.type != 'cpu')\ndef g(shape):\n    if shape.resize:\n"
         "        return 1", ["device.type != 'cpu'", "shape.resize"]),
        ("def f(x):\n    k = x.device.type\n    return 1 if k == 'cuda' else 2", ["x.device.type", "k == 'cuda'"]),
        ("def f(x):\n    if (on := x.is_cuda) and 1:\n        return 1 if on else 2", ["x.is_cuda", "on"]),
        ("def f(x):\n    assert x.is_cuda\n    return 2 if x.is_cuda else 3", ["x.is_cuda", "x.is_cuda (2)"]),
    ],
)  # fmt: skip
def test_what_is_made_of_an_answer_is_a_branch_where_it_is_asked(planted, texts):
    found = find({ROOT / "lowrank_vit" / "new.py": ast.parse(planted)}, ROOT)
    assert [branch.text for branch in found] == texts


@pytest.mark.parametrize(
    "plain",
    [
        "def f(x, device: torch.device) -> torch.cuda.Stream:\n    return x.to(device)",
        "def f(x, device=None):\n    return x if device is None else x.to(device)",
        "def f(x):\n    with torch.autocast(x.device.type):\n        return x.cpu()",
        "def f(lines, stream):\n    return lines if stream is None else stream.read()",
        "def f():\n    return {'cpu': 'EPYC', 'cores': 2}",
        "def f(x):\n    s: deque[torch.cuda.Event] = deque()\n    return torch.zeros(1, device=x.device)",
        "def f(x):\n    return x.pin(non_blocking=False)",
    ],
)
def test_what_decides_nothing_is_no_branch(plain):
    assert not find({ROOT / "lowrank_vit" / "new.py": ast.parse(plain)}, ROOT)


def test_a_test_that_stays_on_the_cpus_way_is_noticed(on_cuda_path, monkeypatch):
    key = next(branch.key for branch in branches() if branch.text == "cuda_path(matrices_NRC)")
    monkeypatch.setitem(covered(), key, "here")
    with on_cuda_path():
        assert cuda_path(torch.zeros(1))
        assert torch.zeros(3).pin_memory().shape == (3,)
    assert not cuda_path(torch.zeros(1))
    assert on_cuda_path.missed("here") == [key]
    assert Path(__file__).name in {Path(file).name for file, _ in on_cuda_path.asked}
