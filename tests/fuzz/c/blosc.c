/* Frames of chunks against c-blosc and a plain decoder: what is decoded is equal, whole or in part. What
 * c-blosc decodes and zpatch calls damaged is one of the two cases named at `plain_leniently_decoded`.
 *
 * Input: u8 item, u16 voxels - 1, u16 first voxel, u16 more voxels - 1, then the frame. */

#include "../../../zpatch/chunks/_gather.c"

#include <blosc.h>

#include "input.h"
#include "plain.h"

static const size_t items[4] = {1, 2, 4, 8};

/* Reads voxels `first` up to `stop` of a chunk of `voxels` in one line; NULL where it is not decoded. */
static uint8_t *read_part(uint8_t *frame, size_t length, size_t item, size_t voxels, size_t first,
                          size_t stop, int *is_damaged)
{
    int64_t count = (int64_t)(stop - first);
    int64_t row[16] = {0, 0, (int64_t)length, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, (int64_t)first, count, 0};
    Py_ssize_t numbers = 16, eight = 8, bytes = (Py_ssize_t)length, one = 1;
    Py_ssize_t shape[4] = {1, 1, 1, count}, strides[4];
    for (int axis = 0; axis < 4; axis++)
        strides[axis] = (Py_ssize_t)(axis < 3 ? item * (size_t)count : item);
    uint8_t *out = malloc(item * (size_t)count);
    PyObject row_array = {.view = {row, sizeof row, 8, 0, 1, &numbers, &eight}};
    PyObject map_array = {.view = {frame, bytes, 1, 0, 1, &bytes, &one}}, *map = &map_array;
    PyObject out_array = {.view = {out, (Py_ssize_t)item * count, (Py_ssize_t)item, 0, 4, shape, strides}};
    PyObject *box = &out_array, maps = {.items = &map, .count = 1}, boxes = {.items = &box, .count = 1};
    Argument arguments[15] = {{.object = &row_array}, {.number = 0}, {.object = &maps}, {.object = &boxes}};
    for (int axis = 0; axis < 4; axis++)
        arguments[4 + axis].number = axis < 3 ? 1 : (Py_ssize_t)voxels;
    arguments[8].number = (Py_ssize_t)item;
    arguments[9].text = "blosc";
    arguments[10].text = "";
    PyObject *answer = call(gather, arguments, 15);
    CHECK(answer);
    if (answer->arguments[0].number == 1)
        return out;
    *is_damaged = answer->arguments[1].number == DAMAGED;
    free(out);
    return NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Input input = {data, size};
    size_t item = items[take(&input, 1) & 3], voxels = (size_t)take(&input, 2) + 1;
    size_t first = (size_t)take(&input, 2) % voxels, more = (size_t)take(&input, 2) % (voxels - first) + 1;
    size_t length = input.left, bytes = item * voxels;
    uint8_t *frame = take_bytes(&input, length), *expected = malloc(bytes), *spare = malloc(bytes);
    int is_damaged = 0, ignored;
    uint8_t *whole = read_part(frame, length, item, voxels, 0, voxels, &is_damaged);
    uint8_t *part = read_part(frame, length, item, voxels, first, first + more, &ignored);
    CHECK(!whole || part);
    CHECK(!whole || !memcmp(part, whole + item * first, item * more));
    /* c-blosc trusts both lengths in the header. */
    int is_whole = length >= BLOSC_HEADER && plain_number(frame + 4) == bytes &&
                   plain_number(frame + 12) <= length;
    int is_decoded = is_whole && blosc_decompress_ctx(frame, expected, bytes, 1) == (int)bytes;
    if (is_decoded && whole)
        CHECK(!memcmp(whole, expected, bytes));
    int state = plain_blosc(frame, length, item, bytes, 0, voxels, expected, spare);
    CHECK(state == (whole ? PLAIN_FINE : is_damaged ? PLAIN_DAMAGED : PLAIN_UNKNOWN));
    CHECK(!whole || !memcmp(whole, expected, bytes));
    CHECK(!is_decoded || !is_damaged || plain_leniently_decoded);
    free(frame);
    free(expected);
    free(spare);
    free(whole);
    free(part);
    return 0;
}
