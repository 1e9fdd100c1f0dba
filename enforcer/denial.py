"""Saying no: what the first bytes of a refused client ask for, and the bytes that refuse it in its own protocol.

A fatal TLS alert and an HTTP 403 end a client's attempt at once, and the latter in words. Whatever the bytes are,
reading them is bounded and never raises: they come from whoever could open a connection.
"""

from __future__ import annotations

import enum
import json
import re
import string
from dataclasses import dataclass
from ipaddress import ip_address

from enforcer.kernel_abi import Protocol
from enforcer.policy import Address, NameIndex, Policy, Reason
from enforcer.ruleset import CountedScope

MAX_HELLO_BYTES = 16_384  # of the handshake message; Go's and OpenSSL's hellos are below 2 kB with post-quantum keys
MAX_HELLO_RECORDS = 16
MAX_HEAD_BYTES = 8_192
MAX_REQUEST_BYTES = 4 + MAX_HELLO_BYTES + 5 * MAX_HELLO_RECORDS  # of a hello that is cut into as many records

Endpoint = tuple[Address, int]  # (address, port)


# --- values ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class TlsHello:
    """A whole ClientHello."""

    server_name: str | None  # lower case, no trailing dot; None: it has none, or one that is no host name


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """The head of an HTTP/1 request, a proxy's CONNECT among them."""

    method: str
    host: str | None  # as TlsHello's, without the port; None too for an address
    target: str  # as it was sent
    authority: str | None = None  # of Host, with the port; None where `host` is
    authorized: bool = False  # whether it carries credentials, which nobody reads


Request = TlsHello | HttpRequest


class Undecided(enum.Enum):
    """What bytes are that are no request."""

    NEED_MORE = "the beginning of one"
    UNRECOGNISED = "another protocol, or too long"


class Answered(enum.Enum):
    """What a refused client was told; a metric label and part of the audit line."""

    TLS_ALERT = "tls_alert"
    HTTP = "http"
    TLS_HTTP = "tls_http"  # the same under a certificate of the organization's CA
    CLOSED = "closed"  # another protocol, or nothing within the deadline
    DROPPED = "dropped"  # too many clients at once, this one was the oldest


@dataclass(frozen=True, slots=True)
class Refusal:
    """One refused connection that the responder has answered."""

    at: float  # Unix seconds
    scope: CountedScope | None  # None: a local socket, which of its scopes is not known here
    protocol: Protocol
    source: Endpoint
    destination: Endpoint  # what the client meant to reach
    requested_name: str | None  # of SNI or Host, as the client gave it
    reason: Reason
    reference: str  # of the sentence: whoever quotes it can be found in the audit log
    answered: Answered


def refusal_reason(index: NameIndex, requested_name: str | None, destination: Endpoint) -> Reason:
    """Why a connection was refused, as far as the name that the client gave tells it."""
    if requested_name is None:
        return Reason.UNLISTED_ADDRESS
    verdict = index.judge(requested_name, destination[1])
    # A listed name at an address that no trusted answer gave for it: a hosts file, another resolver, a lie.
    return Reason.UNLISTED_ADDRESS if verdict.allowed else verdict.reason


def refusal_sentence(policy: Policy, refusal: Refusal) -> str:
    """What was refused, by whose policy, whom to ask, and the reference; one printable line."""
    address, port = refusal.destination
    name = refusal.requested_name or str(address)
    template = policy.refusal.message
    if template is None:
        what = {
            Reason.UNLISTED_PORT: "{organization} does not allow port {port} of {name}",
            Reason.UNLISTED_ADDRESS: "{organization} does not allow {name}"
            + (" at {address}, an address that no trusted DNS answer gave for it" if refusal.requested_name else ""),
        }.get(refusal.reason, "{organization} does not allow {name}")
        template = what + "; ask {contact} and give reference {reference}"
    return string.Formatter().vformat(
        template,
        (),
        {
            "name": name,
            "address": str(address),
            "port": str(port),
            "organization": policy.organization,
            "contact": policy.contact,
            "reference": refusal.reference,
        },
    )


# --- reading ---------------------------------------------------------------------------------------------------------
def read_request(data: bytes) -> Request | Undecided:
    """What a client that has sent `data` so far asks for."""
    if not data:
        return Undecided.NEED_MORE
    try:
        return _read_hello(data) if data[0] == _HANDSHAKE else _read_head(data)
    except _Malformed:
        return Undecided.UNRECOGNISED


_HANDSHAKE = 22  # TLS ContentType, RFC 8446 section 5.1
_CLIENT_HELLO = 1  # HandshakeType
_SERVER_NAME = 0  # ExtensionType, RFC 6066 section 3
_HOST_NAME = 0  # NameType
_RECORD_BEGINS = (bytes((_HANDSHAKE,)), b"\3", b"\0\1\2\3\4")  # what may be the first three bytes of a record
_MAX_RECORD_BYTES = 16_384

# What engines and libraries put into DNS questions; anything else would only forge lines where it is shown.
_HOST = re.compile(rb"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\.?")
_METHOD_BEGINS = re.compile(rb"[A-Z]{1,16}(?: |\Z)")
_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,4096}) HTTP/1\.[01]")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_AUTHORITY = re.compile(rb"[a-z][a-z0-9+.-]*://(?:[^/@?#]*@)?([^/?#]*)", re.IGNORECASE)
_PORT = re.compile(rb":[0-9]{0,5}\Z")


class _Malformed(Exception):  # noqa: N818 - not an error of ours
    """These bytes are no ClientHello and no HTTP head."""


class _Cursor:
    """Reads a whole structure front to back; _Malformed at its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise _Malformed
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "big")

    def vector(self, width: int) -> bytes:
        """What follows its own length of `width` bytes (RFC 8446 section 3.4)."""
        return self.take(self.number(width))


def _read_hello(data: bytes) -> TlsHello | Undecided:
    """The handshake message may be cut over records at any byte."""
    message = b""
    at = 0
    for _ in range(MAX_HELLO_RECORDS + 1):
        if message and message[0] != _CLIENT_HELLO:
            raise _Malformed
        if len(message) >= 4:
            length = int.from_bytes(message[1:4], "big")
            if length > MAX_HELLO_BYTES:
                raise _Malformed
            if len(message) >= 4 + length:
                return TlsHello(_server_name(_Cursor(message[4 : 4 + length])))
        header = data[at : at + 5]
        if any(byte not in expected for byte, expected in zip(header, _RECORD_BEGINS, strict=False)):
            raise _Malformed
        if len(header) < 5:
            return Undecided.NEED_MORE
        length = int.from_bytes(header[3:], "big")
        if not 0 < length <= _MAX_RECORD_BYTES:
            raise _Malformed
        message += data[at + 5 : at + 5 + length]
        at += 5 + length
    raise _Malformed


def _server_name(hello: _Cursor) -> str | None:
    hello.take(2 + 32)  # legacy_version, random
    hello.vector(1)  # legacy_session_id
    hello.vector(2)  # cipher_suites
    hello.vector(1)  # legacy_compression_methods
    extensions = _Cursor(hello.vector(2) if hello else b"")  # TLS 1.2 may end without (RFC 5246 section 7.4.1.2)
    while extensions:
        kind = extensions.number(2)
        body = _Cursor(extensions.vector(2))
        if kind == _SERVER_NAME:
            names = _Cursor(body.vector(2))
            while names:
                is_host = names.number(1) == _HOST_NAME
                name = names.vector(2)
                if is_host:
                    return host_name(name)
    return None


def _read_head(data: bytes) -> HttpRequest | Undecided:
    if not _METHOD_BEGINS.match(data):
        raise _Malformed
    end = _END_OF_HEAD.search(data, 0, MAX_HEAD_BYTES)
    if end is None:
        if len(data) >= MAX_HEAD_BYTES:
            raise _Malformed
        return Undecided.NEED_MORE
    line, *fields = data[: end.start()].split(b"\n")
    request = _REQUEST_LINE.fullmatch(line.rstrip(b"\r"))
    if request is None:
        raise _Malformed
    method, target = request.groups()
    values = [(name.lower(), value.strip()) for name, _, value in (field.partition(b":") for field in fields)]
    # RFC 9112 section 3.2: the target's authority, where it has one, is what counts, and Host is ignored.
    absolute = _AUTHORITY.match(target)
    if method == b"CONNECT":
        authority = target
    elif absolute:
        authority = absolute[1]
    else:
        hosts = [value for name, value in values if name == b"host"]
        authority = hosts[0] if len(hosts) == 1 else b""
    host = host_name(_PORT.sub(b"", authority))
    return HttpRequest(
        method.decode(),
        host,
        target.decode(),
        authority=authority.decode() if host else None,
        authorized=any(name == b"authorization" for name, _ in values),
    )


def host_name(wire: bytes) -> str | None:
    """The name that a client asked for, as policies write it; None for an address, or for what no host is called."""
    if not _HOST.fullmatch(wire):
        return None
    name = wire.decode().lower().removesuffix(".")
    try:
        ip_address(name)
    except ValueError:
        return name
    return None


# --- answering -------------------------------------------------------------------------------------------------------
# Alert, TLS 1.2, two bytes: fatal, access_denied (RFC 8446 section 6).
TLS_ALERT = bytes((21, 3, 3, 0, 2, 2, 49))


def http_reply(request: HttpRequest, sentence: str, *, tls: bool) -> bytes:
    """403 with the error body of the OCI distribution specification, and the sentence once more as reason phrase:
    docker and podman show the one, BuildKit and ctr the other.

    "GET /v2/", by which docker and podman find out what they talk to, is answered as by a registry that wants a token
    or a password: of a 403 to it they show only the number, but all of what refuses the request that comes next.
    """
    body = json.dumps({"errors": [{"code": "DENIED", "message": sentence}]}).encode() + b"\n"
    asks = request.target == "/v2/" and request.authority is not None and not request.authorized
    lines = [
        f"HTTP/1.1 401 {sentence}" if asks else f"HTTP/1.1 403 {sentence}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        # Without it docker takes this for a registry of the old kind and asks again in that way.
        "Docker-Distribution-Api-Version: registry/2.0",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if asks:
        # podman takes the first and then asks for the manifest, docker prefers the token, whose refusal it shows.
        realm = f"{'https' if tls else 'http'}://{request.authority}/token"
        lines += ['WWW-Authenticate: Basic realm="refused"', f'WWW-Authenticate: Bearer realm="{realm}"']
    head = ("\r\n".join(lines) + "\r\n\r\n").encode()
    return head if request.method == "HEAD" else head + body
