#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

namespace greenroom {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kPauses = 2000;  // some microseconds: the gap between two products
constexpr auto kSpin = std::chrono::microseconds(50);  // then yielding, so that whoever wants the core has it; then sleep

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Items first, ..., last - 1, of which the owner takes the first and others, when they have none of their own, the last:
// so each thread walks through neighbouring items, and prefetches what it will itself compute.
class alignas(64) Range {
public:
    void set(std::int64_t first, std::int64_t last) { span_.store(pack(first, last), std::memory_order_relaxed); }

    std::int64_t take_first() {
        std::uint64_t span = span_.load(std::memory_order_relaxed);
        while (first(span) < last(span))
            if (span_.compare_exchange_weak(span, span + 1, std::memory_order_relaxed)) return first(span);
        return -1;
    }
    std::int64_t take_last() {
        std::uint64_t span = span_.load(std::memory_order_relaxed);
        while (first(span) < last(span))
            if (span_.compare_exchange_weak(span, span - (std::uint64_t{1} << 32), std::memory_order_relaxed))
                return last(span) - 1;
        return -1;
    }

private:
    static std::uint64_t pack(std::int64_t first, std::int64_t last) {
        return static_cast<std::uint64_t>(last) << 32 | static_cast<std::uint64_t>(first);
    }
    static std::int64_t first(std::uint64_t span) { return static_cast<std::int64_t>(span & 0xffffffff); }
    static std::int64_t last(std::uint64_t span) { return static_cast<std::int64_t>(span >> 32); }

    std::atomic<std::uint64_t> span_{0};
};

using Body = std::function<void(std::int64_t)>;

// A loop is announced as a ticket: its number, how many helpers may still join and how many have. Who joins has changed
// the ticket while it stood, so the loop is there until it says that it is done.
class Pool {
public:
    std::mutex caller;  // held by the thread whose loop runs

    void run(const Body& body, std::int64_t count, int helpers) {
        helpers = grow(helpers);
        body_ = &body;
        places_ = helpers + 1;
        for (int place = 0; place < places_; ++place)
            ranges_[place].set(count * place / places_, count * (place + 1) / places_);
        done_.store(0, std::memory_order_relaxed);
        ++number_;
        ticket_.store(number_ << 32 | static_cast<std::uint64_t>(helpers) << 16);
        if (sleeping_.load() > 0) {
            std::lock_guard lock(mutex_);
            wake_.notify_all();
        }
        work(0);
        const std::uint64_t joined = ticket_.exchange(number_ << 32) & kJoined;  // who has not come has nothing left to do
        // a helper at its last item; where there are more threads than cores, it may be waiting for this very core
        for (int spins = 0; done_.load(std::memory_order_acquire) < joined; ++spins)
            spins < kPauses ? relax() : std::this_thread::yield();
        if (std::exception_ptr thrown = std::exchange(thrown_, nullptr)) std::rethrow_exception(thrown);
    }

private:
    static constexpr std::uint64_t kJoined = 0xffff, kSeat = 1 << 16, kSeats = 0xffff0000;

    // As many helpers as there are, up to `wanted`.
    int grow(int wanted) {
        wanted = std::min(wanted, kMaxThreads - 1);
        for (; threads_ < wanted; ++threads_) try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                break;  // no more threads to be had: fewer do the work
            }
        return std::min(wanted, threads_);
    }

    void work(int place) try {
        const Body& body = *body_;
        for (std::int64_t item; (item = ranges_[place].take_first()) >= 0;) body(item);
        for (int other = 1; other < places_; ++other)
            for (std::int64_t item; (item = ranges_[(place + other) % places_].take_last()) >= 0;) body(item);
    } catch (...) {  // such as too little memory; the caller hears of it when nobody is at work any more
        std::lock_guard lock(mutex_);
        if (!thrown_) thrown_ = std::current_exception();
    }

    [[noreturn]] void serve() {
        for (std::uint64_t seen = 0;;) {
            std::uint64_t ticket = wait(seen);
            while ((ticket & kSeats) != 0 && !ticket_.compare_exchange_weak(ticket, ticket - kSeat + 1)) {
            }
            seen = ticket >> 32;
            if ((ticket & kSeats) == 0) continue;
            work(static_cast<int>(ticket & kJoined) + 1);
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    std::uint64_t wait(std::uint64_t seen) {
        std::uint64_t ticket;
        const auto changed = [&] { return (ticket = ticket_.load()) >> 32 != seen; };
        for (int i = 0; i < kPauses; ++i) {
            if (changed()) return ticket;
            relax();
        }
        const auto deadline = std::chrono::steady_clock::now() + kSpin;
        while (std::chrono::steady_clock::now() < deadline) {
            if (changed()) return ticket;
            std::this_thread::yield();
        }
        std::unique_lock lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, changed);
        --sleeping_;
        return ticket;
    }

    alignas(64) std::atomic<std::uint64_t> ticket_{0};
    alignas(64) std::atomic<std::uint64_t> done_{0};
    std::atomic<int> sleeping_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::exception_ptr thrown_;  // by a body of this loop
    Range ranges_[kMaxThreads];
    const Body* body_ = nullptr;  // these five: the caller's, until the next ticket
    int places_ = 0;
    std::uint64_t number_ = 0;
    int threads_ = 0;
};

std::atomic<Pool*> current{nullptr};

// In a forked child the threads are gone and the locks may be held: leave that pool behind.
void forget() { current.store(nullptr); }

Pool& pool() {
    Pool* found = current.load(std::memory_order_acquire);
    if (found == nullptr) {
        static const int registered = pthread_atfork(nullptr, nullptr, forget);
        static_cast<void>(registered);
        Pool* made = new Pool;
        if (current.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

}  // namespace

void parallel_for(std::int64_t count, int threads, const Body& body) {
    const int helpers = static_cast<int>(std::min<std::int64_t>(threads, count)) - 1;
    if (helpers > 0) {
        Pool& shared = pool();
        if (std::unique_lock lock(shared.caller, std::try_to_lock); lock) return shared.run(body, count, helpers);
    }
    for (std::int64_t item = 0; item < count; ++item) body(item);
}

}  // namespace greenroom
