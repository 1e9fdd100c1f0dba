/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What takes the connect hooks' place before 5.8, which may not set a mark there, and before 5.7 know neither cgroup
 * nor program of who calls: a socket gets its scope where it is made, by programs that are attached to the cgroups of
 * that scope, and a TCP connection its voucher at BPF_SOCK_OPS_TCP_CONNECT_CB, which comes before its first packet and
 * may set SO_MARK since 4.13. So no first SYN is lost here either.
 */
#ifndef REGISTRY_ENFORCER_LEGACY_H
#define REGISTRY_ENFORCER_LEGACY_H

/* The programs of a cgroup run before those of its ancestors, so what is stamped already is stamped more exactly. */
INLINE int stamp_socket(struct bpf_sock *socket, __u32 scope, struct settings *settings)
{
	if (!(socket->mark & settings->mark_mask & ~settings->mark_vouched))
		socket->mark = (socket->mark & ~settings->mark_mask) | scope;
	return 1;
}

INLINE void connect_destination(struct learned_key *key, struct bpf_sock_ops *context)
{
	__u32 *words = (__u32 *)key->address;

	if (context->family == 2) { /* AF_INET */
		__u32 address = context->remote_ip4;

		map_ipv4(key->address, (__u8 *)&address);
	} else {
		words[0] = context->remote_ip6[0]; /* a mapped IPv4 address has the form of our keys already */
		words[1] = context->remote_ip6[1];
		words[2] = context->remote_ip6[2];
		words[3] = context->remote_ip6[3];
	}
	key->port = NETWORK_32(context->remote_port);
	key->padding = 0;
}

/* Sets or takes away the voucher, whatever was there; the scope stays that of the socket's birth. */
INLINE void vouch_for_connection(struct bpf_sock_ops *context, struct settings *settings)
{
	struct learned_key key __attribute__((aligned(8))); /* map_ipv4() writes words */
	struct bpf_sock *socket = context->sk;
	__u32 mark;

	if (!socket)
		return;
	connect_destination(&key, context);
	mark = socket->mark & ~settings->mark_vouched;
	if (is_learned(&key)) {
		mark |= settings->mark_vouched;
	} else if (context->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		/* Its answer may be on its way: look again when the SYN comes again. Nothing else would without sets.
		 */
		bpf_sock_ops_cb_flags_set(context, BPF_SOCK_OPS_RTO_CB_FLAG);
		if (settings->judging) /* to count: no answer is heeded here */
			is_refused(&key, scope_of_mark(mark, settings), IPPROTO_TCP, settings);
	}
	bpf_setsockopt(context, SOL_SOCKET_LEVEL, SO_MARK_OPTION, &mark, sizeof(mark));
}

#endif
