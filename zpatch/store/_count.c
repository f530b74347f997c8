/* How often each value occurs among integers of one or two bytes, for the statistics of an image.

Values are counted by their bits, as unsigned numbers. Neighbours are often equal, and counting one value twice
in a row waits for the first count; so neighbours are counted in different tables, which are summed. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TABLES 4
#define MOST_AT_ONCE ((size_t)1 << 31) /* so that no count leaves 32 bits */

static void count_1(const uint8_t *voxels, size_t count, uint32_t *tables)
{
    size_t at = 0;
    for (; at + TABLES <= count; at += TABLES)
        for (size_t n = 0; n < TABLES; n++)
            tables[256 * n + voxels[at + n]]++;
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

static int count_all(const uint8_t *voxels, size_t count, size_t item, int64_t *counts)
{
    size_t values = (size_t)1 << (8 * item);
    uint32_t *tables = malloc(TABLES * values * sizeof *tables);
    if (!tables)
        return 0;
    while (count) {
        size_t some = count < MOST_AT_ONCE ? count : MOST_AT_ONCE;
        memset(tables, 0, TABLES * values * sizeof *tables);
        if (item == 1)
            count_1(voxels, some, tables);
        else
            count_2((const uint16_t *)voxels, some, tables);
        for (size_t value = 0; value < values; value++)
            for (size_t n = 0; n < TABLES; n++)
                counts[value] += tables[values * n + value];
        voxels += some * item;
        count -= some;
    }
    free(tables);
    return 1;
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
    int fits = (item == 1 || item == 2) && counts.itemsize == sizeof(int64_t) &&
               (size_t)counts.len == sizeof(int64_t) << (8 * item) && (uintptr_t)voxels.buf % item == 0;
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
                    "integers of one or two bytes are counted in as many int64 as they have values");
    return NULL;
}

static PyMethodDef methods[] = {
    {"count", count, METH_VARARGS,
     "count(voxels, counts)\n--\n\n"
     "Add how often each value of one or two bytes occurs to ``counts``, by its bits as an unsigned number."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "zpatch.store._count", "How often each value occurs.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__count(void)
{
    return PyModuleDef_Init(&definition);
}
