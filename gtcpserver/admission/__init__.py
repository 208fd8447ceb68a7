"""What happens between accept and handler: PROXY header, limits, TLS handshake, and the wait for a place."""
