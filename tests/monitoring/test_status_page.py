"""The status page in a real browser: live figures, the table of connections, phone and desktop, light and dark."""

import os
import shutil
import time

import pytest

from kit.patience import SOON
from kit.status_page import CONTRAST, EVIL, text_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is missing")]


def test_the_page_shows_live_figures_and_connections_on_demand(browser, service):
    served = service("--pool", "50")
    idle, busy = served.connect(f"{EVIL}{os.getpid()}"), served.connect()
    for _ in range(20):
        assert served.ask(idle) == b"hello"
    busy.sendall(b"stay")
    for _ in range(3):
        assert served.ask(served.connect(), b"fault") == b""
    browser.show(1280, 900, "light")
    browser.open(served.url)
    browser.wait_for(f"{text_of('state')} == 'ready' && {text_of('active')} == '2'")
    assert browser.value(text_of("active-note")).startswith("1 idle")
    assert browser.value(text_of("accepts-note")) == "5 in all"
    assert browser.value(text_of("pool")) == "1\u202fof 50"
    browser.wait_for(f"{text_of('errors')} == 'handler failed33'")  # of the last minutes, and since the start
    browser.wait_for(f"{text_of('trouble-list')}.startsWith('3 handlers failed in the last hour, last at ')")
    assert "ready" in browser.value(text_of("workers"))
    assert browser.value(text_of("p50")).endswith("s")
    # Nothing is asked again by hand: the figures follow.
    served.connect()
    browser.wait_for(f"{text_of('active')} == '3'")
    assert browser.value(text_of("rows")) == ""
    browser.value("document.getElementById('show').click()")
    browser.wait_for("document.getElementById('rows').children.length == 3")
    rows = browser.value("[...document.querySelectorAll('#rows tr')].map(row => row.innerText)")
    assert EVIL in rows[0]
    assert "idle" in rows[0]
    assert "in stay < app.py" in rows[1]
    assert browser.value("document.title") == "ready · app:handle"
    assert browser.value("document.images.length") == 0
    assert browser.complaints == []


def test_the_page_of_workers_and_a_service_that_ends(browser, service):
    served = service("--workers", "2", "--drain-delay", "2")
    browser.open(served.url)
    browser.wait_for("document.querySelectorAll('#workers tr').length == 2")
    assert browser.value(text_of("workers-note")) == "2 of 2 ready"
    client = served.connect()
    assert served.ask(client) == b"hello"
    browser.wait_for(f"{text_of('active')} == '1'")
    browser.value("document.getElementById('show').click()")
    browser.wait_for("document.getElementById('rows').children.length == 1")
    served.process.terminate()
    browser.wait_for(f"{text_of('state')} == 'draining'")
    browser.wait_for(f"{text_of('state')} == 'no answer'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_it_fits_its_window_and_can_be_read(browser, service, tmp_path, width, height, scheme):
    served = service()
    # Abstract names are those of the whole machine, where tests run side by side.
    served.ask(served.connect(f"{os.getpid():a>90}"))
    browser.show(width, height, scheme)
    browser.open(served.url)
    browser.wait_for(f"{text_of('state')} == 'ready'")
    browser.value("document.getElementById('show').click()")
    browser.wait_for("document.getElementById('rows').children.length == 1")
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    # Contrast of text, as WCAG 2.1 section 1.4.3 wants it: 4.5 to 1.
    worst = browser.value(CONTRAST)
    assert worst["ratio"] >= 4.5, worst
    dark = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, dark[4:-1].split(","))) < 60) is (scheme == "dark")
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_keyboard_and_screen_readers(browser, service):
    served = service()
    browser.open(served.url)
    browser.wait_for(f"{text_of('state')} == 'ready'")
    assert browser.value("document.documentElement.lang") == "en"
    assert browser.value("document.getElementById('state').getAttribute('role')") == "status"
    # All that can be scrolled or pressed is reached by the Tab key and has a name.
    assert browser.value(
        "[...document.querySelectorAll('.scroll')].every(one => one.tabIndex === 0 && "
        "document.getElementById(one.getAttribute('aria-labelledby')))"
    )
    assert browser.value("[...document.querySelectorAll('th')].every(one => one.scope)")
    began = time.monotonic()
    browser.value("document.getElementById('show').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.do("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    browser.wait_for(f"{text_of('show')} == 'Look again'")
    assert time.monotonic() - began < SOON
