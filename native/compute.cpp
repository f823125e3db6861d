#include "compute.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

#include "pool.h"

namespace greenroom {
namespace {

constexpr std::int64_t kChunkNbytes = 32 << 10;    // of codes that a thread takes at a time
constexpr std::int64_t kWorthSharing = 128 << 10;  // products; below, waking a thread takes longer
constexpr std::int64_t kPiece = 512;               // activations that a thread takes at a time

std::int64_t align(std::int64_t count, std::int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

const Isa* best() { return available().front(); }

std::atomic<const Isa*>& chosen() {
    static std::atomic<const Isa*> isa{best()};
    return isa;
}

using Buffer = std::unique_ptr<float[]>;

Buffer floats(std::int64_t count) { return Buffer(new float[static_cast<std::size_t>(count)]); }

// Vectors as a RowsFunction wants them: zero past their columns. Uses the caller's own where nothing is to be padded.
class Vectors {
public:
    Vectors(std::int64_t cols) : cols_(cols), stride_(align(cols, kBlock)) {}

    std::int64_t stride() const { return stride_; }
    bool padded() const { return stride_ != cols_; }
    void pad(const float* from, float* to) const {
        std::memcpy(to, from, static_cast<std::size_t>(cols_) * sizeof(float));
        clear_tail(to);
    }
    void clear_tail(float* vector) const { std::fill(vector + cols_, vector + stride_, 0.0f); }

private:
    std::int64_t cols_, stride_;
};

// One matrix and the vectors it multiplies.
struct Product {
    Matrix matrix;
    int count;
    const float* x[kMaxVectors];
    float* y[kMaxVectors];
};

void multiply(const std::vector<Product>& products, int threads) {
    if (products.empty()) return;
    const Matrix& shape = products[0].matrix;  // all are of one shape
    const RowsFunction rows = active().rows;
    const std::int64_t chunk = std::clamp<std::int64_t>(kChunkNbytes / std::max<std::int64_t>(1, shape.code_row_bytes), 1,
                                                        shape.rows);
    const std::int64_t chunks = (shape.rows + chunk - 1) / chunk;
    std::int64_t vectors = 0;
    for (const Product& product : products) vectors += product.count;
    if (vectors * shape.rows * shape.cols < kWorthSharing) threads = 1;

    const std::int64_t need = scratch_floats(shape);
    const auto body = [&](std::int64_t item) {
        constexpr std::int64_t kOnStack = 4096;
        alignas(64) float stack[kOnStack];
        Buffer heap;
        if (need > kOnStack) heap = floats(need);
        const Product& product = products[static_cast<std::size_t>(item / chunks)];
        const std::int64_t first = item % chunks * chunk;
        rows(product.matrix, first, std::min(first + chunk, shape.rows), product.x, product.count, product.y,
             heap ? heap.get() : stack);
    };
    parallel_for(chunks * static_cast<std::int64_t>(products.size()), threads, body);
}

float silu(float x) { return x / (1.0f + std::exp(-x)); }

// hidden [vectors, rows] → inner [vectors, stride]
void activate(const float* hidden, float* inner, std::int64_t vectors, std::int64_t rows, const ExpertLayout& layout,
              int threads) {
    const std::int64_t width = layout.second.cols, stride = align(width, kBlock), pieces = (width + kPiece - 1) / kPiece;
    const auto body = [&](std::int64_t item) {
        const std::int64_t vector = item / pieces, start = item % pieces * kPiece, end = std::min(start + kPiece, width);
        const float *gate = hidden + vector * rows, *up = gate + width;
        float* to = inner + vector * stride;
        for (std::int64_t i = start; i < end; ++i) to[i] = layout.gated ? silu(gate[i]) * up[i] : silu(gate[i]);
        if (end == width) std::fill(to + width, to + stride, 0.0f);
    };
    parallel_for(vectors * pieces, vectors * width < kPiece ? 1 : threads, body);
}

}  // namespace

std::int64_t Shape::nbytes() const {
    if (bits == 16) return align(2 * rows * cols, 64);
    const std::int64_t padded = align(cols, std::max<std::int64_t>(kBlock, group_size));
    return align(rows * (padded * bits / 8), 64) + 2 * align(rows * (padded / group_size), 64) + align(rows * 8, 64);
}

Matrix Shape::at(const std::uint8_t* packed) const {
    Matrix matrix{packed, nullptr, nullptr, nullptr, rows, cols, 0, 2 * cols, bits, group_size, is_float16};
    if (bits == 16) return matrix;
    const std::int64_t padded = align(cols, std::max<std::int64_t>(kBlock, group_size));
    matrix.groups = padded / group_size;
    matrix.code_row_bytes = padded * bits / 8;
    matrix.scale_codes = packed + align(rows * matrix.code_row_bytes, 64);
    matrix.zero_codes = matrix.scale_codes + align(rows * matrix.groups, 64);
    matrix.row_params = matrix.zero_codes + align(rows * matrix.groups, 64);
    return matrix;
}

std::vector<const Isa*> available() {
    std::vector<const Isa*> found;
#ifdef GREENROOM_X86
    if (kAvx512.supported()) found.push_back(&kAvx512);
    if (kAvx2.supported()) found.push_back(&kAvx2);
#endif
    found.push_back(&kPortable);
    return found;
}

const Isa& active() { return *chosen().load(std::memory_order_relaxed); }

bool choose(const char* name) {
    for (const Isa* isa : available())
        if (std::strcmp(isa->name, name) == 0) {
            chosen().store(isa, std::memory_order_relaxed);
            return true;
        }
    return false;
}

void linear(const float* x, int count, const std::uint8_t* packed, const Shape& shape, const float* bias, float* out,
            int threads) {
    const Vectors vectors(shape.cols);
    Buffer buffer;
    if (vectors.padded()) buffer = floats(count * vectors.stride());
    std::vector<Product> products(1);
    products[0].matrix = shape.at(packed);
    products[0].count = count;
    for (int v = 0; v < count; ++v) {
        products[0].x[v] = x + v * shape.cols;
        if (vectors.padded()) {
            vectors.pad(products[0].x[v], buffer.get() + v * vectors.stride());
            products[0].x[v] = buffer.get() + v * vectors.stride();
        }
        products[0].y[v] = out + v * shape.rows;
    }
    multiply(products, threads);
    if (bias != nullptr)
        for (int v = 0; v < count; ++v)
            for (std::int64_t row = 0; row < shape.rows; ++row) out[v * shape.rows + row] += bias[row];
}

void linears(const float* x, int count, const Linear* list, int n, int threads) {
    for (int i = 0; i < n; ++i) linear(x, count, list[i].packed, list[i].shape, list[i].bias, list[i].out, threads);
}

void experts(const float* x, const std::vector<Task>& tasks, const ExpertLayout& layout, int threads) {
    const Vectors outer(layout.first.cols), inner(layout.second.cols);
    std::int64_t total = 0;
    for (const Task& task : tasks) total += task.count;
    Buffer padded, hidden = floats(total * layout.first.rows), gated = floats(total * inner.stride());
    if (outer.padded()) padded = floats(total * outer.stride());

    std::vector<Product> firsts(tasks.size()), seconds(tasks.size());
    std::int64_t vector = 0;
    for (std::size_t t = 0; t < tasks.size(); ++t) {
        const Task& task = tasks[t];
        Product &first = firsts[t], &second = seconds[t];
        first.matrix = layout.first.at(task.record + layout.first_offset);
        second.matrix = layout.second.at(task.record + layout.second_offset);
        first.count = second.count = task.count;
        for (int v = 0; v < task.count; ++v, ++vector) {
            first.x[v] = x + task.rows[v] * layout.first.cols;
            if (outer.padded()) {
                outer.pad(first.x[v], padded.get() + vector * outer.stride());
                first.x[v] = padded.get() + vector * outer.stride();
            }
            first.y[v] = hidden.get() + vector * layout.first.rows;
            second.x[v] = gated.get() + vector * inner.stride();
            second.y[v] = task.out + v * layout.second.rows;
        }
    }
    multiply(firsts, threads);
    activate(hidden.get(), gated.get(), total, layout.first.rows, layout, threads);
    multiply(seconds, threads);
}

}  // namespace greenroom
