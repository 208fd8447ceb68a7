"""The static file server: what RFC 9110 says of files, and nothing outside of the directory."""

import email.utils
import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver import ConfigError, linux
from gtcpserver.static_files import StaticFiles, lookup
from gtcpserver.static_files.request import LONGEST_HEAD, BadRequest, parse_head, wanted_range
from gtcpserver.transfer.disk import in_thread as run_in_thread
from kit.patience import SOON
from kit.waiting import wait_until

BIG = os.urandom(300_000)
MODIFIED = 1_700_000_000
DATE = email.utils.formatdate(MODIFIED, usegmt=True)


@pytest.fixture
def www(tmp_path):
    root = tmp_path / "www"
    (root / "sub").mkdir(parents=True)
    (root / "empty dir").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    for name, content in {
        "index.html": b"<p>home",
        "a.txt": b"0123456789",
        "big.bin": BIG,
        "empty": b"",
        "sub/index.html": b"sub",
        ".hidden": b"hidden",
        "with space & <b>.txt": b"space",
        "naïve.txt": b"utf-8",
        "x.tar.gz": b"gz",
    }.items():
        (root / name).write_bytes(content)
        os.utime(root / name, (MODIFIED, MODIFIED))
    os.mkfifo(root / "fifo")
    (root / "inside").symlink_to("sub/index.html")
    (root / "outside").symlink_to("../secret")
    (root / "absolute").symlink_to(tmp_path / "secret")
    (root / "out").symlink_to("..")
    return root


class Answer:
    def __init__(self, head, body):
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        self.fields = {line.split(": ", 1)[0].lower(): line.split(": ", 1)[1] for line in lines[1:]}
        self.body = body


def read_answer(file, method="GET"):
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = file.readline()
        if not line:
            return None
        head += line
    answer = Answer(head[:-4], b"")
    if method != "HEAD" and answer.status != 304:
        answer.body = file.read(int(answer.fields["content-length"]))
    return answer


@pytest.fixture
def get(serve, connect, in_thread, www):
    """`get(path, method=, fields=, **options)`: one request to a StaticFiles(www, **options)."""
    servers = {}

    def request(path, method="GET", fields=(), **options):
        key = repr(options)
        if key not in servers:
            servers[key] = serve(StaticFiles(www, **options))
        with connect(servers[key]) as client:
            lines = [f"{method} {path} HTTP/1.1", "Host: x", *fields]
            client.sendall("\r\n".join(lines).encode() + b"\r\n\r\n")
            with client.makefile("rb") as file:
                return in_thread(read_answer, file, method)

    request.servers = servers
    return request


def test_a_file_with_what_a_client_should_know_of_it(get):
    answer = get("/a.txt")
    assert (answer.status, answer.body) == (200, b"0123456789")
    assert answer.fields["content-type"] == "text/plain; charset=utf-8"
    assert answer.fields["last-modified"] == DATE
    assert answer.fields["accept-ranges"] == "bytes"
    assert answer.fields["etag"].startswith('"')
    assert email.utils.parsedate_to_datetime(answer.fields["date"])


def test_large_small_and_empty_files_whole(get):
    assert get("/big.bin").body == BIG
    assert get("/empty").body == b""
    assert get("/empty").fields["content-length"] == "0"


def test_head_is_the_same_without_a_body(get):
    full, head = get("/big.bin"), get("/big.bin", "HEAD")
    assert head.body == b""
    full.fields.pop("date"), head.fields.pop("date")
    assert head.fields == full.fields


@pytest.mark.parametrize("path", ["/", "/?q=1", "http://any.host/", "http://any.host", "/sub/..%2f", "/./", "//"])
def test_index(get, path):
    answer = get(path)
    if "%2f" in path:
        assert answer.status == 400
    else:
        assert (answer.status, answer.body) == (200, b"<p>home")
        assert answer.fields["content-type"] == "text/html; charset=utf-8"


def test_a_directory_without_its_slash_is_elsewhere(get):
    answer = get("/sub")
    assert (answer.status, answer.fields["location"]) == (301, "/sub/")
    assert get("/empty%20dir").fields["location"] == "/empty%20dir/"
    assert get("//sub").fields["location"] == "/sub/"  # not //sub/, which is a host
    assert get("/sub/").body == b"sub"


@pytest.mark.parametrize(
    "path", ["/nothing", "/a.txt/", "/a.txt/x", "/sub/nothing", "/" + "x" * 300, "/fifo", "/.hidden"]
)
def test_what_is_not_there(get, path):
    assert get(path).status == 404


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "/../secret",
        "/sub/../../secret",
        "/%2e%2e/secret",
        "/..%2fsecret",
        "/%2e%2e%2fsecret",
        "/sub/%2e./%2e./secret",
        "/outside",
        "/absolute",
        "/out/secret",
        "/out/www/a.txt",
        "/proc/self/root/etc/passwd",
        "//etc/passwd",
        "/..%5csecret",
        "/a.txt%00",
        "/..%c0%afsecret",
        "/....//secret",
    ],
)
@pytest.mark.parametrize("steps", [False, True])
def test_nothing_outside_of_the_directory(get, path, steps, monkeypatch):
    if steps:
        monkeypatch.setattr(linux, "_SYS_OPENAT2", 1_000_000)  # as on a Linux before 5.6
    answer = get(path)
    assert answer.status in (400, 404)
    assert b"secret" not in answer.body


def test_symbolic_links(get, monkeypatch):
    assert get("/inside").body == b"sub"
    assert get("/outside", follow_symlinks=True).body == b"secret"
    monkeypatch.setattr(linux, "_SYS_OPENAT2", 1_000_000)
    assert get("/inside").status == 404
    assert get("/sub/index.html").body == b"sub"


def test_hidden_files_by_option(get):
    assert get("/.hidden", hidden=True).body == b"hidden"


def test_names_that_need_quoting(get):
    assert get("/with%20space%20&%20%3Cb%3E.txt").body == b"space"
    assert get("/na%C3%AFve.txt").body == b"utf-8"


def test_listing(get):
    assert get("/empty%20dir/").status == 403
    assert get("/", index=None).status == 403
    page = get("/", listing=True, index=None).body.decode()
    assert "with space &amp; &lt;b&gt;.txt" in page
    assert '"./with%20space%20%26%20%3Cb%3E.txt"' in page
    assert "hidden" not in page
    assert page.index("sub/") < page.index("a.txt")
    assert '"../"' in get("/empty%20dir/", listing=True).body.decode()


@pytest.mark.parametrize(
    ("asked", "status", "body", "described"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=4-", 206, b"456789", "bytes 4-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=8-100", 206, b"89", "bytes 8-9/10"),
        ("bytes=-100", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=-0", 416, None, "bytes */10"),
        ("bytes=3-1", 200, b"0123456789", None),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
        ("lines=0-1", 200, b"0123456789", None),
    ],
)
def test_ranges(get, asked, status, body, described):
    answer = get("/a.txt", fields=[f"Range: {asked}"])
    assert answer.status == status
    assert answer.fields.get("content-range") == described
    assert body is None or answer.body == body


def test_a_range_of_a_large_file_and_of_an_empty_one(get):
    assert get("/big.bin", fields=["Range: bytes=100000-199999"]).body == BIG[100_000:200_000]
    assert get("/empty", fields=["Range: bytes=0-0"]).status == 416


def test_conditions(get):
    etag = get("/a.txt").fields["etag"]
    later = email.utils.formatdate(MODIFIED + 1, usegmt=True)
    earlier = email.utils.formatdate(MODIFIED - 1, usegmt=True)
    for field, status in {
        f"If-Modified-Since: {DATE}": 304,
        f"If-Modified-Since: {later}": 304,
        f"If-Modified-Since: {earlier}": 200,
        "If-Modified-Since: yesterday": 200,
        f"If-None-Match: {etag}": 304,
        f'If-None-Match: "other", W/{etag}': 304,
        "If-None-Match: *": 304,
        'If-None-Match: "other"': 200,
        f"If-Match: {etag}": 200,
        'If-Match: "other"': 412,
        f"If-Unmodified-Since: {earlier}": 412,
        f"If-Unmodified-Since: {DATE}": 200,
    }.items():
        assert get("/a.txt", fields=[field]).status == status, field
    assert get("/a.txt", fields=['if-none-match: "other"', f"IF-NONE-MATCH:{etag} "]).status == 304  # one list
    both = ['If-None-Match: "other"', f"If-Modified-Since: {later}"]  # RFC 9110 section 13.1.3: the tag counts
    assert get("/a.txt", fields=both).status == 200
    for condition, status in {etag: 206, '"other"': 200, DATE: 206, earlier: 200}.items():
        assert get("/a.txt", fields=["Range: bytes=0-1", f"If-Range: {condition}"]).status == status


def test_content_types(get):
    assert get("/x.tar.gz").fields["content-type"] == "application/gzip"
    assert get("/big.bin").fields["content-type"] == "application/octet-stream"
    assert get("/a.txt", cache_control="max-age=60").fields["cache-control"] == "max-age=60"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n\r\n\r\n", 400),
        (b"GET / HTTP/1.0\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 500 + b"\x7f: c\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\r\n\r\n", 400),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /" + b"x" * 40000, 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 4000, 431),
    ],
)
def test_requests_that_break_the_rules(serve, connect, in_thread, www, head, status):
    client = connect(serve(StaticFiles(www)))
    in_thread(client.sendall, head)
    with client.makefile("rb") as file:
        answer = in_thread(read_answer, file)
        assert answer.status == status
        assert answer.fields["connection"] == "close"
        assert in_thread(file.read) == b""


def test_requests_one_after_another_also_in_one_piece(serve, connect, in_thread, www):
    client = connect(serve(StaticFiles(www)))
    client.sendall(b"\r\nGET /a.txt HTTP/1.1\r\nHost: x\r\n\r\nHEAD /big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
    client.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\nGET /sub/ HTTP/1.0\r\n\r\n")
    with client.makefile("rb") as file:
        answers = [in_thread(read_answer, file, method) for method in ("GET", "HEAD", "GET", "GET")]
        assert [answer.status for answer in answers] == [200, 200, 404, 200]
        assert in_thread(file.read) == b""


def test_a_head_that_drips_is_ended(serve, connect, in_thread, www):
    client = connect(serve(StaticFiles(www, head_timeout=0.1)))
    client.sendall(b"GET / HT")
    with client.makefile("rb") as file:
        assert in_thread(read_answer, file).status == 408


def test_a_silent_connection_is_ended(serve, connect, in_thread, www):
    server = serve(StaticFiles(www, idle_timeout=0.05))
    assert in_thread(connect(server).recv, 100) == b""
    wait_until(lambda: server.stats().timeouts == 1)


def test_a_file_that_is_cut_while_it_is_sent_does_not_end_in_order(serve, connect, in_thread, www):
    with open(www / "long", "wb") as file:
        file.truncate(50_000_000)
    client = connect(serve(StaticFiles(www)))
    client.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
    assert in_thread(client.recv, 1000)
    os.truncate(www / "long", 100_000)

    def read_all():
        total = 0
        while data := client.recv(1 << 20):
            total += len(data)
        return total

    with pytest.raises(ConnectionResetError):
        in_thread(read_all)


def test_what_is_not_in_memory_is_read_by_a_thread(get, www, monkeypatch):
    for name in ("probe", "cold"):
        with open(www / name, "w+b") as file:
            file.write(BIG[:50_000])
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if name == "probe":  # a look at the other one would make the kernel read it
                try:
                    os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
                    pytest.skip("this file system keeps its files in memory")
                except BlockingIOError:
                    pass
                except OSError as error:
                    pytest.skip(f"this file system does not say what is in memory: {error}")
    threads = []

    def noted(function, *arguments):
        threads.append(function)
        return run_in_thread(function, *arguments)

    monkeypatch.setattr(lookup, "in_thread", noted)
    for _ in range(3):
        assert get("/cold").body == BIG[:50_000]
    assert len(threads) == 1


def test_a_link_that_goes_up_is_followed_while_something_is_renamed(www):
    (www / "sub" / "up").symlink_to("../a.txt")
    directory, ended = lookup.Directory(www), threading.Event()

    def rename():
        while not ended.is_set():
            os.rename(www / "empty dir", www / "other")
            os.rename(www / "other", www / "empty dir")
            time.sleep(0)  # not without a pause: an open needs a moment without a rename

    renaming = threading.Thread(target=rename)
    renaming.start()
    try:
        for _ in range(2000):  # the kernel gives up on 40 of them
            os.close(directory.open([b"sub", b"up"]))
    finally:
        ended.set()
        renaming.join()


def test_no_descriptor_stays_open(serve, connect, in_thread, www, get):
    def descriptors():
        # When the sockets of clients are closed too; not the one by which the list is read.
        wait_until(lambda: all(one.stats().active == one.stats().lingering == 0 for one in get.servers.values()))
        return {
            number: os.readlink(path)
            for number in os.listdir("/proc/self/fd")
            if os.path.exists(path := f"/proc/self/fd/{number}")
        }

    paths = ("/a.txt", "/", "/sub", "/nothing", "/fifo", "/outside", "/empty%20dir/")
    get("/a.txt"), get("/a.txt", listing=True)  # two servers, each with its socket and its folder
    before = descriptors()
    for path in paths:
        get(path), get(path, listing=True)
    assert descriptors() == before


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_downloads_resumes_and_asks_for_news(serve, in_thread, www, tmp_path):
    server = serve(StaticFiles(www))
    url = f"http://{server.address}/big.bin"
    part = tmp_path / "part"
    part.write_bytes(BIG[:1234])

    def curl(*arguments):
        return subprocess.run(["curl", "-sS", "-w", "%{http_code}", *arguments], capture_output=True, text=True).stdout

    assert in_thread(curl, "-C", "-", "-o", str(part), url) == "206"
    assert part.read_bytes() == BIG
    assert in_thread(curl, "-z", DATE, "-o", os.devnull, url) == "304"
    assert in_thread(curl, "-r", "-5", "-o", str(part), url) == "206"
    assert part.read_bytes() == BIG[-5:]
    assert in_thread(curl, "-I", "-o", os.devnull, url) == "200"
    assert in_thread(curl, "--http1.0", "-o", os.devnull, url) == "200"


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_over_tls(serve, in_thread, www):
    server = serve(StaticFiles(www), tls=self_signed_config())
    assert in_thread(subprocess.check_output, ["curl", "-sSk", f"https://{server.address}/big.bin"]) == BIG


def self_signed_config():
    from gtcpserver import TLSConfig
    from gtcpserver.tls import self_signed

    made = self_signed()
    return TLSConfig(made.certfile, made.keyfile)


@given(st.binary(max_size=300), st.integers(0, 3))
def test_any_bytes_are_a_request_or_a_bad_one(junk, place):
    head = [b"GET /a HTTP/1.1", b"Host: x", b"Range: bytes=0-1"]
    head.insert(place, junk)
    for text in (junk, b"\r\n".join(head)):
        with suppress(BadRequest):
            parse_head(text).path  # noqa: B018


@given(st.text(max_size=30), st.integers(0, 50))
def test_any_range_lies_in_the_file(text, size):
    for value in (text, f"bytes={text}"):
        with suppress(BadRequest):
            part = wanted_range({"range": value}, size, '"e"', 0)
            assert part is None or (part[0] >= 0 and part[1] >= 1 and sum(part) <= size)


@pytest.mark.slow
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 60))
def test_ranges_are_what_slices_are(first, last, size):
    content = bytes(range(size))
    try:
        part = wanted_range({"range": f"bytes={first}-{last}"}, size, '"e"', 0)
    except BadRequest:
        assert content[first : last + 1] == b""
        return
    assert (part is None and last < first) or content[first : last + 1] == content[part[0] : sum(part)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"directory": "/no/such"},
            "directory must be one that can be read, got '/no/such': No such file or directory",
        ),
        ({"directory": __file__}, "Not a directory"),
        ({"index": "a/b"}, "index must be the name of a file, got 'a/b'"),
        ({"cache_control": "a\r\nb"}, "cache_control must be printable ASCII"),
        ({"head_timeout": 0}, "head_timeout must be"),
        ({"idle_timeout": None}, "idle_timeout must be"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ConfigError) as raised:
        StaticFiles(**options)
    assert message in str(raised.value)


@pytest.mark.slow
def test_the_command(in_thread, www):
    command = [sys.executable, "-m", "gtcpserver", "files", str(www), "--bind", "127.0.0.1:0", "--log-requests"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = int(re.search(r"listening on 127\.0\.0\.1:(\d+)", in_thread(process.stderr.readline))[1])
            with socket.create_connection(("127.0.0.1", port), SOON) as client:
                client.sendall(b"GET /a.txt HTTP/1.1\r\nHost: x\r\n\r\n")
                with client.makefile("rb") as file:
                    assert read_answer(file).body == b"0123456789"
                assert in_thread(process.stderr.readline).endswith('127.0.0.1 "GET /a.txt" 200 10\n')
                process.send_signal(signal.SIGTERM)
                assert in_thread(process.wait) == 0
        finally:
            process.kill()
    done = subprocess.run([*command[:4], "/no/such"], capture_output=True, text=True, timeout=SOON)
    assert (done.returncode, done.stderr) == (
        2,
        "gtcpserver: directory must be one that can be read, got '/no/such': No such file or directory\n",
    )


def test_the_longest_head_is_served(serve, connect, in_thread, www):
    client = connect(serve(StaticFiles(www)))
    head = b"GET /a.txt HTTP/1.1\r\nHost: x\r\n"
    in_thread(client.sendall, head + b"A: " + b"b" * (LONGEST_HEAD - len(head) - 7) + b"\r\n\r\n")
    with client.makefile("rb") as file:
        assert in_thread(read_answer, file).status == 200


def opened_here(path):
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of listdir itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found.count(str(path))


def test_a_handler_that_is_no_longer_used_keeps_no_directory_open(www):
    handler = StaticFiles(str(www))
    assert opened_here(www) == 1
    del handler
    gc.collect()
    assert opened_here(www) == 0
