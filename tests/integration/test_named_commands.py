"""Commands that are named in passing mean something: within prose, above configurations and in the Dockerfile.

They are parts of command lines, so they are not run: the command, its flags and make's targets must exist.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from lowrank_vit.common.program import COMMANDS
from lowrank_vit.config.completion import Words, all_words
from tests.documents import ROOT, calls_of, header_commands, spans, write_recorders
from tests.integration.test_documents import DOCUMENTS, Reader

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"(?m)^\.PHONY: (.+)$", MAKEFILE)[0].split())
VARIABLES = set(re.findall(r"\$\((?:or \$\(|if \$\()?([A-Z]+)\)", MAKEFILE)) | {"CFG", "PYTHON"}
MODULES = {module.removesuffix(".__main__"): name for name, (module, _) in COMMANDS.items()}


@pytest.fixture(scope="module")
def words() -> Words:
    return all_words()


def check(span: str, words: Words) -> bool:
    """Whether `span` is a command of ours; an error if it is and cannot be meant."""
    tokens = shlex.split(span.removeprefix(".venv/bin/").replace("{", "'{").replace("}", "}'"))
    if tokens[:2] == ["python", "-m"] and len(tokens) > 2:
        if tokens[2] not in MODULES:
            assert importlib.util.find_spec(tokens[2]), f"{span}: there is no such module"
            return True
        _check_flags(MODULES[tokens[2]], tokens[3:], words, span)
    elif tokens[0] == "lowrank-vit" and len(tokens) > 1:
        _check_flags(tokens[1], tokens[2:], words, span)
    elif tokens[0] == "make" and len(tokens) > 1:
        for token in tokens[1:]:
            name, is_set, _ = token.partition("=")
            assert name in (VARIABLES if is_set else TARGETS), f"{span}: make knows no {name}"
    else:
        return False
    return True


def _check_flags(command: str, rest: list[str], words: Words, span: str) -> None:
    if command == "--version":
        return
    assert command in COMMANDS, f"{span}: there is no command {command}"
    inner = [name.partition(" ")[2] for name in words if name.startswith(command + " ")]
    named = rest[:1] if inner and rest and not rest[0].startswith("-") else []
    for name in named[0].strip("{}").split(",") if named else []:
        assert name in inner, f"{span}: {command} has no {name}"
    flags = {flag for name, found in words.items() if name.split()[0] == command for flag in found} | {"--help"}
    for token in rest:
        flag = token.strip("[]").partition("=")[0]
        assert not flag.startswith("--") or flag in flags, f"{span}: {command} has no {flag}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_prose(document, words):
    for span in spans(document):
        for one in span.split(" && "):
            if re.match(r"(\.venv/bin/)?(python -m|make|lowrank-vit) ", one):
                assert check(one, words)


@pytest.mark.parametrize(
    "span", ["make nothing", "python -m lowrank_vit.nothing", "lowrank-vit trian", "make bench X=1"]
)
def test_a_command_that_means_nothing_is_an_error(span, words):
    with pytest.raises(AssertionError):
        check(span, words)


def test_a_flag_that_is_not_there_is_an_error(words):
    with pytest.raises(AssertionError, match="validate has no --spec-monitor"):
        check("python -m lowrank_vit.validate --spec-monitor", words)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_a_configuration_says_how_it_is_run(path: Path, tmp_path: Path, words):
    write_recorders(tmp_path)
    (name, arguments, _), *others = calls_of(header_commands(path), tmp_path)
    assert (name, others) == ("make", [])
    chosen = [one.partition("=")[2] for one in arguments if one.startswith("CFG=")]
    assert check(shlex.join([name, *arguments]), words)
    default = re.findall(r"(?m)^CFG +\?= (.+)$", MAKEFILE)
    assert (ROOT / (chosen or default)[0]).samefile(path)


def test_the_dockerfiles_commands(tmp_path: Path, words, monkeypatch):
    write_recorders(tmp_path)
    path = ROOT / "Dockerfile"
    calls = calls_of(header_commands(path), tmp_path)
    assert [arguments[0] for _, arguments, _ in calls] == ["build", "run"]
    for call in calls:
        Reader(tmp_path, monkeypatch).call(*call)
    text = path.read_text(encoding="utf-8")
    (command,) = re.findall(r"(?m)^CMD (.+)$", text)
    inside = [shlex.join(json.loads(command)), *re.findall(r"(?m)^RUN (make .+)$", text)]
    assert all(check(one, words) for one in inside)
    for names in re.findall(r"(?m)^COPY (.+) \S+$", text):
        assert all((ROOT / name).exists() for name in names.split())
