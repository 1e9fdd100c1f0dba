/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The head of an HTTP request, which must name its host within one segment: a target, a whole URL, or a CONNECT.
 */
#ifndef REGISTRY_ENFORCER_HEAD_H
#define REGISTRY_ENFORCER_HEAD_H

#define MAX_HEAD_BYTES	  16384		      /* of a CONNECT, to the empty line */
#define CONNECT_WORD	  0x434f4e4e454354ULL /* "CONNECT" and others, as read_head() adds them up */
#define GET_WORD	  0x474554ULL
#define HEAD_WORD	  0x48454144ULL
#define HTTP_SCHEME	  0x687474703a2f2fULL /* "http://" */
#define LETTERS_OF_SCHEME 0x20202020ULL	      /* in memory's order; the rest must be as it is */
#define HOST_FIELD	  0x0a686f73743aULL   /* a line's end and "host:" */
#define HOST_LETTERS	  0x002020202000ULL
#define V2_WORD		  0x2f76322fULL /* "/v2/" */

/* 1 if x is 0: without a jump, of which the verifier follows 8,192 in a row. */
INLINE __u64 is_zero(__u64 x)
{
	return (~x & (x - 1)) >> 63;
}

INLINE __u64 byte_at(struct scratch *s, __u64 offset)
{
	return s->wire[MASKED(offset, MAX_WIRE_BYTES - 1)];
}

INLINE __u64 ends_lines(__u64 last)
{
	return is_zero((last & 0xffffff) ^ 0x0a0d0aULL) | is_zero((last & 0xffff) ^ 0x0a0aULL);
}

INLINE __u64 begins_host(__u64 last)
{
	return is_zero(((last | HOST_LETTERS) & 0xffffffffffffULL) ^ HOST_FIELD);
}

/* Behind the next "Host:" at the beginning of a line, or behind the first empty line, whichever comes first; the last
 * bytes are in `hash`. */
INLINE void find_host(struct scratch *s, int host)
{
	__u64 one, other, found;
	int i;

	s->hash = 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_WIRE_BYTES / 4; i++) {
		FORGET();
		if (s->at >= s->length)
			break;
		one = s->hash << 8 | byte_at(s, s->at);
		other = one << 8 | byte_at(s, s->at + 1);
		found = ends_lines(one) | (host ? begins_host(one) : 0);
		s->hash = other;
		s->at += 2;
		if (found | ends_lines(other) | (host ? begins_host(other) : 0)) {
			s->at -= found;
			s->hash = found ? one : other;
			break;
		}
	}
	FORGET();
}

/* "NAME", "NAME:PORT" up to what may follow it in a target or a field; 0 if it is none. */
INLINE int read_authority(struct scratch *s)
{
	__u64 byte, stop;
	int i;

	s->position = 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_NAME_BYTES; i++) {
		FORGET();
		byte = byte_at(s, s->at);
		stop = (byte - 33) >> 63 | is_zero(byte ^ ':') | is_zero(byte ^ '/') | is_zero(byte ^ '?') |
		       is_zero(byte ^ '@') | is_zero(byte ^ '[') | is_zero(byte ^ '#');
		if (stop)
			break;
		s->name[MASKED(s->position, 255)] = byte;
		s->position++;
		s->at++;
	}
	FORGET();
	s->name_length = s->position;
	byte = byte_at(s, s->at);
	if (!s->position || s->at >= s->length || s->position > MAX_NAME_BYTES - 3 || byte == '@' || byte == '[' ||
	    byte == '#')
		return 0;
	return 1;
}

/* ":PORT" behind an authority, if it is there, into `asked_port`, which is 0 then if it is none. */
INLINE void read_port(struct scratch *s)
{
	__u64 byte;
	int i;

	if (byte_at(s, s->at) != ':')
		return;
	s->at++;
	s->asked_port = 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < 5; i++) {
		FORGET();
		byte = byte_at(s, s->at);
		if (byte < '0' || byte > '9')
			break;
		s->asked_port = s->asked_port * 10 + (byte - '0');
		s->at++;
	}
	FORGET();
	if (s->at >= s->length || s->asked_port > 65535)
		s->asked_port = 0;
}

/* The head of a request, which must name its host within one segment. */
INLINE void read_head(struct __sk_buff *skb, struct scratch *s)
{
	__u64 byte;
	int i;

	s->verdict = GUARD_UNREADABLE;
	if (!load_window(skb, s))
		return;
	if (s->length < MAX_WIRE_BYTES) /* else the slack behind it, which is zero */
		*(__u64 *)(s->wire + MASKED(s->length, MAX_WIRE_BYTES - 1)) = 0;
	s->hash = 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < 8; i++) {
		FORGET();
		byte = byte_at(s, s->at);
		s->at++;
		if (byte < 'A' || byte > 'Z')
			break;
		s->hash = s->hash << 8 | byte;
	}
	FORGET();
	s->type = s->hash;
	s->absolute = 0;
	s->asked_port = s->flow.port;
	FORGET();
	if (byte_at(s, s->at - 1) != ' ')
		return;
	byte = byte_at(s, s->at);
	if (s->type == CONNECT_WORD) {
		s->absolute = 1;
		s->asked_port = 0;
	} else if (byte != '/' && byte != '*') {
		/* Of a whole URL the authority counts, whatever Host says (RFC 9112, section 3.2.2). */
		if (NETWORK_64(*(__u64 *)wire_at(s, s->at) | LETTERS_OF_SCHEME) >> 8 != HTTP_SCHEME)
			return;
		s->at += 7;
		s->absolute = 1;
		s->asked_port = 80;
	} else {
		s->registry = field_32(wire_at(s, s->at)) == V2_WORD;
		find_host(s, 1);
		if (ends_lines(s->hash) || s->at >= s->length) {
			s->verdict = GUARD_NO_NAME;
			return;
		}
#pragma clang loop unroll(disable)
		for (i = 0; i < 8; i++) {
			FORGET();
			byte = byte_at(s, s->at);
			if (byte != ' ' && byte != '\t')
				break;
			s->at++;
		}
	}
	FORGET();
	if (!read_authority(s)) {
		s->verdict = GUARD_NO_NAME;
		return;
	}
	if (s->absolute) {
		read_port(s);
		if (!s->asked_port)
			return;
		s->flow.port = s->asked_port;
	}
	s->named = 1;
	if (s->flow.mode != GUARD_PROXY) {
		if (s->type == CONNECT_WORD)
			return;
		s->flow.state = FLOW_ALLOWED;
	} else if (s->type == CONNECT_WORD) {
		s->flow.state = FLOW_CONNECT;
	} else {
		/* Every request to a proxy is looked at, so none may have a body, nor another one behind it. */
		if (!s->absolute || (s->type != GET_WORD && s->type != HEAD_WORD))
			return;
		find_host(s, 0);
		if (!ends_lines(s->hash) || s->at != s->payload_left)
			return;
	}
	s->verdict = GUARD_PASSED;
}

/* Whether the segment ends with an empty line, as the last one of a head does. */
INLINE int ends_head(struct __sk_buff *skb, struct scratch *s)
{
	if (bpf_skb_load_bytes(skb, s->tail - 4, s->wire, 4))
		return 0;
	return field_32(s->wire) == 0x0d0a0d0aU;
}

#endif
