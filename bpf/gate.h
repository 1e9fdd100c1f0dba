/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Marks: who vouches for a connection, whose socket it is. */
#ifndef REGISTRY_ENFORCER_GATE_H
#define REGISTRY_ENFORCER_GATE_H

#define MAX_CGROUP_LEVELS 12 /* depth in the hierarchy; a pod of a cluster in a container is at 8 */
#define SOL_SOCKET_LEVEL  1  /* SOL_SOCKET and SO_MARK of the kernel's asm-generic/socket.h */
#define SO_MARK_OPTION	  36
#define FIRST_PIDNS_INODE 0xEFFFFFFC /* PROC_PID_INIT_INO */

/* Our bits of a packet are ours to set: macvlan and sockets of the host's own network are not scrubbed by any device.
 */
INLINE void clear_mark(struct __sk_buff *skb, struct settings *settings)
{
	if (skb->mark & settings->mark_mask)
		skb->mark &= ~settings->mark_mask;
}

/* Whether an answer taught where this TCP packet of a container goes. Any segment, not the first only: a connection
 * that waited for its answer gets through when it sends its SYN again. */
INLINE int may_pass(struct packet *packet, struct learned_key *key)
{
	copy_ipv6(key->address, packet->destination);
	key->port = packet->destination_port;
	key->padding = 0;
	return is_learned(key);
}

/* SCOPE_* as bits of the mark. */
INLINE __u32 scope_bits(__u32 scope, struct settings *settings)
{
	if (scope == SCOPE_CONTAINER)
		return settings->mark_container;
	if (scope == SCOPE_ENGINE)
		return settings->mark_engine;
	return scope == SCOPE_HOST ? settings->mark_host : 0;
}

/* The scope that a mark says; a socket that no program has stamped has none. */
INLINE __u32 scope_of_mark(__u32 mark, struct settings *settings)
{
	mark &= settings->mark_mask & ~settings->mark_vouched;
	if (mark == settings->mark_container)
		return SCOPE_CONTAINER;
	if (mark == settings->mark_engine)
		return SCOPE_ENGINE;
	return mark == settings->mark_host ? SCOPE_HOST : SCOPE_UNSTAMPED;
}

/* Whose the calling process is, SCOPE_*. The deepest cgroup that is known decides: a container's is often
 * below its engine's. */
INLINE __u32 scope_of_current(struct settings *settings, int look_at_pidns)
{
	struct program_name program = {}; /* a key, and 6.1 writes nothing behind the NUL */
	__u32 *known, scope = 0;
	__u64 cgroup;
	int level;

	if (look_at_pidns && settings->pidns_inode) {
		struct bpf_pidns_info ids;

		if (bpf_get_ns_current_pid_tgid(settings->pidns_device, settings->pidns_inode, &ids, sizeof(ids)))
			return SCOPE_CONTAINER; /* fails for every other namespace than the host's */
	}
#pragma clang loop unroll(disable)
	for (level = 1; level <= MAX_CGROUP_LEVELS; level++) {
		cgroup = bpf_get_current_ancestor_cgroup_id(level);
		if (!cgroup)
			break;
		known = find_cgroup(&cgroup);
		if (known)
			scope = *known;
	}
	if (scope)
		return scope;
	if (!bpf_get_current_comm(&program, sizeof(program))) {
		known = find_program(&program);
		if (known)
			return *known;
	}
	return SCOPE_HOST;
}

INLINE void mark_socket(struct bpf_sock_addr *context, struct settings *settings, __u32 bits)
{
	struct bpf_sock *socket = context->sk; /* bpf_getsockopt knows SO_MARK since 6.1 only */
	__u32 mark;

	if (!socket)
		return;
	mark = (socket->mark & ~settings->mark_mask) | (bits & settings->mark_mask);
	bpf_setsockopt(context, SOL_SOCKET_LEVEL, SO_MARK_OPTION, &mark, sizeof(mark));
}

/* User space cannot ask for a cookie before 5.14; the helper, since 5.7, knows the initial namespace by itself. */
INLINE int is_enforced_netns(__u64 cookie, struct settings *settings)
{
	if (settings->netns_cookie == NETNS_ANY)
		return 1;
	return cookie == (settings->netns_cookie ? settings->netns_cookie : bpf_get_netns_cookie(0));
}

/* The hooks' settings, or NULL for a socket that is none of ours: those of other network namespaces pass the gate. */
INLINE struct settings *settings_for(struct bpf_sock_addr *context)
{
	struct settings *settings = find_settings();

	if (!settings || !settings->configured || !is_enforced_netns(bpf_get_netns_cookie(context), settings))
		return 0;
	return settings;
}

INLINE void set_key_port(struct learned_key *key, struct bpf_sock_addr *context)
{
	key->port = NETWORK_16((__u16)context->user_port);
	key->padding = 0;
}

INLINE void ipv4_destination(struct learned_key *key, struct bpf_sock_addr *context)
{
	__u32 address = context->user_ip4;

	map_ipv4(key->address, (__u8 *)&address);
	set_key_port(key, context);
}

INLINE void ipv6_destination(struct learned_key *key, struct bpf_sock_addr *context)
{
	__u32 *words = (__u32 *)key->address;

	words[0] = context->user_ip6[0]; /* a mapped IPv4 address has the form of our keys already */
	words[1] = context->user_ip6[1];
	words[2] = context->user_ip6[2];
	words[3] = context->user_ip6[3];
	set_key_port(key, context);
}

/* Process id where the daemon looks for it, which may be another pid namespace than the kernel's first; 0: not known.
 */
INLINE __u32 current_process(struct settings *settings, int look_at_pidns)
{
	struct bpf_pidns_info ids;

	if (look_at_pidns && settings->pidns_inode &&
	    !bpf_get_ns_current_pid_tgid(settings->pidns_device, settings->pidns_inode, &ids, sizeof(ids)))
		return ids.tgid;
	return settings->pidns_inode == FIRST_PIDNS_INODE ? bpf_get_current_pid_tgid() >> 32 : 0;
}

/* Keeps who asked for this connection: when it is refused the process may have ended. A map and no event: nothing
 * happens in user space until nftables reports a refusal, however many connections there are. */
INLINE void note_connect(struct learned_key *to, __u32 protocol, __u32 scope, struct settings *settings,
			 int look_at_pidns)
{
	struct connect_key key;
	struct connect_value value, *before;

	copy_ipv6(key.address, to->address);
	key.port = to->port;
	key.protocol = protocol;
	key.scope = scope;
	key.uid = bpf_get_current_uid_gid();
	value.at = now_ns();
	value.other_at = 0;
	value.cgroup_id = bpf_get_current_cgroup_id();
	value.process = current_process(settings, look_at_pidns);
	value.padding = 0;
	if (bpf_get_current_comm(value.comm, sizeof(value.comm)))
		return;
	before = find_connect(&key);
	if (before)
		value.other_at = before->process == value.process ? before->other_at : before->at;
	remember_connect(&key, &value);
}

INLINE int mark_connect(struct bpf_sock_addr *context, int ipv6, int look_at_pidns)
{
	struct settings *settings = settings_for(context);
	struct learned_key key __attribute__((aligned(8))); /* map_ipv4() writes words */
	__u32 scope;

	if (!settings)
		return 1;
	scope = scope_of_current(settings, look_at_pidns);
	if (ipv6)
		ipv6_destination(&key, context);
	else
		ipv4_destination(&key, context);
	if (context->protocol == IPPROTO_TCP && is_learned(&key)) {
		mark_socket(context, settings, scope_bits(scope, settings) | settings->mark_vouched);
		return 1;
	}
	note_connect(&key, context->protocol, scope, settings, look_at_pidns);
	mark_socket(context, settings, scope_bits(scope, settings));
	/* 0 is EPERM. The scope is in the mark all the same: nothing rests on this answer. */
	return !(settings->judging && is_refused(&key, scope, context->protocol, settings) &&
		 settings->judging == JUDGING_REFUSE);
}

/* Scope only: the mark of an unconnected UDP socket is one packet late, so it may never vouch. */
INLINE int mark_sendmsg(struct bpf_sock_addr *context, int look_at_pidns)
{
	struct settings *settings = settings_for(context);

	if (settings)
		mark_socket(context, settings, scope_bits(scope_of_current(settings, look_at_pidns), settings));
	return 1;
}

#endif
