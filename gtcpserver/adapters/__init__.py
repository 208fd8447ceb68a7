"""Run existing code on our server: handler classes of the standard library's socketserver, and WSGI applications.

    Server("127.0.0.1:8000", from_socketserver(http.server.SimpleHTTPRequestHandler)).serve_forever()
    Server("127.0.0.1:8000", from_wsgi(app)).serve_forever()

They run unchanged, each connection in a greenlet. Patch the standard library first (``gevent.monkey.patch_all()``;
``gtcpserver serve`` does), so that their blocking calls wait on the event loop.
"""

from .socketserver import SocketServerHandler, from_socketserver
from .wsgi import WSGIHandler, from_wsgi

__all__ = ["SocketServerHandler", "WSGIHandler", "from_socketserver", "from_wsgi"]
