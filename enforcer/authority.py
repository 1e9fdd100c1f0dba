"""Certificates for refusals over TLS, signed by a CA that the host's administrator chose to trust.

The CA's key can sign for every name that its constraints leave, so `create` leaves as little as serves the purpose: no
allowed registry, no address, servers only, no further CA, a year. Certificates are for one name each and live for days.
Imported only where the policy names a CA: cryptography costs 15 MB.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import ssl
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from enforcer import trusted_files
from enforcer.policy import AuthorityFiles, HostPattern

CA_DAYS = 365
LEAF_DAYS = 2
MAX_CONTEXTS = 256  # of 30 kB
MAX_WAITING = 32  # for a certificate; the next client gets an alert
MAX_CONSTRAINTS = 1_000
CERTIFICATE_NAME = "refusal-ca.crt"
KEY_NAME = "refusal-ca.key"
_MAX_FILE_BYTES = 1 << 20
_CLOCK_SKEW = datetime.timedelta(hours=1)

_SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
_KEYS_THAT_HASH = ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey  # what they sign themselves


class AuthorityError(Exception):
    """A CA that cannot be used or made: what is wrong, and what to do instead."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}; {advice}")
        self.problem = problem
        self.advice = advice


@dataclass(frozen=True, slots=True)
class _Issuer:
    """A CA, read and checked. What is needed of its certificate and not the object itself, which raises "Already
    mutably borrowed" when two threads read it at once (cryptography 38)."""

    name: x509.Name
    key_identifier: x509.AuthorityKeyIdentifier
    not_after: datetime.datetime
    constraints: x509.NameConstraints | None  # None: it may sign for every name
    chain: bytes  # PEM: the certificate and what the operator put behind it
    key: _SigningKey


class Authority:
    """TLS contexts for the names of refused clients."""

    def __init__(self, files: AuthorityFiles) -> None:
        """AuthorityError if the files are no usable CA."""
        self._ca = _read(files)
        self._key = ec.generate_private_key(ec.SECP256R1())  # of every leaf: it never leaves this process
        self._contexts: OrderedDict[str, tuple[float, ssl.SSLContext]] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()
        self._waiting = 0

    def __len__(self) -> int:
        """How many contexts are held."""
        return len(self._contexts)

    async def context(self, name: str) -> ssl.SSLContext | None:
        """The context for a host name or an address; None where the CA may not sign it or too many clients wait."""
        context = self._held(name)
        if context is not None or self._waiting >= MAX_WAITING or not may_sign(self._ca.constraints, name):
            return context
        self._waiting += 1
        try:
            async with self._one_at_a_time:
                context = self._held(name)
                if context is None:
                    context = await asyncio.to_thread(self._make, name)
                    self._contexts[name] = asyncio.get_running_loop().time(), context
                    if len(self._contexts) > MAX_CONTEXTS:
                        self._contexts.popitem(last=False)
                return context
        finally:
            self._waiting -= 1

    def _held(self, name: str) -> ssl.SSLContext | None:
        made_at, context = self._contexts.get(name, (0.0, None))
        if context is None or asyncio.get_running_loop().time() - made_at > LEAF_DAYS * 43_200:
            return None
        self._contexts.move_to_end(name)
        return context

    def _make(self, name: str) -> ssl.SSLContext:
        """In a thread: signing and loading take milliseconds."""
        leaf = _sign_leaf(self._ca, self._key.public_key(), name)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.num_tickets = 0
        context.set_alpn_protocols(["http/1.1"])
        with os.fdopen(os.memfd_create("leaf"), "wb") as file:  # load_cert_chain takes paths only
            file.write(_private_pem(self._key) + leaf.public_bytes(serialization.Encoding.PEM) + self._ca.chain)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context


def may_sign(constraints: x509.NameConstraints | None, name: str) -> bool:
    """Whether a CA's name constraints (RFC 5280 section 4.2.1.10) let it sign for a host name or an address."""
    if constraints is None:
        return True
    try:
        address = ip_address(name)
    except ValueError:

        def covers(tree: x509.GeneralName) -> bool | None:
            """None: of another kind of name."""
            if not isinstance(tree, x509.DNSName):
                return None
            return not tree.value or name == tree.value or name.endswith("." + tree.value.removeprefix("."))
    else:

        def covers(tree: x509.GeneralName) -> bool | None:
            if not isinstance(tree, x509.IPAddress) or not isinstance(tree.value, IPv4Network | IPv6Network):
                return None
            return address in tree.value

    permitted = [covered for tree in constraints.permitted_subtrees or () if (covered := covers(tree)) is not None]
    return (any(permitted) or not permitted) and not any(map(covers, constraints.excluded_subtrees or ()))


# --- making one ------------------------------------------------------------------------------------------------------
def create(
    directory: Path,
    organization: str,
    allowed: Iterable[HostPattern],
    *,
    only: Iterable[HostPattern] = (),
    days: int = CA_DAYS,
) -> AuthorityFiles:
    """Make a CA that may sign for `only` (everything, without) but never for `allowed`; says where it is.

    AuthorityError if there is one already, or if the names are too many for one certificate.
    """
    permitted, excluded = _trees(only), _trees(allowed)
    if len(permitted) + len(excluded) > MAX_CONSTRAINTS:
        raise AuthorityError(
            f"{len(permitted) + len(excluded)} names are too many to be written into a certificate",
            f"write wildcards in the policy, at most {MAX_CONSTRAINTS} in all",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization[:64]),
            x509.NameAttribute(NameOID.COMMON_NAME, f"registry-enforcer refusals on {os.uname().nodename}"[:64]),
        ]
    )
    addresses = [x509.IPAddress(IPv4Network("0.0.0.0/0")), x509.IPAddress(IPv6Network("::/0"))]
    constraints = x509.NameConstraints(
        permitted_subtrees=[x509.DNSName(tree) for tree in permitted] or None,
        excluded_subtrees=[*(x509.DNSName(tree) for tree in excluded), *addresses],
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(constraints, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = AuthorityFiles(str(directory.absolute() / CERTIFICATE_NAME), str(directory.absolute() / KEY_NAME), line=1)
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with trusted_files.directory(directory) as parent:
            _write_new(parent, Path(files.key), _private_pem(key), 0o600)
            try:
                pem = certificate.public_bytes(serialization.Encoding.PEM)
                _write_new(parent, Path(files.certificate), pem, 0o644)
            except OSError:
                os.unlink(KEY_NAME, dir_fd=parent)
                raise
    except trusted_files.UntrustedError as error:
        raise AuthorityError(error.problem, f"{error.advice}, or name another --directory") from None
    except FileExistsError as error:
        raise AuthorityError(
            f"{error.filename} exists already", "remove both files to make a new CA, or name another --directory"
        ) from None
    except OSError as error:
        raise AuthorityError(f"{error.filename}: {error.strerror}", "name a --directory that can be written") from None
    return files


def _trees(patterns: Iterable[HostPattern]) -> list[str]:
    """The names without those below another one: a constraint always covers what is below it."""
    names = {pattern.name for pattern in patterns}
    return sorted(name for name in names if not _has_parent(name, names))


def _has_parent(name: str, names: Collection[str]) -> bool:
    labels = name.split(".")
    return any(".".join(labels[cut:]) in names for cut in range(1, len(labels)))


def _write_new(parent: int, path: Path, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path.name, flags, mode, dir_fd=parent)
    except OSError as error:
        error.filename = str(path)
        raise
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)


# --- signing ---------------------------------------------------------------------------------------------------------
def _sign_leaf(ca: _Issuer, public_key: ec.EllipticCurvePublicKey, name: str) -> x509.Certificate:
    try:
        subject: x509.GeneralName = x509.IPAddress(ip_address(name))
    except ValueError:
        subject = x509.DNSName(name)
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "refused by registry-enforcer")]))
        .issuer_name(ca.name)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(min(now + datetime.timedelta(days=LEAF_DAYS), ca.not_after))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([subject]), critical=False)
        .add_extension(ca.key_identifier, critical=False)
        .sign(
            ca.key, None if isinstance(ca.key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey) else hashes.SHA256()
        )
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


# --- reading ---------------------------------------------------------------------------------------------------------
def _read(files: AuthorityFiles) -> _Issuer:
    chain = _read_file(files.certificate, "certificate")
    try:
        certificate = x509.load_pem_x509_certificate(chain)
    except ValueError:
        raise AuthorityError(f"{files.certificate} is not a PEM certificate", f"make a CA with {_INIT}") from None
    key = _read_key(files.key)
    spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*spki) != certificate.public_key().public_bytes(*spki):
        raise AuthorityError(f"{files.key} is not the key of {files.certificate}", "name the two files of one CA")
    try:
        extensions = certificate.extensions
    except ValueError:
        raise AuthorityError(f"{files.certificate} has extensions that cannot be read", _MAKE_ONE) from None
    by_kind = {type(extension.value): extension.value for extension in extensions}
    basic, usage = by_kind.get(x509.BasicConstraints), by_kind.get(x509.KeyUsage)
    constraints = by_kind.get(x509.NameConstraints)
    assert constraints is None or isinstance(constraints, x509.NameConstraints)
    if not (isinstance(basic, x509.BasicConstraints) and basic.ca):
        raise AuthorityError(f"{files.certificate} is no CA's", _MAKE_ONE)
    if not (isinstance(usage, x509.KeyUsage) and usage.key_cert_sign):
        raise AuthorityError(f"{files.certificate} may not sign certificates", _MAKE_ONE)
    not_after = _not_after(certificate)
    if not_after <= datetime.datetime.now(datetime.UTC):
        raise AuthorityError(f"{files.certificate} expired on {not_after:%Y-%m-%d}", _MAKE_ONE)
    identifier = by_kind.get(x509.SubjectKeyIdentifier)  # need not be the usual hash: verifiers compare the two
    return _Issuer(
        name=certificate.subject,
        key_identifier=(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
            if isinstance(identifier, x509.SubjectKeyIdentifier)
            else x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
        ),
        not_after=not_after,
        constraints=constraints,
        chain=chain,
        key=key,
    )


_INIT = "`registry-enforcer ca init`"
_MAKE_ONE = f"make a CA with {_INIT}"


def _read_key(path: str) -> _SigningKey:
    text = _read_file(path, "key", private=True)
    try:
        key = serialization.load_pem_private_key(text, password=None)
    except TypeError:
        raise AuthorityError(f"{path} is encrypted", "store the key without a passphrase and with mode 0600") from None
    except ValueError:
        raise AuthorityError(f"{path} is not a PEM private key", _MAKE_ONE) from None
    if not isinstance(key, _SigningKey):
        raise AuthorityError(f"{path} is a key of a kind that signs no certificates", _MAKE_ONE)
    return key


def _read_file(path: str, what: str, *, private: bool = False) -> bytes:
    try:
        return trusted_files.read(Path(path), _MAX_FILE_BYTES, private=private)
    except trusted_files.UntrustedError as error:
        raise AuthorityError(error.problem, error.advice) from None
    except OSError as error:
        raise AuthorityError(f"the {what} {path} cannot be read: {error.strerror}", _MAKE_ONE) from None


def _not_after(certificate: x509.Certificate) -> datetime.datetime:
    aware: datetime.datetime | None = getattr(certificate, "not_valid_after_utc", None)  # cryptography 42
    return aware or certificate.not_valid_after.replace(tzinfo=datetime.UTC)
