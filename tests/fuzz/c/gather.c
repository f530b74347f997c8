/* The gather loop with chunks, rows, shapes, strides and scaling of anyone, against a loop over voxels.
 *
 * Input: u8 mode: 1 blosc, 2 4 8 the writer, 16 chunk shape and rows as they are, 32 `scale` or 64 `copy`
 * instead of `gather`, 128 with another shape; four float32 of the scaling; four chunk sides; u8 boxes, u8
 * maps: 2 files instead, 4 streams; sides and layout of each box; u16 bytes of the first map; u8 rows, u8 first row; the
 * rows, whose first byte is the map, 2 to compare the chunk with its checksum, 4 to write that first; then
 * the bytes of the maps. */

#define _GNU_SOURCE
#include <sys/mman.h>
#include <unistd.h>

#include "../../../zpatch/chunks/_gather.c"

#include "input.h"
#include "plain.h"

enum { MAX_BOXES = 3, MAX_MAPS = 2, MAX_ROWS = 15, MOST_BYTES = 1 << 16 };
#define HUGE_BYTES ((__int128)1 << 60)

static const char *const scaled_from[8] = {"", "", "", "", "u1", "i1", "u2", "i2"};
static const size_t items[8] = {1, 2, 4, 8, 1, 1, 2, 2};

typedef struct {
    size_t item, written, chunk[4], chunk_bytes;
    int is_blosc;
    const char *scaled_from;
    float scaling[4];
    uint8_t checks[MAX_ROWS + 1], seals[MAX_ROWS + 1];
    int in_files;
} Given;

static uint32_t plain_crc(const uint8_t *in, size_t count)
{
    uint32_t sum = ~(uint32_t)0;
    for (size_t n = 0; n < count; n++) {
        sum ^= in[n];
        for (int bit = 0; bit < 8; bit++)
            sum = sum & 1 ? sum >> 1 ^ 0x82f63b78 : sum >> 1;
    }
    return ~sum;
}

static void put_number(uint8_t *to, uint32_t number)
{
    for (int byte = 0; byte < 4; byte++)
        to[byte] = (uint8_t)(number >> 8 * byte);
}

/* The bytes of a map, in a file. */
static int64_t in_file(int number, const uint8_t *bytes, size_t count)
{
    static int files[MAX_MAPS];
    if (!files[number])
        files[number] = memfd_create("map", 0);
    CHECK(files[number] > 0);
    CHECK(!ftruncate(files[number], 0));
    CHECK(pwrite(files[number], bytes, count, 0) == (ssize_t)count);
    return files[number];
}

static void seal(const Given *given, const int64_t *rows, int count, uint8_t *const *maps,
                 const Py_ssize_t *map_bytes)
{
    for (int n = 0; n < count; n++) {
        const int64_t *row = rows + 16 * n;
        if (given->seals[n] && row[1] >= 0 && row[2] >= 0 && row[1] + row[2] + 4 <= map_bytes[row[0]])
            put_number(maps[row[0]] + row[1] + row[2], plain_crc(maps[row[0]] + row[1], (size_t)row[2]));
    }
}

static float plain_value(const Given *given, const uint8_t *voxel)
{
    uint16_t pair = (uint16_t)(voxel[0] | (given->item > 1 ? voxel[1] << 8 : 0));
    float value = *given->scaled_from == 'u' ? (float)pair
                  : given->item == 1         ? (float)(int8_t)pair
                                             : (float)(int16_t)pair;
    value *= given->scaling[0];
    value += given->scaling[1];
    value = value < given->scaling[2] ? given->scaling[2] : value;
    return value > given->scaling[3] ? given->scaling[3] : value;
}

/* What should be written for a voxel; where both that and what is written are NaN, their bits may differ. */
static void expect(const Given *given, uint8_t *to, const uint8_t *voxel, const uint8_t *written)
{
    if (!*given->scaled_from) {
        memcpy(to, voxel, given->item);
        return;
    }
    float value = plain_value(given, voxel), found;
    memcpy(&found, written, sizeof found);
    memcpy(to, value != value && found != found ? &found : &value, sizeof value);
}

static void run_scale(Input *input, const Given *given)
{
    size_t count = input->left / given->item;
    uint8_t *voxels = take_bytes(input, count * given->item), *out = malloc(4 * count + 1);
    Py_ssize_t shape = (Py_ssize_t)count, steps[2] = {(Py_ssize_t)given->item, 4};
    PyObject from = {.view = {.buf = voxels, .len = shape * steps[0], .itemsize = steps[0], .ndim = 1,
                              .shape = &shape, .strides = &steps[0]}};
    PyObject to = {.view = {.buf = out, .len = 4 * shape, .itemsize = 4, .ndim = 1, .shape = &shape,
                            .strides = &steps[1]}};
    const float *scaling = given->scaling;
    Argument arguments[7] = {{.object = &from}, {.object = &to}, {.text = given->scaled_from}};
    for (int n = 0; n < 4; n++)
        arguments[3 + n].real = scaling[n];
    CHECK(!call(scale, arguments, 7) == !*given->scaled_from);
    for (size_t n = 0; *given->scaled_from && n < count; n++) {
        uint8_t expected[4];
        expect(given, expected, voxels + n * given->item, out + 4 * n);
        CHECK(!memcmp(out + 4 * n, expected, 4));
    }
    free(voxels);
    free(out);
}

/* Copies an array to another one of the same or of another shape, both laid out in any way. */
static void run_copy(Input *input, size_t item, int differs)
{
    Array arrays[2] = {0};
    static const unsigned limits[4] = {3, 20, 6, 60};
    for (int axis = 0; axis < 4; axis++)
        arrays[0].shape[axis] = arrays[1].shape[axis] = (Py_ssize_t)(take(input, 1) % limits[axis]);
    arrays[1].shape[3] += differs;
    for (int n = 0; n < 2; n++) {
        take_layout(input, arrays + n, item);
        fill(arrays + n, (uint32_t)n, 1);
    }
    const Argument arguments[2] = {{.object = &arrays[0].object}, {.object = &arrays[1].object}};
    PyObject *answer = call(copy, arguments, 2);
    CHECK(answer == (differs ? NULL : Py_True));
    Py_ssize_t at[4], *shape = arrays[0].shape;
    for (at[0] = 0; answer && at[0] < shape[0]; at[0]++)
        for (at[1] = 0; at[1] < shape[1]; at[1]++)
            for (at[2] = 0; at[2] < shape[2]; at[2]++)
                for (at[3] = 0; at[3] < shape[3]; at[3]++)
                    memcpy(arrays[1].shadow + offset_of(arrays + 1, at),
                           arrays[0].memory + offset_of(arrays, at), item);
    check_as_expected(arrays);
    if (!arrays[1].overlaps)
        check_as_expected(arrays + 1);
    free_array(arrays);
    free_array(arrays + 1);
}

static void take_rows(Input *input, Given *given, int raw, int64_t *rows, int count, const Array *boxes,
                      int box_count, const Py_ssize_t *map_bytes, int map_count)
{
    for (int64_t *row = rows; row < rows + 16 * count; row += 16) {
        for (int n = 0; raw && n < 16; n++)
            row[n] = (int64_t)take(input, 8);
        if (raw)
            continue;
        unsigned map = (unsigned)take(input, 1);
        row[0] = map % (unsigned)map_count;
        given->checks[(row - rows) / 16] = map >> 1 & 1;
        given->seals[(row - rows) / 16] = map >> 2 & 1;
        row[1] = (int64_t)take(input, 2);
        row[2] = (int64_t)take(input, 2);
        if (row[1] == 0xffff)
            row[1] = -1;
        if (row[2] == 0xffff)
            row[2] = map_bytes[row[0]] - row[1];
        row[3] = (int64_t)take(input, 1) % box_count;
        for (int axis = 0; axis < 4; axis++) {
            int64_t in_chunk = (int64_t)given->chunk[axis], in_box = boxes[row[3]].shape[axis];
            int64_t *part = row + 4 + 3 * axis;
            part[1] = (int64_t)take(input, 1) % (in_chunk < in_box ? in_chunk : in_box) + 1;
            part[0] = (int64_t)take(input, 1) % (in_chunk - part[1] + 1);
            part[2] = (int64_t)take(input, 1) % (in_box - part[1] + 1);
        }
    }
}

/* The first voxel of a row in its chunk, and the one after its last voxel. */
static void ends_of(const Given *given, const int64_t *row, size_t *first, size_t *stop)
{
    size_t low = 0, high = 0;
    for (int axis = 0; axis < 4; axis++) {
        low = low * given->chunk[axis] + (size_t)row[4 + 3 * axis];
        high = high * given->chunk[axis] + (size_t)(row[4 + 3 * axis] + row[5 + 3 * axis] - 1);
    }
    *first = low < *first ? low : *first;
    *stop = high + 1 > *stop ? high + 1 : *stop;
}

static int is_valid(const Given *given, const int64_t *row, int is_checked, const Array *boxes, int box_count,
                    const Py_ssize_t *map_bytes, int map_count)
{
    if (row[0] < 0 || row[0] >= map_count || row[1] < 0 || row[2] < 0 || row[3] < 0 || row[3] >= box_count)
        return 0;
    __int128 end = (__int128)row[1] + row[2] + (is_checked ? 4 : 0);
    int valid = given->in_files ? row[2] <= 1 << 20 && row[1] <= INT64_MAX - (1 << 20) - 4
                                : end <= map_bytes[row[0]];
    for (int axis = 0; axis < 4; axis++) {
        const int64_t *part = row + 4 + 3 * axis;
        valid &= part[0] >= 0 && part[1] > 0 && part[2] >= 0;
        valid &= (__int128)part[0] + part[1] <= (__int128)given->chunk[axis];
        valid &= (__int128)part[2] + part[1] <= boxes[row[3]].shape[axis];
    }
    return valid;
}

static void copy_row(const Given *given, const int64_t *row, const uint8_t *chunk, Array *box)
{
    Py_ssize_t at[4], n[4];
    for (n[0] = 0; n[0] < row[5]; n[0]++)
        for (n[1] = 0; n[1] < row[8]; n[1]++)
            for (n[2] = 0; n[2] < row[11]; n[2]++)
                for (n[3] = 0; n[3] < row[14]; n[3]++) {
                    size_t voxel = 0;
                    for (int axis = 0; axis < 4; axis++) {
                        voxel = voxel * given->chunk[axis] + (size_t)(row[4 + 3 * axis] + n[axis]);
                        at[axis] = row[6 + 3 * axis] + n[axis];
                    }
                    size_t to = offset_of(box, at);
                    expect(given, box->shadow + to, chunk + voxel * given->item, box->memory + to);
                }
}

/* Does what the loop should have done up to row `stopped`, and checks why it stopped there. */
static void expect_rows(const Given *given, const int64_t *rows, int start, int count, int stopped,
                        int why, uint8_t *const *maps, const Py_ssize_t *map_bytes,
                        int map_count, Array *boxes, int box_count)
{
    uint8_t *chunk = NULL, *spare = NULL;
    for (int at = start, end; at < count; at = end) {
        const int64_t *row = rows + 16 * at;
        size_t first = SIZE_MAX, stop = 0;
        int valid = 1;
        for (end = at; end < count && rows[16 * end] == row[0] && rows[16 * end + 1] == row[1]; end++)
            valid = valid && is_valid(given, rows + 16 * end, given->checks[end], boxes, box_count, map_bytes,
                                      map_count);
        if (at == stopped && row[1] < 0) { /* a chunk that is missing */
            CHECK(why == FINE);
            break;
        }
        CHECK(row[1] >= 0);
        if (!valid) {
            CHECK(at == stopped && why == BAD_ROW);
            break;
        }
        for (int n = at; n < end; n++)
            ends_of(given, rows + 16 * n, &first, &stop);
        chunk = chunk ? chunk : malloc(given->chunk_bytes);
        spare = spare ? spare : malloc(given->chunk_bytes);
        size_t length = (size_t)row[2], needed = length + (given->checks[at] ? 4 : 0);
        if (!given->is_blosc && length == given->chunk_bytes && !given->checks[at])
            needed = stop * given->item;
        if (needed && (row[1] > map_bytes[row[0]] || needed > (size_t)(map_bytes[row[0]] - row[1]))) {
            CHECK(at == stopped && why == GONE && given->in_files);
            break;
        }
        const uint8_t *encoded = needed ? maps[row[0]] + row[1] : maps[row[0]];
        if (given->checks[at] && plain_crc(encoded, length) != plain_number(encoded + length)) {
            CHECK(at == stopped && why == UNEQUAL);
            break;
        }
        int state = (size_t)row[2] == given->chunk_bytes ? PLAIN_FINE : PLAIN_DAMAGED;
        if (given->is_blosc)
            state = plain_blosc(encoded, (size_t)row[2], given->item, given->chunk_bytes, first, stop, chunk,
                                spare);
        else if (state == PLAIN_FINE)
            memcpy(chunk, encoded, needed < given->chunk_bytes ? needed : given->chunk_bytes);
        if (state != PLAIN_FINE) {
            CHECK(at == stopped && why == (state == PLAIN_DAMAGED ? DAMAGED : FINE));
            break;
        }
        CHECK(end <= stopped);
        for (int n = at; n < end; n++)
            copy_row(given, rows + 16 * n, chunk, boxes + rows[16 * n + 3]);
    }
    free(chunk);
    free(spare);
}

static void run_gather(Input *input, Given *given, int raw)
{
    Array boxes[MAX_BOXES] = {0};
    PyObject *box_objects[MAX_BOXES], map_arrays[MAX_MAPS] = {0}, *map_objects[MAX_MAPS];
    uint8_t *maps[MAX_MAPS];
    Py_ssize_t map_bytes[MAX_MAPS], one = 1;
    int box_count = (int)take(input, 1) % MAX_BOXES + 1, map_mode = (int)take(input, 1);
    int map_count = map_mode % MAX_MAPS + 1;
    given->in_files = map_mode >> 1 & 1;
    static const int limits[4] = {2, 20, 6, 80};
    for (int n = 0; n < box_count; n++) {
        for (int axis = 0; axis < 4; axis++)
            boxes[n].shape[axis] = (Py_ssize_t)take(input, 1) % limits[axis] + 1;
        take_layout(input, boxes + n, given->written);
        fill(boxes + n, (uint32_t)n, 1);
        box_objects[n] = &boxes[n].object;
    }
    size_t first_map = (size_t)take(input, 2);
    int count = (int)take(input, 1) % (MAX_ROWS + 1), start = (int)take(input, 1) % (MAX_ROWS + 1);
    Input ahead = *input; /* rows are read when the lengths of the maps are known */
    size_t row_bytes = raw ? 128 : 18;
    for (size_t left = row_bytes * (size_t)count; left; left -= left < 8 ? left : 8)
        take(&ahead, left < 8 ? left : 8);
    for (int n = 0; n < map_count; n++) {
        size_t length = n + 1 < map_count && first_map < ahead.left ? first_map : ahead.left;
        maps[n] = take_bytes(&ahead, length);
        map_bytes[n] = (Py_ssize_t)length;
        map_arrays[n].view = (Py_buffer){.buf = maps[n], .len = given->in_files ? 0 : map_bytes[n],
                                         .itemsize = 1, .ndim = 1, .shape = map_bytes + n, .strides = &one};
        map_objects[n] = map_arrays + n;
    }
    int64_t *rows = malloc(128 * (size_t)count + 1);
    take_rows(input, given, raw, rows, count, boxes, box_count, map_bytes, map_count);
    seal(given, rows, raw ? 0 : count, maps, map_bytes);
    int64_t files[MAX_MAPS];
    for (int n = 0; given->in_files && n < map_count; n++)
        files[n] = in_file(n, maps[n], (size_t)map_bytes[n]);
    Py_ssize_t numbers = 16 * count, step = 8, check_count = raw ? 0 : count, file_count = map_count;
    PyObject checks = {.view = {.buf = given->checks, .len = check_count, .itemsize = 1, .ndim = 1,
                                .shape = &check_count, .strides = &one}};
    PyObject file_numbers = {.view = {.buf = files, .len = given->in_files ? 8 * file_count : 0, .itemsize = 8,
                                      .ndim = 1, .shape = &file_count, .strides = &step}};
    PyObject row_object = {.view = {.buf = rows, .len = 128 * count, .itemsize = 8, .ndim = 1,
                                    .shape = &numbers, .strides = &step}};
    PyObject all_maps = {.items = map_objects, .count = map_count};
    PyObject all_boxes = {.items = box_objects, .count = box_count};
    Argument arguments[18] = {{.object = &row_object}, {.object = &checks}, {.number = start},
                              {.object = &all_maps}, {.object = &file_numbers}, {.object = &all_boxes},
                              {.truth = map_mode >> 2 & 1}};
    for (int n = 0; n < 4; n++) {
        arguments[7 + n].number = (Py_ssize_t)given->chunk[n];
        arguments[14 + n].real = given->scaling[n];
    }
    arguments[11].number = (Py_ssize_t)given->item;
    arguments[12].text = given->is_blosc ? "blosc" : "none";
    arguments[13].text = given->scaled_from;
    PyObject *answer = call(gather, arguments, 18);
    if (answer) {
        int stopped = (int)answer->arguments[0].number;
        CHECK(start < count ? start <= stopped && stopped <= count : stopped == start);
        expect_rows(given, rows, start, count, stopped, (int)answer->arguments[1].number, maps, map_bytes,
                    map_count, boxes, box_count);
        for (int n = 0; n < box_count; n++)
            check_as_expected(boxes + n);
    }
    for (int n = 0; n < box_count; n++)
        free_array(boxes + n);
    for (int n = 0; n < map_count; n++)
        free(maps[n]);
    free(rows);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Input input = {data, size};
    unsigned mode = (unsigned)take(&input, 1), writer = mode >> 1 & 7;
    int raw = mode >> 4 & 1;
    Given given = {.item = items[writer], .scaled_from = scaled_from[writer], .is_blosc = mode & 1};
    given.written = writer < 4 ? given.item : 4;
    for (int n = 0; n < 4; n++)
        given.scaling[n] = take_float(&input);
    if (mode & 32) {
        run_scale(&input, &given);
        return 0;
    }
    if (mode & 64) {
        run_copy(&input, given.item, mode >> 7);
        return 0;
    }
    static const uint64_t limits[4] = {2, 20, 6, 80};
    __int128 bytes = (__int128)given.item;
    for (int axis = 0; axis < 4; axis++) {
        uint64_t side = take(&input, raw ? 8 : 1);
        given.chunk[axis] = (size_t)(raw ? side : side % limits[axis] + 1);
        bytes = bytes < HUGE_BYTES ? bytes * (given.chunk[axis] ? given.chunk[axis] : 1) : bytes;
    }
    given.chunk_bytes = (size_t)bytes;
    if (bytes >= MOST_BYTES && bytes < HUGE_BYTES)
        return 0; /* much memory for nothing; what is larger is refused */
    run_gather(&input, &given, raw);
    return 0;
}
