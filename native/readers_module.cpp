// The Python module greenroom.readers._readers: Readers over one piece of memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "readers.h"

namespace nb = nanobind;
using namespace greenroom;

namespace {

constexpr std::chrono::milliseconds kPatience{50};  // between looks at Python's signals

// (ticket, access, bytes, bytes left, seconds ago, error, where)
using Told = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, double, int, std::int64_t>;

// What is read goes to `nbytes` of memory at `address`; whoever owns that lives as long as this does.
class OverMemory {
public:
    OverMemory(nb::object /*owner*/, std::uintptr_t address, std::int64_t nbytes, int threads, std::int64_t piece_nbytes)
        : memory_(reinterpret_cast<std::uint8_t*>(address)), nbytes_(nbytes), process_(getpid()) {
        if (threads < 1 || piece_nbytes < 1) throw std::invalid_argument("at least one reader, and one byte a piece");
        readers_ = std::make_unique<Readers>(threads, piece_nbytes);
    }
    // A forked child has no such threads, and perhaps locks that nobody gives back: it leaves them behind.
    ~OverMemory() {
        if (getpid() != process_) static_cast<void>(readers_.release());
    }

    bool start(std::int64_t ticket, std::int64_t access, int file, std::int64_t offset, std::int64_t nbytes,
               std::int64_t place, bool speculative, bool forget, std::int64_t crc32) {
        if (place < 0 || nbytes < 1 || place > nbytes_ - nbytes) throw std::invalid_argument("outside the memory");
        return readers_->start({ticket, access, file, offset, nbytes, memory_ + place, speculative, forget, crc32});
    }

    // With `wait`, none only where the readers are closed.
    std::vector<Told> arrivals(bool wait) {
        std::vector<Arrival> found = readers_->arrivals(std::chrono::milliseconds(0));
        while (found.empty() && wait && !readers_->closed()) {
            {
                nb::gil_scoped_release release;
                found = readers_->arrivals(kPatience);
            }
            if (found.empty() && PyErr_CheckSignals() != 0) throw nb::python_error();
        }
        std::vector<Told> out;
        const auto now = std::chrono::steady_clock::now();
        for (const Arrival& it : found)
            out.emplace_back(it.ticket, it.access, it.nbytes, it.left_nbytes,
                             std::chrono::duration<double>(now - it.when).count(), it.error, it.at);
        return out;
    }

    std::vector<std::int64_t> under_way() { return readers_->under_way(); }
    std::int64_t left_nbytes() { return readers_->left_nbytes(); }
    std::int64_t bytes_read() { return readers_->bytes_read(); }
    void close() {
        nb::gil_scoped_release release;
        readers_->close();
    }

private:
    std::unique_ptr<Readers> readers_;
    std::uint8_t* memory_;
    std::int64_t nbytes_;
    pid_t process_;
};

}  // namespace

NB_MODULE(_readers, module) {
    nb::set_leak_warnings(false);  // a thread that outlives the interpreter keeps what it holds
    module.attr("ENDED") = kEnded;
    module.attr("DIFFERS") = kDiffers;
    nb::class_<OverMemory>(module, "Readers")
        .def(nb::init<nb::object, std::uintptr_t, std::int64_t, int, std::int64_t>(), nb::keep_alive<1, 2>())
        .def("start", &OverMemory::start)
        .def("arrivals", &OverMemory::arrivals)
        .def("under_way", &OverMemory::under_way)
        .def("left_nbytes", &OverMemory::left_nbytes)
        .def("bytes_read", &OverMemory::bytes_read)
        .def("close", &OverMemory::close);
}
