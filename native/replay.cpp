// The Python module greenroom.cache._replay: the loops of greenroom.cache.stack, the S3FIFO of greenroom.cache.policies
// and the Learned of greenroom.cache.learned. Those files say what is computed; this one must give the same bits, so
// sums keep their order and products are not fused.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

namespace {

template <class T, class Shape>
using Array = nb::ndarray<T, nb::numpy, Shape, nb::c_contig, nb::device::cpu>;
using Sets = Array<const std::uint16_t, nb::ndim<3>>;  // [steps, layers, k]

void check(bool holds, const char* otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

// One layer's stack distances. `pool` holds what has no place yet while a request walks down the stack.
struct Layer {
    std::int32_t* order;
    std::int32_t* distance;
    std::int64_t* found;
    std::int64_t experts;

    void request(const std::uint16_t* set, std::int64_t k, const double* scores, std::vector<std::int32_t>& pool,
                 std::vector<char>& requested) const {
        pool.clear();
        for (std::int64_t i = 0; i < k; ++i) {
            if (set[i] >= experts) continue;
            pool.push_back(set[i]);
            requested[set[i]] = 1;
            ++found[distance[set[i]]];
        }
        for (std::int64_t place = 0; place < experts && !pool.empty(); ++place) {
            const std::int32_t expert = order[place];
            if (expert >= 0 && !requested[expert]) pool.push_back(expert);
            std::size_t best = 0;
            for (std::size_t i = 1; i < pool.size(); ++i) {
                const double a = scores[pool[i]], b = scores[pool[best]];
                if (a > b || (a == b && pool[i] < pool[best])) best = i;
            }
            order[place] = pool[best];
            distance[pool[best]] = static_cast<std::int32_t>(place + 1);
            pool[best] = pool.back();
            pool.pop_back();
        }
        for (std::int64_t i = 0; i < k; ++i)
            if (set[i] < experts) requested[set[i]] = 0;
    }
};

void feed_stack(Sets sets, Array<const double, nb::ndim<3>> scores, Array<std::int32_t, nb::ndim<2>> order,
                Array<std::int32_t, nb::ndim<2>> distance, Array<std::int64_t, nb::ndim<2>> found) {
    const std::int64_t steps = sets.shape(0), layers = sets.shape(1), k = sets.shape(2), experts = order.shape(1);
    check(std::int64_t(scores.shape(0)) == steps && std::int64_t(scores.shape(1)) == layers &&
              std::int64_t(scores.shape(2)) == experts && std::int64_t(order.shape(0)) == layers &&
              distance.shape(0) == order.shape(0) && distance.shape(1) == order.shape(1) &&
              found.shape(0) == order.shape(0) && std::int64_t(found.shape(1)) == experts + 1,
          "arrays of different shapes");
    nb::gil_scoped_release release;
    std::vector<std::int32_t> pool;
    std::vector<char> requested(experts, 0);
    for (std::int64_t step = 0; step < steps; ++step)
        for (std::int64_t layer = 0; layer < layers; ++layer) {
            const Layer one{order.data() + layer * experts, distance.data() + layer * experts,
                            found.data() + layer * (experts + 1), experts};
            one.request(sets.data() + (step * layers + layer) * k, k,
                        scores.data() + (step * layers + layer) * experts, pool, requested);
        }
}

// One layer's S3-FIFO queues for one capacity.
class S3Fifo {
public:
    S3Fifo(std::int64_t experts, std::int64_t capacity)
        : capacity_(capacity), small_capacity_(std::max<std::int64_t>(1, capacity / 10)), uses_(experts, 0),
          place_(experts, kOut), ghost_(experts, 0) {}

    std::int64_t request(const std::uint16_t* set, std::int64_t k) {
        arrivals_.clear();
        std::int64_t hits = 0;
        for (std::int64_t i = 0; i < k; ++i) {
            if (set[i] >= place_.size()) continue;
            if (capacity_ > 0 && place_[set[i]] != kOut) {
                ++hits;
                uses_[set[i]] = std::min(uses_[set[i]] + 1, 3);
            } else {
                arrivals_.push_back(set[i]);
            }
        }
        if (capacity_ == 0) return hits;
        for (const int key : arrivals_) {
            while (std::int64_t(small_.size() + main_.size()) >= capacity_) evict();
            uses_[key] = 0;
            if (ghost_[key]) {
                ghost_[key] = 0;
                queue_.erase(std::find(queue_.begin(), queue_.end(), key));
                enter(main_, key, kMain);
            } else {
                enter(small_, key, kSmall);
            }
        }
        return hits;
    }

private:
    enum Place : char { kOut, kSmall, kMain };

    void enter(std::deque<int>& queue, int key, Place place) {
        queue.push_back(key);
        place_[key] = place;
    }

    void evict() {
        if (!small_.empty() && (std::int64_t(small_.size()) >= small_capacity_ || main_.empty())) {
            const int key = small_.front();
            small_.pop_front();
            if (uses_[key] > 1) {
                uses_[key] = 0;
                enter(main_, key, kMain);
                return;
            }
            place_[key] = kOut;
            ghost_[key] = 1;
            queue_.push_back(key);
            if (std::int64_t(queue_.size()) > capacity_ - small_capacity_) {
                ghost_[queue_.front()] = 0;
                queue_.pop_front();
            }
            return;
        }
        const int key = main_.front();
        main_.pop_front();
        if (uses_[key] > 0) {
            --uses_[key];
            main_.push_back(key);
        } else {
            place_[key] = kOut;
        }
    }

    std::int64_t capacity_, small_capacity_;
    std::vector<int> uses_;
    std::vector<char> place_, ghost_;
    std::deque<int> small_, main_, queue_;  // queue_: the ghosts in order
    std::vector<int> arrivals_;
};

// Hits [layers, capacities] of each layer and capacity over a whole trace.
void s3fifo(Sets sets, Array<const std::int64_t, nb::ndim<1>> capacities, std::int64_t experts,
            Array<std::int64_t, nb::ndim<2>> hits) {
    const std::int64_t steps = sets.shape(0), layers = sets.shape(1), k = sets.shape(2);
    check(std::int64_t(hits.shape(0)) == layers && hits.shape(1) == capacities.shape(0) && experts >= 0,
          "arrays of different shapes");
    nb::gil_scoped_release release;
    for (std::int64_t layer = 0; layer < layers; ++layer)
        for (std::size_t size = 0; size < capacities.shape(0); ++size) {
            S3Fifo cache(experts, capacities.data()[size]);
            std::int64_t total = 0;
            for (std::int64_t step = 0; step < steps; ++step)
                total += cache.request(sets.data() + (step * layers + layer) * k, k);
            hits.data()[layer * hits.shape(1) + size] = total;
        }
}

struct Constants {
    std::vector<double> decays, scales, weights, powers;
    double rate, count_rate;
};

// One layer's predictor. Rows of `pairs` are (set of the context, expert seen); columns are this layer's experts.
class Learned {
public:
    Learned(int context, Constants constants) : constants_(std::move(constants)), sets_(2 + context) {
        check(constants_.scales.size() == counts() && constants_.weights.size() == counts(), "lists of different lengths");
    }

    std::int64_t width() const { return width_; }
    const std::vector<double>& scores() const { return seen_.back().scores; }

    void grow(std::int64_t width) {
        if (width <= width_) return;
        std::vector<float> pairs(sets_ * width * width, 0.0f);
        for (std::int64_t row = 0; row < sets_ * width_; ++row)
            std::copy_n(pairs_.begin() + row * width_, width_,
                        pairs.begin() + ((row / width_) * width + row % width_) * width);
        pairs_ = std::move(pairs);
        widen(counts_, width);
        widen(moved_, width);
        for (Seen& seen : seen_) {
            widen(seen.counts, width);
            seen.scores.resize(width, 0.0);
            for (std::int64_t& row : seen.rows) row = row / width_ * width + row % width_;
        }
        width_ = width;
    }

    // `sets`: this request's, then those of the context; experts below width(). `probabilities` of the first `known`
    // experts, for all of the layer's; none are known where the caller has none.
    void observe(const std::vector<std::vector<int>>& sets, const double* probabilities, std::int64_t known) {
        const double size = double(sets[0].size());
        for (std::size_t h = 0; h < counts(); ++h) {
            double* row = counts_.data() + h * width_;
            for (std::int64_t e = 0; e < width_; ++e) row[e] *= constants_.decays[h];
            for (const int e : sets[0]) row[e] += constants_.scales[h];
        }
        Seen now;
        add_rows(now.rows, 0, sets[0]);
        if (!used_.empty()) add_rows(now.rows, 1, used_.back());
        for (std::int64_t s = 2; s < sets_; ++s) add_rows(now.rows, s, sets[s - 1]);
        used_.push_back(sets[0]);
        if (used_.size() > constants_.powers.size() + 1) used_.pop_front();
        if (seen_.size() == constants_.powers.size()) {
            learn(seen_.front());
            seen_.pop_front();
        }
        now.counts = counts_;
        now.scores.assign(width_, 0.0);
        std::vector<float> sum(width_, 0.0f);
        for (const std::int64_t row : now.rows)
            for (std::int64_t e = 0; e < width_; ++e) sum[e] += pairs_[row * width_ + e];
        for (std::size_t h = 0; h < counts(); ++h)
            for (std::int64_t e = 0; e < width_; ++e)
                now.scores[e] += (constants_.weights[h] + moved_[h * width_ + e]) * counts_[h * width_ + e];
        for (std::int64_t e = 0; e < width_; ++e) now.scores[e] += sum[e];
        seen_.push_back(std::move(now));
        for (std::size_t h = 0; h < counts() && known > 0; ++h) {
            double* row = counts_.data() + h * width_;
            for (const int e : sets[0]) row[e] -= constants_.scales[h];
            for (std::int64_t e = 0; e < known; ++e) row[e] += constants_.scales[h] * (size * probabilities[e]);
        }
    }

private:
    struct Seen {
        std::vector<std::int64_t> rows;
        std::vector<double> counts, scores;
    };

    std::size_t counts() const { return constants_.decays.size(); }

    void widen(std::vector<double>& array, std::int64_t width) const {
        std::vector<double> wide(counts() * width, 0.0);
        for (std::size_t h = 0; h < counts() && width_ > 0; ++h)
            std::copy_n(array.begin() + h * width_, width_, wide.begin() + h * width);
        array = std::move(wide);
    }

    void add_rows(std::vector<std::int64_t>& rows, std::int64_t set, const std::vector<int>& experts) const {
        for (const int e : experts) rows.push_back(set * width_ + e);
    }

    void learn(const Seen& seen) {
        std::vector<double> error(width_, 0.0);
        for (std::size_t distance = used_.size() - 1; distance > 0; --distance)
            for (const int e : used_[distance]) error[e] = constants_.powers[distance - 1];
        for (std::int64_t e = 0; e < width_; ++e) error[e] -= seen.scores[e];
        for (std::size_t h = 0; h < counts(); ++h)
            for (std::int64_t e = 0; e < width_; ++e)
                moved_[h * width_ + e] += seen.counts[h * width_ + e] * (constants_.count_rate * error[e]);
        const double rate = constants_.rate / std::max<std::size_t>(seen.rows.size(), 1);
        std::vector<float> step(width_);
        for (std::int64_t e = 0; e < width_; ++e) step[e] = static_cast<float>(rate * error[e]);
        for (const std::int64_t row : seen.rows)
            for (std::int64_t e = 0; e < width_; ++e) pairs_[row * width_ + e] += step[e];
    }

    Constants constants_;
    std::int64_t sets_, width_ = 0;
    std::vector<double> counts_, moved_;  // [decays][width]
    std::vector<float> pairs_;            // [sets][width][width]
    std::deque<std::vector<int>> used_;   // the oldest is the one that `seen_.front()` asked for
    std::deque<Seen> seen_;
};

std::vector<double> observe_one(Learned& learned, const std::vector<int>& used,
                                const std::vector<std::vector<int>>& context,
                                const std::vector<double>& probabilities) {
    std::vector<std::vector<int>> sets{used};
    sets.insert(sets.end(), context.begin(), context.end());
    int highest = int(probabilities.size()) - 1;
    for (const auto& set : sets)
        for (const int e : set) {
            check(e >= 0, "an expert is not negative");
            highest = std::max(highest, e);
        }
    if (highest >= learned.width()) learned.grow(std::max<std::int64_t>(highest + 1, learned.width() + 32));
    learned.observe(sets, probabilities.data(), std::int64_t(probabilities.size()));
    return learned.scores();
}

// All layers of a trace, whose sets tell each other.
class LearnedLayers {
public:
    LearnedLayers(int layers, std::int64_t experts, std::vector<int> context, const Constants& constants)
        : experts_(experts), context_(std::move(context)), layers_(layers, Learned(int(context_.size()), constants)),
          latest_(layers) {
        for (Learned& layer : layers_) layer.grow(experts);
    }

    void observe(Sets sets, Array<const double, nb::ndim<3>> probabilities, Array<double, nb::ndim<3>> scores) {
        const std::int64_t steps = sets.shape(0), layers = sets.shape(1), k = sets.shape(2);
        check(layers == std::int64_t(layers_.size()) && std::int64_t(scores.shape(0)) == steps &&
                  std::int64_t(scores.shape(1)) == layers && std::int64_t(scores.shape(2)) == experts_,
              "arrays of different shapes");
        const std::int64_t given = probabilities.shape(0) > 0 ? experts_ : 0;
        check(!given || (std::int64_t(probabilities.shape(0)) == steps &&
                         std::int64_t(probabilities.shape(1)) == layers &&
                         std::int64_t(probabilities.shape(2)) == experts_),
              "arrays of different shapes");
        nb::gil_scoped_release release;
        for (std::int64_t step = 0; step < steps; ++step)
            for (std::int64_t layer = 0; layer < layers; ++layer) {
                std::vector<std::vector<int>> known(1);
                for (std::int64_t i = 0; i < k; ++i) {
                    const int e = sets.data()[(step * layers + layer) * k + i];
                    if (e < experts_) known[0].push_back(e);
                }
                for (const int offset : context_) {
                    const std::int64_t other = layer + offset;
                    known.push_back(other >= 0 && other < layers ? latest_[other] : std::vector<int>());
                }
                layers_[layer].observe(
                    known, given ? probabilities.data() + (step * layers + layer) * experts_ : nullptr, given);
                latest_[layer] = std::move(known[0]);
                std::copy_n(layers_[layer].scores().begin(), experts_,
                            scores.data() + (step * layers + layer) * experts_);
            }
    }

private:
    std::int64_t experts_;
    std::vector<int> context_;
    std::vector<Learned> layers_;
    std::vector<std::vector<int>> latest_;
};

}  // namespace

NB_MODULE(_replay, module) {
    nb::set_leak_warnings(false);  // a thread that outlives the interpreter keeps what it holds
    using List = std::vector<double>;
    nb::class_<Learned>(module, "Learned")
        .def("__init__",
             [](Learned* self, int context, List decays, List scales, List weights, List powers, double rate,
                double count_rate) {
                 new (self) Learned(context, {decays, scales, weights, powers, rate, count_rate});
             })
        .def("observe", &observe_one);
    nb::class_<LearnedLayers>(module, "LearnedLayers")
        .def("__init__",
             [](LearnedLayers* self, int layers, std::int64_t experts, std::vector<int> context, List decays,
                List scales, List weights, List powers, double rate, double count_rate) {
                 new (self) LearnedLayers(layers, experts, std::move(context),
                                          {decays, scales, weights, powers, rate, count_rate});
             })
        .def("observe", &LearnedLayers::observe);
    module.def("feed_stack", &feed_stack);
    module.def("s3fifo", &s3fifo);
}
