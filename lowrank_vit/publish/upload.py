"""Send an export to the Hugging Face hub as one commit, which exists whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.hub import quick_without_network, status_of
from lowrank_vit.common.locks import Say
from lowrank_vit.model.fit import in_one_line
from lowrank_vit.model.hub import hub_error
from lowrank_vit.publish.folder import CARD
from lowrank_vit.publish.options import ExportOptions


@dataclass(frozen=True)
class Repository:
    """A repository of the hub that may be written to, as far as can be known before."""

    name: str
    """OWNER/NAME."""
    files: tuple[str, ...] | None
    """Names of its files; None if it does not exist yet."""


def find_repository(options: ExportOptions) -> Repository:
    """Ask the hub for the user and the repository. Raises `UserError`: no token, no network, no such name."""
    with _told(options.hub, options.hub) as api:
        owner, _, name = options.hub.rpartition("/")
        repository = f"{owner or api.whoami()['name']}/{name}"
        if owner:
            api.whoami()  # reports an invalid token before anything is made
        is_there = api.repo_exists(repository)
        files = api.list_repo_files(repository, revision=options.revision or None) if is_there else None
    return Repository(repository, None if files is None else tuple(files))


def upload(options: ExportOptions, repository: Repository, make: Callable[[Path], None], say: Say) -> str:
    """Let `make` fill a folder, and commit that; returns the commit's address. Raises `UserError`.

    An existing card stays, unless --overwrite is given: its owner may have filled it in.
    """
    name, is_new = repository.name, repository.files is None
    keeps_card = CARD in (repository.files or ()) and not options.overwrite
    if not is_new:
        say(f"note: {name} exists: a commit replaces its model" + (f"; its {CARD} stays" if keeps_card else ""))
        if options.private:
            say("note: --private has no effect: who may see a repository is settled when it is created")
    with tempfile.TemporaryDirectory(prefix="lowrank-vit-export-") as folder:
        make(Path(folder))
        with _told(options.hub, name) as api:
            if is_new:
                api.create_repo(name, private=options.private, exist_ok=True)
            try:
                if is_new and options.revision:
                    api.create_branch(name, branch=options.revision, exist_ok=True)
                done = api.upload_folder(
                    repo_id=name,
                    folder_path=folder,
                    commit_message=options.commit_message,
                    revision=options.revision or None,
                    ignore_patterns=[CARD] if keeps_card else None,
                )
            except Exception as error:
                if is_new:
                    error.add_note(f"The repository {name} was created, and is empty.")
                raise
    return str(getattr(done, "commit_url", "") or f"https://huggingface.co/{name}")


@contextmanager
def _told(typed: str, repository: str) -> Generator[Any]:
    """Yield the hub's interface; its errors become sentences. Raises `UserError`."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import validate_repo_id

    said = f"--hub {typed}"
    way = "export to a folder with --local-dir DIR, and send that later with `hf upload NAME DIR`"
    try:
        validate_repo_id(repository)
        if not get_token():
            raise UserError(
                f"{said}: you have no token of the hub. Log in with `hf auth login`, or set HF_TOKEN to one that may "
                "write."
            )
        with quick_without_network() as unreached:
            if unreached:
                raise unreached
            if constants.HF_HUB_OFFLINE:
                raise UserError(f"{said}: HF_HUB_OFFLINE forbids asking the hub. Unset it, or {way}.")
            yield HfApi(library_name="lowrank-vit")
    except UserError:
        raise
    except Exception as error:  # of the library and its HTTP client, without a common kind
        status = status_of(error)
        if status == 401:
            message = UserError(f"{said}: the hub rejects your token. Log in with `hf auth login`.")
        elif status == 403:
            message = UserError(
                f"{said}: your token may not write to {repository}. Make one with the right to write at "
                "https://huggingface.co/settings/tokens, and log in with `hf auth login`; or give a name of your own."
            )
        elif status in (0, 200, 404, 429) or status >= 500:
            message = hub_error(error, repository, said, way)
        else:
            message = UserError(f"{said}: the hub refused it ({status}): {in_one_line(error)}")
        for note in getattr(error, "__notes__", []):
            message.add_note(note)
        raise message from error
