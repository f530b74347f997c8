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

/* As copy_axes, of an array that is dense along axis `a` to one that is dense along axis `b`. */
static void copy_turned(const Py_buffer *from, const uint8_t *in, const Py_buffer *to, uint8_t *out, int a,
                        int b, Turn turn)
{
    int others[AXES] = {0}, count = 0;
    for (int axis = 0; axis < from->ndim; axis++)
        if (axis != a && axis != b)
            others[count++] = axis;
    Py_ssize_t sizes[2] = {count > 0 ? from->shape[others[0]] : 1, count > 1 ? from->shape[others[1]] : 1};
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
    guard_begin(&place);
    if (a >= 0 && b >= 0 && a != b && choose_writer(&writer, (size_t)from->itemsize, ""))
        copy_turned(from, from->buf, to, to->buf, a, b, writer.turn);
    else
        copy_axes(from, from->buf, to, to->buf, order, 0);
    guard_end();
    return 1;
}

#endif
