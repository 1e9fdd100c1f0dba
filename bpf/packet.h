/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* From the network header to the payload; devices without an Ethernet header included (WireGuard, tun, PPP). */
#ifndef REGISTRY_ENFORCER_PACKET_H
#define REGISTRY_ENFORCER_PACKET_H

#define DNS_PORT	    53
#define IPV4_HEADER_BYTES   20
#define IPV6_HEADER_BYTES   40
#define UDP_HEADER_BYTES    8
#define TCP_HEADER_BYTES    20
#define MAX_EXTENSIONS	    4 /* IPv6 extension headers before the transport */
#define IP_OFFSET_MASK	    0x1fff
#define IP_MORE_FRAGMENTS   0x2000
#define IPV6_MORE_FRAGMENTS 0x0001

/* Where a packet comes from and goes to. Offsets in bytes from the network header. */
struct packet {
	__u8 source[16]; /* network order, IPv4 mapped */
	__u8 destination[16];
	__u64 protocol; /* IPPROTO_UDP or IPPROTO_TCP */
	__u64 source_port;
	__u64 destination_port;
	__u64 payload;	    /* offset of what follows the transport header */
	__u64 end;	    /* offset of the packet's end, by its own IP header */
	__u64 datagram_end; /* UDP: the end by its UDP header, beyond `end` in a fragment; TCP: `end` */
	__u64 fragment;	    /* more fragments follow */
	__u8 head[IPV6_HEADER_BYTES];
	__u8 transport[TCP_HEADER_BYTES];
	__u8 padding[4];
};

/* Bytes from `offset` on, or nothing. The helper reads the linear part only; drivers leave as little there as 128 bytes
 * and TCP sends from pages, so the first failure makes `wanted` bytes linear and tries again. */
INLINE int load_bytes(struct __sk_buff *skb, __u32 offset, void *to, __u32 length)
{
	__u32 wanted = offset + length + 64; /* offsets are from the network header, this from the link's */

	if (!bpf_skb_load_bytes_relative(skb, offset, to, length, BPF_HDR_START_NET))
		return 1;
	if (wanted > skb->len)
		wanted = skb->len;
	if (bpf_skb_pull_data(skb, wanted))
		return 0;
	return !bpf_skb_load_bytes_relative(skb, offset, to, length, BPF_HDR_START_NET);
}

INLINE __u64 field_16(const __u8 *at)
{
	return NETWORK_16(*(const __u16 *)at);
}

INLINE __u64 field_32(const __u8 *at)
{
	return NETWORK_32(*(const __u32 *)at);
}

INLINE void map_ipv4(__u8 *mapped, const __u8 *address)
{
	*(__u64 *)mapped = 0;
	*(__u32 *)(mapped + 8) = NETWORK_32(0x0000ffffU);
	*(__u32 *)(mapped + 12) = *(const __u32 *)address;
}

INLINE void copy_ipv6(__u8 *to, const __u8 *address)
{
	*(__u64 *)to = *(const __u64 *)address;
	*(__u64 *)(to + 8) = *(const __u64 *)(address + 8);
}

/* Offset of the transport header of an IPv4 packet, 0 if it cannot be read here. */
INLINE __u64 read_ipv4(struct packet *packet)
{
	const __u8 *ip = packet->head;
	__u64 header = (ip[0] & 15) * 4;
	__u64 fragmentation = field_16(ip + 6);

	if (ip[0] >> 4 != 4 || header < IPV4_HEADER_BYTES || fragmentation & IP_OFFSET_MASK)
		return 0;
	packet->fragment = fragmentation & IP_MORE_FRAGMENTS;
	packet->protocol = ip[9];
	packet->end = field_16(ip + 2);
	map_ipv4(packet->source, ip + 12);
	map_ipv4(packet->destination, ip + 16);
	return header;
}

/* Offset of the transport header of an IPv6 packet, 0 if it cannot be read here. */
INLINE __u64 read_ipv6(struct __sk_buff *skb, struct packet *packet)
{
	__u64 at = IPV6_HEADER_BYTES;
	int i;

	if (packet->head[0] >> 4 != 6)
		return 0;
	packet->fragment = 0;
	packet->protocol = packet->head[6];
	packet->end = IPV6_HEADER_BYTES + field_16(packet->head + 4);
	copy_ipv6(packet->source, packet->head + 8);
	copy_ipv6(packet->destination, packet->head + 24);
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_EXTENSIONS; i++) {
		__u64 next = packet->protocol;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT)
			return at;
		if (!load_bytes(skb, at, packet->transport, 8))
			return 0;
		packet->protocol = packet->transport[0];
		if (next == IPPROTO_FRAGMENT) {
			__u64 fragmentation = field_16(packet->transport + 2);

			if (fragmentation & ~7ULL & 0xffff)
				return 0;
			packet->fragment = fragmentation & IPV6_MORE_FRAGMENTS;
			at += 8;
		} else {
			at += (packet->transport[1] + 1) * 8;
		}
	}
	return at;
}

/* Whether this is UDP or TCP with ports that can be read; fills all of `packet`. */
INLINE int read_packet(struct __sk_buff *skb, struct packet *packet)
{
	__u64 transport;

	if (!load_bytes(skb, 0, packet->head, IPV6_HEADER_BYTES) &&
	    (skb->protocol != NETWORK_16(ETH_P_IP) || !load_bytes(skb, 0, packet->head, IPV4_HEADER_BYTES)))
		return 0; /* a datagram of IPv4 may be shorter than a header of IPv6 */
	if (skb->protocol == NETWORK_16(ETH_P_IP))
		transport = read_ipv4(packet);
	else if (skb->protocol == NETWORK_16(ETH_P_IPV6))
		transport = read_ipv6(skb, packet);
	else
		return 0;
	if (!transport)
		return 0;
	if (packet->protocol == IPPROTO_UDP) {
		if (!load_bytes(skb, transport, packet->transport, UDP_HEADER_BYTES))
			return 0;
		packet->payload = transport + UDP_HEADER_BYTES;
		packet->datagram_end = transport + field_16(packet->transport + 4);
	} else if (packet->protocol == IPPROTO_TCP) {
		if (!load_bytes(skb, transport, packet->transport, TCP_HEADER_BYTES))
			return 0;
		packet->payload = transport + (packet->transport[12] >> 4) * 4;
		packet->datagram_end = packet->end;
	} else {
		return 0;
	}
	packet->source_port = field_16(packet->transport);
	packet->destination_port = field_16(packet->transport + 2);
	FORGET();
	return 1;
}

#endif
