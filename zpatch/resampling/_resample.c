/* The inner loops of resampling: axis by axis (_axes.h), and point by point or voxel by voxel (_points.h).

Voxels are on four axes (c, z, y, x); a source is C-contiguous. Sums are of float, or of double for sources of
32 bits and more. Every index is checked before a loop begins, or clamped in it. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_axes.h"
#include "_points.h"

enum { U1, I1, U2, I2, F4, U4, I4, U8, I8, F8, TYPES };
static const char *const type_names[TYPES] = {"u1", "i1", "u2", "i2", "f4", "u4", "i4", "u8", "i8", "f8"};
#define PLANE_OF(name, type, real) plane_##name,
static const Plane planes[TYPES] = {ITEM_TYPES(PLANE_OF)};

static int type_of(const char *name)
{
    int type = 0;
    while (type < TYPES && strcmp(name, type_names[type]))
        type++;
    return type;
}

static int is_double(int type) { return type >= U4; }

typedef struct {
    Py_buffer source, target;
    int held;
} Views;

/* Both buffers, if they are voxels on four axes that fit each other; `item` is that of the target, 0 for equal. */
static int open_views(Views *views, PyObject *source, PyObject *target, Py_ssize_t source_item,
                      Py_ssize_t target_item)
{
    views->held = 0;
    if (PyObject_GetBuffer(source, &views->source, PyBUF_C_CONTIGUOUS))
        return 0;
    views->held = 1;
    if (PyObject_GetBuffer(target, &views->target, PyBUF_STRIDES | PyBUF_WRITABLE))
        return 0;
    views->held = 2;
    const Py_buffer *a = &views->source, *b = &views->target;
    if (a->ndim == 1 + AXES && b->ndim == 1 + AXES && a->shape[0] == b->shape[0] && a->shape[1] > 0 &&
        a->shape[2] > 0 && a->shape[3] > 0 && (!source_item || a->itemsize == source_item) &&
        b->itemsize == (target_item ? target_item : a->itemsize))
        return 1;
    PyErr_SetString(PyExc_ValueError, "source and target do not fit each other");
    return 0;
}

static void close_views(Views *views)
{
    if (views->held > 1)
        PyBuffer_Release(&views->target);
    if (views->held > 0)
        PyBuffer_Release(&views->source);
}

static Source source_of(const Py_buffer *view)
{
    Source source = {view->buf, view->shape[0], {view->shape[1], view->shape[2], view->shape[3]}};
    return source;
}

static Target target_of(const Py_buffer *view)
{
    Target target = {view->buf, {view->strides[0], view->strides[1], view->strides[2], view->strides[3]}};
    return target;
}

/* Whether all indices lie in an axis of the source. */
static int indices_fit(const int64_t *first, Py_ssize_t count, Py_ssize_t taps, Py_ssize_t shape)
{
    for (Py_ssize_t n = 0; n < count; n++)
        if (first[n] < 0 || first[n] > shape - taps)
            return 0;
    return 1;
}

static PyObject *lines(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *source_object, *target_object, *objects[2 * AXES];
    const char *name;
    Scaling scaling;
    if (!PyArg_ParseTuple(arguments, "OsOOOOOOOdddd:lines", &source_object, &name, &target_object, &objects[0],
                          &objects[1], &objects[2], &objects[3], &objects[4], &objects[5], &scaling.slope,
                          &scaling.inter, &scaling.low, &scaling.high))
        return NULL;
    int type = type_of(name), held = 0, done = 0;
    Py_ssize_t item = name[0] && name[1] ? name[1] - '0' : 0;
    Views views;
    Py_buffer tables[2 * AXES];
    Axis axes[AXES];
    if (type == TYPES) {
        PyErr_SetString(PyExc_ValueError, "no such type of voxels");
        return NULL;
    }
    if (!open_views(&views, source_object, target_object, item, is_double(type) ? 8 : 4))
        goto end;
    for (; held < 2 * AXES; held++)
        if (PyObject_GetBuffer(objects[held], &tables[held], PyBUF_C_CONTIGUOUS))
            goto end;
    for (int a = 0; a < AXES; a++) {
        const Py_buffer *first = &tables[2 * a], *weights = &tables[2 * a + 1];
        Py_ssize_t count = first->len / 8, taps = count ? weights->len / 8 / count : 1;
        Axis axis = {first->buf, weights->buf, count, taps};
        axes[a] = axis;
        if (first->itemsize != 8 || weights->itemsize != 8 || taps < 1 || weights->len != count * taps * 8 ||
            count != views.target.shape[1 + a] || !indices_fit(axis.first, count, taps, views.source.shape[1 + a])) {
            PyErr_SetString(PyExc_ValueError, "the taps do not fit source and target");
            goto end;
        }
    }
    Source source = source_of(&views.source);
    Target target = target_of(&views.target);
    Py_BEGIN_ALLOW_THREADS
    done = is_double(type) ? lines_f8(&source, item, planes[type], &target, axes, &scaling)
                           : lines_f4(&source, item, planes[type], &target, axes, &scaling);
    Py_END_ALLOW_THREADS
    if (!done)
        PyErr_NoMemory();
end:
    while (held)
        PyBuffer_Release(&tables[--held]);
    close_views(&views);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

static int parse_map(PyObject *object, Map *map)
{
    Py_buffer view;
    if (PyObject_GetBuffer(object, &view, PyBUF_C_CONTIGUOUS))
        return 0;
    int fits = view.len == sizeof *map;
    if (fits)
        memcpy(map, view.buf, sizeof *map);
    else
        PyErr_SetString(PyExc_ValueError, "a map is 18 numbers");
    PyBuffer_Release(&view);
    return fits;
}

static PyObject *points(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *source_object, *target_object, *map_object;
    int is_cubic;
    Scaling scaling;
    if (!PyArg_ParseTuple(arguments, "OOOpdddd:points", &source_object, &target_object, &map_object, &is_cubic,
                          &scaling.slope, &scaling.inter, &scaling.low, &scaling.high))
        return NULL;
    Map map;
    Views views = {.held = 0};
    int fits = parse_map(map_object, &map) && open_views(&views, source_object, target_object, 0, 0);
    if (fits && views.source.itemsize != 4 && views.source.itemsize != 8) {
        PyErr_SetString(PyExc_ValueError, "voxels must be float32 or float64");
        fits = 0;
    }
    if (fits) {
        Source source = source_of(&views.source);
        Target target = target_of(&views.target);
        const Py_ssize_t *shape = views.target.shape + 1;
        Py_BEGIN_ALLOW_THREADS
        if (views.source.itemsize == 4)
            points_f4(&source, &target, shape, &map, is_cubic, &scaling);
        else
            points_f8(&source, &target, shape, &map, is_cubic, &scaling);
        Py_END_ALLOW_THREADS
    }
    close_views(&views);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

typedef void (*Majority)(const Source *, const Target *, const Py_ssize_t *, const Map *, double);
#define MAJORITY_OF(name, type, real) majority_##name,
static const Majority majorities[TYPES] = {ITEM_TYPES(MAJORITY_OF)};

static PyObject *labels(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *source_object, *target_object, *map_object;
    const char *name;
    double tie;
    if (!PyArg_ParseTuple(arguments, "OsOOd:labels", &source_object, &name, &target_object, &map_object, &tie))
        return NULL;
    Map map;
    int type = type_of(name);
    Views views = {.held = 0};
    int fits = parse_map(map_object, &map) && open_views(&views, source_object, target_object, 0, 0);
    if (fits && (type == TYPES || views.source.itemsize != name[1] - '0')) {
        PyErr_SetString(PyExc_ValueError, "no such type of voxels");
        fits = 0;
    }
    if (fits) {
        Source source = source_of(&views.source);
        Target target = target_of(&views.target);
        Py_BEGIN_ALLOW_THREADS
        majorities[type](&source, &target, views.target.shape + 1, &map, tie);
        Py_END_ALLOW_THREADS
    }
    close_views(&views);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *nearest(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *source_object, *target_object, *map_object;
    if (!PyArg_ParseTuple(arguments, "OOO:nearest", &source_object, &target_object, &map_object))
        return NULL;
    Map map;
    Views views = {.held = 0};
    int fits = parse_map(map_object, &map) && open_views(&views, source_object, target_object, 0, 0);
    if (fits) {
        Source source = source_of(&views.source);
        Target target = target_of(&views.target);
        Py_BEGIN_ALLOW_THREADS
        nearest_voxels(&source, views.source.itemsize, &target, views.target.shape + 1, &map);
        Py_END_ALLOW_THREADS
    }
    close_views(&views);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *pick(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *source_object, *target_object, *objects[AXES];
    if (!PyArg_ParseTuple(arguments, "OOOOO:pick", &source_object, &target_object, &objects[0], &objects[1],
                          &objects[2]))
        return NULL;
    Views views;
    Py_buffer tables[AXES];
    const int64_t *at[AXES];
    int held = 0, fits = open_views(&views, source_object, target_object, 0, 0);
    for (; fits && held < AXES; held++) {
        if (PyObject_GetBuffer(objects[held], &tables[held], PyBUF_C_CONTIGUOUS)) {
            fits = 0;
            break;
        }
        at[held] = tables[held].buf;
        if (tables[held].itemsize != 8 || tables[held].len != 8 * views.target.shape[1 + held] ||
            !indices_fit(at[held], views.target.shape[1 + held], 1, views.source.shape[1 + held])) {
            PyErr_SetString(PyExc_ValueError, "the indices do not fit source and target");
            PyBuffer_Release(&tables[held]);
            fits = 0;
            break;
        }
    }
    if (fits) {
        Source source = source_of(&views.source);
        Target target = target_of(&views.target);
        Py_BEGIN_ALLOW_THREADS
        pick_voxels(&source, views.source.itemsize, &target, at, views.target.shape + 1);
        Py_END_ALLOW_THREADS
    }
    while (held)
        PyBuffer_Release(&tables[--held]);
    close_views(&views);
    if (!fits)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"lines", lines, METH_VARARGS,
     "lines(source, type, target, first_z, weights_z, first_y, weights_y, first_x, weights_x,\n"
     "      slope, inter, low, high)\n--\n\n"
     "Weighted sums of voxels (c, z, y, x), axis by axis: voxel n of an axis is the sum over t of\n"
     "weights[n, t] times voxel first[n] + t of the source."},
    {"points", points, METH_VARARGS,
     "points(source, target, map, is_cubic, slope, inter, low, high)\n--\n\n"
     "Voxels (c, z, y, x) interpolated at the coordinates of a map, linearly, or as a cubic B-spline whose\n"
     "coefficients the source is."},
    {"labels", labels, METH_VARARGS,
     "labels(source, type, target, map, tie)\n--\n\n"
     "The label with the largest sum of linear weights at each point; the lowest of those within tie."},
    {"nearest", nearest, METH_VARARGS,
     "nearest(source, target, map)\n--\n\n"
     "The voxel that is nearest to each point."},
    {"pick", pick, METH_VARARGS,
     "pick(source, target, z, y, x)\n--\n\n"
     "The voxels of some planes, lines and columns."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "zpatch.resampling._resample",
    "The inner loops of resampling.",
    0,
    methods,
    NULL,
    NULL,
    NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__resample(void) { return PyModuleDef_Init(&definition); }
