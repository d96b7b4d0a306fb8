/* Running jobs against their limits: one look at each, rarer while a job sleeps, instead of a thread or timer per job. */
#include "jail.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BUSY_MS = 20, IDLE_MS = 250, JUDGE_GRACE_MS = 2000, START_GRACE_MS = 30000, ACTIVE_US = 100 };
enum { TICKS = 100 /* in a second, for /proc */, MAX_DEPTH = 256 /* as many processes as a job may have */ };

typedef struct {
    uint64_t cpu_ns, anonymous_kb;
    uint32_t processes;
} usage;

static ssize_t read_proc(const server *s, const char *path, char *text, size_t size) {
    int fd = openat(s->proc, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t got = read(fd, text, size - 1);
    close(fd);
    if (got >= 0) text[got] = 0;
    return got;
}

uint32_t anonymous_kb(const server *s, pid_t pid) {
    char path[64], text[128];
    unsigned long size, resident, shared;
    snprintf(path, sizeof path, "%d/statm", pid);
    if (read_proc(s, path, text, sizeof text) < 0 || sscanf(text, "%lu %lu %lu", &size, &resident, &shared) != 3) return 0;
    return (uint32_t)((resident - shared) * 4);
}

/* Proportional share: pages that forked processes share count once. Slower, so read only when the plain sum is over. */
static uint64_t proportional_kb(const server *s, pid_t pid) {
    char path[64], text[2048];
    snprintf(path, sizeof path, "%d/smaps_rollup", pid);
    if (read_proc(s, path, text, sizeof text) < 0) return anonymous_kb(s, pid);
    const char *line = strstr(text, "Pss_Anon:");
    return line ? strtoull(line + 9, NULL, 10) : 0;
}

/* A child between vfork and exec: its memory is its parent's. */
static bool shares_memory(pid_t parent, pid_t child) { return syscall(SYS_kcmp, parent, child, KCMP_VM, 0, 0) == 0; }

static uint64_t cpu_of(pid_t pid) {
    struct timespec t;
    clockid_t process_clock = (~(clockid_t)pid << 3) | 2;
    if (clock_gettime(process_clock, &t) != 0) return 0;
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* What children took that have ended and been waited for, and theirs: fields 16 and 17, in ticks. */
static uint64_t cpu_of_ended(const server *s, pid_t pid) {
    char path[64], text[1024];
    unsigned long user = 0, kernel = 0;
    snprintf(path, sizeof path, "%d/stat", pid);
    const char *name_end = read_proc(s, path, text, sizeof text) > 0 ? strrchr(text, ')') : NULL;
    if (name_end) sscanf(name_end, ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %lu %lu", &user, &kernel);
    return (user + kernel) * (1000000000u / TICKS);
}

static void visit_tree(const server *s, pid_t pid, pid_t parent, bool proportional, int depth, usage *total);

static void visit_children(const server *s, pid_t pid, const char *thread, bool proportional, int depth, usage *total) {
    char path[96], text[4096];
    snprintf(path, sizeof path, "%d/task/%.20s/children", pid, thread);
    if (read_proc(s, path, text, sizeof text) <= 0) return;
    for (char *rest = text, *word; (word = strtok_r(rest, " ", &rest));) {
        pid_t child = atoi(word);
        if (child > 0) visit_tree(s, child, pid, proportional, depth + 1, total);
    }
}

static uint64_t own_memory_kb(const server *s, pid_t pid, pid_t parent, bool proportional) {
    if (proportional) return parent && shares_memory(parent, pid) ? 0 : proportional_kb(s, pid);
    uint64_t held = anonymous_kb(s, pid), base = s->base_anon_kb; /* the warm interpreter's pages, shared with the server */
    return held > base ? held - base : 0;
}

static void visit_tree(const server *s, pid_t pid, pid_t parent, bool proportional, int depth, usage *total) {
    total->anonymous_kb += own_memory_kb(s, pid, parent, proportional);
    total->cpu_ns += cpu_of(pid) + cpu_of_ended(s, pid);
    total->processes++;
    if (depth > MAX_DEPTH) return;
    char path[64];
    snprintf(path, sizeof path, "%d/task", pid);
    int fd = openat(s->proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *threads = fd >= 0 ? fdopendir(fd) : NULL;
    if (threads == NULL) return;
    for (struct dirent *entry; (entry = readdir(threads));)
        if (entry->d_name[0] != '.') visit_children(s, pid, entry->d_name, proportional, depth, total);
    closedir(threads);
}

static bool over_output(const job *j) {
    return lseek(j->solution.out, 0, SEEK_CUR) > j->limits.output_bytes ||
           lseek(j->solution.err, 0, SEEK_CUR) > j->limits.output_bytes;
}

static bool over_memory(const server *s, job *j, usage *total) {
    visit_tree(s, j->solution.pid, 0, false, 0, total);
    j->many = total->processes > 1;
    if (j->by_cgroup) return false; /* the kernel holds it, and tells the peak at the end */
    uint64_t cap_kb = (uint64_t)j->limits.memory_mb << 10;
    if (total->anonymous_kb > cap_kb && j->many) {
        *total = (usage){0};
        visit_tree(s, j->solution.pid, 0, true, 0, total);
    }
    if (total->anonymous_kb + s->base_anon_kb > j->memory_kb) j->memory_kb = (uint32_t)total->anonymous_kb + s->base_anon_kb;
    return total->anonymous_kb > cap_kb;
}

/* The job's clock starts with its first instruction; on a machine so busy that it has not come to that, it starts anew. */
static bool extend(job *j, uint64_t now) {
    if (was_confined(&j->solution) || now > j->started_ns + START_GRACE_MS * 1000000ull) return false;
    j->deadline_ns = now + j->limits.wall_ms * 1000000ull;
    return true;
}

static void check_solution(const server *s, job *j, uint64_t now) {
    uint64_t cpu = cpu_of(j->solution.pid);
    bool active = cpu > j->cpu_ns + ACTIVE_US * 1000ull || j->many;
    j->interval_ns = active ? BUSY_MS * 1000000ull : j->interval_ns * 2;
    if (j->interval_ns > IDLE_MS * 1000000ull) j->interval_ns = IDLE_MS * 1000000ull;
    j->cpu_ns = cpu;
    usage total = {.cpu_ns = cpu};
    if (now >= j->deadline_ns && !extend(j, now)) return job_stop(j, WALL);
    if (active && over_output(j)) return job_stop(j, OUTPUT);
    if (active && over_memory(s, j, (total = (usage){0}, &total))) return job_stop(j, MEMORY);
    if (total.cpu_ns > j->limits.cpu_ms * 1000000ull) job_stop(j, CPU);
}

static void check_job(const server *s, job *j, uint64_t now) {
    if (j->solution.pid && j->reason == NONE) check_solution(s, j, now);
    if (j->judge.pid && now >= j->deadline_ns + JUDGE_GRACE_MS * 1000000ull) {
        if (j->reason == NONE) j->reason = WALL;
        kill(j->judge.pid, SIGKILL);
    }
    j->check_ns = now + j->interval_ns;
    if (j->check_ns > j->deadline_ns && now < j->deadline_ns) j->check_ns = j->deadline_ns;
}

void jobs_sweep(server *s, uint64_t now) {
    s->sweep_ns = 0;
    for (uint32_t i = 0; i < s->live_count; i++) {
        job *j = s->jobs[s->live[i]];
        if (now >= j->check_ns) check_job(s, j, now);
        if (s->sweep_ns == 0 || j->check_ns < s->sweep_ns) s->sweep_ns = j->check_ns;
    }
}
