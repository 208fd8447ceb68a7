"""Serve the files of this directory over HTTP, with sendfile(2); `gtcpserver files` is the same handler, with options.

python examples/file_server.py [ADDRESS], then: curl -r 0-99 http://127.0.0.1:5000/README.md
"""

import sys

from gtcpserver import run
from gtcpserver.static_files import StaticFiles

if __name__ == "__main__":
    run(StaticFiles(".", listing=True), *sys.argv[1:])
