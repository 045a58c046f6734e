"""`report --watch RUN`: serves the page of a run on 127.0.0.1 and rebuilds it while the run goes on; writes nothing.

A page is drawn in another process, only while somebody looks at it, only if the run's files have changed, and with
pauses that leave the cores to the training. Pages in browsers ask for the newest version's number, and reload when it
changes. A site whose name resolves to this machine (DNS rebinding) asks under that name and is refused.
"""

from __future__ import annotations

import contextvars
import html
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lowrank_vit.common.aside import Aside
from lowrank_vit.common.errors import UserError, did_you_mean
from lowrank_vit.common.locks import is_locked
from lowrank_vit.common.terminal import printable, say
from lowrank_vit.report.language import Language, in_language, language, msg, tr

HOST, USUAL_PORT = "127.0.0.1", 8642
_NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
"""This server's names in a local browser; with a forwarded port (ssh -L) the number is another."""
_OWN_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
"""The page's own policy forbids all requests; that of `_HEADERS` allows those for the newest version's number."""
_LOOKED_AT_S = 20.0
"""After so long without a request nobody looks any more."""
_PAUSE_S, _PAUSES = 10.0, 4.0
"""The pause between two drawings: at least the first, and so many times the duration of the drawing before."""
_SETTLED_S = 0.5
_OF_NO_PAGE = {"report", "comparison", "wandb", "tensorboard", "mlflow"}
"""Folders of a run that its page does not show."""
_FILES = ("_spectral.json", "_drift.json", "compression.json")
"""Endings of the names of files that have a page."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "script-src 'unsafe-inline'; connect-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_SCRIPT = """<p id="watched" hidden style="position:fixed;bottom:0;left:0;right:0;margin:0;padding:.5rem 1rem;
background:#7a2e12;color:#fff;font:14px system-ui,sans-serif;z-index:9">%s</p>
<script>setInterval(async () => {
  if (document.hidden) return;
  const lost = document.getElementById("watched");
  try {
    const answer = await fetch("version", {cache: "no-store"});
    if (answer.ok && await answer.text() !== "%s") location.reload();
    lost.hidden = answer.ok;
  } catch { lost.hidden = false; }
}, 3000)</script>
<noscript><meta http-equiv="refresh" content="60"></noscript>
"""
_LOST = msg("report --watch has ended: this page is no longer updated.")


@dataclass(frozen=True)
class Page:
    """One page as it is sent."""

    version: str
    """Different for each page, also after a restart of the server."""
    content: bytes


class Watched:
    """The newest page of a run, kept up to date by a thread while it is asked for; see the module's docstring."""

    def __init__(self, path: Path, draw: Callable[[Path], str]) -> None:
        """`draw` makes the page's HTML of the run in `path`."""
        self._path, self._draw = path, draw
        self._begun, self._number = secrets.token_hex(4), 0
        self._page = self._waiting()
        self._known: object = None
        """The state of the run's files when the page was drawn, see `state_of`."""
        self._html = ""
        """The last page that was drawn of a run."""
        self._asked_at, self._is_over = -math.inf, False
        self._change = threading.Condition()
        keep = contextvars.copy_context().run  # the thread's notices are in the language of this one
        self._thread = threading.Thread(target=keep, args=(self._keep,), name="report --watch", daemon=True)

    def start(self) -> None:
        """Begin to keep the page up to date."""
        self._thread.start()

    def close(self) -> None:
        """Draw no more; one drawing may still be running."""
        with self._change:
            self._is_over = True
            self._change.notify_all()

    def newest(self) -> Page:
        """The newest page, at once; a request counts as somebody looking at it."""
        with self._change:
            self._asked_at = time.monotonic()
            self._change.notify_all()
            return self._page

    def _keep(self) -> None:
        while self._is_wanted():
            state, began = state_of(self._path), time.monotonic()
            if state == self._known:
                self._sleep(_SETTLED_S)
                continue
            self._known = state
            if not self._html:
                self._page = self._waiting()
            self._page = self._made(self._drawn())
            if self._path.exists():
                self._sleep(max(_PAUSE_S, _PAUSES * (time.monotonic() - began)))

    def _is_wanted(self) -> bool:
        """Wait until somebody looks; False once `close` was called."""
        with self._change:
            self._change.wait_for(lambda: self._is_over or time.monotonic() - self._asked_at < _LOOKED_AT_S)
            return not self._is_over

    def _sleep(self, seconds: float) -> None:
        with self._change:
            self._change.wait_for(lambda: self._is_over, seconds)

    def _drawn(self) -> str:
        """The current page: of the run, or the reason why there is none, above the last page if there was one."""
        at = time.strftime("%H:%M")
        if not self._path.exists():
            gone = msg("{path} no longer exists (as of {at}): this is its last page.")
            text = gone if self._html else msg("{path} does not exist yet: this page waits for it.")
            return _with_notice(self._html, tr(text, path=self._path, at=at))
        try:
            self._html = self._draw(self._path)
        except Exception as error:  # also of the other process; the run's files may be readable later
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            text = msg("At {at} no page could be made; new files are tried again. {why}")
            return _with_notice(self._html, tr(text, at=at, why=why))
        return self._html

    def _waiting(self) -> Page:
        return self._made(_with_notice("", tr("{path} is being read: the page will appear here.", path=self._path)))

    def _made(self, content: str) -> Page:
        self._number += 1
        version = f"{self._begun}-{self._number}"
        before, end, after = _OWN_POLICY.sub("", content).rpartition("</body>")
        content = f"{before}{_SCRIPT % (html.escape(tr(_LOST)), version)}{end}{after}"
        return Page(version, content.encode("utf-8", "backslashreplace"))


def _with_notice(page: str, text: str) -> str:
    """A page with a line on top; or a page of that line alone if `page` is empty."""
    look = "margin:0;padding:.7rem 1rem;background:#fff6e0;color:#22303c;font:16px system-ui,sans-serif"
    notice = f'<p role="status" style="{look}">{html.escape(printable(text))}</p>'
    if not page:
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>report</title>'
        page = f'<head>{head}</head><body style="margin:0">{notice}</body>'
        return f'<!doctype html>\n<html lang="{language()}">{page}</html>'
    at = page.index(">", page.index("<body")) + 1
    return page[:at] + notice + page[at:]


def state_of(path: Path) -> object:
    """A state that is equal while a run's page cannot have changed: names, sizes and times of its files, and its lock.

    Files that the page does not show are left out, such as earlier reports and unfinished files.
    """
    if path.is_file():
        return _stat(path)
    found: list[object] = [str(path.resolve()), path.exists(), is_locked(path)]
    with suppress(OSError):
        for entry in sorted(os.scandir(path), key=lambda one: one.name):
            if entry.name.startswith(".") or entry.name in _OF_NO_PAGE or entry.name.endswith(".html"):
                continue
            found.append((entry.name, _stat(entry)))
            if entry.is_dir():
                inner = sorted(os.scandir(entry), key=lambda one: one.name)
                found += [(one.name, _stat(one)) for one in inner if not one.name.startswith(".")]
    return found


def _stat(entry: os.DirEntry[str] | Path) -> tuple[int, int] | None:
    try:
        stat = entry.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of `/` and `/version`, to requests under this machine's own name."""

    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "lowrank-vit", ""
    timeout = 20.0
    """Seconds that a connection may keep its thread waiting."""

    def do_GET(self) -> None:
        if not _NAMES.fullmatch(self.headers.get("Host", "")) or len(self.headers.get_all("Host", [])) != 1:
            self._answer(HTTPStatus.FORBIDDEN, "Ask for 127.0.0.1 or localhost.\n")
        elif self.path == "/version":
            self._answer(HTTPStatus.OK, self.server.watched.newest().version)
        elif self.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, "There is only /.\n")
        else:
            self._answer(HTTPStatus.OK, self.server.watched.newest().content)

    do_HEAD = do_GET

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return lambda: self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "This server is read only: GET or HEAD.\n")
        raise AttributeError(name)

    def _answer(self, status: HTTPStatus, content: str | bytes) -> None:
        kind = "text/plain" if isinstance(content, str) else "text/html"
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        headers = _HEADERS | {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a line every three seconds would bury the terminal's other lines."""


class _Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address = True, True

    def __init__(self, port: int, watched: Watched) -> None:
        super().__init__((HOST, port), _Handler)
        self.watched = watched

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""


def open_server(port: int | None, watched: Watched) -> ThreadingHTTPServer:
    """A server on 127.0.0.1. Port None: the usual one, or another if that is taken; 0: any. Raises `UserError`."""
    if port is None:
        with suppress(OSError):
            return _Server(USUAL_PORT, watched)
    try:
        return _Server(port or 0, watched)
    except OSError as error:
        advice = "Give another --port, or leave it out for one that is free."
        raise UserError(f"port {port or 0} of {HOST}: {error.strerror or error}. {advice}") from error


def serve_page(path: Path, port: int | None, png: bool) -> None:
    """Serve the page until Ctrl-C. Raises `UserError` for a path that cannot become a run, and for a taken port."""
    if not path.exists() and not path.absolute().parent.is_dir():
        raise UserError(f"no run at {path}, nor a folder where one could begin. Give output/<experiment>.")
    if path.is_file() and not path.name.endswith(_FILES):
        raise UserError(f"{path} is a file, but not one of a run. Give the run's directory, output/<experiment>.")
    aside = Aside()
    speaks = language()  # another thread asks, for another process
    watched = Watched(path, lambda found: aside.call(page_of, found, png, speaks))
    server = open_server(port, watched)
    try:
        watched.start()
        say(f"{path} at http://{HOST}:{server.server_address[1]}/ until Ctrl-C")
        if not path.exists():
            near = did_you_mean(path.name, [one.name for one in path.absolute().parent.iterdir() if one.is_dir()])
            say(f"note: there is no {path} yet; the page shows it when it begins.{near}")
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        say("ended")
    finally:
        server.server_close()
        watched.close()  # the other process ends with this one


def page_of(path: Path, png: bool, language: Language = "en") -> str:
    """The HTML of a run, an analysis or a compression; called in another process. Raises `UserError`."""
    from lowrank_vit.report.page import draw_report

    if os.nice(0) < 5:
        os.nice(5)  # training goes first
    with in_language(language):
        return draw_report(path, png).html
