"""The files for hosts, citations and commits against what they repeat: versions, names, commands."""

from __future__ import annotations

import re
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import data_prep
import lowrank_vit
from lowrank_vit import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def content(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_commits_are_checked_with_the_ruff_that_lint_runs():
    revisions = {Path(one["repo"]).name: one["rev"] for one in content(".pre-commit-config.yaml")["repos"]}
    (pinned,) = re.findall(r"(?m)^ruff==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert revisions["ruff-pre-commit"] == f"v{pinned}"


def test_pinned_packages_take_the_first_release_of_each_python():
    """Distributions keep old ones: Debian 12 has 3.11.2."""
    pinned = re.findall(r"(?m)^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    installed = {canonicalize_name(one.name): one.metadata for one in metadata.distributions()}
    found = {name: installed[canonicalize_name(name)] for name in pinned if canonicalize_name(name) in installed}
    assert len(found) > 50
    listed = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
    for name, told in found.items():
        wanted = SpecifierSet(",".join(told.get_all("Requires-Python", [])))
        assert [version for version in listed if f"{version}.0" not in wanted] == [], name


def test_hosted_ci_runs_the_local_one_on_each_python():
    (job,) = content(".github/workflows/ci.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert [command.split()[-1] for command in commands] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    listed = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name]
    assert job["strategy"]["matrix"]["python"] == listed


class AnyTag(yaml.SafeLoader):
    """Reads what a tag of Python's makes as nothing."""


AnyTag.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def pages(nav: str | list | dict) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def test_each_document_is_in_the_sites_navigation():
    found = pages(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), AnyTag)["nav"])
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    assert sorted(found) == sorted(path.relative_to(ROOT).as_posix() for path in documents)


def test_the_api_page_names_what_is_public():
    named = re.findall(r"(?m)^::: (.+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    public = {f"{module.__name__}.{name}" for module in (lowrank_vit, data_prep) for name in module.__all__}
    assert sorted(named) == sorted(public - {"lowrank_vit.__version__"})


def test_the_citation_is_of_this_version():
    citation = content("CITATION.cff")
    assert citation["version"] == __version__
    told = [citation["title"], citation["abstract"], citation["license"], citation["keywords"]]
    assert told == [PROJECT["name"], PROJECT["description"], PROJECT["license"], PROJECT["keywords"]]


def test_a_bug_is_asked_for_its_command_log_and_environment():
    bug, question = (content(f".github/ISSUE_TEMPLATE/{name}.yml")["body"] for name in ("bug", "question"))
    required = [field["attributes"]["label"] for field in bug if field.get("validations", {}).get("required")]
    assert {"Command", "Log", "environment.json"} < set(required)
    assert "environment.json" in [field["attributes"]["label"] for field in question]


@pytest.mark.parametrize(
    "text",
    [
        "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider setting "
        "`torch.set_float32_matmul_precision('high')` for better performance.",
        "TypedStorage is deprecated. It will be removed in the future and UntypedStorage will be the only storage "
        "class. This should only matter to you if you are using storages directly.",
        "The CUDA Graph is empty. This usually means that the graph was attempted to be captured on wrong device or "
        "stream. (Triggered internally at /pytorch/aten/src/ATen/cuda/CUDAGraph.cpp:200.)",
        "Memory Efficient attention defaults to a non-deterministic algorithm. To explicitly enable determinism call "
        "torch.use_deterministic_algorithms(True, warn_only=False).",
    ],
)
def test_torchs_own_warnings_on_a_gpu_fail_no_test_and_others_do(text):
    warnings.warn(text, stacklevel=1)
    with pytest.raises(UserWarning, match="Another"):
        warnings.warn(f"Another: {text}", stacklevel=1)
