"""The status page to who comes because something is wrong: troubles are at its top, and unknown is not zero."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest

from gtcpserver.monitoring.history import History
from gtcpserver.monitoring.web import Web
from kit.browser import Browser
from kit.status_page import text_of
from kit.supervised import wait_until

pytestmark = pytest.mark.slow

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is missing")


@pytest.fixture
def browser(tmp_path):
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


TROUBLES = "[...document.querySelectorAll('#trouble-list li')].map(one => one.className + ': ' + one.textContent)"


@needs_chromium
def test_troubles_of_the_past_and_of_now_are_at_the_top(browser, service):
    served = service("--pool", "2", "--client-connections", "3")
    for _ in range(3):
        assert served.ask(served.connect(), b"fault") == b""
    browser.open(served.url)
    browser.wait_for(f"{text_of('state')} == 'ready'")
    browser.wait_for(f"{TROUBLES}.some(one => one.startsWith('bad: 3 handlers failed in the last hour, last at '))")
    served.ask(served.connect(), b"fault")
    for _ in range(2):
        served.connect().sendall(b"stay")
    browser.wait_for(f"{TROUBLES}[0] == 'bad: Pool full: 2 of 2 handlers running new clients wait or are rejected'")
    browser.wait_for(f"{TROUBLES}[1].startsWith('bad: 4 handlers failed in the last hour')")
    browser.wait_for("document.getElementById('pool').className == 'figure bad'")
    assert browser.value("document.getElementById('icon').href").endswith("/icon-bad.svg")
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints == []


@needs_chromium
def test_a_worker_that_stands_still_is_not_ready(browser, service):
    served = service("--workers", "1")
    browser.open(served.url)
    browser.wait_for(f"{text_of('workers-note')} == '1 of 1 ready'")
    assert browser.value("document.getElementById('troubles').hidden") is True
    worker = int(browser.value("document.querySelector('#workers td:nth-child(3)').textContent"))
    os.kill(worker, signal.SIGSTOP)
    try:
        browser.wait_for("document.querySelector('#workers .pill').textContent == 'stands still'")
        assert browser.value(text_of("workers-note")) == "0 of 1 ready"
        assert browser.value("document.title") == "stands still · app:handle"
        assert "bad: 0 of 1 worker ready" in browser.value(TROUBLES)
    finally:
        os.kill(worker, signal.SIGCONT)


@needs_chromium
def test_workers_that_died_and_a_master_that_stands_still_are_told(browser, service):
    served = service("--workers", "1", "--control", "ctl")
    text = served.log.read_text
    browser.open(served.url)
    browser.wait_for(f"{text_of('workers-note')} == '1 of 1 ready'")
    worker = int(browser.value("document.querySelector('#workers td:nth-child(3)').textContent"))
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: f"pid {worker}) was killed by SIGKILL" in text())
    browser.wait_for(f"{TROUBLES}.some(one => one.startsWith('bad: 1 worker died in the last hour, last at '))")
    served.process.send_signal(signal.SIGSTOP)
    browser.wait_for(f"{TROUBLES}.length == 1 && {TROUBLES}[0].startsWith('bad: No answer ')")


def test_a_browser_finds_an_icon_wherever_it_looks():
    told = []
    web = Web(SimpleNamespace(status=None), History(), "1.0", for_this_host=False)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/favicon.ico", "HTTP_HOST": "x"}
    body = b"".join(web(environ, lambda status, headers: told.append((status, dict(headers)))))
    assert told[0][0] == "200 OK"
    assert told[0][1]["Content-Type"] == "image/svg+xml"
    assert body.startswith(b"<svg ")
