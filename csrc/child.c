/* A child between clone and untrusted code: its own /tmp and descriptors first, then, once a job comes, limits and filter. */
#include "jail.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/securebits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { JAIL_UID = 1000, DEFAULT_TMP_MB = 16, STEP_FAILED = 97 };

bool jail_without(const char *part) {
#ifdef JAIL_TEST_SWITCHES /* never in the installed module: only the escape tests build with it */
    const char *off = getenv("JAIL_WITHOUT");
    return off != NULL && strstr(off, part) != NULL;
#else
    (void)part;
    return false;
#endif
}

/* The server reads this from the captured stderr when the child ends before it was confined. */
static void check(bool fine, const char *step) {
    if (fine) return;
    dprintf(STDERR_FILENO, "%s: %s", step, strerror(errno));
    _exit(STEP_FAILED);
}

static void write_map(int self, const char *name, const char *text) {
    int fd = openat(self, name, O_WRONLY | O_CLOEXEC);
    check(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), name);
    close(fd);
}

static void map_ids(const birth *s) {
    char line[64];
    int self = openat(s->proc, "self", O_PATH | O_DIRECTORY | O_CLOEXEC);
    write_map(self, "setgroups", "deny");
    snprintf(line, sizeof line, "%d %u 1", JAIL_UID, s->uid);
    write_map(self, "uid_map", line);
    snprintf(line, sizeof line, "%d %u 1", JAIL_UID, s->gid);
    write_map(self, "gid_map", line);
    close(self);
}

static void mount_tmp(uint32_t megabytes, unsigned long flags) {
    char options[80];
    snprintf(options, sizeof options, "size=%um,nr_inodes=4096,mode=0700", megabytes);
    check(mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV | flags, options) == 0, "mount /tmp");
}

static void keep_descriptors(birth *b) {
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    int high[4] = {null, b->out, b->err, b->channel};
    b->proc = fcntl(b->proc, F_DUPFD_CLOEXEC, 64);
    for (int fd = 0; fd < 4; fd++) high[fd] = fcntl(high[fd], F_DUPFD_CLOEXEC, 64);
    for (int fd = 0; fd < 3; fd++) dup2(high[fd], fd);
    dup3(high[CHANNEL_FD], CHANNEL_FD, O_CLOEXEC);
}

/* Each mount that a child has of the cell's is read-only, the devices' too: these are written to all the same, but have no times
 * that one job sets and a later one reads. Before Linux 5.12, which has no such call, these times are all that jobs share. */
static void seal_mounts(void) {
    struct {
        uint64_t set, clear, propagation, users;
    } all = {.set = 1 /* MOUNT_ATTR_RDONLY */}; /* struct mount_attr, which libc has since 2.36 */
    long failed = syscall(SYS_mount_setattr, AT_FDCWD, "/", 0x8000 /* AT_RECURSIVE */, &all, sizeof all);
    check(!failed || errno == ENOSYS, "mount_setattr");
}

void child_enter(birth b) {
    keep_descriptors(&b);
    map_ids(&b);
    if (!jail_without("mounts")) seal_mounts();
    if (!jail_without("tmpfs")) mount_tmp(DEFAULT_TMP_MB, 0);
    if (!jail_without("descriptors")) check(syscall(SYS_close_range, CHANNEL_FD + 1, ~0U, 0) == 0, "close_range");
    setsid(); /* kill(0) must not reach the server's process group */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    check(chdir("/tmp") == 0, "chdir /tmp");
}

static void limit(int resource, uint64_t value) {
    struct rlimit both;
    check(getrlimit(resource, &both) == 0, "getrlimit");
    if (value < both.rlim_max) both.rlim_max = value; /* the machine may allow less */
    both.rlim_cur = both.rlim_max;                    /* soft = hard: pid 1 ignores the soft signal */
    check(setrlimit(resource, &both) == 0, "setrlimit");
}

/* Room beside a block as large as the limit, such as a thread's stack: a thread that begins without any hangs its starter. */
#define SPARE_MB 8

static void set_limits(const child_start *start) {
    const job_limits *l = &start->limits;
    uint64_t tmp = (uint64_t)l->tmp_mb << 20, output = l->output_bytes + OUTPUT_BEYOND; /* which are files, too */
    limit(RLIMIT_AS, (uint64_t)(start->base_mb + l->memory_mb + SPARE_MB) << 20);
    limit(RLIMIT_CPU, (l->cpu_ms + 1999) / 1000);
    limit(RLIMIT_FSIZE, tmp > output ? tmp : output);
    limit(RLIMIT_NOFILE, l->files);
    limit(RLIMIT_NPROC, l->processes);
    limit(RLIMIT_CORE, 1); /* not 0: a program of the host's that core_pattern names is started for that all the same */
    limit(RLIMIT_MEMLOCK, 0);
    limit(RLIMIT_MSGQUEUE, 0);
    limit(RLIMIT_NICE, 0);
    limit(RLIMIT_RTPRIO, 0);
    limit(RLIMIT_SIGPENDING, 256);
}

/* Neither an exec nor a change of user can give capabilities back. */
static void drop_privileges(void) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0}, {0}};
    unsigned long bits = SECBIT_NOROOT | SECBIT_NO_SETUID_FIXUP | SECBIT_NO_CAP_AMBIENT_RAISE;
    check(prctl(PR_SET_SECUREBITS, bits | bits << 1 | SECBIT_KEEP_CAPS_LOCKED, 0, 0, 0) == 0, "lock capabilities");
    check(syscall(SYS_capset, &header, none) == 0, "capset");
}

static void confine(const child_start *start) {
    if (start->limits.tmp_mb != DEFAULT_TMP_MB && !jail_without("tmpfs")) mount_tmp(start->limits.tmp_mb, MS_REMOUNT);
    if (!jail_without("rlimits")) set_limits(start);
    if (!jail_without("capabilities")) drop_privileges();
    check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
    if (!jail_without("seccomp")) check(seccomp_finish() == 0, "seccomp");
    check(fcntl(STDERR_FILENO, F_ADD_SEALS, F_SEAL_SEAL) == 0, "seal");
}

static bool read_all(char *data, size_t count) {
    for (size_t done = 0; done < count;) {
        ssize_t got = read(CHANNEL_FD, data + done, count - done);
        if (got == 0 || (got < 0 && errno != EINTR)) return false;
        if (got > 0) done += (size_t)got;
    }
    return true;
}

/* The descriptor of the judge's or the solution's end rides on the first byte of the start. */
static bool read_start(child_start *start, bool *has_peer) {
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec data = {.iov_base = start, .iov_len = sizeof *start};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got;
    while ((got = recvmsg(CHANNEL_FD, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR) {}
    if (got <= 0) return false;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    *has_peer = header != NULL && header->cmsg_type == SCM_RIGHTS;
    if (*has_peer) {
        int fd = *(int *)CMSG_DATA(header);
        if (fd != PEER_FD) {
            dup3(fd, PEER_FD, O_CLOEXEC);
            close(fd);
        }
    }
    return read_all((char *)start + got, sizeof *start - (size_t)got);
}

static bool place_stdin(size_t count) {
    if (count == 0) return true;
    int fd = (int)syscall(SYS_memfd_create, "stdin", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int seals = F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL; /* else the job had a second /tmp in it, which nobody sees */
    char *data = malloc(count);
    bool fine = fd >= 0 && data != NULL && read_all(data, count) && write(fd, data, count) == (ssize_t)count &&
                fcntl(fd, F_ADD_SEALS, seals) == 0 && lseek(fd, 0, SEEK_SET) == 0 &&
                dup2(fd, STDIN_FILENO) == STDIN_FILENO;
    free(data);
    close(fd);
    return fine;
}

bool child_receive(child_start *start, char **payload, bool *has_peer) {
    if (!read_start(start, has_peer) || !place_stdin(start->stdin_bytes)) return false;
    *payload = malloc(start->payload_bytes + 1);
    if (*payload == NULL || !read_all(*payload, start->payload_bytes)) return false;
    confine(start);
    return true;
}
