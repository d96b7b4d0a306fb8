/* The warm interpreter's memory, arranged so that a fork copies little and a child writes to few of its pages.
 *
 * A child is forked, runs for a millisecond and ends, so its cost is that of its page tables and of the pages it copies.
 * Sealing: free blocks lie scattered over the warm heaps, and each that a child takes would copy a page. They are taken
 * here for good, so that a child's own objects lie together in fresh pages. Packing: program, libraries and heaps become
 * a few mappings of huge pages, so that a fork copies one entry for 2 MB where it copied 512, and no page of a library
 * has to be found again. The packed pages are writable and executable: a job could map such pages for itself anyway.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "jail.h"

#include <fcntl.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if !__GLIBC_PREREQ(2, 33)
#define mallinfo2 mallinfo /* its fields are int: enough for a heap that has just been warmed up */
#endif

enum { POOL_BYTES = 16384, FIRST_BLOCK = 48, NEXT_OFFSET = 40 /* in a pool's head: where blocks begin that were never given */ };
enum { SMALLEST = 16, LARGEST_SMALL = 512, SEAL_BYTES = 1 << 18 };
enum { LARGEST_HOLE = 1 << 16, MAX_AREAS = 1024, MAPS_BYTES = 1 << 18, COLLAPSE = 25 /* MADV_COLLAPSE, Linux 6.1 */ };
#define HUGE ((uintptr_t)2 << 20)
#define SMALLEST_RUN ((uintptr_t)512 << 10)
#define LARGEST_RUN ((uintptr_t)128 << 20)
#define LARGEST_GAP ((uintptr_t)2 << 20)

/* ---- sealing ---- */

/* Whether this is the second block of a pool that has given no third. One that was used before and is all free again may
 * give its first two in order as well, but those after them in any. */
static bool began_pool(const char *first, const char *block, size_t size) {
    uint32_t next;
    if (first == NULL || ((uintptr_t)first & (POOL_BYTES - 1)) != FIRST_BLOCK || block != first + size) return false;
    memcpy(&next, first - FIRST_BLOCK + NEXT_OFFSET, sizeof next);
    return next <= FIRST_BLOCK + 3 * size;
}

/* Takes the free blocks of one size of CPython's allocator; it begins a new pool only when no other has a free block. */
static void seal_blocks(size_t size) {
    char *last = NULL;
    for (size_t taken = 0; taken < SEAL_BYTES; taken += size) {
        char *block = PyObject_Malloc(size);
        if (block == NULL || began_pool(last, block, size)) return;
        last = block;
    }
}

/* Takes libc's free blocks below the end of its heap. */
static void seal_holes(void) {
    char *end = (char *)sbrk(0) - mallinfo2().keepcost;
    for (size_t size = LARGEST_HOLE; size >= SMALLEST; size -= SMALLEST) {
        char *block;
        while ((block = malloc(size)) != NULL && block < end) {}
        free(block);
    }
}

void image_seal(void) {
    for (size_t size = SMALLEST; size <= LARGEST_SMALL; size += SMALLEST) seal_blocks(size);
    seal_holes();
}

/* ---- packing ---- */

typedef struct {
    uintptr_t start, end;
    bool fixed, readable;
} area;

static size_t read_maps(int proc, char *text) {
    int fd = openat(proc, "self/maps", O_RDONLY | O_CLOEXEC);
    size_t length = 0;
    for (ssize_t got; fd >= 0 && (got = read(fd, text + length, MAPS_BYTES - 1 - length)) > 0;) length += (size_t)got;
    if (fd >= 0) close(fd);
    text[length] = 0;
    return length;
}

/* Large and never written, as libraries reserve it: a copy would fill it with pages of zeros. */
static bool mostly_absent(const area *a) {
    unsigned char present[512];
    size_t pages = 0, whole = (a->end - a->start) / 4096, step = sizeof present;
    if (a->end - a->start < HUGE) return false;
    if (a->end - a->start > LARGEST_RUN) return true; /* never packed; and a sanitizer's are too long to look through */
    for (size_t at = 0; at < whole; at += step) {
        size_t count = whole - at < step ? whole - at : step;
        if (mincore((void *)(a->start + at * 4096), count * 4096, present) != 0) return true;
        for (size_t i = 0; i < count; i++) pages += present[i] & 1;
    }
    return pages < whole / 8;
}

/* What lies where; the kernel's own mappings and the stack stay. */
static int list_areas(int proc, char *text, area *areas) {
    int count = 0;
    if (read_maps(proc, text) == 0) return 0;
    for (char *rest = text, *line; count < MAX_AREAS && (line = strtok_r(rest, "\n", &rest));) {
        char protection[5];
        unsigned long file;
        area *a = &areas[count++];
        if (sscanf(line, "%lx-%lx %4s %*s %*s %lu", &a->start, &a->end, protection, &file) != 4) return 0;
        a->readable = protection[0] == 'r';
        a->fixed = strchr(line, '[') != NULL ? strstr(line, "[heap]") == NULL : file == 0 && mostly_absent(a);
    }
    return count;
}

/* Copies areas [first, last] to `copy`, which stands for the range from `start`. Nothing may change them meanwhile. */
static bool copy_areas(int memory, const area *areas, int first, int last, char *copy, uintptr_t start) {
    for (int i = first; i <= last; i++) {
        const area *a = &areas[i];
        for (uintptr_t at = a->start; a->readable && at < a->end;) {
            ssize_t got = pread(memory, copy + (at - start), a->end - at, (off_t)at);
            if (got <= 0) return false;
            at += (uintptr_t)got;
        }
    }
    return true;
}

/* Puts a copy in huge pages in the place of [start, end); on any failure all stays as it was. */
static void pack_run(int memory, const area *areas, int first, int last, uintptr_t start, uintptr_t end) {
    size_t bytes = end - start, room = bytes + 3 * HUGE; /* enough that the copy never overlaps the range itself */
    int protection = PROT_READ | PROT_WRITE | PROT_EXEC;
    char *whole = mmap(NULL, room, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (whole == MAP_FAILED) return;
    uintptr_t aligned = ((uintptr_t)whole + HUGE - 1) / HUGE * HUGE;
    char *copy = (char *)aligned + start % HUGE, *after = copy + bytes;
    uintptr_t from = ((uintptr_t)copy + HUGE - 1) / HUGE * HUGE, to = (uintptr_t)after / HUGE * HUGE;
    munmap(whole, (size_t)(copy - whole));
    munmap(after, (size_t)(whole + room - after));
    bool fine = from < to && copy_areas(memory, areas, first, last, copy, start) &&
                madvise((void *)from, to - from, COLLAPSE) == 0 &&
                mremap(copy, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)start) != MAP_FAILED;
    if (!fine) munmap(copy, bytes);
}

static void pack_runs(int memory, const area *areas, int count) {
    for (int first = 0, last; first < count; first = last + 1) {
        last = first;
        if (areas[first].fixed) continue;
        while (last + 1 < count && !areas[last + 1].fixed && areas[last + 1].start - areas[last].end < LARGEST_GAP) last++;
        uintptr_t held = areas[last].end - areas[first].start;
        uintptr_t start = areas[first].start / HUGE * HUGE, end = (areas[last].end + HUGE - 1) / HUGE * HUGE;
        if (first > 0 && areas[first - 1].end > start) start = areas[first - 1].end;
        if (last + 1 < count && areas[last + 1].start < end) end = areas[last + 1].start;
        if (held >= SMALLEST_RUN && held <= LARGEST_RUN) pack_run(memory, areas, first, last, start, end);
    }
}

void image_pack(int proc) {
    size_t bytes = MAPS_BYTES + MAX_AREAS * sizeof(area);
    char *text = mmap((void *)HUGE, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); /* far off */
    if (text == MAP_FAILED) return;
    area *areas = (area *)(text + MAPS_BYTES);
    int memory = openat(proc, "self/mem", O_RDONLY | O_CLOEXEC);
    if (memory >= 0) pack_runs(memory, areas, list_areas(proc, text, areas));
    if (memory >= 0) close(memory);
    munmap(text, bytes);
}
