/* The inner loop of a group read: encoded chunks in shards, memory-mapped or open -> parts of boxes.
 *
 * Each chunk is decoded as far as its boxes need it, and its voxels are copied from the decoded planes of
 * bytes straight into the boxes. A chunk in an encoding that is not supported here is reported, and gather.py
 * decodes it with numcodecs: the same voxels, slower.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* preadv2 */
#endif
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <limits.h>

#include "_copies.h"
#include "_decode.h"
#include "_encoded.h"
#include "_guard.h"
#include "_parts.h"
#include "_strips.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "voxels are stored in little-endian order; on big-endian machines zpatch reads without this file"
#endif

/* ---- rows ---- */

enum { HELD_BYTES = 8 << 16 }; /* of decoded chunks that are held together */

typedef struct {
    const int64_t *rows;
    size_t count;
    const uint8_t *checks; /* for each row, whether its chunk is compared with its checksum; or NULL */
    Chunks chunks;
    Writer writer;
    Shard *shards;
    Py_ssize_t shard_count, out_count;
    const Py_buffer *outs;
    int streams; /* whether whole lines are written past the cache */
} Work;

typedef struct {
    Decoded chunk;
    Copy copy;         /* of its encoded bytes, of which it may be a view */
    size_t begin, end; /* its rows */
} Slot;

typedef struct {
    Slot slots[MOST_PIECES]; /* chunks that follow each other in a box, and are held together */
    size_t slot_count;
    uint8_t *tiles;
    int waits; /* whether chunks were asked for, as bytes were not in the system's memory */
    Fetched fetched;
} Memory;

static int bytes_are_sound(const Work *work, const int64_t *row, int is_checked)
{
    if (row[MAP] < 0 || row[MAP] >= work->shard_count || row[OFFSET] < 0 || row[LENGTH] < 0)
        return 0;
    const Shard *shard = work->shards + row[MAP];
    int64_t most = shard->map ? shard->bytes : MOST_COPIED, checksum = is_checked ? CRC_BYTES : 0;
    if (!shard->map)
        return row[LENGTH] <= most && row[OFFSET] <= INT64_MAX - most - CRC_BYTES;
    return row[OFFSET] <= most && row[LENGTH] <= most - row[OFFSET] &&
           checksum <= most - row[OFFSET] - row[LENGTH];
}

static int row_is_sound(const Work *work, size_t at)
{
    const int64_t *row = work->rows + at * COLUMNS;
    if (!bytes_are_sound(work, row, work->checks && work->checks[at]) || row[BOX] < 0 ||
        row[BOX] >= work->out_count)
        return 0;
    for (int a = 0; a < AXES; a++) {
        const int64_t *part = row + PARTS + 3 * a;
        int64_t in_chunk = (int64_t)work->chunks.shape[a], in_out = work->outs[row[BOX]].shape[a];
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

static int is_same_chunk(const int64_t *row, const int64_t *next)
{
    return next[MAP] == row[MAP] && next[OFFSET] == row[OFFSET];
}

/* Finds the end of the rows of a chunk, and which of its voxels they need. */
static int rows_of_chunk(const Work *work, size_t at, size_t *end, size_t *first, size_t *stop)
{
    const int64_t *row = work->rows + at * COLUMNS;
    *first = SIZE_MAX;
    *stop = 0;
    if (row[OFFSET] < 0) /* the chunk is missing */
        return UNKNOWN;
    for (*end = at; *end < work->count; ++*end) {
        const int64_t *next = work->rows + *end * COLUMNS;
        if (!is_same_chunk(row, next))
            break;
        if (!row_is_sound(work, *end))
            return BAD_ROW;
        size_t low = voxel_number(next, &work->chunks, 0), high = voxel_number(next, &work->chunks, 1);
        *first = low < *first ? low : *first;
        *stop = high > *stop ? high : *stop;
    }
    return FINE;
}

static Place place_of(const Work *work, size_t at)
{
    const int64_t *row = work->rows + at * COLUMNS;
    return (Place){row[OFFSET], (size_t)row[LENGTH], work->checks && work->checks[at]};
}

/* Asks for the chunks from row `at` on that are read for the first time. */
static void ask_for_rest(const Work *work, size_t at)
{
    const int64_t *row = NULL;
    for (; at < work->count; at++) {
        const int64_t *next = work->rows + at * COLUMNS;
        Place place = place_of(work, at);
        if ((!row || !is_same_chunk(row, next)) && bytes_are_sound(work, next, place.is_checked) &&
            (place.is_checked || !work->shards[next[MAP]].map))
            ask_for(work->shards + next[MAP], &place);
        row = next;
    }
}

/* Decodes the chunk of row `at`, as far as its voxels from `first` up to `stop` need it. */
static int decode_row(const Work *work, Memory *memory, Slot *slot, size_t at, size_t first, size_t stop)
{
    const Shard *shard = work->shards + work->rows[at * COLUMNS + MAP];
    const Chunks *chunks = &work->chunks;
    Place place = place_of(work, at);
    const uint8_t *bytes;
    int is_whole = chunks->blosc || place.length != chunks->bytes;
    size_t from = is_whole ? 0 : first * chunks->item, to = is_whole ? place.length : stop * chunks->item;
    int is_new = place.is_checked || !shard->map;
    long long begin = is_new ? now_ns() : 0;
    int state = !memory->waits && shard->map && place.is_checked ? WAITS : FINE;
    if (state == FINE)
        state = find_bytes(&slot->copy, shard, &place, from, to, memory->waits, &bytes);
    if (state == WAITS) {
        memory->waits = 1;
        ask_for_rest(work, at);
        state = find_bytes(&slot->copy, shard, &place, from, to, memory->waits, &bytes);
    }
    count_chunk(&memory->fetched, &place, is_new ? now_ns() - begin : -1);
    return state == FINE ? decode_chunk(&slot->chunk, bytes, place.length, chunks, first, stop) : state;
}

/* Finds the row of a slot that continues a part, or that a part continues; NULL if there is none. */
static const int64_t *neighbour(const Work *work, const Slot *slot, const int64_t *part, int is_after)
{
    for (size_t at = slot->begin; at < slot->end; at++) {
        const int64_t *row = work->rows + at * COLUMNS;
        if (continues(is_after ? part : row, is_after ? row : part, work->outs, &work->writer))
            return row;
    }
    return NULL;
}

/* Whether the chunk of some rows is of the same shard as that of a slot, and continues one of its parts. */
static int slot_continues(const Work *work, const Slot *slot, size_t at, size_t end)
{
    if (work->rows[at * COLUMNS + MAP] != work->rows[slot->begin * COLUMNS + MAP])
        return 0;
    for (; at < end; at++)
        if (neighbour(work, slot, work->rows + at * COLUMNS, 0))
            return 1;
    return 0;
}

/* Decodes the chunk of row `at` and those that continue its parts, as many as are held together. Returns the
 * state of the last one, and leaves in `at` the row of the first that is not decoded. */
static int decode_slots(const Work *work, Memory *memory, size_t *at, size_t *filled)
{
    int state = FINE;
    for (*filled = 0; *filled < memory->slot_count && *at < work->count; ++*filled) {
        Slot *slot = memory->slots + *filled;
        size_t first, stop;
        state = rows_of_chunk(work, *at, &slot->end, &first, &stop);
        if (state == FINE && *filled && !slot_continues(work, slot - 1, *at, slot->end))
            break;
        if (state == FINE)
            state = decode_row(work, memory, slot, *at, first, stop);
        if (state != FINE)
            break;
        slot->begin = *at;
        *at = slot->end;
    }
    return state;
}

static void write_slots(const Work *work, const Memory *memory, size_t filled)
{
    for (size_t s = 0; s < filled; s++)
        for (size_t at = memory->slots[s].begin; at < memory->slots[s].end; at++) {
            const int64_t *part = work->rows + at * COLUMNS;
            if (!work->streams) {
                write_part(&work->writer, &memory->slots[s].chunk, &work->chunks, part,
                           work->outs + part[BOX], memory->tiles);
                continue;
            }
            if (s > 0 && neighbour(work, memory->slots + s - 1, part, 0))
                continue; /* it was written with that one */
            Strip strip = {{{0}}, 0};
            for (size_t n = s; part; part = n < filled ? neighbour(work, memory->slots + n, part, 1) : NULL)
                strip.pieces[strip.count++] = (Piece){&memory->slots[n++].chunk, part};
            write_strip(&work->writer, &strip, &work->chunks, work->outs, memory->tiles);
        }
}

/* Copies all rows. Returns the state of the last row that was reached, and leaves its number in `at`. */
static int gather_rows(const Work *work, Memory *memory, size_t *at)
{
    int state = FINE;
    while (state == FINE && *at < work->count) {
        size_t next = *at, filled;
        state = decode_slots(work, memory, &next, &filled);
        write_slots(work, memory, filled);
        *at = next;
    }
    return state;
}

/* As gather_rows; GONE where a file of a map was cut short. */
static int gather_guarded(const Work *work, Memory *memory, size_t *at)
{
    sigjmp_buf place;
    if (sigsetjmp(place, 0)) {
        guard_end();
        return GONE;
    }
    guard_begin(&place);
    int state = gather_rows(work, memory, at);
    guard_end();
    return state;
}

/* Makes room for as many decoded chunks as stay in the processor's cache; 0 if there is none. */
static int make_slots(const Work *work, Memory *memory)
{
    size_t fitting = HELD_BYTES / work->chunks.bytes, wanted = !work->streams ? 1 : fitting ? fitting : 1;
    for (; memory->slot_count < smaller(wanted, MOST_PIECES); memory->slot_count++) {
        Decoded *chunk = &memory->slots[memory->slot_count].chunk;
        chunk->capacity = MAX_ITEM;
        chunk->start = malloc(chunk->capacity * sizeof *chunk->start);
        chunk->scratch = malloc(work->chunks.blosc ? work->chunks.bytes + SLACK : SLACK);
        if (!chunk->start || !chunk->scratch)
            return 0;
    }
    memory->tiles = malloc(scratch_bytes(&work->chunks) + strip_bytes());
    return memory->tiles != NULL;
}

static int gather_all(const Work *work, size_t *at, Fetched *fetched)
{
    Memory memory = {0};
    int state = make_slots(work, &memory) ? gather_guarded(work, &memory, at) : NO_MEMORY;
    end_streams();
    *fetched = memory.fetched;
    for (size_t n = 0; n < MOST_PIECES; n++) {
        free(memory.slots[n].chunk.start);
        free(memory.slots[n].chunk.scratch);
        free(memory.slots[n].copy.bytes);
    }
    free(memory.tiles);
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

/* The shards whose bytes are in `maps`, or in the files whose numbers are not -1. */
static Shard *shards_of(const Py_buffer *maps, const Py_buffer *files, Py_ssize_t count)
{
    Shard *shards = PyMem_Calloc((size_t)count + 1, sizeof *shards);
    if (!shards)
        return (Shard *)PyErr_NoMemory();
    for (Py_ssize_t n = 0; n < count; n++) {
        int64_t file = files->len ? ((const int64_t *)files->buf)[n] : -1;
        const uint8_t *map = maps[n].buf ? maps[n].buf : (const uint8_t *)"";
        shards[n] = (Shard){file < 0 ? map : NULL, maps[n].len, (int)file};
    }
    return shards;
}

static const char *problem_with(const Chunks *chunks, Py_ssize_t row_bytes, const Py_buffer *outs,
                                Py_ssize_t out_count, const Writer *writer)
{
    size_t bytes = chunks->item, limit = chunks->blosc ? INT_MAX : PTRDIFF_MAX / (4 * MAX_ITEM);
    for (int a = 0; a < AXES; a++) {
        if (chunks->shape[a] < 1 || bytes > limit / chunks->shape[a])
            return "a chunk must have 1 byte to 2 GiB, or more where it is not compressed";
        bytes *= chunks->shape[a];
    }
    if (row_bytes % (Py_ssize_t)(COLUMNS * sizeof(int64_t)))
        return "rows must have 16 columns of int64";
    for (Py_ssize_t i = 0; i < out_count; i++)
        if (outs[i].ndim != AXES || outs[i].itemsize != (Py_ssize_t)writer->written)
            return "outs must have 4 axes and voxels of the size that is written";
    return NULL;
}

static PyObject *gather_into(Work *work, Py_ssize_t start, PyObject *const *objects)
{
    enum { ROWS, CHECKS, FILES, TABLES };
    Py_buffer tables[TABLES] = {{0}};
    Py_ssize_t held = 0, map_count = 0;
    PyObject *answer = NULL;
    Py_buffer *maps = NULL, *outs = NULL;
    for (; held < TABLES; held++)
        if (PyObject_GetBuffer(objects[held], tables + held, PyBUF_C_CONTIGUOUS))
            goto done;
    maps = acquire(objects[TABLES], PyBUF_SIMPLE, &map_count);
    outs = maps ? acquire(objects[TABLES + 1], PyBUF_WRITABLE | PyBUF_STRIDES, &work->out_count) : NULL;
    if (!outs)
        goto done;
    Chunks *chunks = &work->chunks;
    const char *problem = problem_with(chunks, tables[ROWS].len, outs, work->out_count, &work->writer);
    work->count = (size_t)tables[ROWS].len / (COLUMNS * sizeof(int64_t));
    if (tables[CHECKS].len && (size_t)tables[CHECKS].len != work->count)
        problem = "checks must have one byte for each row, or none";
    if (tables[FILES].len && tables[FILES].len != map_count * (Py_ssize_t)sizeof(int64_t))
        problem = "files must have one int64 for each map, or none";
    if (problem) {
        PyErr_SetString(PyExc_ValueError, problem);
        goto done;
    }
    work->rows = tables[ROWS].buf;
    work->checks = tables[CHECKS].len ? tables[CHECKS].buf : NULL;
    work->shards = shards_of(maps, tables + FILES, map_count);
    if (!work->shards)
        goto done;
    work->shard_count = map_count;
    work->outs = outs;
    chunks->bytes = chunks->item * chunks->shape[0] * chunks->shape[1] * chunks->shape[2] * chunks->shape[3];
    size_t at = (size_t)start;
    int state;
    Fetched fetched;
    Py_BEGIN_ALLOW_THREADS state = gather_all(work, &at, &fetched);
    Py_END_ALLOW_THREADS if (state == NO_MEMORY) PyErr_NoMemory();
    else if (state == BAD_ROW)
        PyErr_Format(PyExc_ValueError, "row %zu reaches outside its map, its chunk or its box", at);
    else answer = Py_BuildValue("niLLLL", (Py_ssize_t)at, state == UNKNOWN ? FINE : state, fetched.chunks,
                                fetched.new_chunks, fetched.bytes, fetched.nanoseconds);
done:
    PyMem_Free(work->shards);
    if (outs)
        release(outs, work->out_count);
    if (maps)
        release(maps, map_count);
    while (held > 0)
        PyBuffer_Release(tables + --held);
    return answer;
}

static PyObject *gather(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *objects[5]; /* rows, checks, files, maps, outs */
    Py_ssize_t start, c, z, y, x, item;
    const char *codec, *scaled_from;
    Scaling scaling;
    Work work = {0};
    if (!PyArg_ParseTuple(arguments, "OOnOOOp(nnnn)nssdddd:gather", objects, objects + 1, &start, objects + 3,
                          objects + 2, objects + 4, &work.streams, &c, &z, &y, &x, &item, &codec,
                          &scaled_from, &scaling.slope, &scaling.inter, &scaling.low, &scaling.high))
        return NULL;
    if (start < 0 || c < 1 || z < 1 || y < 1 || x < 1 || item < 1 ||
        !choose_writer(&work.writer, (size_t)item, scaled_from)) {
        PyErr_SetString(PyExc_ValueError, "this shape of chunks or type of voxels is not supported");
        return NULL;
    }
    work.writer.scaling = scaling;
    work.streams = work.streams && HAS_STREAMS;
    work.chunks =
        (Chunks){{(size_t)c, (size_t)z, (size_t)y, (size_t)x}, (size_t)item, 0, !strcmp(codec, "blosc")};
    return gather_into(&work, start, objects);
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
        writer.scale(out.buf, 0, voxels.buf, 0, 1, (size_t)count, &scaling);
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
     "gather(rows, checks, start, maps, files, outs, streams, chunk_shape, itemsize, codec, scaled_from, slope, "
     "inter, low, high)\n--\n\n"
     "Copy parts of chunks into boxes, from row ``start`` on.\n\n"
     "Chunks of rows whose byte in ``checks`` is not 0 are compared with the crc32c that follows them. Where\n"
     "``files`` has a file descriptor instead of -1, it is read instead of the map of the same number. With\n"
     "``streams``, whole lines of memory are written past the processor's cache.\n\n"
     "Gives the row at which it stopped (the number of rows where all are copied), and 1 if that row's chunk\n"
     "is damaged, 5 if its file was cut short, 6 if its checksum differs; otherwise the chunk is missing or\n"
     "its encoding is not supported here. Then how many chunks were read, and of those that were read for the\n"
     "first time the number, the encoded bytes and the nanoseconds until they were compared."},
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
