"""Exports to the hub, whose interface is a stand-in here: one commit, and a line for whatever it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from lowrank_vit import export
from lowrank_vit.common.errors import UserError
from tests.unit.model.test_hub import answer


class Hub:
    """Repositories by name, each its files; what it was asked for. `fails`: the errors of some methods."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.fails: dict[str, Exception] = {}

    def __call__(self, **_: Any) -> Hub:
        return self

    def _note(self, method: str, **told: Any) -> None:
        self.asked.append((method, told))
        if error := self.fails.get(method):
            raise error

    def whoami(self) -> dict[str, str]:
        self._note("whoami")
        return {"name": "ann"}

    def repo_exists(self, name: str) -> bool:
        return name in self.repositories

    def list_repo_files(self, name: str, revision: str | None) -> list[str]:
        self._note("list_repo_files", revision=revision)
        return list(self.repositories[name])

    def create_repo(self, name: str, **told: Any) -> None:
        self._note("create_repo", **told)
        self.repositories[name] = {".gitattributes": b""}

    def create_branch(self, name: str, **told: Any) -> None:
        self._note("create_branch", **told)

    def upload_folder(self, repo_id: str, folder_path: str, ignore_patterns: list[str] | None, **told: Any) -> Any:
        self._note("upload_folder", **told)
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.repositories[repo_id] |= {k: v for k, v in files.items() if k not in (ignore_patterns or ())}
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch) -> Hub:
    found = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", found)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("lowrank_vit.common.hub.why_out_of_reach", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return found


def test_a_new_repository_is_made_with_one_commit(hub, run, capsys):
    export.main([str(run), "--hub", "vit", "--private", "--commit-message", "First"])
    assert set(hub.repositories["ann/vit"]) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    told = dict(hub.asked)
    assert told["create_repo"]["private"] is True
    assert told["upload_folder"] == {"commit_message": "First", "revision": None}
    card = hub.repositories["ann/vit"]["README.md"].decode()
    assert "# ann/vit" in card
    assert "timm.create_model('hf-hub:ann/vit', pretrained=True)" in card
    assert "https://huggingface.co/ann/vit/commit/1" in capsys.readouterr().out


def test_a_repository_that_is_there_keeps_its_card(hub, run, capsys):
    hub.repositories["ann/vit"] = {"README.md": b"mine", "config.json": b"old", "notes.txt": b"mine"}
    export.main([str(run), "--hub", "ann/vit"])
    found = hub.repositories["ann/vit"]
    assert (found["README.md"], found["notes.txt"]) == (b"mine", b"mine")
    assert found["config.json"] != b"old"
    assert "its README.md stays" in capsys.readouterr().out
    export.main([str(run), "--hub", "ann/vit", "--overwrite", "--private"])
    assert b"## Scores" in hub.repositories["ann/vit"]["README.md"]
    assert "create_repo" not in dict(hub.asked)
    assert "--private has no effect" in capsys.readouterr().out


def test_a_branch_is_made_in_a_new_repository(hub, run):
    export.main([str(run), "--hub", "ann/vit", "--revision", "dev"])
    assert dict(hub.asked)["create_branch"]["branch"] == "dev"
    assert dict(hub.asked)["upload_folder"]["revision"] == "dev"


@pytest.mark.parametrize(
    ("method", "error", "said"),
    [
        ("whoami", answer("HfHubHTTPError", 401), "rejects your token"),
        (
            "create_repo",
            answer("HfHubHTTPError", 403),
            r"may not write to me/vit.*https://huggingface.co/settings/tokens",
        ),
        ("create_repo", answer("RepositoryNotFoundError", 404), "me/vit is not on the hub"),
        ("upload_folder", answer("HfHubHTTPError", 500), r"an error of its own \(500\).*--local-dir"),
        ("upload_folder", answer("HfHubHTTPError", 413), r"refused it \(413\)"),
        ("upload_folder", ConnectionError("reset"), r"cannot be reached.*--local-dir DIR.*hf upload"),
    ],
)
def test_what_the_hub_refuses_becomes_a_line(hub, run, method, error, said):
    hub.fails[method] = error
    with pytest.raises(UserError, match=said) as caught:
        export.main([str(run), "--hub", "me/vit"])
    assert str(caught.value).startswith("--hub me/vit")
    assert "\n" not in str(caught.value)
    made = "me/vit" in hub.repositories
    assert made == (method == "upload_folder")
    assert getattr(caught.value, "__notes__", []) == ["The repository me/vit was created, and is empty."] * made


def test_what_is_wrong_is_told_before_weights_are_read(hub, monkeypatch, tmp_path):
    (tmp_path / "last.pth.tar").write_text("no checkpoint")
    for name, said in (
        ("a/b/c", "is not a name of the hub"),
        ("a b", "is not a name of the hub"),
        ("x-/y", "is not a name"),
    ):
        with pytest.raises(UserError, match=said):
            export.main([str(tmp_path), "--hub", name])
    hub.repositories["me/vit"] = {}
    hub.fails["list_repo_files"] = answer("RevisionNotFoundError", 404)
    with pytest.raises(UserError, match="me/vit is on the hub, but not in that revision"):
        export.main([str(tmp_path), "--hub", "me/vit", "--revision", "dev"])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match=r"you have no token of the hub. Log in with `hf auth login`"):
        export.main([str(tmp_path), "--hub", "me/vit"])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE forbids asking the hub\. Unset it, or export to a folder"):
        export.main([str(tmp_path), "--hub", "me/vit"])
