"""A SOCKS4, SOCKS4a, SOCKS5 and HTTP proxy.

The protocol modules (`socks4`, `socks5`, `sniff`), the names of destinations (`target`) and the rules (`rules`) do no
I/O: they read bytes or text and return values.
"""
