"""What tests ask a resolver."""

import socket

import pytest


def found(one, host):
    return " ".join(map(str, one.resolve(host)))


def refused(one, host, error=socket.gaierror):
    with pytest.raises(error) as raised:
        one.resolve(host)
    return raised.value
