"""CAs that `ca init` makes and operators bring, judged by OpenSSL; and the contexts for refused names."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import ssl
import subprocess
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from enforcer.authority import (
    CERTIFICATE_NAME,
    KEY_NAME,
    MAX_CONSTRAINTS,
    MAX_CONTEXTS,
    Authority,
    AuthorityError,
    create,
    may_sign,
)
from enforcer.denial import TlsHello, read_request
from enforcer.policy import AuthorityFiles, HostPattern, host_pattern
from tests.test_denial import hello_with, server_name

ALLOWED = tuple(map(host_pattern, ("registry.corp.example", "*.blobs.corp.example", "docker.io", "*.docker.io")))


def constraints_of(certificate: x509.Certificate) -> x509.NameConstraints:
    return certificate.extensions.get_extension_for_class(x509.NameConstraints).value


def handshake(authority: Authority, files: AuthorityFiles, name: str) -> str:
    """What an OpenSSL client that trusts the CA says to the certificate for `name`: "" or its complaint."""

    async def context() -> ssl.SSLContext | None:
        return await authority.context(name)

    server_context = asyncio.run(context())
    assert server_context is not None
    client_context = ssl.create_default_context(cafile=files.certificate)
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        else:
            return ""
        with contextlib.suppress(ssl.SSLWantReadError):
            server.do_handshake()
    raise AssertionError("no end to the handshake")


@pytest.fixture
def files(tmp_path: Path) -> AuthorityFiles:
    return create(tmp_path / "ca", "Example Corp", ALLOWED)


# --- making ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["evil.example", "corp.example", "a.b.evil.example", "xdocker.io", "under_score.example"]
)
def test_certificate_of_a_refused_name_is_trusted(files: AuthorityFiles, name: str) -> None:
    assert handshake(Authority(files), files, name) == ""


@pytest.mark.parametrize(
    "name", ["registry.corp.example", "x.blobs.corp.example", "docker.io", "auth.docker.io", "1.2.3.4"]
)
def test_certificate_of_an_allowed_name_or_an_address_is_neither_made_nor_would_it_be_trusted(
    files: AuthorityFiles, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(files)

    async def context() -> ssl.SSLContext | None:
        return await authority.context(name)

    assert asyncio.run(context()) is None
    monkeypatch.setattr("enforcer.authority.may_sign", lambda *_: True)
    assert handshake(authority, files, name) == "excluded subtree violation"


def test_only_narrows_to_the_names_that_are_given(tmp_path: Path) -> None:
    files = create(tmp_path, "Example Corp", ALLOWED, only=[host_pattern("ghcr.io")])
    authority = Authority(files)
    assert handshake(authority, files, "ghcr.io") == ""
    assert handshake(authority, files, "pkg.ghcr.io") == ""
    made = x509.load_pem_x509_certificate(Path(files.certificate).read_bytes())
    assert not may_sign(constraints_of(made), "evil.example")


def test_constraints_let_nothing_else_be_signed(files: AuthorityFiles) -> None:
    asked = ["openssl", "x509", "-noout", "-in", files.certificate]
    text = subprocess.run([*asked, "-text"], capture_output=True, text=True, check=True).stdout
    for expected in ("CA:TRUE, pathlen:0", "TLS Web Server Authentication", "Certificate Sign, CRL Sign", "Excluded:"):
        assert expected in text
    for days, ended in ((363, 0), (366, 1)):
        assert subprocess.run([*asked, "-checkend", str(days * 86_400)], check=False).returncode == ended


def test_key_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files = create(tmp_path / "new", "Example Corp", ALLOWED)
    finally:
        os.umask(before)
    assert Path(files.key).stat().st_mode & 0o777 == 0o600
    assert Path(files.certificate).stat().st_mode & 0o777 == 0o644
    assert files.key == str(tmp_path / "new" / KEY_NAME)


@pytest.mark.parametrize("present", [CERTIFICATE_NAME, KEY_NAME])
def test_what_is_there_is_not_overwritten(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_text("precious")
    with pytest.raises(AuthorityError, match="exists already; remove both"):
        create(tmp_path, "Example Corp", ALLOWED)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {present: "precious"}


def test_more_names_than_a_certificate_should_carry_are_a_mistake(tmp_path: Path) -> None:
    many = [HostPattern(f"r{n}.example", wildcard=False) for n in range(MAX_CONSTRAINTS + 1)]
    with pytest.raises(AuthorityError, match="too many"):
        create(tmp_path, "Example Corp", many)
    create(tmp_path, "Example Corp", [*many, HostPattern("example", wildcard=True)])  # which covers them


# --- what operators bring --------------------------------------------------------------------------------------------
def write_ca(directory: Path, key: object, *, ca: bool = True, days: int = 10, key_mode: int = 0o600) -> AuthorityFiles:
    assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "corporate CA")])
    now = datetime.datetime.now(datetime.UTC)
    others = "digital_signature content_commitment key_encipherment data_encipherment key_agreement crl_sign"
    usage = dict.fromkeys(f"{others} encipher_only decipher_only".split(), False)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=20))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=ca, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier(b"chosen by the corporation"), critical=False)
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    (directory / "ca.crt").write_bytes(certificate.public_bytes(pem))
    (directory / "ca.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    (directory / "ca.key").chmod(key_mode)
    return AuthorityFiles(str(directory / "ca.crt"), str(directory / "ca.key"), line=1)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["ecdsa", "rsa", "ed25519"],
)
def test_corporate_ca_without_constraints_signs_names_and_addresses(tmp_path: Path, key: object) -> None:
    files = write_ca(tmp_path, key)
    authority = Authority(files)
    for name in ("evil.example", "198.51.100.7", "2001:db8::7"):
        assert handshake(authority, files, name) == ""


def test_files_that_are_no_ca_say_what_to_do(tmp_path: Path) -> None:
    def complaint(files: AuthorityFiles) -> str:
        with pytest.raises(AuthorityError) as raised:
            Authority(files)
        return str(raised.value)

    key = ec.generate_private_key(ec.SECP256R1())
    absent = AuthorityFiles(str(tmp_path / "absent.crt"), str(tmp_path / "absent.key"), line=1)
    assert "cannot be read: No such file or directory; make a CA with `registry-enforcer ca init`" in complaint(absent)
    assert "is no CA's" in complaint(write_ca(tmp_path, key, ca=False))
    assert "expired on 20" in complaint(write_ca(tmp_path, key, days=-1))
    assert "can be read by others than its owner; chmod 600" in complaint(write_ca(tmp_path, key, key_mode=0o640))
    files = write_ca(tmp_path, key)
    other = tmp_path / "other"
    other.mkdir()
    others = write_ca(other, ec.generate_private_key(ec.SECP256R1()))
    assert "is not the key of" in complaint(AuthorityFiles(files.certificate, others.key, line=1))
    assert "is not a PEM certificate" in complaint(AuthorityFiles(files.key, files.key, line=1))
    Path(files.key).write_text("garbage")
    assert "is not a PEM private key" in complaint(files)
    encrypted = serialization.BestAvailableEncryption(b"secret")
    Path(files.key).write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted)
    )
    assert "is encrypted" in complaint(files)


# --- contexts --------------------------------------------------------------------------------------------------------
def test_contexts_are_held_made_once_and_bounded(files: AuthorityFiles) -> None:
    async def scenario() -> None:
        authority = Authority(files)
        first, second = await asyncio.gather(authority.context("a.example"), authority.context("a.example"))
        assert first is second is not None
        assert len(authority) == 1
        for n in range(MAX_CONTEXTS):
            assert await authority.context(f"n{n}.example")
            assert await authority.context("a.example") is first  # in use: not the one that goes
        assert len(authority) == MAX_CONTEXTS

    asyncio.run(scenario())


def test_clients_that_wait_are_bounded_and_the_loop_goes_on(files: AuthorityFiles) -> None:
    async def scenario() -> None:
        authority = Authority(files)
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count_turns())
        contexts = await asyncio.gather(*(authority.context(f"n{n}.example") for n in range(200)))
        counting.cancel()
        assert 0 < sum(context is not None for context in contexts) < 200
        assert turns > 200

    asyncio.run(scenario())


def test_leaf_ends_no_later_than_its_ca(tmp_path: Path) -> None:
    files = write_ca(tmp_path, ec.generate_private_key(ec.SECP256R1()), days=1)
    assert handshake(Authority(files), files, "evil.example") == ""


def test_constraint_of_another_kind_of_name_says_nothing_of_host_names() -> None:
    networks = x509.NameConstraints([x509.IPAddress(IPv4Network("10.0.0.0/8"))], None)
    assert may_sign(networks, "a.example")
    assert may_sign(networks, "10.1.1.1")
    assert not may_sign(networks, "11.1.1.1")
    corporate = x509.NameConstraints([x509.DNSName("corp.example")], [x509.DNSName(".secret.corp.example")])
    assert may_sign(corporate, "x.corp.example")
    assert not may_sign(corporate, "x.secret.corp.example")
    assert not may_sign(corporate, "xcorp.example")
    assert may_sign(None, "anything.example")


def test_names_are_judged_while_others_are_signed(files: AuthorityFiles) -> None:
    async def scenario() -> None:
        authority = Authority(files)
        signing = asyncio.create_task(authority.context("a.example"))
        while not signing.done():
            assert await authority.context("docker.io") is None
            await asyncio.sleep(0)
        for n in range(100):
            await asyncio.gather(authority.context(f"n{n}.example"), authority.context("docker.io"))

    asyncio.run(scenario())


# --- what clients name -----------------------------------------------------------------------------------------------
HOSTILE = ("a..b", "_", "0", "a" * 253, "a" * 64 + ".b", "1.2.3", "0x7f.1", "1.2.3.4.5", "xn--a", "a-.-b", "a._.b")


@pytest.mark.parametrize("wire", HOSTILE, ids=lambda wire: wire[:20])
def test_no_name_that_a_client_may_give_raises(files: AuthorityFiles, wire: str) -> None:
    """What a task of the responder raises ends the daemon."""
    hello = hello_with(server_name(wire.encode()))
    found = read_request(hello)
    assert found == TlsHello(wire)
    assert isinstance(asyncio.run(Authority(files).context(wire)), ssl.SSLContext)
