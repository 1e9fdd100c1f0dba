/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * DNS messages: remember a question that leaves, learn the addresses of its answer.
 *
 * One loop of small steps with a constant bound. A name is read up to eight bytes a step; the question's is stored
 * (lower case, and reversed for `names`), an owner's is compared with it, a CNAME's target replaces it. What does not
 * fit is left to the daemon, which gets a copy (OUTCOME_UNREADABLE); nothing is ever learned from it here.
 */
#ifndef REGISTRY_ENFORCER_DNS_H
#define REGISTRY_ENFORCER_DNS_H

#define MAX_STEPS	  96  /* a message; 3 CNAMEs and 32 addresses on two ports take about 90 */
#define MAX_NAME_STEPS	  128 /* 127 labels and the root */
#define MAX_RECORDS	  32
#define MAX_MESSAGES	  2 /* in one TCP segment: glibc sends the questions for A and AAAA together */
#define DNS_HEADER_BYTES  12
#define QUESTION_BYTES	  4  /* after the name: type, class */
#define RECORD_BYTES	  10 /* after the name: type, class, TTL, length of the data */
#define TCP_LENGTH_BYTES  2
#define MAX_LABEL_BYTES	  63
#define MAX_WIRE_NAME	  255
#define POINTER		  0xc0 /* the two high bits of a compression pointer (RFC 1035 section 4.1.4) */
#define POINTER_BYTES	  2
#define MAX_POINTERS	  15 /* in one name; dnspython follows 16, of which the owner that points here is one */
#define FLAG_ANSWER	  0x8000
#define FLAGS_OPCODE	  0x7800
#define FLAG_TRUNCATED	  0x0200
#define FLAGS_RCODE	  0x000f
#define CLASS_IN	  1
#define TYPE_A		  1
#define TYPE_CNAME	  5
#define TYPE_AAAA	  28
#define NANOSECONDS	  1000000000ULL
#define PREFIX_BITS_BYTES 4
#define BYTES_OF(x)	  (0x0101010101010101ULL * (x))

enum step {
	STEP_NAME,   /* some bytes of a name */
	STEP_ASKED,  /* the question's name is known */
	STEP_OWNER,  /* a record begins */
	STEP_SKIP,   /* a label of an owner that is not the chain's */
	STEP_RECORD, /* what follows the owner */
	STEP_INSERT, /* one (address, port) */
	STEP_DONE,
};

enum purpose {
	NAME_QUESTION,
	NAME_OWNER,
	NAME_TARGET,
};

/* Eight bytes at once: 'A' .. 'Z' to lower case, others as they are. */
INLINE __u64 lower_case(__u64 word)
{
	__u64 low = word & BYTES_OF(0x7f);
	__u64 from_a = low + BYTES_OF(0x80 - 'A');
	__u64 beyond_z = low + BYTES_OF(0x7f - 'Z');
	__u64 upper = (from_a & ~beyond_z & ~word) & BYTES_OF(0x80);

	return word | upper >> 2;
}

/* Non-zero if one of the eight bytes is zero. */
INLINE __u64 has_zero(__u64 word)
{
	return (word - BYTES_OF(1)) & ~word & BYTES_OF(0x80);
}

/* Keyed by its start; only its secret key keeps a forger from fitting a question to it. */
INLINE __u64 mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 32;
}

INLINE const __u8 *wire_at(struct scratch *s, __u64 offset)
{
	return s->wire + MASKED(offset, MAX_WIRE_BYTES - 1);
}

INLINE __u8 *chain_at(struct scratch *s, __u64 position)
{
	return s->chain + MASKED(position, CHAIN_MASK);
}

/* Where the character at `position` of `chain` stands in `reversed`; the sum never goes down, for the verifier. */
INLINE __u8 *reversed_at(struct scratch *s, __u64 position)
{
	return s->reversed + (REVERSED_END - CHAIN_MASK) + MASKED(CHAIN_MASK - position, CHAIN_MASK);
}

INLINE void finish(struct scratch *s, __u64 outcome)
{
	s->outcome = outcome;
	s->step = STEP_DONE;
}

/* No more of this message is understood: what was learned stays, the daemon gets the rest. */
INLINE void leave_to_daemon(struct scratch *s)
{
	finish(s, OUTCOME_UNREADABLE);
}

/* The key is in map memory: half a word of stack that differs would keep every state apart from every other. */
INLINE void count(struct scratch *s, __u32 outcome)
{
	__u64 *counter;

	s->counter = outcome;
	counter = find_counter(&s->counter);
	if (counter)
		*counter += 1;
}

INLINE void start_name(struct scratch *s, __u64 purpose, __u64 at, __u64 limit)
{
	s->purpose = purpose;
	s->at = at;
	s->limit = limit;
	s->lowest = at;
	s->resume = 0;
	s->pointers = 0;
	s->left = 0;
	s->position = 0;
	s->step = STEP_NAME;
}

/* The owner is another name than the chain's: on to its end, which may be known already. */
INLINE void skip_owner(struct scratch *s)
{
	s->foreign = 1;
	s->at += s->left;
	s->step = STEP_SKIP;
	if (s->resume) {
		s->at = s->resume;
		s->step = STEP_RECORD;
	}
}

/* Behind a name; 0 if it may not stand there. */
INLINE int end_name(struct scratch *s)
{
	if (s->resume)
		s->at = s->resume;
	if (s->purpose == NAME_OWNER) {
		s->step = STEP_RECORD;
		return 1;
	}
	if (s->purpose == NAME_TARGET) {
		s->step = STEP_OWNER;
		return s->at == s->rdata_end;
	}
	s->step = STEP_ASKED;
	return !s->resume;
}

/* A compression pointer; 0 if it is cut or does not go down, as dnspython demands: so every name ends. */
INLINE int follow_pointer(struct scratch *s)
{
	__u64 target = field_16(wire_at(s, s->at)) & 0x3fff;

	if (s->at + POINTER_BYTES > s->limit || target >= s->lowest || s->pointers >= MAX_POINTERS)
		return 0;
	s->pointers++;
	if (!s->resume)
		s->resume = s->at + POINTER_BYTES;
	s->limit = s->lowest;
	s->lowest = target;
	s->at = target;
	return 1;
}

/* A label's length and up to eight bytes of it, or eight bytes more, or a pointer; 0 if it is no name. */
INLINE int read_name(struct scratch *s)
{
	__u64 size, word, there;

	if (!s->left) {
		__u64 length = *wire_at(s, s->at);

		if (s->at >= s->limit)
			return 0;
		if (length >= POINTER)
			return follow_pointer(s);
		if (length > MAX_LABEL_BYTES || s->at + 1 + length > s->limit || s->position + length >= MAX_WIRE_NAME)
			return 0;
		if (s->purpose == NAME_OWNER) {
			if (*chain_at(s, s->position) != length) {
				skip_owner(s);
				return 1;
			}
		} else {
			*chain_at(s, s->position) = length;
			*reversed_at(s, s->position) = '.';
			s->hash = mix(s->hash, length);
		}
		s->at++;
		if (!length)
			return end_name(s);
		s->position++;
		s->left = length;
	}

	size = s->left > 8 ? 8 : s->left;
	there = 64 - 8 * size; /* low bits of the words, which belong to what follows */
	word = lower_case(NETWORK_64(*(const __u64 *)wire_at(s, s->at)));
	if (s->purpose == NAME_OWNER) {
		if ((word ^ NETWORK_64(*(__u64 *)chain_at(s, s->position))) >> there) {
			skip_owner(s);
			return 1;
		}
	} else {
		*(__u64 *)chain_at(s, s->position) = NETWORK_64(word);
		*(__u64 *)(reversed_at(s, s->position) - 7) = word;
		s->hash = mix(s->hash, word >> there);
		word |= ~(~0ULL << there); /* bytes that are neither dot nor NUL */
		s->odd |= has_zero(word) | has_zero(word ^ BYTES_OF('.'));
	}
	s->at += size;
	s->position += size;
	s->left -= size;
	return 1;
}

/* The next message of the packet into `wire`; 0 if there is none (an ACK, a length alone). */
INLINE int next_message(struct __sk_buff *skb, struct scratch *s)
{
	__u64 at = s->next, there, length;

	if (s->packet.protocol == IPPROTO_TCP) {
		if (at + TCP_LENGTH_BYTES >= s->packet.end)
			return 0;
		if (!load_bytes(skb, at, s->wire, TCP_LENGTH_BYTES))
			return 0;
		at += TCP_LENGTH_BYTES;
		s->whole = field_16(s->wire);
	} else {
		if (at >= s->packet.datagram_end)
			return 0;
		s->whole = s->packet.datagram_end - at;
	}
	if (at >= s->packet.end)
		return 0;
	there = s->packet.end - at;
	if (there > s->whole)
		there = s->whole;
	if (there > MAX_WIRE_BYTES)
		there = MAX_WIRE_BYTES;
	s->length = there;
	s->next = at + s->whole;
	if (!there)
		return 0;
	length = MASKED(there - 1, MAX_WIRE_BYTES - 1) + 1;
	return load_bytes(skb, at, s->wire, length);
}

INLINE void start_question(struct scratch *s, struct settings *settings)
{
	s->hash = settings->question_key;
	s->odd = 0;
	start_name(s, NAME_QUESTION, DNS_HEADER_BYTES, s->length);
}

/* Hash of the question that was read, 0 if it is cut; `at` is then behind it. */
INLINE __u64 question_hash(struct scratch *s)
{
	if (s->at + QUESTION_BYTES > s->length)
		return 0;
	s->at += QUESTION_BYTES;
	return mix(s->hash, field_32(wire_at(s, s->at - QUESTION_BYTES))) | 1;
}

/* Through lo or not belongs to it: who may open raw sockets on this host, as a container on its network, can send
 * himself an answer over lo in any server's name, and knows what he has asked. */
INLINE void set_query_key(struct __sk_buff *skb, struct scratch *s, const __u8 *resolver, const __u8 *client,
			  __u64 client_port)
{
	copy_ipv6(s->query_key.resolver, resolver);
	copy_ipv6(s->query_key.client, client);
	s->query_key.client_port = NETWORK_16((__u16)client_port);
	s->query_key.transaction_id = *(__u16 *)s->wire;
	s->query_key.protocol = s->packet.protocol;
	s->query_key.loopback = skb->ifindex == LOOPBACK_IFINDEX;
}

/* --- queries ----------------------------------------------------------------------------------------------------- */

INLINE void remember_question(struct __sk_buff *skb, struct scratch *s)
{
	__u64 hash = question_hash(s);

	if (!hash)
		return;
	s->query.question_hash = hash;
	s->query.asked_at = s->now;
	set_query_key(skb, s, s->packet.destination, s->packet.source, s->packet.source_port);
	remember_query(&s->query_key, &s->query);
}

/* One query; 0 if the packet holds no further one. */
INLINE int track_message(struct __sk_buff *skb, struct scratch *s, struct settings *settings)
{
	int i;

	if (!next_message(skb, s) || s->length < DNS_HEADER_BYTES || s->length < s->whole)
		return 0;
	if (field_16(s->wire + 2) & (FLAG_ANSWER | FLAGS_OPCODE) || field_16(s->wire + 4) != 1)
		return 0;
	start_question(s, settings);
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_NAME_STEPS; i++) {
		FORGET();
		if (s->step != STEP_NAME)
			break;
		if (!read_name(s))
			return 0;
	}
	if (s->step == STEP_ASKED)
		remember_question(skb, s);
	return s->packet.protocol == IPPROTO_TCP;
}

/* Whoever is asked: a server may be trusted by the time it answers. The clients know a new resolver as soon as the
 * daemon does, and sometimes sooner. */
INLINE void track_queries(struct __sk_buff *skb, struct scratch *s, struct settings *settings)
{
	__u8 *trust;
	int i;

	if (s->packet.destination_port != DNS_PORT || s->packet.fragment)
		return;
	trust = find_resolver((void *)s->packet.destination);
	if (trust && *trust == RESOLVER_RETIRED)
		return;
	s->now = now_ns();
	s->next = s->packet.payload;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_MESSAGES; i++) {
		if (!track_message(skb, s, settings))
			return;
		FORGET();
	}
}

/* --- answers ----------------------------------------------------------------------------------------------------- */

/* Header and query of the next message; 0 if there is none. */
INLINE int start_answer(struct __sk_buff *skb, struct scratch *s, struct settings *settings)
{
	struct query *query;
	__u64 flags, asked_at;

	s->outcome = OUTCOME_UNREADABLE;
	s->listed = 0;
	s->unfit = 0;
	s->inserted = 0;
	s->permitted = 0;
	if (!next_message(skb, s))
		return 0;
	flags = field_16(s->wire + 2);
	if (s->length < DNS_HEADER_BYTES || !(flags & FLAG_ANSWER) || flags & FLAGS_OPCODE ||
	    field_16(s->wire + 4) != 1) {
		finish(s, OUTCOME_MALFORMED);
		return 1;
	}
	set_query_key(skb, s, s->packet.source, s->packet.destination, s->packet.destination_port);
	query = find_query(&s->query_key);
	if (!query) {
		finish(s, OUTCOME_UNSOLICITED);
		return 1;
	}
	s->expected = query->question_hash;
	asked_at = query->asked_at;
	forget_query(&s->query_key); /* a second answer teaches nothing */
	if (s->now - asked_at > settings->query_window) {
		finish(s, OUTCOME_UNSOLICITED);
		return 1;
	}
	start_question(s, settings);
	return 1;
}

/* Is it the question that was asked, is its name in the policy, is there anything to learn? */
INLINE void judge_question(struct scratch *s)
{
	__u64 text = s->position - 1; /* bytes of the name's text */
	__u64 flags = field_16(s->wire + 2), records = field_16(s->wire + 6);
	__u64 hash;
	struct name_rule *rule;
	struct name_key *key;

	hash = question_hash(s);
	if (!hash) {
		finish(s, OUTCOME_MALFORMED);
		return;
	}
	if (hash != s->expected) {
		finish(s, OUTCOME_MISMATCHED);
		return;
	}
	if (s->position < 2 || s->odd) {
		finish(s, OUTCOME_UNLISTED);
		return;
	}
	key = (void *)(reversed_at(s, text) - PREFIX_BITS_BYTES);
	*reversed_at(s, 0) = 0; /* ends exact names, and counts */
	key->prefix_bits = (text + 1) * 8;
	rule = find_name(key);
	if (!rule || field_16(wire_at(s, s->at - 2)) != CLASS_IN) {
		finish(s, OUTCOME_UNLISTED);
		return;
	}
	s->rule = *rule;
	s->type = field_16(wire_at(s, s->at - QUESTION_BYTES));
	if (s->type != TYPE_A && s->type != TYPE_AAAA) {
		finish(s, OUTCOME_NO_ADDRESS);
		return;
	}
	s->listed = 1;
	if (flags & FLAG_TRUNCATED || s->length < s->whole || s->packet.fragment) {
		leave_to_daemon(s);
		return;
	}
	if (flags & FLAGS_RCODE) {
		finish(s, OUTCOME_NO_ADDRESS);
		return;
	}
	s->unfit = records > MAX_RECORDS;
	s->records = records > MAX_RECORDS ? MAX_RECORDS : records;
	s->chain_at = DNS_HEADER_BYTES;
	s->step = STEP_OWNER;
}

/* A record's owner; nearly always a pointer to where the chain's name stands. */
INLINE void start_record(struct scratch *s)
{
	__u64 at = s->at;

	if (!s->records) {
		finish(s, s->unfit	 ? OUTCOME_UNREADABLE
			  : s->inserted	 ? OUTCOME_LEARNED
			  : s->permitted ? OUTCOME_REPEATED
					 : OUTCOME_NO_ADDRESS);
		return;
	}
	s->records--;
	s->foreign = 0;
	if (at + POINTER_BYTES <= s->length && field_16(wire_at(s, at)) == (POINTER << 8 | s->chain_at)) {
		s->at = at + POINTER_BYTES;
		s->step = STEP_RECORD;
		return;
	}
	start_name(s, NAME_OWNER, at, s->length);
}

/* One label of an owner that is another name, without following pointers. */
INLINE void skip_label(struct scratch *s)
{
	__u64 first = *wire_at(s, s->at);

	if (s->at >= s->length || (first > MAX_LABEL_BYTES && first < POINTER)) {
		leave_to_daemon(s);
		return;
	}
	s->at += first >= POINTER ? POINTER_BYTES : 1 + first;
	if (!first || first >= POINTER)
		s->step = STEP_RECORD;
}

/* Whether the address of an answer may be learned at all: `ranges` hold what may not. */
INLINE int may_be_learned(struct scratch *s)
{
	__u32 *range_class;

	s->range_key.prefix_bits = 128;
	copy_ipv6(s->range_key.address, s->learned_key.address);
	range_class = find_range(&s->range_key);
	if (!range_class)
		return 1;
	return *range_class == RANGE_PRIVATE && s->rule.private_addresses;
}

/* Expiry of what a record teaches. TTLs of 2^31 and more count as 0 (RFC 2181 section 8). */
INLINE __u64 expiry(struct settings *settings, __u64 now, __u64 ttl_seconds)
{
	__u64 lifetime = ttl_seconds >> 31 ? 0 : ttl_seconds * NANOSECONDS;

	if (lifetime < settings->lifetime_floor)
		lifetime = settings->lifetime_floor;
	if (lifetime > settings->lifetime_ceiling)
		lifetime = settings->lifetime_ceiling;
	return now + lifetime;
}

INLINE void read_record(struct scratch *s, struct settings *settings)
{
	const __u8 *record = wire_at(s, s->at);
	__u64 type = field_16(record), class = field_16(record + 2), ttl = field_32(record + 4);
	__u64 data = s->at + RECORD_BYTES, size = field_16(record + 8);
	__u64 end = data + size;
	const __u8 *address = wire_at(s, data);

	if (end > s->length) {
		leave_to_daemon(s);
		return;
	}
	s->rdata_end = end;
	s->at = end; /* unless something below says otherwise, the next record */
	s->step = STEP_OWNER;
	if (class != CLASS_IN || (type != TYPE_CNAME && type != s->type))
		return;
	if (s->foreign) { /* not of the chain: another order, or nothing of ours */
		s->unfit = 1;
		return;
	}
	if (type == TYPE_CNAME) {
		s->chain_at = data;
		start_name(s, NAME_TARGET, data, end);
		return;
	}
	if (size != (type == TYPE_A ? 4 : 16)) {
		leave_to_daemon(s);
		return;
	}
	if (type == TYPE_A) {
		map_ipv4(s->learned_key.address, address);
	} else {
		copy_ipv6(s->learned_key.address, address);
		if (!*(__u64 *)s->learned_key.address &&
		    *(__u32 *)(s->learned_key.address + 8) == NETWORK_32(0x0000ffffU))
			return; /* an IPv4 address in disguise */
	}
	if (!may_be_learned(s))
		return;
	s->learned.expires_at = expiry(settings, s->now, ttl);
	s->learned.pattern_id = s->rule.pattern_id;
	s->port_index = 0;
	s->step = STEP_INSERT;
}

INLINE void insert_address(struct scratch *s, struct settings *settings)
{
	struct learned_value *known;
	__u64 expires_at = s->learned.expires_at, known_until = 0, unnamed_until = 0, proxy_until = 0;

	if (s->rule.unnamed_ports >> s->port_index & 1)
		unnamed_until = expires_at;
	if (s->rule.proxy_ports >> s->port_index & 1)
		proxy_until = expires_at;
	s->learned_key.port = s->rule.ports[MASKED(s->port_index, MAX_PORTS_PER_NAME - 1)];
	s->learned_key.padding = 0;
	s->port_index++;
	if (s->port_index >= s->rule.port_count)
		s->step = STEP_OWNER;
	s->permitted++;
	known = find_learned(&s->learned_key);
	s->learned.used_at = known ? known->used_at : 0;
	if (known && known->expires_at > s->now) {
		if (known->pattern_id == s->learned.pattern_id &&
		    expires_at < known->expires_at + settings->refresh_margin &&
		    unnamed_until < known->unnamed_until + settings->refresh_margin &&
		    proxy_until < known->proxy_until + settings->refresh_margin)
			return;
		known_until = known->expires_at;
		if (known->unnamed_until > unnamed_until)
			unnamed_until = known->unnamed_until;
		if (known->proxy_until > proxy_until)
			proxy_until = known->proxy_until;
	}
	s->learned.unnamed_until = unnamed_until;
	s->learned.proxy_until = proxy_until;
	if (known_until > expires_at)
		s->learned.expires_at = known_until; /* taught by two patterns: the longer lifetime counts here */
	if (learn_address(&s->learned_key, &s->learned))
		s->unfit = 1;
	else
		s->inserted++;
	s->learned.expires_at = expires_at;
}

/* Count what became of the message; tell the daemon if it changed anything or needs another reader. */
INLINE void finish_answer(struct __sk_buff *skb, struct scratch *s)
{
	__u64 outcome = s->outcome;

	if (s->listed && (outcome == OUTCOME_LEARNED || outcome == OUTCOME_UNREADABLE)) {
		s->event.at = s->now;
		s->event.interface = skb->ifindex;
		s->event.message_length = s->whole;
		s->event.wire_length = s->length;
		s->event.outcome = outcome;
		s->event.protocol = s->packet.protocol;
		s->event.inserted = s->inserted;
		copy_ipv6(s->event.resolver, s->packet.source);
		FORGET();
		if (send_event(skb, &s->event, sizeof(s->event) + MASKED(s->length - 1, MAX_WIRE_BYTES - 1) + 1))
			outcome = OUTCOME_EVENT_LOST;
	}
	count(s, outcome);
}

INLINE void read_answer(struct scratch *s, struct settings *settings)
{
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_STEPS; i++) {
		FORGET();
		if (s->step == STEP_OWNER) /* an address of one port takes one step, thus these three in a row */
			start_record(s);
		if (s->step == STEP_RECORD)
			read_record(s, settings);
		if (s->step == STEP_INSERT) {
			insert_address(s, settings);
		} else if (s->step == STEP_NAME) {
			if (!read_name(s))
				finish(s, s->purpose == NAME_QUESTION ? OUTCOME_MALFORMED : OUTCOME_UNREADABLE);
		} else if (s->step == STEP_SKIP) {
			skip_label(s);
		} else if (s->step == STEP_ASKED) {
			judge_question(s);
		} else if (s->step == STEP_DONE) {
			return;
		}
	}
	leave_to_daemon(s); /* more than fits */
}

/* Its question is no longer under way, and leaves the place to others. */
INLINE void pass_over_answer(struct __sk_buff *skb, struct scratch *s)
{
	if (next_message(skb, s) && s->length >= DNS_HEADER_BYTES) {
		set_query_key(skb, s, s->packet.source, s->packet.destination, s->packet.destination_port);
		forget_query(&s->query_key);
	}
	count(s, OUTCOME_UNTRUSTED);
}

INLINE void learn_answers(struct __sk_buff *skb, struct scratch *s, struct settings *settings)
{
	int i;

	if (s->packet.source_port != DNS_PORT)
		return;
	s->next = s->packet.payload;
	if (!find_resolver((void *)s->packet.source)) {
		pass_over_answer(skb, s);
		return;
	}
	s->now = now_ns();
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_MESSAGES; i++) {
		FORGET();
		if (!start_answer(skb, s, settings))
			return;
		read_answer(s, settings);
		FORGET();
		finish_answer(skb, s);
		if (s->packet.protocol != IPPROTO_TCP)
			return;
	}
}

#endif
