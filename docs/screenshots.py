"""Takes the screenshots of the status page (`make screenshots`): docs/screenshots/status-*.png, by Chromium.

The page is the real one, served by the real monitor code, with the history of a service that does not exist: a day of
an application with two workers, in the last hour of which a backend was slow, a worker was killed, and a reload mended
it. So the pictures are the same each time, but for their times of day. With --serve, the pages stay, to be looked at.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent

from gtcpserver.address import parse_address
from gtcpserver.monitoring.history import History, Slots
from gtcpserver.monitoring.latency import BOUNDS, BUCKETS
from gtcpserver.monitoring.monitor import make_pages
from gtcpserver.monitoring.recorder import Recorder
from gtcpserver.monitoring.source import Health

HERE = Path(__file__).parent

DAY = 86400.0
#: Seconds before now: the slow backend, from its begin to the reload that helps; and the death of a worker in it.
SLOW, DIED, MENDED = 1500, 1130, 860

Status = dict[str, Any]


class Imagined:
    """A source with the counters of a service that does not exist."""

    def __init__(self) -> None:
        self._random = random.Random(7)
        self._began = time.monotonic() - 3.2 * DAY
        self._latency = dict.fromkeys(BUCKETS, 0.0) | {"sum": 0.0}
        self._counts = dict.fromkeys(("accepted", "bytes_received", "bytes_sent", "handler_errors", "resets"), 0.0)
        self._counts |= dict.fromkeys(("timeouts", "rejected", "limits_exceeded"), 0.0)
        self._cpu = [0.0, 0.0]
        self._ago = 0.0
        self._slow = False
        self._rate = self._active = self._used = 0.0

    def pass_by(self, seconds: float, ago: float) -> None:
        """Serve for so many seconds, which end so many seconds before now."""
        chance = self._random
        hour = (time.time() - ago) % DAY / 3600
        self._ago, self._slow = ago, MENDED < ago < SLOW
        wave = (
            0.55
            - 0.4 * math.cos(2 * math.pi * (hour - 4) / 24)
            + 0.06 * math.sin(ago / 210)
            + 0.03 * math.sin(ago / 37)
        )
        self._rate = 1900 * wave * chance.uniform(0.95, 1.05) * (0.72 if self._slow else 1.0)
        requests = self._rate * seconds
        middle = 0.0016 * (1 + 0.25 * math.sin(ago / 500)) * chance.uniform(0.9, 1.1) * (28 if self._slow else 1)
        for _ in range(60):
            took = chance.lognormvariate(math.log(middle), 0.75)
            self._latency[BUCKETS[bisect_left(BOUNDS, took)]] += requests / 60
            self._latency["sum"] += took * requests / 60
        self._active = 3400 * wave * (1.25 if self._slow else 1.0) + chance.uniform(-25, 25)
        self._used = min(1.0, chance.uniform(0.9, 1.06)) if self._slow else 0.2 + 0.25 * wave * chance.uniform(0.8, 1.2)
        counts = self._counts
        counts["accepted"] += requests / 31
        counts["bytes_received"] += requests * 210
        counts["bytes_sent"] += requests * 1420
        counts["resets"] += chance.random() < 0.004 * seconds
        counts["timeouts"] += chance.random() < (0.2 if self._slow else 0.001) * seconds
        counts["handler_errors"] += chance.choice((0, 1, 2, 3)) * seconds if self._slow and chance.random() < 0.4 else 0
        counts["rejected"] += chance.randrange(6) * seconds if self._slow and self._used >= 1 else 0
        if 43_000 < ago < 43_200:
            counts["handler_errors"] += chance.random() < 0.5
        for number in (0, 1):
            self._cpu[number] += seconds * min(0.97, 0.00022 * self._rate * chance.uniform(0.95, 1.05))

    def status(self) -> Status:
        ago, chance = self._ago, self._random
        states = [self._worker(0, ago), self._worker(1, ago)]
        died = ago <= DIED
        if DIED - 2 < ago <= DIED:
            states = states[:1]
        stats = {**{name: int(value) for name, value in self._counts.items()}, "latency": self._latency.copy()}
        return {
            "name": "shop:handle",
            "state": "serving",
            "ready": True,
            "pid": 4120,
            "uptime": time.monotonic() - ago - self._began,
            "addresses": ["0.0.0.0:5000"],
            "target": 2,
            "generation": 7 if ago > MENDED else 8,
            "restarts": int(died),
            "retired": 0,
            "workers": states,
            "stats": {
                **stats,
                "active": int(self._active),
                "idle": int(self._active * (0.6 if self._slow else 0.93)),
                "peak": 4410,
                "handlers": int(400 * self._used),
                "pool_size": 400,
                "cpu_seconds": sum(self._cpu) + 31_000,
                "lag": chance.random(),
            },
        }

    def _worker(self, number: int, ago: float) -> Status:
        chance, share = self._random, (0.49, 0.51)[number]
        lag = chance.uniform(0.0006, 0.0022)
        if number and DIED < ago < DIED + 45:
            lag = DIED + 45 - ago
        return {
            "number": number,
            "pid": (5231, 5232)[number],
            "state": "ready",
            "lag": round(lag, 4),
            "lagging": lag > 0.25,
            "rss": int((61 + 3 * number + 14 * self._active / 4000 + (6 if self._slow else 0)) * 2**20),
            "uptime": max(1.0, MENDED - ago),
            "active": int(self._active * share),
            "accepted": int(self._counts["accepted"] * share),
            "stats": {
                "accepted": self._counts["accepted"] * share,
                "cpu_seconds": self._cpu[number],
                "certificates": 2,
                "certificate_expires_at": time.time() + 41.5 * DAY,
            },
        }

    def health(self) -> Health:
        return Health(True, True, "ready")

    def connections(self) -> Status:
        chance = random.Random(3)
        places = {"idle": 2913, "shop.py:88 in price_of": 61, "shop.py:31 in handle": 18, "stock.py:140 in reserve": 4}
        names = [name for name in places for _ in range(max(3, places[name] // 9))]
        rows = [
            {
                "peer": f"198.51.{chance.randrange(100, 104)}.{chance.randrange(256)}:{chance.randrange(32768, 60999)}",
                "age": chance.expovariate(1 / 240),
                "bytes_received": int(chance.expovariate(1 / 9000)),
                "bytes_sent": int(chance.expovariate(1 / 61000)),
                "idle": name == "idle",
                "tls": "TLSv1.3",
                "server_name": "shop.example.com",
                "where": [] if name == "idle" else ["shop.py:31 in handle", name][name.startswith("shop.py:31") :],
                "worker": chance.randrange(2),
            }
            for name in names[-120:]
        ]
        rows.sort(key=lambda row: -row["age"])
        return {"connections": rows, "places": places, "total": sum(places.values()), "missing": []}


def moments(span: float) -> Iterator[tuple[float, float]]:
    """Yield (seconds, seconds before now): of a day the last hour each second, everything else each ten."""
    ago = span
    while ago > 0:
        step = 1.0 if span == DAY and ago <= 3700 else 10.0
        ago -= step
        yield step, ago


class LongHistory(History):
    """The history of a machine that has run for days: there are no slots for what was before its start."""

    def add(self, now: float, row: Sequence[float], covers: float = 1.0) -> None:
        super().add(now + 4 * DAY, row, covers)

    def since(self, grain: str, number: int, now: float) -> Slots:
        return super().since(grain, number, now + 4 * DAY)


def record(span: float = DAY) -> tuple[Imagined, History, Recorder]:
    """Let so many seconds go by."""
    source, history = Imagined(), LongHistory()
    recorder = Recorder(source, history)
    now = time.monotonic()
    for seconds, ago in moments(span):
        source.pass_by(seconds, ago)
        recorder.record(source.status(), now - ago)
    while now + 1 < time.monotonic():  # the time that this took
        now += 1
        source.pass_by(1.0, 0.0)
        recorder.record(source.status(), now)
    return source, history, recorder


def go_on(source: Imagined, recorder: Recorder) -> None:
    """Serve on while the pages are looked at."""
    while True:
        gevent.sleep(1)
        source.pass_by(1.0, 0.0)
        recorder.record(source.status(), time.monotonic())


def photograph(url: str, folder: Path) -> None:
    """Take the pictures. The browser is that of the tests."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from kit.browser import Browser

    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile), "--hide-scrollbars")
        for scheme in ("light", "dark"):
            take(browser, url, folder, scheme)
        browser.close()


def take(browser: Any, url: str, folder: Path, scheme: str) -> None:
    browser.show(1180, 784, scheme)
    browser.open(url)
    browser.wait_for("document.getElementById('state').textContent == 'ready' && before")
    time.sleep(3)  # for rates of the last seconds
    # The pointer is where the backend is slow.
    browser.value(f"point(shown.view.first + {int((3600 - SLOW + 60) / 15)})")
    browser.screenshot(folder / f"status-{scheme}.png")
    browser.show(1180, 900, scheme)
    browser.value("point(null)")
    browser.value("document.getElementById('show').click()")
    browser.wait_for("document.getElementById('rows').children.length > 9")
    browser.value("document.querySelectorAll('#places button')[1].click()")
    browser.value("document.getElementById('connections-title').scrollIntoView()")
    browser.value("scrollBy(0, -20)")
    browser.screenshot(folder / f"status-connections-{scheme}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE / "screenshots")
    parser.add_argument("--serve", metavar="ADDRESS", help="serve the page there instead")
    options = parser.parse_args()
    source, history, recorder = record()
    pages = make_pages(source, history, parse_address(options.serve or "127.0.0.1:0"))
    pages.start()
    gevent.spawn(go_on, source, recorder)
    if options.serve:
        pages.wait_stopped()
    else:
        gevent.get_hub().threadpool.apply(photograph, (f"http://{pages.address}/", options.folder))
        pages.stop(1)


if __name__ == "__main__":
    main()
