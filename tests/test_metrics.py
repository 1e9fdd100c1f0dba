"""Metrics: names, help, closed labels; whoever asks wrongly, slowly or too often hurts himself only."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from enforcer import __version__, metrics
from enforcer.bounds import Bounded, Room
from enforcer.kernel_abi import Outcome

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
SNAPSHOT = metrics.Snapshot(
    enforcing=True,
    mode="enforce",
    digest="ab" * 32,
    dns_answers={outcome.name.lower(): 7 for outcome in Outcome},
    learned={"ipv4": 3, "ipv6": 0},
    refused={("container", "tcp"): 5},
    observed={("container", "tcp"): 0},
    guarded={"passed": 4, "unlisted_name": 1},
    evicted=7,
    events_lost=1,
    audit_dropped={"kernel": 2, "pending": 0, "output": 0},
    rooms={Bounded.LEARNED: Room(9, 8, 7)},
)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.asynccontextmanager
async def serving(port: int = 0) -> AsyncIterator[metrics.Server]:
    faults: list[dict[str, Any]] = []  # any would end the daemon
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    with metrics.Server(metrics.Metrics(lambda: SNAPSHOT), "127.0.0.1", port) as server:
        task = asyncio.create_task(server.run())
        try:
            yield server
        finally:
            task.cancel()
            await asyncio.wait([task])
    assert faults == []


async def ask(port: int, request: bytes) -> bytes:
    """All of the reply; what came of it where the server had not read all that was said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reply = b""
    with contextlib.suppress(ConnectionError):
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(10):
            while part := await reader.read(65_536):
                reply += part
    writer.close()
    return reply


def scrape() -> str:
    async def scrape_once() -> str:
        async with serving() as server:
            head, _, body = (await ask(server.port, REQUEST)).partition(b"\r\n\r\n")
            assert b"\r\nContent-Type: text/plain; version=0.0.4" in head
            assert f"Content-Length: {len(body)}".encode() in head
            return body.decode()

    return asyncio.run(scrape_once())


def test_every_promised_metric_is_there_with_help_and_its_value() -> None:
    families = {family.name: family for family in text_string_to_metric_families(scrape())}
    assert all(family.documentation for family in families.values())
    values = {
        (sample.name, tuple(sorted(sample.labels.values()))): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["enforcer_enforcing", ()] == 1
    assert values["enforcer_policy_info", ("ab" * 32, "enforce")] == 1
    assert values["enforcer_dns_answers_total", ("learned",)] == 7
    assert values["enforcer_learned_addresses", ("ipv4",)] == 3
    assert values["enforcer_refused_connections_total", ("container", "tcp")] == 5
    assert values["enforcer_learned_evicted_total", ()] == 7
    assert values["enforcer_kernel_events_lost_total", ()] == 1
    assert values["enforcer_audit_dropped_total", ("kernel",)] == 2
    assert values["enforcer_held", ("learned_permissions",)] == 8
    assert values["enforcer_held_limit", ("learned_permissions",)] == 9
    assert values["enforcer_bound_reached_total", ("learned_permissions",)] == 7
    assert values["enforcer_policy_reloads_total", ("bad_policy",)] == 0
    assert values["enforcer_learn_seconds_count", ()] == 0
    assert ("enforcer_build_info", (__version__,)) in values


def test_promtool_is_content() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (package prometheus)")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(), capture_output=True, text=True, timeout=30, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_url_library_reads_it() -> None:
    async def read() -> bytes:
        async with serving() as server:
            with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{server.port}/metrics") as response:
                return bytes(response.read())

    assert b"enforcer_enforcing 1.0" in asyncio.run(read())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"HEAD /metrics HTTP/1.0\r\n\r\n", b"200"),
        (b"GET /../../etc/shadow HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", b"405"),
        (b"\x16\x03\x01" + bytes(100) + b"\r\n\r\n", b"400"),
        (b"GET /metrics\r\n\r\n", b"400"),
    ],
)
def test_what_is_asked_wrongly_is_told_so(request_: bytes, status: bytes) -> None:
    async def once() -> bytes:
        async with serving() as server:
            return await ask(server.port, request_)

    assert asyncio.run(once()).startswith(b"HTTP/1.1 " + status)


def test_a_head_without_end_is_not_kept() -> None:
    async def once() -> None:
        async with serving() as server:
            reply = await ask(server.port, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 5_000_000)
            assert reply == b"" or reply.startswith(b"HTTP/1.1 400")
            assert (await ask(server.port, REQUEST)).startswith(b"HTTP/1.1 200")

    asyncio.run(once())


def test_a_crowd_of_silent_clients_keeps_nobody_out_and_takes_no_descriptors() -> None:
    async def crowd() -> None:
        async with serving() as server:
            before = open_descriptors()
            silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(300)]
            try:
                assert (await asyncio.wait_for(ask(server.port, REQUEST), 3)).startswith(b"HTTP/1.1 200")
                assert open_descriptors() - before - len(silent) <= metrics.MAX_CLIENTS
                assert server.room.held <= metrics.MAX_CLIENTS
                assert server.room.turned_away >= len(silent) + 1 - metrics.MAX_CLIENTS
            finally:
                for _, writer in silent:
                    writer.transport.abort()

    asyncio.run(crowd())


def test_a_slow_client_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CLIENT_SECONDS", 0.3)

    async def slow() -> None:
        async with serving() as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(5):
                    while not reader.at_eof():
                        writer.write(b"G")
                        await asyncio.sleep(0.05)
            writer.close()

    asyncio.run(slow())


def test_however_often_it_is_asked_making_the_text_takes_its_share_only() -> None:
    made = 0

    def snapshot() -> metrics.Snapshot:
        nonlocal made
        made += 1
        time.sleep(0.1)  # more than with a hundred thousand addresses
        return replace(SNAPSHOT, events_lost=made)

    async def often() -> None:
        with metrics.Server(metrics.Metrics(snapshot), "127.0.0.1", 0) as server:
            already = made
            task = asyncio.create_task(server.run())
            for number in range(1, 6):  # at once, and each is what was true when it was asked
                assert f"events_lost_total {already + number}.0" in (await ask(server.port, REQUEST)).decode()
            waiting = [asyncio.create_task(ask(server.port, REQUEST)) for _ in range(20)]
            done, _ = await asyncio.wait(waiting, timeout=8)
            replies = {reply.result() for reply in done}
            assert made - already <= 8
            assert len(done) == 20
            assert len(replies) <= 3
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(often())


def test_a_kernel_that_does_not_tell_is_a_503_and_no_end() -> None:
    def snapshot() -> metrics.Snapshot:
        raise metrics.SnapshotError("No such file or directory")

    async def once() -> bytes:
        registry = metrics.Metrics(lambda: SNAPSHOT)
        registry._snapshot = snapshot
        with metrics.Server(registry, "127.0.0.1", 0) as server:
            task = asyncio.create_task(server.run())
            try:
                return await ask(server.port, REQUEST)
            finally:
                task.cancel()
                await asyncio.wait([task])

    assert asyncio.run(once()).startswith(b"HTTP/1.1 503")


def test_an_address_that_is_not_this_hosts_is_refused_with_advice() -> None:
    with (
        pytest.raises(metrics.MetricsError, match=r"--metrics 192\.0\.2\.99:0: .*; choose an address and port of this"),
        metrics.Server(metrics.Metrics(lambda: SNAPSHOT), "192.0.2.99", 0),
    ):
        pass


def test_a_port_that_somebody_holds_is_a_problem_until_it_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "RETRY_SECONDS", 0.05)

    async def wait() -> None:
        taken = socket.socket()
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with serving(taken.getsockname()[1]) as server:
            assert "another program holds 127.0.0.1:" in (server.problem or "")
            await asyncio.sleep(0.2)
            assert server.problem
            taken.close()
            async with asyncio.timeout(5):
                while server.problem:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert (await ask(server.port, REQUEST)).startswith(b"HTTP/1.1 200")

    asyncio.run(wait())
    assert "metrics are not served until it lets go" in caplog.text
