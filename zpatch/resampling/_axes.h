/* Weighted sums of voxels, axis by axis: planes, then lines, then voxels of a line. */

#ifndef ZPATCH_AXES_H
#define ZPATCH_AXES_H

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define AXES 3
#define ITEM_TYPES(DO)                                                                                      \
    DO(u1, uint8_t, float) DO(i1, int8_t, float) DO(u2, uint16_t, float) DO(i2, int16_t, float)             \
    DO(f4, float, float) DO(u4, uint32_t, double) DO(i4, int32_t, double) DO(u8, uint64_t, double)          \
    DO(i8, int64_t, double) DO(f8, double, double)

/* Twice as fast with the vectors of AVX2. Products and sums are not contracted, so all give the same bits. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) &&                \
    !defined(__SANITIZE_ADDRESS__)
#define CLONED __attribute__((target_clones("avx2", "default")))
#else
#define CLONED
#endif

typedef struct {
    const int64_t *first;
    const double *weights;
    Py_ssize_t count, taps;
} Axis;

typedef struct {
    double slope, inter, low, high;
} Scaling;

typedef struct {
    const char *data;
    Py_ssize_t channels, shape[AXES];
} Source;

typedef struct {
    char *data;
    Py_ssize_t stride[1 + AXES];
} Target;

typedef void (*Plane)(const char *, double, const char *, double, void *, Py_ssize_t, int);

/* sums = or += of_a * a + of_b * b, over a plane or a line */
#define DEFINE_PLANE(name, type, real)                                                                      \
    CLONED static void plane_##name(const char *a_, double of_a_, const char *b_, double of_b_, void *sums_, \
                                    Py_ssize_t count, int adds)                                             \
    {                                                                                                       \
        const type *restrict a = (const type *)a_, *restrict b = (const type *)b_;                          \
        real *restrict sums = sums_, of_a = (real)of_a_, of_b = (real)of_b_;                                \
        if (adds)                                                                                           \
            for (Py_ssize_t n = 0; n < count; n++)                                                          \
                sums[n] += of_a * (real)a[n] + of_b * (real)b[n];                                           \
        else                                                                                                \
            for (Py_ssize_t n = 0; n < count; n++)                                                          \
                sums[n] = of_a * (real)a[n] + of_b * (real)b[n];                                            \
    }
ITEM_TYPES(DEFINE_PLANE)

/* One voxel of an axis: the weighted sum of its taps, which are `stride` bytes apart; two of them at a time. */
static void add_taps(Plane plane, const Axis *axis, Py_ssize_t n, const char *source, Py_ssize_t stride,
                     void *sums, Py_ssize_t count)
{
    const double *weights = axis->weights + n * axis->taps;
    source += axis->first[n] * stride;
    for (Py_ssize_t t = 0; t < axis->taps; t += 2) {
        int has_both = t + 1 < axis->taps;
        const char *a = source + t * stride, *b = has_both ? a + stride : a;
        double of_b = has_both ? weights[t + 1] : 0;
        if (t && !weights[t] && !of_b)
            continue;
        plane(a, weights[t], of_b ? b : a, of_b, sums, count, t > 0);
    }
}

/* Voxels of a line from two neighbours each; `weights` has those of the first ones, then of the second ones. */
#define PAIRS(real, start)                                                                                  \
    for (Py_ssize_t n = start; n < count; n++)                                                              \
        to[n] = weights[n] * from[first[n]] + weights[count + n] * from[first[n] + 1];

CLONED static void pairs_f8(const double *restrict from, const int64_t *restrict first,
                            const double *restrict weights, double *restrict to, Py_ssize_t count)
{
    PAIRS(double, 0)
}

static void pairs_f4(const float *restrict from, const int64_t *restrict first, const float *restrict weights,
                     float *restrict to, Py_ssize_t count)
{
    Py_ssize_t done = 0;
#ifdef __SSE2__ /* both neighbours in one load: several times as fast as to gather them */
    for (; done + 4 <= count; done += 4) {
        const int64_t *at = first + done;
        __m128 p = _mm_loadl_pi(_mm_setzero_ps(), (const __m64 *)(from + at[0]));
        __m128 q = _mm_loadl_pi(_mm_setzero_ps(), (const __m64 *)(from + at[2]));
        p = _mm_loadh_pi(p, (const __m64 *)(from + at[1]));
        q = _mm_loadh_pi(q, (const __m64 *)(from + at[3]));
        __m128 a = _mm_mul_ps(_mm_loadu_ps(weights + done), _mm_shuffle_ps(p, q, _MM_SHUFFLE(2, 0, 2, 0)));
        __m128 b = _mm_mul_ps(_mm_loadu_ps(weights + count + done),
                              _mm_shuffle_ps(p, q, _MM_SHUFFLE(3, 1, 3, 1)));
        _mm_storeu_ps(to + done, _mm_add_ps(a, b));
    }
#endif
    PAIRS(float, done)
}

#define DEFINE_LINE(name, real)                                                                             \
    CLONED static void line_##name(const real *restrict from, const int64_t *restrict first,                \
                                   const real *restrict weights, Py_ssize_t taps, real *restrict to,        \
                                   Py_ssize_t count)                                                        \
    {                                                                                                       \
        if (taps == 1)                                                                                      \
            for (Py_ssize_t n = 0; n < count; n++)                                                          \
                to[n] = weights[n] * from[first[n]];                                                        \
        else                                                                                                \
            pairs_##name(from, first, weights, to, count);                                                  \
        for (Py_ssize_t t = 2; t < taps; t++)                                                               \
            for (Py_ssize_t n = 0; n < count; n++)                                                          \
                to[n] += weights[t * count + n] * from[first[n] + t];                                       \
    }                                                                                                       \
    CLONED static void scale_##name(real *line, Py_ssize_t count, const Scaling *scaling)                   \
    {                                                                                                       \
        real slope = (real)scaling->slope, inter = (real)scaling->inter;                                    \
        real low = (real)scaling->low, high = (real)scaling->high;                                          \
        if (slope != 1 || inter != 0)                                                                       \
            for (Py_ssize_t n = 0; n < count; n++)                                                          \
                line[n] = slope * line[n] + inter;                                                          \
        if (low > -INFINITY || high < INFINITY)                                                             \
            for (Py_ssize_t n = 0; n < count; n++)                                                          \
                line[n] = line[n] < low ? low : line[n] > high ? high : line[n];                            \
    }                                                                                                       \
    static void put_##name(char *to, Py_ssize_t stride, real *line, Py_ssize_t count, const Scaling *scaling) \
    {                                                                                                       \
        scale_##name(line, count, scaling);                                                                 \
        if ((void *)line != (void *)to)                                                                     \
            for (Py_ssize_t n = 0; n < count; n++)                                                          \
                *(real *)(to + n * stride) = line[n];                                                       \
    }                                                                                                       \
    static int lines_##name(const Source *source, Py_ssize_t item, Plane first_plane, const Target *target, \
                            const Axis *axes, const Scaling *scaling)                                       \
    {                                                                                                       \
        Py_ssize_t height = source->shape[1], width = source->shape[2], count = axes[2].count;              \
        Py_ssize_t plane_bytes = height * width * item, taps = axes[2].taps;                                \
        real *memory = malloc(sizeof(real) * (size_t)(height * width + width + count * (taps + 1)));        \
        if (!memory)                                                                                        \
            return 0;                                                                                       \
        real *plane = memory, *row = plane + height * width, *line = row + width, *weights = line + count;  \
        for (Py_ssize_t n = 0; n < count; n++)                                                              \
            for (Py_ssize_t t = 0; t < taps; t++)                                                           \
                weights[t * count + n] = (real)axes[2].weights[n * taps + t];                               \
        for (Py_ssize_t c = 0; c < source->channels; c++)                                                   \
            for (Py_ssize_t z = 0; z < axes[0].count; z++) {                                                \
                const char *from = source->data + c * source->shape[0] * plane_bytes;                       \
                add_taps(first_plane, &axes[0], z, from, plane_bytes, plane, height * width);               \
                for (Py_ssize_t y = 0; y < axes[1].count; y++) {                                            \
                    char *to = target->data + c * target->stride[0] + z * target->stride[1] +               \
                               y * target->stride[2];                                                       \
                    int is_dense = target->stride[3] == sizeof(real) && !((uintptr_t)to % sizeof(real));    \
                    real *values = is_dense ? (real *)to : line;                                            \
                    add_taps(plane_##name, &axes[1], y, (char *)plane, width * (Py_ssize_t)sizeof(real),    \
                             row, width);                                                                   \
                    line_##name(row, axes[2].first, weights, taps, values, count);                          \
                    put_##name(to, target->stride[3], values, count, scaling);                              \
                }                                                                                           \
            }                                                                                               \
        free(memory);                                                                                       \
        return 1;                                                                                           \
    }
DEFINE_LINE(f4, float)
DEFINE_LINE(f8, double)

#endif
