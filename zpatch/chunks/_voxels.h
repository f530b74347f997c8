/* Planes of bytes -> voxels, as they are stored or scaled. */

#ifndef ZPATCH_VOXELS_H
#define ZPATCH_VOXELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    size_t count, voxels, step; /* rows; voxels in each; voxels of the chunk from one row to the next */
    ptrdiff_t out_step;         /* bytes of the output from one row to the next */
    ptrdiff_t ahead;            /* bytes of the output to the rows written next, which are prefetched */
} Rows;

/* Writes voxels whose bytes are in planes, one for each byte of a voxel, from byte `at` of each plane on. */
typedef void (*Join)(uint8_t *out, const uint8_t *const *planes, size_t at, const Rows *rows);

typedef struct {
    double slope, inter, low, high;
} Scaling;

/* Writes slope * voxel + inter for all voxels of some rows, which begin `step` bytes apart, clipped to low and
 * high; each step is rounded as in numpy. */
typedef void (*Scale)(uint8_t *out, ptrdiff_t out_step, const uint8_t *voxels, ptrdiff_t step, size_t rows,
                      size_t n, const Scaling *scaling);

/* ---- planes -> voxels ---- */

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Pairs __attribute__((vector_size(16)));

static Bytes bytes_at(const uint8_t *p)
{
    Bytes bytes;
    memcpy(&bytes, p, sizeof bytes);
    return bytes;
}

#define LOW_BYTES(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_BYTES(a, b) \
    __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW_PAIRS(a, b) __builtin_shufflevector((Pairs)(a), (Pairs)(b), 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_PAIRS(a, b) __builtin_shufflevector((Pairs)(a), (Pairs)(b), 4, 12, 5, 13, 6, 14, 7, 15)

static void put(uint8_t *p, Bytes bytes)
{
    memcpy(p, &bytes, sizeof bytes);
}

static Bytes eight_bytes_at(const uint8_t *p)
{
    Bytes bytes = {0};
    memcpy(&bytes, p, 8);
    return bytes;
}

/* Writes all rows. Rows of 16 voxels and more are written in steps of 16, the last of which may overlap the
 * one before; rows of 8 to 15 in two halves that may overlap; shorter rows voxel by voxel. */
#define FOR_EACH_ROW(SIXTEEN, EIGHT, ONE)                     \
    for (size_t row = 0, n = rows->voxels; row < rows->count; \
         row++, out += rows->out_step, at += rows->step) {    \
        PREFETCH(out + rows->ahead);                          \
        PREFETCH(out + rows->ahead + 64);                     \
        if (n >= 16) {                                        \
            for (size_t i = 0; i + 16 < n; i += 16)           \
                SIXTEEN(i);                                   \
            SIXTEEN(n - 16);                                  \
        } else if (n >= 8) {                                  \
            EIGHT((size_t)0);                                 \
            EIGHT(n - 8);                                     \
        } else {                                              \
            for (size_t i = 0; i < n; i++)                    \
                ONE(i);                                       \
        }                                                     \
    }
#define PREFETCH(address) __builtin_prefetch(address, 1)

#define COPY(ITEM)                                                                                   \
    static void copy_##ITEM(uint8_t *out, const uint8_t *const *planes, size_t at, const Rows *rows) \
    {                                                                                                \
        const uint8_t *voxels = planes[0];                                                           \
        FOR_EACH_ROW(COPY_##ITEM##_16, COPY_##ITEM##_8, COPY_##ITEM##_1)                             \
    }
#define COPY_SOME(ITEM, COUNT, i) memcpy(out + ITEM * (i), voxels + ITEM * (at + (i)), ITEM * COUNT)
#define COPY_1_16(i) COPY_SOME(1, 16, i)
#define COPY_1_8(i) COPY_SOME(1, 8, i)
#define COPY_1_1(i) COPY_SOME(1, 1, i)
#define COPY_2_16(i) COPY_SOME(2, 16, i)
#define COPY_2_8(i) COPY_SOME(2, 8, i)
#define COPY_2_1(i) COPY_SOME(2, 1, i)
#define COPY_4_16(i) COPY_SOME(4, 16, i)
#define COPY_4_8(i) COPY_SOME(4, 8, i)
#define COPY_4_1(i) COPY_SOME(4, 1, i)
#define COPY_8_16(i) COPY_SOME(8, 16, i)
#define COPY_8_8(i) COPY_SOME(8, 8, i)
#define COPY_8_1(i) COPY_SOME(8, 1, i)
COPY(1)
COPY(2)
COPY(4)
COPY(8)

static void join_16_of_2(uint8_t *out, Bytes a, Bytes b)
{
    put(out, LOW_BYTES(a, b));
    put(out + 16, HIGH_BYTES(a, b));
}

static void join_8_of_2(uint8_t *out, Bytes a, Bytes b)
{
    put(out, LOW_BYTES(a, b));
}

static void join_2(uint8_t *out, const uint8_t *const *planes, size_t at, const Rows *rows)
{
    const uint8_t *a = planes[0], *b = planes[1];
#define SIXTEEN(i) join_16_of_2(out + 2 * (i), bytes_at(a + at + (i)), bytes_at(b + at + (i)))
#define EIGHT(i) join_8_of_2(out + 2 * (i), eight_bytes_at(a + at + (i)), eight_bytes_at(b + at + (i)))
#define ONE(i) out[2 * (i)] = a[at + (i)], out[2 * (i) + 1] = b[at + (i)]
    FOR_EACH_ROW(SIXTEEN, EIGHT, ONE)
#undef SIXTEEN
#undef EIGHT
#undef ONE
}

static void join_16_of_4(uint8_t *out, Bytes a, Bytes b, Bytes c, Bytes d)
{
    Bytes ab = LOW_BYTES(a, b), cd = LOW_BYTES(c, d), more_ab = HIGH_BYTES(a, b), more_cd = HIGH_BYTES(c, d);
    put(out, (Bytes)LOW_PAIRS(ab, cd));
    put(out + 16, (Bytes)HIGH_PAIRS(ab, cd));
    put(out + 32, (Bytes)LOW_PAIRS(more_ab, more_cd));
    put(out + 48, (Bytes)HIGH_PAIRS(more_ab, more_cd));
}

static void join_8_of_4(uint8_t *out, Bytes a, Bytes b, Bytes c, Bytes d)
{
    Bytes ab = LOW_BYTES(a, b), cd = LOW_BYTES(c, d);
    put(out, (Bytes)LOW_PAIRS(ab, cd));
    put(out + 16, (Bytes)HIGH_PAIRS(ab, cd));
}

static void join_4(uint8_t *out, const uint8_t *const *planes, size_t at, const Rows *rows)
{
    const uint8_t *a = planes[0], *b = planes[1], *c = planes[2], *d = planes[3];
#define OF_PLANES(load, i) load(a + at + (i)), load(b + at + (i)), load(c + at + (i)), load(d + at + (i))
#define SIXTEEN(i) join_16_of_4(out + 4 * (i), OF_PLANES(bytes_at, i))
#define EIGHT(i) join_8_of_4(out + 4 * (i), OF_PLANES(eight_bytes_at, i))
#define ONE(i)                                                                                  \
    out[4 * (i)] = a[at + (i)], out[4 * (i) + 1] = b[at + (i)], out[4 * (i) + 2] = c[at + (i)], \
            out[4 * (i) + 3] = d[at + (i)]
    FOR_EACH_ROW(SIXTEEN, EIGHT, ONE)
#undef OF_PLANES
#undef SIXTEEN
#undef EIGHT
#undef ONE
}

static void join_8(uint8_t *out, const uint8_t *const *planes, size_t at, const Rows *rows)
{
    for (size_t row = 0; row < rows->count; row++, out += rows->out_step, at += rows->step)
        for (size_t i = 0; i < rows->voxels; i++)
            for (size_t p = 0; p < 8; p++)
                out[8 * i + p] = planes[p][at + i];
}

/* ---- rows of voxels -> columns ---- */

/* Writes `rows` rows of `voxels` voxels, which are `in_step` bytes apart, as columns: the voxels of one place
 * in the rows follow each other in the output, `out_step` bytes after those of the place before. */
typedef void (*Turn)(uint8_t *out, ptrdiff_t out_step, const uint8_t *in, ptrdiff_t in_step, size_t rows,
                     size_t voxels);

typedef uint64_t Quads __attribute__((vector_size(16)));
typedef uint32_t Fours __attribute__((vector_size(16)));

#define LOW_FOURS(a, b) (Bytes) __builtin_shufflevector((Fours)(a), (Fours)(b), 0, 4, 1, 5)
#define HIGH_FOURS(a, b) (Bytes) __builtin_shufflevector((Fours)(a), (Fours)(b), 2, 6, 3, 7)
#define LOW_QUADS(a, b) (Bytes) __builtin_shufflevector((Quads)(a), (Quads)(b), 0, 2)
#define HIGH_QUADS(a, b) (Bytes) __builtin_shufflevector((Quads)(a), (Quads)(b), 1, 3)
#define LOW_TWOS(a, b) (Bytes) LOW_PAIRS(a, b)
#define HIGH_TWOS(a, b) (Bytes) HIGH_PAIRS(a, b)

/* A square of SIDE rows of 16 bytes is turned by riffling its rows log2(SIDE) times: rows k and k + SIDE / 2
 * become rows 2 k and 2 k + 1, their voxels taken in turns. Squares at the end overlap those before. */
#define UNROLLED _Pragma("GCC unroll 16")
#define TURN(ITEM, SIDE, LOW, HIGH)                                                                        \
    static void turn_square_##ITEM(uint8_t *out, ptrdiff_t out_step, const uint8_t *in, ptrdiff_t in_step) \
    {                                                                                                      \
        Bytes square[SIDE], riffled[SIDE];                                                                 \
        UNROLLED for (ptrdiff_t k = 0; k < SIDE; k++)                                                      \
            square[k] = bytes_at(in + k * in_step);                                                        \
        UNROLLED for (size_t turns = 1; turns < SIDE; turns *= 2) {                                        \
            UNROLLED for (size_t k = 0; k < SIDE / 2; k++) {                                               \
                riffled[2 * k] = LOW(square[k], square[k + SIDE / 2]);                                     \
                riffled[2 * k + 1] = HIGH(square[k], square[k + SIDE / 2]);                                \
            }                                                                                              \
            UNROLLED for (size_t k = 0; k < SIDE; k++)                                                     \
                square[k] = riffled[k];                                                                    \
        }                                                                                                  \
        UNROLLED for (ptrdiff_t k = 0; k < SIDE; k++)                                                      \
            put(out + k * out_step, square[k]);                                                            \
    }                                                                                                      \
    static void turn_##ITEM(uint8_t *out, ptrdiff_t out_step, const uint8_t *in, ptrdiff_t in_step,        \
                            size_t rows, size_t voxels)                                                    \
    {                                                                                                      \
        if (rows < SIDE || voxels < SIDE) {                                                                \
            for (size_t i = 0; i < voxels; i++)                                                            \
                for (size_t k = 0; k < rows; k++)                                                          \
                    memcpy(out + (ptrdiff_t)i * out_step + k * ITEM,                                       \
                           in + (ptrdiff_t)k * in_step + i * ITEM, ITEM);                                  \
            return;                                                                                        \
        }                                                                                                  \
        for (size_t i = 0; i < voxels; i += SIDE) {                                                        \
            i = i + SIDE <= voxels ? i : voxels - SIDE;                                                    \
            for (size_t k = 0; k < rows; k += SIDE) {                                                      \
                k = k + SIDE <= rows ? k : rows - SIDE;                                                    \
                turn_square_##ITEM(out + (ptrdiff_t)i * out_step + k * ITEM, out_step,                     \
                                   in + (ptrdiff_t)k * in_step + i * ITEM, in_step);                       \
            }                                                                                              \
        }                                                                                                  \
    }
TURN(1, 16, LOW_BYTES, HIGH_BYTES)
TURN(2, 8, LOW_TWOS, HIGH_TWOS)
TURN(4, 4, LOW_FOURS, HIGH_FOURS)
TURN(8, 2, LOW_QUADS, HIGH_QUADS)

/* ---- stored voxels -> values ---- */

#define SCALE(NAME, VOXEL, TARGET)                                                                          \
    TARGET static void NAME(uint8_t *restrict out, ptrdiff_t out_step, const uint8_t *restrict voxels,      \
                            ptrdiff_t step, size_t rows, size_t n, const Scaling *scaling)                  \
    {                                                                                                       \
        const float slope = (float)scaling->slope, inter = (float)scaling->inter;                           \
        const float low = (float)scaling->low, high = (float)scaling->high;                                 \
        for (size_t row = 0; row < rows; row++, out += out_step, voxels += step)                            \
            for (size_t i = 0; i < n; i++) {                                                                \
                VOXEL voxel;                                                                                \
                memcpy(&voxel, voxels + i * sizeof voxel, sizeof voxel);                                    \
                float value = (float)voxel * slope;                                                         \
                value += inter;                                                                             \
                value = value < low ? low : value;                                                          \
                value = value > high ? high : value;                                                        \
                memcpy(out + i * sizeof value, &value, sizeof value);                                       \
            }                                                                                               \
    }

/* The same loop twice: for any processor, and for those with wider registers. */
#if defined __x86_64__
#define HAS_WIDE __builtin_cpu_supports("avx2")
#define SCALE_BOTH(NAME, VOXEL)      \
    SCALE(scale_##NAME, VOXEL, )     \
    SCALE(scale_##NAME##_wide, VOXEL, __attribute__((target("avx2"))))
#else
#define HAS_WIDE 0
#define SCALE_BOTH(NAME, VOXEL)  \
    SCALE(scale_##NAME, VOXEL, ) \
    static const Scale scale_##NAME##_wide = scale_##NAME;
#endif
SCALE_BOTH(u1, uint8_t)
SCALE_BOTH(i1, int8_t)
SCALE_BOTH(u2, uint16_t)
SCALE_BOTH(i2, int16_t)

#endif
