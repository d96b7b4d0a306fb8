/* One job: its start, its channels, its captured output and its end. */
#include "jail.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { READ_CHUNK = 65536, FIRST_CHECK_MS = 20, JUDGE_EXTRA_MS = 2000 };

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void host_send(server *s, uint32_t id, uint8_t kind, const void *body, size_t length) {
    host_header header = {.length = (uint32_t)length, .job = id, .kind = kind};
    if (!buffer_append(&s->to_host, &header, sizeof header) || !buffer_append(&s->to_host, body, length)) _exit(1);
}

/* ---- channels ---- */

static uint64_t event_key(const job *j, const process *p) {
    return (uint64_t)j->generation << 32 | (uint64_t)j->id << 1 | (p == &j->judge);
}

static bool watch(server *s, job *j, process *p, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.u64 = event_key(j, p)};
    return epoll_ctl(s->job_epoll, operation, p->channel, &event) == 0;
}

static void process_flush(server *s, job *j, process *p) {
    while (p->queue.start < p->queue.end) {
        ssize_t sent = send(p->channel, p->queue.data + p->queue.start, p->queue.end - p->queue.start, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && errno != EPIPE && errno != ECONNRESET) break; /* a full socket reports when it drains */
        if (sent < 0) buffer_release(&p->queue);                      /* nobody reads any more */
        else buffer_consume(&p->queue, (size_t)sent);
    }
    bool waiting = p->queue.start < p->queue.end;
    if (waiting != p->wants_write) watch(s, j, p, EPOLL_CTL_MOD, waiting ? EPOLLIN | EPOLLOUT : EPOLLIN);
    p->wants_write = waiting;
    if (!waiting) buffer_release(&p->queue);
}

static void process_send(server *s, job *j, process *p, const void *bytes, size_t count) {
    if (!buffer_append(&p->queue, bytes, count)) return job_stop(j, SPAWN);
    if (p->queue.end - p->queue.start > 2 * MAX_FRAME) return job_stop(j, PROTOCOL);
    process_flush(s, j, p);
}

static void take_frame(server *s, job *j, process *p, child_header header, const char *body) {
    if (header.kind == CHILD_CALL && j->calls < s->most_calls) { /* none but a session's: the host takes its time over each */
        j->calls++;
        host_send(s, j->id, SERVER_DATA, body, header.length);
        return;
    }
    if (header.kind != CHILD_RESULT) return job_stop(j, PROTOCOL);
    if (++p->frames > 1) return job_stop(j, PROTOCOL);
    if (!buffer_append(&p->result, body, header.length)) job_stop(j, SPAWN);
}

static void take_frames(server *s, job *j, process *p) {
    child_header header;
    while (p->in.end - p->in.start >= sizeof header) {
        memcpy(&header, p->in.data + p->in.start, sizeof header);
        if (header.length > MAX_CHILD_FRAME) return job_stop(j, PROTOCOL);
        if (p->in.end - p->in.start < sizeof header + header.length) return;
        take_frame(s, j, p, header, p->in.data + p->in.start + sizeof header);
        buffer_consume(&p->in, sizeof header + header.length);
    }
}

/* Reads one piece, so that a job that never stops keeps nobody waiting: its length, 0 for none yet, -1 at the end. */
static ssize_t process_read(server *s, job *j, process *p) {
    char *place = buffer_reserve(&p->in, READ_CHUNK);
    if (place == NULL) return job_stop(j, SPAWN), -1;
    ssize_t got = read(p->channel, place, READ_CHUNK);
    if (got < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    if (got == 0) return -1;
    p->in.end += (size_t)got;
    if (j->reason != PROTOCOL) take_frames(s, j, p);
    if (j->reason == PROTOCOL) buffer_release(&p->in);
    return got;
}

void job_event(server *s, uint64_t key, uint32_t events) {
    job *j = s->jobs[(key >> 1) & (MAX_JOBS - 1)];
    if (j == NULL || j->generation != key >> 32) return;
    process *p = key & 1 ? &j->judge : &j->solution;
    if (p->pid == 0) return;
    if (events & EPOLLOUT) process_flush(s, j, p);
    if (!(events & (EPOLLIN | EPOLLHUP))) return;
    if (process_read(s, j, p) < 0) epoll_ctl(s->job_epoll, EPOLL_CTL_DEL, p->channel, NULL);
    if (p->in.start == p->in.end) buffer_release(&p->in);
}

void job_forward(server *s, uint32_t id, const char *body, size_t length) {
    job *j = id < MAX_JOBS ? s->jobs[id] : NULL;
    if (j == NULL || j->solution.pid == 0 || j->reason != NONE) return;
    if (j->calls > 0) j->calls--;
    uint32_t size = (uint32_t)length;
    if (!buffer_append(&j->solution.queue, &size, sizeof size)) return job_stop(j, SPAWN);
    process_send(s, j, &j->solution, body, length);
}

/* ---- start ---- */

static int take_armed(server *s, process *p) {
    if (s->armed_count == 0) return spawn_child(s, p);
    *p = s->armed[--s->armed_count];
    return 0;
}

static bool send_start(server *s, job *j, process *p, const child_start *start, int peer) {
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec data = {.iov_base = (void *)start, .iov_len = sizeof *start};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    if (peer >= 0) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
        memcpy(CMSG_DATA(header), &peer, sizeof peer);
    }
    return watch(s, j, p, EPOLL_CTL_ADD, EPOLLIN) && sendmsg(p->channel, &message, MSG_NOSIGNAL) == (ssize_t)sizeof *start;
}

static bool start_processes(server *s, job *j, const start_header *h, const char *data) {
    int ends[2] = {-1, -1};
    child_start start = {.limits = h->limits, .base_mb = s->base_mb, .payload_bytes = h->payload_bytes};
    start.stdin_bytes = h->stdin_bytes;
    j->by_cgroup = group_limit(s, &j->solution.group, &h->limits);
    if (j->judged) j->by_cgroup = group_limit(s, &j->judge.group, &h->limits) && j->by_cgroup;
    if (j->judged && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return false;
    bool fine = set_output_cap(&j->solution, h->limits.output_bytes) == 0 &&
                send_start(s, j, &j->solution, &start, ends[0]);
    process_send(s, j, &j->solution, data, h->stdin_bytes + h->payload_bytes);
    if (j->judged) {
        start.stdin_bytes = 0;
        start.payload_bytes = h->judge_bytes;
        start.limits.cpu_ms += JUDGE_EXTRA_MS;
        fine = fine && set_output_cap(&j->judge, 65536) == 0 && send_start(s, j, &j->judge, &start, ends[1]);
        process_send(s, j, &j->judge, data + h->stdin_bytes + h->payload_bytes, h->judge_bytes);
        j->peer = ends[0];
        close(ends[1]);
    }
    return fine;
}

static void refuse(server *s, uint32_t id, int error) {
    done_header done = {.reason = SPAWN, .spawn_errno = (uint32_t)error};
    host_send(s, id, SERVER_DONE, &done, sizeof done);
}

int job_start(server *s, uint32_t id, const char *body, size_t length) {
    start_header h = {0};
    memcpy(&h, body, length < sizeof h ? length : sizeof h);
    uint64_t expected = (uint64_t)sizeof h + h.stdin_bytes + h.payload_bytes + h.judge_bytes;
    if (length < sizeof h || length != expected || id >= MAX_JOBS || s->jobs[id] != NULL) return refuse(s, id, EINVAL), 0;
    job *j = arena_alloc(sizeof *j);
    if (j == NULL) return refuse(s, id, ENOMEM), 0;
    *j = (job){.id = id, .generation = ++s->generation, .limits = h.limits, .judged = h.judge_bytes > 0, .peer = -1};
    int error = take_armed(s, &j->solution);
    if (error == 0 && j->judged) error = take_armed(s, &j->judge);
    if (error == 1) return 1;
    j->started_ns = now_ns();
    j->deadline_ns = j->started_ns + h.limits.wall_ms * 1000000ull;
    j->interval_ns = FIRST_CHECK_MS * 1000000ull;
    j->check_ns = j->started_ns + j->interval_ns;
    if (s->sweep_ns == 0 || j->check_ns < s->sweep_ns) s->sweep_ns = j->check_ns;
    if (error < 0) {
        if (j->solution.pid) kill(j->solution.pid, SIGKILL); /* reaped as nobody's */
        close_process(s, &j->solution);
        arena_free(j, sizeof *j);
        return refuse(s, id, -error), 0;
    }
    s->jobs[id] = j;
    s->live[s->live_count++] = id;
    if (!start_processes(s, j, &h, body + sizeof h)) job_stop(j, SPAWN);
    return 0;
}

/* ---- end ---- */

void job_stop(job *j, enum reason reason) {
    if (j->reason == NONE) j->reason = reason;
    bool verdict_may_come = j->judged && (reason == WALL || reason == CPU || reason == MEMORY || reason == OUTPUT);
    if (j->solution.pid) kill(j->solution.pid, SIGKILL);
    if (j->judge.pid && !verdict_may_come) kill(j->judge.pid, SIGKILL);
}

void job_cancel(server *s, uint32_t id) {
    if (id < MAX_JOBS && s->jobs[id] != NULL) job_stop(s->jobs[id], CANCELLED);
}

static uint32_t kept(const job *j, int fd) {
    off_t position = lseek(fd, 0, SEEK_CUR);
    uint32_t most = j->limits.kept_bytes < j->limits.output_bytes ? j->limits.kept_bytes : j->limits.output_bytes;
    return position < 0 ? 0 : position > most ? most : (uint32_t)position;
}

static void append_output(buffer *to, int fd, uint32_t count) {
    char *place = buffer_reserve(to, count);
    if (place == NULL || pread(fd, place, count, 0) != (ssize_t)count) _exit(1);
    to->end += count;
}

static void append_frame(buffer *to, const buffer *frame, uint32_t count) {
    if (!buffer_append(to, frame->data + frame->start, count)) _exit(1);
}

static void close_peer(job *j) {
    if (j->peer >= 0) close(j->peer);
    j->peer = -1;
}

static void forget(server *s, job *j) {
    close_peer(j);
    process *both[2] = {&j->solution, &j->judge};
    for (int i = 0; i < (j->judged ? 2 : 1); i++) {
        buffer_release(&both[i]->in);
        buffer_release(&both[i]->queue);
        buffer_release(&both[i]->result);
        epoll_ctl(s->job_epoll, EPOLL_CTL_DEL, both[i]->channel, NULL);
        close_process(s, both[i]);
    }
    for (uint32_t i = 0; i < s->live_count; i++)
        if (s->live[i] == j->id) s->live[i] = s->live[--s->live_count];
    s->jobs[j->id] = NULL;
    arena_free(j, sizeof *j);
}

static void finish(server *s, job *j) {
    uint32_t cap = j->limits.output_bytes;
    if (j->reason == NONE && (lseek(j->solution.out, 0, SEEK_CUR) > cap || lseek(j->solution.err, 0, SEEK_CUR) > cap))
        j->reason = OUTPUT;
    /* A judge that is quick has its say all the same; and no job, by being killed early, makes its end another's fault. */
    bool born = was_confined(&j->solution) || j->cut;
    if (!born || (j->judged && !was_confined(&j->judge)))
        if (j->reason != CANCELLED && j->reason != MEMORY && j->reason != PROTOCOL) j->reason = SPAWN;
    uint32_t peak_kb = group_peak_kb(s, &j->solution.group);
    if (peak_kb > 0 && s->base_anon_kb + peak_kb > j->memory_kb) j->memory_kb = s->base_anon_kb + peak_kb;
    group_peak_kb(s, &j->judge.group); /* whether it may be used again */
    uint64_t passed_ns = now_ns() - j->started_ns, waited_ns = passed_ns / 8 * 7; /* as the deadline: 7 of 8 at most */
    if (waited_ns > j->waited_ns) waited_ns = j->waited_ns; /* waits of several threads overlap */
    done_header done = {
        .reason = j->reason, .status = (uint32_t)j->solution.status, .judge_status = (uint32_t)j->judge.status,
        .results = j->solution.frames, .verdicts = j->judge.frames, .cpu_us = j->spent_us,
        .wall_us = (passed_ns - waited_ns) / 1000, .memory_kb = j->memory_kb,
        .by_cgroup = j->by_cgroup,
        .stdout_bytes = kept(j, j->solution.out), .stderr_bytes = kept(j, j->solution.err),
        .result_bytes = (uint32_t)(j->solution.result.end - j->solution.result.start),
        .verdict_bytes = (uint32_t)(j->judge.result.end - j->judge.result.start),
    };
    size_t length = sizeof done + done.stdout_bytes + done.stderr_bytes + done.result_bytes + done.verdict_bytes;
    host_header header = {.length = (uint32_t)length, .job = j->id, .kind = SERVER_DONE};
    buffer *to = &s->to_host;
    if (!buffer_append(to, &header, sizeof header) || !buffer_append(to, &done, sizeof done)) _exit(1);
    append_output(to, j->solution.out, done.stdout_bytes);
    append_output(to, j->solution.err, done.stderr_bytes);
    append_frame(to, &j->solution.result, done.result_bytes);
    append_frame(to, &j->judge.result, done.verdict_bytes);
    forget(s, j);
}

static job *owner_of(const server *s, pid_t pid) {
    for (uint32_t i = 0; i < s->live_count; i++) {
        job *j = s->jobs[s->live[i]];
        if (j->solution.pid == pid || j->judge.pid == pid) return j;
    }
    return NULL;
}

bool process_reaped(server *s, pid_t pid, int status, uint64_t cpu_us, uint32_t memory_kb) {
    job *j = owner_of(s, pid);
    if (j == NULL) return false;
    process *p = j->judge.pid == pid ? &j->judge : &j->solution;
    p->pid = 0;
    while (process_read(s, j, p) > 0) {}
    bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    p->status = status;
    if (p == &j->solution && j->cut) {
        j->cut = killed; /* else it had ended by itself before */
        if (killed) p->status = 0;
    }
    if (killed && group_ran_out(s, &p->group) && j->reason == NONE) j->reason = MEMORY;
    if (p == &j->solution) {
        close_peer(j);
        j->spent_us = cpu_us;
        if (memory_kb > j->memory_kb) j->memory_kb = memory_kb;
    } else if (j->solution.pid) {
        j->cut = j->reason == NONE; /* the verdict is in, or will never come */
        kill(j->solution.pid, SIGKILL);
    }
    if (j->solution.pid == 0 && j->judge.pid == 0) finish(s, j);
    return true;
}
