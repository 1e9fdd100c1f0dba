/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The last look, at the tc egress of every uplink: where a new connection may go, and what name its first bytes ask
 * for.
 *
 * A new connection passes if its destination was learned or is listed, or if the gate vouched for it (forwarded ones
 * only: a socket of the host may have been given that bit). Otherwise its scope decides, read from what cannot be
 * forged. This is what refuses traffic that nftables never sees: macvlan, raw sockets, another table's notrack.
 *
 * The first bytes of a connection to a learned address are read as they pass, segment by segment and without a copy: a
 * TLS ClientHello or an HTTP head. The connection ends with the segment that completes a wrong name. What cannot be
 * read, or names nothing, is refused; undecided segments pass, because nothing is served before the name is whole.
 *
 * Sequence numbers keep the reader in order: what comes too early is dropped and sent again, what was read is let pass.
 *
 * A connection whose beginning was not seen here and that nothing permits is a stray. One of them is a client who is
 * being refused while somebody flushes the nftables table, and with it the translation to the responder: held up, it
 * finds its way back. What stays astray is ended.
 */
#ifndef REGISTRY_ENFORCER_GUARD_H
#define REGISTRY_ENFORCER_GUARD_H

INLINE void guard_count(struct scratch *s, __u32 outcome)
{
	__u64 *counter;

	s->counter = outcome;
	counter = find_guarded(&s->counter);
	if (counter)
		*counter += 1;
}

/* --- names ------------------------------------------------------------------------------------------------------- */

/* The key of `names` for `name`, of any case and perhaps with a trailing dot; 0 if it is no name. */
INLINE struct name_key *key_of(struct scratch *s, const __u8 *name, __u64 length)
{
	struct name_key *key;
	int i;

	if (length > 1 && name[MASKED(length - 1, 255)] == '.')
		length--;
	if (!length || length > MAX_NAME_BYTES - 3)
		return 0;
	s->left = length;
	s->odd = 0;
	*reversed_at(s, 0) = 0;
	FORGET();
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_NAME_BYTES / 8; i++) {
		__u64 at = i * 8, word, there;

		FORGET();
		if (at >= s->left)
			break;
		word = lower_case(NETWORK_64(*(const __u64 *)(name + at)));
		*(__u64 *)(reversed_at(s, at + 1) - 7) = word;
		there = s->left - at >= 8 ? 0 : 64 - 8 * (s->left - at);
		word |= ~(~0ULL << there);
		s->odd |= has_zero(word);
	}
	if (s->odd)
		return 0;
	key = (void *)(reversed_at(s, s->left) - PREFIX_BITS_BYTES);
	key->prefix_bits = (s->left + 1) * 8;
	return key;
}

/* Whether a rule that is no proxy's allows the name on this port; keeps the pattern that does. */
INLINE int allows_name(struct scratch *s, struct name_key *key, __u64 port)
{
	struct name_rule *rule = find_name(key);
	int i;

	if (!rule)
		return 0;
	s->rule = *rule;
	FORGET();
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_PORTS_PER_NAME; i++) {
		FORGET();
		if ((__u64)i >= s->rule.port_count)
			break;
		if (s->rule.ports[i] == port && s->rule.named_ports >> i & 1) {
			s->flow.pattern_id = s->rule.pattern_id;
			return 1;
		}
	}
	return 0;
}

/* What the name decides: GUARD_PASSED, or why not. */
INLINE __u64 judge_name(struct scratch *s, const __u8 *name, __u64 length)
{
	struct name_key *key = key_of(s, name, length);

	if (s->flow.mode == GUARD_RECOGNISE) {
		if (!key)
			return s->registry ? GUARD_NO_NAME : GUARD_PASSED;
		if (allows_name(s, key, s->flow.port))
			return GUARD_PASSED;
		return s->registry || find_catalogued(key) ? GUARD_UNLISTED_NAME : GUARD_PASSED;
	}
	if (!key)
		return GUARD_NO_NAME;
	return allows_name(s, key, s->flow.port) ? GUARD_PASSED : GUARD_UNLISTED_NAME;
}

/* --- packets ----------------------------------------------------------------------------------------------------- */

/* Finds the scope of a packet, and its level, by what its sender cannot forge; of several witnesses the strictest is
 * believed. */
INLINE void find_scope(struct __sk_buff *skb, struct scratch *s, struct settings *settings)
{
	__u32 scope = SCOPE_CONTAINER, *level, *known, i;

	if (!s->stranger && !skb->ingress_ifindex) {
		if (s->uplink.link_bytes != ETH_HLEN)
			scope = scope_of_mark(skb->mark, settings);
		else if (!bpf_skb_load_bytes(skb, ETH_ALEN, s->link.address, ETH_ALEN) && find_own_link(&s->link))
			scope = scope_of_mark(skb->mark, settings);
	}
	s->scope = scope;
	level = find_level(&s->scope);
	s->level = level ? *level : JUDGED_NONE;
	FORGET();
	if (s->scope == SCOPE_CONTAINER)
		return;
	s->cgroup_scope = SCOPE_UNSTAMPED;
#pragma clang loop unroll(disable)
	for (i = 1; i <= MAX_CGROUP_LEVELS; i++) {
		s->cgroup = bpf_skb_ancestor_cgroup_id(skb, i);
		FORGET();
		if (!s->cgroup)
			break;
		known = find_cgroup(&s->cgroup);
		if (known)
			s->cgroup_scope = *known;
		FORGET();
	}
	FORGET();
	if (s->cgroup_scope == SCOPE_UNSTAMPED)
		return;
	level = find_level(&s->cgroup_scope);
	if (level && *level > s->level) {
		s->scope = s->cgroup_scope;
		s->level = *level;
	}
	FORGET();
}

INLINE void set_listed_key(struct scratch *s)
{
	s->listed_key.prefix_bits = 32 + 128;
	s->listed_key.port = s->learned_key.port;
	s->listed_key.padding = 0;
	copy_ipv6(s->listed_key.address, s->learned_key.address);
	FORGET();
}

/* Whether a packet whose ports cannot be read may be TCP's or UDP's all the same: a first fragment that ends before
 * them, or more extension headers than are read. `packet` gets the port that counts as a registry's. */
INLINE int may_hide_one(struct __sk_buff *skb, struct scratch *s)
{
	__u64 protocol = s->packet.protocol;

	s->packet.destination_port = s->uplink.any_port;
	*(__u64 *)s->packet.source = 0; /* nobody's, and no rule's: what was read last is another packet's */
	*(__u64 *)(s->packet.source + 8) = 0;
	copy_ipv6(s->packet.destination, s->packet.source);
	if (skb->protocol == NETWORK_16(ETH_P_IP)) {
		if (!load_bytes(skb, 0, s->packet.head, IPV4_HEADER_BYTES))
			return 0;
		protocol = s->packet.head[9];
		s->packet.protocol = IPPROTO_UDP;
		return (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP) &&
		       !(field_16(s->packet.head + 6) & IP_OFFSET_MASK);
	}
	if (skb->protocol != NETWORK_16(ETH_P_IPV6))
		return 0;
	s->packet.protocol = IPPROTO_UDP;
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_HOPOPTS ||
	       protocol == IPPROTO_ROUTING || protocol == IPPROTO_DSTOPTS;
}

/* Whether connections of this level to this port need permission. */
INLINE int is_judged(struct scratch *s)
{
	__u64 port = s->packet.destination_port;

	if (s->level < JUDGED_REGISTRY)
		return 0;
	if (s->level == JUDGED_EVERY && s->packet.protocol == IPPROTO_TCP)
		return port != DNS_PORT;
	return find_registry_port(KEY_32(&port)) != 0;
}

INLINE __u32 folded(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* Writes the TCP header of `s->segment` and `body` behind it. A sum that the device completes is that of the pseudo
 * header, any other is whole; the kernel knows which it is, and changes the field by a difference only in the second
 * case. */
INLINE int write_segment(struct __sk_buff *skb, struct scratch *s, struct answer *body)
{
	__u64 length = TCP_HEADER_BYTES, network = s->uplink.link_bytes, transport = s->transport, bytes = 0;
	__u64 pseudo, whole;
	__u64 old_length = 0, new_length;

	if (body) {
		bytes = body->length;
		if (!bytes || bytes > MAX_ANSWER_BYTES)
			return 0;
		length += bytes;
	}
	if (bpf_skb_change_tail(skb, transport + length, 0))
		return 0;
	pseudo = bpf_csum_diff(0, 0, (void *)s->packet.source, 32, 0);
	pseudo = folded(pseudo + NETWORK_16(IPPROTO_TCP) + NETWORK_16((__u16)length));
	whole = bpf_csum_diff(0, 0, (void *)s->segment, TCP_HEADER_BYTES, 0);
	if (body)
		whole += body->sum;
	whole = folded(whole);
	*(__u16 *)(s->segment + TCP_CHECKSUM_OFFSET) = pseudo;
	FORGET();
	if (bpf_skb_store_bytes(skb, transport, s->segment, TCP_HEADER_BYTES, STORE_FLAGS))
		return 0;
	if (body && bpf_skb_store_bytes(skb, transport + TCP_HEADER_BYTES, body->bytes,
					MASKED(bytes - 1, MAX_ANSWER_BYTES - 1) + 1, STORE_FLAGS))
		return 0;
	if (bpf_l4_csum_replace(skb, transport + TCP_CHECKSUM_OFFSET, 0, folded(2 * pseudo + whole), 0))
		return 0;
	if (skb->protocol == NETWORK_16(ETH_P_IP)) {
		new_length = NETWORK_16((__u16)(transport - network + length));
		if (bpf_skb_load_bytes(skb, network + 2, &old_length, 2) ||
		    bpf_l3_csum_replace(skb, network + 10, old_length, new_length, 2) ||
		    bpf_skb_store_bytes(skb, network + 2, &new_length, 2, STORE_FLAGS))
			return 0;
	} else {
		new_length = NETWORK_16((__u16)(transport - network - IPV6_HEADER_BYTES + length));
		if (bpf_skb_store_bytes(skb, network + 4, &new_length, 2, STORE_FLAGS))
			return 0;
	}
	return 1;
}

INLINE void make_segment(struct scratch *s, __u64 from, __u64 to, __u32 sequence, __u32 acknowledged, __u64 flags)
{
	*(__u16 *)s->segment = NETWORK_16((__u16)from);
	*(__u16 *)(s->segment + 2) = NETWORK_16((__u16)to);
	*(__u32 *)(s->segment + 4) = NETWORK_32(sequence);
	*(__u32 *)(s->segment + 8) = NETWORK_32(acknowledged);
	*(__u16 *)(s->segment + 12) = NETWORK_16((__u16)(TCP_HEADER_BYTES / 4 << 12 | flags));
	*(__u16 *)(s->segment + 14) = NETWORK_16(65535);
	*(__u32 *)(s->segment + 16) = 0;
	FORGET();
}

/* Sends the client what the server would: this packet, turned round. */
INLINE int answer_client(struct __sk_buff *skb, struct scratch *s, __u32 sequence, __u32 acknowledged, __u64 flags,
			 struct answer *body)
{
	make_segment(s, s->packet.destination_port, s->packet.source_port, sequence, acknowledged, flags);
	return write_segment(skb, s, body) && turn_round(skb, s->uplink.link_bytes) &&
	       !bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
}

/* Tells the daemon, which writes it down. */
INLINE void report(struct __sk_buff *skb, struct scratch *s, const __u8 *name, __u64 length)
{
	int i;

	guard_count(s, s->verdict);
	s->ending.at = now_ns();
	copy_ipv6(s->ending.source, s->packet.source);
	copy_ipv6(s->ending.destination, s->packet.destination);
	s->ending.source_port = s->packet.source_port;
	s->ending.destination_port = s->packet.destination_port;
	s->ending.interface = skb->ifindex;
	s->ending.scope = s->scope;
	s->ending.name_length = least(length, 255);
	s->ending.protocol = s->packet.protocol;
	s->ending.verdict = s->verdict;
#pragma clang loop unroll(disable)
	for (i = 0; i < 256; i += 8)
		*(__u64 *)(s->ending.name + i) = *(const __u64 *)(name + i);
	FORGET();
	if (send_ending(skb, &s->ending, sizeof(s->ending)))
		guard_count(s, GUARD_REPORT_LOST);
}

/* Ends a connection whose name is wrong: says so to the client in its own protocol, and resets the server. */
INLINE int end_connection(struct __sk_buff *skb, struct scratch *s, __u32 expected, __u64 number)
{
	struct answer *answer = find_answer(KEY_32(&number));
	__u32 after = s->sequence + s->payload_bytes + s->finished;

	if (!answer_client(skb, s, s->acknowledged, after, TCP_FIN | TCP_PSH | TCP_ACK, answer))
		return TC_ACT_SHOT;
	if (!turn_round(skb, s->uplink.link_bytes))
		return TC_ACT_SHOT;
	make_segment(s, s->packet.source_port, s->packet.destination_port, expected, 0, TCP_RST);
	return write_segment(skb, s, 0) ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

INLINE void set_flow_key(struct scratch *s)
{
	copy_ipv6(s->flow_key.source, s->packet.source);
	copy_ipv6(s->flow_key.destination, s->packet.destination);
	s->flow_key.source_port = s->packet.source_port;
	s->flow_key.destination_port = s->packet.destination_port;
}

/* Begins to read a connection whose next byte has this number, or lets it be; 0 if there is no memory for it. */
INLINE int begin_flow(struct scratch *s, __u32 mode, __u32 state, __u32 next)
{
	s->flow.pattern_id = 0;
	s->flow.next = next;
	s->flow.state = state;
	s->flow.mode = mode;
	s->flow.port = s->packet.destination_port;
	s->flow.head_bytes = 0;
	FORGET();
	return !remember_flow(&s->flow_key, &s->flow);
}

/* Passes a new connection that is not read, or not yet. What was said of an earlier one from its port is not said of
 * it. */
INLINE int let_begin(struct scratch *s)
{
	if (s->packet.protocol == IPPROTO_TCP)
		forget_flow(&s->flow_key);
	return TC_ACT_UNSPEC;
}

/* A new connection, or a datagram. */
INLINE int guard_new(struct __sk_buff *skb, struct scratch *s, struct settings *settings)
{
	struct learned_value *learned = find_learned(&s->learned_key);
	__u64 now = now_ns(), mode = GUARD_NAME, permitted = 0;
	__u8 *listed;

	set_listed_key(s);
	listed = find_listed(&s->listed_key);
	if (listed && *listed != LISTED_PROXY)
		return let_begin(s);
	find_scope(skb, s, settings);
	if (s->packet.protocol == IPPROTO_TCP) {
		if (listed) {
			mode = GUARD_PROXY;
			permitted = 1;
		} else if (learned && learned->expires_at > now) {
			if (learned->unnamed_until > now) {
				if (s->level < JUDGED_REGISTRY)
					return let_begin(s);
				if (begin_flow(s, mode, FLOW_ALLOWED, 0))
					return TC_ACT_UNSPEC;
			}
			if (learned->proxy_until > now)
				mode = GUARD_PROXY;
			permitted = 1;
		} else if (skb->ingress_ifindex && skb->mark & settings->mark_vouched) {
			permitted = 1; /* the gate looked a moment ago */
		}
		if (permitted) {
			if (s->level < JUDGED_REGISTRY || (mode == GUARD_NAME && !is_judged(s)))
				return let_begin(s);
			if (s->payload_bytes)
				return TC_ACT_SHOT; /* sent again without, if the kernel sends it */
			if (begin_flow(s, mode, FLOW_BEGUN, s->sequence + 1))
				return TC_ACT_UNSPEC;
		}
	}
	if (!is_judged(s) || settings->observing) /* nftables has counted it, or never saw it */
		return let_begin(s);
	s->verdict = GUARD_UNLISTED_ADDRESS;
	report(skb, s, s->name, 0);
	if (s->packet.protocol == IPPROTO_TCP)
		answer_client(skb, s, 0, s->sequence + 1, TCP_RST | TCP_ACK, 0);
	return TC_ACT_SHOT;
}

/* Whether a first segment looks like a client of a registry: a ClientHello, or a request below /v2/. */
INLINE int looks_like_one(struct __sk_buff *skb, struct scratch *s)
{
	__u32 at;

	if (s->payload_left < 16 || bpf_skb_load_bytes(skb, s->position, s->wire, 16))
		return 0;
	if (s->wire[0] == TLS_HANDSHAKE && s->wire[1] == 3 && s->wire[5] == CLIENT_HELLO)
		return 1;
#pragma clang loop unroll(full)
	for (at = 3; at <= 6; at++)
		if (s->wire[at] == ' ' && s->wire[at + 1] == '/' && s->wire[at + 2] == 'v' && s->wire[at + 3] == '2' &&
		    s->wire[at + 4] == '/')
			return 1;
	return 0;
}

/* Reads on in a connection that is not decided; where a name was read it is at `name`. */
INLINE const __u8 *read_on(struct __sk_buff *skb, struct scratch *s)
{
	struct hello *hello;
	__u64 first = 0;

	s->verdict = GUARD_PASSED;
	s->name_length = 0;
	s->named = 0;
	s->registry = 0;
	s->tail = s->position + s->payload_left;
	if (bpf_skb_load_bytes(skb, s->position, &first, 1)) {
		s->verdict = GUARD_UNREADABLE;
		return s->name;
	}
	if (s->flow.state == FLOW_CONNECT) {
		s->flow.head_bytes += s->payload_left;
		if (ends_head(skb, s))
			s->flow.state = FLOW_TUNNEL;
		else if (s->flow.head_bytes > MAX_HEAD_BYTES)
			s->verdict = GUARD_UNREADABLE;
		return s->name;
	}
	if (s->flow.state != FLOW_HELLO) {
		if (first != TLS_HANDSHAKE) {
			if (s->flow.state == FLOW_TUNNEL)
				s->verdict = GUARD_UNREADABLE;
			else
				read_head(skb, s);
			if (s->verdict == GUARD_PASSED && s->flow.state == FLOW_CONNECT && ends_head(skb, s))
				s->flow.state = FLOW_TUNNEL;
			return s->name;
		}
		s->flow.state = FLOW_HELLO;
		s->blank.need = HELLO_HEADER;
		s->blank.header_need = TLS_RECORD_HEADER;
		FORGET();
		if (remember_hello(&s->flow_key, &s->blank)) {
			s->verdict = GUARD_UNKNOWN;
			return s->name;
		}
	}
	hello = find_hello(&s->flow_key);
	if (!hello) { /* pushed out by others */
		s->verdict = GUARD_UNKNOWN;
		return s->name;
	}
	read_hello(skb, s, hello);
	s->name_length = hello->name_length;
	return hello->name;
}

#define NOT_HELD 1 /* in place of a value of `strays`: there is none, not held up so far */

/* Whether a segment of a connection that is not known may be one that must not leave: to a registry's port, and not
 * found to be nobody's to judge. */
INLINE int may_stray(struct scratch *s)
{
	__u64 port = s->packet.destination_port, *since;

	if (!find_registry_port(KEY_32(&port)))
		return 0;
	since = find_stray(&s->flow_key);
	s->held_since = since ? *since : NOT_HELD;
	FORGET();
	return s->held_since != LET_BE;
}

INLINE void remember_held(struct scratch *s, __u64 since)
{
	s->held_since = since;
	FORGET();
	remember_stray(&s->flow_key, &s->held_since);
}

/* Whether such a connection has been held up for so long that it is to be ended, with this segment. */
INLINE int is_astray(struct scratch *s)
{
	__u64 now = now_ns();

	if (s->held_since == NOT_HELD)
		remember_held(s, now);
	else if (s->payload_bytes && now - s->held_since > STRAY_SECONDS * 1000000000ULL)
		return 1;
	guard_count(s, GUARD_HELD_UP);
	return 0;
}

#define READ_ON 0 /* neither TC_ACT_UNSPEC nor TC_ACT_SHOT */

/* A segment of a connection whose beginning was not seen, or is forgotten: what becomes of it, or READ_ON, and then
 * `s->flow` has begun with it. */
INLINE int meet_unknown(struct __sk_buff *skb, struct scratch *s, struct settings *settings)
{
	int stray = may_stray(s), like_one;
	struct learned_value *learned;
	__u8 *listed;

	if (!s->payload_bytes && !stray)
		return TC_ACT_UNSPEC;
	set_listed_key(s);
	listed = find_listed(&s->listed_key);
	if (listed && *listed != LISTED_PROXY)
		return TC_ACT_UNSPEC;
	learned = find_learned(&s->learned_key);
	s->permitted = (learned && learned->expires_at > now_ns()) || listed;
	if (learned && learned->unnamed_until > now_ns())
		return TC_ACT_UNSPEC;
	FORGET();
	if (s->permitted)
		stray = 0;
	if (!s->payload_bytes && !stray)
		return TC_ACT_UNSPEC;
	like_one = settings->recognising && s->payload_bytes && looks_like_one(skb, s);
	if (!stray && !s->permitted && !like_one)
		return TC_ACT_UNSPEC;
	find_scope(skb, s, settings);
	if (stray && (s->level < JUDGED_REGISTRY || settings->observing)) {
		remember_held(s, LET_BE);
		stray = 0;
	}
	if (stray && !is_astray(s))
		return TC_ACT_SHOT;
	s->unknown = stray || (s->permitted && (listed ? s->level >= JUDGED_REGISTRY : is_judged(s)));
	if (!s->unknown && (s->level != JUDGED_RECOGNISED || !like_one))
		return TC_ACT_UNSPEC;
	begin_flow(s, s->unknown ? GUARD_NAME : GUARD_RECOGNISE, FLOW_BEGUN, s->sequence);
	return READ_ON;
}

/* What follows the SYN. */
INLINE int guard_segment(struct __sk_buff *skb, struct scratch *s, struct settings *settings)
{
	struct flow *flow = find_flow(&s->flow_key);
	const __u8 *name = s->name;
	__u32 expected, answer = ANSWER_HTTP;
	__s32 ahead;
	__u64 first = 0;
	int met;

	s->position = s->transport + s->header_bytes;
	s->payload_left = s->payload_bytes;
	if (flow) {
		s->flow = *flow;
		s->unknown = 0;
	} else {
		met = meet_unknown(skb, s, settings);
		if (met != READ_ON)
			return met;
	}
	FORGET();
	if (s->flow.state == FLOW_ALLOWED)
		return TC_ACT_UNSPEC;
	if (s->flow.state == FLOW_ENDED) {
		if (s->finished)
			answer_client(skb, s, s->acknowledged, 0, TCP_RST, 0);
		return TC_ACT_SHOT;
	}
	if (!s->payload_bytes)
		return TC_ACT_UNSPEC;
	expected = s->flow.next;
	ahead = expected - s->sequence;
	if (ahead < 0)
		return TC_ACT_SHOT;
	if ((__u64)ahead >= s->payload_bytes)
		return TC_ACT_UNSPEC;
	s->position += ahead;
	s->payload_left -= ahead;
	s->flow.next = s->sequence + s->payload_bytes;
	FORGET();
	if (s->unknown) {
		s->named = 0;
		s->name_length = 0;
		s->verdict = GUARD_UNKNOWN;
	} else {
		name = read_on(skb, s);
	}
	FORGET();
	if (s->named && s->verdict == GUARD_PASSED)
		s->verdict = judge_name(s, name, s->name_length);
	FORGET();
	if (s->flow.mode == GUARD_RECOGNISE && s->verdict != GUARD_PASSED && s->verdict != GUARD_UNLISTED_NAME &&
	    !s->registry) {
		s->verdict = GUARD_PASSED; /* not recognised */
		s->flow.state = FLOW_ALLOWED;
	}
	if (s->verdict == GUARD_PASSED) {
		if (s->named && s->flow.mode == GUARD_RECOGNISE)
			s->flow.state = FLOW_ALLOWED;
		if (s->flow.state == FLOW_ALLOWED)
			guard_count(s, GUARD_PASSED);
		remember_flow(&s->flow_key, &s->flow);
		return TC_ACT_UNSPEC;
	}
	if (name != s->name)
		answer = ANSWER_TLS;
	find_scope(skb, s, settings);
	report(skb, s, name, s->name_length);
	s->flow.state = settings->observing ? FLOW_ALLOWED : FLOW_ENDED;
	remember_flow(&s->flow_key, &s->flow);
	if (settings->observing)
		return TC_ACT_UNSPEC;
	if (s->verdict == GUARD_UNKNOWN && !bpf_skb_load_bytes(skb, s->position, &first, 1) && first == TLS_HANDSHAKE)
		answer = ANSWER_TLS;
	return end_connection(skb, s, expected, answer);
}

INLINE int guard_packet(struct __sk_buff *skb, struct scratch *s, struct settings *settings)
{
	__u64 interface = skb->ifindex;
	struct uplink *uplink = find_uplink(KEY_32(&interface));
	__u64 end;

	if (!uplink)
		return TC_ACT_UNSPEC;
	s->uplink = *uplink;
	FORGET();
	if ((!read_packet(skb, &s->packet) ||
	     (s->packet.protocol == IPPROTO_TCP && s->packet.fragment &&
	      s->packet.payload - (s->packet.transport[12] >> 4) * 4 + TCP_HEADER_BYTES > s->packet.end)) &&
	    !may_hide_one(skb, s))
		return TC_ACT_UNSPEC;
	FORGET();
	copy_ipv6(s->learned_key.address, s->packet.destination);
	s->learned_key.port = s->packet.destination_port;
	s->learned_key.padding = 0;
	if (s->packet.protocol == IPPROTO_UDP) {
		__u64 port = s->packet.destination_port;

		return find_registry_port(KEY_32(&port)) ? guard_new(skb, s, settings) : TC_ACT_UNSPEC;
	}
	s->header_bytes = (s->packet.transport[12] >> 4) * 4;
	s->transport = s->uplink.link_bytes + s->packet.payload - s->header_bytes;
	/* A length of 0 is that of a packet which the device will cut ("BIG TCP"). */
	end = s->packet.end > s->packet.payload ? s->packet.end : skb->len - s->uplink.link_bytes;
	if (s->packet.end <= s->packet.payload && skb->len < 65536)
		end = s->packet.payload;
	s->payload_bytes = end > s->packet.payload ? end - s->packet.payload : 0;
	s->sequence = field_32(s->packet.transport + TCP_SEQUENCE_OFFSET);
	s->acknowledged = field_32(s->packet.transport + TCP_SEQUENCE_OFFSET + 4);
	s->finished = s->packet.transport[TCP_FLAGS_OFFSET] & TCP_FIN;
	set_flow_key(s);
	FORGET();
	if (is_first(&s->packet))
		return guard_new(skb, s, settings);
	if (s->packet.transport[TCP_FLAGS_OFFSET] & (TCP_SYN | TCP_RST)) {
		/* The answer to an inbound connection. Who forges one has what follows it let by where nothing is
		 * permitted and nobody has begun a connection. */
		if (s->packet.transport[TCP_FLAGS_OFFSET] & TCP_SYN && may_stray(s))
			remember_held(s, LET_BE);
		return TC_ACT_UNSPEC;
	}
	return guard_segment(skb, s, settings);
}

#endif
