"""Benchmarks against peers: what a request, a byte, a tunnel or a worker costs, side by side with other servers."""
