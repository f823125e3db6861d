// Threads that wait for loops to share. One pool per process, made on first use; never destroyed, so that an exit or
// a fork while it works cannot hang: a forked child makes its own.
#pragma once

#include <cstdint>
#include <functional>

namespace greenroom {

// Calls body(item) for every item below count, on up to `threads` threads, this one among them; returns when all are
// done. Items are taken and finish in any order. A caller that finds the pool at work for another computes alone.
// What a body throws comes out here, the first of several; then not every item has been computed.
void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& body);

}  // namespace greenroom
