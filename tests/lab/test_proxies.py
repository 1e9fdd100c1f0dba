"""Forward proxies, real ones: a listed one is reached and asked for allowed hosts only, others get nobody further.

Corporate proxies stand in "the internet"; one tinyproxy there answers on every address, and the policy lists one of
them. Another one is a user's own, on the enforced host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.clients import Clients
from tests.lab.enforcer import Enforcer, policy
from tests.lab.internet import ALLOWED_ADDRESS, EVIL_ADDRESS, REPOSITORY
from tests.lab.lab import HOST_ADDRESS, RESOLVER, Lab, accepts, poll

BRIDGE = "br-proxied"
pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.timeout(180)]

PROXY, PORT = "proxy.allowed.test", 3128
PROXY_ADDRESS = "198.18.1.21"
LOCAL_PORT = 8118
BRIDGE = "10.77.0.1"  # the enforced host, as the container sees it
ALLOWED, PLAIN = "registry.allowed.test", "plain.allowed.test:5000"
NOBODY = 65534

BY_NAME = f'\n[[proxy]]\nname = "corp-proxy"\nhosts = ["{PROXY}"]\nports = [{PORT}]\n'
BY_ADDRESS = f'\n[[proxy]]\nname = "corp-proxy"\naddresses = ["{PROXY_ADDRESS}"]\nports = [{PORT}]\n'
POLICY = policy(more=BY_NAME)

Pull = Callable[[str], tuple[int, str]]  # registry -> exit code and what was printed


def tinyproxy(directory: Path, name: str, port: int) -> list[str]:
    """What runs a tinyproxy that lets everybody ask for everything."""
    configuration = directory / f"{name}.conf"
    configuration.write_text(f"Port {port}\nTimeout 60\nMaxClients 100\nLogLevel Info\nDisableViaHeader Yes\n")
    configuration.chmod(0o644)
    return ["tinyproxy", "-d", "-c", str(configuration)]


@pytest.fixture(scope="module")
def corporate(lab: Lab) -> Callable[[], list[str]]:
    """What the proxies of the internet have been asked for so far."""
    directory = lab.directory / "proxy"
    directory.mkdir(exist_ok=True)
    (directory / "resolv.conf").write_text(f"nameserver {RESOLVER}\n")
    # The internet has no /etc of its own.
    own_resolver = f'mount --bind {directory}/resolv.conf "$(realpath /etc/resolv.conf)" && exec "$@"'
    command = ["unshare", "--mount", "sh", "-ec", own_resolver, "sh", *tinyproxy(directory, "corporate", PORT)]
    lab.spawn("net", command, "proxy-corporate")
    poll("the proxy", lambda: lab.net.attempt(PROXY_ADDRESS, PORT).reached)
    return lambda: re.findall(r"Request \(file descriptor \d+\): (\S+ \S+) HTTP", lab.log("proxy-corporate"))


@pytest.fixture(scope="module")
def users_own(lab: Lab) -> None:
    """A proxy that a user has started on the host, on all of its addresses."""
    # Where nobody else may go: the lab's directory is root's.
    directory = Path("/dev/shm") / lab.name  # noqa: S108 - for the file's reader is another user
    directory.mkdir()
    try:
        command = tinyproxy(directory, "own", LOCAL_PORT)
        identity = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        lab.spawn("host", [*identity, *command], "proxy-own")
        poll("the user's proxy", lambda: lab.host.attempt("127.0.0.1", LOCAL_PORT).reached)
    finally:
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


@pytest.fixture(scope="module")
def docker(lab: Lab, clients: Clients, corporate: object) -> Iterator[Pull]:
    """A dockerd behind HTTPS_PROXY and HTTP_PROXY, beside the lab's own."""
    directory = lab.directory / "behind-proxy"
    directory.mkdir()
    (directory / "daemon.json").write_text("{}")
    socket = f"{directory}/docker.sock"
    # A dockerd without a bridge deletes docker0, which is the other's.
    lab.ip("host", f"link add {BRIDGE} type bridge", f"addr add 10.79.0.1/24 dev {BRIDGE}", f"link set {BRIDGE} up")
    dockerd = lab.spawn(
        "host",
        ["env", f"HTTPS_PROXY=http://{PROXY}:{PORT}", f"HTTP_PROXY=http://{PROXY}:{PORT}", "dockerd",
         "--config-file", f"{directory}/daemon.json", "--host", f"unix://{socket}", "--data-root", f"{directory}/data",
         "--exec-root", f"{directory}/exec", "--pidfile", f"{directory}/pid", "--bridge", BRIDGE, "--iptables=false",
         "--ip6tables=false", "--insecure-registry", PLAIN, "--insecure-registry", "evil.test:5000"],
        "dockerd-behind-proxy",
    )  # fmt: skip
    poll("dockerd", lambda: accepts(socket, 0) or dockerd.poll() is not None)
    assert dockerd.poll() is None, lab.log("dockerd-behind-proxy")[-2000:]
    command = ["docker", "--host", f"unix://{socket}"]

    def pull(registry: str) -> tuple[int, str]:
        lab.run("host", [*command, "rmi", "--force", f"{registry}/{REPOSITORY}"])
        done = lab.run("host", [*command, "pull", f"{registry}/{REPOSITORY}"])
        return done.returncode, done.stdout

    yield pull
    dockerd.terminate()
    dockerd.wait(20)
    lab.ip("host", f"link del {BRIDGE}")


@pytest.fixture(scope="module")
def podman(lab: Lab, clients: Clients, corporate: object) -> Pull:
    """podman behind the same."""

    def pull(registry: str) -> tuple[int, str]:
        environment = ["env", f"HTTPS_PROXY=http://{PROXY}:{PORT}", f"HTTP_PROXY=http://{PROXY}:{PORT}"]
        tls = ["--tls-verify=false"] if registry.endswith(":5000") else []
        command = [*environment, *clients._podman, "pull", *tls, f"docker://{registry}/{REPOSITORY}"]
        done = lab.run("host", command)
        return done.returncode, done.stdout

    return pull


def curl(lab: Lab, where: str, proxy: str, url: str, *options: str) -> tuple[int, str]:
    """Exit code, and the body, or what curl says went wrong."""
    command = ["curl", "--silent", "--show-error", "--max-time", "10", "--proxy", f"http://{proxy}", *options, url]
    done = lab.run(where, command)
    return done.returncode, done.stdout


@pytest.fixture
def enforcer(any_enforcer: Enforcer, corporate: object) -> Enforcer:
    any_enforcer.ensure(POLICY)
    return any_enforcer


# --- engines behind the corporate proxy -------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ["docker", "podman"])
@pytest.mark.parametrize("registry", [ALLOWED, PLAIN])
def test_an_engine_pulls_an_allowed_image_through_the_proxy(
    enforcer: Enforcer, corporate: Callable[[], list[str]], request: pytest.FixtureRequest, engine: str, registry: str
) -> None:
    pull: Pull = request.getfixturevalue(engine)
    before = len(corporate())
    exit_code, printed = pull(registry)
    assert exit_code == 0, printed
    asked = corporate()[before:]
    assert any(request.startswith("GET" if registry == PLAIN else "CONNECT") for request in asked)
    assert all(re.match(rf"(CONNECT |(GET|HEAD) http://){registry}", request) for request in asked), asked


# CONNECT is answered 403, of which Go shows the reason phrase alone; a request for a whole URL has its own words.
_DENIED = "Lab does not allow this registry; ask platform@lab.test"
SAID = {
    ("docker", "evil.test"): 'Error response from daemon: Get "https://evil.test/v2/": Forbidden',
    ("podman", "evil.test"): 'pinging container registry evil.test: Get "https://evil.test/v2/": Forbidden',
    ("docker", "evil.test:5000"): f"denied: {_DENIED}",
    ("podman", "evil.test:5000"): "pinging container registry evil.test:5000: invalid status code from registry 403",
}


@pytest.mark.attack("an unlisted registry through the corporate proxy")
@pytest.mark.parametrize(("engine", "registry"), SAID)
def test_an_engine_is_refused_an_unlisted_image_through_the_proxy(
    enforcer: Enforcer, corporate: Callable[[], list[str]], request: pytest.FixtureRequest, engine: str, registry: str
) -> None:
    pull: Pull = request.getfixturevalue(engine)
    before = len(corporate())
    exit_code, printed = pull(registry)
    assert exit_code != 0
    assert SAID[engine, registry] in printed, printed
    assert corporate()[before:] == []  # the proxy has not heard of it


# --- whatever speaks to it --------------------------------------------------------------------------------------------
@pytest.mark.attack("CONNECT to an unlisted host")
@pytest.mark.parametrize("listed", [BY_NAME, BY_ADDRESS], ids=["by-name", "by-address"])
def test_a_container_connects_through_the_proxy_to_allowed_hosts_only(
    enforcer: Enforcer, lab: Lab, corporate: Callable[[], list[str]], listed: str
) -> None:
    enforcer.ensure(policy(more=listed))
    proxy = f"{PROXY if listed == BY_NAME else PROXY_ADDRESS}:{PORT}"
    assert curl(lab, "ct", proxy, f"https://{ALLOWED}/v2/") == (0, "{}")
    before = len(corporate())
    exit_code, said = curl(lab, "ct", proxy, "https://evil.test/v2/")
    assert (exit_code, "response 403" in said) == (56, True), said
    assert corporate()[before:] == []


@pytest.mark.attack("CONNECT to an address")
@pytest.mark.parametrize("target", [EVIL_ADDRESS, ALLOWED_ADDRESS])
def test_connect_must_name_a_host_and_not_an_address(enforcer: Enforcer, lab: Lab, target: str) -> None:
    exit_code, said = curl(lab, "ct", f"{PROXY}:{PORT}", f"https://{target}/v2/", "--insecure")
    assert (exit_code, "response 403" in said) == (56, True), said


@pytest.mark.attack("CONNECT to another port of an allowed host")
def test_connect_reaches_an_allowed_host_on_its_rules_ports_only(enforcer: Enforcer, lab: Lab) -> None:
    assert curl(lab, "ct", f"{PROXY}:{PORT}", "https://alt.allowed.test:8443/v2/") == (0, "{}")
    exit_code, said = curl(lab, "ct", f"{PROXY}:{PORT}", f"https://{ALLOWED}:8443/v2/")
    assert (exit_code, "response 403" in said) == (56, True), said


@pytest.mark.attack("a whole URL of an unlisted host")
def test_a_whole_url_names_an_allowed_host(enforcer: Enforcer, lab: Lab, corporate: Callable[[], list[str]]) -> None:
    assert curl(lab, "ct", f"{PROXY}:{PORT}", f"http://{PLAIN}/v2/") == (0, "{}")
    before = len(corporate())
    for url in ("http://evil.test:5000/v2/", "http://evil.test/v2/", f"http://{EVIL_ADDRESS}:5000/v2/"):
        exit_code, said = curl(lab, "ct", f"{PROXY}:{PORT}", url)
        assert (exit_code, '"DENIED"' in said) == (0, True), said
    assert corporate()[before:] == []


@pytest.mark.attack("an allowed Host beside the URL of another")
def test_of_a_whole_url_its_own_host_counts(enforcer: Enforcer, lab: Lab) -> None:
    exit_code, said = curl(lab, "ct", f"{PROXY}:{PORT}", "http://evil.test:5000/v2/", "--header", f"Host: {PLAIN}")
    assert (exit_code, '"DENIED"' in said) == (0, True), said
    assert curl(lab, "ct", f"{PROXY}:{PORT}", f"http://{PLAIN}/v2/", "--header", "Host: evil.test") == (0, "{}")


@pytest.mark.attack("another server name inside an allowed tunnel")
def test_the_server_name_inside_the_tunnel_must_be_allowed_too(enforcer: Enforcer, lab: Lab) -> None:
    inside = ["--connect-to", f"::{ALLOWED}:443"]
    assert curl(lab, "ct", f"{PROXY}:{PORT}", "https://x.blobs.allowed.test/v2/", *inside) == (0, "{}")
    exit_code, said = curl(lab, "ct", f"{PROXY}:{PORT}", "https://evil.test/v2/", *inside)
    assert (exit_code, "alert access denied" in said) == (35, True), said


@pytest.mark.attack("something else than TLS inside an allowed tunnel")
def test_what_is_no_tls_inside_a_tunnel_is_refused(enforcer: Enforcer, lab: Lab) -> None:
    tunnel = ["--proxytunnel", "--connect-to", f"::{PLAIN}"]
    for host in ("evil.test", PLAIN):
        exit_code, said = curl(lab, "ct", f"{PROXY}:{PORT}", f"http://{host}/v2/", *tunnel)
        assert (exit_code, '"DENIED"' in said) == (0, True), said


@pytest.mark.attack("CONNECT where it cannot be read: in TLS to the proxy, or by SOCKS")
def test_a_proxy_is_spoken_to_in_plain_http_only(enforcer: Enforcer, lab: Lab) -> None:
    ask = ["curl", "-sS", "--max-time", "10", f"https://{ALLOWED}/v2/"]
    within_tls = lab.run("ct", [*ask, "--proxy-insecure", "--proxy", f"https://{PROXY}:{PORT}"])
    assert (within_tls.returncode, "alert access denied" in within_tls.stdout) == (35, True), within_tls.stdout
    for scheme in ("socks5h", "socks4a"):
        assert lab.run("ct", [*ask, "--proxy", f"{scheme}://{PROXY}:{PORT}"]).returncode == 97  # not its protocol


@pytest.mark.attack("a second request behind an allowed one")
def test_a_request_to_the_proxy_comes_alone_and_brings_nothing(
    enforcer: Enforcer, lab: Lab, corporate: Callable[[], list[str]]
) -> None:
    before = len(corporate())
    allowed = f"GET http://{PLAIN}/v2/ HTTP/1.1\\r\\nHost: {PLAIN}\\r\\n\\r\\n"
    other = "GET http://evil.test:5000/v2/ HTTP/1.1\\r\\nHost: evil.test\\r\\n\\r\\n"
    script = f"(printf '{allowed}{other}'; sleep 0.3) | busybox nc -w 5 {PROXY} {PORT}"
    said = lab.run("ct", ["sh", "-c", script]).stdout
    assert said.startswith("HTTP/1.1 403 "), said
    # The price: to registries without TLS nothing can be pushed through a proxy.
    exit_code, said = curl(lab, "ct", f"{PROXY}:{PORT}", f"http://{PLAIN}/v2/lib/hello/blobs/uploads/", "--data", "x")
    assert (exit_code, '"DENIED"' in said) == (0, True), said
    assert corporate()[before:] == []


@pytest.mark.attack("the corporate proxy's own name as a registry's")
def test_a_proxys_own_name_permits_nothing_at_other_addresses(enforcer: Enforcer, lab: Lab) -> None:
    exit_code, said = curl(lab, "ct", f"{PROXY}:{PORT}", f"https://{PROXY}/v2/")
    assert (exit_code, "response 403" in said) == (56, True), said
    inside = ["--connect-to", f"::{ALLOWED}:443"]
    exit_code, said = curl(lab, "ct", f"{PROXY}:{PORT}", f"https://{PROXY}/v2/", *inside)
    assert (exit_code, "alert access denied" in said) == (35, True), said


# --- proxies that nobody lists ----------------------------------------------------------------------------------------
@pytest.mark.attack("a proxy of one's own, outside, on a registry port")
def test_an_unlisted_proxy_is_refused_where_connections_are_judged(enforcer: Enforcer, lab: Lab) -> None:
    # Engines on every port.
    assert lab.engine.attempt(EVIL_ADDRESS, PORT).refused
    # Containers on registry ports.
    enforcer.ensure(policy(more=BY_NAME).replace("ports = [443, 5000]", f"ports = [443, {PORT}, 5000]", 1))
    exit_code, said = curl(lab, "ct", f"{EVIL_ADDRESS}:{PORT}", f"https://{ALLOWED}/v2/")
    assert (exit_code, "response 403" in said) == (56, True), said
    assert curl(lab, "ct", f"{PROXY}:{PORT}", f"https://{ALLOWED}/v2/") == (0, "{}")


@pytest.mark.attack("a local proxy, run by a user")
@pytest.mark.parametrize(("where", "address"), [("host", "127.0.0.1"), ("ct", BRIDGE), ("ct", HOST_ADDRESS)])
def test_a_users_own_proxy_gets_nobody_further_than_its_own_connections(
    enforcer: Enforcer, lab: Lab, users_own: None, where: str, address: str
) -> None:
    enforcer.ensure(policy(host="strict", more=BY_NAME))
    own = f"{address}:{LOCAL_PORT}"
    assert curl(lab, where, own, f"https://{ALLOWED}/v2/") == (0, "{}")
    for target in ("evil.test", EVIL_ADDRESS):
        exit_code, said = curl(lab, where, own, f"https://{target}/v2/", "--insecure")
        assert exit_code in (35, 56), said
    exit_code, said = curl(lab, where, own, "http://evil.test:5000/v2/")
    assert '"DENIED"' in said or exit_code != 0, said
    # An allowed tunnel, and another name inside.
    exit_code, said = curl(lab, where, own, "https://evil.test/v2/", "--connect-to", f"::{ALLOWED}:443")
    assert (exit_code, "alert access denied" in said) == (35, True), said


def reaches(lab: Lab, where: str, url: str, *options: str) -> bool:
    """Whether curl gets a registry's answer to a ping."""
    done = lab.run(where, ["curl", "--silent", "--insecure", "--max-time", "10", *options, url])
    return done.returncode == 0 and done.stdout.strip() == "{}"


@pytest.mark.attack("the corporate proxy, where the host is refused registries only")
def test_under_registries_what_is_recognised_is_refused_through_a_proxy_too(enforcer: Enforcer, lab: Lab) -> None:
    enforcer.ensure(policy(host="registries", more=BY_NAME))
    proxy = ["--proxy", f"http://{PROXY}:{PORT}"]
    assert not reaches(lab, "host", "https://quay.io/v2/", *proxy)
    assert reaches(lab, "host", "https://evil.test/v2/", *proxy)
    assert reaches(lab, "host", f"https://{ALLOWED}/v2/", *proxy)


@pytest.mark.attack("a local proxy, where the host is refused registries only")
def test_under_registries_a_users_own_proxy_reaches_what_is_not_recognised(
    enforcer: Enforcer, lab: Lab, users_own: None
) -> None:
    enforcer.ensure(policy(host="registries", more=BY_NAME))
    own = ["--proxy", f"http://{BRIDGE}:{LOCAL_PORT}"]
    for url in ("https://quay.io/v2/", "http://evil.test:5000/v2/"):
        assert not reaches(lab, "ct", url, *own)
    # The price of a lenient host: whoever is judged strictly gets as far as the host's own programs (THREATMODEL.md).
    assert not reaches(lab, "ct", "https://evil.test/v2/")
    assert reaches(lab, "ct", "https://evil.test/v2/", *own)
