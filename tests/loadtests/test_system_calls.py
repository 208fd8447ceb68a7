"""The table of system calls: read from strace -c, and made of a real server."""

from __future__ import annotations

import pytest

from injection.strace import can_trace
from loadtests.bench.system_calls import SCENARIOS, main, read_table, table

SUMMARY = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 61.02    0.010103          15       640           sendto
 38.98    0.006454          10       641         1 recvfrom
------ ----------- ----------- --------- --------- ----------------
100.00    0.016557          12      1281         1 total
"""


def test_calls_are_read_with_and_without_errors() -> None:
    assert read_table(SUMMARY) == {"sendto": 640, "recvfrom": 641}


def test_most_calls_come_first_and_what_is_rare_is_left_out() -> None:
    found = {"ours": {"recvfrom": 1.0, "sendto": 1.0, "brk": 0.004}, "theirs": {"read": 2.0, "sendto": 1.0}}
    assert table(SCENARIOS["keep-alive"], found).splitlines() == [
        "| Calls a request, keep-alive | ours | theirs |",
        "| --- | ---: | ---: |",
        "| read |  | 2.00 |",
        "| recvfrom | 1.00 |  |",
        "| sendto | 1.00 | 1.00 |",
        "| all | 2.00 | 3.00 |",
    ]


@pytest.mark.slow
@pytest.mark.skipif(not can_trace(), reason="strace is missing or may not trace")
def test_a_request_takes_two_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keep-alive", "--server", "gtcpserver"]) == 0
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "." in line)
    assert (rows["recvfrom"], rows["sendto"]) == ("1.00", "1.00")
    assert float(rows["all"]) < 2.5


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["keepalive"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("got keepalive")
