/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * A TLS ClientHello as it passes, segment by segment and without a copy: what is kept between two is in `struct hello`.
 */
#ifndef REGISTRY_ENFORCER_HELLO_H
#define REGISTRY_ENFORCER_HELLO_H

#define GUARD_STEPS	   64 /* fields of a ClientHello in one segment: one for each extension, and some ten */
#define MAX_HELLO_BYTES	   16384
#define MAX_RECORD_BYTES   16384
#define TLS_HANDSHAKE	   22
#define TLS_CHANGE_CIPHER  20
#define TLS_RECORD_HEADER  5
#define CLIENT_HELLO	   1
#define HELLO_HEADER	   4
#define VERSION_AND_RANDOM 34
#define TLS_LEGACY_VERSION 0x0303
#define TLS_MAJOR_VERSION  0x0300
#define TLS_LAST_MINOR	   4
#define EXTENSION_NAME	   0
#define EXTENSION_ECH	   0xfe0d
#define NAME_LIST_HEAD	   5 /* length of the list, type of the name, its length (RFC 6066, section 3) */

/* What is being read of a ClientHello: numbers, the name, and what is passed over. */
enum field {
	FIELD_HEADER,	   /* type and length of the message */
	FIELD_SESSION,	   /* bytes of the session's id */
	FIELD_CIPHERS,	   /* bytes of cipher suites */
	FIELD_COMPRESSION, /* bytes of compression methods */
	FIELD_EXTENSIONS,  /* bytes of all extensions */
	FIELD_EXTENSION,   /* type and length of one */
	FIELD_NAME_LIST,   /* what precedes the name */
	FIELD_AGAIN,	   /* what a second ClientHello begins with (RFC 8446, section 4.1.4), or anything else */
	FIELD_NAME,
	FIELD_RANDOM, /* and the version; from here on nothing is kept */
	FIELD_SESSION_ID,
	FIELD_CIPHER_LIST,
	FIELD_METHODS,
	FIELD_BODY,
};

INLINE __u64 least(__u64 a, __u64 b)
{
	return a < b ? a : b;
}

/* Brings the bytes at `position` of the payload into `wire`; `at` is 0 then. */
INLINE int load_window(struct __sk_buff *skb, struct scratch *s)
{
	__u64 length = least(s->payload_left, MAX_WIRE_BYTES);

	s->length = length;
	s->at = 0;
	length = MASKED(length - 1, MAX_WIRE_BYTES - 1) + 1;
	return !bpf_skb_load_bytes(skb, s->position, s->wire, length);
}

INLINE void expect(struct hello *h, __u64 field, __u64 bytes)
{
	h->field = field;
	h->need = bytes;
	h->value = 0;
}

/* On to the next extension, or to the end; nothing but the hello may be in its record. */
INLINE void next_extension(struct scratch *s, struct hello *h)
{
	if (h->left) {
		expect(h, FIELD_EXTENSION, 4);
		return;
	}
	if (!h->named || h->record_left) {
		s->verdict = h->named ? GUARD_UNREADABLE : GUARD_NO_NAME;
		return;
	}
	h->whole = 1;
	expect(h, FIELD_AGAIN, 6);
}

/* Skips what a length announced, which may be nothing. */
INLINE void skip_field(struct hello *h, __u64 field, __u64 bytes, __u64 next, __u64 next_bytes)
{
	if (bytes)
		expect(h, field, bytes);
	else
		expect(h, next, next_bytes);
}

/* A number, or the name, is whole. */
INLINE void end_field(struct scratch *s, struct hello *h)
{
	__u64 field = h->field, value = h->value, size;

	if (field == FIELD_HEADER) {
		h->left = value & 0xffffff;
		if (value >> 24 != CLIENT_HELLO || h->left > MAX_HELLO_BYTES || h->left < VERSION_AND_RANDOM)
			s->verdict = GUARD_UNREADABLE;
		h->named = 0;
		expect(h, FIELD_RANDOM, VERSION_AND_RANDOM);
	} else if (field == FIELD_AGAIN) {
		/* A ClientHello's type, a length that fits, its version; an encrypted record looks so once in 2^34. */
		if (value >> 40 == CLIENT_HELLO && (value >> 16 & 0xffffff) <= MAX_HELLO_BYTES &&
		    (value >> 16 & 0xffffff) >= VERSION_AND_RANDOM && (value & 0xffff) == TLS_LEGACY_VERSION) {
			h->left = (value >> 16 & 0xffffff) - 2;
			h->named = 0;
			h->whole = 0;
			expect(h, FIELD_RANDOM, VERSION_AND_RANDOM - 2);
		} else {
			s->flow.state = FLOW_ALLOWED;
		}
	} else if (field == FIELD_SESSION) {
		skip_field(h, FIELD_SESSION_ID, value, FIELD_CIPHERS, 2);
	} else if (field == FIELD_CIPHERS) {
		skip_field(h, FIELD_CIPHER_LIST, value, FIELD_COMPRESSION, 1);
	} else if (field == FIELD_COMPRESSION) {
		expect(h, FIELD_METHODS, value);
		if (!value)
			s->verdict = GUARD_UNREADABLE;
	} else if (field == FIELD_EXTENSIONS) {
		if (value != h->left)
			s->verdict = GUARD_UNREADABLE;
		else
			next_extension(s, h);
	} else if (field == FIELD_EXTENSION) {
		size = value & 0xffff;
		if (size > h->left) {
			s->verdict = GUARD_UNREADABLE;
		} else if (value >> 16 == EXTENSION_ECH) {
			s->verdict = GUARD_HIDDEN_NAME;
		} else if (value >> 16 == EXTENSION_NAME) {
			if (h->named || size <= NAME_LIST_HEAD) /* a second one: which counts, the server decides */
				s->verdict = GUARD_UNREADABLE;
			h->extension = size;
			expect(h, FIELD_NAME_LIST, NAME_LIST_HEAD);
		} else if (size) {
			expect(h, FIELD_BODY, size);
		} else {
			next_extension(s, h);
		}
	} else if (field == FIELD_NAME_LIST) {
		size = value & 0xffff; /* one name, of type host_name, and nothing behind it */
		if (value >> 24 != h->extension - 2 || (value >> 16 & 0xff) || size != h->extension - NAME_LIST_HEAD ||
		    !size || size > 255)
			s->verdict = GUARD_UNREADABLE;
		h->name_length = 0;
		expect(h, FIELD_NAME, size);
	} else {
		h->named = 1;
		s->named = 1;
		next_extension(s, h);
	}
}

INLINE int is_skipped(__u64 field)
{
	return field >= FIELD_RANDOM;
}

/* What was passed over has ended. */
INLINE void end_skipped(struct scratch *s, struct hello *h)
{
	__u64 field = h->field;

	if (field == FIELD_BODY)
		next_extension(s, h);
	else if (field == FIELD_RANDOM)
		expect(h, FIELD_SESSION, 1);
	else if (field == FIELD_SESSION_ID)
		expect(h, FIELD_CIPHERS, 2);
	else if (field == FIELD_CIPHER_LIST)
		expect(h, FIELD_COMPRESSION, 1);
	else if (h->left)
		expect(h, FIELD_EXTENSIONS, 2);
	else
		s->verdict = GUARD_NO_NAME;
}

/* Up to six bytes of a number. */
INLINE void read_number(struct scratch *s, __u64 *value, __u64 count)
{
	__u64 i;

#pragma clang loop unroll(disable)
	for (i = 0; i < 6; i++) {
		FORGET();
		if (i >= count)
			break;
		*value = *value << 8 | s->wire[MASKED(s->at + i, MAX_WIRE_BYTES - 1)];
	}
}

/* The end of a record's header. */
INLINE void begin_record(struct scratch *s, struct hello *h)
{
	__u64 type = h->header >> 32, version = h->header >> 16 & 0xffff, length = h->header & 0xffff;

	h->header = 0;
	h->header_need = TLS_RECORD_HEADER;
	h->record_left = length;
	h->skipping = 0;
	if ((version & 0xff00) != TLS_MAJOR_VERSION || (version & 0xff) > TLS_LAST_MINOR) {
		s->verdict = GUARD_UNREADABLE;
		return;
	}
	if (type == TLS_HANDSHAKE && length && length <= MAX_RECORD_BYTES)
		return;
	if (h->whole && type == TLS_CHANGE_CIPHER && length == 1)
		h->skipping = 1; /* comes before a second ClientHello, or before what is encrypted */
	else if (h->whole && h->field == FIELD_AGAIN && h->need == 6)
		s->flow.state = FLOW_ALLOWED;
	else
		s->verdict = GUARD_UNREADABLE;
}

INLINE void advance(struct scratch *s, __u64 count)
{
	s->at += count;
	s->position += count;
	s->payload_left -= count;
	FORGET();
}

/* Passes over what does not matter, as far as it is here. */
INLINE void skip(struct scratch *s, struct hello *h)
{
	__u64 count;

	if (h->skipping) {
		count = least(h->record_left, s->payload_left);
		h->record_left -= count;
		advance(s, count);
		return;
	}
	if (!is_skipped(h->field))
		return;
	count = least(least(h->need, h->record_left), s->payload_left);
	if (count > h->left) {
		s->verdict = GUARD_UNREADABLE;
		return;
	}
	h->left -= count;
	h->need -= count;
	h->record_left -= count;
	advance(s, count);
	if (!h->need)
		end_skipped(s, h);
}

/* The next field and what is skipped before it, or as much as is here; 0 at the end of what can be read. */
INLINE int read_field(struct __sk_buff *skb, struct scratch *s, struct hello *h)
{
	__u64 count, field;

	if (h->record_left)
		skip(s, h);
	FORGET();
	if (s->verdict != GUARD_PASSED || s->flow.state == FLOW_ALLOWED || !s->payload_left)
		return 0;
	if (s->at + 8 > s->length && s->length < s->payload_left + s->at && !load_window(skb, s)) {
		s->verdict = GUARD_UNREADABLE;
		return 0;
	}
	FORGET();
	if (!h->record_left) {
		count = least(h->header_need, s->payload_left);
		read_number(s, &h->header, count);
		h->header_need -= count;
		advance(s, count);
		if (!h->header_need)
			begin_record(s, h);
		return 1;
	}
	field = h->field;
	if (h->skipping || is_skipped(field))
		return 1;
	count = least(least(h->need, h->record_left), s->payload_left);
	if (field != FIELD_HEADER && field != FIELD_AGAIN) {
		if (count > h->left) {
			s->verdict = GUARD_UNREADABLE;
			return 0;
		}
		h->left -= count;
	}
	if (field == FIELD_NAME) {
		/* 255 at most, and together: see what precedes it */
		if (bpf_skb_load_bytes(skb, s->position, h->name + MASKED(h->name_length, 255),
				       MASKED(count - 1, 255) + 1)) {
			s->verdict = GUARD_UNREADABLE;
			return 0;
		}
		h->name_length += count;
	} else {
		read_number(s, &h->value, count);
	}
	h->record_left -= count;
	h->need -= count;
	advance(s, count);
	if (!h->need)
		end_field(s, h);
	return 1;
}

INLINE void read_hello(struct __sk_buff *skb, struct scratch *s, struct hello *h)
{
	int i;

	s->length = 0;
	s->at = 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < GUARD_STEPS; i++) {
		FORGET();
		if (!read_field(skb, s, h))
			break;
	}
	if (s->verdict == GUARD_PASSED && s->flow.state != FLOW_ALLOWED && s->payload_left)
		s->verdict = GUARD_UNREADABLE; /* more fields than anybody sends */
}

#endif
