/* The mean of each 2 x 2 x 2 voxels, for the coarser levels of images of small integers.

Means are rounded to the nearest integer, halves to the even one, as numpy's rint of the float64 mean. Where an
axis is odd its last voxel counts twice, and where it has one voxel that one does, which changes no mean. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define AXES 4
#define BLOCK 512 /* coarse voxels whose sums are on the stack */

typedef struct {
    Py_ssize_t fine[AXES], stride[AXES], coarse[AXES]; /* c, z, y, x */
} Shape;

/* A shift to the right keeps the sign, in all compilers that Python is built with. */
static int32_t mean_of_eight(int32_t sum)
{
    return (sum + 3 + ((sum >> 3) & 1)) >> 3;
}

#define DEFINE_HALVE(type)                                                                                  \
    static void halve_line_##type(const type *const *lines, type *out, Py_ssize_t fine, Py_ssize_t coarse)  \
    {                                                                                                       \
        int32_t sums[2 * BLOCK];                                                                            \
        const type *restrict a = lines[0], *restrict b = lines[1], *restrict c = lines[2],                  \
                             *restrict d = lines[3];                                                        \
        for (Py_ssize_t from = 0; from < coarse; from += BLOCK) {                                           \
            Py_ssize_t first = 2 * from, count = fine - first < 2 * BLOCK ? fine - first : 2 * BLOCK;       \
            for (Py_ssize_t x = 0; x < count; x++)                                                          \
                sums[x] = a[first + x] + b[first + x] + c[first + x] + d[first + x];                        \
            if (count % 2)                                                                                  \
                sums[count] = sums[count - 1];                                                              \
            for (Py_ssize_t x = 0; x < (count + 1) / 2; x++)                                                \
                out[from + x] = (type)mean_of_eight(sums[2 * x] + sums[2 * x + 1]);                         \
        }                                                                                                   \
    }                                                                                                       \
    static void halve_##type(const char *fine, type *out, const Shape *of)                                  \
    {                                                                                                       \
        for (Py_ssize_t c = 0; c < of->coarse[0]; c++)                                                      \
            for (Py_ssize_t z = 0; z < of->coarse[1]; z++)                                                  \
                for (Py_ssize_t y = 0; y < of->coarse[2]; y++, out += of->coarse[3]) {                      \
                    const type *lines[4];                                                                   \
                    for (int n = 0; n < 4; n++) {                                                           \
                        Py_ssize_t at_z = 2 * z + n / 2, at_y = 2 * y + n % 2;                              \
                        at_z -= at_z == of->fine[1];                                                        \
                        at_y -= at_y == of->fine[2];                                                        \
                        lines[n] = (const type *)(fine + c * of->stride[0] + at_z * of->stride[1] +         \
                                                  at_y * of->stride[2]);                                    \
                    }                                                                                       \
                    halve_line_##type(lines, out, of->fine[3], of->coarse[3]);                              \
                }                                                                                           \
    }

DEFINE_HALVE(uint8_t)
DEFINE_HALVE(int8_t)
DEFINE_HALVE(uint16_t)
DEFINE_HALVE(int16_t)

static int shape_of(const Py_buffer *fine, const Py_buffer *coarse, Shape *shape)
{
    if (fine->ndim != AXES || coarse->ndim != AXES || fine->itemsize != coarse->itemsize || !fine->strides ||
        fine->strides[AXES - 1] != fine->itemsize)
        return 0;
    for (int axis = 0; axis < AXES; axis++) {
        shape->fine[axis] = fine->shape[axis];
        shape->stride[axis] = fine->strides[axis];
        shape->coarse[axis] = coarse->shape[axis];
        if (shape->coarse[axis] != (axis ? (fine->shape[axis] + 1) / 2 : fine->shape[0]) ||
            fine->strides[axis] % fine->itemsize)
            return 0;
    }
    return (fine->itemsize == 1 || fine->itemsize == 2) && (uintptr_t)fine->buf % (size_t)fine->itemsize == 0;
}

static PyObject *halve(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *fine_object, *coarse_object;
    int is_signed;
    if (!PyArg_ParseTuple(arguments, "OOp:halve", &fine_object, &coarse_object, &is_signed))
        return NULL;
    Py_buffer fine, coarse;
    if (PyObject_GetBuffer(fine_object, &fine, PyBUF_STRIDES))
        return NULL;
    if (PyObject_GetBuffer(coarse_object, &coarse, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)) {
        PyBuffer_Release(&fine);
        return NULL;
    }
    Shape shape;
    int fits = shape_of(&fine, &coarse, &shape);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        if (fine.itemsize == 1 && is_signed)
            halve_int8_t(fine.buf, coarse.buf, &shape);
        else if (fine.itemsize == 1)
            halve_uint8_t(fine.buf, coarse.buf, &shape);
        else if (is_signed)
            halve_int16_t(fine.buf, coarse.buf, &shape);
        else
            halve_uint16_t(fine.buf, coarse.buf, &shape);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&fine);
    PyBuffer_Release(&coarse);
    if (fits)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "voxels of one or two bytes (c, z, y, x) are halved along z, y and x");
    return NULL;
}

static PyMethodDef methods[] = {
    {"halve", halve, METH_VARARGS,
     "halve(fine, coarse, is_signed)\n--\n\n"
     "Write the mean of each 2 x 2 x 2 integers of one or two bytes (c, z, y, x) to ``coarse``."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "zpatch.chunks._halve", "The mean of each 2 x 2 x 2 voxels.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__halve(void)
{
    return PyModuleDef_Init(&definition);
}
