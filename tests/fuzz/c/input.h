/* Bytes of a fuzzer -> numbers and arrays. Numbers are little-endian; past the end all of them are zero.
 * tests/fuzz/inputs.py reads the same inputs. */

#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include <Python.h>

typedef struct {
    const uint8_t *at;
    size_t left;
} Input;

static uint64_t take(Input *in, size_t bytes)
{
    uint64_t value = 0;
    for (size_t n = 0; n < bytes && in->left; n++, in->at++, in->left--)
        value |= (uint64_t)*in->at << 8 * n;
    return value;
}

static float take_float(Input *in)
{
    uint32_t bits = (uint32_t)take(in, 4);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A copy of the next bytes in memory of exactly their number. */
static uint8_t *take_bytes(Input *in, size_t count)
{
    uint8_t *copy = malloc(count ? count : 1);
    memcpy(copy, in->at, count);
    in->at += count;
    in->left -= count;
    return copy;
}

/* An array of four axes in memory of exactly its extent. */
typedef struct {
    PyObject object;
    Py_ssize_t shape[4], strides[4];
    uint8_t *memory, *shadow; /* its bytes; the bytes that are expected in the end */
    size_t bytes;
    int overlaps; /* whether its voxels overlap */
} Array;

/* Reads how an array of some shape is laid out: a permutation of its axes; which of them run backwards, have
 * gaps or do not advance; bytes before its first voxel and between voxels; strides of axes of one voxel. */
static void take_layout(Input *in, Array *array, size_t item)
{
    unsigned order = (unsigned)take(in, 1) % 24, axes = (unsigned)take(in, 1), shift = (unsigned)take(in, 1);
    unsigned constant = (unsigned)take(in, 1);
    int left[4] = {0, 1, 2, 3};
    Py_ssize_t step = (Py_ssize_t)item + (shift >> 3 & 7), low = 0, high = (Py_ssize_t)item;
    array->overlaps = 0;
    for (unsigned many = 4; many > 0; many--) { /* the fastest axis first */
        unsigned at = order % many, axis = (unsigned)left[at];
        order /= many;
        for (unsigned n = at; n + 1 < many; n++)
            left[n] = left[n + 1];
        Py_ssize_t count = array->shape[axis], stride = step * (axes >> 4 >> axis & 1 ? 2 : 1);
        step = stride * (count ? count : 1);
        stride = axes >> axis & 1 ? -stride : stride;
        if (constant >> axis & 1)
            stride = 0;
        array->overlaps |= !stride && count > 1;
        if (count == 1 && shift & 64)
            stride = (Py_ssize_t)take(in, 8);
        else if (count)
            *(stride < 0 ? &low : &high) += stride * (count - 1);
        array->strides[axis] = stride;
    }
    shift &= 7;
    array->bytes = (size_t)(high - low) + shift;
    array->memory = malloc(array->bytes);
    array->shadow = malloc(array->bytes);
    Py_ssize_t voxels = 1;
    for (int axis = 0; axis < 4; axis++)
        voxels *= array->shape[axis];
    array->object.view = (Py_buffer){.buf = array->memory + shift - low, .len = voxels * (Py_ssize_t)item,
                                     .itemsize = (Py_ssize_t)item, .ndim = 4, .shape = array->shape,
                                     .strides = array->strides};
}

/* Fills an array with numbers that look random, of a seed; `style` 0 gives small float32. */
static void fill(Array *array, uint32_t seed, unsigned style)
{
    for (size_t n = 0; n < array->bytes; n++) {
        seed = seed * 1664525 + 1013904223;
        array->memory[n] = (uint8_t)(seed >> 24);
    }
    for (size_t n = array->bytes % 4; style == 0 && n + 4 <= array->bytes; n += 4) {
        float small = (float)(array->memory[n] % 7) - 3;
        memcpy(array->memory + n, &small, 4);
    }
    memcpy(array->shadow, array->memory, array->bytes);
}

static size_t offset_of(const Array *array, const Py_ssize_t *at)
{
    Py_ssize_t offset = (uint8_t *)array->object.view.buf - array->memory;
    for (int axis = 0; axis < 4; axis++) /* an axis of one voxel may have any stride */
        offset += at[axis] ? at[axis] * array->strides[axis] : 0;
    return (size_t)offset;
}

static void check_as_expected(const Array *array)
{
    CHECK(!memcmp(array->memory, array->shadow, array->bytes));
}

static void free_array(Array *array)
{
    free(array->memory);
    free(array->shadow);
}

#endif
