"""Benchmarks against peers, and load tests.

bench/ measures what a request, a byte or a tunnel costs, side by side with other servers; load/ has the locustfile;
soak/ looks for what grows in hours of mixed load and faults. None of the three imports another. What they share is
here: local_servers.py, and tcp_user.py, which needs locust alone and can be copied.
"""

import os as _os
import sys as _sys

# As gtcpserver.process.standard_descriptors, without gtcpserver and gevent: the peers' memory is measured.
for _fd, _name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(_sys, _name) is None and _os.open(_os.devnull, _os.O_RDWR) == _fd:
        _os.set_inheritable(_fd, True)
        setattr(_sys, _name, open(_fd, "w" if _fd else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
