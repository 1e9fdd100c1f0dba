/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The verdict that nftables will come to, for kernels whose nf_tables cannot count it or can only drop: connections are
 * counted here, and clients told at once instead of waiting for an answer that never comes. nftables refuses all the
 * same, so what is missed here is late and not open.
 */
#ifndef REGISTRY_ENFORCER_JUDGE_H
#define REGISTRY_ENFORCER_JUDGE_H

#define TCP_FLAGS_OFFSET    13
#define TCP_FIN		    0x01
#define TCP_SYN		    0x02
#define TCP_RST		    0x04
#define TCP_PSH		    0x08
#define TCP_ACK		    0x10
#define TCP_SEQUENCE_OFFSET 4
#define TCP_CHECKSUM_OFFSET 16
#define IPV4_ADDRESSES	    12 /* offset of source and destination */
#define IPV6_ADDRESSES	    8
#define STORE_FLAGS	    0

/* Keeps when somebody went there: what is in use is the last that makes room for others. */
INLINE int is_learned(struct learned_key *key)
{
	struct learned_value *learned = find_learned(key);
	__u64 now;

	if (!learned)
		return 0;
	now = now_ns();
	if (learned->expires_at <= now)
		return 0;
	if (now - learned->used_at > USE_GRAIN_SECONDS * 1000000000ULL)
		learned->used_at = now;
	return 1;
}

INLINE int is_first(struct packet *packet)
{
	return (packet->transport[TCP_FLAGS_OFFSET] & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK)) == TCP_SYN;
}

INLINE int is_listed(struct learned_key *to)
{
	struct listed_key key __attribute__((aligned(8)));

	key.prefix_bits = 32 + 128;
	key.port = to->port;
	key.padding = 0;
	copy_ipv6(key.address, to->address);
	return find_listed(&key) != 0;
}

/* Whether this host, its containers or nobody is there: nothing that leaves. */
INLINE int stays_here(struct learned_key *to)
{
	struct range_key key;
	__u32 *range_class, *words = (__u32 *)key.address, *from = (__u32 *)to->address; /* not aligned for more */

	key.prefix_bits = 128;
	words[0] = from[0];
	words[1] = from[1];
	words[2] = from[2];
	words[3] = from[3];
	range_class = find_range(&key);
	return range_class && *range_class == RANGE_NEVER;
}

/* Whether nothing permits this connection; counts it then. */
INLINE int is_refused(struct learned_key *to, __u32 scope, __u32 protocol, struct settings *settings)
{
	__u32 number = scope & (SCOPES - 1), port = to->port;
	__u32 *level = find_level(&number);
	__u64 *counter;

	if (!level || *level < JUDGED_REGISTRY)
		return 0;
	if (*level == JUDGED_EVERY && protocol == IPPROTO_TCP) {
		if (port == DNS_PORT)
			return 0;
	} else if (!find_registry_port(&port)) {
		return 0;
	}
	if ((protocol == IPPROTO_TCP && is_learned(to)) || is_listed(to) || stays_here(to))
		return 0;
	number = ((settings->observing ? SCOPES : 0) + number) * 2 + (protocol == IPPROTO_UDP);
	counter = find_refusals(&number);
	if (counter)
		++*counter;
	return 1;
}

/* Exchanges two fields of the packet; a sum over both stays what it is. */
INLINE int exchange_32(struct __sk_buff *skb, __u32 one, __u32 other)
{
	__u64 a = 0, b = 0;

	return !bpf_skb_load_bytes(skb, one, &a, 4) && !bpf_skb_load_bytes(skb, other, &b, 4) &&
	       !bpf_skb_store_bytes(skb, one, &b, 4, STORE_FLAGS) &&
	       !bpf_skb_store_bytes(skb, other, &a, 4, STORE_FLAGS);
}

INLINE int exchange_16(struct __sk_buff *skb, __u32 one, __u32 other)
{
	__u64 a = 0, b = 0;

	return !bpf_skb_load_bytes(skb, one, &a, 2) && !bpf_skb_load_bytes(skb, other, &b, 2) &&
	       !bpf_skb_store_bytes(skb, one, &b, 2, STORE_FLAGS) &&
	       !bpf_skb_store_bytes(skb, other, &a, 2, STORE_FLAGS);
}

/* Exchanges source and destination of link and network, whose header is at `network`. */
INLINE int turn_round(struct __sk_buff *skb, __u64 network)
{
	int i;

	if (network)
		for (i = 0; i < ETH_ALEN; i += 2)
			if (!exchange_16(skb, i, ETH_ALEN + i))
				return 0;
	if (skb->protocol == NETWORK_16(ETH_P_IP))
		return exchange_32(skb, network + IPV4_ADDRESSES, network + IPV4_ADDRESSES + 4);
	for (i = 0; i < 16; i += 4)
		if (!exchange_32(skb, network + IPV6_ADDRESSES + i, network + IPV6_ADDRESSES + 16 + i))
			return 0;
	return 1;
}

/* Turns a SYN round into the reset that answers it (RFC 9293, section 3.10.7.1) and sends it back where it came from.
 * Only the sequence numbers and the flags change the checksum, which may be left to a device: the helper knows. On a
 * device without Ethernet header nftables has the packet; half turned round it is dropped. */
INLINE int answer_with_reset(struct __sk_buff *skb, struct packet *packet)
{
	__u32 transport = ETH_HLEN + packet->payload - (packet->transport[12] >> 4) * 4;
	__u32 sum = transport + TCP_CHECKSUM_OFFSET, sequence, acknowledged, before;
	__u16 ether_type, flags_before, flags;

	if (bpf_skb_load_bytes(skb, ETH_HLEN - 2, &ether_type, 2) || ether_type != skb->protocol || transport > 512)
		return TC_ACT_UNSPEC;
	if (bpf_skb_load_bytes(skb, transport + TCP_SEQUENCE_OFFSET, &sequence, 4) ||
	    bpf_skb_load_bytes(skb, transport + TCP_SEQUENCE_OFFSET + 4, &before, 4) ||
	    bpf_skb_load_bytes(skb, transport + TCP_FLAGS_OFFSET - 1, &flags_before, 2))
		return TC_ACT_UNSPEC;
	if (!turn_round(skb, ETH_HLEN) || !exchange_16(skb, transport, transport + 2))
		return TC_ACT_SHOT;
	acknowledged = NETWORK_32(NETWORK_32(sequence) + 1);
	flags = (flags_before & NETWORK_16(0xff00)) | NETWORK_16(TCP_RST | TCP_ACK);
	if (bpf_l4_csum_replace(skb, sum, sequence, 0, 4) || bpf_l4_csum_replace(skb, sum, before, acknowledged, 4) ||
	    bpf_l4_csum_replace(skb, sum, flags_before, flags, 2))
		return TC_ACT_SHOT;
	sequence = 0;
	if (bpf_skb_store_bytes(skb, transport + TCP_SEQUENCE_OFFSET, &sequence, 4, STORE_FLAGS) ||
	    bpf_skb_store_bytes(skb, transport + TCP_SEQUENCE_OFFSET + 4, &acknowledged, 4, STORE_FLAGS) ||
	    bpf_skb_store_bytes(skb, transport + TCP_FLAGS_OFFSET - 1, &flags, 2, STORE_FLAGS))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0);
}

#endif
