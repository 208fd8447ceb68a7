from collections.abc import Iterator

import pytest

from gtcpserver.transfer.pipes import PIPES


@pytest.fixture(autouse=True)
def pipes_are_given() -> Iterator[None]:
    """Forget that pipes were refused in the test before, in whichever file: for 10 s the bytes would be copied."""
    PIPES._refused_at = -10.0  # noqa: SLF001  nothing else forgets it
    yield
    PIPES._refused_at = -10.0  # noqa: SLF001
