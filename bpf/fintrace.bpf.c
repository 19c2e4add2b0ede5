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
	HEIRS = 1 << 16,
	HEIRS_SPAN = 512, /* cookies of a part of them */
	HEIRS_PART = 504,
	TURNS = 10,		/* of the allowance, a second */
	SOCKET_BYTES = 1 << 11, /* no more than a struct tcp_sock has */
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
	__u8 padding[2];
	__u32 pid;	/* of a minisock whose handover was not sent: as in the event */
	__u64 handover; /* ns, CLOCK_BOOTTIME, the time of that; 0: there was none */
	__u64 cgroup;
	__u64 comm[COMM_LEN / 8];
	__u8 local[16];
	__u8 remote[16];
};

/*
 * Who sent our FIN, kept from FIN_WAIT1 (process context) until FIN_WAIT2
 * (softirq, where the current task is a bystander). A slot of an array, found
 * by the socket's address and written unseen: a hash table costs several times
 * as much here, and so does waiting for what the slot had. Another socket may
 * take it meanwhile, then the closer is unknown, never wrong.
 */
struct closer {
	__u64 socket; /* see identify() */
	__u64 check;
	__u64 cgroup;
	__u64 comm[COMM_LEN / 8];
	__u32 pid;
	__u32 padding[5]; /* to a cache line */
};

/*
 * A handover that was not sent, for whoever finds the minisock to know of it
 * what the record would have said. Found by the cookie; it may have been
 * overwritten by then.
 */
struct heir {
	__u64 cookie;
	__u64 check;
	__u64 time; /* ns, CLOCK_BOOTTIME; 0: the minisock has it, in ms */
	__u64 cgroup;
	__u64 comm[COMM_LEN / 8];
	__u32 pid;
	__s32 linger2; /* jiffies */
	__u32 rto;     /* jiffies */
	__u32 accepted;
};

/*
 * What each CPU has for itself. No other change of state is looked at meanwhile:
 * the kernel skips those that interrupt the program.
 */
struct cpu {
	__u64 lost;	   /* records the ring buffer had no room for */
	__u64 instants;	   /* left FIN_WAIT2 as they entered, not sent */
	__u64 unsent;	   /* handovers kept as heirs and not sent */
	__u64 sent;	   /* records */
	__u64 entered;	   /* the last socket whose entry was not sent: see identify() */
	__u64 turn;	   /* jiffies, when the last turn of the allowance began */
	__u32 allowed;	   /* handovers to send in it yet */
	__u32 hz;	   /* as in the config; 0: not known yet */
	__u64 set;	   /* address of the css_set whose cgroup was read last */
	__u64 read;	   /* jiffies, when that was */
	__u64 cgroup;	   /* its id */
	struct closer who; /* of the change that is looked at */
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
	__type(value, struct event);
} ring SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CLOSERS);
	__uint(map_flags, BPF_F_MMAPABLE); /* for its alignment: a slot is one cache line */
	__type(key, __u32);
	__type(value, struct closer);
} closers SEC(".maps");

/*
 * In parts of just less than 32 KiB, which the kernel takes from its linear
 * mapping: a page of a large array has to be looked up in the page tables first,
 * and on a virtual machine that takes several times as long as to write the heir.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, HEIRS / HEIRS_SPAN);
	__type(key, __u32);
	__array(
		values, struct {
			__uint(type, BPF_MAP_TYPE_ARRAY);
			__uint(max_entries, HEIRS_PART);
			__type(key, __u32);
			__uint(value_size, sizeof(struct heir));
		});
} heirs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cpu);
} cpus SEC(".maps");

/* Of the TIME_WAIT minisocks the iterator shows only those that are so since later than this. */
__u64 time_wait_since; /* ns of the boot clock */

/* How many handovers a CPU sends in each turn that begins from now on. */
__u32 allowance;

/*
 * Most often nothing is configured: that is a program of its own, with constants
 * for the configuration, whose page it would else have to look up each time. What
 * else is configured the verifier knows: the branch that is not taken may call
 * what the kernel does not have.
 */
enum mode {
	USUAL,
	CONFIGURED,
};

static __always_inline bool all_states(enum mode mode)
{
	return mode == CONFIGURED && config.all_states;
}

static __always_inline bool report_instants(enum mode mode)
{
	return mode == CONFIGURED && config.report_instants;
}

static __always_inline bool before_5_12(enum mode mode)
{
	return mode == CONFIGURED && config.before_5_12;
}

/* The socket's cookie, which it has from then on. */
static __always_inline __u64 cookie_of(void *sk, enum mode mode)
{
	return before_5_12(mode) ? 0 : bpf_get_socket_cookie(sk);
}

static __always_inline struct cpu *this_cpu(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&cpus, &zero);
}

static __always_inline __u64 checksum(__u64 socket, __u64 cgroup, const __u64 *comm, __u32 pid)
{
	return socket ^ cgroup ^ comm[0] ^ comm[1] ^ pid;
}

/*
 * The cgroup2 id of a task. The way to it, over three objects, is two thirds of what a
 * closer costs. It is that of the same css_set a moment ago: whose memory has no other
 * css_set before an RCU grace period is over (put_css_set_locked(), kernel/cgroup/cgroup.c),
 * and that takes longer than a jiffy.
 */
static __always_inline __u64 cgroup_of(const struct task_struct *task, struct cpu *here)
{
	const struct css_set *set = task->cgroups;
	__u64 now = bpf_jiffies64();

	if (here->set != (__u64)set || here->read != now) {
		here->set = (__u64)set;
		here->read = now;
		here->cgroup = set->dfl_cgrp->kn->id;
	}
	return here->cgroup;
}

/* Writes the current process into c, as another CPU may do at the same time. */
static __always_inline void read_closer(struct closer *c, __u64 socket, struct cpu *here,
					enum mode mode)
{
	__u64 comm[COMM_LEN / 8], cgroup;
	__u32 pid;

	/* The process's name; a thread's own says nothing to an operator. */
	if (before_5_12(mode)) {
		struct task_struct *task = (void *)bpf_get_current_task();

		cgroup = bpf_get_current_cgroup_id();
		pid = bpf_get_current_pid_tgid() >> 32;
		BPF_CORE_READ_INTO(&comm, task, group_leader, comm);
	} else {
		/* Its own loads cost less than calls of helpers. */
		const struct task_struct *task = bpf_get_current_task_btf();
		const __u64 *name = (const void *)task->group_leader->comm;

		cgroup = cgroup_of(task, here);
		pid = task->tgid;
		comm[0] = name[0];
		comm[1] = name[1];
	}
	c->socket = socket;
	c->check = checksum(socket, cgroup, comm, pid);
	c->cgroup = cgroup;
	c->comm[0] = comm[0];
	c->comm[1] = comm[1];
	c->pid = pid;
}

/*
 * The lower half of an address. Of a pointer's bits the verifier lets a program
 * see the 32-bit difference alone (adjust_ptr_min_max_vals(), kernel/bpf/verifier.c).
 */
static __always_inline __u32 low_half(const void *pointer)
{
	__u32 half;

	asm("r0 = %1; w0 -= 0; %0 = r0" : "=r"(half) : "r"(pointer) : "r0");
	return half;
}

/* Tells a socket from others that have had its memory: by its hash, of both ends. */
static __always_inline __u64 identify(const struct sock *sk)
{
	return (__u64)low_half(sk) << 32 | sk->__sk_common.skc_hash;
}

/*
 * By the address: memory that is used again, the most recent first, has a slot
 * that is still in the caches.
 */
static __always_inline struct closer *closer_slot(const struct sock *sk)
{
	__u32 slot = low_half(sk) / SOCKET_BYTES % CLOSERS;

	return bpf_map_lookup_elem(&closers, &slot);
}

/* Notes the current process as the closer of sk. */
static __always_inline void note_closer(const struct sock *sk, struct cpu *here, enum mode mode)
{
	struct closer *slot = closer_slot(sk);

	if (slot)
		read_closer(slot, identify(sk), here, mode);
}

/* Frees the slot of sk, having copied it. The checksum catches two CPUs in one slot. */
static __always_inline bool take_closer(struct closer *c, const struct sock *sk)
{
	struct closer *slot = closer_slot(sk);
	__u64 check;

	if (!slot || slot->socket != identify(sk))
		return false;
	c->cgroup = slot->cgroup;
	c->comm[0] = slot->comm[0];
	c->comm[1] = slot->comm[1];
	c->pid = slot->pid;
	check = slot->check;
	slot->socket = 0;
	return check == checksum(identify(sk), c->cgroup, c->comm, c->pid);
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

/*
 * The namespace of a socket. Of a pointer that comes from a helper: what comes of an
 * argument of the tracepoint the verifier takes milliseconds to look up, by name
 * (btf_nested_type_is_trusted(), kernel/bpf/verifier.c).
 */
static __always_inline const struct net *net_of(const struct tcp_sock *tp)
{
	return ((const struct sock *)tp)->__sk_common.skc_net.net;
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

enum {
	FORCE_WAKEUP = 1 << 1, /* BPF_RB_FORCE_WAKEUP, include/uapi/linux/bpf.h */
	WAKE_EVERY = 512,      /* records of a CPU: of 50 they fill less than the ring buffer */
};

/*
 * A function of its own: see changed(). A reader who waits for more records is woken
 * in time to lose none.
 */
static __noinline int send(struct sock *sk, struct tcp_sock *tp, int old_state, int new_state,
			   const struct closer *who)
{
	const struct net *net;
	struct cpu *here = this_cpu();
	struct event *e;

	if (!here)
		return 0;
	e = bpf_ringbuf_reserve(&ring, sizeof(*e), 0);
	if (!e) {
		here->lost++;
		return 0;
	}
	net = net_of(tp);
	e->time = bpf_ktime_get_boot_ns();
	e->cookie = cookie_of(sk, CONFIGURED);
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
	here->sent++;
	bpf_ringbuf_submit(e, here->sent % WAKE_EVERY ? 0 : FORCE_WAKEUP);
	return 0;
}

/* The changes that only a system call makes, so that the current task is the one who did it. */
static __always_inline bool in_process_context(int old_state, int new_state, enum mode mode)
{
	if (mode == USUAL) /* To FIN_WAIT2 or from it: from it to it. */
		return old_state == new_state;
	return new_state == TCP_FIN_WAIT1 || new_state == TCP_LAST_ACK ||
	       new_state == TCP_SYN_SENT || new_state == TCP_LISTEN ||
	       (old_state == TCP_FIN_WAIT2 && new_state == TCP_FIN_WAIT2);
}

/* Jiffies per second, from a page that is needed anyway. */
static __always_inline __u32 hz(struct cpu *here)
{
	if (!here->hz)
		here->hz = config.hz;
	return here->hz;
}

/* Whether there is room in the allowance for one more handover. */
static __always_inline bool allowed(struct cpu *here)
{
	__u64 now = bpf_jiffies64();

	if (now - here->turn >= hz(here) / TURNS) {
		here->turn = now;
		here->allowed = allowance;
	}
	if (!here->allowed)
		return false;
	here->allowed--;
	return true;
}

/* Whether minisocks carry the time of the packet that made them. */
static __always_inline bool has_entry_stamps(void)
{
	return bpf_core_field_exists(((struct inet_timewait_sock *)0)->tw_entry_stamp);
}

/* Some cookies have no place. */
static __always_inline struct heir *heir_slot(__u64 cookie)
{
	__u32 part = cookie / HEIRS_SPAN % (HEIRS / HEIRS_SPAN), slot = cookie % HEIRS_SPAN;
	void *heirs_part = bpf_map_lookup_elem(&heirs, &part);

	return heirs_part ? bpf_map_lookup_elem(heirs_part, &slot) : NULL;
}

/* Never that of a slot full of zeros. */
static __always_inline __u64 heir_checksum(const struct heir *h)
{
	return ~(h->cookie ^ h->time ^ h->cgroup ^ h->comm[0] ^ h->comm[1] ^ h->pid);
}

/* Keeps what the record of a handover would say, if there is a place for it. */
static __always_inline bool bequeath(const struct sock *sk, const struct tcp_sock *tp,
				     const struct closer *who)
{
	__u64 cookie = sk->__sk_common.skc_cookie.counter; /* since its entry */
	struct heir *h = heir_slot(cookie);

	if (!h)
		return false;
	h->cookie = cookie;
	/* To read the clock takes as long as all of this. */
	h->time = has_entry_stamps() ? 0 : bpf_ktime_get_boot_ns();
	h->cgroup = who->cgroup;
	h->comm[0] = who->comm[0];
	h->comm[1] = who->comm[1];
	h->pid = who->pid;
	h->linger2 = tp->linger2;
	h->rto = tp->inet_conn.icsk_rto;
	h->accepted = sk->sk_max_ack_backlog != 0;
	h->check = heir_checksum(h);
	return true;
}

/*
 * From 64 bytes on the kernel gives each function of a program a stack that
 * nothing else uses (BPF_PRIV_STACK_MIN_SIZE, kernel/bpf/verifier.c), on a page to
 * be looked up each time: so what is long is in struct cpu, or another function's.
 */
static __always_inline int changed(struct sock *sk, int old_state, int new_state, enum mode mode)
{
	struct tcp_sock *tp;
	struct cpu *here = this_cpu();
	bool known = false;

	if (!here)
		return 0;
	if (new_state == TCP_FIN_WAIT1) {
		note_closer(sk, here, mode);
		if (!all_states(mode))
			return 0;
	}
	/* A healthy close: the peer's FIN was in the segment that brought it to FIN_WAIT2. */
	if (old_state == TCP_FIN_WAIT2 && is_done(sk) && !report_instants(mode) &&
	    here->entered == identify(sk)) {
		here->instants++;
		return 0;
	}
	here->entered = 0;

	/* None of another protocol's sockets goes further. */
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 0;

	if (in_process_context(old_state, new_state, mode)) {
		read_closer(&here->who, 0, here, mode);
		known = true;
	} else if (new_state == TCP_FIN_WAIT2) {
		/*
		 * Closed, and with no more to wait for than a minisock can:
		 * the handover, or the peer's FIN in this very segment, follows
		 * within microseconds and one record says it all. Except that a
		 * socket which a process owns meanwhile, in the last steps of
		 * close(), may stay an orphan for all of its time.
		 */
		if (!all_states(mode) && is_dead(sk) && !sk->sk_lock.owned &&
		    fin_time(tp, net_of(tp)) <= (__s32)hz(here) * TCP_TIMEWAIT_SECONDS) {
			/* Now, for the minisock to take it over. */
			cookie_of(sk, mode);
			here->entered = identify(sk);
			return 0;
		}
		known = take_closer(&here->who, sk);
	} else if (old_state == TCP_FIN_WAIT2) {
		/* The closer is still noted only if the entry was not sent. */
		known = take_closer(&here->who, sk);
		if (known && is_done(sk) && !report_instants(mode)) {
			here->instants++; /* on another CPU */
			return 0;
		}
		/* Where they are very many, the next look finds those that stay. */
		if (known && !before_5_12(mode) && !is_done(sk) && is_dead(sk) && !sk->sk_err &&
		    tp->linger2 >= 0 && !allowed(here) && bequeath(sk, tp, &here->who)) {
			here->unsent++;
			return 0;
		}
	}
	return send(sk, tp, old_state, new_state, known ? &here->who : NULL);
}

static __noinline int usual_change(struct sock *sk, int old_state, int new_state)
{
	return changed(sk, old_state, new_state, USUAL);
}

/*
 * Most changes end here: they do not concern FIN_WAIT2. One branch, and as few
 * instructions as go: most of what they cost is that they are in no cache. A factor
 * is 0 from FIN_WAIT2, the other to FIN_WAIT1 (4) and FIN_WAIT2 (5).
 */
SEC("tp_btf/inet_sock_set_state")
int on_set_state(const __u64 *ctx)
{
	__u64 old_state = ctx[1], new_state = ctx[2];

	if ((old_state ^ TCP_FIN_WAIT2) * ((new_state | 1) ^ TCP_FIN_WAIT2))
		return 0;
	return usual_change((struct sock *)ctx[0], old_state, new_state);
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(on_set_state_configured, struct sock *sk, int old_state, int new_state)
{
	if (!config.all_states && new_state != TCP_FIN_WAIT1 && new_state != TCP_FIN_WAIT2 &&
	    old_state != TCP_FIN_WAIT2)
		return 0;
	return changed(sk, old_state, new_state, CONFIGURED);
}

/* What of a minisock is of interest. */
struct minisock {
	__u8 substate; /* TCP_FIN_WAIT2 or TCP_TIME_WAIT */
	bool has_entry;
	__u32 entry; /* ms since the entry stamp */
	__s32 timer; /* jiffies */
};

/* The kernel's clocks at one moment. */
struct now {
	__u64 boot; /* ns */
	__u64 jiffies;
	__u32 ms; /* of the monotonic clock, which entry stamps are of */
};

static __always_inline void read_clocks(struct now *now)
{
	now->boot = bpf_ktime_get_boot_ns();
	now->jiffies = bpf_jiffies64();
	now->ms = bpf_ktime_get_ns() / 1000000;
}

/* Fills what all rows have. */
static __always_inline void describe(struct row *r, const struct sock_common *skc, __u64 cookie,
				     const struct now *now)
{
	const struct net *net = skc->skc_net.net;

	r->time = now->boot;
	r->cookie = cookie;
	r->netns = net->ns.inum;
	r->fin_timeout = net->ipv4.sysctl_tcp_fin_timeout;
	r->device = skc->skc_bound_dev_if;
	r->local_port = skc->skc_num;
	r->remote_port = bpf_ntohs(skc->skc_dport);
	read_addresses(skc, r->local, r->remote);
}

/* Fills what is known of a minisock's handover, if that was not sent: after all else of the row. */
static __always_inline void describe_heir(struct row *r)
{
	const struct heir *there = heir_slot(r->cookie);
	struct heir h;

	if (!there)
		return;
	h = *there;
	if (h.cookie != r->cookie || h.check != heir_checksum(&h))
		return;
	r->handover = h.time ?: r->time - r->entry * 1000000ULL;
	r->cgroup = h.cgroup;
	r->comm[0] = h.comm[0];
	r->comm[1] = h.comm[1];
	r->pid = h.pid;
	r->linger2 = h.linger2;
	r->rto = h.rto;
	r->accepted = h.accepted;
}

static __always_inline void describe_minisock(struct row *r, const struct minisock *m)
{
	r->state = m->substate;
	r->minisock = 1;
	r->has_timer = 1;
	r->timer = m->timer;
	r->has_entry = m->has_entry;
	r->entry = m->entry;
}

static __always_inline void describe_timer(struct row *r, const struct timer_list *timer,
					   const struct now *now)
{
	r->has_timer = r->dead && timer->entry.pprev;
	if (r->has_timer)
		r->timer = (long)(timer->expires - now->jiffies);
}

static __always_inline void describe_full(struct row *r, const struct tcp_sock *tp,
					  const struct now *now)
{
	const struct sock *sk = (const struct sock *)tp;

	r->state = TCP_FIN_WAIT2;
	r->dead = is_dead(sk);
	r->accepted = sk->sk_max_ack_backlog != 0;
	r->linger2 = tp->linger2;
	r->rto = tp->inet_conn.icsk_rto;
	r->last_ack = (__u32)now->jiffies - tp->rcv_tstamp;
	/* Where it has a place of its own (7.3 does), sk_timer is the one for retransmissions. */
	if (bpf_core_field_exists(tp->inet_conn.icsk_keepalive_timer))
		describe_timer(r, &tp->inet_conn.icsk_keepalive_timer, now);
	else
		describe_timer(r, &sk->sk_timer, now);
}

/* A function of its own so that the type of its argument reaches the object's BTF, and Go. */
static __noinline void write_row(struct seq_file *seq, struct row *r)
{
	bpf_seq_write(seq, r, sizeof(*r));
}

/*
 * The sockets of one network namespace, one by one, each locked. It gives a
 * cookie to those that have none.
 */
SEC("iter/tcp")
int snapshot(struct bpf_iter__tcp *ctx)
{
	struct sock_common *skc = ctx->sk_common;
	struct now now;
	struct row r;
	__u8 state;

	if (!skc)
		return 0;
	state = skc->skc_state;
	if (state != TCP_FIN_WAIT2 && state != TCP_TIME_WAIT && state != TCP_LISTEN)
		return 0;

	read_clocks(&now);
	__builtin_memset(&r, 0, sizeof(r));
	r.state = state;
	if (state == TCP_TIME_WAIT) {
		/*
		 * Read by CO-RE: bpf_skc_to_tcp_timewait_sock() does not know
		 * the minisocks of connections accepted on an MPTCP listener.
		 */
		struct inet_timewait_sock *tw = (void *)skc;
		struct minisock m = {
			.substate = BPF_CORE_READ(tw, tw_substate),
			.timer = (long)(BPF_CORE_READ(tw, tw_timer.expires) - now.jiffies),
		};

		/* One in TIME_WAIT is of interest only as the end of a FIN_WAIT2 that was sent. */
		if (m.substate == TCP_TIME_WAIT && !skc->skc_cookie.counter && !config.before_5_12)
			return 0;
		if (m.substate == TCP_TIME_WAIT &&
		    (TCP_TIMEWAIT_SECONDS * (__s32)config.hz - m.timer) * 1000000000LL >
			    (__s64)(now.boot - time_wait_since) * config.hz)
			return 0;
		if (has_entry_stamps()) {
			m.has_entry = true;
			m.entry = now.ms - BPF_CORE_READ(tw, tw_entry_stamp);
		}
		describe_minisock(&r, &m);
	} else if (state == TCP_FIN_WAIT2) {
		struct tcp_sock *tp = bpf_skc_to_tcp_sock(skc);
		struct sock *sk = (struct sock *)tp;

		if (!tp)
			return 0;
		describe_full(&r, tp, &now);
		if (sk->sk_socket)
			r.inode = BPF_CORE_READ((struct socket_alloc *)sk->sk_socket,
						vfs_inode.i_ino);
	}
	describe(&r, skc, cookie_of(skc, CONFIGURED), &now);
	if (state == TCP_TIME_WAIT)
		describe_heir(&r);
	write_row(ctx->meta->seq, &r);
	return 0;
}

/*
 * The walk: the sockets of all network namespaces straight from the kernel's
 * hash tables, as the kernel's own lookups read them, under RCU and without a
 * lock. Nearly all of its time is waiting for memory, so it goes through many
 * chains at once, a step of each at a time, with no branch that depends on what
 * a socket is: then the processor waits for many of them at once. A table is
 * walked a part at a time, each with one BPF_PROG_RUN.
 */

enum {
	ROWS = 2048,
	CHAINS = 8192,
	MINISOCKS = 4 * CHAINS,
	KNOWN_BITS = 1 << 22,
	LISTENING_NULLS_BASE = 1 << 29, /* include/net/inet_hashtables.h */
};

/* What one run of the walk is asked for, and its answer. */
struct batch {
	__u32 listening; /* asked: the listeners, not the connections */
	__u32 begin;	 /* asked: the first bucket */
	__u32 end;	 /* asked: the bucket after the last, at most CHAINS on */
	__u32 buckets;	 /* of the table */
	__u64 table;	 /* address of the inet_hashinfo, compared only */
	__u32 filled;	 /* rows */
	__u8 full;	 /* there was no room for all: ask for less at once */
	__u8 strayed;	 /* sockets moved to other chains meanwhile: ask again */
	__u8 padding[2];
	struct row rows[ROWS];
};

/* Where a run keeps what it has found: addresses. */
struct scratch {
	__u32 chains;
	__u32 left; /* of the chains, after a step */
	__u32 sockets;
	__u32 minisocks;
	__u32 picked; /* of the minisocks */
	__u32 padding;
	__u64 head;	    /* the first bucket's: kept here, a number to the verifier */
	__u64 node[CHAINS]; /* where each chain is */
	__u64 end[CHAINS];  /* what it ends with */
	__u64 socket[ROWS];
	__u64 minisock[MINISOCKS];
};

/*
 * A bit for each cookie that is tracked, and others: of the minisocks in
 * TIME_WAIT, of which there are very many, the walk shows only those.
 */
struct known {
	__u64 bits[KNOWN_BITS / 64];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct batch);
} batches SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratches SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct known);
} known SEC(".maps");

struct walker {
	struct now now; /* a little before each socket is read */
	struct batch *batch;
	struct scratch *scratch;
	const struct known *known;
	__u64 stride; /* bytes from one bucket's head to the next */
	__u64 nulls;  /* what the first bucket's chain ends with */
};

extern void *bpf_rdonly_cast(const void *obj, __u32 btf_id) __ksym __weak;

#define AT(type, address)                                                                          \
	((const type *)bpf_rdonly_cast((void *)(address), bpf_core_type_id_kernel(type)))

/* The 64-bit number at an address: the verifier does not let the bits of a pointer be looked at. */
static __always_inline __u64 word(__u64 address)
{
	return AT(struct timespec64, address)->tv_sec;
}

/* The i-th bucket's chain. An odd address ends a chain (include/linux/list_nulls.h). */
static long begin_chain(__u64 i, struct walker *w)
{
	struct scratch *s = w->scratch;
	__u32 n = s->chains;
	__u64 node;

	if (n >= CHAINS)
		return 1;
	node = word(s->head + i * w->stride);
	s->node[n] = node;
	s->end[n] = w->nulls + 2 * i;
	s->chains = n + (~node & 1);
	return 0;
}

/* The i-th chain's next socket. */
static long step_chain(__u64 i, struct walker *w)
{
	struct scratch *s = w->scratch;
	__u32 left = s->left, sockets = s->sockets, minisocks = s->minisocks;
	__u64 node, next, end, address;
	__u8 state;

	if (i >= CHAINS || left >= CHAINS)
		return 1;
	if (sockets >= ROWS || minisocks >= MINISOCKS) {
		w->batch->full = 1;
		return 1;
	}
	node = s->node[i];
	end = s->end[i];
	address = node - bpf_core_field_offset(struct sock_common, skc_nulls_node);
	state = AT(struct sock_common, address)->skc_state;
	s->socket[sockets] = address;
	s->sockets = sockets + ((1 << TCP_FIN_WAIT2 | 1 << TCP_LISTEN) >> (state & 31) & 1);
	s->minisock[minisocks] = address;
	s->minisocks = minisocks + (1 << TCP_TIME_WAIT >> (state & 31) & 1);

	next = word(node);
	if (next & 1 && next != end)
		w->batch->strayed = 1;
	s->node[left] = next;
	s->end[left] = end;
	s->left = left + (~next & 1);
	return 0;
}

static long step(__u64 i, struct walker *w)
{
	struct scratch *s = w->scratch;

	s->left = 0;
	bpf_loop(s->chains, step_chain, w, 0);
	s->chains = s->left;
	return !s->chains || w->batch->full;
}

/* Of the minisocks, those in FIN_WAIT2 (odd: 5, and not 6) and those that are known. */
static long pick_minisock(__u64 i, struct walker *w)
{
	struct scratch *s = w->scratch;
	const struct inet_timewait_sock *tw;
	__u32 picked = s->picked;
	__u64 cookie, known;

	if (i >= MINISOCKS || picked >= MINISOCKS)
		return 1;
	tw = AT(struct inet_timewait_sock, s->minisock[i]);
	cookie = tw->__tw_common.skc_cookie.counter;
	known = w->known->bits[cookie % KNOWN_BITS / 64] >> cookie % 64;
	s->minisock[picked] = s->minisock[i];
	s->picked = picked + ((tw->tw_substate | known) & 1);
	return 0;
}

static __always_inline struct row *next_row(struct batch *b)
{
	__u32 filled = b->filled;
	struct row *r;

	if (filled >= ROWS)
		return NULL;
	r = &b->rows[filled];
	__builtin_memset(r, 0, sizeof(*r));
	return r;
}

/* Keeps the row of a socket whose memory is not another's by now. */
static __always_inline void keep_row(struct batch *b, const struct row *r,
				     const struct sock_common *skc, __u8 state)
{
	b->filled += skc->skc_state == state && skc->skc_cookie.counter == r->cookie;
}

static long show_socket(__u64 i, struct walker *w)
{
	const struct socket *socket;
	const struct sock *sk;
	struct row *r;
	__u64 address;
	__u8 state;

	r = next_row(w->batch);
	if (!r || i >= ROWS)
		return 1;
	address = w->scratch->socket[i];
	sk = AT(struct sock, address);
	state = sk->__sk_common.skc_state;
	describe(r, &sk->__sk_common, sk->__sk_common.skc_cookie.counter, &w->now);
	if (state == TCP_FIN_WAIT2) {
		describe_full(r, AT(struct tcp_sock, address), &w->now);
		socket = sk->sk_socket;
		if (socket)
			r->inode = AT(struct socket_alloc, socket)->vfs_inode.i_ino;
		/* Closed meanwhile: the inode may be another's. */
		if (sk->sk_socket != socket)
			r->inode = 0;
	} else if (state != TCP_LISTEN) {
		return 0;
	}
	r->state = state;
	keep_row(w->batch, r, &sk->__sk_common, state);
	return 0;
}

static long show_minisock(__u64 i, struct walker *w)
{
	const struct inet_timewait_sock *tw;
	struct minisock m = {};
	struct row *r;

	r = next_row(w->batch);
	if (!r || i >= MINISOCKS)
		return 1;
	tw = AT(struct inet_timewait_sock, w->scratch->minisock[i]);
	describe(r, &tw->__tw_common, tw->__tw_common.skc_cookie.counter, &w->now);
	m.substate = tw->tw_substate;
	m.timer = (long)(tw->tw_timer.expires - w->now.jiffies);
	if (has_entry_stamps()) {
		m.has_entry = true;
		m.entry = w->now.ms - tw->tw_entry_stamp;
	}
	describe_minisock(r, &m);
	describe_heir(r);
	keep_row(w->batch, r, &tw->__tw_common, TCP_TIME_WAIT);
	return 0;
}

SEC("raw_tp")
int walk(void *ctx)
{
	const struct inet_hashinfo *table =
		bpf_get_current_task_btf()->nsproxy->net_ns->ipv4.tcp_death_row.hashinfo;
	struct walker w = {};
	struct scratch *s;
	struct batch *b;
	__u32 zero = 0;

	w.batch = b = bpf_map_lookup_elem(&batches, &zero);
	w.scratch = s = bpf_map_lookup_elem(&scratches, &zero);
	w.known = bpf_map_lookup_elem(&known, &zero);
	if (!b || !s || !w.known)
		return 0;
	b->table = (__u64)table;
	b->filled = b->full = b->strayed = 0;
	s->chains = s->sockets = s->minisocks = s->picked = 0;
	if (b->listening) {
		b->buckets = table->lhash2_mask + 1;
		s->head = (__u64)table->lhash2 +
			  bpf_core_field_offset(struct inet_listen_hashbucket, nulls_head);
		w.stride = bpf_core_type_size(struct inet_listen_hashbucket);
		w.nulls = LISTENING_NULLS_BASE;
	} else {
		b->buckets = table->ehash_mask + 1;
		s->head = (__u64)table->ehash;
		w.stride = bpf_core_type_size(struct inet_ehash_bucket);
	}
	if (b->end > b->buckets)
		b->end = b->buckets;
	if (b->begin >= b->end)
		return 0;
	s->head += b->begin * w.stride;
	w.nulls = 2 * (w.nulls + b->begin) | 1;
	read_clocks(&w.now);
	bpf_loop(b->end - b->begin, begin_chain, &w, 0);
	bpf_loop(1 << 20, step, &w, 0);
	bpf_loop(s->minisocks, pick_minisock, &w, 0);
	if (s->sockets + s->picked > ROWS)
		b->full = 1;
	if (b->full)
		return 0;
	bpf_loop(s->sockets, show_socket, &w, 0);
	bpf_loop(s->picked, show_minisock, &w, 0);
	return 0;
}

enum {
	DESCRIPTORS = 4096, /* of a process: looked at in one run */
	AT_ONCE = 16,	    /* of them */
	S_IFMT = 0170000,
	S_IFSOCK = 0140000,
};

/* What a process holds: some of it, until it is taken. */
struct holdings {
	__u64 task;  /* address, compared only */
	__u64 began; /* ns, CLOCK_BOOTTIME */
	__u64 cgroup;
	__u64 comm[COMM_LEN / 8];
	__u32 pid;
	__u32 next;   /* of its descriptors, to look at */
	__u32 filled; /* inodes; whoever takes them sets it to 0 */
	__u8 state;   /* asked: of the sockets */
	__u8 padding[3];
	__u64 inodes[DESCRIPTORS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct holdings);
} holdings SEC(".maps");

static __always_inline void describe_holder(struct holdings *h, const struct task_struct *task)
{
	const struct task_struct *leader = task->group_leader;
	const __u64 *comm = (const void *)leader->comm;

	h->pid = task->tgid;
	h->cgroup = task->cgroups->dfl_cgrp->kn->id;
	h->began = leader->start_boottime;
	h->comm[0] = comm[0];
	h->comm[1] = comm[1];
}

/* A part of a table of descriptors. */
struct descriptors {
	struct holdings *holdings;
	__u64 files; /* where the first of the part is: addresses of files */
	__u64 open;  /* where its bit is */
};

/*
 * Of some descriptors, those that may be of sockets in the state: a step of all at a
 * time, see the walk. What has other private data than a socket leads anywhere.
 */
static long pick_descriptors(__u64 i, struct descriptors *d)
{
	__u64 first = i * AT_ONCE, at[AT_ONCE];
	struct holdings *h = d->holdings;
	__u32 filled = h->filled;
	__u8 state = h->state;

	if (!(word(d->open + first / 64 * 8) >> first % 64 & ((1 << AT_ONCE) - 1)))
		return 0;
#pragma unroll
	for (int j = 0; j < AT_ONCE; j++)
		at[j] = word(d->files + (first + j) * 8);
#pragma unroll
	for (int j = 0; j < AT_ONCE; j++)
		at[j] = word(at[j] + bpf_core_field_offset(struct file, private_data));
#pragma unroll
	for (int j = 0; j < AT_ONCE; j++)
		at[j] = word(at[j] + bpf_core_field_offset(struct socket, sk));
#pragma unroll
	for (int j = 0; j < AT_ONCE; j++) {
		if (filled >= DESCRIPTORS)
			return 1;
		h->inodes[filled] = first + j;
		filled += AT(struct sock_common, at[j])->skc_state == state;
	}
	h->filled = filled;
	return 0;
}

/*
 * From a descriptor to the number of a socket's inode. RCU keeps the memory of files and
 * inodes what it is, but not of the same file: so that is looked at again. What is open
 * and has the inode of a socket is a socket, or was opened with O_PATH and has no private
 * data.
 */
static long find_inode(__u64 i, struct descriptors *d)
{
	struct holdings *h = d->holdings;
	__u32 filled = h->filled;
	const struct inode *inode;
	const struct file *file;
	__u64 slot, address;

	if (i >= DESCRIPTORS || filled >= DESCRIPTORS)
		return 1;
	slot = d->files + h->inodes[i] * 8;
	address = word(slot);
	file = AT(struct file, address);
	inode = AT(struct inode, file->f_inode);
	h->inodes[filled] = inode->i_ino;
	h->filled = filled + ((inode->i_mode & S_IFMT) == S_IFSOCK & word(slot) == address);
	return 0;
}

/*
 * All processes that have sockets in a state, and which: straight from their tables of
 * descriptors. It stops for its holdings to be taken, and to be away from the processor
 * for a moment, and goes on in the same process.
 */
SEC("iter/task")
int owners(struct bpf_iter__task *ctx)
{
	const struct files_struct *files;
	const struct task_struct *task;
	const struct fdtable *table;
	struct descriptors d;
	struct holdings *h;
	__u32 zero = 0, left, picked;

	if (!ctx->task)
		return 0;
	task = AT(struct task_struct, ctx->task); /* as quick to verify as in net_of() */
	files = task->files;
	if (!files || (task->pid != task->tgid && files == task->group_leader->files))
		return 0;
	h = bpf_map_lookup_elem(&holdings, &zero);
	if (!h)
		return 0;
	if (h->task != (__u64)task) {
		h->task = (__u64)task;
		h->next = 0;
	}
	table = files->fdt;
	if (h->next >= table->max_fds)
		return 0;
	left = table->max_fds - h->next;
	if (left > DESCRIPTORS)
		left = DESCRIPTORS;
	d.holdings = h;
	d.files = (__u64)table->fd + h->next * 8;
	d.open = (__u64)table->open_fds + h->next / 8;
	bpf_loop(left / AT_ONCE, pick_descriptors, &d, 0);
	picked = h->filled;
	h->filled = 0;
	bpf_loop(picked, find_inode, &d, 0);
	h->next += left;
	/* Of a process that ends meanwhile the table is not kept by RCU. */
	if (task->files != files)
		h->filled = 0;
	if (h->filled)
		describe_holder(h, task);
	return h->filled || h->next < table->max_fds;
}

/* The same before Linux 6.2, which lacks what that takes: file by file. */
SEC("iter/task_file")
int owners_by_file(struct bpf_iter__task_file *ctx)
{
	const struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct socket *socket;
	struct holdings *h;
	__u32 zero = 0, filled;
	struct sock *sk;

	if (!task || !file)
		return 0;
	socket = bpf_sock_from_file(file);
	h = bpf_map_lookup_elem(&holdings, &zero);
	if (!socket || !h)
		return 0;
	sk = socket->sk;
	if (!sk || sk->__sk_common.skc_state != h->state)
		return 0;
	filled = h->filled;
	if (!filled) {
		h->task = (__u64)task;
		describe_holder(h, task);
	}
	if (h->task != (__u64)task || filled >= DESCRIPTORS)
		return 1;
	h->inodes[filled] = BPF_CORE_READ((struct socket_alloc *)socket, vfs_inode.i_ino);
	h->filled = filled + 1;
	return 0;
}

/* bpf_seq_write() and the kernel's BTF are for GPL-compatible programs. */
char _license[] SEC("license") = "Dual BSD/GPL";
