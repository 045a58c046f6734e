"""Chromium without a window, for tests of the report's page: driven through two pipes, so that nothing is installed."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LIMIT_S = 60.0
"""Of anything that is waited for, on a busy machine."""
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars --mute-audio "
    "--remote-debugging-pipe"
).split()


def program() -> str:
    """The browser's path. Without one the test is skipped, or fails where `LRV_REQUIRE_BROWSER=1` (as in CI)."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    if os.environ.get("LRV_REQUIRE_BROWSER") == "1":
        pytest.fail("no Chromium, which LRV_REQUIRE_BROWSER=1 asks for: apt-get install chromium")
    pytest.skip("no Chromium on the PATH: the page is not opened (apt-get install chromium)")


class Tab:
    """One page of a running browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = to_browser, from_browser
        self._buffer, self._count, self._session = b"", 0, ""
        self.errors: list[str] = []
        """What the page has written to its console as an error, or thrown."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of Chrome's protocol, and wait for its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + LIMIT_S
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            read = os.read(self._in, 1 << 20)
            if not read:
                raise EOFError("the browser has ended")
            self._buffer += read
        first, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(first)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                self.errors.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(json.dumps(params["entry"]))
            case _:
                pass

    def open(
        self, page: Path, *, width: int = 1400, height: int = 1000, scheme: str = "light", scripts: bool = True
    ) -> None:
        """Load a file, in a window of this size and this colour scheme, until it is drawn."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.errors.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        if scripts:
            self.wait("document.readyState === 'complete' && document.documentElement.dataset.state !== undefined")

    def js(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true, in this page or in one that takes its place meanwhile."""

        def is_true() -> bool:
            try:
                return self.js(f"Boolean({expression})")
            except RuntimeError as error:
                if "navigated" not in str(error):
                    raise
                return False

        until = time.monotonic() + LIMIT_S
        while not is_true():
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.02)

    def place(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, scrolled into view."""
        self.wait(f"document.querySelector({json.dumps(selector)})")
        return tuple(
            self.js(
                f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
                "e.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});"
                "const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()"
            )
        )

    def mouse(self, kind: str, x: float, y: float, buttons: int = 0, clicks: int = 1) -> None:
        button = "left" if buttons or kind == "mouseReleased" else "none"
        self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=clicks
        )  # fmt: skip

    def click(self, selector: str) -> None:
        """A press of the mouse in the middle of an element."""
        left, top, width, height = self.place(selector)
        x, y = left + width / 2, top + height / 2
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, 1)
        self.mouse("mouseReleased", x, y)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a <select>, as a reader does, and tell the page of it."""
        chosen = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            "e.dispatchEvent(new Event('change', {bubbles: true})); return e.value; })()"
        )
        assert chosen == value, f"{selector} has no option {value}"

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """What the page looks like, as a PNG."""
        clip = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def opened(profile: Path) -> Generator[Tab]:
    """A browser with one tab; it ends with the context."""
    (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
    high_in, high_out = (fcntl.fcntl(one, fcntl.F_DUPFD, 50) for one in (theirs_in, theirs_out))
    process = subprocess.Popen(
        [program(), *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(3, 4),
        preexec_fn=_as_3_and_4(high_in, high_out),
    )
    for one in (theirs_in, theirs_out, high_in, high_out):
        os.close(one)
    try:
        tab = Tab(ours_out, ours_in)
        yield tab
        with contextlib.suppress(OSError, EOFError, RuntimeError):
            tab._session = ""
            tab.call("Browser.close")
    finally:
        process.kill()
        process.wait()
        for one in (ours_in, ours_out):
            os.close(one)


def _as_3_and_4(source: int, sink: int) -> Callable[[], None]:
    """The numbers at which Chromium reads and writes; no other thread allocates between the fork and them."""

    def move() -> None:
        os.dup2(source, 3)
        os.dup2(sink, 4)

    return move
