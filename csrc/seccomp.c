/* The system-call filter: an allow list, written as BPF once and loaded as it is. Anything not named fails with EPERM
 * (clone3 with ENOSYS, so that libc falls back to clone, whose flags can be inspected); a foreign ABI is killed.
 */
#include "jail.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define ARGUMENT(n) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[n]))
#define RETURN(value) BPF_STMT(BPF_RET | BPF_K, value)
#define FAIL(code) RETURN(SECCOMP_RET_ERRNO | (code))
#define ALLOWED RETURN(SECCOMP_RET_ALLOW)
#define ALLOW(name) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##name, 0, 1), ALLOWED
#define NUMBER(number) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1), ALLOWED
#define COUNT(...) (sizeof((struct sock_filter[]){__VA_ARGS__}) / sizeof(struct sock_filter))
#define WHEN(name, ...) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##name, 0, COUNT(__VA_ARGS__)), __VA_ARGS__
#define IS(value) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1)

#define NAMESPACES                                                                                                     \
    (CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET | CLONE_NEWCGROUP |       \
     CLONE_PTRACE)

static struct sock_filter filter[] = {
    LOAD(arch),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0),
    RETURN(SECCOMP_RET_KILL_PROCESS),
    LOAD(nr),
    BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1), /* x32 */
    RETURN(SECCOMP_RET_KILL_PROCESS),

    /* files */
    ALLOW(read), ALLOW(write), ALLOW(pread64), ALLOW(pwrite64), ALLOW(readv), ALLOW(writev), ALLOW(preadv),
    ALLOW(pwritev), ALLOW(preadv2), ALLOW(pwritev2), ALLOW(open), ALLOW(openat), ALLOW(creat), ALLOW(close),
    ALLOW(close_range), ALLOW(stat), ALLOW(fstat), ALLOW(lstat), ALLOW(newfstatat), ALLOW(statx), ALLOW(statfs),
    ALLOW(fstatfs), ALLOW(lseek), ALLOW(access), ALLOW(faccessat), ALLOW(faccessat2), ALLOW(getdents), ALLOW(getdents64),
    ALLOW(getcwd), ALLOW(chdir), ALLOW(fchdir), ALLOW(rename), ALLOW(renameat), ALLOW(renameat2), ALLOW(mkdir),
    ALLOW(mkdirat), ALLOW(rmdir), ALLOW(link), ALLOW(linkat), ALLOW(unlink), ALLOW(unlinkat), ALLOW(symlink),
    ALLOW(symlinkat), ALLOW(readlink), ALLOW(readlinkat), ALLOW(chmod), ALLOW(fchmod), ALLOW(fchmodat), ALLOW(chown),
    ALLOW(fchown), ALLOW(lchown), ALLOW(fchownat), ALLOW(umask), ALLOW(truncate), ALLOW(ftruncate), ALLOW(fallocate),
    ALLOW(fsync), ALLOW(fdatasync), ALLOW(sync_file_range), ALLOW(utime), ALLOW(utimes), ALLOW(utimensat),
    ALLOW(futimesat), ALLOW(mknod), ALLOW(mknodat), ALLOW(getxattr), ALLOW(lgetxattr), ALLOW(fgetxattr),
    ALLOW(listxattr), ALLOW(llistxattr), ALLOW(flistxattr), ALLOW(fadvise64), ALLOW(readahead), ALLOW(sendfile),
    ALLOW(copy_file_range), ALLOW(splice), ALLOW(tee), ALLOW(dup), ALLOW(dup2), ALLOW(dup3), ALLOW(pipe), ALLOW(pipe2),
    /* waiting */
    ALLOW(poll), ALLOW(ppoll), ALLOW(select), ALLOW(pselect6), ALLOW(epoll_create), ALLOW(epoll_create1),
    ALLOW(epoll_ctl), ALLOW(epoll_wait), ALLOW(epoll_pwait), ALLOW(epoll_pwait2), ALLOW(eventfd), ALLOW(eventfd2),
    ALLOW(timerfd_create), ALLOW(timerfd_settime), ALLOW(timerfd_gettime), ALLOW(signalfd), ALLOW(signalfd4),
    /* memory */
    ALLOW(mmap), ALLOW(munmap), ALLOW(mremap), ALLOW(mprotect), ALLOW(madvise), ALLOW(brk), ALLOW(msync),
    ALLOW(mincore), ALLOW(membarrier), ALLOW(get_mempolicy),
    /* processes, threads, signals (all of this job's pid namespace only) */
    ALLOW(fork), ALLOW(vfork), ALLOW(execve), ALLOW(execveat), ALLOW(exit), ALLOW(exit_group), ALLOW(wait4),
    ALLOW(waitid), ALLOW(kill), ALLOW(tkill), ALLOW(tgkill), ALLOW(pidfd_open), ALLOW(pidfd_send_signal), ALLOW(getpid),
    ALLOW(getppid), ALLOW(gettid), ALLOW(getpgid), ALLOW(getpgrp), ALLOW(setpgid), ALLOW(getsid), ALLOW(setsid),
    ALLOW(getuid), ALLOW(geteuid), ALLOW(getgid), ALLOW(getegid), ALLOW(getresuid), ALLOW(getresgid), ALLOW(getgroups),
    ALLOW(capget), ALLOW(futex), ALLOW(set_robust_list), ALLOW(get_robust_list), ALLOW(set_tid_address), ALLOW(rseq),
    ALLOW(arch_prctl), ALLOW(sched_yield), ALLOW(sched_getaffinity), ALLOW(sched_getparam), ALLOW(sched_getscheduler),
    ALLOW(sched_get_priority_max), ALLOW(sched_get_priority_min), ALLOW(getpriority), ALLOW(getcpu),
    ALLOW(rt_sigaction), ALLOW(rt_sigprocmask), ALLOW(rt_sigreturn), ALLOW(rt_sigpending), ALLOW(rt_sigtimedwait),
    ALLOW(rt_sigsuspend), ALLOW(rt_sigqueueinfo), ALLOW(rt_tgsigqueueinfo), ALLOW(sigaltstack), ALLOW(pause),
    ALLOW(restart_syscall), NUMBER(449 /* futex_waitv */),
    /* clocks, limits, facts */
    ALLOW(time), ALLOW(gettimeofday), ALLOW(clock_gettime), ALLOW(clock_getres), ALLOW(clock_nanosleep),
    ALLOW(nanosleep), ALLOW(alarm), ALLOW(setitimer), ALLOW(getitimer), ALLOW(timer_create), ALLOW(timer_settime),
    ALLOW(timer_gettime), ALLOW(timer_getoverrun), ALLOW(timer_delete), ALLOW(times), ALLOW(getrusage),
    ALLOW(getrlimit), ALLOW(setrlimit), ALLOW(prlimit64), ALLOW(uname), ALLOW(sysinfo), ALLOW(getrandom),
    /* the descriptors that a job was given */
    ALLOW(sendto), ALLOW(recvfrom), ALLOW(sendmsg), ALLOW(recvmsg), ALLOW(shutdown), ALLOW(getsockopt),
    ALLOW(setsockopt), ALLOW(getsockname), ALLOW(getpeername),

    WHEN(clone3, FAIL(ENOSYS)),
    WHEN(clone, ARGUMENT(0), BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, NAMESPACES, 0, 1), FAIL(EPERM), ALLOWED),
    WHEN(socketpair, ARGUMENT(0), IS(AF_UNIX), ALLOWED, FAIL(EPERM)),
    WHEN(ioctl, ARGUMENT(1), IS(FIONREAD), ALLOWED, IS(FIONBIO), ALLOWED, IS(FIOCLEX), ALLOWED, IS(FIONCLEX), ALLOWED,
         IS(TCGETS), FAIL(ENOTTY), IS(TIOCGWINSZ), FAIL(ENOTTY), FAIL(EPERM)),
    /* flock, leases and notifications on files shared between jobs would be a channel; POSIX locks stay for sqlite */
    WHEN(fcntl, ARGUMENT(1), IS(F_DUPFD), ALLOWED, IS(F_DUPFD_CLOEXEC), ALLOWED, IS(F_GETFD), ALLOWED, IS(F_SETFD),
         ALLOWED, IS(F_GETFL), ALLOWED, IS(F_SETFL), ALLOWED, IS(F_GETLK), ALLOWED, IS(F_SETLK), ALLOWED, IS(F_SETLKW),
         ALLOWED, IS(1032 /* F_GETPIPE_SZ */), ALLOWED, IS(1033 /* F_ADD_SEALS */), ALLOWED,
         FAIL(EPERM)),
    WHEN(prctl, ARGUMENT(0), IS(PR_SET_NAME), ALLOWED, IS(PR_GET_NAME), ALLOWED, IS(PR_GET_DUMPABLE), ALLOWED,
         IS(PR_SET_PDEATHSIG), ALLOWED, FAIL(EPERM)),
    FAIL(EPERM),
};

int seccomp_install(void) {
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}
