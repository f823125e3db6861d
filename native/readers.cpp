#include "readers.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "crc32.h"

namespace greenroom {
namespace {

// The bytes of a file that lie at `offset`: gives 0 or what went wrong, and where.
int read_piece(int file, std::uint8_t* to, std::int64_t nbytes, std::int64_t& offset) {
    while (nbytes > 0) {
        const ssize_t count = pread(file, to, static_cast<std::size_t>(nbytes), offset);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return errno;
        if (count == 0) return kEnded;
        to += count, offset += count, nbytes -= count;
    }
    return 0;
}

void name_this_thread(int number) {
    char name[16] = "greenroom-read0";  // all that Linux takes
    name[14] = static_cast<char>('0' + number % 10);
#if defined(__APPLE__)
    pthread_setname_np(name);
#else
    pthread_setname_np(pthread_self(), name);
#endif
}

}  // namespace

Readers::Readers(int threads, std::int64_t piece_nbytes) : piece_nbytes_(piece_nbytes) {
    try {
        for (int number = 0; number < threads; ++number) threads_.emplace_back([this, number] { work(number); });
    } catch (...) {  // no more threads to be had: those that there are must end before this is gone
        close();
        throw;
    }
}

bool Readers::start(const ReadRequest& request) {
    const std::int64_t pieces = (request.nbytes + piece_nbytes_ - 1) / piece_nbytes_;
    const auto record = std::make_shared<Record>(Record{request, pieces, 0, 0});
    {
        std::lock_guard lock(mutex_);
        if (closing_) return false;
        auto& queue = request.speculative ? guesses_ : demand_;
        for (std::int64_t start = 0; start < request.nbytes; start += piece_nbytes_)
            queue.push_back({record, start, std::min(piece_nbytes_, request.nbytes - start)});
        reading_.push_back(request.ticket);
        left_nbytes_ += request.nbytes;
    }
    for (std::int64_t piece = 0; piece < pieces; ++piece) wanted_.notify_one();  // no more: each that wakes takes a core
    return true;
}

std::vector<Arrival> Readers::arrivals(std::chrono::milliseconds patience) {
    std::unique_lock lock(mutex_);
    if (patience.count() > 0) arrived_.wait_for(lock, patience, [&] { return !arrivals_.empty() || closing_; });
    std::vector<Arrival> found;
    found.swap(arrivals_);
    return found;
}

std::vector<std::int64_t> Readers::under_way() {
    std::lock_guard lock(mutex_);
    std::vector<std::int64_t> tickets = reading_;
    for (const Arrival& arrival : arrivals_) tickets.push_back(arrival.ticket);
    return tickets;
}

std::int64_t Readers::left_nbytes() {
    std::lock_guard lock(mutex_);
    return left_nbytes_;
}

std::int64_t Readers::bytes_read() {
    std::lock_guard lock(mutex_);
    return bytes_read_;
}

bool Readers::closed() {
    std::lock_guard lock(mutex_);
    return closing_;
}

void Readers::close() {
    std::lock_guard one_closer(closer_);
    {
        std::lock_guard lock(mutex_);
        closing_ = true;
        demand_.clear();
        guesses_.clear();
    }
    wanted_.notify_all();
    arrived_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void Readers::work(int number) {
    name_this_thread(number);
    std::unique_lock lock(mutex_);
    for (;;) {
        wanted_.wait(lock, [&] { return closing_ || !demand_.empty() || !guesses_.empty(); });
        if (closing_) return;
        const Piece piece = next();
        lock.unlock();
        const ReadRequest& request = piece.record->request;
        std::int64_t at = request.offset + piece.start;
        const int error = read_piece(request.file, request.to + piece.start, piece.nbytes, at);
#if defined(POSIX_FADV_DONTNEED)
        if (request.forget) posix_fadvise(request.file, request.offset + piece.start, piece.nbytes, POSIX_FADV_DONTNEED);
#endif
        lock.lock();
        settle(piece, error, at, lock);
    }
}

Readers::Piece Readers::next() {
    auto& queue = demand_.empty() ? guesses_ : demand_;
    Piece piece = std::move(queue.front());
    queue.pop_front();
    return piece;
}

// Counts a piece; whoever reads a record's last one compares its checksum and reports it.
void Readers::settle(const Piece& piece, int error, std::int64_t at, std::unique_lock<std::mutex>& lock) {
    Record& record = *piece.record;
    const ReadRequest& request = record.request;
    if (error != 0 && record.error == 0) record.error = error, record.at = at;
    if (--record.left > 0) return;
    if (record.error == 0 && request.crc32 >= 0) {
        lock.unlock();  // that takes a while
        const bool alike = crc32(request.to, request.nbytes) == static_cast<std::uint32_t>(request.crc32);
        lock.lock();
        if (!alike) record.error = kDiffers, record.at = request.offset;
    }
    left_nbytes_ -= request.nbytes;
    if (record.error == 0) bytes_read_ += request.nbytes;
    reading_.erase(std::find(reading_.begin(), reading_.end(), request.ticket));
    arrivals_.push_back({request.ticket, request.access, request.nbytes, left_nbytes_, record.error, record.at,
                         std::chrono::steady_clock::now()});
    arrived_.notify_all();
}

}  // namespace greenroom
