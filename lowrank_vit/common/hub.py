"""The Hugging Face hub: its errors as one line that says what to do."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lowrank_vit.common.errors import in_short
from lowrank_vit.common.terminal import say_beside

_OFFLINE_VARIABLES = "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"
_OFFLINE = {
    *("ConnectionError", "NetworkError", "ProxyError", "TimeoutException", "TimeoutError", "LocalEntryNotFoundError"),
}
_NO_HUB = {
    "FileMetadataError",
    "ProtocolError",
    "DecodingError",
    "TooManyRedirects",
    "UnsupportedProtocol",
    "InvalidURL",
}
"""Errors that are raised if something other than the hub answers."""


def hub_message(name: str, error: BaseException, kind: Literal["dataset", "model"], instead: str) -> str:
    """One line about an error that `huggingface_hub`, or a library above it, raised.

    It distinguishes: no network, HF_HUB_OFFLINE, a gated name, a malformed name, a name that does not exist or needs a
    token, an insufficient token, an unknown revision, too many requests, an error of the hub's own, and something other
    than the hub that answers. For anything else it quotes the first sentence.

    Args:
        name: OWNER/NAME.
        error: the exception; its causes count too, since libraries wrap one another's.
        kind: what the name should be.
        instead: what to do without the hub, as the end of a sentence.
    """
    chain = [error, *_causes(error)]
    kinds = {base.__name__ for one in chain for base in type(one).__mro__}
    text = " ".join(map(str, chain))
    status = status_of(error)
    page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{name}"
    is_forbidden = "OfflineModeIsEnabled" in kinds or "OfflineModeIsEnabled" in text
    if is_forbidden and _asked_to_be_offline():
        return f"{name} is not on this machine, and HF_HUB_OFFLINE forbids asking the hub: unset it, or {instead}."
    if "HFValidationError" in kinds:
        return f"`{name}` is not a name of the hub, which is OWNER/NAME. Check its spelling."
    if "GatedRepoError" in kinds or f"gated {kind}" in text:
        return (
            f"{name} is gated: ask for access on {page}, then `hf auth login` (or set HF_TOKEN) with a token of that "
            "account."
        )
    if "RevisionNotFoundError" in kinds:
        return f"{name} is on the hub, but not in that revision: see {page}."
    if status == 429:
        login = "" if _has_token() else ", log in with `hf auth login`, which allows more"
        return f"{name}: the hub was asked too often from here (429). Wait some minutes{login}, or {instead}."
    if status >= 500:
        return f"{name}: the hub answers with an error of its own ({status}). Try again later, or {instead}."
    if status == 403 and _has_token():
        return f"{name}: the hub refuses your token. Make one that may read it, then `hf auth login`, or set HF_TOKEN."
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "LocalTokenNotFoundError"} or status in (
        401,
        403,
        404,
    ):
        if _has_token():
            return f"{name} is not on the hub, or your token may not read it. Check the name (OWNER/NAME)."
        return (
            f"{name} is not on the hub, or is private and you have no token. Check the name (OWNER/NAME, or a folder "
            "that exists); for a private one `hf auth login`, or set HF_TOKEN."
        )
    if kinds & _NO_HUB or (kind == "model" and "JSONDecodeError" in kinds):
        return (
            f"{name}: what answers is not the Hugging Face hub, but perhaps a login page of this network, or a wrong "
            f"HF_ENDPOINT. Check these, or {instead}."
        )
    if is_forbidden or kinds & _OFFLINE:
        return f"{name}: the Hugging Face hub cannot be reached. Check the network, or {instead}."
    return f"{name} cannot be loaded: {in_short(error)}."


def _asked_to_be_offline() -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE_VARIABLES)


def status_of(error: BaseException) -> int:
    """The HTTP status of the hub's answer in an error or its causes; 0 if there is none."""
    chain = [error, *_causes(error)]
    return next((code for one in chain if (code := getattr(getattr(one, "response", None), "status_code", None))), 0)


def hub_errors() -> tuple[type[Exception], ...]:
    """The errors of asking the hub: `OSError`, and its HTTP client's, which differ between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception))


@contextmanager
def quick_without_network(*others: Any) -> Generator[Exception | None]:
    """If the hub does not answer, let libraries look only in their caches, since they would retry for minutes.

    Yields the reason; None if the hub answers, or if HF_HUB_OFFLINE was set before. An error that leaves the block has
    the reason among its causes. Retries inside the block are reported in one line.

    `others`: modules besides `huggingface_hub.constants` with a HF_HUB_OFFLINE of their own.
    """
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (constants, *others)
    before = [module.HF_HUB_OFFLINE for module in modules]
    why = None if any(before) else why_out_of_reach()
    if why:
        for module in modules:
            module.HF_HUB_OFFLINE = True  # what the environment variable would set
    logger, tries = logging.getLogger("huggingface_hub.utils._http"), _Tries()
    logger.addFilter(tries)
    try:
        yield why
    except Exception as error:
        last = [error, *_causes(error)][-1]
        if why and last is not why:
            last.__cause__ = why
        raise
    finally:
        logger.removeFilter(tries)
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def why_out_of_reach() -> Exception | None:
    """Ask the hub for its first page, once: return the error, or None if it answers, even if it wants a token.

    The time limit is HF_HUB_ETAG_TIMEOUT seconds.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        answer: Any = get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if answer.status_code == 429 or answer.status_code >= 500:
            answer.raise_for_status()
    except Exception as error:  # its HTTP client differs between versions of the library
        return error
    return None


class _Tries(logging.Filter):
    """Hides the library's lines about retries: the first becomes one line of ours."""

    _why, _is_said = "no answer", False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a line: it is not about a retry."""
        why, is_try, _ = record.getMessage().partition(" thrown while requesting ")
        if is_try:
            self._why = why
        elif "[Retry " not in why:
            return True
        elif not self._is_said:
            self._is_said = True
            say_beside(f"note: the Hugging Face hub: {self._why}; asking again, for some minutes at most")
        return False


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
