// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The kernel's half of registry-enforcer: learn from DNS answers, vouch for connections, stamp whose socket it is.
 * It permits, and nftables refuses; where nftables can only drop, it says no as well. A parse failure permits nothing.
 *
 *	learn		tc ingress of uplinks and lo
 *	track_query	tc egress of uplinks and lo
 *	gate		tc ingress of every other interface, ports of internal bridges among them
 *	guard		tc egress of uplinks; _netns: where a packet tells its network namespace (6.15)
 *	connect4 ...	cgroup hooks; _pidns: where bpf_get_ns_current_pid_tgid is allowed in them (6.10)
 *	sock_create	cgroup hook: the scope of raw sockets and of first UDP packets
 *	setsockopt	cgroup hook: keeps our bits of the mark (6.1)
 *	stamp_...	cgroup hook, and sock_ops: in place of those hooks where they may not mark (before 5.8)
 *
 * Each loads alone: where a kernel refuses one, the others still serve.
 */
#include "build.h"
#include "shared.h"
#include "packet.h"
#include "maps.h"

/* Every use of a map: bcc rewrites map operations in this file only, and never inside a macro. */
/* clang-format off */
#ifdef BUILT_BY_BCC
INLINE struct settings *find_settings(void) { __u64 zero = 0; return settings.lookup(KEY_32(&zero)); }
INLINE struct scratch *find_scratch(void) { __u64 zero = 0; return scratches.lookup(KEY_32(&zero)); }
INLINE __u64 *find_counter(__u32 *key) { return counters.lookup(key); }
INLINE struct name_rule *find_name(struct name_key *key) { return names.lookup(key); }
INLINE __u8 *find_resolver(struct address *key) { return resolvers.lookup(key); }
INLINE __u32 *find_range(struct range_key *key) { return ranges.lookup(key); }
INLINE __u32 *find_program(struct program_name *key) { return programs.lookup(key); }
INLINE __u32 *find_cgroup(__u64 *key) { return cgroups.lookup(key); }
INLINE struct query *find_query(struct query_key *key) { return queries.lookup(key); }
INLINE int remember_query(struct query_key *key, struct query *value) { return queries.update(key, value); }
INLINE int forget_query(struct query_key *key) { return queries.delete(key); }
INLINE struct learned_value *find_learned(struct learned_key *key) { return learned.lookup(key); }
INLINE int learn_address(struct learned_key *key, struct learned_value *value) { return learned.update(key, value); }
INLINE struct connect_value *find_connect(struct connect_key *key) { return connects.lookup(key); }
INLINE int remember_connect(struct connect_key *key, struct connect_value *value) { return connects.update(key, value); }
INLINE __u32 *find_level(__u32 *key) { return levels.lookup(key); }
INLINE __u8 *find_registry_port(__u32 *key) { return registry_ports.lookup(key); }
INLINE __u8 *find_listed(struct listed_key *key) { return listed.lookup(key); }
INLINE __u64 *find_refusals(__u32 *key) { return refusals.lookup(key); }
INLINE struct flow *find_flow(struct flow_key *key) { return flows.lookup(key); }
INLINE int remember_flow(struct flow_key *key, struct flow *value) { return flows.update(key, value); }
INLINE void forget_flow(struct flow_key *key) { flows.delete(key); }
INLINE __u64 *find_stray(struct flow_key *key) { return strays.lookup(key); }
INLINE int remember_stray(struct flow_key *key, __u64 *value) { return strays.update(key, value); }
INLINE struct hello *find_hello(struct flow_key *key) { return hellos.lookup(key); }
INLINE int remember_hello(struct flow_key *key, struct hello *value) { return hellos.update(key, value); }
INLINE struct uplink *find_uplink(__u32 *key) { return uplinks.lookup(key); }
INLINE __u8 *find_own_link(struct link *key) { return own_links.lookup(key); }
INLINE __u8 *find_catalogued(struct name_key *key) { return catalogue.lookup(key); }
INLINE struct answer *find_answer(__u32 *key) { return answers.lookup(key); }
INLINE __u64 *find_guarded(__u32 *key) { return guarded.lookup(key); }
#ifdef LEGACY_KERNEL
INLINE int send_event(void *context, void *event, __u32 size) { return events.perf_submit(context, event, size); }
INLINE int send_ending(void *context, void *event, __u32 size) { return endings.perf_submit(context, event, size); }
#else
INLINE int send_event(void *context, void *event, __u32 size) { return events.ringbuf_output(event, size, 0); }
INLINE int send_ending(void *context, void *event, __u32 size) { return endings.ringbuf_output(event, size, 0); }
#endif
#else
INLINE struct settings *find_settings(void) { __u64 zero = 0; return bpf_map_lookup_elem(&settings, &zero); }
INLINE struct scratch *find_scratch(void) { __u64 zero = 0; return bpf_map_lookup_elem(&scratches, &zero); }
INLINE __u64 *find_counter(__u32 *key) { return bpf_map_lookup_elem(&counters, key); }
INLINE struct name_rule *find_name(struct name_key *key) { return bpf_map_lookup_elem(&names, key); }
INLINE __u8 *find_resolver(struct address *key) { return bpf_map_lookup_elem(&resolvers, key); }
INLINE __u32 *find_range(struct range_key *key) { return bpf_map_lookup_elem(&ranges, key); }
INLINE __u32 *find_program(struct program_name *key) { return bpf_map_lookup_elem(&programs, key); }
INLINE __u32 *find_cgroup(__u64 *key) { return bpf_map_lookup_elem(&cgroups, key); }
INLINE struct query *find_query(struct query_key *key) { return bpf_map_lookup_elem(&queries, key); }
INLINE int remember_query(struct query_key *key, struct query *value) { return bpf_map_update_elem(&queries, key, value, BPF_ANY); }
INLINE int forget_query(struct query_key *key) { return bpf_map_delete_elem(&queries, key); }
INLINE struct learned_value *find_learned(struct learned_key *key) { return bpf_map_lookup_elem(&learned, key); }
INLINE int learn_address(struct learned_key *key, struct learned_value *value) { return bpf_map_update_elem(&learned, key, value, BPF_ANY); }
INLINE struct connect_value *find_connect(struct connect_key *key) { return bpf_map_lookup_elem(&connects, key); }
INLINE int remember_connect(struct connect_key *key, struct connect_value *value) { return bpf_map_update_elem(&connects, key, value, BPF_ANY); }
INLINE __u32 *find_level(__u32 *key) { return bpf_map_lookup_elem(&levels, key); }
INLINE __u8 *find_registry_port(__u32 *key) { return bpf_map_lookup_elem(&registry_ports, key); }
INLINE __u8 *find_listed(struct listed_key *key) { return bpf_map_lookup_elem(&listed, key); }
INLINE __u64 *find_refusals(__u32 *key) { return bpf_map_lookup_elem(&refusals, key); }
INLINE struct flow *find_flow(struct flow_key *key) { return bpf_map_lookup_elem(&flows, key); }
INLINE int remember_flow(struct flow_key *key, struct flow *value) { return bpf_map_update_elem(&flows, key, value, BPF_ANY); }
INLINE void forget_flow(struct flow_key *key) { bpf_map_delete_elem(&flows, key); }
INLINE __u64 *find_stray(struct flow_key *key) { return bpf_map_lookup_elem(&strays, key); }
INLINE int remember_stray(struct flow_key *key, __u64 *value) { return bpf_map_update_elem(&strays, key, value, BPF_ANY); }
INLINE struct hello *find_hello(struct flow_key *key) { return bpf_map_lookup_elem(&hellos, key); }
INLINE int remember_hello(struct flow_key *key, struct hello *value) { return bpf_map_update_elem(&hellos, key, value, BPF_ANY); }
INLINE struct uplink *find_uplink(__u32 *key) { return bpf_map_lookup_elem(&uplinks, key); }
INLINE __u8 *find_own_link(struct link *key) { return bpf_map_lookup_elem(&own_links, key); }
INLINE __u8 *find_catalogued(struct name_key *key) { return bpf_map_lookup_elem(&catalogue, key); }
INLINE struct answer *find_answer(__u32 *key) { return bpf_map_lookup_elem(&answers, key); }
INLINE __u64 *find_guarded(__u32 *key) { return bpf_map_lookup_elem(&guarded, key); }
#ifdef LEGACY_KERNEL
INLINE int send_event(void *context, void *event, __u32 size) { return bpf_perf_event_output(context, &events, BPF_F_CURRENT_CPU, event, size); }
INLINE int send_ending(void *context, void *event, __u32 size) { return bpf_perf_event_output(context, &endings, BPF_F_CURRENT_CPU, event, size); }
#else
INLINE int send_event(void *context, void *event, __u32 size) { return bpf_ringbuf_output(&events, event, size, 0); }
INLINE int send_ending(void *context, void *event, __u32 size) { return bpf_ringbuf_output(&endings, event, size, 0); }
#endif
#endif
/* clang-format on */

#include "judge.h"
#include "gate.h"
#include "dns.h"
#include "hello.h"
#include "head.h"
#include "guard.h"
#ifdef LEGACY_KERNEL
#include "legacy.h"
#else
#include "sockopt.h"
#endif

PROGRAM("tc")
int learn(struct __sk_buff *skb)
{
	struct settings *settings = find_settings();
	struct scratch *scratch = find_scratch();

	if (!settings || !scratch || !settings->configured)
		return TC_ACT_UNSPEC;
	clear_mark(skb, settings);
	if (read_packet(skb, &scratch->packet))
		learn_answers(skb, scratch, settings);
	return TC_ACT_UNSPEC;
}

PROGRAM("tc")
int track_query(struct __sk_buff *skb)
{
	struct settings *settings = find_settings();
	struct scratch *scratch = find_scratch();

	if (!settings || !scratch || !settings->configured)
		return TC_ACT_UNSPEC;
	if (read_packet(skb, &scratch->packet))
		track_queries(skb, scratch, settings);
	return TC_ACT_UNSPEC;
}

PROGRAM("tc")
int gate(struct __sk_buff *skb)
{
	struct settings *settings = find_settings();
	struct scratch *scratch = find_scratch();

	if (!settings || !scratch || !settings->configured)
		return TC_ACT_UNSPEC;
	clear_mark(skb, settings);
	if (!read_packet(skb, &scratch->packet) || scratch->packet.protocol != IPPROTO_TCP)
		return TC_ACT_UNSPEC;
	/* Tells nftables that nobody vouches from that nobody has looked yet. */
	skb->mark |= settings->mark_container;
	if (may_pass(&scratch->packet, &scratch->learned_key))
		skb->mark |= settings->mark_vouched;
	else if (settings->judging && is_first(&scratch->packet) &&
		 is_refused(&scratch->learned_key, SCOPE_CONTAINER, IPPROTO_TCP, settings) &&
		 settings->judging == JUDGING_REFUSE)
		return answer_with_reset(skb, &scratch->packet);
	return TC_ACT_UNSPEC;
}

PROGRAM("tc")
int guard(struct __sk_buff *skb)
{
	struct settings *settings = find_settings();
	struct scratch *scratch = find_scratch();

	if (!settings || !scratch || !settings->configured)
		return TC_ACT_UNSPEC;
	scratch->stranger = 0;
	return guard_packet(skb, scratch, settings);
}

PROGRAM("tc")
int guard_netns(struct __sk_buff *skb)
{
	struct settings *settings = find_settings();
	struct scratch *scratch = find_scratch();

	if (!settings || !scratch || !settings->configured)
		return TC_ACT_UNSPEC;
	scratch->stranger = skb->sk && !is_enforced_netns(bpf_get_netns_cookie(skb), settings);
	FORGET();
	return guard_packet(skb, scratch, settings);
}

PROGRAM("cgroup/connect4")
int connect4(struct bpf_sock_addr *context)
{
	return mark_connect(context, 0, 0);
}

PROGRAM("cgroup/connect4")
int connect4_pidns(struct bpf_sock_addr *context)
{
	return mark_connect(context, 0, 1);
}

PROGRAM("cgroup/connect6")
int connect6(struct bpf_sock_addr *context)
{
	return mark_connect(context, 1, 0);
}

PROGRAM("cgroup/connect6")
int connect6_pidns(struct bpf_sock_addr *context)
{
	return mark_connect(context, 1, 1);
}

PROGRAM("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *context)
{
	return mark_sendmsg(context, 0);
}

PROGRAM("cgroup/sendmsg4")
int sendmsg4_pidns(struct bpf_sock_addr *context)
{
	return mark_sendmsg(context, 1);
}

PROGRAM("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *context)
{
	return mark_sendmsg(context, 0);
}

PROGRAM("cgroup/sendmsg6")
int sendmsg6_pidns(struct bpf_sock_addr *context)
{
	return mark_sendmsg(context, 1);
}

PROGRAM("cgroup/sock_create")
int sock_create(struct bpf_sock *socket)
{
	struct settings *settings = find_settings();

	if (settings && settings->configured && is_enforced_netns(bpf_get_netns_cookie(socket), settings))
		socket->mark =
			(socket->mark & ~settings->mark_mask) | scope_bits(scope_of_current(settings, 0), settings);
	return 1;
}

#ifndef LEGACY_KERNEL
PROGRAM("cgroup/setsockopt")
int setsockopt(struct bpf_sockopt *context)
{
	return may_set(context, 0);
}

PROGRAM("cgroup/setsockopt")
int setsockopt_pidns(struct bpf_sockopt *context)
{
	return may_set(context, 1);
}
#endif

#ifdef LEGACY_KERNEL
PROGRAM("cgroup/sock_create")
int stamp_host(struct bpf_sock *socket)
{
	struct settings *settings = find_settings();

	return settings && settings->configured ? stamp_socket(socket, settings->mark_host, settings) : 1;
}

PROGRAM("cgroup/sock_create")
int stamp_engine(struct bpf_sock *socket)
{
	struct settings *settings = find_settings();

	return settings && settings->configured ? stamp_socket(socket, settings->mark_engine, settings) : 1;
}

PROGRAM("cgroup/sock_create")
int stamp_container(struct bpf_sock *socket)
{
	struct settings *settings = find_settings();

	return settings && settings->configured ? stamp_socket(socket, settings->mark_container, settings) : 1;
}

PROGRAM("sockops")
int sock_ops(struct bpf_sock_ops *context)
{
	struct settings *settings = find_settings();

	if (settings && settings->configured &&
	    (context->op == BPF_SOCK_OPS_TCP_CONNECT_CB || context->op == BPF_SOCK_OPS_RTO_CB))
		vouch_for_connection(context, settings);
	return 1;
}
#endif
