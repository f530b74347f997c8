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

#include "_copies.h"
#include "_decode.h"
#include "_guard.h"
#include "_parts.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "voxels are stored in little-endian order; on big-endian machines zpatch reads without this file"
#endif

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
