// The Python module greenroom.kernels._native. Tensors come as addresses, so that nothing here is linked to PyTorch;
// greenroom.kernels.native has checked their types and places. Sizes and row numbers are checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "compute.h"

namespace nb = nanobind;
using namespace greenroom;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check(bool holds, const char* otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

Shape shape_of(std::int64_t rows, std::int64_t cols, int bits, int group_size, bool is_float16) {
    check(rows > 0 && cols > 0, "a matrix has at least one row and one column");
    const bool grouped = group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128;
    check(bits == 16 ? group_size == 0 : (bits == 2 || bits == 3 || bits == 4 || bits == 8) && grouped,
          "not a format");
    return {rows, cols, bits, group_size, is_float16};
}

// linears: each one's packed bytes, their number, shape, bias (or 0) and place for the result.
using LinearAt = std::tuple<std::uintptr_t, std::int64_t, const Shape*, std::uintptr_t, std::uintptr_t>;

void linears_at(std::uintptr_t x, int count, const std::vector<LinearAt>& list, int threads) {
    check(count >= 0, "a count is not negative");
    std::vector<Linear> found;
    for (const auto& [packed, nbytes, shape, bias, out] : list) {
        check(nbytes == shape->nbytes(), "the packed matrix has another size");
        check(shape->cols == std::get<2>(list[0])->cols, "matrices of one call have the same columns");
        found.push_back({pointer<const std::uint8_t>(packed), *shape, pointer<const float>(bias), pointer<float>(out)});
    }
    nb::gil_scoped_release release;
    linears(pointer<const float>(x), count, found.data(), static_cast<int>(found.size()), threads);
}

// Tasks are lists side by side: each expert's record, its rows (int64) and how many; outputs lie one after another.
void experts_at(std::uintptr_t x, std::int64_t x_rows, const std::vector<std::uintptr_t>& records,
                std::int64_t record_nbytes, const std::vector<std::uintptr_t>& rows, const std::vector<int>& counts,
                const ExpertLayout& layout, std::uintptr_t out, int threads, bool rough) {
    check(records.size() == rows.size() && records.size() == counts.size(), "lists of different lengths");
    check(layout.first_offset + layout.first.nbytes() <= record_nbytes &&
              layout.second_offset + layout.second.nbytes() <= record_nbytes &&
              layout.first_bias + 2 * layout.first.rows <= record_nbytes &&
              layout.second_bias + 2 * layout.second.rows <= record_nbytes,
          "the matrices reach beyond the record");
    std::vector<Task> tasks(records.size());
    float* to = pointer<float>(out);
    for (std::size_t t = 0; t < tasks.size(); ++t) {
        check(counts[t] >= 0, "a count is not negative");
        tasks[t] = {pointer<const std::uint8_t>(records[t]), pointer<const std::int64_t>(rows[t]), counts[t], to};
        for (int v = 0; v < counts[t]; ++v)
            check(tasks[t].rows[v] >= 0 && tasks[t].rows[v] < x_rows, "a row that x does not have");
        to += counts[t] * layout.second.rows;
    }
    nb::gil_scoped_release release;
    experts(pointer<const float>(x), tasks, layout, threads, rough);
}

void add_weighted_at(std::uintptr_t out, std::int64_t out_rows, std::uintptr_t x, std::uintptr_t rows, std::uintptr_t weights,
                     int count, std::int64_t width, int threads) {
    const std::int64_t* places = pointer<const std::int64_t>(rows);
    for (int v = 0; v < count; ++v) check(places[v] >= 0 && places[v] < out_rows, "a row that there is not");
    nb::gil_scoped_release release;
    add_weighted(pointer<float>(out), pointer<const float>(x), places, pointer<const float>(weights), count, width, threads);
}

// Whether the compiled kernels are the faster ones for so many vectors.
bool takes(const Shape& shape, int count) {
    const Kernel kernel = active().kernel(shape.at(nullptr), count < kMany ? Batch::few : Batch::many);
    return count <= kernel.most_vectors || kernel.for_many;
}

Gate gate_of(const std::string& function, const std::string& order, float alpha, float limit, float plus) {
    const char* const functions[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2"};
    const char* const orders[] = {"alone", "halves", "turns"};
    const auto its = std::find(std::begin(functions), std::end(functions), function) - functions;
    const auto how = std::find(std::begin(orders), std::end(orders), order) - orders;
    check(its < 5 && how < 3, "not a gate");
    return {static_cast<Function>(its), static_cast<Order>(how), alpha, limit, plus};
}

ExpertLayout layout_of(const Shape& first, std::int64_t first_offset, const Shape& second, std::int64_t second_offset,
                       std::int64_t first_bias, std::int64_t second_bias, bool bias_is_float16, const Gate& gate) {
    check(first.rows == (gate.order == Order::alone ? 1 : 2) * second.cols, "the two matrices do not follow each other");
    check(first_offset >= 0 && second_offset >= 0, "offsets are not negative");
    return {first, second, first_offset, second_offset, first_bias, second_bias, bias_is_float16, gate};
}

}  // namespace

void bind_decoder(nb::module_& module);  // decode_module.cpp

NB_MODULE(_native, module) {
    nb::set_leak_warnings(false);  // a thread that outlives the interpreter keeps what it holds
    nb::class_<Shape>(module, "Shape").def("takes", &takes);
    nb::class_<Gate>(module, "Gate");
    nb::class_<ExpertLayout>(module, "ExpertLayout");
    module.def("gate", &gate_of);
    module.def("shape", &shape_of);
    module.def("layout", &layout_of);
    module.def("linears", &linears_at);
    module.def("linears_s", &linears_s);
    module.def("experts_s", &experts_s);
    module.def("experts", &experts_at);
    module.def("add_weighted", &add_weighted_at);
    module.def("available", [] {
        std::vector<std::string> names;
        for (const Isa* isa : available()) names.emplace_back(isa->name);
        return names;
    });
    module.def("active", [] { return std::string(active().name); });
    module.def("title", [] { return std::string(active().title); });
    module.def("choose", [](const std::string& name) { return choose(name.c_str()); });
    bind_decoder(module);
}
