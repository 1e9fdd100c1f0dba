/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Every map. Programs reach them through the accessors in enforcer.bpf.c only. */
#ifndef REGISTRY_ENFORCER_MAPS_H
#define REGISTRY_ENFORCER_MAPS_H

#define WIRE_SLACK   64	 /* reads at a masked index may run over MAX_WIRE_BYTES */
#define CHAIN_MASK   255 /* a name in wire form has at most 255 bytes (RFC 1035 section 2.3.4) */
#define NAME_SLACK   8	 /* names are read and written in words */
#define REVERSED_END (MAX_NAME_BYTES + NAME_SLACK)

struct address {
	__u8 bytes[16]; /* network order, IPv4 mapped */
};

struct program_name {
	char comm[COMM_BYTES];
};

/* How far a ClientHello has been read; between segments that is all that is kept of it. */
struct hello {
	__u64 field;	   /* FIELD_* */
	__u64 need;	   /* bytes of it that are to come */
	__u64 value;	   /* of a number, so far */
	__u64 left;	   /* bytes of the message that are to come */
	__u64 header;	   /* of a record, so far */
	__u64 header_need; /* bytes of it that are to come */
	__u64 record_left; /* bytes of the record that are to come */
	__u64 skipping;	   /* the record does not matter */
	__u64 extension;   /* bytes of the name's extension */
	__u64 named;	   /* the name was read */
	__u64 whole;	   /* one message was read, and allowed */
	__u64 name_length;
	__u8 name[512]; /* 255 at most; a copy at a masked index may run over */
};

/* What a program works on, in map memory and not on the stack: there the verifier knows no values, so that the states
 * of all paths are equal after each step and one stands for all. Numbers are 64 bits wide where size does not matter:
 * without 32-bit registers (mcpu=v2) every other width costs two shifts. */
struct scratch {
	struct packet packet;

	/* the messages of this packet */
	__u64 step;	/* STEP_*: what to do next */
	__u64 next;	/* offset in the packet of the next message, TCP: of its length */
	__u64 whole;	/* bytes of this message */
	__u64 length;	/* bytes of it that are in `wire` */
	__u64 outcome;	/* OUTCOME_* */
	__u64 listed;	/* the name is in the policy */
	__u64 expected; /* hash of the question that was asked */
	__u64 now;

	/* the name that is being read */
	__u64 purpose;	/* NAME_*: what for */
	__u64 at;	/* offset in `wire` of the next byte */
	__u64 limit;	/* offset where this run of labels must have ended */
	__u64 lowest;	/* a pointer must point below this offset, as dnspython demands: so every name ends */
	__u64 resume;	/* offset behind the first pointer, 0: none was met */
	__u64 pointers; /* followed */
	__u64 left;	/* bytes of the label that remain */
	__u64 position; /* index in `chain` */
	__u64 hash;	/* of what was stored */
	__u64 odd;	/* a label held a dot or a NUL: the name has no unambiguous text */

	/* the records */
	__u64 records;	  /* that remain */
	__u64 unfit;	  /* something in the answer was left to the daemon */
	__u64 type;	  /* of the question */
	__u64 chain_at;	  /* offset in `wire` of the name in `chain` */
	__u64 foreign;	  /* its owner is another name */
	__u64 rdata_end;  /* offset in `wire` */
	__u64 port_index; /* next of `rule.ports` */
	__u64 inserted;	  /* (address, port) that are new or live longer */
	__u64 permitted;  /* (address, port) that may be connected to because of this message */

	/* the guard: a packet on its way out */
	__u64 transport;     /* offset of its TCP header in the frame, as are those below */
	__u64 header_bytes;  /* of that header */
	__u64 payload_bytes; /* behind it */
	__u64 payload_left;  /* from `position` on */
	__u64 tail;	     /* where the payload ends */
	__u64 finished;	     /* it carries a FIN */
	__u64 verdict;	     /* GUARD_* */
	__u64 name_length;   /* of the name that was read */
	__u64 named;	     /* a head has named its host */
	__u64 absolute;	     /* its target is a whole URL */
	__u64 registry;	     /* its path begins with /v2/ */
	__u64 asked_port;    /* the target's */
	__u64 stranger;	     /* its socket is of another network namespace */
	__u64 unknown;	     /* the connection's beginning was not seen */
	__u64 held_since;    /* value of `strays` */
	__u32 sequence;
	__u32 acknowledged;
	__u32 scope;	    /* whose packet it is, as a number of `levels` */
	__u32 level;	    /* that scope's */
	__u32 cgroup_scope; /* what the cgroup says of it */
	__u32 guard_padding;
	__u64 cgroup; /* of the packet's socket, or above it */
	struct uplink uplink;
	struct link link; /* the last two bytes stay zero */
	struct flow_key flow_key;
	struct flow flow;
	struct listed_key listed_key;
	__u8 segment[TCP_HEADER_BYTES + 4]; /* a TCP header that is sent */
	__u8 name[512];
	struct hello blank; /* as a connection begins with */
	struct ending ending;

	struct name_rule rule;
	struct query_key query_key;
	struct query query;
	struct learned_value learned;
	struct learned_key learned_key;
	__u32 counter; /* key of `counters` */
	struct range_key range_key;
	__u8 chain[CHAIN_MASK + 1 + NAME_SLACK]; /* lower-case wire form of the name an owner must have */
	/* The same, reversed text that ends at REVERSED_END; the prefix length is written in front of it. */
	__u8 reversed[REVERSED_END + 1 + MAX_NAME_BYTES + NAME_SLACK + 7];
	struct dns_event event; /* the message follows without a gap */
	__u8 wire[MAX_WIRE_BYTES + WIRE_SLACK];
};
_Static_assert(__builtin_offsetof(struct scratch, wire) ==
		       __builtin_offsetof(struct scratch, event) + sizeof(struct dns_event),
	       "the message follows its event");

ARRAY_MAP(settings, struct settings, 1);
LPM_MAP(names, struct name_key, struct name_rule, MAX_NAMES);
HASH_MAP(resolvers, struct address, __u8, MAX_RESOLVERS);
LPM_MAP(ranges, struct range_key, __u32, MAX_RANGES);
LRU_MAP(queries, struct query_key, struct query, MAX_QUERIES);
LRU_MAP(learned, struct learned_key, struct learned_value, MAX_LEARNED);
HASH_MAP(programs, struct program_name, __u32, MAX_PROGRAM_NAMES);
HASH_MAP(cgroups, __u64, __u32, MAX_CGROUPS);
ARRAY_MAP(levels, __u32, SCOPES);
HASH_MAP(registry_ports, __u32, __u8, MAX_REGISTRY_PORTS);
LPM_MAP(listed, struct listed_key, __u8, MAX_LISTED);
PERCPU_ARRAY_MAP(refusals, __u64, 2 * SCOPES * 2);
LRU_MAP(connects, struct connect_key, struct connect_value, MAX_CONNECTS);
LRU_MAP(flows, struct flow_key, struct flow, MAX_FLOWS);
LRU_MAP(hellos, struct flow_key, struct hello, MAX_HELLOS);
LRU_MAP(strays, struct flow_key, __u64, MAX_STRAYS); /* since when it is held up, or LET_BE */
HASH_MAP(own_links, struct link, __u8, MAX_UPLINKS);
HASH_MAP(uplinks, __u32, struct uplink, MAX_UPLINKS);
LPM_MAP(catalogue, struct name_key, __u8, MAX_CATALOGUE);
ARRAY_MAP(answers, struct answer, ANSWERS);
PERCPU_ARRAY_MAP(guarded, __u64, GUARD_OUTCOMES);
PERCPU_ARRAY_MAP(counters, __u64, OUTCOMES);
PERCPU_ARRAY_MAP(scratches, struct scratch, 1);
EVENT_MAP(events, EVENT_BYTES);
EVENT_MAP(endings, ENDING_BYTES);

#endif
