/* Bytes of a chunk -> planes of its voxels' bytes, as far as they are needed: LZ4 in blosc frames, or none.
 *
 * Where blosc shuffled bytes, plane p holds byte p of every voxel. Planes are not joined here: there is no
 * decoded chunk. Streams that blosc stored uncompressed, as it does with noise, are used in place. Encodings
 * that are not supported (blosc's other compressors, bit shuffling) are reported.
 *
 * Sources of the formats: README_CHUNK_FORMAT.rst of c-blosc 1 for the header of a frame, lz4_Block_format.md
 * of LZ4 for a stream. Input is never trusted: every read and every write is checked against the end of its
 * buffer.
 */

#ifndef ZPATCH_DECODE_H
#define ZPATCH_DECODE_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { AXES = 4, SLACK = 64, MAX_ITEM = 8 };
/* States of a chunk or of a row. UNEQUAL: the checksum differs; WAITS: the bytes are not in memory yet. */
enum { FINE, DAMAGED, UNKNOWN, NO_MEMORY, BAD_ROW, GONE, UNEQUAL, WAITS };
enum { BLOSC_HEADER = 16, BLOSC_SHUFFLED = 1, BLOSC_STORED = 2, BLOSC_BITS = 4, BLOSC_WHOLE = 16 };
enum { BLOSC_FORMAT = 2, BLOSC_LZ4 = 1 };
enum { MAX_STREAMS = 16, LEAST_STREAM = 128 }; /* of a block that blosc splits; bytes of each */

typedef struct {
    size_t shape[AXES]; /* of a chunk: c, z, y, x */
    size_t item, bytes; /* of a voxel; of a chunk */
    int blosc;          /* or not: the chunk's bytes are its voxels */
} Chunks;

typedef struct {
    size_t blocks, block_voxels, planes; /* planes is 1 or, where bytes were shuffled, the item's size */
    const uint8_t **start;               /* of each plane of each block */
    size_t capacity;                     /* of start */
    uint8_t *scratch;
} Decoded;

static uint32_t little32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* ---- LZ4 ---- */

static int long_length(const uint8_t **in, const uint8_t *in_end, size_t *length)
{
    uint8_t more;
    do {
        if (*in >= in_end)
            return 0;
        more = *(*in)++;
        *length += more;
    } while (more == 255);
    return 1;
}

/* Copies in steps of 32 bytes, each in two halves, so that the second half may read bytes that the first half
 * wrote. May write up to 31 bytes past the end, where there is slack. */
static void copy_wild(uint8_t *to, const uint8_t *from, size_t n)
{
    uint8_t *end = to + n;
    do {
        memcpy(to, from, 16);
        memcpy(to + 16, from + 16, 16);
        to += 32;
        from += 32;
    } while (to < end);
}

/* Repeats the `distance` bytes before `to`. May also write up to 31 bytes past the end. */
static void copy_match(uint8_t *to, size_t distance, size_t n)
{
    const uint8_t *from = to - distance;
    uint8_t *end = to + n;
    if (distance >= 16) {
        copy_wild(to, from, n);
    } else if (distance == 1 && n >= 64) {
        memset(to, *from, n);
    } else if (distance >= 8) {
        do {
            memcpy(to, from, 8);
            memcpy(to + 8, from + 8, 8);
            to += 16;
            from += 16;
        } while (to < end);
    } else { /* eight bytes at a time, of which only whole repetitions of the pattern are kept */
        uint64_t pattern = 0;
        size_t step = 8 - 8 % distance;
        memcpy(&pattern, from, 8);
        pattern &= ((uint64_t)1 << 8 * distance) - 1;
        for (size_t bits = 8 * distance; bits < 64; bits *= 2)
            pattern |= pattern << bits;
        do {
            memcpy(to, &pattern, 8);
            memcpy(to + step, &pattern, 8);
            memcpy(to + 2 * step, &pattern, 8);
            to += 3 * step;
        } while (to < end);
    }
}

/* Decodes the first `wanted` bytes of a stream of `capacity`; there is slack behind `out`. */
static int decode_lz4(const uint8_t *in, size_t in_bytes, uint8_t *out, size_t capacity, size_t wanted)
{
    const uint8_t *in_end = in + in_bytes;
    uint8_t *const begin = out, *const end = out + capacity, *const enough = out + wanted;
    for (;;) {
        if (in >= in_end)
            return 0;
        unsigned token = *in++;
        size_t n = token >> 4, distance;
        /* Most sequences are short and far from any end: both of their copies then have a fixed size. */
        if (n < 15 && in_end - in >= 32 && enough - out >= 64) {
            memcpy(out, in, 16);
            in += n;
            out += n;
            distance = (size_t)in[0] | (size_t)in[1] << 8;
            in += 2;
            n = (token & 15) + 4;
            if (distance == 0 || distance > (size_t)(out - begin))
                return 0;
        } else {
            if (n == 15 && !long_length(&in, in_end, &n))
                return 0;
            if (n > (size_t)(in_end - in) || n > (size_t)(end - out))
                return 0;
            if (n >= (size_t)(enough - out)) {
                memcpy(out, in, (size_t)(enough - out));
                return 1;
            }
            if ((size_t)(in_end - in) >= n + 32)
                copy_wild(out, in, n);
            else
                memcpy(out, in, n);
            in += n;
            out += n;
            if (in_end - in < 2)
                return 0;
            distance = (size_t)in[0] | (size_t)in[1] << 8;
            in += 2;
            n = (token & 15) + 4;
            if (distance == 0 || distance > (size_t)(out - begin))
                return 0;
        }
        if (n == 19 && !long_length(&in, in_end, &n))
            return 0;
        if (n > (size_t)(end - out))
            return 0;
        if (n > (size_t)(enough - out))
            n = (size_t)(enough - out);
        copy_match(out, distance, n);
        out += n;
        if (out >= enough)
            return 1;
    }
}

/* ---- blosc frames ---- */

static int one_block(Decoded *to, const uint8_t *voxels, const Chunks *chunks)
{
    to->blocks = 1;
    to->block_voxels = chunks->bytes / chunks->item;
    to->planes = 1;
    to->start[0] = voxels;
    return FINE;
}

/* Decodes one block of a frame: `streams` parts of equal length, each compressed by LZ4 or stored as it is.
 * Only the voxels in the block's first `wanted` bytes are needed. */
static int decode_block(Decoded *to, size_t block, const uint8_t *in, const uint8_t *in_end, uint8_t *out,
                        size_t bytes, size_t streams, size_t wanted)
{
    size_t part = bytes / streams, plane = bytes / to->planes;
    int apart = streams == to->planes; /* each stream is a plane, or all of the block, and is used in place */
    wanted = apart ? wanted / streams : part;
    for (size_t s = 0; s < streams; s++, out += part) {
        if (in_end - in < 4)
            return DAMAGED;
        size_t length = little32(in);
        in += 4;
        if (length > (size_t)(in_end - in))
            return DAMAGED;
        if (length == part && apart) {
            to->start[block * to->planes + s] = in;
        } else {
            if (length == part)
                memcpy(out, in, part);
            else if (!decode_lz4(in, length, out, part, wanted))
                return DAMAGED;
            if (apart)
                to->start[block * to->planes + s] = out;
        }
        in += length;
    }
    for (size_t p = 0; !apart && p < to->planes; p++)
        to->start[block * to->planes + p] = out - bytes + p * plane;
    return FINE;
}

/* Decodes the blocks that hold a chunk's voxels from `first` up to `stop`. */
static int decode_chunk(Decoded *to, const uint8_t *in, size_t length, const Chunks *chunks, size_t first,
                        size_t stop)
{
    if (!chunks->blosc)
        return length == chunks->bytes ? one_block(to, in, chunks) : DAMAGED;
    if (length < BLOSC_HEADER || little32(in + 4) != chunks->bytes || little32(in + 12) > length)
        return DAMAGED;
    length = little32(in + 12);
    if (length < BLOSC_HEADER)
        return DAMAGED;
    if (in[0] != BLOSC_FORMAT)
        return UNKNOWN;
    unsigned flags = in[2];
    size_t type_bytes = in[3], block_bytes = little32(in + 8);
    if (flags & BLOSC_STORED)
        return length == BLOSC_HEADER + chunks->bytes ? one_block(to, in + BLOSC_HEADER, chunks) : DAMAGED;
    int shuffled = (flags & BLOSC_SHUFFLED) && type_bytes > 1;
    if (flags >> 5 != BLOSC_LZ4 || flags & BLOSC_BITS ||
        (shuffled && type_bytes != chunks->item))
        return UNKNOWN;
    if (type_bytes == 0 || block_bytes == 0 || block_bytes > chunks->bytes || block_bytes % chunks->item)
        return UNKNOWN;
    to->blocks = (chunks->bytes + block_bytes - 1) / block_bytes;
    to->block_voxels = block_bytes / chunks->item;
    to->planes = shuffled ? chunks->item : 1;
    if (to->blocks > (length - BLOSC_HEADER) / 4)
        return DAMAGED;
    if (to->blocks * to->planes > to->capacity) {
        const uint8_t **more = realloc(to->start, to->blocks * to->planes * sizeof *more);
        if (!more)
            return NO_MEMORY;
        to->start = more;
        to->capacity = to->blocks * to->planes;
    }
    /* Before 1.14 blosc had no flag for whole blocks: small ones were. */
    int is_split = !(flags & BLOSC_WHOLE) && type_bytes <= MAX_STREAMS &&
                   block_bytes / type_bytes >= LEAST_STREAM;
    for (size_t b = first / to->block_voxels; b * to->block_voxels < stop; b++) {
        size_t at = little32(in + BLOSC_HEADER + 4 * b), left = chunks->bytes - b * block_bytes;
        int last = left < block_bytes; /* shorter than others: always one stream */
        size_t streams = is_split && !last ? type_bytes : 1;
        size_t bytes = last ? left : block_bytes, wanted = stop * chunks->item - b * block_bytes;
        if (at < BLOSC_HEADER || at > length || bytes % streams)
            return DAMAGED;
        int state = decode_block(to, b, in + at, in + length, to->scratch + b * block_bytes, bytes, streams,
                                 wanted < bytes ? wanted : bytes);
        if (state != FINE)
            return state;
    }
    return FINE;
}

#endif
