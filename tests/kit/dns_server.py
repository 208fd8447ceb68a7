"""A name server on loopback, of dnspython's messages: UDP and TCP on one port. It can be slow, silent and hostile."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import gevent
import gevent.server
import gevent.socket
from dns.rdatatype import RdataType

SILENT = object()


class DnsServer:
    """Answers from `records`, or with what a function in `tricks` makes of the query.

    Attributes:
        records: (name, type) -> (TTL, values); a CNAME is followed. "" values: the name exists, without this type.
        negative: TTL and minimum of the SOA in negative answers; None: they have no SOA.
        tricks: name -> function(query, by_tcp) that returns a message, bytes, several bytes, or SILENT.
        asked: (name, type) of each query; `sources` its (port, ID), `by_tcp` whether it came over TCP.
    """

    def __init__(self):
        self.records, self.tricks = {}, {}
        self.negative = (30, 30)
        self.asked, self.sources, self.by_tcp = [], [], []
        while True:
            self._udp = gevent.socket.socket(type=gevent.socket.SOCK_DGRAM)
            self._udp.bind(("127.0.0.1", 0))
            self.port = self._udp.getsockname()[1]
            self._tcp = gevent.server.StreamServer(("127.0.0.1", self.port), self._serve_tcp)
            try:
                self._tcp.start()
                break
            except OSError:  # the port is taken
                self._udp.close()
        self.address = f"127.0.0.1:{self.port}"
        self._greenlet = gevent.spawn(self._serve_udp)

    def add(self, name, type_, *values, ttl=60):
        self.records[name, type_] = (ttl, values)

    def stop(self):
        self._greenlet.kill()
        self._udp.close()
        self._tcp.stop()

    def _serve_udp(self):
        while True:
            data, source = self._udp.recvfrom(65535)
            answer = self._answer(data, source, False)
            if answer is SILENT:
                continue
            for message in answer if isinstance(answer, list) else [answer]:
                self._udp.sendto(message if isinstance(message, bytes) else message.to_wire(), source)

    def _serve_tcp(self, sock, source):
        size = int.from_bytes(sock.recv(2), "big")
        answer = self._answer(sock.recv(size), source, True)
        if answer is SILENT:
            gevent.sleep(60)
        if not isinstance(answer, bytes):
            answer = answer.to_wire()
            answer = len(answer).to_bytes(2, "big") + answer
        sock.sendall(answer)

    def _answer(self, data, source, by_tcp):
        query = dns.message.from_wire(data)
        name = query.question[0].name.to_text(omit_final_dot=True)
        self.asked.append((name, RdataType.to_text(query.question[0].rdtype)))
        self.sources.append((source[1], query.id))
        self.by_tcp.append(by_tcp)
        if name in self.tricks:
            return self.tricks[name](query, by_tcp)
        return self.answer(query)

    def answer(self, query):
        """Return the regular answer."""
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.RA
        question = query.question[0]
        name, type_ = question.name.to_text(omit_final_dot=True), RdataType.to_text(question.rdtype)
        while (name, type_) not in self.records and (name, "CNAME") in self.records:
            ttl, values = self.records[name, "CNAME"]
            reply.answer.append(dns.rrset.from_text(name + ".", ttl, "IN", "CNAME", *values))
            name = values[0].removesuffix(".")
        ttl, values = self.records.get((name, type_), (0, ()))
        if values:
            reply.answer.append(dns.rrset.from_text(name + ".", ttl, "IN", type_, *values))
            return reply
        if not any(known == name for known, _ in self.records):
            reply.set_rcode(dns.rcode.NXDOMAIN)
        if self.negative is not None:
            ttl, minimum = self.negative
            zone = name.rpartition(".")[2] + "."
            soa = dns.rrset.from_text(zone, ttl, "IN", "SOA", f"ns.{zone} root.{zone} 1 2 3 4 {minimum}")
            reply.authority.append(soa)
        return reply

    def fail(self, query, by_tcp=False):
        """Answer SERVFAIL; one for `tricks`."""
        reply = dns.message.make_response(query)
        reply.set_rcode(dns.rcode.SERVFAIL)
        return reply

    def truncate(self, query, by_tcp):
        """Answer over TCP alone; one for `tricks`."""
        reply = self.answer(query)
        if not by_tcp:
            reply.answer.clear()
            reply.flags |= dns.flags.TC
        return reply
