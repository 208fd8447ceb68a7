"""Handlers for `gtcpserver serve`: those of examples/http_server.py, with a connection that is kept, or one for each
request.
"""

from __future__ import annotations

from examples.http_server import answer_maker, http_handler

kept = http_handler(answer_maker(1024, 0.0, False, False), keepalive=True, use_idle=False)
each = http_handler(answer_maker(1024, 0.0, False, False), keepalive=False, use_idle=False)
