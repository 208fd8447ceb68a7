"""HTTP/1.1 heads and chunked bodies, without I/O (RFC 9112)."""
