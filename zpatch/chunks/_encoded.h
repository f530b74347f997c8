/* The encoded bytes of a chunk, from a memory map or from an open file, compared with their checksum.
 *
 * A chunk that is read for the first time is copied into memory that stays in the processor's cache, is
 * compared with its checksum there and is decoded from there: what is checked is what is decoded, also if
 * another program writes to the file meanwhile. Reading a file takes less time than the system needs to map as
 * many new pages, so that a file is mapped when its chunks are read again.
 */

#ifndef ZPATCH_ENCODED_H
#define ZPATCH_ENCODED_H

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "_checksum.h"
#include "_decode.h"

enum { MOST_COPIED = 1 << 20 }; /* bytes of a chunk; larger ones do not stay in cache */

typedef struct {
    const uint8_t *map; /* of a file's bytes, or NULL */
    int64_t bytes;      /* of the map */
    int file;           /* which is read where there is no map */
} Shard;

typedef struct {
    uint8_t *bytes; /* of a chunk */
    size_t capacity;
} Copy;

/* Where a chunk's bytes are; its checksum follows them. */
typedef struct {
    int64_t offset;
    size_t length;
    int is_checked; /* whether it is to be compared with its checksum */
} Place;

/* How many chunks were read, and what the new ones took: those of a file, or compared with their checksum. */
typedef struct {
    long long chunks, new_chunks, bytes, nanoseconds;
} Fetched;

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Counts a chunk, and what it took; less than 0 for one that is not new. */
static void count_chunk(Fetched *fetched, const Place *place, long long nanoseconds)
{
    fetched->chunks++;
    if (nanoseconds < 0)
        return;
    fetched->new_chunks++;
    fetched->bytes += (long long)place->length;
    fetched->nanoseconds += nanoseconds;
}

/* Reads as much as is in the system's memory, or all; the number of bytes, or -1. */
static ssize_t read_some(int file, uint8_t *to, size_t count, int64_t at, int waits)
{
    ssize_t done;
    do {
#ifdef RWF_NOWAIT
        struct iovec one = {to, count};
        done = waits ? pread(file, to, count, at) : preadv2(file, &one, 1, at, RWF_NOWAIT);
#else
        (void)waits;
        done = pread(file, to, count, at);
#endif
    } while (done < 0 && errno == EINTR);
    return done;
}

/* Asks the system to read a chunk ahead. */
static void ask_for(const Shard *shard, const Place *place)
{
    size_t all = place->length + CRC_BYTES;
#ifdef POSIX_FADV_WILLNEED
    if (!shard->map)
        posix_fadvise(shard->file, place->offset, (off_t)all, POSIX_FADV_WILLNEED);
#endif
    if (shard->map) {
        size_t begins = (size_t)(shard->map + place->offset) % (size_t)sysconf(_SC_PAGESIZE);
        posix_madvise((void *)(shard->map + place->offset - begins), all + begins, POSIX_MADV_WILLNEED);
    }
}

/* Reads bytes `first` up to `stop` of a chunk into the copy. FINE, GONE, or WAITS if they are not in memory and
 * are not waited for. */
static int read_file(Copy *copy, const Shard *shard, const Place *place, size_t first, size_t stop, int waits)
{
    while (first < stop) {
        ssize_t done = read_some(shard->file, copy->bytes + first, stop - first,
                                 place->offset + (int64_t)first, waits);
        if (done <= 0 && !waits)
            return WAITS;
        if (done <= 0)
            return GONE;
        first += (size_t)done;
    }
    return FINE;
}

/* Gives the bytes of a chunk, of which those from `first` up to `stop` are needed. */
static int find_bytes(Copy *copy, const Shard *shard, const Place *place, size_t first, size_t stop,
                      int waits, const uint8_t **bytes)
{
    size_t all = place->length + (place->is_checked ? CRC_BYTES : 0);
    int is_copied = !shard->map || (place->is_checked && all <= MOST_COPIED);
    *bytes = is_copied ? copy->bytes : shard->map + place->offset;
    if (is_copied && all > copy->capacity) {
        free(copy->bytes);
        copy->capacity = all;
        *bytes = copy->bytes = malloc(all);
        if (!copy->bytes) {
            copy->capacity = 0;
            return NO_MEMORY;
        }
    }
    if (place->is_checked) {
        first = 0;
        stop = all;
    }
    if (shard->map && is_copied)
        memcpy(copy->bytes, shard->map + place->offset, all);
    int state = shard->map ? FINE : read_file(copy, shard, place, first, stop, waits);
    if (state != FINE || !place->is_checked)
        return state;
    return crc32c(*bytes, place->length) == little32(*bytes + place->length) ? FINE : UNEQUAL;
}

#endif
