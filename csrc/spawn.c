/* Children cloned ahead of need into namespaces of their own. */
#include "jail.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { GLIBC_TID_OFFSET = 0x2d0 };

/* A raw clone leaves the parent's thread id in libc's thread block, where recursive locks would compare it. */
static uint64_t thread_id_slot(void) {
    int *slot = (int *)((char *)pthread_self() + GLIBC_TID_OFFSET);
    return *slot == (int)syscall(SYS_gettid) ? (uint64_t)(uintptr_t)slot : 0;
}

static pid_t clone_namespaced(int cgroup) {
    uint64_t slot = thread_id_slot();
    uint64_t namespaces = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS;
    if (jail_without("pid")) namespaces &= ~(uint64_t)CLONE_NEWPID;
    if (jail_without("ipc")) namespaces &= ~(uint64_t)CLONE_NEWIPC;
    struct clone_args arguments = {
        .flags = namespaces | (slot ? CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID : 0) |
                 (cgroup >= 0 ? CLONE_INTO_CGROUP : 0),
        .child_tid = slot,
        .exit_signal = SIGCHLD,
        .cgroup = cgroup >= 0 ? (uint64_t)cgroup : 0,
    };
    return (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
}

void close_process(server *s, process *p) {
    if (p->channel >= 0) close(p->channel);
    if (p->out >= 0) close(p->out);
    if (p->err >= 0) close(p->err);
    group_release(s, &p->group);
    *p = (process){.channel = -1, .out = -1, .err = -1};
}

int set_output_cap(const process *p, uint32_t bytes) {
    off_t size = ((off_t)bytes + OUTPUT_BEYOND) / 4096 * 4096; /* so that reaching past the cap shows */
    int seals = F_SEAL_GROW | F_SEAL_SHRINK;
    for (int i = 0; i < 2; i++) {
        int fd = i ? p->err : p->out;
        if (ftruncate(fd, size) != 0 || fcntl(fd, F_ADD_SEALS, seals) != 0) return -errno;
    }
    return 0;
}

/* The child seals its stderr once it is confined; no code in the jail can set or undo that before or after. */
bool was_confined(const process *p) { return (fcntl(p->err, F_GET_SEALS) & F_SEAL_SEAL) != 0; }

/* Where the machine refuses the group, the child runs without, its memory is polled and its outcome says so. */
static pid_t clone_grouped(server *s, process *p) {
    p->group = group_take(s);
    int cgroup = group_open(s, &p->group);
    if (cgroup < 0) group_release(s, &p->group);
    pid_t pid = clone_namespaced(cgroup);
    if (pid == 0 || cgroup < 0) return pid;
    int error = errno;
    close(cgroup);
    errno = error;
    if (pid > 0 || error == EAGAIN || error == ENOMEM) return pid;
    group_release(s, &p->group);
    return clone_namespaced(-1);
}

int spawn_child(server *s, process *p) {
    int ends[2] = {-1, -1};
    *p = (process){.channel = -1, .out = -1, .err = -1};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return -errno;
    p->channel = ends[0];
    p->out = (int)syscall(SYS_memfd_create, "stdout", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    p->err = (int)syscall(SYS_memfd_create, "stderr", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    birth b = {.proc = s->proc, .channel = ends[1], .out = p->out, .err = p->err, .uid = s->uid, .gid = s->gid};
    pid_t pid = p->out >= 0 && p->err >= 0 ? clone_grouped(s, p) : -1;
    int error = errno;
    if (pid == 0) {
        child_enter(b);
        return 1;
    }
    close(ends[1]);
    if (pid < 0) {
        close_process(s, p);
        return -error;
    }
    fcntl(p->channel, F_SETFL, O_NONBLOCK);
    p->pid = pid;
    return 0;
}
