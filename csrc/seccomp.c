/* The system-call filter, in two parts of which the stricter answer holds. The fork server installs an allow list for
 * itself, which children inherit: anything not named fails with EPERM, a foreign ABI is killed. It still allows the few
 * calls that build a jail; every child denies those to itself before it runs a job (clone3 with ENOSYS, so that libc falls
 * back to clone, whose flags can be inspected). The kernel compiles a filter and runs it once for each system call when it
 * is installed: 0.2 ms for the list, which is a search tree over ranges of numbers, and a quarter of that for the rest.
 * A few calls that could only disturb others, and that a program may make in good faith, do nothing and succeed.
 */
#include "jail.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define ARGUMENT(n) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[n]))
#define UPPER(n) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[n]) + 4)
#define RETURN(value) BPF_STMT(BPF_RET | BPF_K, value)
#define FAIL(code) RETURN(SECCOMP_RET_ERRNO | (code))
#define NOTHING FAIL(0)
#define ALLOWED RETURN(SECCOMP_RET_ALLOW)
#define MASK(bits) BPF_STMT(BPF_ALU | BPF_AND | BPF_K, bits)
#define ANY(bits) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, bits, 0, 1)
#define COUNT(...) (sizeof((struct sock_filter[]){__VA_ARGS__}) / sizeof(struct sock_filter))
#define WHEN(name, ...) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##name, 0, COUNT(__VA_ARGS__)), __VA_ARGS__
#define IS(value) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1)
#define UNLESS(value) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 1, 0)

#define NAMESPACES                                                                                                     \
    (CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET | CLONE_NEWCGROUP |       \
     CLONE_PTRACE)

enum { NUMBERS = 512, PROGRAM = 512 };

static const uint16_t allowed[] = {
    /* files */
    __NR_read, __NR_write, __NR_pread64, __NR_pwrite64, __NR_readv, __NR_writev, __NR_preadv, __NR_pwritev,
    __NR_preadv2, __NR_pwritev2, __NR_open, __NR_openat, __NR_creat, __NR_close, __NR_close_range, __NR_stat,
    __NR_fstat, __NR_lstat, __NR_newfstatat, __NR_statx, __NR_statfs, __NR_fstatfs, __NR_lseek, __NR_access,
    __NR_faccessat, __NR_faccessat2, __NR_getdents, __NR_getdents64, __NR_getcwd, __NR_chdir, __NR_fchdir,
    __NR_rename, __NR_renameat, __NR_renameat2, __NR_mkdir, __NR_mkdirat, __NR_rmdir, __NR_link, __NR_linkat,
    __NR_unlink, __NR_unlinkat, __NR_symlink, __NR_symlinkat, __NR_readlink, __NR_readlinkat, __NR_chmod, __NR_fchmod,
    __NR_fchmodat, __NR_chown, __NR_fchown, __NR_lchown, __NR_fchownat, __NR_umask, __NR_truncate, __NR_ftruncate,
    __NR_fallocate, __NR_utime, __NR_utimes, __NR_utimensat, __NR_futimesat, __NR_mknod, __NR_mknodat, __NR_getxattr,
    __NR_lgetxattr, __NR_fgetxattr, __NR_listxattr, __NR_llistxattr, __NR_flistxattr, __NR_copy_file_range, __NR_dup,
    __NR_dup2, __NR_dup3, __NR_pipe, __NR_pipe2,
    /* Not splice, tee and sendfile: a socket that was lent a byte of a page holds the page and counts the byte, so that 8
     * pairs held 270 MB. Python's library copies by hand where these are refused. */
    /* waiting */
    __NR_poll, __NR_ppoll, __NR_select, __NR_pselect6, __NR_epoll_create, __NR_epoll_create1, __NR_epoll_ctl,
    __NR_epoll_wait, __NR_epoll_pwait, __NR_epoll_pwait2, __NR_eventfd, __NR_eventfd2, __NR_timerfd_create,
    __NR_timerfd_settime, __NR_timerfd_gettime, __NR_signalfd, __NR_signalfd4,
    /* memory */
    __NR_munmap, __NR_mremap, __NR_mprotect, __NR_brk, __NR_mincore, __NR_membarrier, __NR_get_mempolicy,
    /* processes, threads, signals (all of this job's pid namespace only) */
    __NR_fork, __NR_vfork, __NR_execve, __NR_execveat, __NR_exit, __NR_exit_group, __NR_wait4, __NR_waitid, __NR_kill,
    __NR_tkill, __NR_tgkill, __NR_pidfd_open, __NR_pidfd_send_signal, __NR_getpid, __NR_getppid, __NR_gettid,
    __NR_getpgid, __NR_getpgrp, __NR_setpgid, __NR_getsid, __NR_setsid, __NR_getuid, __NR_geteuid, __NR_getgid,
    __NR_getegid, __NR_getresuid, __NR_getresgid, __NR_getgroups, __NR_capget, __NR_futex, __NR_set_robust_list,
    __NR_get_robust_list, __NR_set_tid_address, __NR_rseq, __NR_arch_prctl, __NR_sched_yield, __NR_sched_getaffinity,
    __NR_sched_getparam, __NR_sched_getscheduler, __NR_sched_get_priority_max, __NR_sched_get_priority_min,
    __NR_getpriority, __NR_getcpu, __NR_rt_sigaction, __NR_rt_sigprocmask, __NR_rt_sigreturn, __NR_rt_sigpending,
    __NR_rt_sigtimedwait, __NR_rt_sigsuspend, __NR_rt_sigqueueinfo, __NR_rt_tgsigqueueinfo, __NR_sigaltstack,
    __NR_pause, __NR_restart_syscall, 449 /* futex_waitv */,
    /* clocks, limits, facts */
    __NR_time, __NR_gettimeofday, __NR_clock_gettime, __NR_clock_getres, __NR_clock_nanosleep, __NR_nanosleep,
    __NR_alarm, __NR_setitimer, __NR_getitimer, __NR_timer_create, __NR_timer_settime, __NR_timer_gettime,
    __NR_timer_getoverrun, __NR_timer_delete, __NR_times, __NR_getrusage, __NR_getrlimit, __NR_setrlimit,
    __NR_prlimit64, __NR_uname, __NR_sysinfo, __NR_getrandom,
    /* the descriptors that a job was given */
    __NR_recvfrom, __NR_recvmsg, __NR_shutdown, __NR_getsockopt, __NR_getsockname, __NR_getpeername,
};

static const struct sock_filter prologue[] = {
    LOAD(arch),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0),
    RETURN(SECCOMP_RET_KILL_PROCESS),
    LOAD(nr),
    BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1), /* x32 */
    RETURN(SECCOMP_RET_KILL_PROCESS),
    WHEN(clone, ARGUMENT(0), ANY(NAMESPACES), FAIL(EPERM), ALLOWED),
    /* shared pages outlive their mapping and huge ones are the machine's own stock: no limit on a job counts either */
    WHEN(mmap, ARGUMENT(3), ANY(MAP_HUGETLB), FAIL(ENOMEM), MASK(MAP_TYPE | MAP_ANONYMOUS),
         IS(MAP_SHARED | MAP_ANONYMOUS), FAIL(EPERM), ALLOWED),
    /* a datagram socket, pair or not, can send to any other of the cell that has a name */
    WHEN(socketpair, ARGUMENT(0), UNLESS(AF_UNIX), FAIL(EPERM), ARGUMENT(1), MASK(0xf), IS(SOCK_STREAM), ALLOWED,
         IS(SOCK_SEQPACKET), ALLOWED, FAIL(EPERM)),
    /* out-of-band bytes: nobody's need, and a part of the kernel with a history */
    WHEN(sendto, ARGUMENT(3), ANY(MSG_OOB), FAIL(EPERM), ALLOWED),
    /* /tmp has no disk behind it, and what else a job can open is the host's */
    WHEN(fsync, NOTHING), WHEN(fdatasync, NOTHING), WHEN(sync_file_range, NOTHING), WHEN(msync, NOTHING),
    WHEN(fadvise64, NOTHING), WHEN(readahead, NOTHING),
    WHEN(ioctl, ARGUMENT(1), IS(FIONREAD), ALLOWED, IS(FIONBIO), ALLOWED, IS(FIOCLEX), ALLOWED, IS(FIONCLEX), ALLOWED,
         IS(TCGETS), FAIL(ENOTTY), IS(TIOCGWINSZ), FAIL(ENOTTY), FAIL(EPERM)),
    /* Leases and notifications on files shared between jobs would be a channel, and so would locks, of which a job could hold
     * a million beside: kernel memory that no limit counts. A program has its files to itself, sqlite's too, so that its
     * locks need not do anything. */
    WHEN(flock, NOTHING),
    /* pages that a job sends to the machine's swap are none of those that are counted */
    WHEN(madvise, ARGUMENT(2), IS(MADV_COLD), FAIL(EINVAL), IS(MADV_PAGEOUT), FAIL(EINVAL), ALLOWED),
    WHEN(fcntl, ARGUMENT(1), IS(F_DUPFD), ALLOWED, IS(F_DUPFD_CLOEXEC), ALLOWED, IS(F_GETFD), ALLOWED, IS(F_SETFD),
         ALLOWED, IS(F_GETFL), ALLOWED, IS(F_SETFL), ALLOWED, IS(F_GETLK), ALLOWED, IS(F_SETLK), NOTHING, IS(F_SETLKW),
         NOTHING, IS(F_OFD_GETLK), ALLOWED, IS(F_OFD_SETLK), NOTHING, IS(F_OFD_SETLKW), NOTHING,
         IS(1032 /* F_GETPIPE_SZ */), ALLOWED, IS(1033 /* F_ADD_SEALS */), ALLOWED, IS(1034 /* F_GET_SEALS */), ALLOWED,
         FAIL(EPERM)),
    WHEN(clone3, ALLOWED), WHEN(kcmp, ALLOWED), WHEN(sendmsg, ALLOWED), WHEN(memfd_create, ALLOWED), WHEN(mount, ALLOWED), WHEN(mount_setattr, ALLOWED),
    WHEN(capset, ALLOWED),
    WHEN(prctl, ALLOWED), WHEN(seccomp, ALLOWED),
};

static struct sock_filter last_part[] = {
    LOAD(nr),
    WHEN(clone3, FAIL(ENOSYS)),
    WHEN(memfd_create, FAIL(EPERM)), WHEN(mount, FAIL(EPERM)), WHEN(mount_setattr, FAIL(EPERM)), WHEN(capset, FAIL(EPERM)), WHEN(seccomp, FAIL(EPERM)),
    WHEN(kcmp, FAIL(EPERM)),
    /* What a message carries that nobody has read, full sockets among it, no descriptor shows, and so no limit counts; and it
     * counts against this user's other messages, the fork server's too. */
    WHEN(sendmsg, FAIL(EPERM)),
    /* RLIMIT_CORE is 1, at which the kernel dumps nothing; at 0 it would start the host's program that takes dumps */
    WHEN(setrlimit, ARGUMENT(0), IS(RLIMIT_CORE), NOTHING, ALLOWED),
    WHEN(prlimit64, ARGUMENT(1), UNLESS(RLIMIT_CORE), ALLOWED, ARGUMENT(2), UNLESS(0), NOTHING, UPPER(2), UNLESS(0), NOTHING,
         ALLOWED),
    WHEN(prctl, ARGUMENT(0), IS(PR_SET_NAME), ALLOWED, IS(PR_GET_NAME), ALLOWED, IS(PR_GET_DUMPABLE), ALLOWED,
         IS(PR_SET_PDEATHSIG), ALLOWED, FAIL(EPERM)),
    ALLOWED,
};

static struct sock_filter program[PROGRAM];
static unsigned short length;

static void emit(struct sock_filter instruction) { program[length++] = instruction; }

/* Decides numbers [first, last], whose verdict changes at the given boundaries. */
static void emit_tree(const uint16_t *boundaries, int count, bool verdict) {
    if (count == 0) {
        emit((struct sock_filter)RETURN(verdict ? SECCOMP_RET_ALLOW : SECCOMP_RET_ERRNO | EPERM));
        return;
    }
    int middle = count / 2;
    unsigned short jump = length;
    emit((struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, boundaries[middle], 0, 0));
    emit_tree(boundaries, middle, verdict);
    program[jump].jt = (uint8_t)(length - jump - 1); /* under 256: the whole tree is shorter */
    emit_tree(boundaries + middle + 1, count - middle - 1, verdict ^ ((middle + 1) & 1));
}

static int install(struct sock_filter *filter, unsigned short count) {
    struct sock_fprog whole = {.len = count, .filter = filter};
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &whole);
}

int seccomp_begin(void) {
    bool in[NUMBERS] = {false};
    uint16_t boundaries[NUMBERS];
    int count = 0;
    for (size_t i = 0; i < sizeof allowed / sizeof *allowed; i++) in[allowed[i]] = true;
    for (int number = 1; number < NUMBERS; number++)
        if (in[number] != in[number - 1]) boundaries[count++] = (uint16_t)number;
    for (size_t i = 0; i < sizeof prologue / sizeof *prologue; i++) emit(prologue[i]);
    emit_tree(boundaries, count, in[0]);
    return install(program, length);
}

int seccomp_finish(void) { return install(last_part, sizeof last_part / sizeof *last_part); }
