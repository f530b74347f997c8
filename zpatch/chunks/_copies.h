/* Copies between arrays of any strides, one of which may be a view of a memory map. */

#ifndef ZPATCH_COPIES_H
#define ZPATCH_COPIES_H

#include "_guard.h"
#include "_parts.h"

/* Copies along the axes from `axis` on; the last one in runs where both arrays are dense. */
static void copy_axes(const Py_buffer *from, const uint8_t *in, const Py_buffer *to, uint8_t *out,
                      const int *order, int axis)
{
    Py_ssize_t item = from->itemsize;
    if (axis == from->ndim) {
        memcpy(out, in, (size_t)item);
        return;
    }
    int a = order[axis];
    Py_ssize_t count = from->shape[a], step = from->strides[a], stride = to->strides[a];
    if (axis == from->ndim - 1 && step == item && stride == item) {
        memcpy(out, in, (size_t)(count * item));
        return;
    }
    for (Py_ssize_t n = 0; n < count; n++)
        copy_axes(from, in + n * step, to, out + n * stride, order, axis + 1);
}

/* The two axes beside `a` and `b`, and their extents: 1 where there is none. */
static void other_axes(const Py_buffer *view, int a, int b, int *others, Py_ssize_t *sizes)
{
    int count = 0;
    sizes[0] = sizes[1] = 1;
    for (int axis = 0; axis < view->ndim; axis++)
        if (axis != a && axis != b) {
            sizes[count] = view->shape[axis];
            others[count++] = axis;
        }
}

/* As copy_axes, of an array that is dense along axis `a` to one that is dense along axis `b`. */
static void copy_turned(const Py_buffer *from, const uint8_t *in, const Py_buffer *to, uint8_t *out, int a,
                        int b, Turn turn)
{
    int others[AXES] = {0};
    Py_ssize_t sizes[2];
    other_axes(from, a, b, others, sizes);
    for (Py_ssize_t m = 0; m < sizes[0]; m++)
        for (Py_ssize_t n = 0; n < sizes[1]; n++) {
            ptrdiff_t source = m * from->strides[others[0]] + n * from->strides[others[1]];
            ptrdiff_t target = m * to->strides[others[0]] + n * to->strides[others[1]];
            for (Py_ssize_t x = 0; x < from->shape[a]; x += TURNED_VOXELS)
                for (Py_ssize_t z = 0; z < from->shape[b]; z += TURNED_ROWS)
                    turn(out + target + x * to->strides[a] + z * to->strides[b], to->strides[a],
                         in + source + x * from->strides[a] + z * from->strides[b], from->strides[b],
                         smaller((size_t)(from->shape[b] - z), TURNED_ROWS),
                         smaller((size_t)(from->shape[a] - x), TURNED_VOXELS));
        }
}

/* Voxels whose few channels follow each other -> a line of each channel; the same loop for both processors. */
#define SPLIT(NAME, VOXEL, CHANNELS, TARGET)                                                                \
    TARGET static void NAME(const uint8_t *in, uint8_t *out, ptrdiff_t step, size_t count)                  \
    {                                                                                                       \
        const VOXEL *restrict voxels = (const VOXEL *)(const void *)in;                                     \
        VOXEL *restrict lines[CHANNELS];                                                                    \
        for (int c = 0; c < CHANNELS; c++)                                                                  \
            lines[c] = (VOXEL *)(void *)(out + c * step);                                                   \
        for (size_t n = 0; n < count; n++)                                                                  \
            for (int c = 0; c < CHANNELS; c++)                                                              \
                lines[c][n] = voxels[CHANNELS * n + c];                                                     \
    }
#if defined __x86_64__
#define SPLIT_BOTH(NAME, VOXEL, CHANNELS)  \
    SPLIT(NAME, VOXEL, CHANNELS, )         \
    SPLIT(NAME##_wide, VOXEL, CHANNELS, __attribute__((target("avx2"))))
#else
#define SPLIT_BOTH(NAME, VOXEL, CHANNELS) \
    SPLIT(NAME, VOXEL, CHANNELS, )        \
    static const Split NAME##_wide = NAME;
#endif
typedef void (*Split)(const uint8_t *in, uint8_t *out, ptrdiff_t step, size_t count);
SPLIT_BOTH(split_3_1, uint8_t, 3)
SPLIT_BOTH(split_4_1, uint8_t, 4)
SPLIT_BOTH(split_3_2, uint16_t, 3)

static int is_aligned(const Py_buffer *view)
{
    uintptr_t bits = (uintptr_t)view->buf;
    for (int axis = 0; axis < view->ndim; axis++)
        bits |= (uintptr_t)view->strides[axis];
    return bits % (uintptr_t)view->itemsize == 0;
}

/* The loop for an array whose voxels have their channels, axis `a`, together; NULL if there is none. */
static Split choose_split(const Py_buffer *from, const Py_buffer *to, int a, int b)
{
    static const struct {
        Py_ssize_t channels, item;
        Split split, wide;
    } known[] = {
        {3, 1, split_3_1, split_3_1_wide}, {4, 1, split_4_1, split_4_1_wide}, {3, 2, split_3_2, split_3_2_wide}};
    if (!is_aligned(from) || !is_aligned(to))
        return NULL;
    for (size_t k = 0; k < sizeof known / sizeof *known; k++)
        if (known[k].channels == from->shape[a] && known[k].item == from->itemsize &&
            from->strides[b] == from->shape[a] * from->itemsize && to->strides[a] >= to->shape[b] * to->itemsize)
            return HAS_WIDE ? known[k].wide : known[k].split;
    return NULL;
}

/* As copy_axes, of voxels of a few channels each along axis `a`, to an array that is dense along axis `b`. */
static void copy_split(const Py_buffer *from, const uint8_t *in, const Py_buffer *to, uint8_t *out, int a,
                       int b, Split split)
{
    int others[AXES] = {0};
    Py_ssize_t sizes[2];
    other_axes(from, a, b, others, sizes);
    for (Py_ssize_t m = 0; m < sizes[0]; m++)
        for (Py_ssize_t n = 0; n < sizes[1]; n++)
            split(in + m * from->strides[others[0]] + n * from->strides[others[1]],
                  out + m * to->strides[others[0]] + n * to->strides[others[1]], to->strides[a],
                  (size_t)from->shape[b]);
}

/* The axis that an array is dense along, of those with several voxels; -1 if there is none. */
static int dense_axis(const Py_buffer *view)
{
    for (int axis = 0; axis < view->ndim; axis++)
        if (view->shape[axis] > 1 && view->strides[axis] == view->itemsize)
            return axis;
    return -1;
}

static int copy_guarded(const Py_buffer *from, const Py_buffer *to, const int *order)
{
    sigjmp_buf place;
    if (sigsetjmp(place, 0)) {
        guard_end();
        return 0;
    }
    int a = dense_axis(from), b = dense_axis(to);
    Writer writer = {0};
    Split split = a >= 0 && b >= 0 && a != b ? choose_split(from, to, a, b) : NULL;
    guard_begin(&place);
    if (split)
        copy_split(from, from->buf, to, to->buf, a, b, split);
    else if (a >= 0 && b >= 0 && a != b && choose_writer(&writer, (size_t)from->itemsize, ""))
        copy_turned(from, from->buf, to, to->buf, a, b, writer.turn);
    else
        copy_axes(from, from->buf, to, to->buf, order, 0);
    guard_end();
    return 1;
}

#endif
