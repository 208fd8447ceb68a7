"""The files of this directory over HTTP, by sendfile(2); `gtcpserver files` with all its options is the same handler.

python examples/file_server.py [ADDRESS], then: curl -r 0-99 http://127.0.0.1:5000/README.md
"""

from serve import serve

from gtcpserver.static_files import StaticFiles

if __name__ == "__main__":
    serve(StaticFiles(".", listing=True))
