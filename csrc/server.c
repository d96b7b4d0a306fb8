/* The loop: the host's frames in, jobs' frames and outcomes out, children reaped and armed again. */
#include "jail.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

enum { HOST_CHUNK = 1 << 18, HOST_BACKLOG = 8 << 20, EVENTS = 64, ARM_AGAIN_MS = 100 };

static void flush_host(server *s) {
    while (s->to_host.start < s->to_host.end) {
        ssize_t sent = write(s->host, s->to_host.data + s->to_host.start, s->to_host.end - s->to_host.start);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && errno == EAGAIN) return;
        if (sent < 0) _exit(0); /* the host is gone: so is everything in this cell */
        buffer_consume(&s->to_host, (size_t)sent);
    }
    if (s->to_host.capacity > HOST_CHUNK) buffer_release(&s->to_host);
}

static int host_frame(server *s, const host_header *h, const char *body) {
    if (h->kind == HOST_START) return job_start(s, h->job, body, h->length);
    if (h->kind == HOST_DATA) job_forward(s, h->job, body, h->length);
    else if (h->kind == HOST_KILL) job_cancel(s, h->job);
    else _exit(2);
    return 0;
}

static int host_frames(server *s) {
    host_header h;
    buffer *in = &s->from_host;
    while (in->end - in->start >= sizeof h) {
        memcpy(&h, in->data + in->start, sizeof h);
        if (h.length > 2 * MAX_FRAME) _exit(2);
        if (in->end - in->start < sizeof h + h.length) break;
        if (host_frame(s, &h, in->data + in->start + sizeof h)) return 1;
        buffer_consume(in, sizeof h + h.length);
    }
    if (in->start == in->end && in->capacity > HOST_CHUNK) buffer_release(in);
    return 0;
}

static int host_readable(server *s) {
    char *place = buffer_reserve(&s->from_host, HOST_CHUNK / 2);
    if (place == NULL) _exit(1);
    ssize_t got = read(s->host, place, HOST_CHUNK / 2);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) _exit(0);
    if (got > 0) s->from_host.end += (size_t)got;
    return host_frames(s);
}

/* An armed child never ends on its own: the machine refused a step, and the host must hear which. */
static void armed_died(server *s, pid_t pid, int status) {
    for (uint32_t i = 0; i < s->armed_count; i++) {
        if (s->armed[i].pid != pid) continue;
        char text[256];
        ssize_t got = pread(s->armed[i].err, text, sizeof text, 0);
        if (got <= 0) got = snprintf(text, sizeof text, "an armed child ended with wait status %d", status);
        host_send(s, 0, SERVER_GONE, text, (size_t)got);
        close_process(s, &s->armed[i]);
        s->armed[i] = s->armed[--s->armed_count];
        s->armed_target = 0;
        return;
    }
}

static void reap(server *s) {
    struct signalfd_siginfo drained[16];
    while (read(s->signals, drained, sizeof drained) > 0) {}
    for (;;) {
        int status;
        struct rusage used;
        pid_t pid = wait4(-1, &status, WNOHANG, &used);
        if (pid <= 0) return;
        uint64_t cpu_us = (uint64_t)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000u +
                          (uint64_t)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
        if (!process_reaped(s, pid, status, cpu_us, (uint32_t)used.ru_maxrss)) armed_died(s, pid, status);
    }
}

static void jobs_readable(server *s) {
    struct epoll_event events[EVENTS];
    int count = epoll_wait(s->job_epoll, events, EVENTS, 0);
    for (int i = 0; i < count; i++) job_event(s, events[i].data.u64, events[i].events);
}

/* Failure to arm is no failure yet: it shows when a job needs a child. Until then, no spinning on a full machine. */
static int arm_one(server *s) {
    if (s->armed_count >= s->armed_target || now_ns() < s->arm_ns) return 0;
    int child = spawn_child(s, &s->armed[s->armed_count]);
    if (child == 0) s->armed_count++;
    if (child < 0) s->arm_ns = now_ns() + ARM_AGAIN_MS * 1000000ull;
    return child == 1;
}

static int wait_ms(const server *s) {
    uint64_t next = s->sweep_ns;
    if (s->armed_count < s->armed_target && (next == 0 || s->arm_ns < next)) next = s->arm_ns + 1;
    if (next == 0) return -1;
    uint64_t now = now_ns();
    return next <= now ? 0 : (int)((next - now) / 1000000u) + 1;
}

static int turn(server *s) {
    bool congested = s->to_host.end - s->to_host.start > HOST_BACKLOG; /* then jobs wait until the host reads */
    bool pending = s->to_host.start < s->to_host.end;
    struct pollfd set[3] = {
        {.fd = s->host, .events = pending ? POLLIN | POLLOUT : POLLIN},
        {.fd = s->signals, .events = POLLIN},
        {.fd = congested ? -1 : s->job_epoll, .events = POLLIN},
    };
    int ready = poll(set, 3, wait_ms(s));
    if (ready < 0 && errno != EINTR) _exit(1);
    if (set[2].revents) jobs_readable(s);
    if (set[1].revents) reap(s);
    if (set[0].revents & (POLLIN | POLLHUP | POLLERR) && host_readable(s)) return 1;
    if (s->sweep_ns != 0 && now_ns() >= s->sweep_ns) jobs_sweep(s, now_ns());
    flush_host(s);
    return ready == 0 || s->armed_count == 0 ? arm_one(s) : 0;
}

int server_run(server *s) {
    sigset_t child_ended;
    sigemptyset(&child_ended);
    sigaddset(&child_ended, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child_ended, NULL);
    signal(SIGPIPE, SIG_IGN);
    fcntl(s->host, F_SETFL, O_NONBLOCK);
    s->signals = signalfd(-1, &child_ended, SFD_NONBLOCK | SFD_CLOEXEC);
    s->job_epoll = epoll_create1(EPOLL_CLOEXEC);
    if (s->signals < 0 || s->job_epoll < 0) _exit(1);
    watch_begin(s);
    host_send(s, 0, SERVER_READY, NULL, 0);
    while (!turn(s)) {}
    return 1;
}
