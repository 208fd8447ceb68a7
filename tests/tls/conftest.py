"""Certificates and clients that many tests of TLS use."""

from __future__ import annotations

import pytest

from gtcpserver import (
    TLSConfig,
)
from kit.tls import Files, MemoryClient, client_context


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    files = Files(tmp_path_factory.mktemp("tls"))
    files.server = files.issue("server", "localhost")
    return files


@pytest.fixture
def tls(shared):
    return TLSConfig(*shared.server)


@pytest.fixture
def tls_client(shared, connect, in_thread):
    """`tls_client(server, **options of client_context)` gives a blocking ssl.SSLSocket whose handshake is done."""
    clients = []

    def open_client(server, name="localhost", session=None, context=None, **options):
        context = context or client_context(shared.ca_file, **options)
        sock = connect(server)
        client = in_thread(lambda: context.wrap_socket(sock, server_hostname=name, session=session))
        clients.append(client)
        return client

    yield open_client
    for client in clients:
        client.close()


@pytest.fixture
def memory_client(shared, connect, in_thread):
    """`memory_client(server)` gives a MemoryClient whose handshake is done."""

    def open_client(server, version=None):
        client = MemoryClient(connect(server), client_context(shared.ca_file, version=version))
        in_thread(client.handshake)
        return client

    return open_client
