/* Voxels at the coordinates of points, and copies of single voxels. */

#ifndef ZPATCH_POINTS_H
#define ZPATCH_POINTS_H

#include "_axes.h"

/* Point by point: the coordinates of target voxel (z, y, x) are matrix @ (z, y, x, 1). */

typedef struct {
    double at[AXES][AXES + 1], low[AXES], high[AXES];
} Map;

static double limited(double value, double low, double high)
{
    return value < low ? low : value > high ? high : value;
}

static void coordinates_of(const Map *map, Py_ssize_t z, Py_ssize_t y, Py_ssize_t x, double *found)
{
    for (int a = 0; a < AXES; a++) {
        const double *row = map->at[a];
        double value = row[0] * (double)z + row[1] * (double)y + row[2] * (double)x + row[3];
        found[a] = limited(value, map->low[a], map->high[a]);
    }
}

static Py_ssize_t inside(double index, Py_ssize_t count)
{
    if (!(index > 0)) /* nor is NaN */
        return 0;
    return index < (double)count ? (Py_ssize_t)index : count - 1;
}

/* The taps of a coordinate: offsets of `count` voxels along an axis, and their weights. */
static void linear_taps(double at, Py_ssize_t shape, Py_ssize_t stride, Py_ssize_t *offsets, double *weights)
{
    double base = floor(at);
    weights[1] = at - base;
    weights[0] = 1 - weights[1];
    for (int t = 0; t < 2; t++)
        offsets[t] = inside(base + t, shape) * stride;
}

static void cubic_taps(double at, Py_ssize_t shape, Py_ssize_t stride, Py_ssize_t *offsets, double *weights)
{
    double base = floor(at), f = at - base, g = 1 - f;
    weights[0] = g * g * g / 6;
    weights[1] = (4 - 6 * f * f + 3 * f * f * f) / 6;
    weights[2] = (4 - 6 * g * g + 3 * g * g * g) / 6;
    weights[3] = f * f * f / 6;
    for (int t = 0; t < 4; t++)
        offsets[t] = inside(base - 1 + t, shape) * stride;
}

#define DEFINE_POINT(name, real)                                                                            \
    static double point_##name(const real *voxels, const Source *source, const double *at, int is_cubic)    \
    {                                                                                                       \
        Py_ssize_t offsets[AXES][4], stride[AXES] = {source->shape[1] * source->shape[2],                   \
                                                     source->shape[2], 1};                                  \
        double weights[AXES][4], sum = 0;                                                                   \
        int taps = is_cubic ? 4 : 2;                                                                        \
        for (int a = 0; a < AXES; a++)                                                                      \
            (is_cubic ? cubic_taps : linear_taps)(at[a], source->shape[a], stride[a], offsets[a],           \
                                                  weights[a]);                                              \
        for (int z = 0; z < taps; z++)                                                                      \
            for (int y = 0; y < taps; y++) {                                                                \
                const real *line = voxels + offsets[0][z] + offsets[1][y];                                  \
                double of_line = 0;                                                                         \
                for (int x = 0; x < taps; x++)                                                              \
                    of_line += weights[2][x] * (double)line[offsets[2][x]];                                 \
                sum += weights[0][z] * weights[1][y] * of_line;                                             \
            }                                                                                               \
        return sum;                                                                                         \
    }                                                                                                       \
    static void points_##name(const Source *source, const Target *target, const Py_ssize_t *shape,          \
                              const Map *map, int is_cubic, const Scaling *scaling)                         \
    {                                                                                                       \
        Py_ssize_t volume = source->shape[0] * source->shape[1] * source->shape[2];                         \
        double at[AXES];                                                                                    \
        for (Py_ssize_t z = 0; z < shape[0]; z++)                                                           \
            for (Py_ssize_t y = 0; y < shape[1]; y++)                                                       \
                for (Py_ssize_t x = 0; x < shape[2]; x++) {                                                 \
                    coordinates_of(map, z, y, x, at);                                                       \
                    for (Py_ssize_t c = 0; c < source->channels; c++) {                                     \
                        const real *voxels = (const real *)source->data + c * volume;                       \
                        double value = point_##name(voxels, source, at, is_cubic);                          \
                        value = limited(scaling->slope * value + scaling->inter, scaling->low, scaling->high); \
                        *(real *)(target->data + c * target->stride[0] + z * target->stride[1] +            \
                                  y * target->stride[2] + x * target->stride[3]) = (real)value;             \
                    }                                                                                       \
                }                                                                                           \
    }
DEFINE_POINT(f4, float)
DEFINE_POINT(f8, double)

/* The label with the largest sum of linear weights, the lowest of equal ones. */
#define DEFINE_MAJORITY(name, type, real)                                                                   \
    static type label_##name(const type *voxels, const Source *source, const double *at, double tie)        \
    {                                                                                                       \
        Py_ssize_t offsets[AXES][2], stride[AXES] = {source->shape[1] * source->shape[2],                   \
                                                     source->shape[2], 1};                                  \
        double weights[AXES][2], sums[8];                                                                   \
        type labels[8];                                                                                     \
        int found = 0;                                                                                      \
        for (int a = 0; a < AXES; a++)                                                                      \
            linear_taps(at[a], source->shape[a], stride[a], offsets[a], weights[a]);                        \
        for (int n = 0; n < 8; n++) {                                                                       \
            int z = n >> 2, y = n >> 1 & 1, x = n & 1, m = 0;                                               \
            type label = voxels[offsets[0][z] + offsets[1][y] + offsets[2][x]];                             \
            while (m < found && labels[m] != label)                                                         \
                m++;                                                                                        \
            if (m == found) {                                                                               \
                labels[found] = label;                                                                      \
                sums[found++] = 0;                                                                          \
            }                                                                                               \
            sums[m] += weights[0][z] * weights[1][y] * weights[2][x];                                       \
        }                                                                                                   \
        int best = 0;                                                                                       \
        for (int m = 1; m < found; m++)                                                                     \
            if (sums[m] > sums[best] + tie || (sums[m] >= sums[best] - tie && labels[m] < labels[best]))    \
                best = m;                                                                                   \
        return labels[best];                                                                                \
    }                                                                                                       \
    static void majority_##name(const Source *source, const Target *target, const Py_ssize_t *shape,        \
                                const Map *map, double tie)                                                 \
    {                                                                                                       \
        Py_ssize_t volume = source->shape[0] * source->shape[1] * source->shape[2];                         \
        double at[AXES];                                                                                    \
        for (Py_ssize_t z = 0; z < shape[0]; z++)                                                           \
            for (Py_ssize_t y = 0; y < shape[1]; y++)                                                       \
                for (Py_ssize_t x = 0; x < shape[2]; x++) {                                                 \
                    coordinates_of(map, z, y, x, at);                                                       \
                    for (Py_ssize_t c = 0; c < source->channels; c++) {                                     \
                        const type *voxels = (const type *)source->data + c * volume;                       \
                        type label = label_##name(voxels, source, at, tie);                                 \
                        memcpy(target->data + c * target->stride[0] + z * target->stride[1] +               \
                                   y * target->stride[2] + x * target->stride[3],                           \
                               &label, sizeof label);                                                       \
                    }                                                                                       \
                }                                                                                           \
    }
ITEM_TYPES(DEFINE_MAJORITY)

/* Copies of single voxels of any size. */

static void copy_voxel(char *to, const char *from, Py_ssize_t item)
{
    switch (item) {
    case 1:
        *to = *from;
        break;
    case 2:
        memcpy(to, from, 2);
        break;
    case 4:
        memcpy(to, from, 4);
        break;
    default:
        memcpy(to, from, (size_t)item);
    }
}

static void pick_voxels(const Source *source, Py_ssize_t item, const Target *target, const int64_t *const *at,
                        const Py_ssize_t *shape)
{
    const Py_ssize_t *extent = source->shape;
    for (Py_ssize_t c = 0; c < source->channels; c++)
        for (Py_ssize_t z = 0; z < shape[0]; z++)
            for (Py_ssize_t y = 0; y < shape[1]; y++) {
                const char *from =
                    source->data +
                    ((c * extent[0] + (Py_ssize_t)at[0][z]) * extent[1] + (Py_ssize_t)at[1][y]) * extent[2] * item;
                char *to = target->data + c * target->stride[0] + z * target->stride[1] + y * target->stride[2];
                for (Py_ssize_t x = 0; x < shape[2]; x++)
                    copy_voxel(to + x * target->stride[3], from + at[2][x] * item, item);
            }
}

static void nearest_voxels(const Source *source, Py_ssize_t item, const Target *target, const Py_ssize_t *shape,
                           const Map *map)
{
    const Py_ssize_t *extent = source->shape;
    double at[AXES];
    for (Py_ssize_t z = 0; z < shape[0]; z++)
        for (Py_ssize_t y = 0; y < shape[1]; y++)
            for (Py_ssize_t x = 0; x < shape[2]; x++) {
                coordinates_of(map, z, y, x, at);
                Py_ssize_t offset = 0;
                for (int a = 0; a < AXES; a++)
                    offset = offset * extent[a] + inside(floor(at[a] + 0.5), extent[a]);
                for (Py_ssize_t c = 0; c < source->channels; c++)
                    copy_voxel(target->data + c * target->stride[0] + z * target->stride[1] +
                                   y * target->stride[2] + x * target->stride[3],
                               source->data + (c * extent[0] * extent[1] * extent[2] + offset) * item, item);
            }
}

#endif
