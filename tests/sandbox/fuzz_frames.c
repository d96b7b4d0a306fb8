/* Random frames at both sides of the fork server's parser: `fuzz_frames COUNT [SEED]`, built with sanitizers.
 *
 * The real job.c, server.c and arena.c over children that are sockets without a process. Each job is sent pieces of valid,
 * mutated and random frames by its children and by the host. Its report must come once, its lengths must add up, and at the
 * end neither a job nor a descriptor may be left.
 */
#include "../../csrc/server.c"

#include "../../csrc/job.c"

#include <dirent.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { IDS = 4, NOBODY = 1 << 30 /* more than any pid */, MOST = 96 };

static server fuzzed;
static int far_ends[2 * MAX_JOBS];
static int spawned;
static uint64_t state;

static uint32_t below(uint32_t most) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % most;
}

/* ---- what the fuzzer leaves out: processes, groups, the watch over running jobs ---- */

int spawn_child(server *s, process *p) {
    int ends[2];
    (void)s;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) != 0) abort();
    far_ends[spawned] = ends[1];
    *p = (process){.pid = NOBODY + spawned++, .channel = ends[0], .out = memfd_create("out", 0), .err = memfd_create("err", 0)};
    return 0;
}

void close_process(server *s, process *p) {
    (void)s;
    close(p->channel);
    close(p->out);
    close(p->err);
    *p = (process){.channel = -1, .out = -1, .err = -1};
}

bool was_confined(const process *p) { return p->pid >= 0 && below(8) > 0; }
int set_output_cap(const process *p, uint32_t bytes) { return ftruncate(p->out, bytes) | ftruncate(p->err, bytes); }
bool group_limit(const server *s, group *g, const job_limits *l) { return s == NULL || g == NULL || l == NULL; }
bool group_ran_out(const server *s, group *g) { return s == NULL || g == NULL; }
uint32_t group_peak_kb(const server *s, group *g) { return s == NULL || g == NULL; }
void watch_begin(server *s) { (void)s; }
void jobs_sweep(server *s, uint64_t now) { s->sweep_ns = now; }

/* ---- frames ---- */

static size_t child_frames(char *data) {
    size_t length = 0;
    for (uint32_t frames = below(4); frames > 0; frames--) {
        child_header header = {.length = below(12), .kind = below(2) ? CHILD_RESULT : CHILD_CALL};
        memcpy(data + length, &header, sizeof header);
        length += sizeof header + header.length;
    }
    for (uint32_t changes = below(3); changes > 0 && length > 0; changes--) data[below((uint32_t)length)] ^= (char)below(256);
    return length;
}

static void say(int id, bool judge) {
    char data[MOST] = {0};
    job *j = fuzzed.jobs[id];
    process *p = j == NULL ? NULL : judge && j->judged ? &j->judge : &j->solution;
    if (p == NULL || p->pid == 0) return;
    int far = far_ends[p->pid - NOBODY];
    for (size_t length = child_frames(data), sent = 0; sent < length;) {
        size_t piece = 1 + below((uint32_t)(length - sent));
        if (write(far, data + sent, piece) < 0) return;
        sent += piece;
        job_event(&fuzzed, event_key(j, p), EPOLLIN | (below(4) ? 0 : EPOLLOUT));
    }
    if (below(8) == 0) shutdown(far, below(2) ? SHUT_RD : SHUT_WR);
}

static void end(int id) {
    for (job *j; (j = fuzzed.jobs[id]) != NULL;) {
        process *p = j->judge.pid && (below(2) || j->solution.pid == 0) ? &j->judge : &j->solution;
        int status = (const int[]){0, SIGKILL, SIGSEGV, 256}[below(4)];
        close(far_ends[p->pid - NOBODY]);
        process_reaped(&fuzzed, p->pid, status, below(1000), below(1000));
    }
}

/* One frame of the host's: mostly a start that is sound, else anything of a known kind. */
static void host_says(int id) {
    struct __attribute__((packed)) {
        host_header header;
        start_header start;
        char data[MOST];
    } frame = {.header = {.job = (uint32_t)id, .kind = HOST_START}};
    frame.start = (start_header){.limits = {1000, 1000, 64, 8, below(64), 1, 64}, .stdin_bytes = below(8)};
    frame.start.payload_bytes = below(8);
    frame.start.judge_bytes = below(2) * below(8);
    size_t data = frame.start.stdin_bytes + frame.start.payload_bytes + frame.start.judge_bytes;
    frame.header.length = (uint32_t)(sizeof frame.start + data);
    if (below(4) == 0) frame.header.kind = (uint8_t)(HOST_START + below(3));
    if (below(4) == 0) frame.header.length = below(sizeof frame.start + MOST);
    if (below(8) == 0) frame.header.job = below(2 * MAX_JOBS);
    if (below(8) == 0) ((char *)&frame.start)[below(sizeof frame.start)] ^= (char)below(256);
    buffer_append(&fuzzed.from_host, &frame, sizeof frame.header + frame.header.length);
    if (host_frames(&fuzzed) != 0) abort();
}

/* What the host is told: whole frames, and reports whose parts fill them. */
static void check_told(void) {
    buffer *told = &fuzzed.to_host;
    while (told->end > told->start) {
        host_header header;
        done_header done;
        if (told->end - told->start < sizeof header) abort();
        memcpy(&header, told->data + told->start, sizeof header);
        buffer_consume(told, sizeof header);
        if (header.length > told->end - told->start) abort();
        if (header.kind == SERVER_DONE) {
            memcpy(&done, told->data + told->start, sizeof done);
            size_t parts = (size_t)done.stdout_bytes + done.stderr_bytes + done.result_bytes + done.verdict_bytes;
            if (header.length != sizeof done + parts || (done.results > 1 && done.reason == NONE)) abort();
        } else if (header.kind != SERVER_DATA) {
            abort();
        }
        buffer_consume(told, header.length);
    }
}

static int descriptors(void) {
    int count = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (readdir(folder) != NULL) count++;
    closedir(folder);
    return count;
}

static void end_all(void) {
    for (int id = 0; id < MAX_JOBS; id++) end(id);
    if (fuzzed.live_count != 0) abort();
    spawned = 0;
}

int main(int count, char **words) {
    uint64_t rounds = count > 1 ? strtoull(words[1], NULL, 10) : 100000;
    state = count > 2 ? strtoull(words[2], NULL, 10) : 1;
    signal(SIGPIPE, SIG_IGN);
    arena_open();
    fuzzed.job_epoll = epoll_create1(0);
    int before = descriptors();
    for (uint64_t round = 0; round < rounds; round++) {
        int id = (int)below(IDS);
        host_says(id);
        say(id, below(2));
        if (below(3) == 0) end(id);
        if (spawned > MAX_JOBS || fuzzed.live_count > 32) end_all(); /* a live job holds up to eight descriptors */
        check_told();
    }
    end_all();
    check_told();
    if (descriptors() != before) abort();
    printf("%llu rounds\n", (unsigned long long)rounds);
    return 0;
}
