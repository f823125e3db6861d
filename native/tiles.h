// Rows of a packed matrix times many vectors in integers, over the operations V of one instruction set; internal to the
// translation unit that includes it, like integer.h, whose formula and rounding these are. What differs is which way a
// register lies: there along a row, here across kTileRows rows, so that a group's scale costs one operation for all its
// columns. For that the codes of a panel are turned round once and serve all vectors. The sum runs in another order than
// there, so its last bits differ; it is the same for any number of vectors here.
#pragma once

#include "integer.h"

namespace greenroom {
namespace {

constexpr int kHalves = 2;  // registers of sums: kHalves * kWidth rows
constexpr int kQuad = 4;    // neighbouring columns that one element of a register multiplies
constexpr int kQuads = 4;   // in the smallest group

template <class V>
constexpr int kTileRows = kHalves * V::kWidth;

// Where the parts of a prepared vector lie. Two planes: hi and lo, each in the order of the columns; xs per panel; X per
// group. One: bytes; xs and X per group.
struct PreparedPlanes {
    std::int64_t columns, panels, scales, sums, nbytes;

    PreparedPlanes(const Matrix& matrix, int planes)
        : columns((matrix.groups * matrix.group_size + 63) / 64 * 64),
          panels((columns + kPanel - 1) / kPanel),
          scales(planes * columns),
          sums(scales + ((planes == 2 ? panels : matrix.groups) * 4 + 63) / 64 * 64),
          nbytes(sums + padded_groups(matrix) * 4) {}
};

// Rounded to 8 bits, with a scale for each group: at most max |x| / 254 an element, about 0.6 % of a group's norm.
template <int GROUP>
void prepare_bytes(const Matrix& matrix, const float* x, std::uint8_t* prepared) {
    const PreparedPlanes at(matrix, 1);
    float* scales = reinterpret_cast<float*>(prepared + at.scales);
    float* sums = reinterpret_cast<float*>(prepared + at.sums);
    for (std::int64_t column = matrix.cols; column < at.columns; ++column) prepared[column] = 0;
    for (std::int64_t g = 0; g < matrix.groups; ++g) {
        const std::int64_t start = g * GROUP, left = matrix.cols - start, count = left < 0 ? 0 : left < GROUP ? left : GROUP;
        std::int32_t rounded[GROUP], sum = 0;
        scales[g] = round_panel(count > 0 ? x + start : x, count, 127.0f, rounded);
        for (std::int64_t i = 0; i < count; ++i) {
            prepared[start + i] = static_cast<std::uint8_t>(rounded[i]);
            sum += rounded[i];
        }
        sums[g] = static_cast<float>(sum) * scales[g];
    }
}

template <int GROUP>
void prepare_planes(const Matrix& matrix, const float* x, std::uint8_t* prepared) {
    const PreparedPlanes at(matrix, 2);
    float* scales = reinterpret_cast<float*>(prepared + at.scales);
    float* sums = reinterpret_cast<float*>(prepared + at.sums);
    round_vector<GROUP>(matrix, x, at.panels, scales, sums, [&](std::int64_t start, const std::int32_t* rounded) {
        const std::int64_t count = at.columns - start < kPanel ? at.columns - start : kPanel;
        std::uint8_t *high = prepared + start, *low = prepared + at.columns + start;
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int32_t hi = (rounded[i] + 128) >> 8;
            high[i] = static_cast<std::uint8_t>(hi);
            low[i] = static_cast<std::uint8_t>(rounded[i] - 256 * hi);
        }
    });
}

// A panel of kTileRows rows, of which `rows` are there. codes: [columns / kQuad, kTileRows, kQuad]; scale and offset:
// [groups, kTileRows].
struct TurnedPanel {
    const std::uint8_t* codes;
    const float *scale, *offset;
    int rows, groups, group_quads;
    std::int64_t number, first_group;
};

// Adds the panel's products to T vectors' results, or begins them with the first panel.
template <class V, int PLANES, int T>
void add_panel(const TurnedPanel& panel, const PreparedPlanes& at, const std::uint8_t* const* x, float* const* y) {
    constexpr int W = V::kWidth, R = kTileRows<V>;
    typename V::F total[kHalves][T];
    for (int h = 0; h < kHalves; ++h)
        for (int n = 0; n < T; ++n) total[h][n] = V::zero();
    for (int g = 0; g < panel.groups; ++g) {
        typename V::I sum[kHalves][T];
        for (int h = 0; h < kHalves; ++h)
            for (int n = 0; n < T; ++n) sum[h][n] = V::none();
        const std::uint8_t* group = panel.codes + g * panel.group_quads * R * kQuad;
        std::int64_t column = panel.number * kPanel + g * panel.group_quads * kQuad;
        for (int plane = 0; plane < PLANES; ++plane, column += at.columns) {
            for (int quads = 0; quads < panel.group_quads; quads += kQuads) {
                typename V::I part[kHalves][T];  // of four quads: as far as 16 bits may hold a sum
                for (int h = 0; h < kHalves; ++h)
                    for (int n = 0; n < T; ++n) part[h][n] = V::begin_part(sum[h][n]);
                typename V::Quads its[T];
                for (int n = 0; n < T; ++n) its[n] = V::quads(x[n] + column + quads * kQuad);
#pragma GCC unroll 4
                for (int quad = 0; quad < kQuads; ++quad) {
                    const std::uint8_t* at_quad = group + (quads + quad) * R * kQuad;
                    typename V::I codes[kHalves];
                    for (int h = 0; h < kHalves; ++h) codes[h] = V::load_bytes(at_quad + h * W * kQuad);
                    for (int n = 0; n < T; ++n) {
                        const auto four = V::four(its[n], quad);
                        for (int h = 0; h < kHalves; ++h) part[h][n] = V::add_products(part[h][n], codes[h], four);
                    }
                }
                for (int h = 0; h < kHalves; ++h)
                    for (int n = 0; n < T; ++n) sum[h][n] = V::end_part(sum[h][n], part[h][n]);
            }
            if (PLANES == 2 && plane == 0)
                for (int h = 0; h < kHalves; ++h)
                    for (int n = 0; n < T; ++n) sum[h][n] = V::times256(sum[h][n]);
        }
        typename V::F scale[kHalves];
        for (int h = 0; h < kHalves; ++h) scale[h] = V::load(panel.scale + g * R + h * W);
        for (int n = 0; n < T; ++n) {
            const typename V::F xs = V::set1(PLANES == 1 ? reinterpret_cast<const float*>(x[n] + at.scales)[panel.first_group + g] : 1.0f);
            for (int h = 0; h < kHalves; ++h) {
                const typename V::F value = V::from_integers(sum[h][n]);
                total[h][n] = V::fma(PLANES == 1 ? V::mul(value, xs) : value, scale[h], total[h][n]);
            }
        }
    }
    for (int n = 0; n < T; ++n) {
        const typename V::F xs = V::set1(PLANES == 1 ? 1.0f : reinterpret_cast<const float*>(x[n] + at.scales)[panel.number]);
        for (int h = 0; h < kHalves; ++h) {
            const typename V::F before = panel.number == 0 ? V::zero() : V::load_some(y[n] + h * W, panel.rows - h * W);
            total[h][n] = V::fma(total[h][n], xs, before);
        }
    }
    for (int g = 0; g < panel.groups; ++g)
        for (int n = 0; n < T; ++n) {
            const typename V::F its = V::set1(reinterpret_cast<const float*>(x[n] + at.sums)[panel.first_group + g]);
            for (int h = 0; h < kHalves; ++h) total[h][n] = V::fma(V::load(panel.offset + g * R + h * W), its, total[h][n]);
        }
    for (int n = 0; n < T; ++n)
        for (int h = 0; h < kHalves; ++h) V::store_some(y[n] + h * W, panel.rows - h * W, total[h][n]);
}

// The same for `size` vectors, MOST of them at most.
template <class V, int PLANES, int MOST>
void add_panel_to(const TurnedPanel& panel, const PreparedPlanes& at, const std::uint8_t* const* x, int size, float* const* y) {
    if constexpr (MOST > 1)
        if (size < MOST) return add_panel_to<V, PLANES, MOST - 1>(panel, at, x, size, y);
    add_panel<V, PLANES, MOST>(panel, at, x, y);
}

// The same for any number of vectors, in tiles of nearly equal size.
template <class V, int PLANES>
void add_panel_to_all(const TurnedPanel& panel, const PreparedPlanes& at, const std::uint8_t* const* x, int count,
                      float* const* y) {
    constexpr int most = V::kTileVectors;
    for (int tiles = (count + most - 1) / most; tiles > 0; --tiles) {
        const int size = (count + tiles - 1) / tiles;
        add_panel_to<V, PLANES, most>(panel, at, x, size, y);
        x += size;
        y += size;
        count -= size;
    }
}

// Turns the codes of `rows` rows and a panel, from column `start` on, into `to`; rows that are not there become zeros.
// What comes next is fetched meanwhile: short pieces of many rows are nothing that the memory guesses by itself.
template <class V, int BITS>
void turn_codes(const Matrix& matrix, std::int64_t row, int rows, std::int64_t start, std::uint8_t* to) {
    using C = Chunk<V, BITS, 64>;
    constexpr int W = V::kWidth, R = kTileRows<V>;
    const std::int64_t next = start + kPanel < matrix.cols ? kPanel / 8 * BITS : R * matrix.code_row_bytes - start / 8 * BITS;
    for (std::int64_t column = 0; column < kPanel; column += C::columns) {
        const std::int64_t byte = (start + column) / 8 * BITS;
        if (byte >= matrix.code_row_bytes) return;
        for (int first = 0; first < R; first += W) {
            typename V::template Packed<BITS> packed[W];
            for (int r = 0; r < W; ++r) {
                const bool there = first + r < rows;
                const std::uint8_t* from = matrix.codes + (there ? row + first + r : row) * matrix.code_row_bytes + byte;
                for (int i = 0; i < C::nbytes; i += 64) __builtin_prefetch(from + next + i);
                packed[r].load(from, there ? matrix.code_row_bytes - byte : 0);
            }
            for (int v = 0; v < C::vectors; ++v) {
                typename V::I quads[W];
                for (int r = 0; r < W; ++r) quads[r] = packed[r].template codes<false>(v);
                V::transpose(quads);
                for (int q = 0; q < W; ++q) {  // quads in the order in which a chunk holds them
                    const int its = kQuad * q / C::lane * 64 + v * C::lane + kQuad * q % C::lane;
                    V::store_bytes(to + (column + its) * R + first * kQuad, quads[q]);
                }
            }
        }
    }
}

// The scales and offsets of `rows` rows, [groups, kTileRows] each. scratch: 2 * kWidth * padded_groups floats.
template <class V>
void turn_groups(const Matrix& matrix, std::int64_t row, int rows, float* scale, float* offset, float* scratch) {
    constexpr int W = V::kWidth, R = kTileRows<V>;
    const std::int64_t stride = padded_groups(matrix);
    for (int first = 0; first < R; first += W) {
        for (int r = 0; r < W; ++r)  // what is not there repeats what is; its codes are zeros, its result is not stored
            decode_groups<V>(matrix, row + (first + r < rows ? first + r : 0), nullptr, scratch + r * stride,
                             [&](std::int64_t group, typename V::F value) { V::store(scratch + (W + r) * stride + group, value); });
        for (std::int64_t group = 0; group < matrix.groups; group += W)
            for (int which = 0; which < 2; ++which) {
                typename V::I values[W];
                for (int r = 0; r < W; ++r) values[r] = V::load_bytes(scratch + (which * W + r) * stride + group);
                V::transpose(values);
                float* to = (which == 0 ? scale : offset) + group * R + first;
                for (int g = 0; g < W; ++g) V::store_bytes(to + g * R, values[g]);
            }
    }
}

template <class V, int BITS, int PLANES>
void tiled_rows(const Matrix& matrix, std::int64_t first, std::int64_t last, const std::uint8_t* const* x, int count,
                float* const* y, float* scratch) {
    constexpr int R = kTileRows<V>;
    const PreparedPlanes at(matrix, PLANES);
    const std::int64_t stride = padded_groups(matrix);
    float *scale = scratch, *offset = scale + R * stride, *rest = offset + R * stride;
    std::uint8_t* codes = reinterpret_cast<std::uint8_t*>(rest);  // once the groups are turned
    const int panel_groups = static_cast<int>(kPanel / matrix.group_size);
    for (; first < last; first += R) {
        const int rows = static_cast<int>(last - first < R ? last - first : R);
        float* to[V::most_vectors];
        for (int n = 0; n < count; ++n) to[n] = y[n] + first;
        turn_groups<V>(matrix, first, rows, scale, offset, rest);
        for (std::int64_t panel = 0; panel < at.panels; ++panel) {
            turn_codes<V, BITS>(matrix, first, rows, panel * kPanel, codes);
            const std::int64_t group = panel * panel_groups, left = matrix.groups - group;
            const TurnedPanel turned{codes, scale + group * R, offset + group * R, rows,
                                     static_cast<int>(left < panel_groups ? left : panel_groups),
                                     matrix.group_size / kQuad, panel, group};
            add_panel_to_all<V, PLANES>(turned, at, x, count, to);
        }
    }
}

template <class V, int BITS, int GROUP, int PLANES>
struct Tiled {
    static constexpr int rows_at_once = kTileRows<V>, most_vectors = V::most_vectors;
    static constexpr bool for_many = true;

    static std::int64_t prepared_nbytes(const Matrix& matrix) { return PreparedPlanes(matrix, PLANES).nbytes; }
    static std::int64_t scratch_floats(const Matrix& matrix) {
        const std::int64_t groups = 2 * V::kWidth * padded_groups(matrix), codes = kPanel * kTileRows<V> / 4;
        return 2 * kTileRows<V> * padded_groups(matrix) + (groups > codes ? groups : codes);
    }
    static void prepare(const Matrix& matrix, const float* x, std::uint8_t* to) {
        PLANES == 1 ? prepare_bytes<GROUP>(matrix, x, to) : prepare_planes<GROUP>(matrix, x, to);
    }
    static constexpr RowsFunction rows = tiled_rows<V, BITS, PLANES>;
};

template <class V, int BITS, int PLANES>
Kernel tiled_kernel(int group_size) {
    switch (group_size) {
        case 16: return kernel_of<Tiled<V, BITS, 16, PLANES>>();
        case 32: return kernel_of<Tiled<V, BITS, 32, PLANES>>();
        case 64: return kernel_of<Tiled<V, BITS, 64, PLANES>>();
        default: return kernel_of<Tiled<V, BITS, 128, PLANES>>();
    }
}

// The kernel for so many vectors of a matrix whose codes are multiplied in integers.
template <class V, int BITS>
Kernel kernel_for(int group_size, Batch batch) {
    switch (batch) {
        case Batch::few: return integer_kernel<V, BITS>(group_size);
        case Batch::many: return tiled_kernel<V, BITS, 2>(group_size);
        default: return tiled_kernel<V, BITS, 1>(group_size);
    }
}

}  // namespace
}  // namespace greenroom
