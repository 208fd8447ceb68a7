"""Servers to compare with: the same handler work on other foundations, one a file.

All take ``--listen HOST:PORT --size BYTES --keepalive/--no-keepalive --timeout SECONDS --tls-cert FILE --tls-key FILE``
as examples/http_server.py does, print "listening on HOST:PORT", and answer the same bytes.
"""
