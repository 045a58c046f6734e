"""`report --watch RUN`: the page of a run on 127.0.0.1, made anew while the run goes on; nothing is written.

A page is drawn in a process aside, only while somebody looks at it, only where the run's files have changed, and with
pauses that leave the cores to the training. The pages that browsers show ask for the number of the newest one, and load
themselves anew when there is another. A page of another site that has its name resolve to this machine (DNS rebinding)
asks under that name, and gets nothing.
"""

from __future__ import annotations

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
from lowrank_vit.report.language import Language, in_language, language

HOST, USUAL_PORT = "127.0.0.1", 8642
_NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
"""What a browser here calls this server; of a forwarded port (ssh -L) the number is another."""
_OWN_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
"""Of a page that may fetch nothing; the one of `_HEADERS` lets it ask for the newest one's number alone."""
_LOOKED_AT_S = 20.0
"""After so long without a question nobody looks any more."""
_PAUSE_S, _PAUSES = 10.0, 4.0
"""Between two drawings: at least this, and so many times as long as the one before has taken."""
_SETTLED_S = 0.5
_OF_NO_PAGE = {"report", "comparison", "wandb", "tensorboard", "mlflow"}
"""Folders of a run that its page does not show."""
_FILES = ("_spectral.json", "_drift.json", "compression.json")
"""How names of files end that have a page."""
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
_LOST = "report --watch has ended: this page stands still."


@dataclass(frozen=True)
class Page:
    """One page as it is sent."""

    version: str
    """Another one for each page, also of a server that is started again."""
    content: bytes


class Watched:
    """The newest page of a run, which a thread of its own keeps so while it is asked for; see the module's head."""

    def __init__(self, path: Path, draw: Callable[[Path], str]) -> None:
        """`draw` makes the page's HTML of the run in `path`."""
        self._path, self._draw = path, draw
        self._begun, self._number = secrets.token_hex(4), 0
        self._page = self._waiting()
        self._known: object = None
        """What the run's files were like when the page was drawn."""
        self._html = ""
        """The last page that was drawn of a run."""
        self._asked_at, self._is_over = -math.inf, False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._keep, name="report --watch", daemon=True)

    def start(self) -> None:
        """Begin to keep the page."""
        self._thread.start()

    def close(self) -> None:
        """Draw no more; one page may still be on its way."""
        with self._change:
            self._is_over = True
            self._change.notify_all()

    def newest(self) -> Page:
        """The newest page, at once; whoever asks is taken to look at it."""
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
        """Wait until somebody looks; whether anybody ever will."""
        with self._change:
            self._change.wait_for(lambda: self._is_over or time.monotonic() - self._asked_at < _LOOKED_AT_S)
            return not self._is_over

    def _sleep(self, seconds: float) -> None:
        with self._change:
            self._change.wait_for(lambda: self._is_over, seconds)

    def _drawn(self) -> str:
        """The page now: of the run, or why there is none, above the last one that there was."""
        at = time.strftime("%H:%M")
        if not self._path.exists():
            gone = f"{self._path} is not there any more, seen at {at}: this is its last page."
            return _with_notice(self._html, gone if self._html else f"There is no {self._path} yet; it is waited for.")
        try:
            self._html = self._draw(self._path)
        except Exception as error:  # also of the process aside; what is wrong with a run's files may be mended
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return _with_notice(self._html, f"At {at} no page could be made; it is tried again with new files. {why}")
        return self._html

    def _waiting(self) -> Page:
        return self._made(_with_notice("", f"{self._path} is being read: the page comes by itself."))

    def _made(self, content: str) -> Page:
        self._number += 1
        version = f"{self._begun}-{self._number}"
        before, end, after = _OWN_POLICY.sub("", content).rpartition("</body>")
        content = f"{before}{_SCRIPT % (_LOST, version)}{end}{after}"
        return Page(version, content.encode("utf-8", "backslashreplace"))


def _with_notice(page: str, text: str) -> str:
    """A page with a line on top; a page of that line alone where there was none."""
    look = "margin:0;padding:.7rem 1rem;background:#fff6e0;color:#22303c;font:16px system-ui,sans-serif"
    notice = f'<p role="status" style="{look}">{html.escape(printable(text))}</p>'
    if not page:
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>report</title>'
        return f'<!doctype html>\n<html lang="en"><head>{head}</head><body style="margin:0">{notice}</body></html>'
    at = page.index(">", page.index("<body")) + 1
    return page[:at] + notice + page[at:]


def state_of(path: Path) -> object:
    """What tells whether a run's page may have changed: names, sizes and times of files, and whether it goes on.

    What the page does not show does not count, among it earlier reports and what is being written.
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
    """Answers GET and HEAD of `/` and `/version`, to who asks under this machine's own name."""

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
        """Nothing: a line every three seconds would hide what the terminal is for."""


class _Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address = True, True

    def __init__(self, port: int, watched: Watched) -> None:
        super().__init__((HOST, port), _Handler)
        self.watched = watched

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""


def open_server(port: int | None, watched: Watched) -> ThreadingHTTPServer:
    """A server on 127.0.0.1. Port None: the usual one, another where that is taken; 0: any. Raises `UserError`."""
    if port is None:
        with suppress(OSError):
            return _Server(USUAL_PORT, watched)
    try:
        return _Server(port or 0, watched)
    except OSError as error:
        advice = "Give another --port, or leave it out for one that is free."
        raise UserError(f"port {port or 0} of {HOST}: {error.strerror or error}. {advice}") from error


def serve_page(path: Path, port: int | None, png: bool) -> None:
    """Serve the page until Ctrl-C. Raises `UserError` for a folder that cannot hold a run, and for a taken port."""
    if not path.exists() and not path.absolute().parent.is_dir():
        raise UserError(f"no run at {path}, nor a folder where one could begin. Give output/<experiment>.")
    if path.is_file() and not path.name.endswith(_FILES):
        raise UserError(f"{path} is a file of no run, which will not become one. Give output/<experiment>.")
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
        watched.close()  # the process aside ends with this one


def page_of(path: Path, png: bool, language: Language = "en") -> str:
    """The HTML of a run, an analysis or a compression; called in a process of its own. Raises `UserError`."""
    from lowrank_vit.report.page import draw_report

    if os.nice(0) < 5:
        os.nice(5)  # training goes first
    with in_language(language):
        return draw_report(path, png).html
