/* The inner loops of blending: adding weighted patches, the class of each voxel, and whether all are finite.

Voxels are float32 in any strides, on four axes of which the first is the channel; the inner loop runs along
the axis with the smallest stride. The weight of a voxel is a product of one for each axis, never stored. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>

#define AXES 3
#define EXPONENT 0x7f800000u /* all its bits are set in NaN and infinity, and in no other float32 */
#define AHEAD 8 /* lines between the one that is added and the one that is prefetched */
#define CACHED 16 /* voxels in a line of the cache */
#define BLOCK 512 /* voxels whose best score and class are on the stack */

/* Arrays of anyone need not be aligned; where they are, loads and stores are as fast. */
typedef float Float __attribute__((aligned(1)));
typedef uint32_t Bits __attribute__((aligned(1), may_alias));

/* Twice as fast with the vectors of AVX2. Both compare alike. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) &&                \
    !defined(__SANITIZE_ADDRESS__)
#define CLONED __attribute__((target_clones("avx2", "default")))
#else
#define CLONED
#endif

/* Lines of a tile in a patch are short and far apart: no processor prefetches them itself. A macro, because
compilers remove calls of a function that does nothing else. */
#define PREFETCH(line, count)                                                                               \
    for (Py_ssize_t n_ = 0; n_ < (count); n_ += CACHED)                                                     \
    __builtin_prefetch((line) + n_ * (Py_ssize_t)sizeof(float))

typedef struct {
    char *data;
    Py_ssize_t channels, channel_stride;
    Py_ssize_t shape[AXES], stride[AXES];
} Volume;

static int is_volume(const Py_buffer *view, Py_ssize_t item)
{
    return view->ndim == AXES + 1 && view->itemsize == item && view->strides;
}

static Volume volume_of(const Py_buffer *view, const int *order)
{
    Volume volume = {view->buf, view->shape[0], view->strides[0], {0}, {0}};
    for (int axis = 0; axis < AXES; axis++) {
        volume.shape[axis] = view->shape[1 + order[axis]];
        volume.stride[axis] = view->strides[1 + order[axis]];
    }
    return volume;
}

/* The axes of a volume, the one with the largest step first. */
static void sort_axes(const Py_ssize_t *steps, int *order)
{
    for (int axis = 0; axis < AXES; axis++)
        order[axis] = axis;
    for (int a = 0; a < AXES; a++)
        for (int b = a + 1; b < AXES; b++)
            if (steps[order[b]] > steps[order[a]]) {
                int swapped = order[a];
                order[a] = order[b];
                order[b] = swapped;
            }
}

/* The order of products of weights, whose rounding must not depend on the extent of a part. */
static void order_of_products(const Py_buffer *view, int *order)
{
    sort_axes(view->strides + 1, order);
}

/* The order of loops: axes of one voxel first, so that the inner loop has many. */
static void order_of_loops(const Py_buffer *view, int *order)
{
    Py_ssize_t steps[AXES];
    for (int axis = 0; axis < AXES; axis++)
        steps[axis] = view->shape[1 + axis] > 1 ? view->strides[1 + axis] : PY_SSIZE_T_MAX;
    sort_axes(steps, order);
}

static int same_shape(const Py_buffer *a, const Py_buffer *b, int first)
{
    for (int axis = first; axis <= AXES; axis++)
        if (a->shape[axis] != b->shape[axis])
            return 0;
    return 1;
}

static void add_line(Float *restrict sums, const Float *restrict part, const Float *restrict weights,
                     float weight, Py_ssize_t count, int is_first)
{
    if (is_first)
        for (Py_ssize_t n = 0; n < count; n++)
            sums[n] = weight * weights[n] * part[n];
    else
        for (Py_ssize_t n = 0; n < count; n++)
            sums[n] += weight * weights[n] * part[n];
}

static void add_strided(char *sums, Py_ssize_t sum_stride, const char *part, Py_ssize_t part_stride,
                        const Float *weights, float weight, Py_ssize_t count, int is_first)
{
    for (Py_ssize_t n = 0; n < count; n++) {
        Float *sum = (Float *)(sums + n * sum_stride);
        float product = weight * weights[n] * *(const Float *)(part + n * part_stride);
        *sum = is_first ? product : *sum + product;
    }
}

/* A part that is added to sums, its axes in the order of its strides; the first part overwrites them. */
typedef struct {
    Volume sums, part;
    const Float *weights[AXES];
    int is_first, is_dense;
    Py_buffer views[2 + AXES];
    int held; /* of these views */
} Addition;

static char *line_of(const Volume *volume, Py_ssize_t c, Py_ssize_t a, Py_ssize_t b)
{
    return volume->data + c * volume->channel_stride + a * volume->stride[0] + b * volume->stride[1];
}

/* Parts that continue each other's lines are added line by line, so that memory is read in its order. */
static void add_row(const Addition *row, Py_ssize_t count)
{
    const Py_ssize_t *shape = row->part.shape;
    for (Py_ssize_t c = 0; c < row->part.channels; c++)
        for (Py_ssize_t a = 0; a < shape[0]; a++)
            for (Py_ssize_t b = 0; b < shape[1]; b++)
                for (const Addition *one = row; one < row + count; one++) {
                    char *to = line_of(&one->sums, c, a, b), *from = line_of(&one->part, c, a, b);
                    Py_ssize_t length = one->part.shape[2];
                    float weight = one->weights[0][a] * one->weights[1][b];
                    if (!one->is_dense) {
                        add_strided(to, one->sums.stride[2], from, one->part.stride[2], one->weights[2],
                                    weight, length, one->is_first);
                        continue;
                    }
                    PREFETCH(from + AHEAD * one->part.stride[1], length);
                    PREFETCH(to + AHEAD * one->sums.stride[1], length);
                    add_line((Float *)to, (const Float *)from, one->weights[2], weight, length,
                             one->is_first);
                }
}

/* Whether a part begins where another of the same patch ends, on the axis of the smallest stride. */
static int continues(const Addition *next, const Addition *one)
{
    const Volume *a = &one->part, *b = &next->part;
    int alike = a->channels == b->channels && a->channel_stride == b->channel_stride;
    for (int axis = 0; axis < AXES; axis++)
        alike &= a->stride[axis] == b->stride[axis] && (axis == 2 || a->shape[axis] == b->shape[axis]);
    return alike && b->data == a->data + a->shape[2] * a->stride[2];
}

static void add_all(const Addition *additions, Py_ssize_t count)
{
    for (Py_ssize_t first = 0, stop = 1; first < count; first = stop++) {
        while (stop < count && continues(additions + stop, additions + stop - 1))
            stop++;
        add_row(additions + first, stop - first);
    }
}

/* Takes hold of the arrays of a tuple (sums, part, i, j, k, is_first); they are released by its caller. */
static int read_addition(PyObject *tuple, Addition *addition)
{
    PyObject *objects[2 + AXES];
    int problem, order[AXES];
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "an addition must be a tuple");
        return 0;
    }
    if (!PyArg_ParseTuple(tuple, "OOOOOp:add", &objects[0], &objects[1], &objects[2], &objects[3],
                          &objects[4], &addition->is_first))
        return 0;
    Py_buffer *views = addition->views;
    for (; addition->held < 2 + AXES; addition->held++) {
        int n = addition->held;
        int flags = n == 0 ? PyBUF_STRIDES | PyBUF_WRITABLE : n == 1 ? PyBUF_STRIDES : PyBUF_C_CONTIGUOUS;
        if (PyObject_GetBuffer(objects[n], &views[n], flags))
            return 0;
    }
    problem = !is_volume(&views[0], sizeof(float)) || !is_volume(&views[1], sizeof(float)) ||
              !same_shape(&views[0], &views[1], 0);
    for (int axis = 0; !problem && axis < AXES; axis++)
        problem = views[2 + axis].len != views[0].shape[1 + axis] * (Py_ssize_t)sizeof(float);
    if (problem) {
        PyErr_SetString(PyExc_ValueError, "sums, part and weights do not fit each other");
        return 0;
    }
    order_of_products(&views[1], order);
    addition->sums = volume_of(&views[0], order);
    addition->part = volume_of(&views[1], order);
    for (int axis = 0; axis < AXES; axis++)
        addition->weights[axis] = views[2 + order[axis]].buf;
    addition->is_dense =
        addition->sums.stride[2] == sizeof(float) && addition->part.stride[2] == sizeof(float);
    return 1;
}

static PyObject *add(PyObject *module, PyObject *sequence)
{
    (void)module;
    PyObject *tuples = PySequence_Tuple(sequence);
    if (!tuples)
        return NULL;
    Py_ssize_t count = PyTuple_Size(tuples), read = 0;
    Addition *additions = calloc((size_t)count + 1, sizeof *additions);
    if (!additions) {
        Py_DECREF(tuples);
        return PyErr_NoMemory();
    }
    while (read < count && read_addition(PyTuple_GetItem(tuples, read), additions + read))
        read++;
    if (read == count) {
        Py_BEGIN_ALLOW_THREADS add_all(additions, count);
        Py_END_ALLOW_THREADS
    }
    for (Py_ssize_t n = 0; n < count; n++)
        while (additions[n].held)
            PyBuffer_Release(&additions[n].views[--additions[n].held]);
    free(additions);
    Py_DECREF(tuples);
    if (read < count)
        return NULL;
    Py_RETURN_NONE;
}

static int line_is_finite(const Bits *bits, Py_ssize_t count)
{
    uint32_t found = 0;
    for (Py_ssize_t n = 0; n < count; n++)
        found |= (bits[n] & EXPONENT) == EXPONENT;
    return !found;
}

/* Copies the scores of a channel that are not beside each other, `count` at most BLOCK. */
static const Float *dense_scores(const char *from, Py_ssize_t stride, Py_ssize_t count, Float *copied)
{
    if (stride == sizeof(float))
        return (const Float *)from;
    for (Py_ssize_t n = 0; n < count; n++)
        copied[n] = *(const Float *)(from + n * stride);
    return copied;
}

/* The number of the greatest channel, the first of equal ones; NaN is greater than all numbers. Returns whether
all scores are finite. Numbers are as wide as scores, so that both are compared and kept as vectors. */
CLONED static int classify_block(const Volume *voxels, const char *from, uint8_t *to, Py_ssize_t to_stride,
                          Py_ssize_t count)
{
    float best[BLOCK], copied[BLOCK];
    int32_t winner[BLOCK];
    const Float *score = dense_scores(from, voxels->stride[2], count, copied);
    int all_finite = line_is_finite((const Bits *)score, count);
    for (Py_ssize_t n = 0; n < count; n++) {
        best[n] = score[n];
        winner[n] = 0;
    }
    for (int32_t c = 1; c < voxels->channels; c++) {
        score = dense_scores(from + c * voxels->channel_stride, voxels->stride[2], count, copied);
        all_finite &= line_is_finite((const Bits *)score, count);
        for (Py_ssize_t n = 0; n < count; n++) {
            int32_t wins = -((score[n] > best[n]) | ((score[n] != score[n]) & (best[n] == best[n])));
            winner[n] = (winner[n] & ~wins) | (c & wins);
            best[n] = wins ? score[n] : best[n];
        }
    }
    for (Py_ssize_t n = 0; n < count; n++)
        to[n * to_stride] = (uint8_t)winner[n];
    return all_finite;
}

static int classify_volume(const Volume *voxels, const Volume *classes)
{
    int all_finite = 1;
    const Py_ssize_t *shape = voxels->shape;
    for (Py_ssize_t a = 0; a < shape[0]; a++)
        for (Py_ssize_t b = 0; b < shape[1]; b++)
            for (Py_ssize_t c = 0; c < shape[2]; c += BLOCK) {
                Py_ssize_t count = shape[2] - c < BLOCK ? shape[2] - c : BLOCK;
                const char *from = line_of(voxels, 0, a, b) + c * voxels->stride[2];
                uint8_t *to = (uint8_t *)line_of(classes, 0, a, b) + c * classes->stride[2];
                for (Py_ssize_t channel = 0; channel < voxels->channels; channel++)
                    PREFETCH(from + channel * voxels->channel_stride + AHEAD * voxels->stride[1],
                             voxels->stride[2] == sizeof(float) ? count : 0);
                all_finite &= classify_block(voxels, from, to, classes->stride[2], count);
            }
    return all_finite;
}

static PyObject *classify(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *voxel_object, *class_object;
    int order[AXES], all_finite = 0;
    if (!PyArg_ParseTuple(arguments, "OO:classify", &voxel_object, &class_object))
        return NULL;
    Py_buffer voxels, classes;
    if (PyObject_GetBuffer(voxel_object, &voxels, PyBUF_STRIDES))
        return NULL;
    if (PyObject_GetBuffer(class_object, &classes, PyBUF_STRIDES | PyBUF_WRITABLE)) {
        PyBuffer_Release(&voxels);
        return NULL;
    }
    int fits = is_volume(&voxels, sizeof(float)) && is_volume(&classes, 1) && classes.shape[0] == 1 &&
               voxels.shape[0] >= 1 && voxels.shape[0] <= 256 && same_shape(&voxels, &classes, 1);
    if (fits) {
        order_of_loops(&voxels, order);
        Volume from = volume_of(&voxels, order), to = volume_of(&classes, order);
        Py_BEGIN_ALLOW_THREADS all_finite = classify_volume(&from, &to);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "scores and classes do not fit each other");
    }
    PyBuffer_Release(&voxels);
    PyBuffer_Release(&classes);
    return fits ? PyBool_FromLong(all_finite) : NULL;
}

static int volume_is_finite(const Volume *voxels)
{
    const Py_ssize_t *shape = voxels->shape, *stride = voxels->stride;
    for (Py_ssize_t c = 0; c < voxels->channels; c++)
        for (Py_ssize_t a = 0; a < shape[0]; a++)
            for (Py_ssize_t b = 0; b < shape[1]; b++) {
                const char *line = voxels->data + c * voxels->channel_stride + a * stride[0] + b * stride[1];
                if (stride[2] == sizeof(float)) {
                    if (!line_is_finite((const Bits *)line, shape[2]))
                        return 0;
                    continue;
                }
                for (Py_ssize_t n = 0; n < shape[2]; n++)
                    if (!line_is_finite((const Bits *)(line + n * stride[2]), 1))
                        return 0;
            }
    return 1;
}

static PyObject *is_finite(PyObject *module, PyObject *voxel_object)
{
    (void)module;
    Py_buffer view;
    if (PyObject_GetBuffer(voxel_object, &view, PyBUF_STRIDES))
        return NULL;
    int fits = is_volume(&view, sizeof(float)), found = 0, order[AXES];
    if (fits) {
        order_of_loops(&view, order);
        Volume voxels = volume_of(&view, order);
        Py_BEGIN_ALLOW_THREADS found = volume_is_finite(&voxels);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_ValueError, "voxels must be float32 on four axes");
    }
    PyBuffer_Release(&view);
    return fits ? PyBool_FromLong(found) : NULL;
}

static PyMethodDef methods[] = {
    {"add", add, METH_O,
     "add(additions)\n--\n\n"
     "Do additions (sums, part, i, j, k, is_first): add a part (C, I, J, K), weighted by three vectors, to sums;\n"
     "the first part overwrites them. Parts that follow each other in memory should follow in the list."},
    {"classify", classify, METH_VARARGS,
     "classify(scores, classes)\n--\n\n"
     "Write the number of the greatest channel of scores (C, I, J, K) into uint8 classes (1, I, J, K);\n"
     "return whether all scores are finite."},
    {"is_finite", is_finite, METH_O,
     "is_finite(voxels)\n--\n\n"
     "Whether no voxel of float32 (C, I, J, K) is NaN or infinite."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "zpatch.blending._blend",
    "The inner loops of blending.",
    0,
    methods,
    NULL,
    NULL,
    NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__blend(void) { return PyModuleDef_Init(&definition); }
