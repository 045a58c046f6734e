"""`report --watch`: whom the server answers, what, and when a page is made anew."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.report import watch
from lowrank_vit.report.__main__ import main
from lowrank_vit.report.language import in_language
from lowrank_vit.report.page import draw_report
from lowrank_vit.report.watch import Watched, open_server, page_of, state_of
from tests.browser import opened
from tests.reported import add_metrics, add_summary
from tests.waiting import wait_until

PAGE = "<!doctype html><html><body><h1>{}</h1></body></html>"


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PAUSE_S", "_PAUSES", "_SETTLED_S"):
        monkeypatch.setattr(watch, name, 0.01)


class Drawing:
    """Draws a page with the number of the drawing, or raises what it is told to."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None
        self.page = PAGE

    def __call__(self, path: Path) -> str:
        self.count += 1
        if self.error:
            raise self.error
        return self.page.format(f"page {self.count} of {path.name}")


@pytest.fixture
def drawing() -> Drawing:
    return Drawing()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


Ask = Callable[..., tuple[int, str, http.client.HTTPMessage]]


@pytest.fixture
def ask(run: Path, drawing: Drawing) -> Generator[Ask]:
    """Asks a server of the run's page: method, path and headers; answers status, text and headers."""
    watched = Watched(run, drawing)
    server = open_server(0, watched)
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
    watched.start()

    def ask(method: str = "GET", path: str = "/", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text, answer.headers

    yield ask
    server.shutdown()
    server.server_close()
    watched.close()


def until(ask: Ask, text: str) -> str:
    """The page, once it holds the text."""
    end = time.monotonic() + 60
    while text not in (page := ask()[1]):
        assert time.monotonic() < end, page
        time.sleep(0.01)
    return page


def test_pages_are_given_under_this_machines_names_alone(ask: Ask) -> None:
    for host in ("127.0.0.1", "localhost", "LOCALHOST:80", "127.0.0.1:9", "localhost:65535"):
        assert ask(Host=host)[0] == 200, host
    for host in ("evil.org", "127.0.0.1.evil.org", "localhost.evil.org:80", "", "127.0.0.1:80:80", "127.0.0.1, evil"):
        for path in ("/", "/version"):
            status, text, _ = ask(path=path, Host=host)
            assert (status, "<" in text) == (403, False), host


@pytest.mark.parametrize(
    "path", ["/args.yaml", "/../run", "/?", "/version/", "/report.html", "http://127.0.0.1/", "*", "/%2e%2e/"]
)
def test_no_file_is_given(ask: Ask, run: Path, path: str) -> None:
    (run / "args.yaml").write_text("secret: 1")
    status, text, _ = ask(path=path)
    assert (status, "secret" in text) == (404, False)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"])
def test_nothing_is_done_but_reading(ask: Ask, run: Path, method: str) -> None:
    status, _, headers = ask(method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert list(run.iterdir()) == []


def test_head_has_no_body_and_nothing_may_be_kept_or_framed(ask: Ask) -> None:
    status, text, headers = ask("HEAD")
    assert (status, text, headers["Cache-Control"]) == (200, "", "no-store")
    assert int(headers["Content-Length"]) > 0
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_a_page_is_made_anew_only_when_files_of_the_run_change(ask: Ask, run: Path, drawing: Drawing) -> None:
    until(ask, "page 1 of run")
    _, version, _ = ask(path="/version")
    for name in ("report.html", ".metrics.jsonl.12345678.part", "comparison.html"):
        (run / name).write_text("not shown")
    for folder in ("report", "tensorboard"):
        (run / folder).mkdir()
        (run / folder / "file").write_text("not shown")
    for _ in range(20):  # several tabs ask, several times
        assert version in ask()[1]
        assert ask(path="/version")[1] == version
    assert drawing.count == 1
    add_metrics(run)
    assert version not in until(ask, "page 2 of run")
    assert ask(path="/version")[1] != version
    (run / "spectra").mkdir()
    (run / "spectra" / "update_1.npz").write_text("")
    until(ask, "page 3 of run")


def test_nothing_is_drawn_while_nobody_looks(run: Path, drawing: Drawing) -> None:
    watched = Watched(run, drawing)
    watched.start()
    time.sleep(0.1)
    assert drawing.count == 0
    watched.close()
    watched._thread.join(60)
    assert not watched._thread.is_alive()


def test_a_run_is_waited_for_and_its_last_page_stays_when_it_is_gone(ask: Ask, run: Path, drawing: Drawing) -> None:
    run.rmdir()
    until(ask, "this page waits for it")
    run.mkdir()
    page = until(ask, " of run</h1>")
    assert "waits for" not in page
    run.rmdir()
    assert " of run</h1>" in until(ask, "no longer exists")
    drawn = drawing.count
    run.mkdir()
    until(ask, f"page {drawn + 1} of run")


def test_what_fails_is_said_above_the_last_page_and_tried_again(ask: Ask, run: Path, drawing: Drawing) -> None:
    until(ask, "page 1 of run")
    drawing.error = UserError("holds <b>no run")
    add_metrics(run)
    assert "page 1 of run" in until(ask, "holds &lt;b&gt;no run")
    drawing.error = ValueError("of a library")
    (run / "summary.csv").write_text("epoch\n")
    until(ask, "ValueError: of a library")
    drawing.error = None
    (run / "summary.csv").unlink()
    assert "no page could be made" not in until(ask, "page 4 of run")


def test_the_state_tells_whether_the_run_goes_on_and_which_it_is(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    link = tmp_path / "latest"
    link.symlink_to("a")
    before = state_of(link)
    assert state_of(link) == before
    link.unlink()
    link.symlink_to("b")
    assert state_of(link) != before
    assert state_of(tmp_path / "none") is not None
    analysis = tmp_path / "vit_spectral.json"
    analysis.write_text(json.dumps({}))
    assert state_of(analysis) == state_of(analysis) != state_of(link)


def test_ports_and_paths_that_cannot_be(run: Path) -> None:
    watched = Watched(run, str)
    taken = open_server(0, watched)
    number = taken.server_address[1]
    with pytest.raises(UserError, match=f"port {number} of 127.0.0.1: Address already in use. Give another"):
        open_server(number, watched)
    taken.server_close()
    for line, words in (
        (["--port", "70000"], "--port takes"),
        (["--port", "80"], "--port needs --watch"),
        (["--watch", "--port", "x"], "--port takes"),
    ):
        with pytest.raises(UserError, match=words):
            main([str(run), *line])
    with pytest.raises(UserError, match="nor a folder where one could begin"):
        main([str(run / "not" / "there"), "--watch"])
    (run / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"notes\.txt is a file, but not one of a run"):
        main([str(run / "notes.txt"), "--watch"])


def test_the_usual_port_gives_way_to_another(run: Path) -> None:
    servers = [open_server(None, Watched(run, str)) for _ in range(2)]
    assert servers[0].server_address[1] != servers[1].server_address[1]
    assert all(server.server_address[0] == "127.0.0.1" for server in servers)
    for server in servers:
        server.server_close()


def test_ctrl_c_ends_it_without_an_error(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("socketserver.BaseServer.serve_forever", interrupted)
    main([str(run), "--watch", "--port", "0"])
    assert capsys.readouterr().out.splitlines()[-1] == "ended"
    assert list(run.iterdir()) == []
    main([str(run) + "s", "--watch", "--port", "0"])
    note = capsys.readouterr().out.splitlines()[-2]
    assert note == f"note: there is no {run}s yet; the page shows it when it begins. Did you mean {run.name}?"


def test_a_browsers_page_loads_itself_anew(tmp_path: Path, run: Path) -> None:
    add_metrics(run)
    watched = Watched(run, lambda path: draw_report(path, png=False).html)
    with opened(tmp_path / "profile") as tab, open_server(0, watched) as server:
        threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
        watched.start()
        tab.call("Page.navigate", url=f"http://127.0.0.1:{server.server_address[1]}/")
        tab.wait("document.documentElement?.dataset.state === 'ready'")
        add_summary(run)
        tab.wait("document.body?.textContent.includes('62.25 %')")
        tab.wait("document.getElementById('watched')?.hidden")
        server.shutdown()
        server.server_close()
        watched.close()
        tab.wait("document.getElementById('watched')?.hidden === false")


def test_a_page_that_forbids_itself_to_fetch_may_ask_for_its_number(ask: Ask, run: Path, drawing: Drawing) -> None:
    add_metrics(run)
    policy = re.search(
        r'<meta http-equiv="Content-Security-Policy"\s+content="([^"]*)">', draw_report(run, png=False).html
    )
    assert policy
    drawing.page = PAGE.replace("<html>", f"<html><head>{policy[0]}</head>")
    page = until(ask, "page 1 of run")
    assert policy[1] not in page
    header = ask()[2]["Content-Security-Policy"]
    assert {one.strip() for one in policy[1].split(";")} - {"img-src data: blob:"} <= {
        one.strip() for one in header.split(";")
    }
    assert "connect-src 'self'" in header


def test_the_page_is_the_reports_and_nothing_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.nice", lambda more: 0)
    add_metrics(run)
    before = sorted(path.name for path in run.iterdir())
    assert "<h1>run</h1>" in page_of(run, False)
    assert sorted(path.name for path in run.iterdir()) == before


def test_notices_are_in_the_language_of_the_report(tmp_path: Path, drawing: Drawing) -> None:
    with in_language("zh"):
        watched = Watched(tmp_path / "gone", drawing)
        watched.start()
    try:
        first = watched.newest().content.decode()
        assert '<html lang="zh">' in first
        assert "report --watch 已结束" in first
        wait_until(lambda: "还不存在" in watched.newest().content.decode(), "a notice in Chinese")
    finally:
        watched.close()
