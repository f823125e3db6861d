// The decoder's part of the Python module: descriptions of layers, and the way of one token or many through them. Addresses come
// from greenroom.decode, which keeps what they point to alive; sizes that would lead beyond it are checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <utility>

#include "decode.h"
#include "prompt.h"

namespace nb = nanobind;
using namespace greenroom;

namespace {

void check(bool holds, const char* otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A property that takes an address for a pointer member.
template <class Class, class T>
void address(nb::class_<Class>& bound, const char* name, T* Class::*member) {
    bound.def_prop_rw(
        name, [member](const Class& it) { return reinterpret_cast<std::uintptr_t>(it.*member); },
        [member](Class& it, std::uintptr_t value) { it.*member = pointer<T>(value); });
}

void fits(const Weights& weights, std::int64_t rows, std::int64_t cols) {
    check(weights && weights.shape.rows == rows && weights.shape.cols == cols, "a projection has another shape");
}

void check_attention(const Attention& it, std::int64_t width) {
    check(it.heads > 0 && it.kv_heads > 0 && it.heads % it.kv_heads == 0, "heads do not share key-value heads evenly");
    check(it.rotary_dim >= 0 && it.rotary_dim <= it.head_dim && it.rotary_dim % 2 == 0, "not a rotary dimension");
    fits(it.query, it.heads * it.head_dim, width);
    fits(it.key, it.kv_heads * it.head_dim, width);
    fits(it.value, it.kv_heads * it.head_dim, width);
    fits(it.output, width, it.heads * it.head_dim);
}

void check_latent(const LatentAttention& it, std::int64_t width) {
    check(it.heads > 0 && it.nope_dim > 0 && it.latent_dim > 0 && it.value_dim > 0, "not a latent attention");
    check(it.rotary_dim >= 0 && it.rotary_dim % 2 == 0, "not a rotary dimension");
    check(it.key_up != nullptr && it.value_up != nullptr && it.latent_norm.weight != nullptr, "a part is missing");
    if (it.query_down) {
        check(it.query_down.shape.cols == width && it.query_norm.weight != nullptr, "not a query projection");
        fits(it.query, it.heads * (it.nope_dim + it.rotary_dim), it.query_down.shape.rows);
    } else {
        fits(it.query, it.heads * (it.nope_dim + it.rotary_dim), width);
    }
    fits(it.latent, it.latent_dim + it.rotary_dim, width);
    fits(it.up, it.heads * (it.nope_dim + it.value_dim), it.latent_dim);
    fits(it.output, width, it.heads * it.value_dim);
}

void check_router(const Router& it, std::int64_t width) {
    check(it.weights && it.weights.shape.cols == width, "the router has another shape");
    check(it.top_k > 0 && it.top_k <= it.weights.shape.rows, "not a number of experts");
    check(it.groups > 0 && it.weights.shape.rows % it.groups == 0 && it.top_groups > 0 && it.top_groups <= it.groups,
          "not a number of groups");
    check(it.groups == 1 || it.weights.shape.rows / it.groups >= (it.group_by_two ? 2 : 1), "groups are too small");
    check(it.groups == 1 || it.top_k <= it.top_groups * (it.weights.shape.rows / it.groups), "too few experts in groups");
}

void check_mlp(const Mlp& it, std::int64_t width) {
    check(static_cast<bool>(it.gate), "an MLP has a gate");
    fits(it.up, it.gate.shape.rows, width);
    fits(it.gate, it.up.shape.rows, width);
    fits(it.down, width, it.gate.shape.rows);
    if (it.scale) fits(it.scale, 1, width);
}

Decoder decoder_of(std::vector<DecoderLayer> layers, std::int64_t width, std::uintptr_t hidden, std::uintptr_t normed) {
    for (const DecoderLayer& layer : layers) {
        check(layer.before_attention.weight != nullptr && layer.before_mlp.weight != nullptr, "a norm is missing");
        check(layer.attention.has_value() != layer.latent_attention.has_value(), "a layer has one attention");
        check(layer.router || layer.mlp, "a layer has a router or an MLP");
        if (layer.attention) check_attention(*layer.attention, width);
        if (layer.latent_attention) check_latent(*layer.latent_attention, width);
        if (layer.router) check_router(*layer.router, width);
        if (layer.mlp) check_mlp(*layer.mlp, width);
    }
    return {std::move(layers), width, pointer<float>(hidden), pointer<float>(normed)};
}

// A layer's cache with room for `more` tokens.
KeyValues cache_of(std::uintptr_t keys, std::uintptr_t values, std::int64_t capacity, int bits, std::int64_t first,
                   std::int64_t length, std::int64_t more) {
    check(bits == 16 || bits == 8, "not a width of what is cached");
    check(first >= 0 && first <= length && length <= capacity - more && capacity <= INT32_MAX && capacity % kPositions == 0, "the cache is full");
    return {pointer<std::uint8_t>(keys), pointer<std::uint8_t>(values), capacity, bits, first, length};
}

std::pair<std::vector<int>, std::vector<float>> attend(Decoder& decoder, std::size_t layer, std::uintptr_t keys,
                                                       std::uintptr_t values, std::int64_t capacity, int bits,
                                                       std::int64_t first, std::int64_t length, std::uintptr_t cosine,
                                                       std::uintptr_t sine, int threads) {
    check(layer < decoder.layers().size(), "no such layer");
    const KeyValues cache = cache_of(keys, values, capacity, bits, first, length, 1);
    nb::gil_scoped_release release;
    Chosen chosen = decoder.attend(layer, cache, pointer<const float>(cosine), pointer<const float>(sine), threads);
    return {std::move(chosen.experts), std::move(chosen.weights)};
}

bool within(const ExpertLayout& layout, std::int64_t record_nbytes) {
    return layout.first_offset + layout.first.nbytes() <= record_nbytes &&
           layout.second_offset + layout.second.nbytes() <= record_nbytes;
}

Records records_of(const ExpertLayout& layout, const std::vector<std::uintptr_t>& addresses, std::int64_t record_nbytes) {
    check(within(layout, record_nbytes), "the matrices reach beyond the record");
    Records found{layout, {}};
    for (std::uintptr_t address : addresses) found.at.push_back(pointer<const std::uint8_t>(address));
    return found;
}

// The records of all layers of a decoder.
struct AllRecords {
    std::vector<Records> layers;
};

// The caches of all layers of a decoder: keys, values, capacity, bits, first and length of each.
struct Caches {
    std::vector<KeyValues> layers;
};

using CacheTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t, int, std::int64_t, std::int64_t>;

Caches caches_of(const std::vector<CacheTuple>& layers) {
    Caches found;
    for (const auto& [keys, values, capacity, bits, first, length] : layers)
        found.layers.push_back(cache_of(keys, values, capacity, bits, first, length, 1));
    return found;
}

std::pair<std::size_t, double> walk(Decoder& decoder, std::size_t first, std::size_t last, const Caches& caches,
                                    std::uintptr_t cosine, std::uintptr_t sine, const AllRecords& records,
                                    std::pair<int, int> foresight, nb::callable lacks, bool with_shares,
                                    std::uintptr_t outputs, int threads) {
    const std::vector<DecoderLayer>& layers = decoder.layers();
    check(caches.layers.size() == layers.size() && records.layers.size() == layers.size(), "not as many as layers");
    check(first < last && last <= layers.size(), "no such layers");
    for (std::size_t i = first; i < layers.size(); ++i) {
        const Records& its = records.layers[i];
        if (!layers[i].router) continue;
        check(static_cast<std::int64_t>(its.at.size()) == layers[i].router->weights.shape.rows, "not as many records as experts");
        check(its.layout.first.cols == decoder.width() && its.layout.second.rows == decoder.width(), "experts of another width");
    }
    const auto asked = [&lacks](std::size_t layer, const Chosen& chosen, const std::vector<Foreseen>& foreseen) {
        nb::gil_scoped_acquire acquire;
        std::vector<std::pair<std::size_t, std::vector<int>>> ahead;
        for (const Foreseen& its : foreseen) ahead.emplace_back(its.layer, its.experts);
        return nb::cast<bool>(lacks(layer, chosen.experts, chosen.weights, ahead));
    };
    nb::gil_scoped_release release;
    const Walked walked = decoder.walk(first, last, caches.layers, pointer<const float>(cosine), pointer<const float>(sine),
                                       records.layers, {foresight.first, foresight.second}, asked, with_shares,
                                       pointer<float>(outputs), threads);
    return {walked.end, walked.foresee_s};
}

// Layer, experts, weights and shares of each.
std::vector<std::tuple<std::size_t, std::vector<int>, std::vector<float>, std::vector<float>>> passed(Decoder& decoder) {
    std::vector<std::tuple<std::size_t, std::vector<int>, std::vector<float>, std::vector<float>>> told;
    for (Passed& its : decoder.passed())
        told.emplace_back(its.layer, std::move(its.chosen.experts), std::move(its.chosen.weights), std::move(its.shares));
    return told;
}

void attend_all(Prompt& prompt, std::size_t layer, std::uintptr_t keys, std::uintptr_t values, std::int64_t capacity,
                int bits, std::int64_t length, std::int64_t window, std::uintptr_t experts, std::uintptr_t weights, int threads) {
    check(layer < prompt.layers(), "no such layer");
    check(window >= 0, "not a number of positions");
    prompt.attend(layer, cache_of(keys, values, capacity, bits, 0, length, prompt.count()), window,
                  pointer<std::int64_t>(experts), pointer<float>(weights), threads);
}

void combine_all(Prompt& prompt, std::size_t layer, std::uintptr_t outputs, int threads) {
    check(layer < prompt.layers(), "no such layer");
    prompt.combine(layer, pointer<const float>(outputs), threads);
}

// One token's experts: outputs [number of experts, second.rows], in the order of `records`, whose places say which
// rows of `outputs` to write.
void token(std::uintptr_t x, const std::vector<std::uintptr_t>& records, const std::vector<int>& places,
           std::int64_t record_nbytes, const ExpertLayout& layout, std::uintptr_t outputs, int threads) {
    static const std::int64_t kFirstRow = 0;
    check(records.size() == places.size(), "lists of different lengths");
    check(within(layout, record_nbytes), "the matrices reach beyond the record");
    std::vector<Task> tasks(records.size());
    for (std::size_t t = 0; t < tasks.size(); ++t)
        tasks[t] = {pointer<const std::uint8_t>(records[t]), &kFirstRow, 1,
                    pointer<float>(outputs) + places[t] * layout.second.rows};
    nb::gil_scoped_release release;
    experts(pointer<const float>(x), tasks, layout, threads);
}

}  // namespace

void bind_decoder(nb::module_& module) {
    nb::class_<Weights> weights(module, "Weights");
    weights.def(
        "__init__",
        [](Weights* it, std::uintptr_t packed, std::int64_t packed_nbytes, const Shape& shape, std::uintptr_t bias) {
            check(packed_nbytes == shape.nbytes(), "the packed matrix has another size");
            new (it) Weights{pointer<const std::uint8_t>(packed), shape, pointer<const float>(bias)};
        });
    nb::class_<Norm> norm(module, "Norm");
    norm.def("__init__", [](Norm* it, std::uintptr_t weight, float eps) { new (it) Norm{pointer<const float>(weight), eps}; });
    nb::enum_<Rotation>(module, "Rotation")
        .value("halves", Rotation::halves)
        .value("pairs", Rotation::pairs)
        .value("pairs_to_halves", Rotation::pairs_to_halves);

    nb::class_<Attention> attention(module, "Attention");
    attention.def(nb::init<>())
        .def_rw("query", &Attention::query)
        .def_rw("key", &Attention::key)
        .def_rw("value", &Attention::value)
        .def_rw("output", &Attention::output)
        .def_rw("query_norm", &Attention::query_norm)
        .def_rw("key_norm", &Attention::key_norm)
        .def_rw("norm_each_head", &Attention::norm_each_head)
        .def_rw("clip", &Attention::clip)
        .def_rw("heads", &Attention::heads)
        .def_rw("kv_heads", &Attention::kv_heads)
        .def_rw("head_dim", &Attention::head_dim)
        .def_rw("rotary_dim", &Attention::rotary_dim)
        .def_rw("rotation", &Attention::rotation)
        .def_rw("scale", &Attention::scale);
    address(attention, "sinks", &Attention::sinks);

    nb::class_<LatentAttention> latent(module, "LatentAttention");
    latent.def(nb::init<>())
        .def_rw("query_down", &LatentAttention::query_down)
        .def_rw("query", &LatentAttention::query)
        .def_rw("latent", &LatentAttention::latent)
        .def_rw("output", &LatentAttention::output)
        .def_rw("up", &LatentAttention::up)
        .def_rw("query_norm", &LatentAttention::query_norm)
        .def_rw("latent_norm", &LatentAttention::latent_norm)
        .def_rw("heads", &LatentAttention::heads)
        .def_rw("nope_dim", &LatentAttention::nope_dim)
        .def_rw("rotary_dim", &LatentAttention::rotary_dim)
        .def_rw("latent_dim", &LatentAttention::latent_dim)
        .def_rw("value_dim", &LatentAttention::value_dim)
        .def_rw("rotation", &LatentAttention::rotation)
        .def_rw("scale", &LatentAttention::scale);
    address(latent, "key_up", &LatentAttention::key_up);
    address(latent, "value_up", &LatentAttention::value_up);

    nb::class_<Router> router(module, "Router");
    nb::enum_<Router::Scores>(router, "Scores")
        .value("softmax", Router::Scores::softmax)
        .value("sigmoid", Router::Scores::sigmoid)
        .value("softmax_of_chosen", Router::Scores::softmax_of_chosen);
    router.def(nb::init<>())
        .def_rw("weights", &Router::weights)
        .def_rw("scores", &Router::scores)
        .def_rw("top_k", &Router::top_k)
        .def_rw("groups", &Router::groups)
        .def_rw("top_groups", &Router::top_groups)
        .def_rw("group_by_two", &Router::group_by_two)
        .def_rw("normalize", &Router::normalize)
        .def_rw("scale", &Router::scale);
    address(router, "correction", &Router::correction);

    nb::class_<Mlp>(module, "Mlp")
        .def(nb::init<>())
        .def_rw("gate", &Mlp::gate)
        .def_rw("up", &Mlp::up)
        .def_rw("down", &Mlp::down)
        .def_rw("scale", &Mlp::scale);

    nb::class_<DecoderLayer>(module, "DecoderLayer")
        .def(nb::init<>())
        .def_rw("before_attention", &DecoderLayer::before_attention)
        .def_rw("before_mlp", &DecoderLayer::before_mlp)
        .def_rw("attention", &DecoderLayer::attention)
        .def_rw("latent_attention", &DecoderLayer::latent_attention)
        .def_rw("router", &DecoderLayer::router)
        .def_rw("mlp", &DecoderLayer::mlp);

    nb::class_<Records>(module, "Records")
        .def("__init__", [](Records* it) { new (it) Records{}; })
        .def("__init__", [](Records* it, const ExpertLayout& layout, const std::vector<std::uintptr_t>& addresses,
                            std::int64_t record_nbytes) { new (it) Records(records_of(layout, addresses, record_nbytes)); });
    nb::class_<AllRecords>(module, "AllRecords")
        .def("__init__", [](AllRecords* it, const std::vector<Records>& layers) { new (it) AllRecords{layers}; })
        .def("put", [](AllRecords& it, std::size_t layer, std::size_t expert, std::uintptr_t address) {
            check(layer < it.layers.size() && expert < it.layers[layer].at.size(), "no such expert");
            it.layers[layer].at[expert] = pointer<const std::uint8_t>(address);
        });

    nb::class_<Caches>(module, "Caches")
        .def("__init__", [](Caches* it, const std::vector<CacheTuple>& layers) { new (it) Caches(caches_of(layers)); });

    nb::class_<Decoder>(module, "Decoder")
        .def("__init__",
             [](Decoder* it, std::vector<DecoderLayer> layers, std::int64_t width, std::uintptr_t hidden,
                std::uintptr_t normed) { new (it) Decoder(decoder_of(std::move(layers), width, hidden, normed)); })
        .def("attend", &attend)
        .def("shares", &Decoder::shares)
        .def("foresee", [](Decoder& it, std::size_t layer, int count, int threads) {
            check(layer < it.layers().size() && count >= 0, "no such layer, or no such number of experts");
            return it.foresee(layer, count, threads);
        })
        .def("shared", &Decoder::shared, nb::call_guard<nb::gil_scoped_release>())
        .def("combine", [](Decoder& it, std::size_t layer, std::uintptr_t outputs, const std::vector<float>& weights) {
            check(layer < it.layers().size(), "no such layer");
            it.combine(layer, pointer<const float>(outputs), weights);
        })
        .def("walk", &walk)
        .def("passed", &passed)
        .def("finish", &Decoder::finish)
        .def(
            "prompt",
            [](const Decoder& it, std::int64_t count, std::uintptr_t hidden, std::uintptr_t normed, std::uintptr_t cosine,
               std::uintptr_t sine, bool rough) {
                check(count > 0 && count <= INT32_MAX, "a prompt has tokens");
                return new Prompt(it.layers(), it.width(), count, pointer<float>(hidden), pointer<float>(normed),
                                  pointer<const float>(cosine), pointer<const float>(sine), rough);
            },
            nb::keep_alive<0, 1>());
    nb::class_<Prompt>(module, "Prompt")
        .def("attend", &attend_all, nb::call_guard<nb::gil_scoped_release>())
        .def("combine", &combine_all, nb::call_guard<nb::gil_scoped_release>());
    module.def("token", &token);
    module.attr("BLOCK") = kPositions;
    module.attr("GROUP") = kCachedGroup;
}
