"""redis-py in a handler: a queue at which many clients wait.

    python examples/redis_queue.py [ADDRESS], then: printf 'PUT hello\\nTAKE\\n' | nc -N 127.0.0.1 5000

redis-py is plain Python on sockets, so ``patch_all`` is all it needs: TAKE waits in Redis (BLPOP) for up to a few
seconds, and delays nobody. Each waiting client has a connection to Redis; the pool limits their number and makes others
wait their turn. REDIS_URL names another Redis: redis://host:6379/0, unix:///run/redis/redis.sock. Needs ``pip install
redis``.
"""
# ruff: noqa: E402

from gevent import monkey

monkey.patch_all()

import os
import sys

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gtcpserver import Connection, EarlyEOF, run

URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
QUEUE = "gtcpserver-example"

#: Connections to Redis, and seconds to wait for one of them.
POOL_SIZE, POOL_TIMEOUT = 100, 10

#: Seconds of one TAKE. Only when it ends, a client that has gone is noticed.
LONGEST_WAIT = 5


def handle(conn: Connection) -> None:
    queue: redis.Redis = conn.context
    while True:
        try:
            with conn.idle():
                command, _, text = conn.recv_until(b"\n", 1024).strip().partition(b" ")
            match command:
                case b"PUT" if text:
                    conn.sendall(b"QUEUED %d\n" % queue.rpush(QUEUE, text))
                case b"TAKE":
                    found = queue.blpop([QUEUE], LONGEST_WAIT)
                    conn.sendall(b"NONE\n" if found is None else b"TOOK " + found[1] + b"\n")
                case _:
                    conn.sendall(b"ERROR expected PUT text or TAKE\n")
                    return
        except EarlyEOF:
            return
        except redis.RedisError as problem:
            conn.sendall(f"ERROR {problem}\n".encode())
            return


if __name__ == "__main__":
    # No second attempt: if the answer was lost, Redis may have executed the command, and PUT would queue it twice.
    once = Retry(NoBackoff(), 0)
    pool = redis.BlockingConnectionPool.from_url(URL, max_connections=POOL_SIZE, timeout=POOL_TIMEOUT, retry=once)
    queue = redis.Redis(connection_pool=pool)
    try:
        queue.ping()
    except redis.RedisError as problem:
        sys.exit(f"no redis at {URL}: {problem}")
    run(handle, *sys.argv[1:], context=queue)
