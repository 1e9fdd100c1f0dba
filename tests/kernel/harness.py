"""One set of loaded programs, and packets through it."""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from enforcer import bpf, kernel_abi
from enforcer.dns_answer import SPECIAL_RANGES
from enforcer.kernel_abi import DEFAULT_MARKS, DnsEvent, Judging, MarkedScope, Marks, Outcome, Protocol
from enforcer.policy import Address
from tests import dns_vectors
from tests.kernel import packets

RESOLVER_V4, CLIENT_V4 = dns_vectors.RESOLVER, ip_address("203.0.113.9")
RESOLVER_V6, CLIENT_V6 = ip_address("2001:db8:53::1"), ip_address("2001:db8:9::9")
STRANGER = ip_address("198.51.100.99")
CLIENT_PORT = 40_000
TC_ACT_UNSPEC = 0xFFFFFFFF
SECOND_NS = 1_000_000_000
# What a kernel that lets connect hooks mark is given: not what takes their place on others.
_BY_THEMSELVES = {bpf.CgroupHook.SOCK_OPS, bpf.CgroupHook.SETSOCKOPT}
HOOKS = [hook.name.lower() for hook in bpf.CgroupHook if hook not in _BY_THEMSELVES]
MASK, VOUCHED = DEFAULT_MARKS.mask, DEFAULT_MARKS.vouched
HOST, ENGINE, CONTAINER = map(DEFAULT_MARKS.of, (MarkedScope.HOST, MarkedScope.ENGINE, MarkedScope.CONTAINER))
FOREIGN_MARK = 0x0000_C0DE  # bits of somebody else
QUERY_SECONDS, FLOOR_SECONDS, CEILING_SECONDS, MARGIN_SECONDS = 10, 300, 86_400, 60


class Harness:
    """Packets in; outcome, learned addresses and events out. The policy is that of dns_vectors."""

    def __init__(self, state: bpf.KernelState) -> None:
        self.state = state
        self.events_reader = bpf.EventReader(state.maps["events"])
        self.endings_reader = bpf.EventReader(state.maps["endings"])
        self.configure()
        maps = state.maps
        maps["resolvers"].update_many((kernel_abi.pack_address(a), b"\x01") for a in (RESOLVER_V4, RESOLVER_V6))
        maps["ranges"].update_many(
            (kernel_abi.pack_range_key(network.network_address, network.prefixlen), struct.pack("=I", range_class))
            for network, range_class in SPECIAL_RANGES
        )
        self.write_names()

    def write_names(self) -> None:
        """The names of dns_vectors, and no others."""
        self.state.maps["names"].replace_all(
            {
                kernel_abi.pack_name_key(
                    entry.pattern.name, wildcard=entry.pattern.wildcard
                ): kernel_abi.pack_name_rule(number, entry.ports, private_addresses=entry.private_addresses)
                for number, entry in enumerate(dns_vectors.POLICY)
            }
        )

    def configure(
        self,
        *,
        configured: bool = True,
        netns_cookie: int = 0,
        pidns: tuple[int, int] = (0, 0),
        query_seconds: int = QUERY_SECONDS,
        judging: Judging = Judging.NOT,
        observing: bool = False,
        recognising: bool = False,
        marks: Marks = DEFAULT_MARKS,
    ) -> None:
        """Writes the settings; `pidns` is (device, inode) of the host's."""
        lifetimes = (FLOOR_SECONDS, CEILING_SECONDS, MARGIN_SECONDS, query_seconds)
        self.state.maps["settings"].update(
            bytes(4),
            kernel_abi.SETTINGS.codec.pack(
                0x0123456789ABCDEF,
                *(seconds * SECOND_NS for seconds in lifetimes),
                *(netns_cookie, *pidns),
                *marks.settings,
                *(configured, judging, observing, recognising, 0),
            ),
        )

    def reset(self) -> None:
        """Nothing asked, nothing learned, no event waiting."""
        self.configure()
        for name in "queries", "learned", "cgroups", "programs":
            self.state.maps[name].clear()
        while self.events_reader.read():
            pass

    def run(self, program: str, frame: bytes, mark: int = 0) -> int:
        """The packet's mark afterwards; the programs only ever leave the verdict to the next filter."""
        if mark:
            self.need_marks()
        result = bpf.run_packet(self.state.programs[program], frame, mark=mark)
        assert result.verdict == TC_ACT_UNSPEC
        assert result.packet == frame
        return result.mark

    @functools.cached_property
    def tests_marks(self) -> bool:
        """Whether BPF_PROG_TEST_RUN takes and returns a packet's mark."""
        try:
            bpf.run_packet(self.state.programs["gate"], bytes(64), mark=FOREIGN_MARK)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def need_marks(self) -> None:
        """Skips the test where a mark cannot be tested without a network."""
        if not self.tests_marks:
            pytest.skip("BPF_PROG_TEST_RUN knows no marks here (5.6)")

    def outcomes(self) -> dict[Outcome, int]:
        """The counters, summed over the processors."""
        counters = self.state.maps["counters"]
        return {outcome: counters.sum_u64(struct.pack("=I", outcome)) for outcome in Outcome}

    def learn(self, frame: bytes) -> list[Outcome]:
        """What became of the messages in an arriving packet, each once."""
        before = self.outcomes()
        self.run("learn", frame)
        return [outcome for outcome, count in self.outcomes().items() for _ in range(count - before[outcome])]

    def ask(self, query: bytes, *, port: int = CLIENT_PORT, v6: bool = False) -> None:
        """A query leaves over UDP."""
        client, resolver = (CLIENT_V6, RESOLVER_V6) if v6 else (CLIENT_V4, RESOLVER_V4)
        self.run("track_query", packets.frame(client, resolver, Protocol.UDP, packets.udp(port, 53, query)))

    def answer(self, wire: bytes, *, port: int = CLIENT_PORT, v6: bool = False) -> Outcome:
        """An answer arrives over UDP."""
        client, resolver = (CLIENT_V6, RESOLVER_V6) if v6 else (CLIENT_V4, RESOLVER_V4)
        (outcome,) = self.learn(packets.frame(resolver, client, Protocol.UDP, packets.udp(53, port, wire)))
        return outcome

    def learned(self) -> dict[tuple[Address, int], tuple[int, int]]:
        """(address, port) -> (expires_at, pattern_id)."""
        return {
            kernel_abi.unpack_learned_key(key): kernel_abi.LEARNED.codec.unpack(value)[:2]
            for key, value in self.state.maps["learned"].items()
        }

    def used_at(self, address: Address, port: int) -> int:
        """When a connection went to a learned address; 0: never."""
        value = self.state.maps["learned"].lookup(kernel_abi.pack_learned_key(address, port))
        assert value is not None
        return int(kernel_abi.LEARNED.codec.unpack(value)[2])

    def addresses(self) -> set[Address]:
        """What was learned, whatever the port."""
        return {address for address, _ in self.learned()}

    def vouch(self, address: Address, port: int, seconds: float, *, unnamed: bool = False, proxy: bool = False) -> None:
        """Puts an address into `learned` that expires in `seconds`."""
        expires_at = self.state.now_ns() + int(seconds * SECOND_NS)
        value = kernel_abi.pack_learned(
            expires_at, 0, unnamed_until=expires_at * unnamed, proxy_until=expires_at * proxy
        )
        self.state.maps["learned"].update(kernel_abi.pack_learned_key(address, port), value)

    def events(self) -> Iterator[DnsEvent]:
        """What user space is told."""
        while records := self.events_reader.read():
            yield from map(kernel_abi.decode_event, records)
