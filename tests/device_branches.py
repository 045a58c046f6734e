"""Every branch on a device's type in the program, read from its source, and what shows that it is right.

`python -m tests.device_branches` lists them with the test of each, or the reason why only a GPU can show it, as
`device_branches.toml` beside this file says.

A branch is where the program asks which kind of device it has to do with: a call of `devices.cuda_path` (which is how
to ask), or another spelling such as `tensor.is_cuda`, `device.type == "cuda"`, `torch.cuda.is_available()` or
`if self._stream`; and where it asks something that was made of such an answer: a variable, an attribute or keyword
argument assigned from one, a function that returns one. Copies that differ on CUDA count as well (`pin_memory`,
`non_blocking`). Handing a device's type on to torch (`torch.autocast(device.type)`) is no branch.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".toml")
SOURCES = ROOT / "lowrank_vit"

_ASKS = "cuda_path"
_ATTRIBUTES = {"is_cuda", "is_cpu", "is_mps", "is_xpu", "is_pinned", "pin_memory", "get_device", "device_type"}
_KEYWORDS = {"pin_memory", "non_blocking", "pin_memory_device"}
_PREDICATES = re.compile(
    r"torch\.(cuda|mps|xpu|accelerator|backends\.(cuda|cudnn|mps))\."
    r"(is_\w+|has_\w+|device_count|current_accelerator|\w*capability|_is_compiled)"
    r"|torch\.get_device_module"
)
_SAYS_SO = re.compile(r"(is|on|use|uses|has|with)_(cuda|gpu|triton)")
_VERSIONS = re.compile(r"torch\.version\.(cuda|hip)")
_TYPES = re.compile(r"torch\.(cuda|mps|xpu)\.\w+")
_DEVICE_NAMES = re.compile(r"(?:.*_)?devices?(?:_type)?|cuda|cpu", re.IGNORECASE)
_KINDS = re.compile(r"(cuda|cpu|mps|xpu|gpu)(:.*)?", re.IGNORECASE)
_STREAMS = re.compile(r"(?:.*_)?stream")
_TAKES_A_TYPE = {"autocast", "GradScaler", "is_autocast_enabled"}
_OF_A_GPU = re.compile(r"(?:.*[._])?triton|nvidia\.nvimgcodec|nvidia\.nvjpeg")


@dataclass(frozen=True)
class Branch:
    """One place that asks."""

    file: str
    """Below the repository."""
    function: str
    """Its qualified name, empty at the top of the file."""
    text: str
    """The expression that asks; with "(2)" behind the second of the same text in a function."""
    first: int
    last: int
    """Its lines, from 1."""
    asks_the_path: bool
    """Whether it calls `cuda_path`, so that a test can be seen to have come by."""

    @property
    def key(self) -> str:
        """As in the record."""
        return f"{self.file.removeprefix('lowrank_vit/')}::{self.function}: {self.text}"


@cache
def branches(root: Path = SOURCES) -> list[Branch]:
    """Every branch of the program, by file and line."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    return find(trees, root.parent)


def find(trees: Mapping[Path, ast.Module], base: Path) -> list[Branch]:
    """Every branch of some files, given as syntax trees; their paths are written as below `base`."""
    derived, files = set[str](), dict[str, _File]()
    known = [(path.relative_to(base).as_posix(), tree, _Facts(tree)) for path, tree in trees.items()]
    changed = known
    while True:
        files |= {name: _File(name, tree, facts, derived) for name, tree, facts in changed}
        more = set[str]().union(*(one.derived for one in files.values())) - derived
        if not more:
            return [branch for one in files.values() for branch in one.branches]
        derived |= more
        new = {one.rpartition(":")[2].removesuffix("()") for one in more}
        changed = [one for one in known if one[2].names & new]


@cache
def covered() -> dict[str, str]:
    """By branch the test that takes it, "tests/...py::test_name"."""
    return tomllib.loads(RECORD.read_text(encoding="utf-8"))["covered"]


@cache
def only_on_a_gpu() -> dict[str, str]:
    """By branch why only a GPU can show that it is right."""
    return tomllib.loads(RECORD.read_text(encoding="utf-8"))["only a GPU"]


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


class _Facts:
    """What a file's syntax tells whatever else is known of the program."""

    def __init__(self, tree: ast.Module) -> None:
        self.aliases: dict[str, str] = {}
        self.names = set[str]()
        self.decides = set[int]()
        """Nodes that something is decided by."""
        self.handed_on = set[int]()
        """Types of devices that torch is told."""
        self.tried = set[int]()
        """Nodes whose failure something is decided by."""
        imported = set[str]()
        for node in ast.walk(tree):
            self.names.add(_last_name(node))
            if isinstance(node, ast.ImportFrom) and node.module:
                self.aliases |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
            elif isinstance(node, ast.Import):
                self.aliases |= {one.asname: one.name for one in node.names if one.asname}
                imported |= {one.name for one in node.names}
            elif isinstance(node, ast.Try) and node.handlers:
                self.tried |= {id(part) for statement in node.body for part in ast.walk(statement)}
            elif isinstance(node, ast.Call) and _last_name(node.func) in _TAKES_A_TYPE:
                self.handed_on |= {id(part) for value in [*node.args, *node.keywords] for part in ast.walk(value)}
            elif isinstance(node, _DECIDING):
                self.decides |= {id(part) for part in _conditions(node)}
        self.uses_torch = any(name.partition(".")[0] == "torch" for name in {*self.aliases.values(), *imported})


class _File(ast.NodeVisitor):
    """Goes through one file; what was made of an answer goes into `derived`, as names."""

    def __init__(self, name: str, tree: ast.Module, facts: _Facts, derived: set[str]) -> None:
        self.branches, self.derived = list[Branch](), set[str]()
        self._name, self._facts, self._known = name, facts, derived
        self._known_names = {one.rpartition(":")[2] for one in derived}
        self._scope, self._seen = list[str](), Counter[tuple[str, str]]()
        self.visit(tree)

    def _dotted(self, node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{self._dotted(node.value)}.{node.attr}"
        return self._facts.aliases.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    def _asks(self, node: ast.Call) -> bool:
        return self._dotted(node.func).rpartition(".")[2] == _ASKS

    def _is_stream(self, node: ast.AST) -> bool:
        """Whether it is a stream of a device, or none; a file without torch has those of text alone."""
        return self._facts.uses_torch and bool(_STREAMS.fullmatch(_last_name(node)))

    def _noted(self, target: ast.AST, *, called: bool = False) -> set[str]:
        """A name for what was made of an answer; variables are known in their function, private functions in a file."""
        name = f"{_last_name(target)}{'()' * called}"
        if name.startswith("_") and called:
            return {f"{self._name}:{name}"}
        is_variable = isinstance(target, ast.Name) and not called
        return {f"{self._name}:{'.'.join(self._scope)}:{name}"} if is_variable else {name} - {""}

    def _is_known(self, node: ast.AST, *, called: bool = False) -> bool:
        name = f"{_last_name(node)}{'()' * called}"
        if name not in self._known_names:
            return False
        scopes = [".".join(self._scope[:depth]) for depth in range(len(self._scope) + 1)]
        own = {f"{self._name}:{scope}:{name}" for scope in scopes} if isinstance(node, ast.Name) else set[str]()
        return bool(({name, f"{self._name}:{name}"} | own) & self._known)

    def _tells(self, node: ast.AST) -> bool:
        """Whether this expression by itself asks for the kind of a device."""
        if isinstance(node, ast.Name | ast.Attribute):
            if not isinstance(node.ctx, ast.Load) or id(node) in self._facts.handed_on:
                return False
            name = _last_name(node)
            dotted = self._dotted(node)
            if id(node) in self._facts.decides and (
                self._is_known(node)
                or self._is_stream(node)
                or _VERSIONS.fullmatch(dotted)
                or _SAYS_SO.fullmatch(name)
                or (name == "index" and any(_DEVICE_NAMES.fullmatch(owner) for owner in _owners(node)))
            ):
                return True
            of_device = isinstance(node, ast.Attribute) and (name == "type" or name in _ATTRIBUTES)
            tries = id(node) in self._facts.tried and bool(_TYPES.fullmatch(dotted))
            return of_device or tries or name == "device_type" or bool(_PREDICATES.fullmatch(dotted))
        if isinstance(node, ast.Constant):
            return node.value in ("is_cuda", "is_cpu", "is_available")
        if isinstance(node, ast.Call):
            name = _last_name(node.func)
            looks = name in ("startswith", "match", "fullmatch", "search", "removeprefix", "getattr", "hasattr")
            said = [part for value in node.args for part in (value, *_values(value))]
            return (
                self._asks(node)
                or self._is_known(node.func, called=True)
                or (name == "isinstance" and any(_TYPES.fullmatch(self._dotted(x)) for x in ast.walk(node.args[1])))
                or (looks and any(_is_kind(part) for part in said))
                or (name in ("find_spec", "import_module") and any(_is_of_a_gpu(part) for part in said))
                or any(
                    k.arg in _KEYWORDS and not _is_false(k.value) and not self._is_answer(k.value)
                    for k in node.keywords
                )
            )
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            has_none = any(isinstance(side, ast.Constant) and side.value is None for side in sides)
            parts = [part for side in sides for part in ast.walk(side)]
            if any(_is_kind(part) for part in parts) or any(self._tells(part) for part in parts):
                return True
            of_device = [_last_name(part) for side in sides for part in [side, *_values(side)]]
            if any(self._is_stream(side) for side in sides):
                return True
            deeper = any(_DEVICE_NAMES.fullmatch(name) for side in sides for name in _owners(side))
            return deeper or (not has_none and any(_DEVICE_NAMES.fullmatch(name) for name in of_device if name))
        if isinstance(node, ast.Dict):
            return bool(node.keys) and all(key is not None and _is_kind(key) for key in node.keys)
        return False

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, _MAY_TELL) and self._tells(node):
            self._add(node)
            return
        for part in ast.iter_child_nodes(node):
            if not isinstance(part, _SAYS_NOTHING):
                self.visit(part)

    def _add(self, node: ast.AST) -> None:
        assert isinstance(node, ast.expr)
        function, text = ".".join(self._scope), ast.unparse(node)
        self._seen[function, text] += 1
        if (number := self._seen[function, text]) > 1:
            text += f" ({number})"
        asks = isinstance(node, ast.Call) and self._asks(node)
        self.branches.append(Branch(self._name, function, text, node.lineno, node.end_lineno or node.lineno, asks))

    def _is_answer(self, node: ast.AST | None) -> bool:
        """Whether the value of an expression tells the kind of a device: yes or no, or its name."""
        if isinstance(node, ast.UnaryOp):
            return self._is_answer(node.operand)
        if isinstance(node, ast.BoolOp):
            return any(self._is_answer(value) for value in node.values)
        if isinstance(node, ast.IfExp):
            said = (node.body, node.orelse)
            return self._is_answer(node.test) and all(_is_kind(x) or _is_truth(x) for x in said)
        if isinstance(node, ast.Call) and _last_name(node.func) in ("bool", "any", "all"):
            return any(self._is_answer(part) for part in ast.walk(node.args[0])) if node.args else False
        if isinstance(node, ast.Call) and any(k.arg in _KEYWORDS for k in node.keywords):
            return False  # a tensor
        if isinstance(node, ast.Name | ast.Attribute) and self._is_known(node):
            return True
        if isinstance(node, ast.Call) and self._tells(node.func):
            return True
        return node is not None and not isinstance(node, ast.Dict) and self._tells(node)

    def visit_Import(self, node: ast.Import) -> None:
        pass

    def visit_Assign(self, node: ast.Assign) -> None:
        pairs = list[tuple[ast.AST, ast.AST]]()
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs += zip(target.elts, node.value.elts, strict=False)
            else:
                pairs.append((target, node.value))
        for target, value in pairs:
            if self._is_answer(value):
                self.derived |= self._noted(target)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if self._is_answer(node.value):
            self.derived |= self._noted(node.target)
        if node.value is not None:
            self.visit(node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        if self._is_answer(node.value):
            self.derived |= self._noted(node.target)
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg and node.arg not in _KEYWORDS and self._is_answer(node.value):
            self.derived |= {node.arg}
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if self._scope and self._is_answer(node.value) and self._scope[-1] != _ASKS:
            name = ast.Name(self._scope[-1])
            self.derived |= self._noted(name, called=True) | {self._scope[-1]}  # called, or read as a property
        self.generic_visit(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.body)

    def visit_Try(self, node: ast.Try) -> None:
        self._find_imports(node.body)
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        if any(_last_name(part) == "suppress" for item in node.items for part in ast.walk(item.context_expr)):
            self._find_imports(node.body)
        self.generic_visit(node)

    def _find_imports(self, statements: list[ast.stmt]) -> None:
        """Imports of what there is with a GPU alone, and that may fail."""
        for statement in statements:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names = [one.name for one in statement.names]
                names += [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
                if any(_OF_A_GPU.fullmatch(name) for name in names):
                    text = ast.Name(ast.unparse(statement), lineno=statement.lineno, end_lineno=statement.end_lineno)
                    self._add(text)

    def visit_Match(self, node: ast.Match) -> None:
        patterns = [part for case in node.cases for part in ast.walk(case.pattern)]
        if any(isinstance(part, ast.MatchValue) and _is_kind(part.value) for part in patterns):
            self._add(node.subject)
        else:
            self.visit(node.subject)
        for case in node.cases:
            for part in [*([case.guard] if case.guard else []), *case.body]:
                self.visit(part)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._within(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._within(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._within(node)

    def _within(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Goes on inside, leaving out annotations."""
        self._scope.append(node.name)
        for part in node.decorator_list + node.body:
            self.visit(part)
        if not isinstance(node, ast.ClassDef):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                if default is not None:
                    self.visit(default)
        self._scope.pop()


_MAY_TELL = (ast.Name, ast.Attribute, ast.Constant, ast.Call, ast.Compare, ast.Dict)
_SAYS_NOTHING = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.alias)
_DECIDING = (
    *(ast.If, ast.IfExp, ast.While, ast.Assert, ast.comprehension, ast.BoolOp, ast.UnaryOp, ast.match_case, ast.Match),
    *(ast.Subscript, ast.Compare),
)


def _is_kind(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(_KINDS.fullmatch(node.value))


def _is_of_a_gpu(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(_OF_A_GPU.fullmatch(node.value))


def _is_truth(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _is_false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and not node.value


def _values(node: ast.AST) -> list[ast.AST]:
    return [*node.elts] if isinstance(node, ast.Tuple | ast.List | ast.Set) else []


def _owners(node: ast.AST) -> list[str]:
    """What the attribute is one of: of `tensor.device.index`, "device"."""
    return [_last_name(part.value) for part in ast.walk(node) if isinstance(part, ast.Attribute)]


def _conditions(node: ast.AST) -> Iterator[ast.AST]:
    """The expressions whose truth a node decides by."""
    tests = list[ast.AST]()
    if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
        tests = [node.test]
    elif isinstance(node, ast.comprehension):
        tests = [*node.ifs]
    elif isinstance(node, ast.BoolOp):
        tests = [*node.values]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        tests = [node.operand]
    elif isinstance(node, ast.match_case) and node.guard:
        tests = [node.guard]
    elif isinstance(node, ast.Match):
        tests = [node.subject]
    elif isinstance(node, ast.Subscript):
        tests = [node.slice]
    elif isinstance(node, ast.Compare):
        tests = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
    yield from tests


def main() -> None:
    """Print every branch with its test, its reason, or a question mark."""
    tests, reasons = covered(), only_on_a_gpu()
    for branch in branches():
        print(f"{branch.file}:{branch.first} {branch.function or 'top of the file'}: {branch.text}")
        print(f"    {tests.get(branch.key) or reasons.get(branch.key) or '?'}")
    known = {branch.key for branch in branches()}
    for key in sorted((tests.keys() | reasons.keys()) - known):
        print(f"{key}\n    is in the record and no longer in the source")
    print(f"{len(known & tests.keys())} of {len(known)} are taken by a test on a CPU")
    sys.exit(known != tests.keys() | reasons.keys())


if __name__ == "__main__":
    main()
