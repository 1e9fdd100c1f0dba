"""The lab's internet: DNS (knot answers for the zones, unbound resolves) and registries, all inside namespace "net".

Every address of 198.18.0.0/15 and 2001:2::/48 is local there, so one TLS registry on port 443 is every registry of this
internet, one on 8443 and one plain on 5000 likewise. The same image is in all of them; a client tells them apart by
name and address alone, as does the enforcer.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from tests.lab.lab import AUTHORITY, RESOLVER, RESOLVER6, Lab, command, poll

REPOSITORY = "lib/hello:1"  # in every registry
CLIENT_IMAGE = "re-lab/client:1"  # the same image, loaded into docker without a registry
FRESH_NAMES = 16_384
ADDRESSES_OF_BIG = 200  # 3.2 kB: never fits a UDP answer

EVIL_ADDRESS = "198.18.66.66"
EVIL_ADDRESS6 = "2001:2:0:66::66"
ALLOWED_ADDRESS = "198.18.1.10"

SOA = "@ 300 SOA ns.{0}. admin.{0}. 1 3600 600 86400 5\n@ 300 NS ns.{0}.\nns 300 A " + AUTHORITY + "\n"
ZONES = {
    "allowed.test": """
        registry   300 A     198.18.1.10
        *.blobs    300 A     198.18.1.11
        short.blobs 2  A     198.18.1.18
        cname      300 CNAME edge.cdn.example.
        v6         300 AAAA  2001:2:0:1::12
        dual       300 A     198.18.1.13
        dual       300 AAAA  2001:2:0:1::13
        alt        300 A     198.18.1.14
        plain      300 A     198.18.1.15
        late       300 A     198.18.1.16
        later      300 A     198.18.1.17
        blobs      300 A     198.18.66.70
        xblobs     300 A     198.18.66.71
        loopback   300 A     127.0.0.1
        mirror     300 A     198.18.1.19
        proxy      300 A     198.18.1.21
    """,
    "evil.test": f"""
        @          300 A     {EVIL_ADDRESS}
        v6         300 AAAA  {EVIL_ADDRESS6}
        dual       300 A     198.18.66.67
        dual       300 AAAA  2001:2:0:66::67
    """,
    # A registry that the catalogue knows, and no policy of the lab lists.
    "quay.io": """
        @          300 A     198.18.66.72
    """,
    # Three names from cname.allowed.test to an address, none of them in any policy.
    "cdn.example": """
        edge       300 CNAME pop1.cdn.example.
        pop1       300 CNAME node7.pop1.cdn.example.
        node7.pop1 300 A     198.18.1.20
    """,
}


def fresh_name(index: int) -> str:
    """A name below *.fresh.allowed.test with an address of its own in each family."""
    return f"n{index:05}.fresh.allowed.test"


def fresh_address(index: int, family: int = 4) -> str:
    """Its address; of IPv4 there are 65,536, for the names of one hour and more the same ones again."""
    if family == 4:
        return str(IPv4Address(int(IPv4Address("198.19.0.0")) + index % 65_536))
    return str(IPv6Address(int(IPv6Address("2001:2:0:19::")) + index))


@dataclass(frozen=True, slots=True)
class Internet:
    """What is running, for those who want more than names."""

    image: Path  # docker-archive of the image in every registry


def start(lab: Lab) -> Internet:
    """Start DNS and registries and wait until each answers."""
    directory = lab.directory / "internet"
    directory.mkdir()
    _start_dns(lab, directory)
    image = directory / "image.tar"
    image.write_bytes(image_archive(Path("/usr/bin/busybox")))
    _make_certificates(directory)
    _start_registries(lab, directory)
    pushed = lab.run("net", ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false",
                             f"docker-archive:{image}", f"docker://127.0.0.1:5000/{REPOSITORY}"])  # fmt: skip
    if pushed.returncode != 0:
        raise RuntimeError(f"seeding the registries: {pushed.stdout}")
    lab.run("host", ["cp", f"{directory}/ca.crt", "/etc/ssl/certs/ca-certificates.crt"])
    return Internet(image)


# --- DNS -------------------------------------------------------------------------------------------------------------
def _start_dns(lab: Lab, directory: Path) -> None:
    zones = dict(ZONES)
    zones["allowed.test"] += "".join(f"big.blobs 300 A 198.18.3.{i + 1}\n" for i in range(ADDRESSES_OF_BIG))
    zones["allowed.test"] += "".join(
        f"{fresh_name(i)}. 300 A {fresh_address(i)}\n{fresh_name(i)}. 300 AAAA {fresh_address(i, 6)}\n"
        for i in range(FRESH_NAMES)
    )
    for zone, records in zones.items():
        lines = "\n".join(line.strip() for line in records.splitlines())
        (directory / f"{zone}.zone").write_text(SOA.format(zone) + lines + "\n")
    (directory / "knot.conf").write_text(
        f"server:\n  rundir: {directory}\n  listen: {AUTHORITY}@53\n"
        f"database:\n  storage: {directory}\n  journal-db-max-size: 16M\n"
        "log:\n  - target: stderr\n    any: warning\n"
        f"template:\n  - id: default\n    storage: {directory}\n    journal-content: none\n    zonefile-sync: -1\n"
        "zone:\n" + "".join(f"  - domain: {zone}\n    file: {zone}.zone\n" for zone in zones)
    )
    (directory / "unbound.conf").write_text(
        "server:\n"
        f'  directory: "{directory}"\n  chroot: ""\n  username: ""\n  pidfile: "{directory}/unbound.pid"\n'
        '  use-syslog: no\n  logfile: ""\n  verbosity: 1\n'
        f"  interface: {RESOLVER}\n  interface: {RESOLVER6}\n"
        "  access-control: 0.0.0.0/0 allow\n  access-control: ::/0 allow\n"
        '  module-config: "iterator"\n  local-zone: "test." nodefault\n'
        # Questions that stay open, for those who would like to answer them.
        '  local-zone: "silent.allowed.test." deny\n'
        "  edns-buffer-size: 1232\n  so-rcvbuf: 1m\n  rrset-roundrobin: no\n"
        "remote-control:\n  control-enable: no\n"
        + "".join(f'stub-zone:\n  name: "{zone}"\n  stub-addr: {AUTHORITY}\n' for zone in zones)
    )
    lab.spawn("net", ["knotd", "-c", f"{directory}/knot.conf"], "knot")
    lab.spawn("net", ["unbound", "-d", "-c", f"{directory}/unbound.conf"], "unbound")
    poll("DNS answers on the host", lambda: _resolves(lab, "registry.allowed.test") and _resolves(lab, "evil.test"))


def _resolves(lab: Lab, name: str) -> bool:
    try:
        return bool(lab.host.call("resolve", name=name))
    except OSError:
        return False


# --- registries ------------------------------------------------------------------------------------------------------
def _make_certificates(directory: Path) -> None:
    zones = ["allowed.test", "blobs.allowed.test", "fresh.allowed.test", "evil.test", "quay.io"]
    names = [*zones, *(f"*.{zone}" for zone in zones)]
    (directory / "names").write_text("subjectAltName=" + ",".join(f"DNS:{name}" for name in names))
    ca, key, request = f"{directory}/ca", f"{directory}/server.key", f"{directory}/server.csr"
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    command("openssl", "req", "-x509", *new_key, "-keyout", f"{ca}.key", "-out", f"{ca}.crt", "-days", "2",
            "-subj", "/CN=lab CA")  # fmt: skip
    command("openssl", "req", *new_key, "-keyout", key, "-out", request, "-subj", "/CN=registries of the lab")
    command("openssl", "x509", "-req", "-in", request, "-CA", f"{ca}.crt", "-CAkey", f"{ca}.key", "-CAcreateserial",
            "-days", "2", "-extfile", f"{directory}/names", "-out", f"{directory}/server.crt")  # fmt: skip


def _start_registries(lab: Lab, directory: Path) -> None:
    tls = {"tls": {"certificate": f"{directory}/server.crt", "key": f"{directory}/server.key"}}
    for port in (443, 8443, 5000):
        configuration = {
            "version": 0.1,
            "log": {"level": "info"},
            "storage": {"filesystem": {"rootdirectory": f"{directory}/images"}},
            "http": {"addr": f":{port}", **(tls if port != 5000 else {})},
        }
        (directory / f"registry-{port}.yml").write_text(json.dumps(configuration))  # JSON is YAML
        lab.spawn("net", ["docker-registry", "serve", f"{directory}/registry-{port}.yml"], f"registry-{port}")
    for port in (443, 8443, 5000):
        poll(f"registry on {port}", lambda port=port: lab.net.attempt("127.0.0.1", port).reached)  # type: ignore[misc]


def image_archive(busybox: Path) -> bytes:
    """A docker-archive of one layer: a static busybox and the names by which it is called."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("bin", "etc", "tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        entry = tarfile.TarInfo("bin/busybox")
        entry.mode, entry.size = 0o755, busybox.stat().st_size
        tar.addfile(entry, io.BytesIO(busybox.read_bytes()))
        for applet in ("sh", "nc", "wget", "nslookup", "cat", "sleep", "true"):
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    layer_digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = {
        "architecture": command("dpkg", "--print-architecture").strip(),
        "os": "linux",
        "config": {"Cmd": ["true"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        "history": [{}],
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in (
            ("config.json", json.dumps(config).encode()),
            ("layer.tar", layer.getvalue()),
            ("manifest.json", json.dumps(
                [{"Config": "config.json", "RepoTags": [CLIENT_IMAGE], "Layers": ["layer.tar"]}]).encode()),
        ):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()
