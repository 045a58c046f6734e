"""The Hugging Face hub: why something of it cannot be had, in one line that says what to do."""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import urlparse

from lowrank_vit.common.errors import in_short

_OFFLINE_VARIABLES = "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"
CONNECT_S = 5.0
_OFFLINE = {"ConnectionError", "ConnectError", "TimeoutException", "TimeoutError", "LocalEntryNotFoundError"}


def hub_message(name: str, error: BaseException, kind: Literal["dataset", "model"], instead: str) -> str:
    """The line, by what `huggingface_hub`, or a library above it, raised.

    Told apart are: no network, HF_HUB_OFFLINE, a gated name, a name that is not there or not without a token, a token
    that is not enough, a revision that is not there. Of anything else the first sentence is quoted.

    Args:
        name: OWNER/NAME.
        error: the exception; its causes count too, since libraries wrap one another's.
        kind: what it should be.
        instead: what to do without the hub, as the end of a sentence.
    """
    chain = [error, *_causes(error)]
    kinds = {base.__name__ for one in chain for base in type(one).__mro__}
    text = " ".join(map(str, chain))
    status = next((code for one in chain if (code := getattr(getattr(one, "response", None), "status_code", None))), 0)
    page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{name}"
    is_forbidden = "OfflineModeIsEnabled" in kinds or "OfflineModeIsEnabled" in text
    if is_forbidden and _asked_to_be_offline():
        return f"{name} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub: unset it, or {instead}."
    if "GatedRepoError" in kinds or f"gated {kind}" in text:
        return (
            f"{name} is gated: ask for access on {page}, then `hf auth login` (or set HF_TOKEN) with a token of that "
            "account."
        )
    if "RevisionNotFoundError" in kinds:
        return f"{name} is on the hub, but not in that revision: see {page}."
    if status == 403:
        return f"{name}: the hub refuses your token. Make one that may read it, then `hf auth login`, or set HF_TOKEN."
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "LocalTokenNotFoundError"} or status in (401, 404):
        if _has_token():
            return f"{name} is not on the hub, or your token may not read it. Check the name (OWNER/NAME)."
        return (
            f"{name} is not on the hub, or is private and no token is there. Check the name (OWNER/NAME, or a folder "
            "that exists); for a private one `hf auth login`, or set HF_TOKEN."
        )
    if is_forbidden or kinds & _OFFLINE:
        return f"{name}: the Hugging Face hub cannot be reached. Check the network, or {instead}."
    return f"{name} cannot be loaded: {in_short(error)}."


def _asked_to_be_offline() -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE_VARIABLES)


@contextmanager
def quick_without_network(*others: Any) -> Generator[None]:
    """Let libraries look in their caches alone where the hub cannot be reached: they try again for half a minute.

    `others`: modules besides `huggingface_hub.constants` with a HF_HUB_OFFLINE of their own.
    """
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (constants, *others)
    before = [module.HF_HUB_OFFLINE for module in modules]
    url = urlparse(constants.ENDPOINT)
    if not any(before) and not urllib.request.getproxies():  # a proxy finds the way where this machine cannot
        address = url.hostname or "huggingface.co", url.port or (80 if url.scheme == "http" else 443)
        try:
            socket.create_connection(address, timeout=CONNECT_S).close()
        except OSError:
            for module in modules:
                module.HF_HUB_OFFLINE = True  # what the environment variable would set
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _has_token() -> bool:
    try:
        from huggingface_hub import get_token
    except ImportError:
        return False
    return bool(get_token())


def _causes(error: BaseException) -> Iterator[BaseException]:
    for _ in range(10):
        cause = error.__cause__ or error.__context__
        if cause is None:
            return
        yield cause
        error = cause
