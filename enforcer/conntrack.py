"""The connections that the kernel tracks in this network namespace, read over netlink."""

from __future__ import annotations

from ipaddress import ip_address

from pyroute2 import NFCTSocket

from enforcer.kernel_abi import Protocol
from enforcer.policy import Address


def tcp_destinations() -> set[tuple[Address, int]]:
    """Where TCP connections of this host and through it lead, after translation. OSError if the kernel does not tell.

    Blocks, about 0.1 ms for each connection; pyroute2 wants a thread without a running event loop.
    """
    found = set()
    with NFCTSocket() as tracked:
        for entry in tracked.dump():
            # The answers come from where the packets really go.
            reply = entry.get_attr("CTA_TUPLE_REPLY")
            protocol = reply.get_attr("CTA_TUPLE_PROTO")
            if protocol.get_attr("CTA_PROTO_NUM") == Protocol.TCP:
                addresses = reply.get_attr("CTA_TUPLE_IP")
                source = addresses.get_attr("CTA_IP_V4_SRC") or addresses.get_attr("CTA_IP_V6_SRC")
                found.add((ip_address(source), int(protocol.get_attr("CTA_PROTO_SRC_PORT"))))
    return found
