/* cgroup v2: a group for each child, below the cell's own, in which the kernel counts all that its processes hold: private
 * pages, /tmp, captured output, page tables. Only where the host was given groups to make (fastgrpo_sandbox/cgroup.py); elsewhere
 * `groups` is -1 and no child costs a system call more. A group is made once (0.2 ms) and serves child after child. It
 * keeps its highest use and its count of kills for ever, so one that has seen much is removed in place of reused: next to
 * the job that touched so many pages that costs nothing.
 */
#include "jail.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OWN_MB = 4, REUSE_KB = 16 << 10 }; /* a child that does next to nothing has about 1 MB of its own */

static int open_file(const server *s, const group *g, const char *file, int flags) {
    char path[64];
    snprintf(path, sizeof path, "%u/%s", g->number, file);
    return openat(s->groups, path, flags | O_CLOEXEC);
}

static bool put(const server *s, const group *g, const char *file, const char *text) {
    int fd = open_file(s, g, file, O_WRONLY);
    if (fd < 0) return false;
    bool fine = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    close(fd);
    return fine;
}

static void get(const server *s, const group *g, const char *file, char *text, size_t size) {
    text[0] = 0;
    int fd = open_file(s, g, file, O_RDONLY);
    if (fd < 0) return;
    ssize_t got = read(fd, text, size - 1);
    text[got > 0 ? got : 0] = 0;
    close(fd);
}

static void remove_group(const server *s, const group *g) {
    char name[16];
    snprintf(name, sizeof name, "%u", g->number);
    unlinkat(s->groups, name, AT_REMOVEDIR); /* what stays is removed by the host with the cell */
}

/* Without swap the kernel has no memory.swap.max, and needs none. */
static group make_group(server *s) {
    char name[16];
    group g = {.number = ++s->last_group};
    snprintf(name, sizeof name, "%u", g.number);
    if (mkdirat(s->groups, name, 0755) != 0) return (group){0};
    put(s, &g, "memory.swap.max", "0");
    if (put(s, &g, "memory.oom.group", "1")) return g;
    remove_group(s, &g);
    return (group){0};
}

group group_take(server *s) {
    if (s->groups < 0) return (group){0};
    return s->free_count > 0 ? s->free_groups[--s->free_count] : make_group(s);
}

int group_open(const server *s, const group *g) { return g->number ? open_file(s, g, "", O_PATH | O_DIRECTORY) : -1; }

bool group_limit(const server *s, group *g, const job_limits *l) {
    char text[32];
    if (g->number == 0) return false;
    if (g->memory_mb == l->memory_mb && g->processes == l->processes) return true;
    snprintf(text, sizeof text, "%llu", ((unsigned long long)l->memory_mb + OWN_MB) << 20);
    bool fine = put(s, g, "memory.max", text);
    snprintf(text, sizeof text, "%u", l->processes);
    fine = put(s, g, "pids.max", text) && fine;
    g->memory_mb = fine ? l->memory_mb : 0;
    g->processes = l->processes;
    return fine;
}

bool group_ran_out(const server *s, group *g) {
    char text[256];
    if (g->number == 0) return false;
    get(s, g, "memory.events", text, sizeof text);
    const char *line = strstr(text, "\noom "); /* of its own limit: kills for want of the machine's are not the job's doing */
    bool out = line != NULL && atoi(line + 5) > 0;
    g->spent = g->spent || out;
    return out;
}

uint32_t group_peak_kb(const server *s, group *g) {
    char text[32];
    if (g->number == 0) return 0;
    get(s, g, "memory.peak", text, sizeof text);
    uint64_t kb = strtoull(text, NULL, 10) >> 10;
    if (kb <= REUSE_KB) return 0; /* perhaps an earlier child's */
    g->spent = true;
    return (uint32_t)kb;
}

void group_release(server *s, group *g) {
    if (g->number && g->spent) remove_group(s, g);
    else if (g->number) s->free_groups[s->free_count++] = *g;
    *g = (group){0};
}
