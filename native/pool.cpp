#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace greenroom {
namespace {

constexpr int kMaxThreads = 256;
constexpr auto kSpin = std::chrono::microseconds(10);  // covers the gap between an expert's two products; longer starves others

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Loop {
    const std::function<void(std::int64_t)>* body;
    std::int64_t count;
    std::atomic<std::int64_t> next{0};
    int seats;                    // helpers that may still join; under the pool's lock
    std::atomic<int> working{0};  // helpers that joined and are not done

    void work() {
        for (std::int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*body)(item);
    }
};

class Pool {
public:
    std::mutex caller;  // held by the thread whose loop runs

    void run(Loop& loop, int helpers) {
        grow(helpers);
        loop.seats = std::min(helpers, threads_);
        bool sleepers;
        {
            std::lock_guard lock(mutex_);
            loop_ = &loop;
            epoch_.fetch_add(1, std::memory_order_release);
            sleepers = sleeping_ > 0;
        }
        if (sleepers) wake_.notify_all();
        loop.work();
        {
            std::lock_guard lock(mutex_);
            loop_ = nullptr;  // who has not joined by now has nothing left to do
        }
        // a helper at its last item; where there are more threads than cores, it may be waiting for this very core
        for (int spins = 0; loop.working.load(std::memory_order_acquire) > 0; ++spins)
            spins < 256 ? relax() : std::this_thread::yield();
    }

private:
    void grow(int wanted) {
        for (wanted = std::min(wanted, kMaxThreads); threads_ < wanted; ++threads_) try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;  // no more threads to be had: fewer do the work
            }
    }

    [[noreturn]] void serve() {
        std::uint64_t seen = 0;
        for (;;) {
            wait(seen);
            Loop* loop = nullptr;
            {
                std::lock_guard lock(mutex_);
                seen = epoch_.load(std::memory_order_relaxed);
                if (loop_ != nullptr && loop_->seats > 0) {
                    loop = loop_;
                    --loop->seats;
                    loop->working.fetch_add(1, std::memory_order_relaxed);
                }
            }
            if (loop == nullptr) continue;
            loop->work();
            loop->working.fetch_sub(1, std::memory_order_release);
        }
    }

    void wait(std::uint64_t seen) {
        const auto deadline = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 32; ++i) {
                if (epoch_.load(std::memory_order_acquire) != seen) return;
                relax();
            }
        } while (std::chrono::steady_clock::now() < deadline);
        std::unique_lock lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
        --sleeping_;
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<std::uint64_t> epoch_{0};
    Loop* loop_ = nullptr;
    int sleeping_ = 0;
    int threads_ = 0;  // touched by the caller alone
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

void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& body) {
    const int helpers = static_cast<int>(std::min<std::int64_t>(threads, count)) - 1;
    Loop loop{&body, count, {}, 0, {}};
    if (helpers > 0) {
        Pool& shared = pool();
        if (std::unique_lock lock(shared.caller, std::try_to_lock); lock) return shared.run(loop, helpers);
    }
    loop.work();
}

}  // namespace greenroom
