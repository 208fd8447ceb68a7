"""Redis servers, and stores in this process, which are gone at the end of a test."""

import pytest

from kit.redis_server import RedisServer, started


@pytest.fixture
def redis_server(tmp_path):
    """`redis_server(*options)` starts a Redis, which is killed after the test."""
    running = []

    def start(*options, **more):
        running.append(RedisServer(tmp_path, *options, **more))
        return running[-1]

    yield start
    for one in running:
        one.kill()


@pytest.fixture
def join():
    """`join(url, **options)` starts a store, which is closed after the test. A Redis on a busy machine is not away."""
    stores = []

    def start(url, **options):
        options.setdefault("timeout", 10.0)
        stores.append(started(url, **options))
        return stores[-1]

    yield start
    for one in stores:
        one.close()
