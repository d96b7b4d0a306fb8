/* Running jobs against their limits: one look at each, rarer while a job sleeps, instead of a thread or timer per job. */
#include "jail.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BUSY_MS = 20, IDLE_MS = 250 /* where hundreds sleep */, JUDGE_GRACE_MS = 2000, START_GRACE_MS = 30000, ACTIVE_US = 100 };
enum { WAITED_MS = 30000, WAITED_WALLS = 7 /* times its wall limit: a job is given back no more of its waits than either */ };
enum { SOCKET_KB = 208 /* that one may have sent and nobody read */, PIPE_KB = 64, FEW_DESCRIPTORS = 256 };
/* One descriptor watched by one epoll. An epoll watches a file under each number that a descriptor of it ever had, so that a
 * few descriptors are enough for millions; and all jobs' together are at most so many for each user. */
enum { WATCH_BYTES = 256, MOST_WATCHED = 1 << 14, EPOLL_WATCHES = 8 /* for which an epoll counts by itself: each is read */ };
enum { MOST_SHARED = 8 /* times its limit: what processes may have that share pages, all counted for each */ };
enum { REST = 3 /* times as long as a look took, no other follows: the server is for others, too */ };
/* Areas of a process' memory, which the kernel holds too: each has a line. */
enum { PAGES_IN_TABLE = 512, AREA_BYTES = 256, LINE_BYTES = 64, MOST_AREAS = 65530, MANY_LINES_BYTES = 1 << 16, WIDE_KB = 32 << 10 };
enum { TICKS = 100 /* in a second, for /proc */, MAX_DEPTH = 256 /* as many processes as a job may have */ };

typedef struct {
    uint64_t cpu_ns, anonymous_kb, base_kb; /* base_kb: the warm interpreter's, once for each process that has them */
    uint32_t processes, descriptors, watched;
} usage;

typedef struct {
    uint64_t ended_ns, stack;
} program_facts;

typedef struct {
    const server *s;
    bool proportional;
    bool descriptors, held; /* whether to look at them, and count what the kernel may hold for each */
    usage total;
} walk;

static ssize_t read_proc(const server *s, const char *path, char *text, size_t size) {
    int fd = openat(s->proc, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    ssize_t got = read(fd, text, size - 1);
    close(fd);
    if (got >= 0) text[got] = 0;
    return got;
}

/* Private pages of the process that this thread belongs to; false where the thread has exited and so shows none. */
static bool read_anonymous(const server *s, const char *folder, uint64_t *kb, uint64_t *mapped_kb) {
    char path[96], text[128];
    unsigned long size = 0, resident, shared;
    snprintf(path, sizeof path, "%s/statm", folder);
    if (read_proc(s, path, text, sizeof text) < 0 || sscanf(text, "%lu %lu %lu", &size, &resident, &shared) != 3) return false;
    *kb = (resident - shared) * 4;
    *mapped_kb = size * 4;
    return size > 0;
}

/* Bytes of text that tell a process' areas, up to `most`. */
static size_t area_bytes(const server *s, const char *folder, size_t most) {
    char path[96], text[4096];
    size_t seen = 0;
    snprintf(path, sizeof path, "%s/maps", folder);
    int fd = openat(s->proc, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    for (ssize_t got; seen < most && (got = read(fd, text, sizeof text)) > 0;) seen += (size_t)got;
    close(fd);
    return seen;
}

/* What the kernel holds for the areas of a process that has mapped so much beyond what the server has: where they are many
 * more than the server's, as if there were as many as may be, one to a page; and for each 2 MB a page of its page table, which
 * reading alone makes. */
static uint64_t areas_kb(const server *s, const char *folder, uint64_t mapped_kb) {
    size_t most = s->base_area_bytes + MANY_LINES_BYTES, seen = area_bytes(s, folder, most);
    uint64_t pages = mapped_kb / 4, areas = seen < most ? seen / LINE_BYTES : pages < MOST_AREAS ? pages : MOST_AREAS;
    return (areas * AREA_BYTES >> 10) + mapped_kb / PAGES_IN_TABLE;
}

/* Proportional share: pages that forked processes share count once. Slower, so read only when the plain sum is over. */
static bool read_proportional(const server *s, const char *folder, uint64_t *kb) {
    char path[96], text[2048];
    snprintf(path, sizeof path, "%s/smaps_rollup", folder);
    const char *line = read_proc(s, path, text, sizeof text) > 0 ? strstr(text, "Pss_Anon:") : NULL;
    if (line == NULL) return false;
    *kb = strtoull(line + 9, NULL, 10);
    return true;
}

/* As a child between vfork and exec has its parent's memory. */
static bool shares(int what, pid_t one, pid_t other) { return syscall(SYS_kcmp, one, other, what, 0, 0) == 0; }

static uint64_t cpu_of(pid_t pid) {
    struct timespec t;
    clockid_t process_clock = (clockid_t)(~(uint32_t)pid << 3 | 2);
    if (clock_gettime(process_clock, &t) != 0) return 0;
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Fields 16, 17 and 28: what children took that have ended and been waited for, and theirs, in ticks; and where the stack
 * began, which says whether two processes still run the one program that both were forked from. */
static program_facts facts_of(const server *s, const char *folder) {
    char path[96], text[1024];
    unsigned long user = 0, kernel = 0, stack = 0;
    snprintf(path, sizeof path, "%s/stat", folder);
    const char *rest = read_proc(s, path, text, sizeof text) > 0 ? strrchr(text, ')') : NULL;
    if (rest)
        sscanf(rest, ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %lu %lu "
               "%*d %*d %*d %*d %*u %*u %*d %*u %*u %*u %lu", &user, &kernel, &stack);
    return (program_facts){.ended_ns = (user + kernel) * (1000000000u / TICKS), .stack = stack};
}

void watch_begin(server *s) {
    uint64_t held = 0, mapped = 0;
    read_anonymous(s, "self", &held, &mapped);
    s->base_anon_kb = (uint32_t)held;
    s->base_area_bytes = area_bytes(s, "self", SIZE_MAX);
    s->base_stack = facts_of(s, "self").stack;
}

/* False where this thread has exited: another of its process can tell. */
static bool add_memory(walk *w, const char *folder, pid_t thread, pid_t parent) {
    uint64_t held, mapped, base = 0, base_mapped = (uint64_t)w->s->base_mb << 10;
    if (!read_anonymous(w->s, folder, &held, &mapped)) return false;
    if (parent && mapped > base_mapped + WIDE_KB) /* of one process alone they are too few to matter */
        w->total.anonymous_kb += areas_kb(w->s, folder, mapped - base_mapped);
    if (w->proportional && parent && shares(KCMP_VM, parent, thread)) return true;
    /* Unreadable, all of its pages are its own; unless it has ended meanwhile and has none. */
    if (w->proportional && !read_proportional(w->s, folder, &held) && !read_anonymous(w->s, folder, &held, &mapped)) return false;
    if (facts_of(w->s, folder).stack == w->s->base_stack) base = held < w->s->base_anon_kb ? held : w->s->base_anon_kb;
    if (w->proportional) { /* all shares of the warm interpreter's pages together are no more than these */
        w->total.anonymous_kb += held;
        w->total.base_kb = w->total.base_kb + base < w->s->base_anon_kb ? w->total.base_kb + base : w->s->base_anon_kb;
    } else { /* they are the server's, too */
        w->total.anonymous_kb += held - base;
        w->total.base_kb += base;
    }
    return true;
}

/* A folder of /proc, NULL where its process or thread is gone. */
static DIR *open_folder(const server *s, const char *path) {
    int fd = openat(s->proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *folder = fd >= 0 ? fdopendir(fd) : NULL;
    if (folder == NULL && fd >= 0) close(fd);
    return folder;
}

/* How many descriptors a thread has, by the size that its folder has since Linux 6.2; none where it has exited. */
static uint32_t descriptors_of(const server *s, const char *folder) {
    char path[96];
    struct stat facts;
    snprintf(path, sizeof path, "%s/fd", folder);
    return fstatat(s->proc, path, &facts, 0) == 0 ? (uint32_t)facts.st_size : 0;
}

/* What an epoll watches: each has a line. */
static uint32_t watched_by(const server *s, const char *folder, const char *number) {
    char path[96], text[4096];
    uint32_t lines = 0;
    snprintf(path, sizeof path, "%s/fdinfo/%.10s", folder, number);
    int fd = openat(s->proc, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    for (ssize_t got; lines <= MOST_WATCHED && (got = read(fd, text, sizeof text)) > 0;)
        for (ssize_t i = 0; i < got; i++) lines += text[i] == '\n';
    close(fd);
    return lines;
}

/* What a thread's descriptors may hold: written and not yet read, or watched by an epoll. A program that its user may not read
 * does not show which they are: then all are the worst. */
static void add_held(walk *w, const char *folder, uint32_t count) {
    char path[96], target[24];
    struct stat facts;
    snprintf(path, sizeof path, "%s/fd", folder);
    DIR *all = open_folder(w->s, path);
    uint64_t kb = all == NULL ? (uint64_t)count * SOCKET_KB : 0;
    for (struct dirent *entry; all != NULL && w->total.watched <= MOST_WATCHED && (entry = readdir(all));) {
        if (readlinkat(dirfd(all), entry->d_name, target, sizeof target) > 20 && !memcmp(target, "anon_inode:[eventpoll", 21))
            w->total.watched += EPOLL_WATCHES + watched_by(w->s, folder, entry->d_name);
        else if (w->held && fstatat(dirfd(all), entry->d_name, &facts, 0) == 0)
            kb += S_ISSOCK(facts.st_mode) ? SOCKET_KB : S_ISFIFO(facts.st_mode) ? PIPE_KB : 0;
    }
    if (all != NULL) closedir(all);
    w->total.anonymous_kb += kb;
}

static void visit_process(walk *w, pid_t pid, pid_t parent, int depth);

static void visit_children(walk *w, const char *folder, pid_t thread, int depth) {
    char path[96], text[4096];
    snprintf(path, sizeof path, "%s/children", folder);
    if (read_proc(w->s, path, text, sizeof text) <= 0) return;
    for (char *rest = text, *word; (word = strtok_r(rest, " ", &rest));) {
        pid_t child = atoi(word);
        if (child > 0) visit_process(w, child, thread, depth + 1);
    }
}

static void visit_process(walk *w, pid_t pid, pid_t parent, int depth) {
    char folder[64];
    bool weighed = false;
    pid_t counted = 0; /* the thread whose descriptors were the last to count: others may have their own */
    snprintf(folder, sizeof folder, "%d", pid);
    w->total.cpu_ns += cpu_of(pid) + facts_of(w->s, folder).ended_ns;
    w->total.processes++;
    snprintf(folder, sizeof folder, "%d/task", pid);
    DIR *threads = open_folder(w->s, folder);
    if (threads == NULL) return;
    for (struct dirent *entry; (entry = readdir(threads));) {
        pid_t thread = atoi(entry->d_name);
        if (thread <= 0) continue;
        snprintf(folder, sizeof folder, "%d/task/%d", pid, thread);
        weighed = weighed || add_memory(w, folder, thread, parent);
        uint32_t count = counted && shares(KCMP_FILES, counted, thread) ? 0 : descriptors_of(w->s, folder);
        w->total.descriptors += count;
        if (count && w->descriptors) add_held(w, folder, count);
        if (count) counted = thread;
        if (depth < MAX_DEPTH) visit_children(w, folder, thread, depth);
    }
    closedir(threads);
}

static usage usage_of(walk w, pid_t pid) {
    visit_process(&w, pid, 0, 0);
    if (w.proportional && w.total.base_kb > w.total.anonymous_kb) w.total.base_kb = w.total.anonymous_kb;
    if (w.proportional) w.total.anonymous_kb -= w.total.base_kb;
    w.total.anonymous_kb += (uint64_t)w.total.watched * WATCH_BYTES >> 10;
    return w.total;
}

static bool over_output(const job *j) {
    return lseek(j->solution.out, 0, SEEK_CUR) > j->limits.output_bytes ||
           lseek(j->solution.err, 0, SEEK_CUR) > j->limits.output_bytes;
}

/* Closer looks, which may take a second, are rarer the more jobs there are that may call for them; meanwhile the last counts.
 * Where a cgroup holds memory the kernel counts it, and tells the peak at the end: only what epolls watch is looked at. */
static bool over_memory(const server *s, job *j, usage *total) {
    uint64_t begun = now_ns();
    *total = usage_of((walk){.s = s}, j->solution.pid);
    uint64_t end = now_ns();
    j->rest_ns = (end - begun) * REST;
    j->many = total->processes > 1;
    bool polled = !j->by_cgroup && !jail_without("polling");
    uint64_t cap_kb = polled ? (uint64_t)j->limits.memory_mb << 10 : UINT64_MAX / MOST_SHARED;
    if (total->anonymous_kb > MOST_SHARED * cap_kb) return true; /* by shares they take seconds to read */
    uint64_t count = total->descriptors, most_watched = count * count / 4 * j->limits.files; /* by half of them, the other half */
    walk look = {.s = s, .proportional = j->many && polled, .held = count > FEW_DESCRIPTORS && polled};
    look.descriptors = look.held || most_watched > MOST_WATCHED;
    uint64_t copied_kb = total->base_kb > s->base_anon_kb ? total->base_kb - s->base_anon_kb : 0; /* if each wrote to all of it */
    if (look.descriptors || (total->anonymous_kb + copied_kb > cap_kb && j->many)) {
        if (end < j->close_ns) return !j->many && total->anonymous_kb > cap_kb;
        *total = usage_of(look, j->solution.pid);
        if ((total->anonymous_kb > cap_kb && j->many) || total->watched > MOST_WATCHED) {
            usage again = usage_of(look, j->solution.pid); /* of processes that begin and end while they are read: once more */
            if (again.anonymous_kb < total->anonymous_kb) *total = again;
        }
        j->close_ns = now_ns() + (now_ns() - end) * REST * s->live_count;
    }
    if (polled && total->anonymous_kb + s->base_anon_kb > j->memory_kb)
        j->memory_kb = (uint32_t)total->anonymous_kb + s->base_anon_kb;
    return total->anonymous_kb > cap_kb || total->watched > MOST_WATCHED;
}

/* For how many ns the present threads of a process were ready to run and had no processor. */
static uint64_t waits_of(const server *s, pid_t pid) {
    char path[64], text[128];
    uint64_t total = 0;
    snprintf(path, sizeof path, "%d/task", pid);
    DIR *threads = open_folder(s, path);
    if (threads == NULL) return 0;
    for (struct dirent *entry; (entry = readdir(threads));) {
        unsigned long waited = 0;
        snprintf(path, sizeof path, "%d/task/%d/schedstat", pid, atoi(entry->d_name));
        if (read_proc(s, path, text, sizeof text) > 0) sscanf(text, "%*u %lu", &waited);
        total += waited;
    }
    closedir(threads);
    return total;
}

/* The job's clock stands still while the job waits for a processor: else its neighbours would decide about its verdict.
 * A quarter is added for waits that the kernel does not tell: those under way, and the last of a thread that has ended. */
static void give_back_waits(const server *s, job *j) {
    uint64_t seen = waits_of(s, j->solution.pid) + (j->judge.pid ? waits_of(s, j->judge.pid) : 0);
    if (seen > j->seen_ns) j->waited_ns += seen - j->seen_ns;
    j->seen_ns = seen;
    uint64_t most = WAITED_WALLS * j->limits.wall_ms, due = j->waited_ns + j->waited_ns / 4;
    if (most > WAITED_MS) most = WAITED_MS;
    if (due > most * 1000000ull) due = most * 1000000ull;
    j->deadline_ns += due - j->given_ns;
    j->given_ns = due;
}

/* The clock starts with the job's first instruction; on a machine so busy that it has not come to that, it starts anew. */
static bool extend(job *j, uint64_t now) {
    if (was_confined(&j->solution) || now > j->started_ns + START_GRACE_MS * 1000000ull) return false;
    j->deadline_ns = now + j->limits.wall_ms * 1000000ull;
    return true;
}

static void check_solution(const server *s, job *j, uint64_t now) {
    uint64_t cpu = cpu_of(j->solution.pid), idle_ms = BUSY_MS + s->live_count;
    bool active = cpu > j->cpu_ns + ACTIVE_US * 1000ull || j->many;
    if (idle_ms > IDLE_MS) idle_ms = IDLE_MS;
    j->interval_ns = active ? BUSY_MS * 1000000ull : j->interval_ns * 2;
    if (j->interval_ns > idle_ms * 1000000ull) j->interval_ns = idle_ms * 1000000ull;
    j->cpu_ns = cpu;
    usage total = {.cpu_ns = cpu};
    if (active || now >= j->deadline_ns) give_back_waits(s, j);
    if (now >= j->deadline_ns && !extend(j, now)) return job_stop(j, WALL);
    if (active && over_output(j)) return job_stop(j, OUTPUT);
    if (active && over_memory(s, j, &total)) return job_stop(j, MEMORY);
    if (total.cpu_ns > j->limits.cpu_ms * 1000000ull) job_stop(j, CPU);
}

static void check_job(const server *s, job *j, uint64_t now) {
    if (j->solution.pid && j->reason == NONE) check_solution(s, j, now);
    if (j->judge.pid && now >= j->deadline_ns + JUDGE_GRACE_MS * 1000000ull) {
        if (j->reason == NONE) j->reason = WALL;
        kill(j->judge.pid, SIGKILL);
    }
    j->check_ns = now + (j->rest_ns > j->interval_ns ? j->rest_ns : j->interval_ns);
    if (j->check_ns > j->deadline_ns && now < j->deadline_ns) j->check_ns = j->deadline_ns;
}

/* A job that takes long to look at is the last for now: what came meanwhile goes first. */
void jobs_sweep(server *s, uint64_t now) {
    uint64_t late = now + BUSY_MS * 1000000ull;
    s->sweep_ns = 0;
    for (uint32_t i = 0; i < s->live_count; i++) {
        job *j = s->jobs[s->live[i]];
        if (now >= j->check_ns && now_ns() < late) check_job(s, j, now);
        if (s->sweep_ns == 0 || j->check_ns < s->sweep_ns) s->sweep_ns = j->check_ns;
    }
}
