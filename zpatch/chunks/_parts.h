/* Parts of a decoded chunk -> boxes in memory of any strides, as they are stored or scaled. */

#ifndef ZPATCH_PARTS_H
#define ZPATCH_PARTS_H

#include <Python.h>

#include "_decode.h"
#include "_voxels.h"

/* Columns of LocatedRows, as drawn in gather.py; from PARTS on (first, extent, target) for each axis. */
enum { MAP, OFFSET, LENGTH, BOX, PARTS, COLUMNS = 16 };

enum { TURNED_ROWS = 32, TURNED_VOXELS = 64, TILE = TURNED_ROWS * TURNED_VOXELS * MAX_ITEM };
enum { LINE = 64, SLAB = 1 << 16 }; /* bytes of a line of the processor's cache; of planes that are turned */

typedef struct {
    Join join, copy;      /* for voxels in several planes; for whole voxels in one plane */
    Scale scale;          /* or NULL: voxels are written as they are stored */
    Turn turn;            /* of stored voxels */
    size_t item, written; /* bytes of a stored voxel and of a written one */
    Scaling scaling;
} Writer;

static int choose_writer(Writer *writer, size_t item, const char *scaled_from)
{
    static const struct {
        const char *scaled_from;
        size_t item, written;
        Join join, copy;
        Scale scale, wide;
        Turn turn;
    } known[] = {
        {"", 1, 1, copy_1, copy_1, NULL, NULL, turn_1},
        {"", 2, 2, join_2, copy_2, NULL, NULL, turn_2},
        {"", 4, 4, join_4, copy_4, NULL, NULL, turn_4},
        {"", 8, 8, join_8, copy_8, NULL, NULL, turn_8},
        {"u1", 1, 4, copy_1, copy_1, scale_u1, scale_u1_wide, turn_1},
        {"i1", 1, 4, copy_1, copy_1, scale_i1, scale_i1_wide, turn_1},
        {"u2", 2, 4, join_2, copy_2, scale_u2, scale_u2_wide, turn_2},
        {"i2", 2, 4, join_2, copy_2, scale_i2, scale_i2_wide, turn_2},
    };
    for (size_t k = 0; k < sizeof known / sizeof *known; k++)
        if (known[k].item == item && !strcmp(known[k].scaled_from, scaled_from)) {
            writer->join = known[k].join;
            writer->copy = known[k].copy;
            writer->scale = HAS_WIDE ? known[k].wide : known[k].scale;
            writer->turn = known[k].turn;
            writer->item = item;
            writer->written = known[k].written;
            return 1;
        }
    return 0;
}

/* Memory for voxels on their way: a row of a chunk, or a tile that stays in the processor's first cache. */
static size_t tile_bytes(const Chunks *chunks)
{
    size_t row = chunks->shape[3] * MAX_ITEM;
    return row > TILE ? row : TILE;
}

/* Two tiles and a slab, whose planes have a gap of a line. */
static size_t scratch_bytes(const Chunks *chunks)
{
    return 2 * tile_bytes(chunks) + SLAB + TURNED_ROWS * LINE;
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* Writes rows of voxels of one block, as they are stored, from its voxel `at` on. */
static void join_rows(const Writer *writer, const Decoded *chunk, const uint8_t *const *planes, uint8_t *out,
                      size_t at, const Rows *rows)
{
    (chunk->planes > 1 ? writer->join : writer->copy)(out, planes, at, rows);
}

/* Writes rows of voxels as they are stored, from voxel `at` of a chunk on, in one block or in several. */
static void write_stored(const Writer *writer, const Decoded *chunk, uint8_t *out, size_t at, const Rows *rows)
{
    size_t block = at / chunk->block_voxels, last = at + (rows->count - 1) * rows->step + rows->voxels - 1;
    if (last / chunk->block_voxels == block) {
        join_rows(writer, chunk, chunk->start + block * chunk->planes, out, at - block * chunk->block_voxels,
                  rows);
        return;
    }
    for (size_t row = 0; row < rows->count; row++, out += rows->out_step, at += rows->step) {
        size_t done = 0;
        while (done < rows->voxels) {
            size_t left = rows->voxels - done, within = (at + done) % chunk->block_voxels;
            size_t step = chunk->block_voxels - within < left ? chunk->block_voxels - within : left;
            Rows one = {1, step, 0, 0, 0};
            block = (at + done) / chunk->block_voxels;
            join_rows(writer, chunk, chunk->start + block * chunk->planes, out + done * writer->item, within,
                      &one);
            done += step;
        }
    }
}

/* Writes rows of voxels from voxel `at` of a chunk on, scaled where the writer scales. */
static void write_from(const Writer *writer, const Decoded *chunk, uint8_t *out, size_t at, const Rows *rows,
                       uint8_t *tile)
{
    if (!writer->scale) {
        write_stored(writer, chunk, out, at, rows);
        return;
    }
    size_t row_bytes = rows->voxels * writer->item, most = row_bytes < TILE ? TILE / row_bytes : 1;
    for (size_t row = 0; row < rows->count; row += most) {
        Rows some = {smaller(rows->count - row, most), rows->voxels, rows->step, (ptrdiff_t)row_bytes, 0};
        write_stored(writer, chunk, tile, at + row * rows->step, &some);
        writer->scale(out + (ptrdiff_t)row * rows->out_step, rows->out_step, tile, some.out_step, some.count,
                      some.voxels, &writer->scaling);
    }
}

/* Asks for the memory of some columns of a box, before they are written. */
static void prefetch_columns(const uint8_t *column, ptrdiff_t step, size_t columns, size_t bytes)
{
    for (size_t n = 0; n < columns; n++, column += step) {
        for (size_t byte = 0; byte < bytes; byte += LINE)
            PREFETCH(column + byte);
        PREFETCH(column + bytes - 1);
    }
}

typedef struct {
    size_t planes, rows, voxels;                  /* of a slab: at most TURNED_ROWS planes */
    ptrdiff_t plane_bytes, row_step, column_step; /* in the slab; in the box, which is dense along its planes */
} Slab;

/* Writes a slab of stored voxels: each row, across all planes, as columns. */
static void turn_slab(const Writer *writer, const Slab *slab, const uint8_t *voxels, uint8_t *out, uint8_t *tile)
{
    size_t row_bytes = slab->voxels * writer->item;
    ptrdiff_t step = (ptrdiff_t)(slab->planes * writer->item);
    for (size_t row = 0; row < slab->rows; row++, voxels += row_bytes, out += slab->row_step) {
        if (row + 1 < slab->rows)
            prefetch_columns(out + slab->row_step, slab->column_step, slab->voxels,
                             slab->planes * writer->written);
        if (!writer->scale) {
            writer->turn(out, slab->column_step, voxels, slab->plane_bytes, slab->planes, slab->voxels);
            continue;
        }
        writer->turn(tile, step, voxels, slab->plane_bytes, slab->planes, slab->voxels);
        writer->scale(out, slab->column_step, tile, step, slab->voxels, slab->planes, &writer->scaling);
    }
}

/* Writes the planes of one channel of a part, from voxel `at` of the chunk on, to a box that is dense along its
 * planes. They are put together in slabs that stay in the processor's second cache. Planes of a slab have a gap
 * between them, so that the lines of a column of voxels are not all in the same few places of the first cache. */
static void write_planes_turned(const Writer *writer, const Decoded *chunk, const Chunks *chunks,
                                const int64_t *part, uint8_t *corner, Slab slab, size_t at, uint8_t *tile)
{
    const int64_t *z = part + PARTS + 3, *y = z + 3, *x = y + 3;
    const size_t row_voxels = chunks->shape[3], plane_voxels = chunks->shape[2] * row_voxels;
    uint8_t *voxels = tile + 2 * tile_bytes(chunks);
    for (size_t l = 0; l < (size_t)x[1]; l += slab.voxels) {
        slab.voxels = smaller((size_t)x[1] - l, TURNED_VOXELS);
        size_t row_bytes = slab.voxels * writer->item, most = SLAB / (TURNED_ROWS * row_bytes);
        for (size_t k = 0; k < (size_t)y[1]; k += slab.rows) {
            slab.rows = smaller((size_t)y[1] - k, most);
            slab.plane_bytes = (ptrdiff_t)((slab.rows * row_bytes + LINE - 1) / LINE * LINE + LINE);
            for (size_t j = 0; j < (size_t)z[1]; j += slab.planes) {
                slab.planes = smaller((size_t)z[1] - j, TURNED_ROWS);
                Rows rows = {slab.rows, slab.voxels, row_voxels, (ptrdiff_t)row_bytes, 0};
                for (size_t n = 0; n < slab.planes; n++)
                    write_stored(writer, chunk, voxels + (ptrdiff_t)n * slab.plane_bytes,
                                 at + (j + n) * plane_voxels + k * row_voxels + l, &rows);
                turn_slab(writer, &slab, voxels,
                          corner + (ptrdiff_t)l * slab.column_step + (ptrdiff_t)k * slab.row_step +
                              j * writer->written,
                          tile);
            }
        }
    }
}

static void write_part(const Writer *writer, const Decoded *chunk, const Chunks *chunks, const int64_t *part,
                       const Py_buffer *out, uint8_t *tile)
{
    const int64_t *c = part + PARTS, *z = c + 3, *y = z + 3, *x = y + 3;
    const size_t *shape = chunks->shape;
    const Py_ssize_t *strides = out->strides;
    uint8_t *line = tile + tile_bytes(chunks);
    int dense = strides[3] == (Py_ssize_t)writer->written;
    int turned = !dense && z[1] > 1 && strides[1] == (Py_ssize_t)writer->written;
    /* An axis of one voxel may have any stride, whose sum with a pointer overflows. */
    ptrdiff_t plane_step = z[1] > 1 ? strides[1] : 0, row_step = y[1] > 1 ? strides[2] : 0;
    Rows rows = {dense ? (size_t)y[1] : 1, (size_t)x[1], shape[3], row_step, plane_step};
    Slab slab = {.row_step = row_step, .column_step = x[1] > 1 ? strides[3] : 0};
    for (int64_t i = 0; i < c[1]; i++) {
        uint8_t *corner = (uint8_t *)out->buf + (c[2] + i) * strides[0] + z[2] * strides[1] +
                          y[2] * strides[2] + x[2] * strides[3];
        size_t first = (((size_t)(c[0] + i) * shape[1] + (size_t)z[0]) * shape[2] + (size_t)y[0]) * shape[3] +
                       (size_t)x[0];
        if (turned)
            write_planes_turned(writer, chunk, chunks, part, corner, slab, first, tile);
        for (int64_t j = 0; !turned && j < z[1]; j++) {
            size_t at = first + (size_t)j * shape[2] * shape[3];
            uint8_t *to = corner + (z[1] > 1 ? j * strides[1] : 0);
            if (dense)
                write_from(writer, chunk, to, at, &rows, tile);
            for (int64_t k = 0; !dense && k < y[1]; k++, at += shape[3], to += row_step) {
                write_from(writer, chunk, line, at, &rows, tile);
                for (int64_t l = 0; l < x[1]; l++)
                    memcpy(to + l * strides[3], line + (size_t)l * writer->written, writer->written);
            }
        }
    }
}

#endif
