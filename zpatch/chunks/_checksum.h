/* crc32c: by the processor's instruction where it has one, else by tables of eight bytes at a time.
 *
 * The instruction takes three steps for eight bytes, and a new one can begin with each step: so three stretches
 * of the bytes are summed at once. Their sums are joined by tables which say what a sum becomes after a stretch
 * of zeros (as in Mark Adler's crc32c.c).
 */

#ifndef ZPATCH_CHECKSUM_H
#define ZPATCH_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined __x86_64__
#define CRC_INSTRUCTION __attribute__((target("sse4.2")))
#define CRC_OF_8(sum, eight) ((uint32_t)__builtin_ia32_crc32di(sum, eight))
#define CRC_OF_1(sum, byte) __builtin_ia32_crc32qi(sum, byte)
#elif defined __aarch64__ && defined __ARM_FEATURE_CRC32
#include <arm_acle.h>
#define CRC_INSTRUCTION
#define CRC_OF_8(sum, eight) __crc32cd(sum, eight)
#define CRC_OF_1(sum, byte) __crc32cb(sum, byte)
#endif

enum { CRC_BYTES = 4, LONG_STRETCH = 4096, SHORT_STRETCH = 256 };

static const uint32_t crc_polynomial = 0x82f63b78;
static uint32_t crc_of_byte[8][256];                      /* of a byte that 0 to 7 zeros follow */
static uint32_t after_long[4][256], after_short[4][256]; /* a stretch of zeros, for each byte of a sum */

static uint32_t after_zero_bits(uint32_t sum, int bits)
{
    while (bits-- > 0)
        sum = sum & 1 ? sum >> 1 ^ crc_polynomial : sum >> 1;
    return sum;
}

/* Sums are linear: what a sum becomes is put together from what its bits become. */
static void fill_after(uint32_t table[4][256], size_t zeros)
{
    for (int place = 0; place < 4; place++)
        for (uint32_t bit = 1; bit < 256; bit *= 2) {
            uint32_t sum = bit << 8 * place;
            for (size_t n = 0; n < zeros; n++)
                sum = crc_of_byte[0][sum & 255] ^ sum >> 8;
            for (uint32_t low = 0; low < bit; low++)
                table[place][bit + low] = sum ^ table[place][low];
        }
}

__attribute__((constructor)) static void fill_tables(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        crc_of_byte[0][byte] = after_zero_bits(byte, 8);
        for (int n = 1; n < 8; n++)
            crc_of_byte[n][byte] = after_zero_bits(crc_of_byte[n - 1][byte], 8);
    }
    fill_after(after_long, LONG_STRETCH);
    fill_after(after_short, SHORT_STRETCH);
}

static uint64_t eight_at(const uint8_t *p)
{
    uint64_t eight;
    memcpy(&eight, p, sizeof eight);
    return eight;
}

static uint32_t crc_by_tables(uint32_t sum, const uint8_t *in, size_t count)
{
    for (; count >= 8; in += 8, count -= 8) {
        uint64_t eight = eight_at(in) ^ sum;
        sum = 0;
        for (int n = 0; n < 8; n++)
            sum ^= crc_of_byte[7 - n][eight >> 8 * n & 255];
    }
    for (; count > 0; in++, count--)
        sum = crc_of_byte[0][(sum ^ *in) & 255] ^ sum >> 8;
    return sum;
}

#ifdef CRC_INSTRUCTION

static uint32_t after_stretch(uint32_t table[4][256], uint32_t sum)
{
    return table[0][sum & 255] ^ table[1][sum >> 8 & 255] ^ table[2][sum >> 16 & 255] ^ table[3][sum >> 24];
}

CRC_INSTRUCTION static uint32_t crc_of_three(uint32_t sum, const uint8_t *in, size_t stretch,
                                             uint32_t table[4][256])
{
    uint32_t second = 0, third = 0;
    for (size_t n = 0; n < stretch; n += 8) {
        sum = CRC_OF_8(sum, eight_at(in + n));
        second = CRC_OF_8(second, eight_at(in + stretch + n));
        third = CRC_OF_8(third, eight_at(in + 2 * stretch + n));
    }
    return after_stretch(table, after_stretch(table, sum) ^ second) ^ third;
}

CRC_INSTRUCTION static uint32_t crc_by_instruction(uint32_t sum, const uint8_t *in, size_t count)
{
    for (; count >= 3 * LONG_STRETCH; in += 3 * LONG_STRETCH, count -= 3 * LONG_STRETCH)
        sum = crc_of_three(sum, in, LONG_STRETCH, after_long);
    for (; count >= 3 * SHORT_STRETCH; in += 3 * SHORT_STRETCH, count -= 3 * SHORT_STRETCH)
        sum = crc_of_three(sum, in, SHORT_STRETCH, after_short);
    for (; count >= 8; in += 8, count -= 8)
        sum = CRC_OF_8(sum, eight_at(in));
    for (; count > 0; in++, count--)
        sum = CRC_OF_1(sum, *in);
    return sum;
}

#endif

static uint32_t crc32c(const uint8_t *in, size_t count)
{
#if defined CRC_INSTRUCTION && defined __x86_64__
    if (!__builtin_cpu_supports("sse4.2"))
        return ~crc_by_tables(~(uint32_t)0, in, count);
#endif
#ifdef CRC_INSTRUCTION
    return ~crc_by_instruction(~(uint32_t)0, in, count);
#else
    return ~crc_by_tables(~(uint32_t)0, in, count);
#endif
}

#endif
