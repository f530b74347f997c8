/* The counting loop against a loop over voxels.
 *
 * Input: u8 bytes of a voxel - 1, of which 1 and 2 are counted; u8 bytes before the first voxel; u8 whether
 * there are too few counts; then the voxels. */

#include "../../../zpatch/store/_count.c"

#include "input.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Input input = {data, size};
    size_t item = (size_t)take(&input, 1) % 4 + 1, shift = (size_t)take(&input, 1) & 3;
    size_t values = item == 1 ? 256 : 65536, some = values - ((size_t)take(&input, 1) & 1);
    size_t voxel_count = input.left / item;
    uint8_t *memory = malloc(shift + input.left + 1), *voxels = memory + shift;
    memcpy(voxels, input.at, input.left);
    int64_t *counts = calloc(some, 8), *expected = calloc(values, 8);
    counts[values / 2] = expected[values / 2] = INT64_C(1) << 40;
    for (size_t n = 0; n < voxel_count; n++)
        expected[item == 1 ? voxels[n] : voxels[item * n] + 256 * voxels[item * n + 1]]++;
    Py_ssize_t sizes[2] = {(Py_ssize_t)voxel_count, (Py_ssize_t)some}, steps[2] = {(Py_ssize_t)item, 8};
    PyObject from = {.view = {voxels, sizes[0] * steps[0], steps[0], 0, 1, &sizes[0], &steps[0]}};
    PyObject to = {.view = {counts, 8 * sizes[1], 8, 0, 1, &sizes[1], &steps[1]}};
    const Argument arguments[2] = {{.object = &from}, {.object = &to}};
    int fits = item <= 2 && some == values && (uintptr_t)voxels % item == 0;
    CHECK(!call(count, arguments, 2) == !fits);
    CHECK(!fits || !memcmp(counts, expected, 8 * values));
    free(memory);
    free(counts);
    free(expected);
    return 0;
}
