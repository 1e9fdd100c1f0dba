/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * One source, two compilers.
 *
 * Ahead of time (the target host then needs neither compiler nor kernel headers), loaded by libbpf:
 *
 *	clang -target bpf -mcpu=v2 -O2 -g -Wall -Werror -I/usr/include/$(gcc -dumpmachine) \
 *		-c bpf/enforcer.bpf.c -o build/enforcer.bpf.o
 *	... -DLEGACY_KERNEL -c bpf/enforcer.bpf.c -o build/enforcer-legacy.bpf.o	(kernels before 5.8)
 *
 * On the host by bcc, which defines BPF_TABLE before the first line of ours:
 *
 *	BPF(src_file="bpf/enforcer.bpf.c", cflags=["-I<bpf>"])	(and "-DLEGACY_KERNEL" as above)
 *
 * Only UAPI headers, no CO-RE, no .rodata: no string literals, no initialisers of structures (libbpf fails on .rodata
 * on 5.4 and on WSL 2's 5.10). Bounded loops and the size of the programs need 5.3.
 */
#ifndef REGISTRY_ENFORCER_BUILD_H
#define REGISTRY_ENFORCER_BUILD_H

#ifdef BPF_TABLE
#define BUILT_BY_BCC
#endif

#ifdef BUILT_BY_BCC

#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/pkt_cls.h>
#include <uapi/linux/if_ether.h>

/* The kernel compares the text: with blanks in it, helpers for GPL programs are refused. */
/* clang-format off */
#define BPF_LICENSE Dual BSD/GPL
/* clang-format on */
#define PROGRAM(section)

#define ARRAY_MAP(name, value, entries)	       BPF_TABLE("array", __u32, value, name, entries)
#define PERCPU_ARRAY_MAP(name, value, entries) BPF_TABLE("percpu_array", __u32, value, name, entries)
#define HASH_MAP(name, key, value, entries)    BPF_TABLE("hash", key, value, name, entries)
#define LRU_MAP(name, key, value, entries)     BPF_TABLE("lru_hash", key, value, name, entries)
#define LPM_MAP(name, key, value, entries)     BPF_LPM_TRIE(name, key, value, entries)
#ifdef LEGACY_KERNEL
#define EVENT_MAP(name, bytes) BPF_PERF_OUTPUT(name)
#else
#define EVENT_MAP(name, bytes) BPF_RINGBUF_OUTPUT(name, (bytes) / 4096)
#endif

#else /* libbpf */

#include <linux/types.h>
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/pkt_cls.h>
#include <linux/if_ether.h>
#include <bpf/bpf_helpers.h>

#define PROGRAM(section) SEC(section)

#define KEYED_MAP(map_type, name, map_key, map_value, entries, flags)                                                  \
	struct {                                                                                                       \
		__uint(type, map_type);                                                                                \
		__type(key, map_key);                                                                                  \
		__type(value, map_value);                                                                              \
		__uint(max_entries, entries);                                                                          \
		__uint(map_flags, flags);                                                                              \
	} name SEC(".maps")

#define ARRAY_MAP(name, value, entries)	       KEYED_MAP(BPF_MAP_TYPE_ARRAY, name, __u32, value, entries, 0)
#define PERCPU_ARRAY_MAP(name, value, entries) KEYED_MAP(BPF_MAP_TYPE_PERCPU_ARRAY, name, __u32, value, entries, 0)
#define HASH_MAP(name, key, value, entries)    KEYED_MAP(BPF_MAP_TYPE_HASH, name, key, value, entries, 0)
#define LRU_MAP(name, key, value, entries)     KEYED_MAP(BPF_MAP_TYPE_LRU_HASH, name, key, value, entries, 0)
#define LPM_MAP(name, key, value, entries)                                                                             \
	KEYED_MAP(BPF_MAP_TYPE_LPM_TRIE, name, key, value, entries, BPF_F_NO_PREALLOC)
#ifdef LEGACY_KERNEL
#define EVENT_MAP(name, bytes)                                                                                         \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);                                                           \
		__uint(key_size, sizeof(__u32));                                                                       \
		__uint(value_size, sizeof(__u32));                                                                     \
	} name SEC(".maps")
#else
#define EVENT_MAP(name, bytes)                                                                                         \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_RINGBUF);                                                                    \
		__uint(max_entries, bytes);                                                                            \
	} name SEC(".maps")
#endif

char _license[] SEC("license") = "Dual BSD/GPL";

#endif /* libbpf */

#ifdef LEGACY_KERNEL
#define now_ns() bpf_ktime_get_ns() /* CLOCK_MONOTONIC */
#else
#define now_ns() bpf_ktime_get_boot_ns() /* CLOCK_BOOTTIME: goes on while the host sleeps, as a TTL does; 5.8 */
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "names are reversed by the byte order of words"
#endif
#define NETWORK_16(x) __builtin_bswap16(x)
#define NETWORK_32(x) __builtin_bswap32(x)
#define NETWORK_64(x) __builtin_bswap64(x)

#define INLINE static __inline __attribute__((always_inline))

/* What the compiler wrote to memory it reads again: the verifier then knows a range, not one value for each path. */
#define FORGET() asm volatile("" ::: "memory")

/* The key that a word of the stack holds. The verifier knows the stack by words: where one is written in part, what was
 * there before counts as read later, and each path that left something else there is followed to the end. */
#define KEY_32(word) ((__u32 *)(word))

/* `value & mask` where the compiler, which knows better, would leave it out; the verifier needs to see it. */
#define MASKED(value, mask)                                                                                            \
	({                                                                                                             \
		__u64 masked_ = (value);                                                                               \
		asm volatile("%0 &= %1" : "+r"(masked_) : "i"(mask));                                                  \
		masked_;                                                                                               \
	})

#endif
