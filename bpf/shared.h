/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Rendered by `python -m enforcer.kernel_abi > bpf/shared.h`; change enforcer/kernel_abi.py instead. */
#ifndef REGISTRY_ENFORCER_SHARED_H
#define REGISTRY_ENFORCER_SHARED_H

#define MAX_WIRE_BYTES 2048
#define MAX_NAME_BYTES 256
#define MAX_PORTS_PER_NAME 8
#define MAX_NAMES 131072
#define MAX_RESOLVERS 64
#define MAX_RANGES 4096
#define MAX_QUERIES 16384
#define MAX_LEARNED 262144
#define MAX_PROGRAM_NAMES 256
#define MAX_CGROUPS 16384
#define MAX_REGISTRY_PORTS 1024
#define MAX_LISTED 16384
#define MAX_CONNECTS 8192
#define MAX_FLOWS 65536
#define MAX_HELLOS 4096
#define MAX_STRAYS 16384
#define LET_BE 0
#define STRAY_SECONDS 5
#define MAX_UPLINKS 4096
#define MAX_CATALOGUE 4096
#define MAX_ANSWER_BYTES 1024
#define USE_GRAIN_SECONDS 1
#define LOOPBACK_IFINDEX 1
#define EVENT_BYTES 1048576
#define ENDING_BYTES 262144
#define COMM_BYTES 16

#define OUTCOME_LEARNED 0
#define OUTCOME_REPEATED 1
#define OUTCOME_UNREADABLE 2
#define OUTCOME_NO_ADDRESS 3
#define OUTCOME_UNLISTED 4
#define OUTCOME_UNTRUSTED 5
#define OUTCOME_UNSOLICITED 6
#define OUTCOME_MISMATCHED 7
#define OUTCOME_MALFORMED 8
#define OUTCOME_EVENT_LOST 9
#define OUTCOMES 10

#define RANGE_NEVER 1
#define RANGE_PRIVATE 2

#define RESOLVER_TRUSTED 1
#define RESOLVER_RETIRED 2

#define JUDGING_NOT 0
#define JUDGING_COUNT 1
#define JUDGING_REFUSE 2
#define JUDGED_NONE 0
#define JUDGED_RECOGNISED 1
#define JUDGED_REGISTRY 2
#define JUDGED_EVERY 3
#define LISTED_REGISTRY 1
#define LISTED_PROXY 2
#define GUARD_NAME 0
#define GUARD_PROXY 1
#define GUARD_RECOGNISE 2
#define FLOW_BEGUN 0
#define FLOW_HELLO 1
#define FLOW_CONNECT 2
#define FLOW_TUNNEL 3
#define FLOW_ALLOWED 4
#define FLOW_ENDED 5
#define GUARD_PASSED 0
#define GUARD_UNLISTED_NAME 1
#define GUARD_NO_NAME 2
#define GUARD_HIDDEN_NAME 3
#define GUARD_UNREADABLE 4
#define GUARD_UNKNOWN 5
#define GUARD_UNLISTED_ADDRESS 6
#define GUARD_REPORT_LOST 7
#define GUARD_HELD_UP 8
#define ANSWER_TLS 0
#define ANSWER_HTTP 1
#define GUARD_OUTCOMES 9
#define ANSWERS 2
#define NETNS_ANY 0xffffffffffffffffULL
#define SCOPE_UNSTAMPED 0
#define SCOPE_HOST 1
#define SCOPE_ENGINE 2
#define SCOPE_CONTAINER 3
#define SCOPES 4

/* Key of `names`: a reversed, lower-case name. Exact: all of it and a NUL. Wildcard *.x: reversed x and a dot. */
struct name_key {
	__u32 prefix_bits; /* length of `reversed` that counts, in bits */
	__u8 reversed[256]; /* moc.elpmaxe.a NUL, or moc.elpmaxe. */
};
_Static_assert(sizeof(struct name_key) == 260, "size of name_key");
_Static_assert(__builtin_offsetof(struct name_key, prefix_bits) == 0, "name_key.prefix_bits");
_Static_assert(__builtin_offsetof(struct name_key, reversed) == 4, "name_key.reversed");

/* Value of `names`: what an answer for this name permits. */
struct name_rule {
	__u64 pattern_id; /* names the pattern across restarts: see pattern_id() */
	__u16 ports[8]; /* host order; the first port_count count */
	__u8 port_count; /* 1 .. MAX_PORTS_PER_NAME */
	__u8 private_addresses; /* 1: an answer in a private range may teach */
	__u8 named_ports; /* bit i: clients may name it on ports[i]; 0: it is a proxy's there and no more */
	__u8 proxy_ports; /* bit i: a proxy is at the addresses on ports[i] */
	__u8 unnamed_ports; /* bit i: what is said at the addresses on ports[i] is not looked at */
	__u8 padding[3]; /* zero */
};
_Static_assert(sizeof(struct name_rule) == 32, "size of name_rule");
_Static_assert(__builtin_offsetof(struct name_rule, pattern_id) == 0, "name_rule.pattern_id");
_Static_assert(__builtin_offsetof(struct name_rule, ports) == 8, "name_rule.ports");
_Static_assert(__builtin_offsetof(struct name_rule, port_count) == 24, "name_rule.port_count");
_Static_assert(__builtin_offsetof(struct name_rule, private_addresses) == 25, "name_rule.private_addresses");
_Static_assert(__builtin_offsetof(struct name_rule, named_ports) == 26, "name_rule.named_ports");
_Static_assert(__builtin_offsetof(struct name_rule, proxy_ports) == 27, "name_rule.proxy_ports");
_Static_assert(__builtin_offsetof(struct name_rule, unnamed_ports) == 28, "name_rule.unnamed_ports");
_Static_assert(__builtin_offsetof(struct name_rule, padding) == 29, "name_rule.padding");

/* Key of `ranges`; the value is a __u32 RANGE_*. */
struct range_key {
	__u32 prefix_bits; /* of the mapped address: an IPv4 prefix is 96 longer */
	__u8 address[16]; /* network order, IPv4 mapped */
};
_Static_assert(sizeof(struct range_key) == 20, "size of range_key");
_Static_assert(__builtin_offsetof(struct range_key, prefix_bits) == 0, "range_key.prefix_bits");
_Static_assert(__builtin_offsetof(struct range_key, address) == 4, "range_key.address");

/* Key of `queries`: one question that left this host through an uplink or lo. */
struct query_key {
	__u8 resolver[16]; /* network order, IPv4 mapped */
	__u8 client[16]; /* the address that asked, after source NAT */
	__u16 client_port; /* network order, as on the wire */
	__u16 transaction_id; /* network order, as on the wire */
	__u32 protocol; /* IPPROTO_UDP or IPPROTO_TCP */
	__u32 loopback; /* 1: it left through lo, and so is answered; 0: through any other interface */
};
_Static_assert(sizeof(struct query_key) == 44, "size of query_key");
_Static_assert(__builtin_offsetof(struct query_key, resolver) == 0, "query_key.resolver");
_Static_assert(__builtin_offsetof(struct query_key, client) == 16, "query_key.client");
_Static_assert(__builtin_offsetof(struct query_key, client_port) == 32, "query_key.client_port");
_Static_assert(__builtin_offsetof(struct query_key, transaction_id) == 34, "query_key.transaction_id");
_Static_assert(__builtin_offsetof(struct query_key, protocol) == 36, "query_key.protocol");
_Static_assert(__builtin_offsetof(struct query_key, loopback) == 40, "query_key.loopback");

/* Value of `queries`. */
struct query {
	__u64 question_hash; /* of the lower-case question name, type and class, keyed with question_key */
	__u64 asked_at; /* nanoseconds, clock of this build */
};
_Static_assert(sizeof(struct query) == 16, "size of query");
_Static_assert(__builtin_offsetof(struct query, question_hash) == 0, "query.question_hash");
_Static_assert(__builtin_offsetof(struct query, asked_at) == 8, "query.asked_at");

/* Key of `listed`, an address that the policy names; there is no value to speak of. */
struct listed_key {
	__u32 prefix_bits; /* 32 for the port, and those of the mapped address that count */
	__u16 port; /* host order */
	__u16 padding; /* zero */
	__u8 address[16]; /* network order, IPv4 mapped */
};
_Static_assert(sizeof(struct listed_key) == 24, "size of listed_key");
_Static_assert(__builtin_offsetof(struct listed_key, prefix_bits) == 0, "listed_key.prefix_bits");
_Static_assert(__builtin_offsetof(struct listed_key, port) == 4, "listed_key.port");
_Static_assert(__builtin_offsetof(struct listed_key, padding) == 6, "listed_key.padding");
_Static_assert(__builtin_offsetof(struct listed_key, address) == 8, "listed_key.address");

/* Key of `learned`: where a connection may go. */
struct learned_key {
	__u8 address[16]; /* network order, IPv4 mapped */
	__u16 port; /* host order */
	__u16 padding; /* zero */
};
_Static_assert(sizeof(struct learned_key) == 20, "size of learned_key");
_Static_assert(__builtin_offsetof(struct learned_key, address) == 0, "learned_key.address");
_Static_assert(__builtin_offsetof(struct learned_key, port) == 16, "learned_key.port");
_Static_assert(__builtin_offsetof(struct learned_key, padding) == 18, "learned_key.padding");

/* Value of `learned`. */
struct learned_value {
	__u64 expires_at; /* nanoseconds, clock of this build; later: no permission */
	__u64 pattern_id; /* the pattern that taught it last */
	__u64 used_at; /* when a connection went there, to USE_GRAIN_SECONDS, same clock; 0: never */
	__u64 unnamed_until; /* as expires_at: until then nobody looks what name is asked for there */
	__u64 proxy_until; /* as expires_at: until then a proxy is there */
};
_Static_assert(sizeof(struct learned_value) == 40, "size of learned_value");
_Static_assert(__builtin_offsetof(struct learned_value, expires_at) == 0, "learned_value.expires_at");
_Static_assert(__builtin_offsetof(struct learned_value, pattern_id) == 8, "learned_value.pattern_id");
_Static_assert(__builtin_offsetof(struct learned_value, used_at) == 16, "learned_value.used_at");
_Static_assert(__builtin_offsetof(struct learned_value, unnamed_until) == 24, "learned_value.unnamed_until");
_Static_assert(__builtin_offsetof(struct learned_value, proxy_until) == 32, "learned_value.proxy_until");

/* The one value of `settings`; all zero (not configured) means: learn nothing, vouch for nothing. */
struct settings {
	__u64 question_key; /* secret; a forged question cannot be fitted to a hash */
	__u64 lifetime_floor; /* nanoseconds */
	__u64 lifetime_ceiling; /* nanoseconds */
	__u64 refresh_margin; /* nanoseconds */
	__u64 query_window; /* nanoseconds */
	__u64 netns_cookie; /* of the namespace that is enforced; sockets of others are left alone. 0: the initial one; NETNS_ANY: all */
	__u64 pidns_device; /* st_dev of /proc/1/ns/pid as the kernel counts it; 0: not known */
	__u64 pidns_inode; /* st_ino of the same */
	__u32 mark_mask; /* our bits; others survive */
	__u32 mark_vouched; /* the vouching bit */
	__u32 mark_host; /* scope bits: host */
	__u32 mark_engine; /* scope bits: engine */
	__u32 mark_container; /* scope bits: container */
	__u32 configured; /* 1 when the above counts */
	__u32 judging; /* JUDGING_* */
	__u32 observing; /* 1: mode observe, which has counters of its own */
	__u32 recognising; /* 1: some scope's level is JUDGED_RECOGNISED */
	__u32 padding; /* zero */
};
_Static_assert(sizeof(struct settings) == 104, "size of settings");
_Static_assert(__builtin_offsetof(struct settings, question_key) == 0, "settings.question_key");
_Static_assert(__builtin_offsetof(struct settings, lifetime_floor) == 8, "settings.lifetime_floor");
_Static_assert(__builtin_offsetof(struct settings, lifetime_ceiling) == 16, "settings.lifetime_ceiling");
_Static_assert(__builtin_offsetof(struct settings, refresh_margin) == 24, "settings.refresh_margin");
_Static_assert(__builtin_offsetof(struct settings, query_window) == 32, "settings.query_window");
_Static_assert(__builtin_offsetof(struct settings, netns_cookie) == 40, "settings.netns_cookie");
_Static_assert(__builtin_offsetof(struct settings, pidns_device) == 48, "settings.pidns_device");
_Static_assert(__builtin_offsetof(struct settings, pidns_inode) == 56, "settings.pidns_inode");
_Static_assert(__builtin_offsetof(struct settings, mark_mask) == 64, "settings.mark_mask");
_Static_assert(__builtin_offsetof(struct settings, mark_vouched) == 68, "settings.mark_vouched");
_Static_assert(__builtin_offsetof(struct settings, mark_host) == 72, "settings.mark_host");
_Static_assert(__builtin_offsetof(struct settings, mark_engine) == 76, "settings.mark_engine");
_Static_assert(__builtin_offsetof(struct settings, mark_container) == 80, "settings.mark_container");
_Static_assert(__builtin_offsetof(struct settings, configured) == 84, "settings.configured");
_Static_assert(__builtin_offsetof(struct settings, judging) == 88, "settings.judging");
_Static_assert(__builtin_offsetof(struct settings, observing) == 92, "settings.observing");
_Static_assert(__builtin_offsetof(struct settings, recognising) == 96, "settings.recognising");
_Static_assert(__builtin_offsetof(struct settings, padding) == 100, "settings.padding");

/* Head of an event; `wire_length` bytes of the DNS message follow. */
struct dns_event {
	__u64 at; /* nanoseconds, clock of this build */
	__u32 interface; /* index of the interface it arrived on */
	__u32 message_length; /* bytes of the whole message; more than wire_length if it was cut */
	__u16 wire_length; /* bytes that follow, at most MAX_WIRE_BYTES */
	__u8 outcome; /* OUTCOME_* */
	__u8 protocol; /* IPPROTO_UDP or IPPROTO_TCP */
	__u32 inserted; /* how many (address, port) this packet added or extended */
	__u8 resolver[16]; /* network order, IPv4 mapped */
};
_Static_assert(sizeof(struct dns_event) == 40, "size of dns_event");
_Static_assert(__builtin_offsetof(struct dns_event, at) == 0, "dns_event.at");
_Static_assert(__builtin_offsetof(struct dns_event, interface) == 8, "dns_event.interface");
_Static_assert(__builtin_offsetof(struct dns_event, message_length) == 12, "dns_event.message_length");
_Static_assert(__builtin_offsetof(struct dns_event, wire_length) == 16, "dns_event.wire_length");
_Static_assert(__builtin_offsetof(struct dns_event, outcome) == 18, "dns_event.outcome");
_Static_assert(__builtin_offsetof(struct dns_event, protocol) == 19, "dns_event.protocol");
_Static_assert(__builtin_offsetof(struct dns_event, inserted) == 20, "dns_event.inserted");
_Static_assert(__builtin_offsetof(struct dns_event, resolver) == 24, "dns_event.resolver");

/* Key of `connects`: what a connect() without a voucher and the report of its refusal have in common. */
struct connect_key {
	__u8 address[16]; /* network order, IPv4 mapped */
	__u16 port; /* host order */
	__u16 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u32 scope; /* SCOPE_* */
	__u32 uid; /* as the host's user namespace counts */
};
_Static_assert(sizeof(struct connect_key) == 28, "size of connect_key");
_Static_assert(__builtin_offsetof(struct connect_key, address) == 0, "connect_key.address");
_Static_assert(__builtin_offsetof(struct connect_key, port) == 16, "connect_key.port");
_Static_assert(__builtin_offsetof(struct connect_key, protocol) == 18, "connect_key.protocol");
_Static_assert(__builtin_offsetof(struct connect_key, scope) == 20, "connect_key.scope");
_Static_assert(__builtin_offsetof(struct connect_key, uid) == 24, "connect_key.uid");

/* Value of `connects`: who called it last. */
struct connect_value {
	__u64 at; /* nanoseconds, clock of this build */
	__u64 other_at; /* when another process did the same, the last time; 0: never */
	__u64 cgroup_id; /* of cgroup v2 */
	__u32 process; /* in the pid namespace of the settings; 0: not known */
	__u32 padding; /* zero */
	char comm[16]; /* of the thread, ends in NUL */
};
_Static_assert(sizeof(struct connect_value) == 48, "size of connect_value");
_Static_assert(__builtin_offsetof(struct connect_value, at) == 0, "connect_value.at");
_Static_assert(__builtin_offsetof(struct connect_value, other_at) == 8, "connect_value.other_at");
_Static_assert(__builtin_offsetof(struct connect_value, cgroup_id) == 16, "connect_value.cgroup_id");
_Static_assert(__builtin_offsetof(struct connect_value, process) == 24, "connect_value.process");
_Static_assert(__builtin_offsetof(struct connect_value, padding) == 28, "connect_value.padding");
_Static_assert(__builtin_offsetof(struct connect_value, comm) == 32, "connect_value.comm");

/* Key of `flows`, `hellos` and `strays`: a TCP connection as it leaves through an uplink, translated. */
struct flow_key {
	__u8 source[16]; /* network order, IPv4 mapped */
	__u8 destination[16]; /* network order, IPv4 mapped */
	__u16 source_port; /* host order */
	__u16 destination_port; /* host order */
};
_Static_assert(sizeof(struct flow_key) == 36, "size of flow_key");
_Static_assert(__builtin_offsetof(struct flow_key, source) == 0, "flow_key.source");
_Static_assert(__builtin_offsetof(struct flow_key, destination) == 16, "flow_key.destination");
_Static_assert(__builtin_offsetof(struct flow_key, source_port) == 32, "flow_key.source_port");
_Static_assert(__builtin_offsetof(struct flow_key, destination_port) == 34, "flow_key.destination_port");

/* Value of `flows`. */
struct flow {
	__u64 pattern_id; /* the pattern that allowed its name; 0: none yet */
	__u32 next; /* sequence number of the first byte that was not read */
	__u32 head_bytes; /* of a CONNECT's head, so far */
	__u16 port; /* host order; a proxy is asked for another one than its own */
	__u8 state; /* FLOW_* */
	__u8 mode; /* GUARD_NAME, GUARD_PROXY or GUARD_RECOGNISE */
	__u32 padding; /* zero */
};
_Static_assert(sizeof(struct flow) == 24, "size of flow");
_Static_assert(__builtin_offsetof(struct flow, pattern_id) == 0, "flow.pattern_id");
_Static_assert(__builtin_offsetof(struct flow, next) == 8, "flow.next");
_Static_assert(__builtin_offsetof(struct flow, head_bytes) == 12, "flow.head_bytes");
_Static_assert(__builtin_offsetof(struct flow, port) == 16, "flow.port");
_Static_assert(__builtin_offsetof(struct flow, state) == 18, "flow.state");
_Static_assert(__builtin_offsetof(struct flow, mode) == 19, "flow.mode");
_Static_assert(__builtin_offsetof(struct flow, padding) == 20, "flow.padding");

/* Value of `uplinks`, by index of the interface; one that is not there is not guarded. */
struct uplink {
	__u32 any_port; /* one of the registry ports, for packets that hide theirs */
	__u32 link_bytes; /* of the link layer's header: 14, or 0 */
};
_Static_assert(sizeof(struct uplink) == 8, "size of uplink");
_Static_assert(__builtin_offsetof(struct uplink, any_port) == 0, "uplink.any_port");
_Static_assert(__builtin_offsetof(struct uplink, link_bytes) == 4, "uplink.link_bytes");

/* Key of `own_links`: an address of this host's own on the link layer; what leaves with another is a stranger's. */
struct link {
	__u8 address[6]; /* as on the wire */
	__u8 padding[2]; /* zero */
};
_Static_assert(sizeof(struct link) == 8, "size of link");
_Static_assert(__builtin_offsetof(struct link, address) == 0, "link.address");
_Static_assert(__builtin_offsetof(struct link, padding) == 6, "link.padding");

/* One record of the ring `endings`: a connection that the guard ended, or in mode observe would have. */
struct ending {
	__u64 at; /* nanoseconds, clock of this build */
	__u8 source[16]; /* network order, IPv4 mapped; translated, as all of this */
	__u8 destination[16]; /* network order, IPv4 mapped */
	__u16 source_port; /* host order */
	__u16 destination_port; /* host order */
	__u32 interface; /* index of the uplink */
	__u32 scope; /* SCOPE_* */
	__u16 name_length; /* bytes of `name` that count */
	__u8 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 verdict; /* GUARD_* */
	__u8 name[256]; /* what was asked for, as it was written */
};
_Static_assert(sizeof(struct ending) == 312, "size of ending");
_Static_assert(__builtin_offsetof(struct ending, at) == 0, "ending.at");
_Static_assert(__builtin_offsetof(struct ending, source) == 8, "ending.source");
_Static_assert(__builtin_offsetof(struct ending, destination) == 24, "ending.destination");
_Static_assert(__builtin_offsetof(struct ending, source_port) == 40, "ending.source_port");
_Static_assert(__builtin_offsetof(struct ending, destination_port) == 42, "ending.destination_port");
_Static_assert(__builtin_offsetof(struct ending, interface) == 44, "ending.interface");
_Static_assert(__builtin_offsetof(struct ending, scope) == 48, "ending.scope");
_Static_assert(__builtin_offsetof(struct ending, name_length) == 52, "ending.name_length");
_Static_assert(__builtin_offsetof(struct ending, protocol) == 54, "ending.protocol");
_Static_assert(__builtin_offsetof(struct ending, verdict) == 55, "ending.verdict");
_Static_assert(__builtin_offsetof(struct ending, name) == 56, "ending.name");

/* Value of `answers`. */
struct answer {
	__u32 length; /* of `bytes` that count; 1 .. MAX_ANSWER_BYTES */
	__u32 sum; /* of these as 16-bit words in memory's order, not folded (RFC 1071) */
	__u8 bytes[1024]; /* what follows the TCP header */
};
_Static_assert(sizeof(struct answer) == 1032, "size of answer");
_Static_assert(__builtin_offsetof(struct answer, length) == 0, "answer.length");
_Static_assert(__builtin_offsetof(struct answer, sum) == 4, "answer.sum");
_Static_assert(__builtin_offsetof(struct answer, bytes) == 8, "answer.bytes");

#endif
