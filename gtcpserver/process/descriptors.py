"""close_descriptor: the real close(2), even in a monkey-patched program."""

from __future__ import annotations

from collections.abc import Callable

from gevent import monkey

#: Close a descriptor now.
#:
#: Since 25.8.1, os.close of a monkey-patched program closes anything but regular files in the event loop's next turn. A
#: master never has one, so descriptors of folders, pipes and devices, and locks on them, would stay. Elsewhere it costs
#: a watcher each, and the reader of a pipe sees its end only after that turn.
close_descriptor: Callable[[int], None] = monkey.get_original("os", "close")
