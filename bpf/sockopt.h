/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * setsockopt(2) by whom our marks would not survive it. A mark that is set after connect(2) is on the next packet: of a
 * UDP socket, of a raw one, and of a SYN that comes again. So our bits stay what the hooks made them, and the others
 * become what was asked for. What sends around tc is refused to containers, since nothing else looks at packet sockets.
 *
 * Not before 5.8, and not compiled there: with a program here the kernel took no option longer than a page, and
 * iptables could not replace a table. A mark in a control message of sendmsg(2) does not come by: nftables asks the
 * socket.
 */
#ifndef REGISTRY_ENFORCER_SOCKOPT_H
#define REGISTRY_ENFORCER_SOCKOPT_H

#define SOL_PACKET_LEVEL     263 /* linux/socket.h, linux/if_packet.h */
#define PACKET_BYPASS_OPTION 20	 /* PACKET_QDISC_BYPASS */
#define SOL_XDP_LEVEL	     283
#define LONGEST_COPIED	     4096 /* the smallest page */

INLINE int is_around_tc(struct bpf_sockopt *context)
{
	return (context->level == SOL_PACKET_LEVEL && context->optname == PACKET_BYPASS_OPTION) ||
	       context->level == SOL_XDP_LEVEL;
}

/* Our bits of the mark that is set, from the socket. What is too short for a mark the kernel refuses. Of a longer
 * option it reads the beginning, so that is all it gets: left to itself it would take it from the caller's memory. */
INLINE void keep_our_bits(struct bpf_sockopt *context, struct settings *settings)
{
	__u32 *wanted = context->optval;

	if (!context->sk || context->optlen < (__s32)sizeof(*wanted) || (void *)(wanted + 1) > context->optval_end)
		return;
	*wanted = (*wanted & ~settings->mark_mask) | (context->sk->mark & settings->mark_mask);
	context->optlen = sizeof(*wanted);
}

INLINE int judge_option(struct bpf_sockopt *context, int look_at_pidns)
{
	int marks = context->level == SOL_SOCKET_LEVEL && context->optname == SO_MARK_OPTION;
	__u32 container = SCOPE_CONTAINER, *level;
	struct settings *settings;

	if (!marks && !is_around_tc(context))
		return 1;
	settings = find_settings();
	if (!settings || !settings->configured || !is_enforced_netns(bpf_get_netns_cookie(context), settings))
		return 1;
	if (marks) {
		keep_our_bits(context, settings);
		return 1;
	}
	level = find_level(&container);
	if (!level || *level == JUDGED_NONE || settings->observing)
		return 1;
	return scope_of_current(settings, look_at_pidns) != SCOPE_CONTAINER;
}

INLINE int may_set(struct bpf_sockopt *context, int look_at_pidns)
{
	int may = judge_option(context, look_at_pidns);

	/* 0: the kernel takes the caller's memory, of which it has copied a page for us. */
	if (context->optlen > LONGEST_COPIED)
		context->optlen = 0;
	return may;
}

#endif
