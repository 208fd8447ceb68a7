"""Requests that two readers could read in two ways: one table for every HTTP server and the proxy.

Each head is one that must be refused, with an answer that ends the connection; each chunked body is one that must end
neither for an application nor for an origin.
"""

#: The forms of Transfer-Encoding that one reader takes for "chunked" and another one does not.
DISGUISES = [
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding\t:chunked",
    b"Transfer-Encoding:\x0bchunked",
    b"Transfer-Encoding:\x0cchunked",
    b"Transfer-Encoding: \x00chunked",
    b"Transfer-Encoding: chunked\x00",
    b"Transfer-Encoding: chunked\x0b",
    b"Transfer-Encoding: chunked\x7f",
    b"Transfer-Encoding:\xa0chunked",
    b'Transfer-Encoding: "chunked"',
    b"Transfer-Encoding: 'chunked'",
    b"Transfer-Encoding: chunked;a=b",
    b"Transfer-Encoding: chunked,",
    b"Transfer-Encoding: ,chunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: identity, chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunke\xc4",
    b"Transfer-Encoding:",
    b"Transfer-Encoding:\r\n chunked",
    b"Transfer-Encoding:\n chunked",
    b"Transfer-Encoding\r\n : chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    b"Transfer-Encoding: identity\r\ntransfer-encoding: chunked",
    b" Transfer-Encoding: chunked",
    b"\tTransfer-Encoding: chunked",
    b"\x0bTransfer-Encoding: chunked",
    b"\x00Transfer-Encoding: chunked",
    b"A: b\rTransfer-Encoding: chunked",
    b"A: b\nTransfer-Encoding: chunked",
    b"A: b\r\rTransfer-Encoding: chunked",
    b"A\r\nTransfer-Encoding: chunked",
    b"(Transfer-Encoding): chunked",
    b"Transfer-Encoding chunked",
]

LENGTHS = [
    b"Content-Length: 5\r\nContent-Length: 50",
    b"Content-Length: 5\r\ncontent-length: 5",
    b"Content-Length: 5, 5",
    b"Content-Length: 5, 50",
    b"Content-Length: 5,",
    b"Content-Length: 5;a",
    b"Content-Length: +5",
    b"Content-Length: -0",
    b"Content-Length: 0x5",
    b"Content-Length: 5.0",
    b"Content-Length: 5e0",
    b"Content-Length: 1_0",
    b"Content-Length: 0_5",
    b"Content-Length: 5 0",
    b"Content-Length: 5\t0",
    b"Content-Length: 5\x0b",
    b"Content-Length: \x0c5",
    b"Content-Length: 5\x00",
    b"Content-Length: \xb2",  # a superscript two: a digit for str.isdigit()
    b"Content-Length: \xd9\xa5",  # an Arabic five, in UTF-8
    b'Content-Length: "5"',
    b"Content-Length:",
    b"Content-Length: 9223372036854775808",
    b"Content-Length: 18446744073709551621",  # 5, for those who count in 64 bits
    b"Content-Length : 5",
    b"Content-Length\t: 5",
    b"Content-Length\xa0: 5",
    b"Content-Length\x00: 5",
    b" Content-Length: 5",
    b"A: b\r\n Content-Length: 5",
    b"A: b\rContent-Length: 5",
    b"A: b\nContent-Length: 5",
    b"Content-Length: 5\nA: b",
    b"Content-Length: 5\r\r\nA: b",
    b"Content-Length:\r\n 5",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    b"Content-Length: 0\r\nTransfer-Encoding: chunked",
    b"Content-Length: 5\r\nTransfer-Encoding: identity",
]

REQUEST_LINES = [
    b"POST %b/ HTTP/1.1 ",
    b"POST  %b/ HTTP/1.1",
    b"POST\t%b/ HTTP/1.1",
    b"POST %b/ HTTP/1.1\r",
    b" POST %b/ HTTP/1.1",
    b"POST %b/ http/1.1",
    b"POST %b/ HTTP/1.1x",
    b"POST %b/ HTTP/01.1",
    b"POST %b/ HTTP/1.10",
    b"POST %b/ HTTP/1",
    b"POST %b/ HTTP/2.0",
    b"POST %b/ HTTP/0.9",
    b"POST %b/",
    b"POST %b/ x HTTP/1.1",
    b"POST %b/\x00 HTTP/1.1",
    b"POST %b/\xff HTTP/1.1",
    b"POST %b/\n HTTP/1.1",
    b"POST %b/\rX: HTTP/1.1",
    b"POST %b/ HTTP/1.1\nHost: y",
    b"PO ST %b/ HTTP/1.1",
    b"P(O)ST %b/ HTTP/1.1",
    b"POST\x00 %b/ HTTP/1.1",
    b"CONNECT %b/ HTTP/1.1",
    b"PRI * HTTP/2.0",
    b"\rPOST %b/ HTTP/1.1",
    b"\nPOST %b/ HTTP/1.1",
    b"\r\r\nPOST %b/ HTTP/1.1",
    b"\r\n\nPOST %b/ HTTP/1.1",
]

#: What a proxy is asked for by its whole URL only.
REQUEST_LINES_OF_ORIGINS = [b"POST / HTTP/1.1", b"POST //127.0.0.1/ HTTP/1.1"]

OTHER_FIELDS = [
    *(b"Host: y", b"Host : y", b" Host: y", b": y", b"A", b"A b: c", b"\xc4: b", b"A: \x01", b"A:\x7f"),
    *(b"A\x00: b", b"A\x00b: c", b"A: b\x00", b"A:\x00"),
]

SMUGGLED = b"GET %b/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

BAD_CHUNKS = [
    b"5\nhello\r\n0\r\n\r\n",
    b"5\rhello\r\n0\r\n\r\n",
    b"5\r\nhello0\r\n\r\n",
    b"5\r\nhello\n0\r\n\r\n",
    b"5\r\nhello\r\r\n0\r\n\r\n",
    b"5\r\nhello, world\r\n0\r\n\r\n",
    b"0x5\r\nhello\r\n0\r\n\r\n",
    b"+5\r\nhello\r\n0\r\n\r\n",
    b"-5\r\nhello\r\n0\r\n\r\n",
    b" 5\r\nhello\r\n0\r\n\r\n",
    b"5 \r\nhello\r\n0\r\n\r\n",
    b"5_0\r\nhello\r\n0\r\n\r\n",
    b"\r\n0\r\n\r\n",
    b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    b"10000000000000005\r\nhello\r\n0\r\n\r\n",  # 5, for those who count in 64 bits
    b"ffffffffffffffff\r\nhello",
    b"5;a\x00b\r\nhello\r\n0\r\n\r\n",
    b"5;a\nhello\r\n0\r\n\r\n",
    b"5;a\r5\r\nhello\r\n0\r\n\r\n",
    b"5;" + b"x" * 9000 + b"\r\nhello\r\n0\r\n\r\n",
    b"1;%b\r\na\r\n" % (b"x" * 4000) * 5 + b"0\r\n\r\n",
    b"0\r\nA : b\r\n\r\n",
    b"0\r\n A: b\r\n\r\n",
    b"0\r\nA: b\nC: d\r\n\r\n",
    b"0\r\nA\r\n\r\n",
    b"0\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    b"0\n\r\n",
    b"0\r\n\n",
]


def heads(url):
    """Requests that must not reach the origin, and whose bodies, for one of their readers, are requests.

    They lack the empty line. `url` stands before each path: of the origin behind a proxy, b"" for an origin.
    """
    for line in REQUEST_LINES + (REQUEST_LINES_OF_ORIGINS if url else []):
        yield (line % url if b"%b" in line else line) + b"\r\nHost: x\r\nContent-Length: 5"
    for fields in [*DISGUISES, *LENGTHS, *OTHER_FIELDS]:
        yield b"POST %b/ HTTP/1.1\r\nHost: x\r\n%b" % (url, fields)
        yield b"POST %b/ HTTP/1.1\r\n%b\r\nHost: x\r\nContent-Type: a" % (url, fields)
    for disguise in DISGUISES:
        yield b"POST %b/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n%b" % (url, disguise)
        yield b"POST %b/ HTTP/1.1\r\nHost: x\r\n%b\r\nTransfer-Encoding: chunked" % (url, disguise)
        yield b"POST %b/ HTTP/1.0\r\nHost: x\r\n%b" % (url, disguise)
    yield b"POST %b/ HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked" % url
    yield b"POST %b/ HTTP/1.1\nHost: x\nContent-Length: 5\n" % url
    yield b"POST %b/ HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n" % url
    yield b"POST %b/ HTTP/1.1\r\nContent-Length: 5" % url
    for method in (b"CONNECT 127.0.0.1:1", b"TRACE %b/" % url):
        yield b"%b HTTP/1.1\r\nHost: x\r\nContent-Length: 5" % method
        yield b"%b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked" % method
