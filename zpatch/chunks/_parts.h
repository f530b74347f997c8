/* Parts of a decoded chunk -> boxes in memory of any strides, as they are stored or scaled. */

#ifndef ZPATCH_PARTS_H
#define ZPATCH_PARTS_H

#include <Python.h>

#include "_decode.h"
#include "_voxels.h"

/* Columns of LocatedRows, as drawn in gather.py; from PARTS on (first, extent, target) for each axis. */
enum { MAP, OFFSET, LENGTH, BOX, PARTS, COLUMNS = 16 };

enum { TURNED_ROWS = 32, TURNED_VOXELS = 64, TILE = TURNED_ROWS * TURNED_VOXELS * MAX_ITEM };

typedef struct {
    Join join, copy;      /* for voxels in several planes; for whole voxels in one plane */
    Scale scale;          /* or NULL: voxels are written as they are stored */
    Turn turn;            /* of written voxels */
    size_t item, written; /* bytes of a stored voxel and of a written one */
    Scaling scaling;
} Writer;

static int choose_writer(Writer *writer, size_t item, const char *scaled_from)
{
    static const struct {
        const char *scaled_from;
        size_t item, written;
        Join join, copy;
        Scale scale;
        Turn turn;
    } known[] = {
        {"", 1, 1, copy_1, copy_1, NULL, turn_1},       {"", 2, 2, join_2, copy_2, NULL, turn_2},
        {"", 4, 4, join_4, copy_4, NULL, turn_4},       {"", 8, 8, join_8, copy_8, NULL, turn_8},
        {"u1", 1, 4, copy_1, copy_1, scale_u1, turn_4}, {"i1", 1, 4, copy_1, copy_1, scale_i1, turn_4},
        {"u2", 2, 4, join_2, copy_2, scale_u2, turn_4}, {"i2", 2, 4, join_2, copy_2, scale_i2, turn_4},
    };
    for (size_t k = 0; k < sizeof known / sizeof *known; k++)
        if (known[k].item == item && !strcmp(known[k].scaled_from, scaled_from)) {
            writer->join = known[k].join;
            writer->copy = known[k].copy;
            writer->scale = known[k].scale;
            writer->turn = known[k].turn;
            writer->item = item;
            writer->written = known[k].written;
            return 1;
        }
    return 0;
}

/* Writes rows of voxels of one block, from its voxel `at` on. */
static void write_rows(const Writer *writer, const uint8_t *const *planes, size_t plane_count, uint8_t *out,
                       size_t at, const Rows *rows, uint8_t *spare)
{
    Join join = plane_count > 1 ? writer->join : writer->copy;
    if (!writer->scale) {
        join(out, planes, at, rows);
        return;
    }
    Rows one = {1, rows->voxels, 0, 0, 0};
    for (size_t row = 0; row < rows->count; row++, out += rows->out_step, at += rows->step) {
        const uint8_t *voxels = spare;
        if (plane_count > 1)
            join(spare, planes, at, &one);
        else
            voxels = planes[0] + at * writer->item;
        writer->scale(out, voxels, rows->voxels, &writer->scaling);
    }
}

/* Writes rows of voxels from voxel `at` of a chunk on, in one block or in several. */
static void write_from(const Writer *writer, const Decoded *chunk, uint8_t *out, size_t at, const Rows *rows,
                       uint8_t *spare)
{
    size_t block = at / chunk->block_voxels, last = at + (rows->count - 1) * rows->step + rows->voxels - 1;
    if (last / chunk->block_voxels == block) {
        write_rows(writer, chunk->start + block * chunk->planes, chunk->planes, out,
                   at - block * chunk->block_voxels, rows, spare);
        return;
    }
    for (size_t row = 0; row < rows->count; row++, out += rows->out_step, at += rows->step) {
        size_t done = 0;
        while (done < rows->voxels) {
            size_t left = rows->voxels - done, within = (at + done) % chunk->block_voxels;
            size_t step = chunk->block_voxels - within < left ? chunk->block_voxels - within : left;
            Rows one = {1, step, 0, 0, 0};
            block = (at + done) / chunk->block_voxels;
            write_rows(writer, chunk->start + block * chunk->planes, chunk->planes,
                       out + done * writer->written, within, &one, spare);
            done += step;
        }
    }
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* Writes one row of each plane of a chunk, from voxel `at` on, as columns of a box that is dense along its
 * planes: in tiles that stay in the processor's first cache. */
static void write_turned(const Writer *writer, const Decoded *chunk, uint8_t *out, ptrdiff_t out_step,
                         size_t at, size_t planes, size_t plane_voxels, size_t voxels, uint8_t *tile,
                         uint8_t *spare)
{
    for (size_t x = 0; x < voxels; x += TURNED_VOXELS)
        for (size_t z = 0; z < planes; z += TURNED_ROWS) {
            size_t width = smaller(voxels - x, TURNED_VOXELS), count = smaller(planes - z, TURNED_ROWS);
            Rows rows = {count, width, plane_voxels, (ptrdiff_t)(width * writer->written), 0};
            write_from(writer, chunk, tile, at + z * plane_voxels + x, &rows, spare);
            writer->turn(out + (ptrdiff_t)x * out_step + z * writer->written, out_step, tile, rows.out_step,
                         count, width);
        }
}

static void write_part(const Writer *writer, const Decoded *chunk, const Chunks *chunks, const int64_t *part,
                       const Py_buffer *out, uint8_t *line, uint8_t *spare)
{
    const int64_t *c = part + PARTS, *z = c + 3, *y = z + 3, *x = y + 3;
    const size_t *shape = chunks->shape;
    const Py_ssize_t *strides = out->strides;
    int dense = strides[3] == (Py_ssize_t)writer->written;
    int turned = !dense && z[1] > 1 && strides[1] == (Py_ssize_t)writer->written;
    /* An axis of one voxel may have any stride, whose sum with a pointer overflows. */
    ptrdiff_t plane_step = z[1] > 1 ? strides[1] : 0, row_step = y[1] > 1 ? strides[2] : 0;
    Rows rows = {dense ? (size_t)y[1] : 1, (size_t)x[1], shape[3], row_step, plane_step};
    for (int64_t i = 0; i < c[1]; i++) {
        uint8_t *corner = (uint8_t *)out->buf + (c[2] + i) * strides[0] + z[2] * strides[1] +
                          y[2] * strides[2] + x[2] * strides[3];
        size_t plane_voxels = shape[2] * shape[3];
        for (int64_t k = 0; turned && k < y[1]; k++)
            write_turned(writer, chunk, corner + k * row_step, x[1] > 1 ? strides[3] : 0,
                         (((size_t)(c[0] + i) * shape[1] + (size_t)z[0]) * shape[2] + (size_t)(y[0] + k)) *
                                 shape[3] +
                             (size_t)x[0],
                         (size_t)z[1], plane_voxels, (size_t)x[1], line, spare);
        for (int64_t j = 0; !turned && j < z[1]; j++) {
            size_t plane = ((size_t)(c[0] + i) * shape[1] + (size_t)(z[0] + j)) * shape[2];
            size_t at = (plane + (size_t)y[0]) * shape[3] + (size_t)x[0];
            uint8_t *to = corner + (z[1] > 1 ? j * strides[1] : 0);
            if (dense)
                write_from(writer, chunk, to, at, &rows, spare);
            for (int64_t k = 0; !dense && k < y[1]; k++, at += shape[3], to += row_step) {
                write_from(writer, chunk, line, at, &rows, spare);
                for (int64_t l = 0; l < x[1]; l++)
                    memcpy(to + l * strides[3], line + (size_t)l * writer->written, writer->written);
            }
        }
    }
}

#endif
