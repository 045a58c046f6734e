"""A command and its terminal: text that is safe to print, output that outlives its reader, and Ctrl-C.

A name from a file may hold any bytes: it may move the cursor or change the terminal's title. tyro fits the tables of
its help to the terminal, but not the text above them. A terminal or a reader of the output may go away at any time,
which must not end a command that writes files.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import select
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from types import FrameType
from typing import Any, TextIO

from lowrank_vit.common.begin import end_at_once

NARROW = 80
"""Columns for prose, also in a wider terminal."""
HELP_FLAGS = frozenset({"-h", "--help"})
UNREAD = 141
"""Exit code of a command whose only purpose was an output that nobody reads any more."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""Error numbers of writing to a stream whose reader is gone, whose terminal was closed, or that is not open."""
_NO_CHARACTER = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_IMPORTING = "<frozen importlib._bootstrap>"


class _Program:
    """State of this process as one of our commands; unused by processes that import the library."""

    is_begun = False
    is_in_a_hurry = False
    """See `end_within`."""
    writes_files = False
    """See `output_is_in_files`."""


def begin_program() -> None:
    """Make a command's output outlive its reader; call it once, before anything heavy is imported.

    Until `interruptible` Ctrl-C ends it without a traceback, see `begin`.
    """
    _Program.is_begun = True
    sys.stdin = sys.stdin or _opened(0, "r")
    sys.stdout = sys.__stdout__ = _lasting(sys.stdout, 1)
    sys.stderr = sys.__stderr__ = _lasting(sys.stderr, 2)
    default_hook = sys.unraisablehook

    def unraisable(event: Any) -> None:
        # Ctrl-C came where Python could not raise it, as in a destructor: send it again in a moment.
        if issubclass(event.exc_type, KeyboardInterrupt):
            _later(0.01, lambda: os.kill(os.getpid(), signal.SIGINT))
        else:
            default_hook(event)

    sys.unraisablehook = unraisable


def interruptible() -> None:
    """Let Ctrl-C raise `KeyboardInterrupt` from now on, since there may be something to clean up."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt`, but not out of an import: a library may make another error of it there."""
    above = frame
    while above is not None:
        if above.f_code.co_filename == _IMPORTING:
            end_at_once()
        above = above.f_back
    signal.default_int_handler(number, frame)


def uninterruptible() -> None:
    """Let Ctrl-C end the process at once again, since the command only has to leave the interpreter.

    After `end_within` the process ends here: leaving the interpreter takes seconds, with all that was imported.
    """
    if _Program.is_in_a_hurry:
        end_at_once()
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, end_at_once)


def end_within(seconds: float) -> None:
    """End a command after `seconds`, whatever its clean-up waits for, or as soon as the clean-up is done."""
    if _Program.is_begun:
        _Program.is_in_a_hurry = True
        _later(seconds, end_at_once)


def _later(seconds: float, function: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()


def is_unread() -> bool:
    """Whether the reader of the standard output is gone."""
    raw = _standard_output()
    return raw is not None and raw.is_gone


def output_is_in_files() -> None:
    """Note that this command's results are in files, so that it may lose its standard output."""
    _Program.writes_files = True


def why_output_is_lost() -> str:
    """Why a part of the standard output could not be written, if that is the command's only result; else "".

    A reader that is gone does not count.
    """
    raw = _standard_output()
    if raw is None or _Program.writes_files:
        return ""
    sys.stdout.flush()
    return raw.why_lost


def _standard_output() -> _Lasting | None:
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, _Lasting) else None


class _Lasting(io.FileIO):
    """A standard stream. Output that cannot be written is dropped; so is all later output if its reader is gone."""

    is_gone = False
    why_lost = ""
    """Why bytes that a reader may miss were first dropped, such as "No space left on device"."""

    def write(self, data: Any, /) -> int:
        """Write all of it; return the number of bytes, written or dropped."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                count: int | None = super().write(left)
                if count is None:  # another process with the same stream has made it non-blocking
                    select.select((), (self,), ())
                left = left[count or 0 :]
        except OSError as error:
            if error.errno in _GONE:
                self._let_go()
            else:
                self.why_lost = self.why_lost or error.strerror or str(error)
        return size

    def _let_go(self) -> None:
        """Redirect the stream to nowhere, also for others that write to it, such as a process started later."""
        self.is_gone = True
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


def _opened(number: int, mode: str) -> Any:
    """A standard stream in place of one that was closed; else the next file to be opened would get its number."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    os.set_inheritable(descriptor, descriptor == number)
    return open(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False)


def _lasting(stream: Any, number: int) -> TextIO:
    """`stream`, or a substitute if it was closed, as one that outlives its reader."""
    stream = stream or _opened(number, "w")
    is_unbuffered = not isinstance(getattr(stream, "buffer", None), io.BufferedWriter)  # python -u
    with suppress(OSError, ValueError):
        stream.flush()
    raw: Any = _Lasting(stream.fileno(), "wb", closefd=False)
    buffer = raw if is_unbuffered else io.BufferedWriter(raw)
    is_line_buffered = getattr(stream, "line_buffering", True)
    return io.TextIOWrapper(
        buffer, stream.encoding, "backslashreplace", line_buffering=is_line_buffered, write_through=is_unbuffered
    )


def printable(text: object) -> str:
    """`text` with escapes for control characters, invisible ones and bytes that are not UTF-8; lines stay lines."""
    return "\n".join(map(one_line, str(text).split("\n")))


def one_line(name: object) -> str:
    """`printable` of a name, which is one line even if it holds a line break."""
    shown = as_bytes(str(name)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)


def as_bytes(text: str) -> bytes:
    """Text as UTF-8. Bytes of a name that were not UTF-8 stay as they were; other non-characters are escaped."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair of UTF-16, which no file name can have held
        return _NO_CHARACTER.sub(lambda found: f"\\u{ord(found[0]):x}", text).encode("utf-8", "surrogateescape")


def say(text: object) -> None:
    """Print lines that may hold names from files, at once."""
    print(printable(text), flush=True)


def say_beside(text: object) -> None:
    """`say` on stderr, for lines that do not belong to a command's output."""
    print(printable(text), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`75` as 1:15, `3700` as 1:01:40."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


LINE_EVERY_S = 60.0
"""Seconds between two lines of progress if the output is not a terminal: a longer silence means no progress."""


class Steady:
    """Progress if no live line can be shown: a line a minute while there is progress, with the time left."""

    def __init__(self, total: int, say: Callable[[str], object] | None, done: int = 0) -> None:
        """`done` of the `total` were done before; with `say` None nothing is printed."""
        self._total, self._say, self._first = total, say, done
        self._began = self._said_at = time.monotonic()

    def eta(self, done: int) -> str:
        """The time left, estimated from the speed so far."""
        left = (time.monotonic() - self._began) / max(1, done - self._first) * (self._total - done)
        return f"ETA {duration(left)}"

    def tell(self, done: int, what: str, figures: str = "", *, every_s: float = LINE_EVERY_S) -> bool:
        """Say `what` and how many are done if the last line is `every_s` seconds old; return whether it was said."""
        now = time.monotonic()
        if self._say is None or now - self._said_at < every_s:
            return False
        self._said_at = now
        self._say("  ".join(filter(None, (f"{what} {done:,}/{self._total:,}", figures, self.eta(done)))))
        return True


@contextmanager
def bytes_shown(
    total: int, doing: str, say: Callable[[str], object] | None
) -> Generator[Callable[[int], object], None, None]:
    """Show how much of `total` bytes is done: a live line on a terminal, else a line a minute; None: nothing.

    Yields a function to be called with the number of further bytes.
    """
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
    is_live = say is not None and sys.stderr.isatty()
    doing_column = bars.TextColumn("{task.description}", markup=False)
    with bars.Progress(
        doing_column, *columns, console=Console(stderr=True), transient=True, disable=not is_live
    ) as bar:
        task = bar.add_task(printable(doing), total=total)
        steady = Steady(total >> 20, None if is_live else say)

        def advance(count: int) -> None:
            bar.advance(task, count)
            steady.tell(int(bar.tasks[task].completed) >> 20, f"{doing}, MiB:")

        yield advance


class _Captured(io.StringIO):
    """Text that passes for the real output, so that colours and boxes are those that a terminal would get."""

    def __init__(self, real: TextIO) -> None:
        super().__init__()
        self._real = real

    def isatty(self) -> bool:
        return self._real.isatty()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._real.encoding


@contextmanager
def fitted_help(argv: Sequence[str] | None) -> Generator[None, None, None]:
    """Fit what is printed within to the terminal, if `argv` (None: the process's own) asks for help."""
    if not HELP_FLAGS & set(sys.argv[1:] if argv is None else argv):
        yield
        return
    captured = _Captured(sys.stdout)
    try:
        with redirect_stdout(captured):
            yield
    finally:
        print(fit(captured.getvalue(), min(NARROW, shutil.get_terminal_size().columns)), end="")


_DESCRIPTION = re.compile(r"([│ ] {7,})([^\s│].*?) *│?")  # without frames if they cannot be shown
_NO_DEFAULT = re.compile(r" \(default: (?:None|'')?\)|\{None\}\|")


def fit(text: str, width: int) -> str:
    """Wrap the lines beyond `width` that are not part of a table, and reduce several empty lines to one.

    In a table, the description of an option becomes one paragraph: tyro breaks it where the source does. A default of
    None or nothing is left out, and None among the values that an option takes.
    """
    lines: list[str] = []
    for line in _with_paragraphs(text.split("\n")):
        bare = _ANSI.sub("", line)
        is_table = bare.startswith((" ", "╭", "│", "╰"))
        if is_table:
            is_twice_empty = bool(lines) and not bare.strip("│ ") and lines[-1] == line
            lines += [] if is_twice_empty else [line]
        elif bare.startswith("usage:") and len(bare) > width:  # a list of choices has no spaces to break at
            lines += [one.replace(", ", ",") for one in _wrap(bare.replace(",", ", "), width, " " * len("usage: "))]
        elif len(bare) > width:
            lines += _wrap(bare, width, "  " if bare.startswith("- ") else "")
        else:
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _with_paragraphs(lines: list[str]) -> Generator[str]:
    n = 0
    while n < len(lines):
        bare = _ANSI.sub("", lines[n])
        head, texts, end = _paragraph(bare, lines, n + 1)
        if head:
            frame = "│" if head[0] == "│" else ""
            room = len(bare) - len(head) - 2
            whole = _wrap(_NO_DEFAULT.sub("", " ".join(texts)), room, "")
            first, later = _NO_DEFAULT.sub("", head).ljust(len(head)), head[0].ljust(len(head))
            for start, text in zip(itertools.chain([first], itertools.repeat(later)), whole, strict=False):
                yield f"{start}{text:<{room}} {frame}".rstrip()
        else:
            without = _NO_DEFAULT.sub("", lines[n])
            lost = " " * (len(lines[n]) - len(without))
            yield f"{without[:-1]}{lost}│" if without.endswith("│") else without.rstrip()
        n = end


def _paragraph(bare: str, lines: list[str], end: int) -> tuple[str, list[str], int]:
    """The text before an option's description in its first line, the description's lines, and the index after them.

    `bare` is the line before index `end`; the first part is empty if no description begins there.
    """
    head, texts = "", list[str]()
    if found := _DESCRIPTION.fullmatch(bare):
        head, texts = found[1], [found[2]]
    while end < len(lines) and (found := _DESCRIPTION.fullmatch(_ANSI.sub("", lines[end]))):
        column = len(found[1])
        is_beside = bare.startswith(("│ -", "  -")) and bare[column - 2 : column] == "  " != bare[column : column + 2]
        if not head and is_beside:  # the option's name
            head, texts = bare[:column], [bare[column:].rstrip("│ ")]
        if len(head) != column or found[2].startswith("- "):
            break
        texts.append(found[2])
        end += 1
    return head, texts, end


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
