"""close_descriptor: the real close(2), also in a monkey-patched program."""

from __future__ import annotations

from collections.abc import Callable

from gevent import monkey

close_descriptor: Callable[[int], None] = monkey.get_original("os", "close")
"""Close a descriptor now.

Since 25.8.1, os.close of a monkey-patched program closes what is no regular file in the event loop's next turn. In a
master that never comes, so that the descriptors of folders, pipes and devices, and locks on them, would stay. Elsewhere
it costs a watcher each, and whoever waits for the end of a pipe waits for that turn.
"""
