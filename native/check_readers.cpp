// Readers over files of this program's own, to be built with sanitizers as check.cpp is.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "crc32.h"
#include "readers.h"

using namespace greenroom;

namespace {

int failures = 0, checks = 0;
constexpr std::chrono::milliseconds kPatience{100};
constexpr std::int64_t kPiece = 4096;

void expect(bool holds, const char* what) {
    ++checks;
    if (holds) return;
    ++failures;
    std::printf("FAILED %s\n", what);
}

// A file of random bytes that is gone when this is.
class File {
public:
    explicit File(std::int64_t nbytes) : bytes(static_cast<std::size_t>(nbytes)) {
        std::mt19937 random(static_cast<unsigned>(nbytes));
        for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
        char name[] = "/tmp/check_readers_XXXXXX";
        descriptor = mkstemp(name);
        unlink(name);
        if (descriptor < 0 || write(descriptor, bytes.data(), bytes.size()) != nbytes) std::abort();
    }
    ~File() { close(descriptor); }

    int descriptor;
    std::vector<std::uint8_t> bytes;
};

std::vector<Arrival> all(Readers& readers, std::size_t count) {
    std::vector<Arrival> found;
    while (found.size() < count && !readers.closed())
        for (const Arrival& arrival : readers.arrivals(kPatience)) found.push_back(arrival);
    return found;
}

void check_bytes(int threads) {
    const std::int64_t nbytes = 3 * kPiece + 100, count = 40;
    File file(count * nbytes);
    std::vector<std::vector<std::uint8_t>> to(count, std::vector<std::uint8_t>(nbytes));
    Readers readers(threads, kPiece);
    for (std::int64_t i = 0; i < count; ++i) {
        const auto sum = static_cast<std::int64_t>(crc32(file.bytes.data() + i * nbytes, nbytes));
        expect(readers.start({i, 7, file.descriptor, i * nbytes, nbytes, to[i].data(), i % 3 == 0, i % 2 == 0, i % 2 ? sum : -1}),
               "open readers take requests");
    }
    std::vector<int> seen(count, 0);
    for (const Arrival& it : all(readers, count)) {
        expect(it.error == 0 && it.access == 7 && it.nbytes == nbytes, "a record arrives as it was asked for");
        ++seen[static_cast<std::size_t>(it.ticket)];
    }
    for (std::int64_t i = 0; i < count; ++i) {
        expect(seen[i] == 1, "each record arrives once");
        expect(std::equal(to[i].begin(), to[i].end(), file.bytes.begin() + i * nbytes), "its bytes are the file's");
    }
    expect(readers.left_nbytes() == 0 && readers.under_way().empty(), "nothing is left");
    expect(readers.bytes_read() == count * nbytes, "bytes are counted");
}

void check_errors() {
    const std::int64_t nbytes = 2 * kPiece;
    File file(nbytes);
    std::vector<std::uint8_t> to(3 * nbytes);
    Readers readers(2, kPiece);
    const auto outcome = [&](const ReadRequest& request) {
        readers.start(request);
        return all(readers, 1).at(0);
    };
    expect(outcome({0, 0, file.descriptor, kPiece, nbytes, to.data(), false, false, -1}).error == kEnded, "a file that ends");
    expect(outcome({0, 0, file.descriptor, kPiece, nbytes, to.data(), false, false, -1}).at == nbytes, "where it ends");
    expect(outcome({0, 0, -1, 0, nbytes, to.data(), false, false, -1}).error == EBADF, "a file that is not open");
    const auto sum = static_cast<std::int64_t>(crc32(file.bytes.data(), nbytes));
    expect(outcome({0, 0, file.descriptor, 0, nbytes, to.data(), false, false, sum ^ 1}).error == kDiffers, "another checksum");
    expect(outcome({0, 0, file.descriptor, 0, nbytes, to.data(), false, false, sum}).error == 0, "the right checksum");
    expect(readers.bytes_read() == nbytes, "failures are not counted");
}

// With one reader, which is busy for long, what waits is read in order: demand first.
void check_order() {
    File file(32 << 20);
    std::vector<std::uint8_t> to(file.bytes.size());
    Readers readers(1, 32 << 20);
    const auto start = [&](std::int64_t ticket, std::int64_t nbytes, bool speculative) {
        readers.start({ticket, 0, file.descriptor, 0, nbytes, to.data(), speculative, false, -1});
    };
    start(0, 32 << 20, true);
    for (std::int64_t ticket : {1, 2}) start(ticket, 10, true);
    for (std::int64_t ticket : {3, 4}) start(ticket, 10, false);
    std::vector<std::int64_t> order;
    for (const Arrival& it : all(readers, 5)) order.push_back(it.ticket);
    // the first may not have been taken before demand came
    order.erase(std::find(order.begin(), order.end(), 0));
    expect(order == std::vector<std::int64_t>({3, 4, 1, 2}), "demand overtakes guesses");
}

void check_closing() {
    File file(1 << 20);
    std::vector<std::uint8_t> to(1 << 20);
    Readers readers(2, kPiece);
    for (std::int64_t i = 0; i < 200; ++i)
        readers.start({i, 0, file.descriptor, 0, 5000, to.data() + i * 5000, false, false, -1});
    std::thread other([&] { readers.close(); });
    while (!readers.closed()) readers.arrivals(kPatience);
    readers.close();
    other.join();
    expect(!readers.start({0, 0, file.descriptor, 0, 10, to.data(), false, false, -1}), "closed readers take nothing");
    const auto start = std::chrono::steady_clock::now();
    readers.arrivals(std::chrono::milliseconds(5000));
    expect(std::chrono::steady_clock::now() - start < std::chrono::seconds(4), "nobody waits for closed readers");
}

// Every length up to some vectors', anywhere in memory, in one piece or in two; and one bit that is another.
void check_crc32() {
    const std::string text = "123456789";
    expect(crc32(reinterpret_cast<const std::uint8_t*>(text.data()), 9) == 0xcbf43926u, "the checksum's check value");
    expect(crc32(nullptr, 0) == 0, "of nothing");
    std::mt19937 random(1);
    for (std::int64_t nbytes : {1, 7, 15, 16, 63, 64, 65, 79, 80, 127, 128, 129, 200, 1000, 4096 + 100})
        for (int start : {0, 1}) {
            std::vector<std::uint8_t> bytes(static_cast<std::size_t>(start + nbytes));
            for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
            const std::uint8_t* data = bytes.data() + start;
            const std::uint32_t sum = crc32_by_table(data, nbytes);
            expect(crc32(data, nbytes) == sum, "any way to a checksum gives the table's");
            for (std::int64_t first : {nbytes / 3, nbytes - 1})
                expect(crc32(data + first, nbytes - first, crc32(data, first)) == sum, "a checksum goes on where another ends");
            bytes[static_cast<std::size_t>(start + nbytes / 2)] ^= 16;
            expect(crc32(data, nbytes) != sum, "a bit is noticed");
        }
}

}  // namespace

int main() {
    check_crc32();
    for (int threads : {1, 4}) check_bytes(threads);
    check_errors();
    check_order();
    check_closing();
    std::printf("readers: %d checks, %d failures\n", checks, failures);
    return failures ? 1 : 0;
}
