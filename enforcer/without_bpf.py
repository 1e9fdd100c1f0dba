"""What stands for bpf.KernelState on a host where BPF may not be loaded: maps in this process, and no programs.

The maps have the names, layouts and bounds of bpf/maps.h, so that what writes and reads them needs not know. Nobody
vouches for a packet here: a permission counts from the moment the nft set has it. Nothing outlives the process either;
the state file and the table do. Where only tc lacks BPF the kernel's maps serve, and none of this is needed: hearing
answers (overhearing, packet_socket) is apart from it.
"""

from __future__ import annotations

import enum
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from enforcer import kernel_abi
from enforcer.bpf import BpfError, Program


class NoLoader(enum.Enum):
    """Beside bpf.Loader, for status."""

    NONE = "none"


@dataclass(frozen=True, slots=True)
class NothingLoaded:
    """What of bpf.LoadReport there is to say; no generation is pinned."""

    why: str  # BPF is not used
    loader: NoLoader = NoLoader.NONE
    clock: int = time.CLOCK_BOOTTIME  # what "now" is in the maps: goes on while the host sleeps, as a TTL does
    programs: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


class Full(enum.Enum):
    """What becomes of a new element when the map is full."""

    REFUSES = enum.auto()
    EVICTS = enum.auto()  # the least recently used


class MemoryMap:
    """As bpf.BpfMap: keys and values are bytes of exactly these sizes. Not for two threads at once."""

    def __init__(self, name: str, key_size: int, value_size: int, max_entries: int, full: Full = Full.REFUSES) -> None:
        self.name = name
        self.key_size = key_size
        self.value_size = value_size
        self.max_entries = max_entries
        self._full = full
        self._elements: OrderedDict[bytes, bytes] = OrderedDict()  # least recently used first

    def lookup(self, key: bytes) -> bytes | None:
        """The value of exactly this key, None if there is none. (The kernel's `names` and `ranges` find prefixes: what
        a packet says is looked up in the policy here.)"""
        value = self._elements.get(key)
        if value is not None:
            self._elements.move_to_end(key)
        return value

    def sum_u64(self, key: bytes) -> int:
        """The counter; 0 if nobody counted."""
        return int.from_bytes(self._elements.get(key, b""), sys.byteorder)

    def update(self, key: bytes, value: bytes) -> None:
        """Inserts or replaces one element. Raises BpfError if the map is full and does not evict."""
        if len(key) != self.key_size or len(value) != self.value_size:
            raise ValueError(
                f"{self.name}: {len(key)} bytes to {len(value)}, not {self.key_size} bytes to {self.value_size}"
            )
        if key not in self._elements and len(self._elements) >= self.max_entries:
            if self._full is Full.REFUSES:
                raise BpfError(f"map {self.name} is full: it holds {self.max_entries} elements")
            self._elements.popitem(last=False)
        self._elements[key] = value
        self._elements.move_to_end(key)

    def update_many(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        """Inserts or replaces many."""
        for key, value in pairs:
            self.update(key, value)

    def delete(self, key: bytes) -> bool:
        """Whether there was such an element."""
        return self._elements.pop(key, None) is not None

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every element once, as of the first step: the map may change meanwhile."""
        yield from list(self._elements.items())

    def clear(self) -> None:
        """Deletes every element."""
        self._elements.clear()

    def replace_all(self, wanted: Mapping[bytes, bytes]) -> None:
        """Makes `wanted` the content. Raises BpfError, and changes nothing, if it does not fit."""
        if len(wanted) > self.max_entries:
            raise BpfError(f"map {self.name} holds {self.max_entries} elements, not {len(wanted)}")
        self._elements = OrderedDict((key, value) for key, value in self._elements.items() if key in wanted)
        self.update_many(wanted.items())


class MemoryState:
    """As bpf.KernelState; `why` BPF is not used goes to status."""

    def __init__(self, why: str) -> None:
        self.report = NothingLoaded(why)
        self.maps: dict[str, MemoryMap] = {opened.name: opened for opened in _maps()}
        self.programs: dict[str, Program] = {}

    def now_ns(self) -> int:
        """Now on the clock that the maps and events count in."""
        return time.clock_gettime_ns(self.report.clock)

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _maps() -> Iterator[MemoryMap]:
    """Those of bpf/maps.h that user space has to do with."""
    yield MemoryMap("settings", 4, kernel_abi.SETTINGS.size, 1)
    yield MemoryMap("names", kernel_abi.NAME_KEY.size, kernel_abi.NAME_RULE.size, kernel_abi.MAX_NAMES)
    yield MemoryMap("resolvers", 16, 1, kernel_abi.MAX_RESOLVERS)
    yield MemoryMap("ranges", kernel_abi.RANGE_KEY.size, 4, kernel_abi.MAX_RANGES)
    yield MemoryMap(
        "learned", kernel_abi.LEARNED_KEY.size, kernel_abi.LEARNED.size, kernel_abi.MAX_LEARNED, Full.EVICTS
    )
    yield MemoryMap("programs", kernel_abi.COMM_BYTES, 4, kernel_abi.MAX_PROGRAM_NAMES)
    yield MemoryMap("cgroups", 8, 4, kernel_abi.MAX_CGROUPS)
    yield MemoryMap("levels", 4, 4, kernel_abi.SCOPES)
    yield MemoryMap(
        "connects", kernel_abi.CONNECT_KEY.size, kernel_abi.CONNECT.size, kernel_abi.MAX_CONNECTS, Full.EVICTS
    )
    yield MemoryMap("counters", 4, 8, len(kernel_abi.Outcome))
