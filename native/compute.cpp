#include "compute.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "halves.h"
#include "pool.h"

namespace greenroom {
namespace {

constexpr std::int64_t kLeastSpan = 32 << 10, kMostSpan = 256 << 10;  // bytes of codes that a thread takes at a time
constexpr std::int64_t kSpans = 8;                 // for each thread, that they end together
constexpr std::int64_t kColdCodes = 8 << 10, kColdGroups = 1 << 10;   // bytes of a matrix that are fetched before its turn
constexpr std::int64_t kWorthSharing = 128 << 10;  // products; below, waking a thread takes longer
constexpr std::int64_t kWorthPreparing = 32 << 10; // elements, likewise
constexpr std::int64_t kBatch = 128;               // vectors of experts whose inner results are held at a time

std::int64_t align(std::int64_t count, std::int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

std::atomic<const Isa*>& chosen() {
    static std::atomic<const Isa*> isa{available().front()};
    return isa;
}

// Adds the time until it goes to a sum of nanoseconds.
class Spent {
public:
    explicit Spent(std::atomic<std::int64_t>& sum) : sum_(sum), start_(Clock::now()) {}
    ~Spent() {
        sum_.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start_).count(),
                       std::memory_order_relaxed);
    }
    Spent(const Spent&) = delete;
    Spent& operator=(const Spent&) = delete;

private:
    using Clock = std::chrono::steady_clock;
    std::atomic<std::int64_t>& sum_;
    Clock::time_point start_;
};

std::atomic<std::int64_t> linears_ns{0}, experts_ns{0};

double seconds(const std::atomic<std::int64_t>& ns) { return 1e-9 * static_cast<double>(ns.load(std::memory_order_relaxed)); }

// Uninitialised memory, aligned for any vector.
template <class T>
class Buffer {
public:
    explicit Buffer(std::int64_t count)
        : memory_(static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), kAlignment))) {}
    T* get() const { return memory_.get(); }

private:
    static constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(T* memory) const { ::operator delete(memory, kAlignment); }
    };
    std::unique_ptr<T, Free> memory_;
};

// A matrix, as many prepared vectors as its kernel takes, and where the results go.
struct Product {
    Matrix matrix;
    Kernel kernel;
    int count;
    const std::uint8_t* const* x;  // [count]
    float* const* y;               // [count], each [rows]
    const float* bias;          // either of these, or none
    const std::uint8_t* halves;
    bool is_float16;

    void add_bias(std::int64_t first, std::int64_t last) const {
        for (std::int64_t row = first; row < last && (bias || halves); ++row) {
            const float value = bias ? bias[row] : is_float16 ? float16_at(halves + 2 * row) : bfloat16_at(halves + 2 * row);
            for (int v = 0; v < count; ++v) y[v][row] += value;
        }
    }
};

void multiply(const Product& product, std::int64_t first, std::int64_t last) {
    constexpr std::int64_t kOnStack = 16384;
    alignas(64) float stack[kOnStack];
    const std::int64_t need = product.kernel.scratch_floats(product.matrix);
    if (need <= kOnStack) {
        product.kernel.rows(product.matrix, first, last, product.x, product.count, product.y, stack);
    } else {
        const Buffer<float> heap(need);
        product.kernel.rows(product.matrix, first, last, product.x, product.count, product.y, heap.get());
    }
    product.add_bias(first, last);
}

// Fetches the beginning of each of a matrix's parts: kernels fetch ahead within a matrix, not beyond it.
void fetch_beginning(const Matrix& matrix, std::int64_t parts) {
    const auto fetch = [](const std::uint8_t* from, std::int64_t nbytes) {
        for (std::int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(from + i);
    };
    for (std::int64_t part = 0; part < parts; ++part) {
        const std::int64_t row = matrix.rows / parts * part;
        fetch(matrix.codes + row * matrix.code_row_bytes, kColdCodes);
        if (matrix.bits == 16) continue;
        fetch(matrix.scale_codes + row * matrix.groups, kColdGroups);
        fetch(matrix.zero_codes + row * matrix.groups, kColdGroups);
        fetch(matrix.row_params + row * 8, kColdGroups / 8);
    }
}

// Cuts the products into spans of rows, of which a thread takes one at a time: body(product, first, last). Where a
// product's rows come in `parts` equal parts, last counts within one. A span has a price: its first rows' codes and
// scales come late.
template <class Body>
void share(const std::vector<Product>& products, std::int64_t parts, int threads, const Body& body) {
    struct Span {
        const Product* product;
        std::int64_t first, last;
    };
    std::vector<Span> spans;
    std::int64_t work = 0, total = 0;
    for (const Product& product : products) {
        work += product.count * product.matrix.rows * product.matrix.cols;
        total += product.matrix.rows * product.matrix.code_row_bytes;
    }
    const std::int64_t nbytes = std::clamp(total / (kSpans * std::max(1, threads)), kLeastSpan, kMostSpan);
    for (const Product& product : products) {
        const Matrix& matrix = product.matrix;
        const std::int64_t rows = matrix.rows / parts, row_nbytes = std::max<std::int64_t>(1, matrix.code_row_bytes * parts);
        const std::int64_t step = align(std::max<std::int64_t>(1, nbytes / row_nbytes), product.kernel.rows_at_once);
        for (std::int64_t row = 0; row < rows; row += step) spans.push_back({&product, row, std::min(row + step, rows)});
    }
    parallel_for(static_cast<std::int64_t>(spans.size()), work < kWorthSharing ? 1 : threads, [&](std::int64_t item) {
        const Span& span = spans[static_cast<std::size_t>(item)];
        const Product* next = static_cast<std::size_t>(item) + 1 < spans.size() ? (&span)[1].product : nullptr;
        if (next != nullptr && next != span.product) fetch_beginning(next->matrix, parts);
        body(*span.product, span.first, span.last);
    });
}

// Vectors as a kernel wants to read them.
class PreparedVectors {
public:
    PreparedVectors(const Matrix& matrix, std::int64_t count, Batch batch)
        : matrix_(matrix), kernel_(active().kernel(matrix, batch)), stride_(kernel_.prepared_nbytes(matrix)), bytes_(count * stride_) {}

    const Kernel& kernel() const { return kernel_; }
    const std::uint8_t* operator[](std::int64_t number) const { return bytes_.get() + number * stride_; }
    std::vector<const std::uint8_t*> pointers(std::int64_t count) const {
        std::vector<const std::uint8_t*> found(static_cast<std::size_t>(count));
        for (std::int64_t v = 0; v < count; ++v) found[static_cast<std::size_t>(v)] = (*this)[v];
        return found;
    }

    // Vector i is at source(i).
    template <class Source>
    void fill(std::int64_t count, int threads, const Source& source) {
        parallel_for(count, count * matrix_.cols < kWorthPreparing ? 1 : threads, [&](std::int64_t number) {
            kernel_.prepare(matrix_, source(number), bytes_.get() + number * stride_);
        });
    }

private:
    const Matrix matrix_;
    const Kernel kernel_;
    const std::int64_t stride_;
    const Buffer<std::uint8_t> bytes_;
};

// Adds a linear to products, over the vectors prepared for its format: x and y [count].
void add_products(std::vector<Product>& products, const Linear& linear, const Kernel& kernel,
                  const std::uint8_t* const* x, float* const* y, int count) {
    const Matrix matrix = linear.shape.at(linear.packed);
    for (int start = 0; start < count; start += kernel.most_vectors)
        products.push_back({matrix, kernel, std::min(count - start, kernel.most_vectors), x + start, y + start, linear.bias, nullptr, false});
}

Batch batch_of(int count, bool rough) { return count < kMany ? Batch::few : rough ? Batch::rough : Batch::many; }

bool same_format(const Shape& a, const Shape& b) { return a.bits == b.bits && a.group_size == b.group_size; }

// As many of a task's rows as a product takes.
struct Part {
    const Task* task;
    int start, count;
};

std::vector<Part> parts_of(const std::vector<Task>& tasks, int most) {
    std::vector<Part> parts;
    for (const Task& task : tasks)
        for (int start = 0; start < task.count; start += most)
            parts.push_back({&task, start, std::min(task.count - start, most)});
    return parts;
}

// The rows of x that tasks ask for, each once.
class Rows {
public:
    explicit Rows(const std::vector<Task>& tasks) {
        std::int64_t most = 0;
        for (const Task& task : tasks)
            for (int v = 0; v < task.count; ++v) most = std::max(most, task.rows[v] + 1);
        place_.assign(static_cast<std::size_t>(most), -1);
        for (const Task& task : tasks)
            for (int v = 0; v < task.count; ++v) {
                std::int64_t& place = place_[static_cast<std::size_t>(task.rows[v])];
                if (place >= 0) continue;
                place = static_cast<std::int64_t>(rows_.size());
                rows_.push_back(task.rows[v]);
            }
    }
    std::int64_t count() const { return static_cast<std::int64_t>(rows_.size()); }
    std::int64_t operator[](std::int64_t place) const { return rows_[static_cast<std::size_t>(place)]; }
    std::int64_t place(std::int64_t row) const { return place_[static_cast<std::size_t>(row)]; }

private:
    std::vector<std::int64_t> rows_, place_;
};

// The first products of some parts, and their gates: hidden [vectors, first.rows] → inner [vectors, second.cols].
void first_half(const std::vector<Product>& products, const ExpertLayout& layout, float* inner, int threads) {
    const Gate& gate = layout.gate;
    const std::int64_t width = layout.second.cols, wide = layout.first.rows;
    const float* hidden = products.empty() ? nullptr : products[0].y[0];
    share(products, wide / width, threads, [&](const Product& product, std::int64_t first, std::int64_t last) {
        switch (gate.order) {
            case Order::alone: multiply(product, first, last); break;
            case Order::turns: multiply(product, 2 * first, 2 * last); break;
            case Order::halves:
                multiply(product, first, last);
                multiply(product, width + first, width + last);
        }
        for (int v = 0; v < product.count; ++v) {
            const std::int64_t step = gate.order == Order::turns ? 2 : 1;
            const float* from = product.y[v] + step * first;
            const float* up = gate.order == Order::alone ? nullptr : gate.order == Order::turns ? from + 1 : from + width;
            active().activate(gate, from, up, step, inner + (product.y[v] - hidden) / wide * width + first, last - first);
        }
    });
}

// A batch of experts' parts, over the rows of x as prepared.
void compute(const Part* parts, std::size_t count, const Rows& rows, const PreparedVectors& outer,
             const ExpertLayout& layout, Batch batch, int threads) {
    std::int64_t vectors = 0;
    for (std::size_t p = 0; p < count; ++p) vectors += parts[p].count;
    const Buffer<float> hidden(vectors * layout.first.rows), inner(vectors * layout.second.cols);
    PreparedVectors between(layout.second.at(parts[0].task->record + layout.second_offset), vectors, batch);

    std::vector<Product> firsts(count), seconds(count);
    std::vector<const std::uint8_t*> first_x(static_cast<std::size_t>(vectors)), second_x = between.pointers(vectors);
    std::vector<float*> first_y(static_cast<std::size_t>(vectors)), second_y(static_cast<std::size_t>(vectors));
    std::size_t vector = 0;
    for (std::size_t p = 0; p < count; ++p) {
        const Task& task = *parts[p].task;
        Product &first = firsts[p], &second = seconds[p];
        first.matrix = layout.first.at(task.record + layout.first_offset);
        second.matrix = layout.second.at(task.record + layout.second_offset);
        first.kernel = outer.kernel();
        second.kernel = between.kernel();
        first.bias = second.bias = nullptr;
        first.halves = layout.first_bias < 0 ? nullptr : task.record + layout.first_bias;
        second.halves = layout.second_bias < 0 ? nullptr : task.record + layout.second_bias;
        first.is_float16 = second.is_float16 = layout.bias_is_float16;
        first.count = second.count = parts[p].count;
        first.x = &first_x[vector];
        first.y = &first_y[vector];
        second.x = &second_x[vector];
        second.y = &second_y[vector];
        for (int v = 0; v < first.count; ++v, ++vector) {
            first_x[vector] = outer[rows.place(task.rows[parts[p].start + v])];
            first_y[vector] = hidden.get() + static_cast<std::int64_t>(vector) * layout.first.rows;
            second_y[vector] = task.out + (parts[p].start + v) * layout.second.rows;
        }
    }
    first_half(firsts, layout, inner.get(), threads);
    between.fill(vectors, threads, [&](std::int64_t v) { return inner.get() + v * layout.second.cols; });
    share(seconds, 1, threads, multiply);
}

// Tasks that are all of many rows or all of few.
void experts_alike(const float* x, const std::vector<Task>& tasks, const ExpertLayout& layout, Batch batch, int threads) {
    const Rows rows(tasks);
    if (rows.count() == 0) return;
    PreparedVectors outer(layout.first.at(tasks[0].record + layout.first_offset), rows.count(), batch);
    outer.fill(rows.count(), threads, [&](std::int64_t place) { return x + rows[place] * layout.first.cols; });
    const Matrix second = layout.second.at(nullptr);
    const std::vector<Part> parts = parts_of(tasks, std::min(outer.kernel().most_vectors, active().kernel(second, batch).most_vectors));
    for (std::size_t start = 0; start < parts.size();) {
        std::size_t end = start;
        for (std::int64_t vectors = 0; end < parts.size() && (end == start || vectors + parts[end].count <= kBatch); ++end)
            vectors += parts[end].count;
        compute(parts.data() + start, end - start, rows, outer, layout, batch, threads);
        start = end;
    }
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
    if (packed == nullptr) return matrix;
    matrix.scale_codes = packed + align(rows * matrix.code_row_bytes, 64);
    matrix.zero_codes = matrix.scale_codes + align(rows * matrix.groups, 64);
    matrix.row_params = matrix.zero_codes + align(rows * matrix.groups, 64);
    return matrix;
}

std::vector<const Isa*> available() {
    std::vector<const Isa*> found;
#ifdef GREENROOM_X86
    if (kAvx512Vnni.supported()) found.push_back(&kAvx512Vnni);
#ifdef GREENROOM_AVXVNNI
    if (kAvxVnni.supported()) found.push_back(&kAvxVnni);
#endif
    if (kAvx2.supported()) found.push_back(&kAvx2);
#endif
#ifdef GREENROOM_ARM
    if (kNeon.supported()) found.push_back(&kNeon);
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

void linears(const float* x, int count, const Linear* list, int n, int threads, bool rough) {
    const Spent spent(linears_ns);
    std::vector<std::unique_ptr<PreparedVectors>> prepared;  // for each format once
    std::vector<std::vector<const std::uint8_t*>> pointers;
    std::vector<const Shape*> formats;
    std::vector<float*> y;
    for (int i = 0; i < n; ++i)
        for (int v = 0; v < count; ++v) y.push_back(list[i].out + v * list[i].shape.rows);
    std::vector<Product> products;
    for (int i = 0; i < n; ++i) {
        const Shape& shape = list[i].shape;
        std::size_t found = 0;
        while (found < formats.size() && !same_format(*formats[found], shape)) ++found;
        if (found == formats.size()) {
            formats.push_back(&shape);
            prepared.push_back(std::make_unique<PreparedVectors>(shape.at(list[i].packed), count, batch_of(count, rough)));
            prepared[found]->fill(count, threads, [&](std::int64_t v) { return x + v * shape.cols; });
            pointers.push_back(prepared[found]->pointers(count));
        }
        add_products(products, list[i], prepared[found]->kernel(), pointers[found].data(), y.data() + i * count, count);
    }
    share(products, 1, threads, multiply);
}

void linear(const float* x, int count, const std::uint8_t* packed, const Shape& shape, const float* bias, float* out,
            int threads, bool rough) {
    const Linear one{packed, shape, bias, out};
    linears(x, count, &one, 1, threads, rough);
}

double linears_s() { return seconds(linears_ns); }

double experts_s() { return seconds(experts_ns); }

void experts(const float* x, const std::vector<Task>& tasks, const ExpertLayout& layout, int threads, bool rough) {
    const Spent spent(experts_ns);
    std::vector<Task> few, many;
    for (const Task& task : tasks) (task.count < kMany ? few : many).push_back(task);
    experts_alike(x, few, layout, Batch::few, threads);
    experts_alike(x, many, layout, batch_of(kMany, rough), threads);
}

void add_weighted(float* out, const float* x, const std::int64_t* rows, const float* weights, int count, std::int64_t width,
                  int threads) {
    constexpr std::int64_t kColumns = 512;  // that a thread adds at a time: rows may repeat, columns do not
    parallel_for((width + kColumns - 1) / kColumns, count * width < kWorthPreparing ? 1 : threads, [&](std::int64_t item) {
        const std::int64_t first = item * kColumns, last = std::min(first + kColumns, width);
        for (int v = 0; v < count; ++v) {
            float* to = out + rows[v] * width;
            for (std::int64_t i = first; i < last; ++i) to[i] += weights[v] * x[v * width + i];
        }
    });
}

}  // namespace greenroom
