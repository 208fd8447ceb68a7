"""The pytest plugin of gtcpserver.testing: gtcp_serve, gtcp_connect, gtcp_tls, gtcp_in_thread.

pytest imports it in every project whose environment has gtcpserver, so it is a module of its own, outside of the
package: that one imports gevent, which only tests shall pay for that use a fixture. (And a test suite that measures
coverage, or patches the standard library first, must not find the package imported already.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gtcpserver.testing import Certificates, Client, ServerUnderTest


@pytest.fixture
def gtcp_serve() -> Iterator[Callable[..., ServerUnderTest]]:
    """``gtcp_serve(handler, **options)`` starts a server on a free port; see ``gtcpserver.testing.serving``.

    The test fails at its end if a handler raised (unless ``allow_errors=True``) or would not end.
    """
    from gtcpserver.testing import serving

    with ExitStack() as servers:
        yield lambda handler, *address, **options: servers.enter_context(serving(handler, *address, **options))


@pytest.fixture
def gtcp_connect(gtcp_serve: Any) -> Iterator[Callable[..., Client]]:
    """``gtcp_connect(server, **options)`` gives a client; see ``gtcpserver.testing.connect``. It is closed at the end
    of the test, before the servers stop."""
    from gtcpserver.testing import connect

    with ExitStack() as clients:
        yield lambda server, **options: clients.enter_context(connect(server, **options))


@pytest.fixture(scope="session")
def gtcp_tls() -> Iterator[Certificates]:
    """Certificates (needs trustme): ``gtcp_serve(handler, tls=gtcp_tls.server)``, ``gtcp_connect(server,
    tls=gtcp_tls.client)``; see ``gtcpserver.testing.Certificates``."""
    from gtcpserver.testing import certificates

    with certificates() as made:
        yield made


@pytest.fixture
def gtcp_in_thread() -> Callable[..., Any]:
    """``gtcp_in_thread(function, *arguments)`` runs a client that blocks; see ``gtcpserver.testing.in_thread``."""
    from gtcpserver.testing import in_thread

    return in_thread
