/* The LZ4 decoder against a plain one: the same verdict, and the same bytes.
 *
 * Input: u16 capacity - 1, u16 wanted bytes - 1, then the stream. */

#include <Python.h>

#include "../../../zpatch/chunks/_decode.h"
#include "input.h"
#include "plain.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Input input = {data, size};
    size_t capacity = (size_t)take(&input, 2) + 1, wanted = (size_t)take(&input, 2) % capacity + 1;
    size_t length = input.left;
    uint8_t *stream = take_bytes(&input, length), *out = malloc(capacity + SLACK);
    uint8_t *expected = malloc(capacity);
    int is_fine = decode_lz4(stream, length, out, capacity, wanted);
    CHECK(is_fine == (plain_lz4(stream, length, expected, capacity, wanted) >= wanted));
    CHECK(!is_fine || !memcmp(out, expected, wanted));
    free(stream);
    free(out);
    free(expected);
    return 0;
}
