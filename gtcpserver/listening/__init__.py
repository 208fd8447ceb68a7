"""Listening sockets, from option to close: nothing here knows a Connection."""
