/* The inner loop of a group read: encoded chunks in memory-mapped shards -> parts of boxes.
 *
 * Each chunk is decoded as far as its boxes need it, and its voxels are copied from the decoded planes of
 * bytes straight into the boxes. A chunk in an encoding that is not supported here is reported, and gather.py
 * decodes it with numcodecs: the same voxels, slower.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <limits.h>

#include "_decode.h"
#include "_guard.h"
#include "_voxels.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "voxels are stored in little-endian order; on big-endian machines zpatch reads without this file"
#endif

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

/* ---- rows ---- */

static int row_is_sound(const int64_t *row, const Chunks *chunks, const Py_buffer *maps, Py_ssize_t map_count,
                        const Py_buffer *outs, Py_ssize_t out_count)
{
    if (row[MAP] < 0 || row[MAP] >= map_count || row[BOX] < 0 || row[BOX] >= out_count)
        return 0;
    int64_t map_bytes = maps[row[MAP]].len;
    if (row[OFFSET] < 0 || row[LENGTH] < 0 || row[OFFSET] > map_bytes ||
        row[LENGTH] > map_bytes - row[OFFSET])
        return 0;
    for (int a = 0; a < AXES; a++) {
        const int64_t *part = row + PARTS + 3 * a;
        int64_t in_chunk = (int64_t)chunks->shape[a], in_out = outs[row[BOX]].shape[a];
        if (part[0] < 0 || part[1] < 1 || part[2] < 0 || part[1] > in_chunk || part[1] > in_out)
            return 0;
        if (part[0] > in_chunk - part[1] || part[2] > in_out - part[1])
            return 0;
    }
    return 1;
}

static size_t voxel_number(const int64_t *row, const Chunks *chunks, int past_the_end)
{
    size_t number = 0;
    for (int a = 0; a < AXES; a++) {
        const int64_t *part = row + PARTS + 3 * a;
        number = number * chunks->shape[a] + (size_t)(past_the_end ? part[0] + part[1] - 1 : part[0]);
    }
    return number + (past_the_end ? 1 : 0);
}

/* Copies all rows. Returns the state of the last row that was reached, and leaves its number in `at`. */
static int gather_rows(const int64_t *rows, size_t count, const Chunks *chunks, const Writer *writer,
                       const Py_buffer *maps, Py_ssize_t map_count, const Py_buffer *outs,
                       Py_ssize_t out_count, size_t *at, Decoded *chunk, uint8_t *line)
{
    int state = FINE;
    for (size_t end; state == FINE && *at < count; *at = end) {
        const int64_t *row = rows + *at * COLUMNS;
        size_t first = SIZE_MAX, stop = 0;
        if (row[OFFSET] < 0) { /* the chunk is missing */
            state = UNKNOWN;
            break;
        }
        for (end = *at; end < count; end++) {
            const int64_t *next = rows + end * COLUMNS;
            if (next[MAP] != row[MAP] || next[OFFSET] != row[OFFSET])
                break;
            if (!row_is_sound(next, chunks, maps, map_count, outs, out_count)) {
                state = BAD_ROW;
                break;
            }
            size_t low = voxel_number(next, chunks, 0), high = voxel_number(next, chunks, 1);
            first = low < first ? low : first;
            stop = high > stop ? high : stop;
        }
        if (state == FINE)
            state = decode_chunk(chunk, (const uint8_t *)maps[row[MAP]].buf + row[OFFSET],
                                 (size_t)row[LENGTH], chunks, first, stop);
        if (state != FINE)
            break;
        for (size_t r = *at; r < end; r++) {
            const int64_t *part = rows + r * COLUMNS;
            write_part(writer, chunk, chunks, part, outs + part[BOX], line,
                       line + TILE + chunks->shape[3] * MAX_ITEM);
        }
    }
    return state;
}

/* As gather_rows; GONE where a file of a map was cut short. */
static int gather_guarded(const int64_t *rows, size_t count, const Chunks *chunks, const Writer *writer,
                          const Py_buffer *maps, Py_ssize_t map_count, const Py_buffer *outs,
                          Py_ssize_t out_count, size_t *at, Decoded *chunk, uint8_t *line)
{
    sigjmp_buf place;
    if (sigsetjmp(place, 0)) {
        guard_end();
        return GONE;
    }
    guard_begin(&place);
    int state =
        gather_rows(rows, count, chunks, writer, maps, map_count, outs, out_count, at, chunk, line);
    guard_end();
    return state;
}

static int gather_all(const int64_t *rows, size_t count, const Chunks *chunks, const Writer *writer,
                      const Py_buffer *maps, Py_ssize_t map_count, const Py_buffer *outs,
                      Py_ssize_t out_count, size_t *at)
{
    int state = NO_MEMORY;
    Decoded chunk = {0};
    chunk.capacity = MAX_ITEM;
    chunk.start = malloc(chunk.capacity * sizeof *chunk.start);
    chunk.scratch = malloc(chunks->blosc ? chunks->bytes + SLACK : SLACK);
    uint8_t *line = malloc(TILE + 2 * chunks->shape[3] * MAX_ITEM);
    if (chunk.start && chunk.scratch && line)
        state = gather_guarded(rows, count, chunks, writer, maps, map_count, outs, out_count, at, &chunk,
                               line);
    free(chunk.start);
    free(chunk.scratch);
    free(line);
    return state;
}

/* ---- copies ---- */

/* Copies along the axes from `axis` on; the last one in runs where both arrays are dense. */
static void copy_axes(const Py_buffer *from, const uint8_t *in, const Py_buffer *to, uint8_t *out,
                      const int *order, int axis)
{
    Py_ssize_t item = from->itemsize;
    if (axis == from->ndim) {
        memcpy(out, in, (size_t)item);
        return;
    }
    int a = order[axis];
    Py_ssize_t count = from->shape[a], step = from->strides[a], stride = to->strides[a];
    if (axis == from->ndim - 1 && step == item && stride == item) {
        memcpy(out, in, (size_t)(count * item));
        return;
    }
    for (Py_ssize_t n = 0; n < count; n++)
        copy_axes(from, in + n * step, to, out + n * stride, order, axis + 1);
}

/* As copy_axes, of an array that is dense along axis `a` to one that is dense along axis `b`. */
static void copy_turned(const Py_buffer *from, const uint8_t *in, const Py_buffer *to, uint8_t *out, int a,
                        int b, Turn turn)
{
    int others[AXES] = {0}, count = 0;
    for (int axis = 0; axis < from->ndim; axis++)
        if (axis != a && axis != b)
            others[count++] = axis;
    Py_ssize_t sizes[2] = {count > 0 ? from->shape[others[0]] : 1, count > 1 ? from->shape[others[1]] : 1};
    for (Py_ssize_t m = 0; m < sizes[0]; m++)
        for (Py_ssize_t n = 0; n < sizes[1]; n++) {
            ptrdiff_t source = m * from->strides[others[0]] + n * from->strides[others[1]];
            ptrdiff_t target = m * to->strides[others[0]] + n * to->strides[others[1]];
            for (Py_ssize_t x = 0; x < from->shape[a]; x += TURNED_VOXELS)
                for (Py_ssize_t z = 0; z < from->shape[b]; z += TURNED_ROWS)
                    turn(out + target + x * to->strides[a] + z * to->strides[b], to->strides[a],
                         in + source + x * from->strides[a] + z * from->strides[b], from->strides[b],
                         smaller((size_t)(from->shape[b] - z), TURNED_ROWS),
                         smaller((size_t)(from->shape[a] - x), TURNED_VOXELS));
        }
}

/* The axis that an array is dense along, of those with several voxels; -1 if there is none. */
static int dense_axis(const Py_buffer *view)
{
    for (int axis = 0; axis < view->ndim; axis++)
        if (view->shape[axis] > 1 && view->strides[axis] == view->itemsize)
            return axis;
    return -1;
}

static int copy_guarded(const Py_buffer *from, const Py_buffer *to, const int *order)
{
    sigjmp_buf place;
    if (sigsetjmp(place, 0)) {
        guard_end();
        return 0;
    }
    int a = dense_axis(from), b = dense_axis(to);
    Writer writer = {0};
    guard_begin(&place);
    if (a >= 0 && b >= 0 && a != b && choose_writer(&writer, (size_t)from->itemsize, ""))
        copy_turned(from, from->buf, to, to->buf, a, b, writer.turn);
    else
        copy_axes(from, from->buf, to, to->buf, order, 0);
    guard_end();
    return 1;
}

/* ---- Python ---- */

static void release(Py_buffer *buffers, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        PyBuffer_Release(buffers + i);
    PyMem_Free(buffers);
}

static Py_buffer *acquire(PyObject *objects, int flags, Py_ssize_t *count)
{
    Py_ssize_t size = PySequence_Size(objects);
    if (size < 0)
        return NULL;
    Py_buffer *buffers = PyMem_Calloc((size_t)size + 1, sizeof *buffers);
    if (!buffers)
        return (Py_buffer *)PyErr_NoMemory();
    for (*count = 0; *count < size; ++*count) {
        PyObject *object = PySequence_GetItem(objects, *count);
        int failed = !object || PyObject_GetBuffer(object, buffers + *count, flags);
        Py_XDECREF(object);
        if (failed) {
            release(buffers, *count);
            return NULL;
        }
    }
    return buffers;
}

static const char *problem_with(const Chunks *chunks, const Py_buffer *rows, const Py_buffer *outs,
                                Py_ssize_t out_count, const Writer *writer)
{
    size_t bytes = chunks->item, limit = chunks->blosc ? INT_MAX : PTRDIFF_MAX / (4 * MAX_ITEM);
    for (int a = 0; a < AXES; a++) {
        if (chunks->shape[a] < 1 || bytes > limit / chunks->shape[a])
            return "a chunk must have 1 byte to 2 GiB, or more where it is not compressed";
        bytes *= chunks->shape[a];
    }
    if (rows->len % (Py_ssize_t)(COLUMNS * sizeof(int64_t)))
        return "rows must have 16 columns of int64";
    for (Py_ssize_t i = 0; i < out_count; i++)
        if (outs[i].ndim != AXES || outs[i].itemsize != (Py_ssize_t)writer->written)
            return "outs must have 4 axes and voxels of the size that is written";
    return NULL;
}

static PyObject *gather(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *row_object, *map_objects, *out_objects;
    Py_ssize_t start, c, z, y, x, item;
    const char *codec, *scaled_from;
    Scaling scaling;
    Writer writer;
    if (!PyArg_ParseTuple(arguments, "OnOO(nnnn)nssdddd:gather", &row_object, &start, &map_objects,
                          &out_objects, &c, &z, &y, &x, &item, &codec, &scaled_from, &scaling.slope,
                          &scaling.inter, &scaling.low, &scaling.high))
        return NULL;
    if (start < 0 || c < 1 || z < 1 || y < 1 || x < 1 || item < 1 ||
        !choose_writer(&writer, (size_t)item, scaled_from)) {
        PyErr_SetString(PyExc_ValueError, "this shape of chunks or type of voxels is not supported");
        return NULL;
    }
    writer.scaling = scaling;
    Chunks chunks = {{(size_t)c, (size_t)z, (size_t)y, (size_t)x}, (size_t)item, 0, !strcmp(codec, "blosc")};
    Py_buffer rows;
    if (PyObject_GetBuffer(row_object, &rows, PyBUF_C_CONTIGUOUS))
        return NULL;
    PyObject *answer = NULL;
    Py_ssize_t map_count = 0, out_count = 0;
    Py_buffer *maps = acquire(map_objects, PyBUF_SIMPLE, &map_count);
    Py_buffer *outs = maps ? acquire(out_objects, PyBUF_WRITABLE | PyBUF_STRIDES, &out_count) : NULL;
    if (!outs)
        goto done;
    const char *problem = problem_with(&chunks, &rows, outs, out_count, &writer);
    if (problem) {
        PyErr_SetString(PyExc_ValueError, problem);
        goto done;
    }
    chunks.bytes = chunks.item * chunks.shape[0] * chunks.shape[1] * chunks.shape[2] * chunks.shape[3];
    size_t count = (size_t)rows.len / (COLUMNS * sizeof(int64_t)), at = (size_t)start;
    int state;
    Py_BEGIN_ALLOW_THREADS state =
        gather_all(rows.buf, count, &chunks, &writer, maps, map_count, outs, out_count, &at);
    Py_END_ALLOW_THREADS if (state == NO_MEMORY) PyErr_NoMemory();
    else if (state == BAD_ROW)
        PyErr_Format(PyExc_ValueError, "row %zu reaches outside its map, its chunk or its box", at);
    else answer = Py_BuildValue("ni", (Py_ssize_t)at, state == DAMAGED || state == GONE ? state : FINE);
done:
    if (outs)
        release(outs, out_count);
    if (maps)
        release(maps, map_count);
    PyBuffer_Release(&rows);
    return answer;
}

static long long step_of(const Py_buffer *view, int axis)
{
    return view->shape[axis] > 1 ? llabs(view->strides[axis]) : LLONG_MAX;
}

static PyObject *copy(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *from_object, *to_object;
    Py_buffer from, to;
    if (!PyArg_ParseTuple(arguments, "OO:copy", &from_object, &to_object) ||
        PyObject_GetBuffer(from_object, &from, PyBUF_STRIDES))
        return NULL;
    if (PyObject_GetBuffer(to_object, &to, PyBUF_WRITABLE | PyBUF_STRIDES)) {
        PyBuffer_Release(&from);
        return NULL;
    }
    int fits = from.ndim == to.ndim && from.ndim <= AXES && from.itemsize == to.itemsize, whole = 0;
    for (int a = 0; fits && a < from.ndim; a++)
        fits = from.shape[a] == to.shape[a];
    if (fits) {
        int order[AXES]; /* the axes, that with the smallest steps in the source last */
        for (int a = 0; a < from.ndim; a++) {
            int place = a;
            for (; place > 0 && step_of(&from, order[place - 1]) < step_of(&from, a); place--)
                order[place] = order[place - 1];
            order[place] = a;
        }
        Py_BEGIN_ALLOW_THREADS
        whole = copy_guarded(&from, &to, order);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    if (fits)
        return PyBool_FromLong(whole);
    PyErr_SetString(PyExc_ValueError, "both must have the same shape of at most 4 axes, and one type");
    return NULL;
}

static PyObject *scale(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *voxel_object, *out_object;
    const char *scaled_from;
    Scaling scaling;
    Writer writer = {0};
    if (!PyArg_ParseTuple(arguments, "OOsdddd:scale", &voxel_object, &out_object, &scaled_from, &scaling.slope,
                          &scaling.inter, &scaling.low, &scaling.high))
        return NULL;
    Py_buffer voxels, out;
    if (PyObject_GetBuffer(voxel_object, &voxels, PyBUF_C_CONTIGUOUS))
        return NULL;
    if (PyObject_GetBuffer(out_object, &out, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)) {
        PyBuffer_Release(&voxels);
        return NULL;
    }
    Py_ssize_t count = voxels.itemsize ? voxels.len / voxels.itemsize : 0;
    int fits = choose_writer(&writer, (size_t)voxels.itemsize, scaled_from) && writer.scale &&
               out.itemsize == (Py_ssize_t)writer.written && out.len == count * out.itemsize;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        writer.scale(out.buf, voxels.buf, (size_t)count, &scaling);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&voxels);
    PyBuffer_Release(&out);
    if (fits)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError,
                    "the type of the voxels is not supported, or out has another number of voxels");
    return NULL;
}

static PyMethodDef methods[] = {
    {"gather", gather, METH_VARARGS,
     "gather(rows, start, maps, outs, chunk_shape, itemsize, codec, scaled_from, slope, inter, low, "
     "high)\n--\n\n"
     "Copy parts of chunks into boxes, from row ``start`` on.\n\n"
     "Gives the row at which it stopped (the number of rows where all are copied), and 1 if that row's chunk\n"
     "is damaged, 5 if its file was cut short; otherwise the chunk is missing or its encoding is not\n"
     "supported here."},
    {"copy", copy, METH_VARARGS,
     "copy(source, out)\n--\n\n"
     "Copy an array of at most 4 axes that views a memory map; False if its file was cut short."},
    {"scale", scale, METH_VARARGS,
     "scale(voxels, out, scaled_from, slope, inter, low, high)\n--\n\n"
     "Write the scaled values of voxels, as float32; both are contiguous."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "zpatch.chunks._gather",
    "The inner loop of a group read.",
    0,
    methods,
    NULL,
    NULL,
    NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__gather(void)
{
    return PyModuleDef_Init(&definition);
}
