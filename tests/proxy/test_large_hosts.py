"""A hosts file of a blocklist's size is parsed beside the event loop's other work."""

import ipaddress
from collections import Counter
from time import monotonic

import gevent
import pytest

from gtcpserver.connection.connect import MOST_ADDRESSES
from gtcpserver.proxy import name_files
from gtcpserver.proxy.name_files import LINES_AT_ONCE, WatchedFile, parse_hosts

BLOCKLIST = "".join(f"0.0.0.0 ads{number}.test\n" for number in range(20 * LINES_AT_ONCE))


@pytest.fixture
def turns():
    """How often another greenlet had its turn."""
    count = Counter()

    def other():
        while True:
            gevent.sleep(0)
            count["turns"] += 1

    greenlet = gevent.spawn(other)
    gevent.sleep(0)
    yield count
    greenlet.kill()


def test_others_have_their_turns_while_a_long_file_is_parsed(turns):
    found = parse_hosts(BLOCKLIST)
    assert len(found) == 20 * LINES_AT_ONCE
    assert turns["turns"] >= 19


def test_a_name_has_as_many_addresses_as_are_tried(turns):
    lines = [f"10.0.{number >> 8}.{number & 255} many.test\n" for number in range(20_000)]
    lines += [f"2001:db8::{number:x} many.test\n" for number in range(100)]
    lines += ["10.0.0.1 many.test\n"] * 5
    found = parse_hosts("".join(lines))["many.test"]
    assert Counter(ip.version for ip in found) == {4: MOST_ADDRESSES, 6: MOST_ADDRESSES}
    assert found[0] == ipaddress.ip_address("10.0.0.0")
    assert len(set(found)) == len(found)


def watched(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    return path, WatchedFile(str(path), parse_hosts)


def test_all_who_ask_during_the_first_parsing_get_its_result_and_it_is_done_once(tmp_path, monkeypatch):
    parsed = []
    _, file = watched(tmp_path, BLOCKLIST)
    monkeypatch.setattr(file, "_parse", lambda text: parsed.append(1) or parse_hosts(text))
    readers = [gevent.spawn(file.read) for _ in range(5)]
    gevent.joinall(readers, raise_error=True)
    assert {len(reader.value) for reader in readers} == {20 * LINES_AT_ONCE}
    assert parsed == [1]


def test_a_changed_file_keeps_its_old_contents_until_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(name_files, "CHECK_EVERY", 0.0)
    path, file = watched(tmp_path, "10.0.0.1 old.test\n")
    file.read()
    path.write_text(BLOCKLIST)
    parsing = gevent.spawn(file.read)
    gevent.sleep(0)
    began = monotonic()
    assert list(file.read()) == ["old.test"]
    assert monotonic() - began < 1
    assert len(parsing.get()) == 20 * LINES_AT_ONCE
    assert len(file.read()) == 20 * LINES_AT_ONCE


def test_a_reader_that_is_ended_leaves_the_file_to_the_next(tmp_path):
    _, file = watched(tmp_path, BLOCKLIST)
    first, second = gevent.spawn(file.read), gevent.spawn(file.read)
    gevent.sleep(0)
    first.kill()
    assert len(second.get()) == 20 * LINES_AT_ONCE
