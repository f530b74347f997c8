/* The loops of blending with shapes, strides and voxels of anyone, against loops over voxels.
 *
 * Input: u8 mode: which function, 4 weights of any bits, 8 another shape; u8 style of voxels; u8 or u16
 * sides; the layouts; for `add` a byte or four of each weight. */

#include "../../../zpatch/blending/_blend.c"

#include <math.h>

#include "input.h"

enum { ADD, CLASSIFY, IS_FINITE, MOST_VOXELS = 5000 };

static float float_at(const uint8_t *p)
{
    float value;
    memcpy(&value, p, sizeof value);
    return value;
}

static void expect_float(Array *array, size_t at, float value)
{
    float found = float_at(array->memory + at);
    memcpy(array->shadow + at, value != value && found != found ? &found : &value, sizeof value);
}

#define FOR_EACH_VOXEL(at, shape)                         \
    for (at[0] = 0; at[0] < shape[0]; at[0]++)            \
        for (at[1] = 0; at[1] < shape[1]; at[1]++)        \
            for (at[2] = 0; at[2] < shape[2]; at[2]++)    \
                for (at[3] = 0; at[3] < shape[3]; at[3]++)

static void run_add(Input *input, Array *sums, Array *part, int any_bits, int fits)
{
    float *weights[3];
    PyObject vectors[3] = {0};
    Py_ssize_t four = 4, at[4];
    for (int axis = 0; axis < 3; axis++) {
        Py_ssize_t *count = &sums->shape[1 + axis];
        weights[axis] = malloc(4 * (size_t)*count + 1);
        for (Py_ssize_t n = 0; n < *count; n++) {
            int byte = any_bits ? 0 : (int)take(input, 1);
            /* Products of powers of two are exact in any order. */
            float power = byte ? ldexpf(byte & 1 ? 1 : -1, byte % 17 - 8) : 0;
            weights[axis][n] = any_bits ? take_float(input) : power;
        }
        vectors[axis].view = (Py_buffer){weights[axis], 4 * *count, 4, 0, 1, count, &four};
    }
    int is_first = (int)take(input, 1) & 1;
    const Argument arguments[6] = {{.object = &sums->object}, {.object = &part->object}, {.object = vectors},
                                   {.object = vectors + 1}, {.object = vectors + 2}, {.truth = is_first}};
    PyObject *answer = call(add, arguments, 6);
    CHECK(!answer == !fits);
    FOR_EACH_VOXEL(at, sums->shape)
    if (fits) {
        float weight = weights[0][at[1]] * weights[1][at[2]] * weights[2][at[3]];
        size_t to = offset_of(sums, at);
        float product = weight * float_at(part->memory + offset_of(part, at));
        expect_float(sums, to, is_first ? product : float_at(sums->shadow + to) + product);
    }
    if (!any_bits && !sums->overlaps)
        check_as_expected(sums);
    check_as_expected(part);
    for (int axis = 0; axis < 3; axis++)
        free(weights[axis]);
}

static int is_number(float value)
{
    return value - value == 0; /* neither NaN nor infinite */
}

static void run_classify(Array *scores, Array *classes, int fits)
{
    const Argument arguments[2] = {{.object = &scores->object}, {.object = &classes->object}};
    PyObject *answer = call(classify, arguments, 2);
    CHECK(!answer == !fits);
    Py_ssize_t at[4];
    int all_finite = 1;
    FOR_EACH_VOXEL(at, classes->shape)
    if (fits) {
        Py_ssize_t from[4] = {0, at[1], at[2], at[3]}, best = 0;
        float most = float_at(scores->memory + offset_of(scores, from));
        for (; from[0] < scores->shape[0]; from[0]++) {
            float score = float_at(scores->memory + offset_of(scores, from));
            all_finite &= is_number(score);
            if (score > most || (score != score && most == most)) {
                most = score;
                best = from[0];
            }
        }
        classes->shadow[offset_of(classes, at)] = (uint8_t)best;
    }
    CHECK(!fits || answer == PyBool_FromLong(all_finite));
    if (!classes->overlaps)
        check_as_expected(classes);
    check_as_expected(scores);
}

static void run_is_finite(Array *voxels)
{
    error = NULL;
    PyObject *answer = is_finite(NULL, &voxels->object);
    CHECK(answer && !held);
    Py_ssize_t at[4];
    int all_finite = 1;
    FOR_EACH_VOXEL(at, voxels->shape)
    all_finite &= is_number(float_at(voxels->memory + offset_of(voxels, at)));
    CHECK(answer == PyBool_FromLong(all_finite));
    check_as_expected(voxels);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Input input = {data, size};
    unsigned mode = (unsigned)take(&input, 1), function = (mode & 3) % 3, style = (unsigned)take(&input, 1);
    Array arrays[2] = {0};
    static const unsigned limits[4] = {5, 9, 9, 1200};
    size_t voxels = 1;
    for (int axis = 0; axis < 4; axis++) {
        unsigned limit = function == CLASSIFY && axis == 0 && mode & 64 ? 300 : limits[axis];
        size_t side = (size_t)take(&input, limit > 255 ? 2 : 1) % limit;
        side = voxels * (side ? side : 1) > MOST_VOXELS ? 1 : side;
        voxels *= side ? side : 1;
        arrays[0].shape[axis] = arrays[1].shape[axis] = (Py_ssize_t)side;
    }
    if (function == CLASSIFY)
        arrays[1].shape[0] = mode & 32 ? arrays[0].shape[0] : 1;
    if (mode & 8)
        arrays[1].shape[mode >> 4 & 3]++;
    take_layout(&input, &arrays[0], 4);
    take_layout(&input, &arrays[1], function == CLASSIFY ? 1 : 4);
    fill(&arrays[0], style, style & 1);
    fill(&arrays[1], style + 1, style & 1);
    if (style >> 1 & 1 && arrays[0].object.view.len) { /* one voxel that is NaN or infinite or of any bits */
        uint32_t bits = style >> 2 & 1 ? 0x7f800000 : (uint32_t)take(&input, 4);
        Py_ssize_t at[4];
        for (int axis = 0; axis < 4; axis++)
            at[axis] = (Py_ssize_t)take(&input, 2) % arrays[0].shape[axis];
        memcpy(arrays[0].memory + offset_of(&arrays[0], at), &bits, 4);
        memcpy(arrays[0].shadow, arrays[0].memory, arrays[0].bytes);
    }
    int same = 1;
    for (int axis = function == CLASSIFY; axis < 4; axis++)
        same &= arrays[0].shape[axis] == arrays[1].shape[axis];
    if (function == ADD)
        run_add(&input, &arrays[0], &arrays[1], mode >> 2 & 1, same);
    else if (function == CLASSIFY)
        run_classify(&arrays[0], &arrays[1],
                     same && arrays[1].shape[0] == 1 && arrays[0].shape[0] && arrays[0].shape[0] <= 256);
    else
        run_is_finite(&arrays[0]);
    free_array(&arrays[0]);
    free_array(&arrays[1]);
    return 0;
}
