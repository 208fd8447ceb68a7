"""Listening sockets, from option to close. This room does not know what a Connection is."""
