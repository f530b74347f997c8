/* A plain, obvious decoder of LZ4 and of blosc frames, byte by byte. It includes nothing of zpatch. */

#ifndef FUZZ_PLAIN_H
#define FUZZ_PLAIN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Whether the damage that was found last is one that c-blosc, or LZ4 in it, may overlook: a match at distance
 * 0, which copies what was in memory before; a block that is no multiple of the voxels' size and is split
 * into as many streams all the same, whose last bytes are not written. */
static int plain_leniently_decoded;

/* The bytes of a stream that can be decoded, `wanted` or more where all is well, at most `capacity`. Of a
 * literal run or of a match that does not fit all bytes are left out. `out` may be NULL. */
static size_t plain_lz4(const uint8_t *in, size_t length, uint8_t *out, size_t capacity, size_t wanted)
{
    size_t at = 0, made = 0;
    plain_leniently_decoded = 0;
    while (at < length) {
        unsigned token = in[at++];
        size_t literals = token >> 4, match = (token & 15) + 4;
        if (literals == 15)
            do {
                if (at == length)
                    return made;
                literals += in[at];
            } while (in[at++] == 255);
        if (literals > length - at || literals > capacity - made)
            return made;
        for (size_t n = 0; n < literals; n++)
            out[made++] = in[at++];
        if (made >= wanted || length - at < 2)
            return made;
        size_t distance = in[at] + 256 * (size_t)in[at + 1];
        at += 2;
        if (match == 19)
            do {
                if (at == length)
                    return made;
                match += in[at];
            } while (in[at++] == 255);
        if (distance == 0 || distance > made || match > capacity - made) {
            plain_leniently_decoded = distance == 0;
            return made;
        }
        for (size_t n = 0; n < match; n++, made++)
            out[made] = out[made - distance];
        if (made >= wanted)
            return made;
    }
    return made;
}

static size_t plain_number(const uint8_t *p)
{
    return p[0] + 256 * ((size_t)p[1] + 256 * ((size_t)p[2] + 256 * (size_t)p[3]));
}

enum { PLAIN_FINE, PLAIN_DAMAGED, PLAIN_UNKNOWN };

/* Decodes voxels `first` up to `stop` of a chunk of `bytes`, into the chunk `out`. `spare` has `bytes`. */
static int plain_blosc(const uint8_t *in, size_t length, size_t item, size_t bytes, size_t first, size_t stop,
                       uint8_t *out, uint8_t *spare)
{
    plain_leniently_decoded = 0;
    if (length < 16 || plain_number(in + 4) != bytes || plain_number(in + 12) > length ||
        plain_number(in + 12) < 16)
        return PLAIN_DAMAGED;
    length = plain_number(in + 12);
    unsigned version = in[0], flags = in[2], compressor = in[2] >> 5;
    size_t type = in[3], block_bytes = plain_number(in + 8);
    int is_stored = flags & 2, is_shuffled = flags & 1 && type > 1;
    int has_one_stream = flags & 16 || type > 16 || !type || block_bytes / type < 128;
    if (version != 2)
        return PLAIN_UNKNOWN;
    if (is_stored) {
        if (length != 16 + bytes)
            return PLAIN_DAMAGED;
        memcpy(out, in + 16, bytes);
        return PLAIN_FINE;
    }
    if (compressor != 1 || flags & 4 || (is_shuffled && type != item) || type == 0 ||
        block_bytes == 0 || block_bytes > bytes || block_bytes % item)
        return PLAIN_UNKNOWN;
    size_t blocks = (bytes + block_bytes - 1) / block_bytes;
    if (blocks > (length - 16) / 4)
        return PLAIN_DAMAGED;
    for (size_t block = first * item / block_bytes; block * block_bytes < stop * item; block++) {
        size_t start = block * block_bytes, at = plain_number(in + 16 + 4 * block);
        size_t size = bytes - start < block_bytes ? bytes - start : block_bytes;
        size_t streams = has_one_stream || size < block_bytes ? 1 : type, part = size / streams;
        size_t wanted = stop * item - start < size ? stop * item - start : size;
        plain_leniently_decoded = size % streams != 0;
        if (at < 16 || at > length || size % streams)
            return PLAIN_DAMAGED;
        /* A stream is decoded as far as needed where it is a plane, or all of an unshuffled block. */
        size_t of_part = streams == (is_shuffled ? item : 1) ? wanted / streams : part;
        for (size_t s = 0; s < streams; s++) {
            plain_leniently_decoded = 0;
            if (length - at < 4 || plain_number(in + at) > length - at - 4)
                return PLAIN_DAMAGED;
            size_t packed = plain_number(in + at);
            at += 4;
            if (packed == part)
                memcpy(spare + s * part, in + at, part);
            else if (plain_lz4(in + at, packed, spare + s * part, part, of_part) < of_part)
                return PLAIN_DAMAGED;
            at += packed;
        }
        for (size_t n = 0; n < size; n++)
            out[start + n] = is_shuffled ? spare[n % item * (size / item) + n / item] : spare[n];
    }
    return PLAIN_FINE;
}

#endif
