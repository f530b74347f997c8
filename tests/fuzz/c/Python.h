/* The part of Python's C API that the compiled loops use, so that they are fuzzed without Python.
 *
 * An object is an array, a sequence of arrays, or the arguments of a call. Buffers are given as numpy gives
 * them: shape and strides only where they are asked for. What is acquired and not released is counted.
 */

#ifndef FUZZ_PYTHON_H
#define FUZZ_PYTHON_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(truth)                                                                \
    do {                                                                            \
        if (!(truth)) {                                                             \
            fprintf(stderr, "%s:%d: it is not so: %s\n", __FILE__, __LINE__, #truth); \
            abort();                                                                \
        }                                                                           \
    } while (0)

typedef ptrdiff_t Py_ssize_t;
typedef struct Object PyObject;

typedef struct {
    void *buf;
    Py_ssize_t len, itemsize;
    int readonly, ndim;
    Py_ssize_t *shape, *strides;
} Py_buffer;

typedef union {
    PyObject *object;
    Py_ssize_t number;
    double real;
    const char *text;
    int truth;
} Argument;

struct Object {
    Py_buffer view;            /* an array, or */
    PyObject *const *items;    /* a sequence of arrays, or */
    const Argument *arguments; /* the arguments of a call, or an answer */
    Py_ssize_t count;
    const char *name; /* of an error */
};

static PyObject none, true_object = {.name = "True"}, false_object = {.name = "False"};
static PyObject value_error = {.name = "ValueError"}, memory_error = {.name = "MemoryError"};
static PyObject buffer_error = {.name = "BufferError"};
static PyObject *error;              /* the one that is set */
static Py_ssize_t held;              /* buffers and references that are not released yet */
static Argument answer_values[8];    /* of Py_BuildValue */
static PyObject answer_object = {.arguments = answer_values};

#define PyExc_ValueError (&value_error)
#define Py_True (&true_object)
#define Py_False (&false_object)
#define Py_RETURN_NONE return &none
#define Py_BEGIN_ALLOW_THREADS {
#define Py_END_ALLOW_THREADS }

enum { PyBUF_SIMPLE = 0, PyBUF_WRITABLE = 1, PyBUF_ND = 8, PyBUF_STRIDES = 24, PyBUF_C_CONTIGUOUS = 56 };

static void PyErr_SetString(PyObject *kind, const char *text)
{
    (void)text;
    error = kind;
}

static void PyErr_Format(PyObject *kind, const char *format, size_t number)
{
    (void)format, (void)number;
    error = kind;
}

static PyObject *PyErr_NoMemory(void)
{
    error = &memory_error;
    return NULL;
}

static int is_contiguous(const Py_buffer *view)
{
    Py_ssize_t step = view->itemsize;
    for (int axis = view->ndim - 1; view->len && axis >= 0; axis--) {
        if (view->shape[axis] != 1 && view->strides[axis] != step)
            return 0;
        step *= view->shape[axis];
    }
    return 1;
}

static int PyObject_GetBuffer(PyObject *object, Py_buffer *view, int flags)
{
    int with_strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES;
    int only_contiguous = !with_strides || flags & (PyBUF_C_CONTIGUOUS & ~PyBUF_STRIDES);
    if ((flags & PyBUF_WRITABLE && object->view.readonly) ||
        (only_contiguous && !is_contiguous(&object->view))) {
        error = &buffer_error;
        return -1;
    }
    *view = object->view;
    if (!(flags & PyBUF_ND))
        view->shape = NULL;
    if (!with_strides)
        view->strides = NULL;
    held++;
    return 0;
}

static void PyBuffer_Release(Py_buffer *view)
{
    (void)view;
    held--;
}

static Py_ssize_t PySequence_Size(PyObject *object)
{
    return object->count;
}

static PyObject *PySequence_GetItem(PyObject *object, Py_ssize_t number)
{
    CHECK(0 <= number && number < object->count);
    held++;
    return object->items[number];
}

static void Py_XDECREF(PyObject *object)
{
    held -= object != NULL;
}

static void *PyMem_Calloc(size_t count, size_t size)
{
    return calloc(count, size);
}

static void PyMem_Free(void *memory)
{
    free(memory);
}

static int PyArg_ParseTuple(PyObject *given, const char *format, ...)
{
    va_list places;
    va_start(places, format);
    const Argument *at = given->arguments;
    for (; *format && *format != ':'; format++)
        switch (*format) {
        case 'O': *va_arg(places, PyObject **) = at++->object; break;
        case 'n': *va_arg(places, Py_ssize_t *) = at++->number; break;
        case 'd': *va_arg(places, double *) = at++->real; break;
        case 's': *va_arg(places, const char **) = at++->text; break;
        case 'p': *va_arg(places, int *) = at++->truth; break;
        default: CHECK(*format == '(' || *format == ')');
        }
    va_end(places);
    CHECK(at - given->arguments == given->count);
    return 1;
}

static PyObject *Py_BuildValue(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    Argument *to = answer_values;
    for (; *format; format++, to++)
        switch (*format) {
        case 'n': to->number = va_arg(values, Py_ssize_t); break;
        case 'i': to->number = va_arg(values, int); break;
        case 'L': to->number = (Py_ssize_t)va_arg(values, long long); break;
        case 'd': to->real = va_arg(values, double); break;
        default: CHECK(0);
        }
    va_end(values);
    answer_object.count = to - answer_values;
    return &answer_object;
}

static PyObject *PyBool_FromLong(long truth)
{
    return truth ? Py_True : Py_False;
}

typedef PyObject *(*Function)(PyObject *, PyObject *);

/* Calls one of the functions of an extension; its answer, or NULL with `error` set. All is released then. */
static PyObject *call_with(Function function, PyObject *given)
{
    error = NULL;
    PyObject *answer = function(NULL, given);
    CHECK(!answer == !!error);
    CHECK(!held);
    return answer;
}

static PyObject *call(Function function, const Argument *arguments, Py_ssize_t count)
{
    PyObject given = {.arguments = arguments, .count = count};
    return call_with(function, &given);
}

/* ---- definitions of modules, which are not used ---- */

typedef struct {
    const char *name;
    Function function;
    int flags;
    const char *doc;
} PyMethodDef;

typedef struct {
    int head;
    const char *name, *doc;
    Py_ssize_t size;
    PyMethodDef *methods;
    void *slots, *traverse, *clear, *free;
} PyModuleDef;

enum { METH_VARARGS = 1, METH_O = 8 };

#define PyModuleDef_HEAD_INIT 0
#define PyMODINIT_FUNC PyObject *
#define PyModuleDef_Init(definition) ((definition)->size ? NULL : &none)

#endif
