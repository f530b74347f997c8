/* The inner loops of blending: adding weighted patches, the class of each voxel, and whether all are finite.

Voxels are float32 in any strides, on four axes of which the first is the channel; the inner loop runs along
the axis with the smallest stride. The weight of a voxel is a product of one for each axis, never stored. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define AXES 3
#define EXPONENT 0x7f800000u /* all its bits are set in NaN and infinity, and in no other float32 */
#define AHEAD 8 /* lines between the one that is added and the one that is prefetched */
#define CACHED 16 /* voxels in a line of the cache */
#define BLOCK 512 /* voxels whose best score and class are on the stack */

/* Arrays of anyone need not be aligned; where they are, loads and stores are as fast. */
typedef float Float __attribute__((aligned(1)));
typedef uint32_t Bits __attribute__((aligned(1), may_alias));

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
                     float weight, Py_ssize_t count)
{
    for (Py_ssize_t n = 0; n < count; n++)
        sums[n] += weight * weights[n] * part[n];
}

static void set_line(Float *restrict sums, const Float *restrict part, const Float *restrict weights,
                     float weight, Py_ssize_t count)
{
    for (Py_ssize_t n = 0; n < count; n++)
        sums[n] = weight * weights[n] * part[n];
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

static void add_volume(const Volume *sums, const Volume *part, const Float *const *weights, int is_first)
{
    const Py_ssize_t *shape = sums->shape;
    int is_dense = sums->stride[2] == sizeof(float) && part->stride[2] == sizeof(float);
    for (Py_ssize_t c = 0; c < sums->channels; c++)
        for (Py_ssize_t a = 0; a < shape[0]; a++)
            for (Py_ssize_t b = 0; b < shape[1]; b++) {
                char *to = sums->data + c * sums->channel_stride + a * sums->stride[0] + b * sums->stride[1];
                const char *from =
                    part->data + c * part->channel_stride + a * part->stride[0] + b * part->stride[1];
                float weight = weights[0][a] * weights[1][b];
                PREFETCH(from + AHEAD * part->stride[1], is_dense ? shape[2] : 0);
                if (!is_dense)
                    add_strided(to, sums->stride[2], from, part->stride[2], weights[2], weight, shape[2],
                                is_first);
                else if (is_first)
                    set_line((Float *)to, (const Float *)from, weights[2], weight, shape[2]);
                else
                    add_line((Float *)to, (const Float *)from, weights[2], weight, shape[2]);
            }
}

static PyObject *add(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *objects[2 + AXES];
    int is_first, problem = 1, held = 0, order[AXES];
    if (!PyArg_ParseTuple(arguments, "OOOOOp:add", &objects[0], &objects[1], &objects[2], &objects[3],
                          &objects[4], &is_first))
        return NULL;
    Py_buffer views[2 + AXES];
    for (; held < 2 + AXES; held++) {
        int flags = held == 0   ? PyBUF_STRIDES | PyBUF_WRITABLE
                    : held == 1 ? PyBUF_STRIDES
                                : PyBUF_C_CONTIGUOUS;
        if (PyObject_GetBuffer(objects[held], &views[held], flags))
            goto done;
    }
    problem = !is_volume(&views[0], sizeof(float)) || !is_volume(&views[1], sizeof(float)) ||
              !same_shape(&views[0], &views[1], 0);
    for (int axis = 0; !problem && axis < AXES; axis++)
        problem = views[2 + axis].len != views[0].shape[1 + axis] * (Py_ssize_t)sizeof(float);
    if (problem) {
        PyErr_SetString(PyExc_ValueError, "sums, part and weights do not fit each other");
        goto done;
    }
    order_of_products(&views[1], order);
    Volume sums = volume_of(&views[0], order), part = volume_of(&views[1], order);
    const Float *weights[AXES];
    for (int axis = 0; axis < AXES; axis++)
        weights[axis] = views[2 + order[axis]].buf;
    Py_BEGIN_ALLOW_THREADS add_volume(&sums, &part, weights, is_first);
    Py_END_ALLOW_THREADS done : while (held) PyBuffer_Release(&views[--held]);
    if (problem)
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

/* The number of the greatest channel, the first of equal ones; NaN is greater than all numbers. Returns whether
all scores are finite. */
static int classify_block(const Volume *voxels, const char *from, char *to, Py_ssize_t to_stride,
                           Py_ssize_t count)
{
    float best[BLOCK];
    uint8_t winner[BLOCK];
    Py_ssize_t stride = voxels->stride[2];
    int is_dense = stride == sizeof(float), all_finite = 1;
    for (Py_ssize_t c = 0; c < voxels->channels; c++) {
        const char *scores = from + c * voxels->channel_stride;
        for (Py_ssize_t n = 0; n < (is_dense ? 1 : count); n++)
            all_finite &= line_is_finite((const Bits *)(scores + n * stride), is_dense ? count : 1);
    }
    for (Py_ssize_t n = 0; n < count; n++) {
        best[n] = *(const Float *)(from + n * stride);
        winner[n] = 0;
    }
    for (Py_ssize_t c = 1; c < voxels->channels; c++) {
        const char *scores = from + c * voxels->channel_stride;
        if (is_dense) {
            const Float *score = (const Float *)scores;
            for (Py_ssize_t n = 0; n < count; n++) {
                int wins = (score[n] > best[n]) | ((score[n] != score[n]) & (best[n] == best[n]));
                winner[n] = wins ? (uint8_t)c : winner[n];
                best[n] = wins ? score[n] : best[n];
            }
            continue;
        }
        for (Py_ssize_t n = 0; n < count; n++) {
            float score = *(const Float *)(scores + n * stride);
            int wins = (score > best[n]) | ((score != score) & (best[n] == best[n]));
            winner[n] = wins ? (uint8_t)c : winner[n];
            best[n] = wins ? score : best[n];
        }
    }
    for (Py_ssize_t n = 0; n < count; n++)
        to[n * to_stride] = (char)winner[n];
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
                const char *from =
                    voxels->data + a * voxels->stride[0] + b * voxels->stride[1] + c * voxels->stride[2];
                char *to =
                    classes->data + a * classes->stride[0] + b * classes->stride[1] + c * classes->stride[2];
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
    {"add", add, METH_VARARGS,
     "add(sums, part, i, j, k, is_first)\n--\n\n"
     "Add a part (C, I, J, K), weighted by three vectors, to sums; the first part overwrites them."},
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
