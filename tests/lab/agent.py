"""The lab's hands inside a namespace: one JSON request a line on stdin, one JSON reply a line on stdout.

Started once per namespace, so that a connection is measured without the start of a process. Standard library only.
Names are resolved by the system's resolver library (resolv.conf of the mount namespace), as any program does it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from ipaddress import ip_address
from pathlib import Path
from typing import Any

Reply = dict[str, Any]

_REFUSED = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EPERM}  # EPERM: by connect(2) itself
_A, _AAAA = 1, 28
# Whoever is at the other end; a daemon that is just starting listens before it answers.
_ANSWER_SECONDS = 2 * float(os.environ.get("LAB_PATIENCE", "1"))


# Whom a request asks for that goes to an address, not to a name; nobody at addresses that no rule knows.
_UNLISTED = ("198.18.66.", "2001:2:0:66:")
_HOST_OF_PORT = {5000: "plain.allowed.test", 8443: "alt.allowed.test"}


_UNANSWERED = "connected, and no answer"


def attempt(address: str, port: int, timeout: float, mark: int = 0, host: str | None = None) -> Reply:
    """One TCP connection of a socket that sets its own mark first, and a request to see who is at its other end.

    The request is for `host`; None: for a registry that the lab's policy allows on this port.
    Reply: verdict (reached, refused, timed out, error), seconds, address, message, and the socket's mark then.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    started = time.monotonic()
    verdict, message, seconds = "reached", "", 0.0
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            if mark:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
            connection.connect((address, port))
            seconds = time.monotonic() - started
            if host is None and not address.startswith(_UNLISTED):
                host = _HOST_OF_PORT.get(port, "registry.allowed.test")
            answer = _reply_to(connection, host)
            if answer.startswith(b"HTTP/1.1 403 "):  # the enforcer's: servers of TLS and of anything else say no 403
                verdict, message = "refused", "403 Forbidden"
            else:
                message = answer[:64].decode("ascii", "replace") or _UNANSWERED
        except TimeoutError:
            verdict, message = "timed out", "no answer to the SYN"
        except OSError as error:
            verdict = "refused" if error.errno in _REFUSED else "error"
            message = error.strerror or str(error)
        seconds = seconds or time.monotonic() - started
        mark = connection.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
    return {"verdict": verdict, "seconds": seconds, "address": address, "message": message, "mark": mark}


def _reply_to(connection: socket.socket, host: str | None) -> bytes:
    """What whoever has taken this connection says to a request; nothing if he says nothing in time, or ends it."""
    connection.settimeout(_ANSWER_SECONDS)
    field = "" if host is None else f"Host: {host}\r\n"
    connection.sendall(f"GET / HTTP/1.0\r\n{field}\r\n".encode())
    try:
        return connection.recv(4096)
    except TimeoutError:
        return b""


def resolve(name: str, family: int = 0) -> list[str]:
    """The addresses of a name, in the resolver library's order; OSError if there is none."""
    families = {0: socket.AF_UNSPEC, 4: socket.AF_INET, 6: socket.AF_INET6}
    return [str(found[4][0]) for found in socket.getaddrinfo(name, 0, families[family], socket.SOCK_STREAM)]


def connect(name: str, port: int, family: int = 0, timeout: float = 5) -> Reply:
    """Resolve, then connect at once to the first address; `seconds` is the connection alone."""
    try:
        addresses = resolve(name, family)
    except OSError as error:
        return {"verdict": "error", "seconds": 0.0, "address": "", "message": f"{name}: {error.strerror}"}
    return attempt(addresses[0], port, timeout, host=name)


def connect_each(names: list[str], port: int, families: list[int], timeout: float = 5) -> list[Reply]:
    """`connect` for each name in turn; the families alternate."""
    return [connect(name, port, families[i % len(families)], timeout) for i, name in enumerate(names)]


def connections_per_second(address: str, port: int, count: int) -> float:
    """Connections that each send a real client's hello and are answered, one after the other."""
    hello = _hello("registry.allowed.test")
    linger = struct.pack("ii", 1, 0)  # a reset at the end: ports in TIME_WAIT would run out
    started = time.monotonic()
    for _ in range(count):
        with socket.create_connection((address, port), timeout=5) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.sendall(hello)
            if not connection.recv(64).startswith(b"HTTP/1.1 200"):
                raise ConnectionError("not the small internet's answer")
    return count / (time.monotonic() - started)


def storm(address: str, port: int, seconds: float, window: int = 64) -> Reply:
    """As many connections as there is time for, `window` at once, each closed when it is there; `failed` says why."""
    linger = struct.pack("ii", 1, 0)
    made, failed = 0, dict[str, int]()
    opening: dict[int, tuple[socket.socket, float]] = {}
    started = now = time.monotonic()
    with select.epoll() as ready:
        while opening or now < started + seconds:
            while len(opening) < window and now < started + seconds:
                connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.connect_ex((address, port))
                ready.register(connection, select.EPOLLOUT)
                opening[connection.fileno()] = connection, now
            told = {number for number, _ in ready.poll(1)}
            now = time.monotonic()
            late = {number for number, (_, began) in opening.items() if now - began > 3}
            for number in told | late:
                connection, _ = opening.pop(number)
                error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if number in told else errno.ETIMEDOUT
                connection.close()
                if error:
                    why = errno.errorcode[error]
                    failed[why] = failed.get(why, 0) + 1
                else:
                    made += 1
    return {"made": made, "failed": failed, "seconds": now - started}


def _hello(name: str) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


_held: dict[str, socket.socket] = {}
_hosts: dict[str, str] = {}


def hold(key: str, name: str, port: int) -> Reply:
    """Open a connection and keep it for `talk`."""
    _held[key] = socket.create_connection((name, port), timeout=5)
    _hosts[key] = name
    return {}


def drop(key: str) -> None:
    """Close a connection that `hold` opened."""
    _held.pop(key).close()


def talk(key: str) -> Reply:
    """Speak HTTP over a held connection, once, and close it."""
    started = time.monotonic()
    verdict, message = "error", "closed without an answer"
    with _held.pop(key) as connection:
        connection.settimeout(5)
        try:
            connection.sendall(f"GET /v2/ HTTP/1.0\r\nHost: {_hosts[key]}\r\n\r\n".encode())
            if answer := connection.recv(4096):
                verdict, message = "reached", answer.split(b"\r\n")[0].decode()
        except TimeoutError:
            verdict, message = "timed out", "no answer"
        except OSError as error:
            verdict = "refused" if error.errno in _REFUSED else "error"
            message = error.strerror or str(error)
    return {"verdict": verdict, "seconds": time.monotonic() - started, "address": "", "message": message}


def send_datagram(address: str, port: int) -> str:
    """Send one UDP packet; the name of the error that came back, empty if none came within a second."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sending:
        sending.settimeout(1)
        sending.connect((address, port))
        try:
            sending.send(b"\0")
            sending.recv(1)
        except TimeoutError:
            return ""
        except OSError as error:
            return errno.errorcode[error.errno or 0]
    return ""


def http_get(address: str, port: int, path: str) -> Reply:
    """A plain HTTP resource."""
    connection = HTTPConnection(address, port, timeout=5)
    connection.request("GET", path)
    response = connection.getresponse()
    reply = {"status": response.status, "body": response.read().decode()}
    connection.close()
    return reply


# --- DNS by hand -----------------------------------------------------------------------------------------------------
def _question(name: str, record_type: int) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split("."))
    return labels + struct.pack("!BHH", 0, record_type, 1)


def _query(name: str, transaction_id: int) -> bytes:
    return struct.pack("!HHHHHH", transaction_id, 0x0100, 1, 0, 0, 0) + _question(name, _A)


def _answer(name: str, transaction_id: int, address: str) -> bytes:
    packed = ip_address(address).packed
    record_type = _A if len(packed) == 4 else _AAAA
    record = struct.pack("!HHHIH", 0xC00C, record_type, 1, 3600, len(packed)) + packed
    return struct.pack("!HHHHHH", transaction_id, 0x8180, 1, 1, 0, 0) + _question(name, record_type) + record


_asked: dict[int, socket.socket] = {}


def ask(server: str, name: str, transaction_id: int, source_port: int) -> Reply:
    """Send an A query from a port of our choice and do not wait; the socket stays open until `hang_up`."""
    asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asking.bind(("0.0.0.0", source_port))
    asking.sendto(_query(name, transaction_id), (server, 53))
    _asked[source_port] = asking
    return {}


def hang_up(source_port: int) -> Reply:
    """Close the socket of `ask`; `received` says how many packets it got."""
    asking = _asked.pop(source_port)
    asking.setblocking(False)
    received = 0
    with asking:
        while select.select([asking], [], [], 0)[0]:
            asking.recv(4096)
            received += 1
    return {"received": received}


def forge(
    source: str, destination: str, source_port: int, destination_port: int, transaction_id: int, name: str, address: str
) -> Reply:
    """Send an answer that nobody asked us for, from an IPv4 address that need not be ours."""
    payload = _answer(name, transaction_id, address)
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    udp = struct.pack("!HHHH", source_port, destination_port, 8 + len(payload), 0)  # 0: no checksum (RFC 768)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp) + len(payload), 0, 0, 64, socket.IPPROTO_UDP, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(header + addresses + udp + payload, (destination, 0))
    return {}


def replace_file(path: str, text: str) -> Reply:
    """Rename a new file over the one that is there."""
    new = Path(f"{path}.new")
    new.write_text(text)
    new.replace(path)
    return {}


def send_from(source: str, source_port: int, destination: str, destination_port: int, payload: str) -> Reply:
    """Send a UDP packet from an address that need not be ours: what that takes is the right to the port alone."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        sending.setsockopt(socket.SOL_IP, 15, 1)  # IP_FREEBIND
        sending.bind((source, source_port))
        sending.sendto(bytes.fromhex(payload), (destination, destination_port))
    return {}


def send_packet(packet: str) -> Reply:
    """Send a whole IPv4 packet, in hexadecimal, to where its header says."""
    wire = bytes.fromhex(packet)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(wire, (socket.inet_ntoa(wire[16:20]), 0))
    return {}


def exchange(server: str, queries: list[str], tcp: bool = False, timeout: float = 2) -> list[str]:
    """Send DNS messages, in hexadecimal, from one socket and at once; what came back until each had an answer."""
    wires = [bytes.fromhex(query) for query in queries]
    answers: list[bytes] = []
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as asking:
        asking.settimeout(timeout)
        asking.connect((server, 53))
        if tcp:
            asking.sendall(b"".join(struct.pack("!H", len(wire)) + wire for wire in wires))
            with asking.makefile("rb") as stream:
                answers = [stream.read(*struct.unpack("!H", stream.read(2))) for _ in wires]
        else:
            for wire in wires:
                asking.send(wire)
            answers = [asking.recv(65_535) for _ in wires]
    return [answer.hex() for answer in answers]


def flood_names(server: str, suffix: str, first: int, count: int, window: int = 32) -> Reply:
    """Ask for `count` fresh names, `window` of them at a time; `answers` says how many came back."""
    answers = 0
    started = time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((server, 53))
        asking.settimeout(2)
        for asked in range(count + window):
            if asked < count:
                asking.send(_query(f"n{first + asked:05}.{suffix}", asked & 0xFFFF))
            if asked >= window:
                asking.recv(4096)
                answers += 1
    return {"answers": answers, "seconds": time.monotonic() - started}


def flood(server: str, name: str, rate: int, seconds: float) -> Reply:
    """Ask for `name` `rate` times a second; `answers` says how many came back."""
    answers = asked = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((server, 53))
        asking.setblocking(False)
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        started = time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds:
            while asked < min(elapsed, seconds) * rate:
                asking.send(_query(name, asked & 0xFFFF))
                asked += 1
            while select.select([asking], [], [], 0.001)[0]:
                asking.recv(4096)
                answers += 1
    return {"asked": asked, "answers": answers, "seconds": seconds}


def flood_connects(address: str, port: int, count: int) -> int:
    """Begin `count` connections and wait for none of them."""
    for _ in range(count):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            connection.connect_ex((address, port))
    return count


# --- a prober that never stops ---------------------------------------------------------------------------------------
class _Prober:
    """Connects again and again in a thread, so that a gap in enforcement cannot hide between two tests."""

    def __init__(self, address: str, port: int, timeout: float, pause: float) -> None:
        self.target = (address, port, timeout)
        self.pause = pause
        self.stopping = threading.Event()
        self.verdicts: dict[str, int] = {}
        self.slowest = 0.0
        self.odd: list[Reply] = []  # the first that were neither reached nor refused
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while not self.stopping.wait(self.pause):
            reply = attempt(*self.target)
            # Who is told no loses the responder when the rules that led there go; that is not to have got out.
            told_nothing = reply["message"] in (_UNANSWERED, os.strerror(errno.EPIPE))
            verdict = "unanswered" if told_nothing else reply["verdict"]
            self.verdicts[verdict] = self.verdicts.get(verdict, 0) + 1
            self.slowest = max(self.slowest, reply["seconds"])
            if verdict not in ("reached", "refused") and len(self.odd) < 3:
                self.odd.append({**reply, "at": time.time()})

    def stop(self) -> Reply:
        self.stopping.set()
        self.thread.join()
        return {"verdicts": self.verdicts, "slowest": self.slowest, "odd": self.odd}


_probers: dict[str, _Prober] = {}


def probe_start(key: str, address: str, port: int, timeout: float = 2, pause: float = 0.005) -> Reply:
    """Start a prober that waits `pause` seconds between its attempts."""
    _probers[key] = _Prober(address, port, timeout, pause)
    return {}


def probe_stop(key: str) -> Reply:
    """Stop it: `verdicts` counts them, `slowest` is in seconds, `odd` are some that were neither. "unanswered":
    connected, and nobody said a word.
    """
    return _probers.pop(key).stop()


OPERATIONS: dict[str, Callable[..., Any]] = {
    operation.__name__: operation
    for operation in (
        attempt, ask, connect, connect_each, connections_per_second, drop, exchange, flood, flood_connects, flood_names,
        forge, hang_up, hold, http_get, probe_start, probe_stop, replace_file, resolve, send_datagram, send_from,
        send_packet, storm, talk,
    )
}  # fmt: skip


def main() -> None:
    """Serve until stdin closes. The argument is the program that the kernel is to take this for."""
    if sys.argv[1]:
        Path("/proc/self/comm").write_text(sys.argv[1])
    os.write(1, b'"ready"\n')
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"value": OPERATIONS[request.pop("operation")](**request)}
        except OSError as error:
            reply = {"error": str(error)}
        os.write(1, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
