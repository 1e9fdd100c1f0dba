"""What refused clients send, whole, cut and damaged, and what they are told."""

from __future__ import annotations

import json
import ssl
import time
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer.denial import (
    MAX_HEAD_BYTES,
    MAX_HELLO_RECORDS,
    MAX_REQUEST_BYTES,
    TLS_ALERT,
    Answered,
    HttpRequest,
    Refusal,
    TlsHello,
    Undecided,
    http_reply,
    read_request,
    refusal_reason,
    refusal_sentence,
)
from enforcer.kernel_abi import Protocol
from enforcer.policy import NameIndex, Reason, parse

VECTORS = Path(__file__).parent / "vectors" / "client_hello"


def vector(path: Path) -> tuple[bytes, str | None]:
    """(bytes, server name) of a real client's first flight."""
    _, name, *lines = path.read_text().splitlines()
    return bytes.fromhex("".join(lines)), None if name == "name: none" else name.removeprefix("name: ")


HELLO, HELLO_NAME = vector(VECTORS / "skopeo.txt")


def in_records(message: bytes, sizes: list[int]) -> bytes:
    """The handshake message cut into records of these sizes, and the rest."""
    records = b""
    while message:
        size = sizes.pop(0) if sizes else len(message)
        records += b"\x16\x03\x01" + len(message[:size]).to_bytes(2, "big") + message[:size]
        message = message[size:]
    return records


def hello_with(extensions: bytes) -> bytes:
    """A ClientHello with nothing but these extensions."""
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\2\x13\x01" + b"\1\0" + len(extensions).to_bytes(2, "big") + extensions
    return in_records(b"\1" + len(body).to_bytes(3, "big") + body, [])


def server_name(name: bytes, kind: int = 0) -> bytes:
    entry = bytes((kind,)) + len(name).to_bytes(2, "big") + name
    return b"\0\0" + (len(entry) + 2).to_bytes(2, "big") + len(entry).to_bytes(2, "big") + entry


# --- TLS -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.txt")), ids=lambda path: path.stem)
def test_name_in_a_real_hello_is_read_and_no_byte_earlier(path: Path) -> None:
    wire, name = vector(path)
    assert read_request(wire) == TlsHello(name)
    for length in range(len(wire)):
        assert read_request(wire[:length]) is Undecided.NEED_MORE


@given(sizes=st.lists(st.integers(1, 80), min_size=0, max_size=MAX_HELLO_RECORDS - 1))
def test_hello_is_read_however_its_records_are_cut(sizes: list[int]) -> None:
    wire = in_records(HELLO[5:], sizes)
    assert read_request(wire) == TlsHello(HELLO_NAME)
    assert read_request(wire[:-1]) is Undecided.NEED_MORE


def test_hello_in_more_records_than_any_client_sends_is_not_waited_for() -> None:
    assert read_request(in_records(HELLO[5:], [1] * MAX_HELLO_RECORDS)) is Undecided.UNRECOGNISED


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (b"a.example", "a.example"),
        (b"A.Example.", "a.example"),
        (b"under_score.example", "under_score.example"),
        (b"198.51.100.7", None),
        (b"::1", None),
        (b"", None),
        (b"a\nb", None),
        (b"a\x1b[2Jb", None),
        (b"a b", None),
        ("é.example".encode(), None),
        (b"a" * 254, None),
    ],
)
def test_server_name_that_is_no_host_name_is_none(written: bytes, name: str | None) -> None:
    assert read_request(hello_with(server_name(written))) == TlsHello(name)


def test_server_name_is_found_behind_other_extensions_and_other_kinds_of_names_are_not_taken() -> None:
    other = b"\0\x10\0\5\0\3\2h2"
    assert read_request(hello_with(other + server_name(b"a.example"))) == TlsHello("a.example")
    assert read_request(hello_with(other + server_name(b"a.example", kind=1))) == TlsHello(None)


def test_hello_whose_lengths_lie_is_not_recognised() -> None:
    assert read_request(hello_with(server_name(b"a.example")[:-1])) is Undecided.UNRECOGNISED
    longer = bytearray(hello_with(b""))
    longer[5 + 1 : 5 + 4] = (1 << 20).to_bytes(3, "big")
    assert read_request(bytes(longer)) is Undecided.UNRECOGNISED


# --- HTTP ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("GET /v2/ HTTP/1.1\r\nHost: a.example:5000\r\n\r\n", ("GET", "a.example", "/v2/")),
        ("HEAD /v2/x HTTP/1.1\r\nAccept: */*\r\nhost:\tA.Example \r\n\r\n", ("HEAD", "a.example", "/v2/x")),
        ("GET / HTTP/1.0\n\n", ("GET", None, "/")),
        (
            "GET http://b.example:80/v2/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
            ("GET", "b.example", "http://b.example:80/v2/"),
        ),
        ("CONNECT a.example:443 HTTP/1.1\r\n\r\n", ("CONNECT", "a.example", "a.example:443")),
        ("GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n", ("GET", None, "/")),
        ("GET / HTTP/1.1\r\nHost: 198.51.100.7\r\n\r\n", ("GET", None, "/")),
        ("GET / HTTP/1.1\r\nHost: [2001:db8::1]:5000\r\n\r\n", ("GET", None, "/")),
        ("GET / HTTP/1.1\r\nHost: a\x1b[2J\r\n\r\n", ("GET", None, "/")),
        ("POST /x HTTP/1.1\r\nHost: a.example\r\n\r\nbody", ("POST", "a.example", "/x")),
    ],
)
def test_host_of_a_request_is_read(head: str, expected: tuple[str, str | None, str]) -> None:
    request = read_request(head.encode())
    assert isinstance(request, HttpRequest)
    assert (request.method, request.host, request.target) == expected
    assert (request.authority is None) is (request.host is None)
    end = head.find("\r\n\r\n") + 3 if "\r\n\r\n" in head else len(head) - 1
    for length in range(end):
        assert read_request(head[:length].encode()) is Undecided.NEED_MORE


@pytest.mark.parametrize(
    "data",
    [
        *(b"\0", b"SSH-2.0-OpenSSH", b"get / HTTP/1.1", b"GET / HTTP/2.0\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n"),
        *(b"\x80\x2e\1", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x02", b"\x15\x03\x01", b"\x16\x03\x01\0\0"),
    ],
)
def test_other_protocols_are_not_recognised(data: bytes) -> None:
    assert read_request(data) is Undecided.UNRECOGNISED


def test_head_without_end_is_not_waited_for() -> None:
    endless = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * MAX_HEAD_BYTES
    assert read_request(endless[: MAX_HEAD_BYTES - 1]) is Undecided.NEED_MORE
    assert read_request(endless[:MAX_HEAD_BYTES]) is Undecided.UNRECOGNISED


# --- anything --------------------------------------------------------------------------------------------------------
@given(data=st.one_of(st.binary(max_size=600), st.binary(max_size=600).map(lambda tail: HELLO[:9] + tail)))
def test_garbage_never_raises(data: bytes) -> None:
    request = read_request(data)
    assert isinstance(request, TlsHello | HttpRequest | Undecided)


@given(place=st.integers(0, len(HELLO) - 1), value=st.integers(0, 255))
def test_damaged_hello_never_raises_and_never_gives_what_cannot_be_printed(place: int, value: int) -> None:
    damaged = bytearray(HELLO)
    damaged[place] = value
    request = read_request(bytes(damaged))
    assert not isinstance(request, TlsHello) or request.server_name is None or request.server_name.isprintable()


@pytest.mark.parametrize("begin", [b"\x16\x03\x01\x40\0\1\0\x40\0", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\0\1\1"])
def test_more_bytes_than_a_request_may_have_are_never_waited_for(begin: bytes) -> None:
    assert read_request(begin.ljust(MAX_REQUEST_BYTES, b"\0")) is not Undecided.NEED_MORE


# --- answers ---------------------------------------------------------------------------------------------------------
POLICY = parse(
    'organization = "Example Corp"\ncontact = "platform@example.com"\n'
    '[[registry]]\nname = "a"\nhosts = ["a.example"]\n',
    "test",
)
REFUSAL = Refusal(
    at=time.time(),
    scope=None,
    protocol=Protocol.TCP,
    source=(ip_address("10.0.0.2"), 40_000),
    destination=(ip_address("198.51.100.7"), 443),
    requested_name="evil.example",
    reason=Reason.UNLISTED_NAME,
    reference="K7Q2M9XD",
    answered=Answered.HTTP,
)


def test_alert_is_access_denied_to_a_tls_library() -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="evil.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    assert read_request(outgoing.read()) == TlsHello("evil.example")
    incoming.write(TLS_ALERT)
    with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
        client.do_handshake()


@pytest.mark.parametrize(
    ("name", "port", "reason", "says"),
    [
        ("evil.example", 443, Reason.UNLISTED_NAME, "does not allow evil.example;"),
        ("a.example", 5000, Reason.UNLISTED_PORT, "does not allow port 5000 of a.example;"),
        ("a.example", 443, Reason.UNLISTED_ADDRESS, "does not allow a.example at 198.51.100.7, an address that no "),
        (None, 443, Reason.UNLISTED_ADDRESS, "does not allow 198.51.100.7;"),
    ],
)
def test_sentence_says_what_by_whom_and_whom_to_ask(name: str | None, port: int, reason: Reason, says: str) -> None:
    destination = ip_address("198.51.100.7"), port
    assert refusal_reason(NameIndex(POLICY), name, destination) is reason
    refusal = replace(REFUSAL, requested_name=name, destination=destination, reason=reason)
    sentence = refusal_sentence(POLICY, refusal)
    assert sentence.startswith("Example Corp " + says)
    assert sentence.endswith("; ask platform@example.com and give reference K7Q2M9XD")


def test_policys_own_words_replace_the_programs() -> None:
    template = "{{{name}}} {address}:{port} {organization} {contact} {reference}"
    policy = replace(POLICY, refusal=replace(POLICY.refusal, message=template))
    said = refusal_sentence(policy, REFUSAL)
    assert said == "{evil.example} 198.51.100.7:443 Example Corp platform@example.com K7Q2M9XD"


def asked(head: str) -> HttpRequest:
    request = read_request(head.encode())
    assert isinstance(request, HttpRequest)
    return request


def test_reply_is_the_oci_error_and_has_no_body_for_head() -> None:
    request = asked("GET /v2/a/manifests/1 HTTP/1.1\r\nHost: a.example\r\n\r\n")
    sentence = 'a "quoted" é'
    head, _, body = http_reply(request, sentence, tls=False).partition(b"\r\n\r\n")
    # ctr and BuildKit show the reason phrase, docker and podman the message.
    assert head.startswith(f"HTTP/1.1 403 {sentence}\r\nContent-Type: application/json\r\n".encode())
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body) == {"errors": [{"code": "DENIED", "message": sentence}]}
    assert http_reply(replace(request, method="HEAD"), sentence, tls=False) == head + b"\r\n\r\n"


@pytest.mark.parametrize(("tls", "scheme"), [(False, "http"), (True, "https")])
def test_ping_is_asked_for_credentials_once_so_that_the_next_refusal_is_shown(tls: bool, scheme: str) -> None:
    ping = asked("GET /v2/ HTTP/1.1\r\nHost: a.example:5000\r\n\r\n")
    reply = http_reply(ping, "no", tls=tls).decode()
    assert reply.startswith("HTTP/1.1 401 no\r\n")
    basic, bearer = (line for line in reply.splitlines() if line.startswith("WWW-Authenticate: "))
    assert basic.startswith("WWW-Authenticate: Basic ")  # podman takes the first
    assert bearer == f'WWW-Authenticate: Bearer realm="{scheme}://a.example:5000/token"'
    with_password = asked("GET /v2/ HTTP/1.1\r\nHost: a.example\r\nAUTHORIZATION: Basic eDp5\r\n\r\n")
    without_host = asked("GET /v2/ HTTP/1.1\r\nHost: 198.51.100.7\r\n\r\n")
    for request in (with_password, without_host, asked("GET /token HTTP/1.1\r\nHost: a.example\r\n\r\n")):
        assert http_reply(request, "no", tls=tls).startswith(b"HTTP/1.1 403 no\r\n")
        assert b"WWW-Authenticate" not in http_reply(request, "no", tls=tls)
