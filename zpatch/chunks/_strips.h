/* Parts of several chunks that follow each other in a box -> whole lines of memory, written past the cache.
 *
 * Boxes that are larger than the processor's cache are bound by memory: a line that is written in pieces is read
 * first, and each of its pieces may find it evicted again. So chunks that follow each other along the axis that is
 * dense in a box are decoded one after the other, their parts are put together in cache, as they lie in the
 * box, and are then stored line by line without reading these first.
 */

#ifndef ZPATCH_STRIPS_H
#define ZPATCH_STRIPS_H

#include "_parts.h"

#if defined __x86_64__
#include <emmintrin.h>
#define HAS_STREAMS 1
#else
#define HAS_STREAMS 0
#endif

enum { MOST_PIECES = 8, MOST_PLANES = 512, COLUMNS_AT_ONCE = 32, STRIP = 1 << 16 };

typedef struct {
    const Decoded *chunk;
    const int64_t *part;
} Piece;

typedef struct {
    Piece pieces[MOST_PIECES];
    size_t count;
} Strip;

/* A slab of planes with gaps, the same turned, and the same scaled; beside what write_part needs. */
static size_t strip_bytes(void)
{
    return 3 * STRIP + 2 * MOST_PLANES * LINE;
}

/* Copies bytes so that whole lines of the output are written past the cache; end_streams makes them visible. */
static void stream(uint8_t *to, const uint8_t *from, size_t count)
{
#if HAS_STREAMS
    size_t head = smaller((LINE - (uintptr_t)to % LINE) % LINE, count);
    memcpy(to, from, head);
    for (to += head, from += head, count -= head; count >= LINE; to += LINE, from += LINE, count -= LINE)
        for (int n = 0; n < LINE; n += 16)
            _mm_stream_si128((__m128i *)(to + n), _mm_loadu_si128((const __m128i *)(from + n)));
#endif
    memcpy(to, from, count);
}

static void end_streams(void)
{
#if HAS_STREAMS
    _mm_sfence();
#endif
}

/* Streams rows that follow each other in memory; in the output they may have gaps. */
static void stream_rows(uint8_t *to, ptrdiff_t step, const uint8_t *from, size_t rows, size_t row_bytes)
{
    if (step == (ptrdiff_t)row_bytes) {
        stream(to, from, rows * row_bytes);
        return;
    }
    for (size_t row = 0; row < rows; row++, to += step, from += row_bytes)
        stream(to, from, row_bytes);
}

/* The axis along which the voxels of a box follow each other in memory: x, z, or -1. */
static int strip_axis(const Py_buffer *out, const Writer *writer)
{
    return out->strides[3] == (Py_ssize_t)writer->written   ? 3
           : out->strides[1] == (Py_ssize_t)writer->written ? 1
                                                            : -1;
}

/* Whether a part of another chunk continues a part in its box. */
static int continues(const int64_t *part, const int64_t *next, const Py_buffer *outs, const Writer *writer)
{
    if (part[BOX] != next[BOX])
        return 0;
    int along = strip_axis(outs + part[BOX], writer);
    for (int axis = 0; axis < AXES; axis++) {
        const int64_t *one = part + PARTS + 3 * axis, *other = next + PARTS + 3 * axis;
        if (axis == along ? one[2] + one[1] != other[2]
                          : one[0] != other[0] || one[1] != other[1] || one[2] != other[2])
            return 0;
    }
    return along >= 0;
}

static size_t extent_along(const Strip *strip, int axis)
{
    size_t extent = 0;
    for (size_t n = 0; n < strip->count; n++)
        extent += (size_t)strip->pieces[n].part[PARTS + 3 * axis + 1];
    return extent;
}

/* The number of a part's voxel in its chunk, some planes and rows after its first one. */
static size_t voxel_of(const Chunks *chunks, const int64_t *part, size_t c, size_t z, size_t y, size_t x)
{
    const int64_t *first = part + PARTS;
    const size_t *shape = chunks->shape;
    return ((((size_t)first[0] + c) * shape[1] + (size_t)first[3] + z) * shape[2] + (size_t)first[6] + y) *
               shape[3] +
           (size_t)first[9] + x;
}

static uint8_t *place_in(const Py_buffer *out, const int64_t *part, size_t c, size_t z, size_t y, size_t x)
{
    const size_t at[AXES] = {c, z, y, x};
    uint8_t *place = out->buf;
    for (int axis = 0; axis < AXES; axis++) {
        ptrdiff_t number = (ptrdiff_t)part[PARTS + 3 * axis + 2] + (ptrdiff_t)at[axis];
        place += number ? number * out->strides[axis] : 0;
    }
    return place;
}

/* Writes a strip along x, some rows of a plane at a time. */
static void write_strip_along_x(const Writer *writer, const Strip *strip, const Chunks *chunks,
                                const Py_buffer *out, uint8_t *tile, uint8_t *memory)
{
    const int64_t *part = strip->pieces[0].part, *c = part + PARTS, *z = c + 3, *y = z + 3;
    size_t row_bytes = extent_along(strip, 3) * writer->written, most = STRIP / 4 / row_bytes;
    for (size_t i = 0; i < (size_t)c[1]; i++)
        for (size_t j = 0; j < (size_t)z[1]; j++)
            for (size_t k = 0; k < (size_t)y[1]; k += most) {
                uint8_t *to = memory;
                Rows rows = {smaller((size_t)y[1] - k, most), 0, chunks->shape[3], (ptrdiff_t)row_bytes, 0};
                for (size_t n = 0; n < strip->count; n++, to += rows.voxels * writer->written) {
                    const Piece *piece = strip->pieces + n;
                    rows.voxels = (size_t)piece->part[PARTS + 10];
                    write_from(writer, piece->chunk, to, voxel_of(chunks, piece->part, i, j, k, 0), &rows,
                               tile);
                }
                stream_rows(place_in(out, part, i, j, k, 0), y[1] > 1 ? out->strides[2] : 0, memory,
                            rows.count, row_bytes);
            }
}

typedef struct {
    size_t planes, rows, voxels; /* of the block that is turned */
    size_t c, y, x;              /* where it begins in the strip's parts */
} Block;

/* Puts a block of a strip along z together, in planes that are `step` bytes apart. */
static void fill_block(const Writer *writer, const Strip *strip, const Chunks *chunks, const Block *block,
                       uint8_t *to, ptrdiff_t step)
{
    Rows rows = {block->rows, block->voxels, chunks->shape[3], (ptrdiff_t)(block->voxels * writer->item), 0};
    for (size_t n = 0; n < strip->count; n++) {
        const Piece *piece = strip->pieces + n;
        for (size_t z = 0; z < (size_t)piece->part[PARTS + 4]; z++, to += step)
            write_stored(writer, piece->chunk, to,
                         voxel_of(chunks, piece->part, block->c, z, block->y, block->x), &rows);
    }
}

/* Writes a block of a strip along z: it is turned, so that the voxels of a column follow each other. */
static void write_block(const Writer *writer, const Strip *strip, const Chunks *chunks, const Block *block,
                        const Py_buffer *out, uint8_t *memory)
{
    size_t row_bytes = block->voxels * writer->item, depth = block->planes * writer->item;
    size_t written = block->planes * writer->written;
    ptrdiff_t step = (ptrdiff_t)((block->rows * row_bytes + LINE - 1) / LINE * LINE + LINE);
    uint8_t *turned = memory + STRIP + 2 * MOST_PLANES * LINE, *columns = turned;
    fill_block(writer, strip, chunks, block, memory, step);
    for (size_t row = 0; row < block->rows; row++)
        writer->turn(turned + row * depth, (ptrdiff_t)(block->rows * depth), memory + row * row_bytes, step,
                     block->planes, block->voxels);
    if (writer->scale) {
        columns = turned + STRIP;
        writer->scale(columns, 0, turned, 0, 1, block->voxels * block->rows * block->planes,
                      &writer->scaling);
    }
    const int64_t *part = strip->pieces[0].part;
    for (size_t n = 0; n < block->voxels; n++)
        stream_rows(place_in(out, part, block->c, 0, block->y, block->x + n),
                    part[PARTS + 7] > 1 ? out->strides[2] : 0, columns + n * block->rows * written,
                    block->rows, written);
}

static void write_strip_along_z(const Writer *writer, const Strip *strip, const Chunks *chunks,
                                const Py_buffer *out, uint8_t *memory)
{
    const int64_t *c = strip->pieces[0].part + PARTS, *y = c + 6, *x = y + 3;
    Block block = {.planes = extent_along(strip, 1)};
    size_t item = writer->item > writer->written ? writer->item : writer->written;
    size_t fitting = STRIP / (block.planes * item); /* columns */
    for (block.c = 0; block.c < (size_t)c[1]; block.c++)
        for (block.x = 0; block.x < (size_t)x[1]; block.x += block.voxels) {
            block.voxels = smaller((size_t)x[1] - block.x, smaller(COLUMNS_AT_ONCE, fitting));
            size_t most = fitting / block.voxels;
            for (block.y = 0; block.y < (size_t)y[1]; block.y += block.rows) {
                block.rows = smaller((size_t)y[1] - block.y, most);
                write_block(writer, strip, chunks, &block, out, memory);
            }
        }
}

/* Writes the parts of a strip, past the cache where they fit into the memory for it. */
static void write_strip(const Writer *writer, const Strip *strip, const Chunks *chunks, const Py_buffer *outs,
                        uint8_t *tile)
{
    const int64_t *part = strip->pieces[0].part;
    const Py_buffer *out = outs + part[BOX];
    uint8_t *memory = tile + scratch_bytes(chunks);
    int along = strip_axis(out, writer);
    size_t extent = along < 0 ? 0 : extent_along(strip, along);
    if (along == 3 && extent <= STRIP / 4 / MAX_ITEM)
        write_strip_along_x(writer, strip, chunks, out, tile, memory);
    else if (along == 1 && extent <= MOST_PLANES)
        write_strip_along_z(writer, strip, chunks, out, memory);
    else
        for (size_t n = 0; n < strip->count; n++)
            write_part(writer, strip->pieces[n].chunk, chunks, strip->pieces[n].part, out, tile);
}

#endif
