"""How many certificates a server has, and when the first of them expires: for metrics and the status page."""

import time
from datetime import datetime, timedelta, timezone

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from gtcpserver import Server, TLSConfig
from gtcpserver.monitoring.metrics import encode
from gtcpserver.monitoring.source import FromServer
from gtcpserver.monitoring.watch import Watch
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.supervisor.messages import checked_stats
from gtcpserver.supervisor.totals import add_up
from kit.tls import Files

DAY = 86400


def told(server):
    """The metrics: (number of certificates, days until the first one expires; None: no such sample)."""
    watch = Watch(server)
    try:
        status = FromServer(server, watch).status()
    finally:
        watch.close()
    samples = {one.name: one.value for family in parse(encode(status, "1.0", "")[0].decode()) for one in family.samples}
    ends = samples.get("gtcpserver_certificate_expiration_timestamp_seconds")
    return samples["gtcpserver_certificates"], None if ends is None else round((ends - time.time()) / DAY)


def handle(conn):
    pass


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_none_without_tls():
    assert told(Server("127.0.0.1:0", handle)) == (0, None)


def test_the_first_that_expires_and_each_pair_once(files):
    soon = datetime.now(timezone.utc) + timedelta(days=9)
    one, two = files.issue("one", "localhost"), files.issue("two", "example.com", not_after=soon)
    tls = TLSConfig(*one, sni={"example.com": two, "www.example.com": two})
    assert told(Server("127.0.0.1:0", handle, tls=tls)) == (2, 9)


class Other:
    """A handler whose attribute has that name by chance."""

    tls_credentials = 7

    def __call__(self, conn):
        pass


def test_another_attribute_of_that_name_is_not_asked():
    assert told(Server("127.0.0.1:0", Other())) == (0, None)


def test_those_of_a_proxys_listener(files):
    handler = ProxyHandler(Gate(), tls=TLSConfig(*files.issue("one", "localhost")))
    assert told(Server("127.0.0.1:0", handler))[0] == 1


def test_what_a_worker_tells_is_checked_and_not_added_up():
    stats = checked_stats({"certificates": 2, "certificate_expires_at": 1e9, "accepted": 1})
    assert stats["certificate_expires_at"] == 1e9
    assert checked_stats({"certificates": "x", "certificate_expires_at": float("inf")}) == {}
    assert add_up([stats, stats]) == {"accepted": 2}
