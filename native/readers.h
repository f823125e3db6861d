// Threads that read records from files into memory, demand before guesses. A record is read in pieces, so that all of
// them share a large one. They know nothing of Python, whose lock they would have to wait for.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace greenroom {

// A record to be read. `ticket` and `access` are the caller's own numbers; no two tickets under way are alike.
struct ReadRequest {
    std::int64_t ticket, access;
    int file;
    std::int64_t offset, nbytes;
    std::uint8_t* to;
    bool speculative;    // it yields to all that is not
    bool forget;         // the page cache is to forget what was read
    std::int64_t crc32;  // what its bytes should have; negative where that is not to be asked
};

constexpr int kEnded = -1, kDiffers = -2;

struct Arrival {
    std::int64_t ticket, access, nbytes;
    std::int64_t left_nbytes;  // of all records that were under way when it came
    int error;                 // 0, the system's number, kEnded or kDiffers
    std::int64_t at;           // byte of the file where that happened
    std::chrono::steady_clock::time_point when;
};

class Readers {
public:
    Readers(int threads, std::int64_t piece_nbytes);
    ~Readers() { close(); }
    Readers(const Readers&) = delete;
    Readers& operator=(const Readers&) = delete;

    // False where the readers are closed.
    bool start(const ReadRequest& request);
    // What has come since the last call; where that is nothing, what comes within `patience`.
    std::vector<Arrival> arrivals(std::chrono::milliseconds patience);
    // Tickets that `arrivals` has still to give out.
    std::vector<std::int64_t> under_way();
    std::int64_t left_nbytes();
    std::int64_t bytes_read();
    bool closed();
    // Drops what has not begun, waits for the rest, and ends the threads.
    void close();

private:
    struct Record {
        ReadRequest request;
        std::int64_t left;  // pieces
        int error;
        std::int64_t at;
    };
    struct Piece {
        std::shared_ptr<Record> record;
        std::int64_t start, nbytes;
    };

    void work(int number);
    Piece next();
    void settle(const Piece& piece, int error, std::int64_t at, std::unique_lock<std::mutex>& lock);

    const std::int64_t piece_nbytes_;
    std::mutex mutex_;  // of all that follows, but for the threads
    std::condition_variable wanted_, arrived_;
    std::deque<Piece> demand_, guesses_;
    std::vector<Arrival> arrivals_;
    std::vector<std::int64_t> reading_;  // tickets that have not arrived
    std::int64_t left_nbytes_ = 0, bytes_read_ = 0;
    bool closing_ = false;
    std::mutex closer_;
    std::vector<std::thread> threads_;
};

}  // namespace greenroom
