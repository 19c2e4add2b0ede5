// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * fintrace's kernel side. One program sees every TCP state change and sends a
 * record for those that concern FIN_WAIT2; one iterator lists what is there.
 * What the fields mean to the rest of the program is decided in Go.
 */
#include "../vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

enum {
	AF_INET = 2,
	AF_INET6 = 10,
	IPPROTO_TCP = 6,
	TCP_TIMEWAIT_SECONDS = 60, /* TCP_TIMEWAIT_LEN, include/net/tcp.h */
	COMM_LEN = 16,
	CLOSERS = 1 << 15,
};

struct config {
	__u32 hz;	      /* jiffies per second */
	__u8 all_states;      /* send every transition, not only FIN_WAIT2's */
	__u8 report_instants; /* send connections that left as they entered */
	__u8 before_5_12;     /* tracing programs have no socket cookie */
	__u8 padding;
};

volatile const struct config config;

/* One transition of one TCP socket. */
struct event {
	__u64 time;	   /* ns, CLOCK_BOOTTIME */
	__u64 cookie;	   /* the socket's, unique on the host until reboot; 0: before 5.12 */
	__u64 cgroup;	   /* cgroup2 id of the process below */
	__u32 netns;	   /* inode of the network namespace */
	__u32 pid;	   /* thread group that sent our FIN or closed; 0: unknown */
	__u32 fin_timeout; /* jiffies, net.ipv4.tcp_fin_timeout of the namespace */
	__s32 linger2;	   /* jiffies, TCP_LINGER2; 0: unset, < 0: abort */
	__u32 rto;	   /* jiffies */
	__u32 device;	   /* index of the interface it is bound to; 0: none */
	__u16 err;	   /* sk_err */
	__u16 local_port;  /* host byte order */
	__u16 remote_port; /* host byte order */
	__u8 old_state;
	__u8 new_state;
	__u8 shutdown; /* sk_shutdown: 1 receive, 2 send */
	__u8 dead;     /* SOCK_DEAD: no process has it any more */
	__u8 done;     /* SOCK_DONE: the peer's FIN has arrived */
	__u8 accepted; /* descends from a listener */
	__u8 local[16];
	__u8 remote[16];	  /* IPv4 as v4-mapped */
	__u64 comm[COMM_LEN / 8]; /* bytes, NUL-padded */
};

/* One socket as the iterator finds it: a listener, FIN_WAIT2, or a minisock. */
struct row {
	__u64 time;   /* ns, CLOCK_BOOTTIME, when it was read */
	__u64 cookie; /* forced, so that later events carry it too; 0: before 5.12 */
	__u64 inode;  /* of a held socket, for /proc/PID/fd */
	__u32 netns;
	__u32 fin_timeout; /* jiffies */
	__s32 linger2;	   /* jiffies */
	__u32 rto;	   /* jiffies */
	__u32 last_ack;	   /* jiffies since the peer last acknowledged */
	__u32 entry;	   /* ms since the minisock's entry stamp */
	__s32 timer;	   /* jiffies until the timer that ends this stage */
	__u32 device;	   /* index of the interface it is bound to; 0: none */
	__u16 local_port;
	__u16 remote_port;
	__u8 state; /* TCP_LISTEN, TCP_FIN_WAIT2 or TCP_TIME_WAIT */
	__u8 minisock;
	__u8 dead;
	__u8 accepted;
	__u8 has_timer;
	__u8 has_entry;
	__u8 padding[6];
	__u8 local[16];
	__u8 remote[16];
};

/*
 * Who sent our FIN, kept from FIN_WAIT1 (process context) until FIN_WAIT2
 * (softirq, where the current task is a bystander). A slot of an array, found
 * by the socket's hash: a hash table costs several times as much here. Others
 * may take its slots meanwhile, then the closer is unknown, never wrong.
 */
struct closer {
	__u64 sk; /* address of the struct sock, compared only */
	__u64 check;
	__u64 cgroup;
	__u64 comm[COMM_LEN / 8];
	__u32 pid;
	__u32 padding[5]; /* to a cache line */
};

struct counters {
	__u64 lost;	/* records the ring buffer had no room for */
	__u64 instants; /* left FIN_WAIT2 as they entered, not sent */
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20);
	__type(value, struct event);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CLOSERS);
	__uint(map_flags, BPF_F_MMAPABLE); /* for its alignment: a slot is one cache line */
	__type(key, __u32);
	__type(value, struct closer);
} closers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} counts SEC(".maps");

/* Of the TIME_WAIT minisocks the iterator shows only those that are so since later than this. */
__u64 time_wait_since; /* ns of the boot clock */

/*
 * The socket's cookie, which it has from then on. The verifier knows the
 * configuration: of what follows from it, the other branch costs nothing, and
 * may call what the kernel does not have.
 */
static __always_inline __u64 cookie_of(void *sk)
{
	return config.before_5_12 ? 0 : bpf_get_socket_cookie(sk);
}

static __always_inline __u64 checksum(const struct closer *c)
{
	return c->cgroup ^ c->comm[0] ^ c->comm[1] ^ c->pid;
}

/* Writes the current process into c. */
static __always_inline void read_closer(struct closer *c, const struct sock *sk)
{
	c->cgroup = bpf_get_current_cgroup_id();
	c->pid = bpf_get_current_pid_tgid() >> 32;
	/* The process's name; a thread's own says nothing to an operator. */
	if (config.before_5_12) {
		struct task_struct *task = (void *)bpf_get_current_task();

		BPF_CORE_READ_INTO(&c->comm, task, group_leader, comm);
	} else {
		const __u64 *comm = (const void *)bpf_get_current_task_btf()->group_leader->comm;

		c->comm[0] = comm[0];
		c->comm[1] = comm[1];
	}
	c->check = checksum(c);
	c->sk = (__u64)sk;
}

/* A socket has two slots to choose from. */
static __always_inline struct closer *closer_slot(const struct sock *sk, __u32 way)
{
	__u32 slot = (sk->__sk_common.skc_hash % CLOSERS) ^ way;

	return bpf_map_lookup_elem(&closers, &slot);
}

/* Notes the current process as the closer of sk. */
static __always_inline void note_closer(const struct sock *sk)
{
	struct closer *slot = closer_slot(sk, 0), *other;

	if (slot && slot->sk && slot->sk != (__u64)sk) {
		other = closer_slot(sk, 1);
		if (other && !other->sk)
			slot = other;
	}
	if (slot)
		read_closer(slot, sk);
}

/* Frees the slot of sk, having copied it. The checksum catches two CPUs in one slot. */
static __always_inline bool take_closer(struct closer *c, const struct sock *sk)
{
	struct closer *slot = closer_slot(sk, 0);

	if (slot && slot->sk != (__u64)sk)
		slot = closer_slot(sk, 1);
	if (!slot || slot->sk != (__u64)sk)
		return false;
	*c = *slot;
	slot->sk = 0;
	return c->check == checksum(c);
}

static __always_inline void read_addresses(const struct sock_common *skc, __u8 *local, __u8 *remote)
{
	__u32 *l = (__u32 *)local, *r = (__u32 *)remote;

	if (skc->skc_family == AF_INET6) {
		for (int i = 0; i < 4; i++) {
			l[i] = skc->skc_v6_rcv_saddr.in6_u.u6_addr32[i];
			r[i] = skc->skc_v6_daddr.in6_u.u6_addr32[i];
		}
		return;
	}
	l[0] = l[1] = r[0] = r[1] = 0;
	l[2] = r[2] = bpf_htonl(0xffff);
	l[3] = skc->skc_rcv_saddr;
	r[3] = skc->skc_daddr;
}

static __always_inline void count(__u64 offset)
{
	__u32 zero = 0;
	struct counters *c = bpf_map_lookup_elem(&counts, &zero);

	if (c)
		(*(__u64 *)((void *)c + offset))++;
}

/* tcp_fin_time(), include/net/tcp.h: how long the kernel lets FIN_WAIT2 last, in jiffies. */
static __always_inline __s32 fin_time(const struct tcp_sock *tp, const struct net *net)
{
	__s32 timeout = tp->linger2 ?: net->ipv4.sysctl_tcp_fin_timeout;
	__s32 rto = tp->inet_conn.icsk_rto;
	__s32 floor = (rto << 2) - (rto >> 1);

	return timeout < floor ? floor : timeout;
}

static __always_inline bool is_dead(const struct sock *sk)
{
	return sk->__sk_common.skc_flags & (1 << SOCK_DEAD);
}

static __always_inline bool is_done(const struct sock *sk)
{
	return sk->__sk_common.skc_flags & (1 << SOCK_DONE);
}

static __always_inline void send(struct sock *sk, const struct tcp_sock *tp, int old_state,
				 int new_state, const struct closer *who)
{
	const struct net *net = sk->__sk_common.skc_net.net;
	struct event *e = bpf_ringbuf_reserve(&ring, sizeof(*e), 0);

	if (!e) {
		count(offsetof(struct counters, lost));
		return;
	}
	e->time = bpf_ktime_get_boot_ns();
	e->cookie = cookie_of(sk);
	e->netns = net->ns.inum;
	e->fin_timeout = net->ipv4.sysctl_tcp_fin_timeout;
	e->linger2 = tp->linger2;
	e->rto = tp->inet_conn.icsk_rto;
	e->device = sk->__sk_common.skc_bound_dev_if;
	e->err = sk->sk_err;
	/* skc_num is 0 by the time of CLOSE; the header's port stays. */
	e->local_port = bpf_ntohs(tp->inet_conn.icsk_inet.inet_sport);
	e->remote_port = bpf_ntohs(sk->__sk_common.skc_dport);
	e->old_state = old_state;
	e->new_state = new_state;
	e->shutdown = sk->sk_shutdown;
	e->dead = is_dead(sk);
	e->done = is_done(sk);
	e->accepted = sk->sk_max_ack_backlog != 0;
	read_addresses(&sk->__sk_common, e->local, e->remote);
	if (who) {
		e->cgroup = who->cgroup;
		e->pid = who->pid;
		e->comm[0] = who->comm[0];
		e->comm[1] = who->comm[1];
	} else {
		e->cgroup = 0;
		e->pid = 0;
		e->comm[0] = e->comm[1] = 0;
	}
	bpf_ringbuf_submit(e, 0);
}

/* The changes that only a system call makes, so that the current task is the one who did it. */
static __always_inline bool in_process_context(int old_state, int new_state)
{
	return new_state == TCP_FIN_WAIT1 || new_state == TCP_LAST_ACK ||
	       new_state == TCP_SYN_SENT || new_state == TCP_LISTEN ||
	       (old_state == TCP_FIN_WAIT2 && new_state == TCP_FIN_WAIT2);
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(on_set_state, struct sock *sk, int old_state, int new_state)
{
	struct closer who;
	struct tcp_sock *tp;
	bool known = false;

	if (!config.all_states && new_state != TCP_FIN_WAIT1 && old_state != TCP_FIN_WAIT1 &&
	    old_state != TCP_FIN_WAIT2)
		return 0;
	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;

	if (new_state == TCP_FIN_WAIT1) {
		note_closer(sk);
		if (!config.all_states)
			return 0;
	} else if (old_state == TCP_FIN_WAIT1 && new_state != TCP_FIN_WAIT2) {
		take_closer(&who, sk);
		if (!config.all_states)
			return 0;
	}

	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 0;

	if (in_process_context(old_state, new_state)) {
		read_closer(&who, sk);
		known = true;
	} else if (new_state == TCP_FIN_WAIT2) {
		/*
		 * Closed, and with no more to wait for than a minisock can:
		 * the handover, or the peer's FIN in this very segment, follows
		 * within microseconds and one record says it all. Except that a
		 * socket which a process owns meanwhile, in the last steps of
		 * close(), may stay an orphan for all of its time.
		 */
		if (!config.all_states && is_dead(sk) && !sk->sk_lock.owned &&
		    fin_time(tp, sk->__sk_common.skc_net.net) <=
			    (__s32)config.hz * TCP_TIMEWAIT_SECONDS) {
			/* Now, for the minisock to take it over. */
			cookie_of(sk);
			return 0;
		}
		known = take_closer(&who, sk);
	} else if (old_state == TCP_FIN_WAIT2) {
		/* The closer is still noted only if the entry was not sent. */
		known = take_closer(&who, sk);
		if (known && is_done(sk) && !config.report_instants) {
			count(offsetof(struct counters, instants));
			return 0;
		}
	}
	send(sk, tp, old_state, new_state, known ? &who : NULL);
	return 0;
}

/* A function of its own so that the type of its argument reaches the object's BTF, and Go. */
static __noinline void write_row(struct seq_file *seq, struct row *r)
{
	bpf_seq_write(seq, r, sizeof(*r));
}

SEC("iter/tcp")
int snapshot(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct inet_timewait_sock *tw = (void *)skc;
	struct net *net;
	__s32 timer = 0;
	struct row r;
	__u8 state;

	if (!skc)
		return 0;
	state = skc->skc_state;
	if (state != TCP_FIN_WAIT2 && state != TCP_TIME_WAIT && state != TCP_LISTEN)
		return 0;
	if (state == TCP_TIME_WAIT) {
		/*
		 * Read by CO-RE: bpf_skc_to_tcp_timewait_sock() does not know
		 * the minisocks of connections accepted on an MPTCP listener.
		 */
		state = BPF_CORE_READ(tw, tw_substate);
		/* One in TIME_WAIT is of interest only as the end of a FIN_WAIT2 that was sent. */
		if (state == TCP_TIME_WAIT && !skc->skc_cookie.counter && !config.before_5_12)
			return 0;
		timer = (long)(BPF_CORE_READ(tw, tw_timer.expires) - bpf_jiffies64());
		if (state == TCP_TIME_WAIT &&
		    (TCP_TIMEWAIT_SECONDS * (__s32)config.hz - timer) * 1000000000LL >
			    (__s64)(bpf_ktime_get_boot_ns() - time_wait_since) * config.hz)
			return 0;
	}

	__builtin_memset(&r, 0, sizeof(r));
	r.state = state;
	if (skc->skc_state == TCP_TIME_WAIT) {
		r.minisock = 1;
		r.has_timer = 1;
		r.timer = timer;
		if (bpf_core_field_exists(tw->tw_entry_stamp)) {
			r.has_entry = 1;
			r.entry = (__u32)(bpf_ktime_get_ns() / 1000000) -
				  BPF_CORE_READ(tw, tw_entry_stamp);
		}
	} else if (r.state == TCP_FIN_WAIT2) {
		struct tcp_sock *tp = bpf_skc_to_tcp_sock(skc);
		struct sock *sk = (struct sock *)tp;

		if (!tp)
			return 0;
		r.dead = is_dead(sk);
		r.accepted = sk->sk_max_ack_backlog != 0;
		r.linger2 = tp->linger2;
		r.rto = tp->inet_conn.icsk_rto;
		r.last_ack = (__u32)bpf_jiffies64() - tp->rcv_tstamp;
		r.has_timer = r.dead && sk->sk_timer.entry.pprev;
		if (r.has_timer)
			r.timer = (long)(sk->sk_timer.expires - bpf_jiffies64());
		if (sk->sk_socket)
			r.inode = BPF_CORE_READ((struct socket_alloc *)sk->sk_socket,
						vfs_inode.i_ino);
	}

	net = skc->skc_net.net;
	r.time = bpf_ktime_get_boot_ns();
	r.cookie = cookie_of(skc);
	r.netns = net->ns.inum;
	r.fin_timeout = net->ipv4.sysctl_tcp_fin_timeout;
	r.device = skc->skc_bound_dev_if;
	r.local_port = skc->skc_num;
	r.remote_port = bpf_ntohs(skc->skc_dport);
	read_addresses(skc, r.local, r.remote);
	write_row(ctx->meta->seq, &r);
	return 0;
}

/* bpf_seq_write() and the kernel's BTF are for GPL-compatible programs. */
char _license[] SEC("license") = "Dual BSD/GPL";
