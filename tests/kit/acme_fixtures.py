"""Fixtures of the tests that talk to an ACME authority: pebble, and the front that a test makes moody (kit/acme.py)."""

import pytest


@pytest.fixture(scope="module")
def pebble(tmp_path_factory):
    from kit.acme import Pebble  # it needs the extra

    pebble = Pebble(tmp_path_factory.mktemp("pebble"))
    yield pebble
    pebble.stop()


@pytest.fixture
def front(pebble):
    from kit.acme import Front

    front = Front(pebble)
    yield front
    front.stop()
