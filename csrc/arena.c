/* Job data lives here and nowhere else: children do not inherit these pages, so no job can find another's in its memory. */
#include "jail.h"

#include <string.h>
#include <sys/mman.h>

enum { SMALLEST = 6, CLASSES = 26 }; /* 64 bytes to 2 GiB */
#define ARENA_BYTES ((size_t)8 << 30)

/* At the arena's own start: the server writes these between forks, and elsewhere each write would copy a page. */
static struct {
    char *next;
    void *free_blocks[CLASSES];
} *arena;

void arena_open(void) {
    arena = mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED || madvise(arena, ARENA_BYTES, MADV_DONTFORK) != 0) __builtin_trap();
    arena->next = (char *)arena + 4096;
}

static int class_of(size_t bytes) {
    int class = 0;
    while (((size_t)1 << (class + SMALLEST)) < bytes) class ++;
    return class;
}

void *arena_alloc(size_t bytes) {
    int class = class_of(bytes);
    void *block = arena->free_blocks[class];
    if (block != NULL) {
        arena->free_blocks[class] = *(void **)block;
        return block;
    }
    size_t size = (size_t)1 << (class + SMALLEST);
    if (arena->next + size > (char *)arena + ARENA_BYTES) return NULL;
    block = arena->next;
    arena->next += size;
    return block;
}

void arena_free(void *block, size_t bytes) {
    if (block == NULL) return;
    int class = class_of(bytes);
    size_t size = (size_t)1 << (class + SMALLEST);
    if (size >= 1 << 18) madvise(block, size, MADV_DONTNEED); /* memory stays flat after a big frame */
    *(void **)block = arena->free_blocks[class];
    arena->free_blocks[class] = block;
}

char *buffer_reserve(buffer *b, size_t count) {
    if (b->end + count > b->capacity) {
        size_t held = b->end - b->start, capacity = 256;
        while (capacity < held + count) capacity *= 2;
        char *data = arena_alloc(capacity);
        if (data == NULL) return NULL;
        if (held > 0) memcpy(data, b->data + b->start, held);
        arena_free(b->data, b->capacity);
        *b = (buffer){.data = data, .start = 0, .end = held, .capacity = capacity};
    }
    return b->data + b->end;
}

bool buffer_append(buffer *b, const void *bytes, size_t count) {
    if (count == 0) return true;
    char *place = buffer_reserve(b, count);
    if (place == NULL) return false;
    memcpy(place, bytes, count);
    b->end += count;
    return true;
}

void buffer_consume(buffer *b, size_t count) {
    b->start += count;
    if (b->start == b->end) b->start = b->end = 0;
}

void buffer_release(buffer *b) {
    arena_free(b->data, b->capacity);
    *b = (buffer){0};
}
