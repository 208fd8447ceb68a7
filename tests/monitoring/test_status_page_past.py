"""The status page, opened afterwards: what happened, in a real browser, on phone and desktop, light and dark.

The service is that of the documentation's screenshots, which does not exist.
"""

import importlib.util
import shutil

import pytest

from gtcpserver.address import parse_address
from gtcpserver.monitoring.history import History
from gtcpserver.monitoring.monitor import make_pages
from kit.browser import Browser
from kit.paths import ROOT
from kit.status_page import CONTRAST, EVIL, text_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is missing")]


@pytest.fixture(scope="module")
def imagined():
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs/screenshots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def served(imagined):
    """`served(history)`: URL of the page, until all tests have ended: pages that are left ask on for a moment."""
    source, recorded, _ = imagined.record(3600.0)
    started = []

    def serve(history=recorded):
        started.append(make_pages(source, history, parse_address("127.0.0.1:0")))
        started[-1].start()
        return f"http://{started[-1].address}/"

    yield serve
    for pages in started:
        pages.halt()


@pytest.fixture(scope="module")
def only_browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def opened(served, only_browser, in_thread):
    """`opened(test)`: calls test(browser, url) in a native thread, while the event loop serves the page."""
    return lambda test, *history: in_thread(test, only_browser, served(*history))


TIP = text_of("traffic-tip")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_the_page_shows_what_happened_before(opened, imagined, width, height, scheme):
    column = (3600 - (imagined.SLOW + imagined.MENDED) / 2) / 15

    def look(browser, url):
        browser.show(width, height, scheme)
        browser.open(url)
        browser.wait_for("document.querySelectorAll('#health-chart .bad-bars').length > 0")
        chart = "document.getElementById('requests-chart').getBoundingClientRect()"
        assert browser.value(
            "[...document.querySelectorAll('#requests-chart text')].some(one => one.textContent == 'reload')"
        )
        assert browser.value("document.querySelectorAll('#errors-chart .fault-bars').length") == 1
        # At the pointer.
        x, y = browser.value(f"[{chart}.left + 46 + ({chart}.width - 46) * {column / 240}, {chart}.top + 40]")
        browser.do("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        browser.wait_for("document.getElementById('traffic-tip').hidden == false")
        assert "pool" in browser.value(TIP)
        assert "connections" in browser.value(TIP)
        assert browser.value(text_of("pool-at")).endswith("%")
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        worst = browser.value(CONTRAST)
        assert worst["ratio"] >= 4.5, worst
        browser.do("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        browser.wait_for("document.getElementById('traffic-tip').hidden")
        assert browser.complaints == []

    opened(look)


def test_spans_keys_and_the_title(opened):
    def look(browser, url):
        browser.show(1280, 900, "light")
        browser.open(url)
        browser.wait_for(f"{text_of('state')} == 'ready' && {text_of('recent')} == 'last hour'")
        assert browser.value("document.title") == "ready · shop:handle"
        assert browser.value(text_of("name")) == "shop:handle"
        assert "2 certificates, the first expires in 41 days" in browser.value(text_of("about"))
        pressed = "[...document.querySelectorAll('#ranges button')].find(one => one.ariaPressed == 'true')?.textContent"
        assert browser.value(pressed) == "1 hour"
        browser.value("[...document.querySelectorAll('#ranges button')][2].click()")
        browser.wait_for(f"{text_of('recent')} == 'last day'")
        browser.do("Page.reload")
        browser.wait_for("document.readyState == 'complete' && location.hash == '#1-day'")
        browser.wait_for(f"{text_of('recent')} == 'last day' && {pressed} == '1 day'")
        assert browser.value("document.querySelectorAll('#requests-chart .curve').length") == 1
        assert browser.value("document.querySelectorAll('#health-chart .bad-bars').length") > 0
        browser.value("document.getElementById('traffic').focus()")
        for key in ("ArrowLeft", "ArrowLeft", "PageUp", "ArrowRight"):
            browser.do("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
        browser.wait_for("shown.pointed === shown.view.end - 11")
        assert browser.value("document.getElementById('traffic-tip').hidden") is False
        browser.do("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape")
        browser.wait_for("document.getElementById('traffic-tip').hidden")
        assert browser.complaints == []

    opened(look)


ROWS = "[...document.querySelectorAll('#rows tr')].map(row => row.innerText)"


def test_connections_are_grouped_searched_filtered_and_sorted(opened):
    def look(browser, url):
        browser.show(1280, 900, "dark")
        browser.open(url)
        browser.wait_for(f"{text_of('state')} == 'ready'")
        browser.value("document.getElementById('show').click()")
        browser.wait_for("document.querySelectorAll('#rows tr').length == 120")
        places = browser.value("[...document.querySelectorAll('#places button')].map(one => one.ariaLabel)")
        assert places[:2] == ["2913 at idle", "61 at shop.py:88 in price_of"]
        browser.value("document.querySelectorAll('#places button')[1].click()")
        rows = browser.value(ROWS)
        assert rows
        assert all("shop.py:88 in price_of" in one for one in rows)
        assert browser.value(text_of("found")).endswith(" of 120")
        browser.value("document.querySelectorAll('#places button')[1].click()")
        browser.value("document.querySelectorAll('#kinds button')[2].click()")
        busy = browser.value(ROWS)
        assert 0 < len(busy) < 120
        assert not any("idle" in one for one in busy)
        # Numbers are sorted as numbers, the first time from the largest, and a second time from the smallest.
        browser.value("document.querySelectorAll('#columns button')[3].click()")
        assert browser.value("document.querySelector('th[aria-sort]').ariaSort") == "descending"
        browser.value("document.querySelectorAll('#columns button')[3].click()")
        assert browser.value(ROWS) != busy
        search = (
            "const box = document.getElementById('search'); box.value = {!r}; box.dispatchEvent(new Event('input'))"
        )
        browser.value("{" + search.format("RESERVE") + "}")
        rows = browser.value(ROWS)
        assert rows
        assert all("stock.py:140 in reserve" in one for one in rows)
        browser.value("{" + search.format(EVIL) + "}")
        assert browser.value(ROWS) == []
        assert browser.value("document.images.length") == 0
        assert browser.complaints == []

    opened(look)


def test_what_is_not_known_is_not_zero(opened):
    def look(browser, url):
        browser.open(url)
        browser.wait_for(f"{text_of('state')} == 'ready'")
        shown = {name: browser.value(text_of(name)) for name in ("accepts", "requests", "cpu", "received", "sent")}
        assert {value[0] for value in shown.values()} == {"\u2013"}, shown
        assert browser.value("document.querySelectorAll('#health-chart .good-bars').length") == 0

    opened(look, History())
