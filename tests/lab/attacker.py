"""Hands that forge: sockets by name, and every way to send from them, in a process of the lab.

Spoken to like agent.py: one JSON request a line, one reply a line. Operations that the kernel may refuse reply with the
error's name, "" for none. Standard library only; io_uring by its system calls, since nothing else speaks it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SO_MARK, SYN_RETRIES = socket.SO_MARK, 7
SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
_AF_XDP, _SOL_XDP, _XDP_UMEM_REG = 44, 283, 4
IPPROTO_MPTCP, MSG_FASTOPEN, TCP_FASTOPEN_CONNECT = 262, 0x20000000, 30
CLONE_NEWNET = 0x40000000
ETH_P_ALL, ETH_P_IP, ETH_P_IPV6 = 3, 0x0800, 0x86DD
SECOND_SYN_SECONDS = 1.5  # the first comes again after one

_KINDS = {
    "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "mptcp": (socket.SOCK_STREAM, IPPROTO_MPTCP),
    "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "raw": (socket.SOCK_RAW, socket.IPPROTO_RAW),
}
_libc = ctypes.CDLL(None, use_errno=True)
_sockets: dict[str, socket.socket] = {}


def _error(act: Callable[[], object]) -> str:
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0] if error.errno else "timeout"
    return ""


def _u32(value: int) -> bytes:
    return struct.pack("=I", value)


# --- sockets ---------------------------------------------------------------------------------------------------------
def make(key: str, kind: str, family: int = 4) -> str:
    """A socket that gives up after a second SYN."""
    close(key)
    kind_number, protocol = _KINDS[kind]

    def open_it() -> None:
        made = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, kind_number, protocol)
        made.settimeout(SECOND_SYN_SECONDS)
        if kind == "tcp":
            made.setsockopt(socket.IPPROTO_TCP, SYN_RETRIES, 1)
        _sockets[key] = made

    return _error(open_it)


def close(key: str) -> str:
    """The end of a socket, if it is there."""
    if key in _sockets:
        _sockets.pop(key).close()
    return ""


def mark(key: str, value: int, length: int = 4) -> str:
    """SO_MARK; of a longer option the kernel reads the beginning."""
    return _error(lambda: _sockets[key].setsockopt(socket.SOL_SOCKET, SO_MARK, _u32(value).ljust(length, b"\0")))


def marked(key: str) -> int:
    """What SO_MARK is."""
    return int.from_bytes(_sockets[key].getsockopt(socket.SOL_SOCKET, SO_MARK, 4), sys.byteorder)


def option(key: str, level: int, name: int, value: int) -> str:
    """Any other option that is a number."""
    return _error(lambda: _sockets[key].setsockopt(level, name, value))


def long_option(key: str, name: int, text: str, length: int) -> str:
    """An option of the socket itself that is a text, followed by zeros up to `length`."""
    value = text.encode().ljust(length, b"\0")
    return _error(lambda: _sockets[key].setsockopt(socket.SOL_SOCKET, name, value))


def option_ns(key: str, level: int, name: int, times: int = 20_000) -> int:
    """The nanoseconds that it takes to set an option to 1: the least of ten means."""
    setting = _sockets[key].setsockopt

    def mean() -> int:
        started = time.perf_counter_ns()
        for _ in range(times // 10):
            setting(level, name, 1)
        return (time.perf_counter_ns() - started) * 10 // times

    return min(mean() for _ in range(10))


def bind_port(key: str) -> str:
    """A port of its own, chosen by the kernel."""
    wildcard = "::" if _sockets[key].family == socket.AF_INET6 else ""
    return _error(lambda: _sockets[key].bind((wildcard, 0)))


def connect(key: str, address: str, port: int = 443, wait: bool = True) -> str:
    """connect(2); without `wait` it only begins."""
    connecting = _sockets[key]
    connecting.settimeout(SECOND_SYN_SECONDS if wait else 0)
    told = _error(lambda: connecting.connect((address, port)))
    return "" if told == "EINPROGRESS" else told


def await_connection(key: str) -> str:
    """What became of a connection that began; waits for a second SYN."""
    if not select.select([], [_sockets[key]], [], SECOND_SYN_SECONDS)[1]:
        return "timeout"
    number = _sockets[key].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return errno.errorcode[number] if number else ""


def disconnect(key: str) -> str:
    """connect(2) to AF_UNSPEC: the socket is as good as new."""
    unspecified = bytes(16)
    status = _libc.connect(_sockets[key].fileno(), unspecified, len(unspecified))
    return "" if status == 0 else errno.errorcode[ctypes.get_errno()]


def send(key: str, address: str = "", port: int = 443, mark: int = 0, flags: int = 0) -> str:
    """sendmsg(2): with a mark of its own if there is one, to the connected address if there is none."""
    ancillary = [(socket.SOL_SOCKET, SO_MARK, _u32(mark))] if mark else []
    to = [(address, port)] if address else []
    payload = b"GET / HTTP/1.0\r\n\r\n"
    return _error(lambda: _sockets[key].sendmsg([payload], ancillary, flags, *to))


def race(address: str, forged: int, count: int) -> str:
    """Connections, each against a thread that never stops to set the mark of the socket."""
    racing = [socket.socket()]
    stopping = threading.Event()

    def set_marks() -> None:
        while not stopping.is_set():
            try:
                racing[0].setsockopt(socket.SOL_SOCKET, SO_MARK, _u32(forged))
            except OSError:  # closed meanwhile, or not allowed
                continue

    thread = threading.Thread(target=set_marks)
    thread.start()
    try:
        for _ in range(count):
            before, racing[0] = racing[0], socket.socket()
            before.close()
            racing[0].setblocking(False)
            racing[0].connect_ex((address, 443))
    finally:
        stopping.set()
        thread.join()
        racing[0].close()
    return ""


# --- packets by hand -------------------------------------------------------------------------------------------------
def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _syn(source: str, destination: str) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    segment = struct.pack("!HHIIBBHHH", 40_404, 443, 1, 0, 5 << 4, 2, 64_240, 0, 0)
    summed = _checksum(addresses + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(segment)) + segment)
    segment = segment[:16] + struct.pack("!H", summed) + segment[18:]
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, socket.IPPROTO_TCP, 0) + addresses
    return header[:10] + struct.pack("!H", _checksum(header)) + header[12:] + segment


def send_raw(key: str, source: str, address: str, mark: int = 0) -> str:
    """A SYN of our own making from a raw socket."""
    ancillary = [(socket.SOL_SOCKET, SO_MARK, _u32(mark))] if mark else []
    return _error(lambda: _sockets[key].sendmsg([_syn(source, address)], ancillary, 0, (address, 0)))


def make_packet_socket(key: str) -> str:
    """One that hears nothing."""
    close(key)

    def open_it() -> None:
        _sockets[key] = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)

    return _error(open_it)


def umem() -> str:
    """What an AF_XDP socket begins with: memory for its packets (struct xdp_umem_reg)."""
    with socket.socket(_AF_XDP, socket.SOCK_RAW) as sending, mmap.mmap(-1, 1 << 16) as packets:
        register = struct.pack("=QQIII", _place(packets), 1 << 16, 2048, 0, 0) + bytes(4)
        return _error(lambda: sending.setsockopt(_SOL_XDP, _XDP_UMEM_REG, register))


def send_packet(key: str, interface: str, gateway: str, source: str, address: str) -> str:
    """The same SYN, around the host's whole stack."""
    entries = (line.split() for line in Path("/proc/net/arp").read_text().splitlines())
    link = next(bytes.fromhex(fields[3].replace(":", "")) for fields in entries if fields[0] == gateway)
    to = (interface, ETH_P_IP, 0, 0, link)
    return _error(lambda: _sockets[key].sendto(_syn(source, address), to))


# --- io_uring --------------------------------------------------------------------------------------------------------
_SETUP, _ENTER = 425, 426  # on every architecture
_SETUP_SQPOLL, _GETEVENTS, _SQ_WAKEUP, _ASYNC = 2, 1, 2, 1 << 4
_OP_SENDMSG, _OP_CONNECT, _OP_URING_CMD, _CMD_SETSOCKOPT = 9, 16, 46, 3


def _uring_call(number: int, *arguments: int) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _place(memory: bytearray | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class _Ring:
    """One request at a time; include/uapi/linux/io_uring.h has the layouts."""

    def __init__(self, how: str) -> None:
        self._sqpoll = how == "sqpoll"
        self._sqe_flags = _ASYNC if how == "async" else 0
        parameters = bytearray(120)
        struct.pack_into("=II", parameters, 8, _SETUP_SQPOLL if self._sqpoll else 0, 0)
        struct.pack_into("=I", parameters, 16, 100)
        self._fd = _uring_call(_SETUP, 1, _place(parameters))
        sq_entries, cq_entries = struct.unpack_from("=II", parameters)
        self._sq_tail, self._array = (struct.unpack_from("=I", parameters, 40 + 4 * at)[0] for at in (1, 6))
        self._cqes = struct.unpack_from("=I", parameters, 80 + 4 * 5)[0]
        self._sq = mmap.mmap(self._fd, self._array + 4 * sq_entries, offset=0)
        self._cq = mmap.mmap(self._fd, self._cqes + 16 * cq_entries, offset=0x8000000)
        self._entries = mmap.mmap(self._fd, 64 * sq_entries, offset=0x10000000)

    def request(self, opcode: int, fd: int, *, off: int = 0, addr: int = 0, length: int = 0, flags: int = 0,
                tail: bytes = b"") -> int:  # fmt: skip
        """The result: 0 or more, or a negative errno."""
        entry = struct.pack("=BBHiQQIIQ", opcode, self._sqe_flags, 0, fd, off, addr, length, flags, 1) + tail
        self._entries[: len(entry)] = entry
        struct.pack_into("=I", self._sq, self._array, 0)
        struct.pack_into("=I", self._sq, self._sq_tail, 1)
        wake = _SQ_WAKEUP if self._sqpoll else 0
        _uring_call(_ENTER, self._fd, 1, 1, _GETEVENTS | wake, 0, 0)
        return int(struct.unpack_from("=i", self._cq, self._cqes + 8)[0])

    def close(self) -> None:
        os.close(self._fd)


def _socket_address(address: str, port: int) -> bytearray:
    if ":" in address:
        packed = struct.pack("=HHI", socket.AF_INET6, socket.htons(port), 0) + socket.inet_pton(
            socket.AF_INET6, address
        )
        return bytearray(packed + bytes(4))
    return bytearray(struct.pack("=HH", socket.AF_INET, socket.htons(port)) + socket.inet_aton(address) + bytes(8))


def _by_ring(how: str, ask: Callable[[_Ring], int]) -> str:
    ring = _Ring(how)
    try:
        result = ask(ring)
    finally:
        ring.close()
    return errno.errorcode[-result] if result < 0 else ""


def ring_is_there() -> bool:
    """Whether this kernel gives io_uring to anybody."""
    try:
        _Ring("inline").close()
    except OSError as error:
        if error.errno in {errno.ENOSYS, errno.EPERM}:
            return False
        raise
    return True


def ring_connect(key: str, address: str, how: str) -> str:
    """IORING_OP_CONNECT, by the submitter (inline), a worker (async) or the thread that polls (sqpoll)."""
    _sockets[key].setblocking(True)
    to = _socket_address(address, 443)
    return _by_ring(how, lambda ring: ring.request(_OP_CONNECT, _sockets[key].fileno(), off=len(to), addr=_place(to)))


def ring_send(key: str, address: str, how: str, mark: int = 0, flags: int = 0) -> str:
    """IORING_OP_SENDMSG, with a mark of its own if there is one."""
    _sockets[key].setblocking(True)
    to = _socket_address(address, 443)
    payload = bytearray(b"GET / HTTP/1.0\r\n\r\n")
    vector = bytearray(struct.pack("=QQ", _place(payload), len(payload)))
    control = bytearray(struct.pack("=QiiI4x", 20, socket.SOL_SOCKET, SO_MARK, mark))
    header = bytearray(
        struct.pack(
            "=QI4xQQQQi4x",
            *(_place(to), len(to), _place(vector), 1),
            *((_place(control), len(control)) if mark else (0, 0)),
            0,
        )
    )
    return _by_ring(
        how,
        lambda ring: ring.request(_OP_SENDMSG, _sockets[key].fileno(), addr=_place(header), length=1, flags=flags),
    )


def ring_mark(key: str, value: int) -> str:
    """SO_MARK by SOCKET_URING_OP_SETSOCKOPT (6.7)."""
    wanted = bytearray(_u32(value))
    level_and_name = struct.unpack("=Q", struct.pack("=II", socket.SOL_SOCKET, SO_MARK))[0]
    # off: the command; addr: level and name; splice_fd_in: optlen; addr3: optval
    tail = struct.pack("=HHIQQ", 0, 0, len(wanted), _place(wanted), 0)
    return _by_ring(
        "inline",
        lambda ring: ring.request(
            _OP_URING_CMD, _sockets[key].fileno(), off=_CMD_SETSOCKOPT, addr=level_and_name, tail=tail
        ),
    )


# --- sockets of others, other cgroups and namespaces -----------------------------------------------------------------
def hand_over(key: str, path: str) -> str:
    """Give a socket to whoever waits at `path`, and keep none."""
    given = _sockets.pop(key)
    deadline = time.monotonic() + 10
    with given, socket.socket(socket.AF_UNIX) as messenger:
        while messenger.connect_ex(path) and time.monotonic() < deadline:
            time.sleep(0.01)
        socket.send_fds(messenger, [b"x"], [given.fileno()])
    return ""


def wait_at(path: str) -> str:
    """Make the place where a socket will be handed over."""
    _sockets["place"] = waiting = socket.socket(socket.AF_UNIX)
    waiting.bind(path)
    waiting.listen()
    return ""


def take(key: str) -> str:
    """The socket that somebody hands over there."""
    messenger, _ = _sockets["place"].accept()
    with messenger, _sockets.pop("place") as waiting:
        Path(waiting.getsockname()).unlink()
        _, descriptors, _, _ = socket.recv_fds(messenger, 1, 1)
    _sockets[key] = socket.socket(fileno=descriptors[0])
    _sockets[key].settimeout(SECOND_SYN_SECONDS)
    return ""


def enter_cgroup(path: str) -> str:
    """Move there, and make it if need be."""
    Path(path).mkdir(parents=True, exist_ok=True)
    return _error(lambda: Path(path, "cgroup.procs").write_text(str(os.getpid())))


def process() -> int:
    """Its number."""
    return os.getpid()


def enter_network(path: str) -> str:
    """setns(2)."""
    with Path(path).open() as namespace:
        status = _libc.setns(namespace.fileno(), CLONE_NEWNET)
    return "" if status == 0 else errno.errorcode[ctypes.get_errno()]


# --- who looks -------------------------------------------------------------------------------------------------------
def watch(interface: str) -> str:
    """Look at what arrives at an interface from now on."""
    close("watch")
    _sockets["watch"] = watching = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    watching.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    watching.bind((interface, ETH_P_ALL))
    watching.setblocking(False)
    return ""


def arrivals() -> list[str]:
    """The destinations of what has begun to arrive since then: TCP's SYNs, and any datagram."""
    return sorted(set(_arrived()))


def _arrived() -> Iterator[str]:
    while select.select([_sockets["watch"]], [], [], 0)[0]:
        packet, (_, protocol, direction, *_) = _sockets["watch"].recvfrom(128)
        if direction == socket.PACKET_OUTGOING:
            continue
        if protocol == ETH_P_IP and _begins(packet[9], packet[(packet[0] & 15) * 4 :]):
            yield socket.inet_ntoa(packet[16:20])
        elif protocol == ETH_P_IPV6 and _begins(packet[6], packet[40:]):
            yield socket.inet_ntop(socket.AF_INET6, packet[24:40])


def _begins(protocol: int, transport: bytes) -> bool:
    syn, ack = 2, 16
    return protocol == socket.IPPROTO_UDP or (protocol == socket.IPPROTO_TCP and transport[13] & (syn | ack) == syn)


OPERATIONS: dict[str, Callable[..., Any]] = {
    operation.__name__: operation
    for operation in (
        arrivals, await_connection, bind_port, close, connect, disconnect, enter_cgroup, enter_network,
        hand_over, long_option, make, make_packet_socket, mark, marked, option, option_ns, process, race,
        ring_connect, ring_is_there, ring_mark, ring_send, send, send_packet, send_raw, take, umem, wait_at,
        watch,
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
