"""Numbers that no float or clock can hold: a clear error, or what they mean, and never a traceback of another kind."""

from __future__ import annotations

import time

import pytest

from gtcpserver import BlockDetector, ConfigError
from gtcpserver.checks import check_number


def test_a_whole_number_beyond_every_float_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="stop_timeout must be a number, 0 or more, got 1000"):
        check_number("stop_timeout", 10**400, least=0)


def test_a_block_detector_with_a_threshold_beyond_every_clock_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[BaseException | None] = []
    usual = BlockDetector._look_until  # noqa: SLF001  how its thread ends

    def look_until(self: BlockDetector, *arguments: object) -> None:
        try:
            usual(self, *arguments)  # type: ignore[arg-type]
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    monkeypatch.setattr(BlockDetector, "_look_until", look_until)
    with BlockDetector(1e300):
        pass
    give_up = time.monotonic() + 10
    while not ended and time.monotonic() < give_up:
        time.sleep(0.001)
    assert ended == [None]
