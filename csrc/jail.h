/* The jail's fork server: one process per cell, which keeps namespaced children armed and hands each one job.
 *
 * arena.c    memory for job data that no child inherits (MADV_DONTFORK)
 * image.c    the warm interpreter's memory, made cheap to fork
 * ending.c   what a script's end has to wait for
 * seccomp.c  the system-call filter
 * child.c    what a child does between clone and untrusted code
 * spawn.c    clone into namespaces, armed children
 * groups.c   cgroups of children, where the machine lets us make them
 * job.c      channels, captured output and the end of a job
 * watch.c    wall clock, CPU time, resident memory and output of running jobs
 * server.c   the loop between the host's socket and the jobs
 * module.c   the two functions that the guest's Python sees
 */
#ifndef FASTGRPO_JAIL_H
#define FASTGRPO_JAIL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { CHANNEL_FD = 3, PEER_FD = 4, MAX_JOBS = 1 << 16 };
enum { MAX_ARMED = 64, MAX_GROUPS = 2 * MAX_JOBS + MAX_ARMED, MAX_FRAME = 16 << 20 };
enum { OUTPUT_BEYOND = 8191 /* bytes for which there is room above a cap on output, at most: a page and what fills another */ };
enum { MAX_CHILD_FRAME = 1 << 20 /* guest/wire.py's MAX_FRAME */ };
enum { MOST_CALLS = 512 /* of a session, unanswered: twice the host's MAX_CALLS, which ends it in words of its own */ };

/* Frames between host and server: length of the body, job, kind. */
typedef struct __attribute__((packed)) {
    uint32_t length, job;
    uint8_t kind;
} host_header;
enum { HOST_START = 1, HOST_DATA = 2, HOST_KILL = 3 };                  /* host to server */
enum { SERVER_READY = 1, SERVER_DATA = 2, SERVER_DONE = 3, SERVER_GONE = 4 }; /* server to host */

/* Frames between a child and the server. */
typedef struct __attribute__((packed)) {
    uint32_t length;
    uint8_t kind;
} child_header;
enum { CHILD_CALL = 'C', CHILD_RESULT = 'R' };

typedef struct __attribute__((packed)) {
    uint32_t wall_ms, cpu_ms, memory_mb, processes, output_bytes, tmp_mb, files;
    uint32_t kept_bytes; /* of output, that the host is sent */
} job_limits;

/* Body of HOST_START: this, then stdin, the solution's payload and the judge's (0 bytes: no judge). */
typedef struct __attribute__((packed)) {
    job_limits limits;
    uint32_t stdin_bytes, payload_bytes, judge_bytes;
} start_header;

/* First thing an armed child reads on its channel, followed by stdin and payload. */
typedef struct __attribute__((packed)) {
    job_limits limits;
    uint32_t base_mb, stdin_bytes, payload_bytes;
} child_start;

enum reason { NONE, WALL, CPU, MEMORY, OUTPUT, CANCELLED, PROTOCOL, SPAWN };

/* Body of SERVER_DONE: this, then stdout, stderr, the solution's result frame and the judge's. */
typedef struct __attribute__((packed)) {
    uint32_t reason, status, judge_status, spawn_errno;
    uint32_t results, verdicts;
    uint64_t cpu_us, wall_us;
    uint32_t memory_kb, by_cgroup, stdout_bytes, stderr_bytes, result_bytes, verdict_bytes;
} done_header;

/* A buffer in the arena: bytes [start, end) of data. */
typedef struct {
    char *data;
    size_t start, end, capacity;
} buffer;

/* A cgroup, by its name below the cell's; 0: none. The limits are those that it has now, 0 before the first. */
typedef struct {
    uint32_t number, memory_mb, processes;
    bool spent; /* not to be used again */
} group;

typedef struct {
    pid_t pid; /* 0: not there, or reaped */
    int channel, out, err;
    int status;
    uint32_t frames; /* result frames seen */
    buffer in, queue, result;
    bool wants_write;
    group group;
} process;

typedef struct {
    uint32_t id, generation;
    job_limits limits;
    process solution, judge;
    int peer; /* the solution's end, held here until it is reaped: its judge hears of no end before the server does */
    bool judged, many;
    uint32_t calls; /* unanswered */
    bool cut; /* the solution was killed because its judge had ended: it has no end of its own */
    bool by_cgroup; /* memory is held by the groups of its processes, else by polling */
    enum reason reason;
    uint64_t started_ns, deadline_ns, check_ns, interval_ns, cpu_ns, spent_us;
    uint64_t seen_ns, waited_ns, given_ns; /* waits for a processor: at the last look, in all, and given back */
    uint64_t rest_ns, close_ns; /* how long no look at its memory is to follow the last; when a closer one may */
    uint32_t memory_kb, spawn_errno;
} job;

typedef struct {
    int host, proc, groups, signals, job_epoll; /* groups: the folder of the cell's cgroup, or -1 */
    uint32_t uid, gid, armed_target, most_calls, base_mb, base_anon_kb, generation;
    uint64_t base_stack, base_area_bytes;
    buffer from_host, to_host;
    job *jobs[MAX_JOBS];
    uint32_t live[MAX_JOBS], live_count;
    process armed[MAX_ARMED];
    uint32_t armed_count;
    group free_groups[MAX_GROUPS];
    uint32_t free_count, last_group;
    uint64_t sweep_ns, arm_ns; /* when to look at the jobs next; when arming may be tried again */
} server;

/* arena.c */
void arena_open(void);
void *arena_alloc(size_t bytes);
void arena_free(void *block, size_t bytes);
char *buffer_reserve(buffer *b, size_t count); /* room for count bytes at the end, or NULL */
bool buffer_append(buffer *b, const void *bytes, size_t count);
void buffer_consume(buffer *b, size_t count);
void buffer_release(buffer *b);

/* image.c */
void image_seal(void);
void image_pack(int proc);

/* ending.c */
bool ending_begin(void); /* before any child; false with an exception set */
bool ending_due(void);

/* seccomp.c */
int seccomp_begin(void);  /* in the server, for itself and all children */
int seccomp_finish(void); /* in a child, before it runs a job */

/* child.c */
typedef struct {
    int proc, channel, out, err;
    uint32_t uid, gid;
} birth; /* what a child needs of the server, by value: the server's own memory stays behind */
void child_enter(birth b);
bool child_receive(child_start *start, char **payload, bool *has_peer);

/* spawn.c */
int spawn_child(server *s, process *p); /* 1 in the child, 0 in the server, -errno */
void close_process(server *s, process *p); /* and gives its group back */
bool was_confined(const process *p);
int set_output_cap(const process *p, uint32_t bytes);

/* groups.c */
group group_take(server *s);
int group_open(const server *s, const group *g); /* a descriptor to clone into, or -1 */
bool group_limit(const server *s, group *g, const job_limits *l);
bool group_ran_out(const server *s, group *g);
uint32_t group_peak_kb(const server *s, group *g); /* 0: too little to tell from an earlier child's */
void group_release(server *s, group *g);

/* job.c */
int job_start(server *s, uint32_t id, const char *body, size_t length); /* 1 in a child just cloned for it */
void job_forward(server *s, uint32_t id, const char *body, size_t length);
void job_event(server *s, uint64_t key, uint32_t events);
void job_cancel(server *s, uint32_t id);
void job_stop(job *j, enum reason reason);
bool process_reaped(server *s, pid_t pid, int status, uint64_t cpu_us, uint32_t memory_kb); /* false: not a job's */
void host_send(server *s, uint32_t id, uint8_t kind, const void *body, size_t length);
uint64_t now_ns(void);

/* watch.c */
void jobs_sweep(server *s, uint64_t now);
void watch_begin(server *s); /* what children inherit, before there are any */

/* server.c: returns 1 in a child, never in the server */
int server_run(server *s);

bool jail_without(const char *part); /* always false but in the build made for the escape tests */

#endif
