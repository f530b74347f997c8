/* How often each value occurs, where values are nonzero, and the moments of floats, for an image's statistics.

Values are counted by their leading 16 bits or fewer, as unsigned numbers. Neighbours are often equal, and counting
one value twice in a row waits for the first count; so neighbours are counted in different tables, which are summed.
Eight equal bytes, as in most of a label map, are counted at once.

The box around nonzero voxels only grows: of a line inside it on the other axes, only the ends are looked at.

Moments are computed in pieces that stay in the cache, the mean before the squares of what differs from it, and
merged by the formulas of Chan, Golub and LeVeque (1979). */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TABLES 4
#define MOST_AT_ONCE ((size_t)1 << 31) /* so that no count leaves 32 bits */

static void count_1(const uint8_t *voxels, size_t count, uint32_t *tables)
{
    size_t at = 0;
    for (uint64_t word; at + sizeof word <= count; at += sizeof word) {
        memcpy(&word, voxels + at, sizeof word);
        if (word == voxels[at] * 0x0101010101010101u) {
            tables[voxels[at]] += sizeof word;
            continue;
        }
        for (size_t n = 0; n < sizeof word; n++)
            tables[256 * (n % TABLES) + voxels[at + n]]++;
    }
    for (; at < count; at++)
        tables[voxels[at]]++;
}

static void count_2(const uint16_t *voxels, size_t count, uint32_t *tables)
{
    size_t at = 0;
    for (; at + TABLES <= count; at += TABLES)
        for (size_t n = 0; n < TABLES; n++)
            tables[65536 * n + voxels[at + n]]++;
    for (; at < count; at++)
        tables[voxels[at]]++;
}

static void count_4(const uint32_t *voxels, size_t count, uint32_t *tables)
{
    size_t at = 0;
    for (; at + TABLES <= count; at += TABLES)
        for (size_t n = 0; n < TABLES; n++)
            tables[65536 * n + (voxels[at + n] >> 16)]++;
    for (; at < count; at++)
        tables[voxels[at] >> 16]++;
}

static size_t values_of(size_t item)
{
    return item == 1 ? 256 : 65536;
}

static int count_all(const uint8_t *voxels, size_t count, size_t item, int64_t *counts)
{
    size_t values = values_of(item);
    uint32_t *tables = malloc(TABLES * values * sizeof *tables);
    if (!tables)
        return 0;
    while (count) {
        size_t some = count < MOST_AT_ONCE ? count : MOST_AT_ONCE;
        memset(tables, 0, TABLES * values * sizeof *tables);
        if (item == 1)
            count_1(voxels, some, tables);
        else if (item == 2)
            count_2((const uint16_t *)voxels, some, tables);
        else
            count_4((const uint32_t *)voxels, some, tables);
        for (size_t value = 0; value < values; value++)
            for (size_t n = 0; n < TABLES; n++)
                counts[value] += tables[values * n + value];
        voxels += some * item;
        count -= some;
    }
    free(tables);
    return 1;
}

/* Voxels (.., x) of one byte, in pieces of `length` along x, each with its own tables. */
typedef struct {
    size_t length, pieces;
    uint32_t *tables;
} Pieces;

static void count_lines(const Pieces *cut, const Py_buffer *view, const uint8_t *voxels, int axis)
{
    size_t size = (size_t)view->shape[axis];
    if (axis < view->ndim - 1) {
        for (size_t n = 0; n < size; n++)
            count_lines(cut, view, voxels + (Py_ssize_t)n * view->strides[axis], axis + 1);
        return;
    }
    for (size_t n = 0; n < cut->pieces; n++) {
        size_t first = n * cut->length, left = size - first;
        count_1(voxels + first, left < cut->length ? left : cut->length, cut->tables + TABLES * 256 * n);
    }
}

static PyObject *count_pieces(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *voxel_object, *count_object;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(arguments, "OnO:count_pieces", &voxel_object, &length, &count_object))
        return NULL;
    Py_buffer voxels, counts;
    if (PyObject_GetBuffer(voxel_object, &voxels, PyBUF_STRIDES))
        return NULL;
    if (PyObject_GetBuffer(count_object, &counts, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)) {
        PyBuffer_Release(&voxels);
        return NULL;
    }
    int last = voxels.ndim - 1, done = 0;
    Pieces cut = {(size_t)length, 0, NULL};
    int fits = last >= 0 && length > 0 && voxels.itemsize == 1 && (voxels.strides[last] == 1 || voxels.shape[last] < 2) &&
               (size_t)voxels.len < MOST_AT_ONCE && counts.itemsize == sizeof(int64_t);
    if (fits) {
        cut.pieces = ((size_t)voxels.shape[last] + cut.length - 1) / cut.length;
        fits = (size_t)counts.len == sizeof(int64_t) * 256 * cut.pieces;
    }
    if (fits && (cut.tables = calloc(TABLES * 256 * cut.pieces + 1, sizeof *cut.tables))) {
        Py_BEGIN_ALLOW_THREADS
        if (voxels.len)
            count_lines(&cut, &voxels, voxels.buf, 0);
        for (size_t n = 0; n < 256 * cut.pieces; n++)
            for (size_t table = 0; table < TABLES; table++)
                ((int64_t *)counts.buf)[n] += cut.tables[256 * (TABLES * (n / 256) + table) + n % 256];
        Py_END_ALLOW_THREADS
        free(cut.tables);
        done = 1;
    }
    PyBuffer_Release(&voxels);
    PyBuffer_Release(&counts);
    if (done)
        Py_RETURN_NONE;
    if (fits)
        return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError, "bytes that are dense on the last axis are counted in 256 int64 for each piece");
    return NULL;
}

static PyObject *count(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *voxel_object, *count_object;
    if (!PyArg_ParseTuple(arguments, "OO:count", &voxel_object, &count_object))
        return NULL;
    Py_buffer voxels, counts;
    if (PyObject_GetBuffer(voxel_object, &voxels, PyBUF_C_CONTIGUOUS))
        return NULL;
    if (PyObject_GetBuffer(count_object, &counts, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)) {
        PyBuffer_Release(&voxels);
        return NULL;
    }
    size_t item = (size_t)voxels.itemsize;
    int fits = (item == 1 || item == 2 || item == 4) && counts.itemsize == sizeof(int64_t) &&
               (size_t)counts.len == sizeof(int64_t) * values_of(item) && (uintptr_t)voxels.buf % item == 0;
    int done = 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        done = count_all(voxels.buf, (size_t)voxels.len / item, item, counts.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&voxels);
    PyBuffer_Release(&counts);
    if (done)
        Py_RETURN_NONE;
    if (fits)
        return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError,
                    "values of one, two or four bytes are counted in 256 or, those longer than one, 65536 int64");
    return NULL;
}

#define BLOCK 32 /* values that are looked at together */

/* The number of the first value with a bit of the mask, and one more than that of the last; where there is none,
the count and 0. */
#define DEFINE_SCANS(type)                                                                                  \
    static size_t first_of_##type(const type *values, size_t count, type mask)                              \
    {                                                                                                       \
        size_t at = 0;                                                                                      \
        for (; at + BLOCK <= count; at += BLOCK) {                                                          \
            type any = 0;                                                                                   \
            for (size_t n = 0; n < BLOCK; n++)                                                              \
                any |= values[at + n];                                                                      \
            if (any & mask)                                                                                 \
                break;                                                                                      \
        }                                                                                                   \
        while (at < count && !(values[at] & mask))                                                          \
            at++;                                                                                           \
        return at;                                                                                          \
    }                                                                                                       \
    static size_t stop_of_##type(const type *values, size_t count, type mask)                               \
    {                                                                                                       \
        size_t stop = count;                                                                                \
        for (; stop >= BLOCK; stop -= BLOCK) {                                                              \
            type any = 0;                                                                                   \
            for (size_t n = 1; n <= BLOCK; n++)                                                             \
                any |= values[stop - n];                                                                    \
            if (any & mask)                                                                                 \
                break;                                                                                      \
        }                                                                                                   \
        while (stop && !(values[stop - 1] & mask))                                                          \
            stop--;                                                                                         \
        return stop;                                                                                        \
    }

DEFINE_SCANS(uint8_t)
DEFINE_SCANS(uint16_t)
DEFINE_SCANS(uint32_t)
DEFINE_SCANS(uint64_t)

static size_t first_of(const uint8_t *values, size_t count, size_t item, uint64_t mask)
{
    return item == 1   ? first_of_uint8_t(values, count, (uint8_t)mask)
           : item == 2 ? first_of_uint16_t((const uint16_t *)values, count, (uint16_t)mask)
           : item == 4 ? first_of_uint32_t((const uint32_t *)values, count, (uint32_t)mask)
                       : first_of_uint64_t((const uint64_t *)values, count, mask);
}

static size_t stop_of(const uint8_t *values, size_t count, size_t item, uint64_t mask)
{
    return item == 1   ? stop_of_uint8_t(values, count, (uint8_t)mask)
           : item == 2 ? stop_of_uint16_t((const uint16_t *)values, count, (uint16_t)mask)
           : item == 4 ? stop_of_uint32_t((const uint32_t *)values, count, (uint32_t)mask)
                       : stop_of_uint64_t((const uint64_t *)values, count, mask);
}

static void widen(size_t *ends, size_t first, size_t stop)
{
    ends[0] = first < ends[0] ? first : ends[0];
    ends[1] = stop > ends[1] ? stop : ends[1];
}

/* First and stop of nonzero voxels on each axis; nothing is found if a first stays at the shape. */
static void box_of(const uint8_t *voxels, const size_t *shape, size_t item, uint64_t mask, size_t ends[3][2])
{
    for (int axis = 0; axis < 3; axis++)
        ends[axis][0] = shape[axis], ends[axis][1] = 0;
    for (size_t z = 0; z < shape[0]; z++)
        for (size_t y = 0; y < shape[1]; y++, voxels += shape[2] * item) {
            size_t *x = ends[2];
            int inside = ends[0][1] == z + 1 && ends[1][0] <= y && y < ends[1][1];
            size_t first = first_of(voxels, inside ? x[0] : shape[2], item, mask);
            if (inside && x[1] < shape[2]) {
                size_t stop = stop_of(voxels + x[1] * item, shape[2] - x[1], item, mask);
                x[1] += stop;
            }
            if (inside) {
                x[0] = first < x[0] ? first : x[0];
            } else if (first < shape[2]) {
                widen(x, first, stop_of(voxels, shape[2], item, mask));
                widen(ends[0], z, z + 1);
                widen(ends[1], y, y + 1);
            }
        }
}

static PyObject *box(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *voxel_object;
    unsigned long long mask;
    if (!PyArg_ParseTuple(arguments, "OK:box", &voxel_object, &mask))
        return NULL;
    Py_buffer voxels;
    if (PyObject_GetBuffer(voxel_object, &voxels, PyBUF_C_CONTIGUOUS))
        return NULL;
    size_t item = (size_t)voxels.itemsize, shape[3], ends[3][2];
    int fits = voxels.ndim == 3 && (item == 1 || item == 2 || item == 4 || item == 8) &&
               (uintptr_t)voxels.buf % item == 0;
    if (fits) {
        for (int axis = 0; axis < 3; axis++)
            shape[axis] = (size_t)voxels.shape[axis];
        Py_BEGIN_ALLOW_THREADS
        box_of(voxels.buf, shape, item, mask, ends);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&voxels);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "boxes are found of values of one, two, four or eight bytes on three axes");
        return NULL;
    }
    if (!ends[0][1])
        Py_RETURN_NONE;
    return Py_BuildValue("[(nn)(nn)(nn)]", (Py_ssize_t)ends[0][0], (Py_ssize_t)ends[0][1], (Py_ssize_t)ends[1][0],
                         (Py_ssize_t)ends[1][1], (Py_ssize_t)ends[2][0], (Py_ssize_t)ends[2][1]);
}

#define LANES 8
#define PIECE 4096

typedef struct {
    int64_t finite, positive_zeros, negative_zeros, infinite;
    double mean, squares; /* squares: the sum of squared differences from the mean */
    float low, high;      /* of nonzero values */
} moments_t;

/* Copy the finite values of a piece, and return how many there are. */
static size_t finite_of(const float *voxels, size_t count, float *finite, moments_t *moments)
{
    size_t kept = 0, infinite = 0, positive = 0, negative = 0, unusual = 0;
    for (size_t at = 0; at < count; at++) {
        uint32_t bits;
        memcpy(&bits, voxels + at, sizeof bits);
        unusual += (bits & 0x7f800000) == 0x7f800000;
        positive += bits == 0;
        negative += bits == 0x80000000;
    }
    moments->positive_zeros += (int64_t)positive;
    moments->negative_zeros += (int64_t)negative;
    if (!unusual) {
        memcpy(finite, voxels, count * sizeof *finite);
        return count;
    }
    for (size_t at = 0; at < count; at++) {
        infinite += isinf(voxels[at]) != 0;
        if (isfinite(voxels[at]))
            finite[kept++] = voxels[at];
    }
    moments->infinite += (int64_t)infinite;
    return kept;
}

static void extremes_of(const float *voxels, size_t count, moments_t *moments)
{
    float low[LANES], high[LANES];
    for (size_t n = 0; n < LANES; n++)
        low[n] = moments->low, high[n] = moments->high;
    for (size_t at = 0; at < count; at += LANES)
        for (size_t n = 0; n < LANES; n++) {
            float least = voxels[at + n] != 0 ? voxels[at + n] : INFINITY;
            float most = voxels[at + n] != 0 ? voxels[at + n] : -INFINITY;
            low[n] = least < low[n] ? least : low[n];
            high[n] = most > high[n] ? most : high[n];
        }
    for (size_t n = 0; n < LANES; n++) {
        moments->low = low[n] < moments->low ? low[n] : moments->low;
        moments->high = high[n] > moments->high ? high[n] : moments->high;
    }
}

/* The sum of (value - centre) ** power over values that come in whole lanes, power 1 or 2. */
static double sum_of(const float *voxels, size_t count, double centre, int power)
{
    double sums[LANES] = {0}, sum = 0;
    for (size_t at = 0; at < count; at += LANES)
        for (size_t n = 0; n < LANES; n++) {
            double difference = voxels[at + n] - centre;
            sums[n] += power == 1 ? difference : difference * difference;
        }
    for (size_t n = 0; n < LANES; n++)
        sum += sums[n];
    return sum;
}

static void add_piece(const float *voxels, size_t count, moments_t *moments)
{
    float finite[PIECE];
    size_t kept = finite_of(voxels, count, finite, moments), padded = kept;
    if (!kept)
        return;
    while (padded % LANES) /* repeat the last value up to a whole number of lanes; counted out below */
        finite[padded++] = finite[kept - 1];
    double repeated = (double)(padded - kept), last = finite[kept - 1], held = (double)moments->finite;
    double mean = (sum_of(finite, padded, 0, 1) - repeated * last) / (double)kept;
    double squares = sum_of(finite, padded, mean, 2) - repeated * (last - mean) * (last - mean);
    double delta = mean - moments->mean, total = held + (double)kept;
    moments->squares += squares + delta * delta * held * (double)kept / total;
    moments->mean += delta * (double)kept / total;
    moments->finite += (int64_t)kept;
    extremes_of(finite, padded, moments);
}

static PyObject *moments(PyObject *module, PyObject *voxel_object)
{
    (void)module;
    Py_buffer voxels;
    if (PyObject_GetBuffer(voxel_object, &voxels, PyBUF_C_CONTIGUOUS))
        return NULL;
    if (voxels.itemsize != sizeof(float) || (uintptr_t)voxels.buf % sizeof(float)) {
        PyBuffer_Release(&voxels);
        PyErr_SetString(PyExc_ValueError, "moments are computed of float32");
        return NULL;
    }
    moments_t found = {0, 0, 0, 0, 0, 0, INFINITY, -INFINITY};
    size_t count = (size_t)voxels.len / sizeof(float);
    Py_BEGIN_ALLOW_THREADS
    for (size_t at = 0; at < count; at += PIECE)
        add_piece((const float *)voxels.buf + at, count - at < PIECE ? count - at : PIECE, &found);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&voxels);
    return Py_BuildValue("LLLLdddd", (long long)found.finite, (long long)found.positive_zeros,
                         (long long)found.negative_zeros, (long long)found.infinite, found.mean, found.squares,
                         (double)found.low, (double)found.high);
}

static PyMethodDef methods[] = {
    {"count", count, METH_VARARGS,
     "count(voxels, counts)\n--\n\n"
     "Add how often each value of one or two bytes occurs to ``counts``, by its bits as an unsigned number; of\n"
     "values of four bytes, how often each leading half occurs."},
    {"count_pieces", count_pieces, METH_VARARGS,
     "count_pieces(voxels, length, counts)\n--\n\n"
     "Add how often each byte occurs to ``counts`` (n, 256), in each of n pieces of ``length`` along the last axis."},
    {"box", box, METH_VARARGS,
     "box(voxels, mask)\n--\n\n"
     "First and stop on each axis of the values (z, y, x) that have a bit of the mask; None if there is none."},
    {"moments", moments, METH_O,
     "moments(voxels)\n--\n\n"
     "How many float32 are finite, 0.0, -0.0 and infinite; the mean of finite ones, the sum of their squared\n"
     "differences from it, and the least and the greatest nonzero one (inf and -inf if there is none)."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "zpatch.store._count", "How often and where values occur, and moments.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__count(void)
{
    return PyModuleDef_Init(&definition);
}
