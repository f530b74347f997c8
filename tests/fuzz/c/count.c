/* The counting loops and the moments of floats against loops over voxels.
 *
 * Input: u8 bytes of a voxel - 1, of which 1, 2 and 4 are counted; u8 bytes before the first voxel; u8 whether
 * there are too few counts; then the voxels. */

#include "../../../zpatch/store/_count.c"

#include "input.h"

static size_t index_of(const uint8_t *voxel, size_t item)
{
    return item == 1 ? voxel[0] : voxel[item == 4 ? 2 : 0] + (size_t)256 * voxel[item == 4 ? 3 : 1];
}

static int is_near(double found, double expected, double scale)
{
    return fabs(found - expected) <= 1e-9 * scale;
}

static void check_moments(const uint8_t *voxels, size_t count, const Argument *found)
{
    int64_t finite = 0, positive = 0, negative = 0, infinite = 0;
    double sum = 0, squares = 0, largest = 0, low = INFINITY, high = -INFINITY;
    for (int pass = 0; pass < 2; pass++)
        for (size_t n = 0; n < count; n++) {
            float voxel;
            memcpy(&voxel, voxels + 4 * n, 4);
            if (pass && isfinite(voxel))
                squares += (voxel - sum / (double)finite) * (voxel - sum / (double)finite);
            if (pass || !isfinite(voxel)) {
                infinite += !pass && isinf(voxel);
                continue;
            }
            finite++, sum += voxel, largest = fmax(largest, fabs(voxel));
            positive += voxel == 0 && !signbit(voxel), negative += voxel == 0 && signbit(voxel);
            if (voxel != 0)
                low = fmin(low, voxel), high = fmax(high, voxel);
        }
    CHECK(found[0].number == finite && found[1].number == positive);
    CHECK(found[2].number == negative && found[3].number == infinite);
    CHECK(is_near(found[4].real, finite ? sum / (double)finite : 0, largest));
    CHECK(is_near(found[5].real, squares, largest * largest * (double)finite));
    CHECK(found[6].real == low && found[7].real == high);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Input input = {data, size};
    size_t item = (size_t)take(&input, 1) % 5 + 1, shift = (size_t)take(&input, 1) & 3;
    size_t values = item == 1 ? 256 : 65536, some = values - ((size_t)take(&input, 1) & 1);
    size_t voxel_count = input.left / item;
    uint8_t *memory = malloc(shift + input.left + 1), *voxels = memory + shift;
    memcpy(voxels, input.at, input.left);
    int64_t *counts = calloc(some, 8), *expected = calloc(values, 8);
    counts[values / 2] = expected[values / 2] = INT64_C(1) << 40;
    for (size_t n = 0; n < voxel_count; n++)
        expected[index_of(voxels + item * n, item)]++;
    Py_ssize_t sizes[2] = {(Py_ssize_t)voxel_count, (Py_ssize_t)some}, steps[2] = {(Py_ssize_t)item, 8};
    PyObject from = {.view = {voxels, sizes[0] * steps[0], steps[0], 0, 1, &sizes[0], &steps[0]}};
    PyObject to = {.view = {counts, 8 * sizes[1], 8, 0, 1, &sizes[1], &steps[1]}};
    const Argument arguments[2] = {{.object = &from}, {.object = &to}};
    int is_aligned = (uintptr_t)voxels % item == 0;
    int fits = item != 3 && item != 5 && some == values && is_aligned;
    CHECK(!call(count, arguments, 2) == !fits);
    CHECK(!fits || !memcmp(counts, expected, 8 * values));
    PyObject *answer = call_with(moments, &from);
    CHECK(!answer == !(item == 4 && is_aligned));
    if (answer)
        check_moments(voxels, voxel_count, answer->arguments);
    free(memory);
    free(counts);
    free(expected);
    return 0;
}
