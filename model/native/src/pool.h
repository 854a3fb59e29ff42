// Threads, and how they share work.
//
// A job is a list of phases; a phase is a number of pieces, which threads take one by one. Whoever finishes the last
// piece of a phase opens the next: it alone prepares what the pieces share (norms, rounded activations, the router's
// choice), then hands out tickets. So nobody waits for a thread that has no piece in hand: one that the machine gave to
// another program is missed, not waited for.
//
//     ticket = phase's number << 32 | pieces left       phase 7 of 3 pieces: 7|3, 7|2 (piece 0 taken), 7|1, 7|0, 8|...
//
// A thread that looks late finds another number, or none left, and its exchange fails: it can neither take a piece
// twice nor touch what a phase that is over has used.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "dbrx.h"

namespace dbrx {

struct Phase {
    std::function<int64_t()> open;                          // run by one thread; gives the number of pieces
    std::function<void(int64_t piece, int thread)> work;    // run for each piece, by any thread
};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    explicit Pool(int threads) : counters_(threads) {
        try {
            for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
        } catch (...) {  // the system gives no more of them
            stop();
            throw;
        }
    }

    ~Pool() { stop(); }

    int threads() const { return int(counters_.size()); }
    dbrx_counters counters(int thread) const {
        const Counters &of = counters_[thread];
        return {of.barriers, of.sleeps, of.waited_ns, of.bytes, of.operations};
    }
    void count(int thread, int64_t bytes, int64_t operations) {
        add(counters_[thread].bytes, bytes);
        add(counters_[thread].operations, operations);
    }

    // Held for a whole call: two threads that call with one pool take turns.
    std::mutex &turn() { return turn_; }

    // Run the phases one after the other; the caller is thread 0.
    template <size_t N>
    void run(const Phase (&phases)[N]) {
        phases_ = phases;
        n_phases_ = N;
        at_ = -1;
        running_.store(true);
        open_next();
        while (running_.load()) {
            if (!take_piece(0)) wait(0, [this] { return !running_.load(); });
        }
    }

    // Memory of at least so many bytes, aligned to a cache line; what it held is lost where it grows.
    std::byte *scratch(size_t bytes) {
        if (bytes > scratch_bytes_) {
            scratch_.reset();
            scratch_bytes_ = 0;
            size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
            scratch_.reset(static_cast<std::byte *>(std::aligned_alloc(4096, rounded)));
            if (!scratch_) throw std::bad_alloc();
            scratch_bytes_ = rounded;
        }
        return scratch_.get();
    }

  private:
    static constexpr auto SPIN = std::chrono::microseconds(100);  // longer than what lies between two layers
    static constexpr int LOOKS = 32;                              // at the ticket, between two looks at the clock

    static constexpr int MANY = 4;                                // long waits, more than short ones

    struct alignas(64) Counters {  // one thread counts; others may look at any time
        std::atomic<int64_t> barriers{0}, sleeps{0}, waited_ns{0}, bytes{0}, operations{0};
        int long_waits = 0;
    };
    static void add(std::atomic<int64_t> &counter, int64_t n) {
        counter.store(counter.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
    }
    struct Free {
        void operator()(std::byte *memory) const { std::free(memory); }
    };

    void stop() {
        stop_.store(true);
        announce();
        for (std::thread &worker : workers_) worker.join();
    }

    static bool left(uint64_t ticket) { return uint32_t(ticket) != 0; }

    void serve(int thread) {
        while (!stop_.load()) {
            if (!take_piece(thread)) wait(thread, [this] { return stop_.load(); });
        }
    }

    bool take_piece(int thread) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        do {
            if (!left(ticket)) return false;
        } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel));
        const int64_t pieces = pieces_;  // they stay until this piece is done
        phases_[at_].work(pieces - int64_t(uint32_t(ticket)), thread);
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) open_next();
        return true;
    }

    void open_next() {
        while (++at_ < n_phases_) {
            pieces_ = phases_[at_].open ? phases_[at_].open() : 1;
            if (pieces_ == 0) continue;
            done_.store(0, std::memory_order_relaxed);
            ticket_.store(++number_ << 32 | uint64_t(pieces_), std::memory_order_release);
            return announce();
        }
        running_.store(false);
        announce();
    }

    void announce() {
        epoch_.fetch_add(1);
        if (sleepers_.load()) epoch_.notify_all();
    }

    // Until there is a piece to take, or `over`: spin for a while, then sleep. A thread whose waits are long again and again
    // shares its core with other programs: then it sleeps at once, so that they, or its own partners, can run meanwhile.
    template <class Over>
    void wait(int thread, Over over) {
        using clock = std::chrono::steady_clock;
        Counters &counters = counters_[thread];
        const auto begin = clock::now();
        const auto spin = counters.long_waits < MANY ? SPIN : std::chrono::microseconds(0);
        auto waited = begin - begin;
        add(counters.barriers, 1);
        for (;;) {
            const uint32_t epoch = epoch_.load();
            for (int i = 0; i < LOOKS; ++i) {
                if (left(ticket_.load(std::memory_order_relaxed)) || over()) {
                    waited = clock::now() - begin;
                    add(counters.waited_ns, std::chrono::nanoseconds(waited).count());
                    counters.long_waits = std::clamp(counters.long_waits + (waited < SPIN ? -1 : 1), 0, 2 * MANY);
                    return;
                }
                relax();
            }
            if (clock::now() - begin < spin) continue;
            add(counters.sleeps, 1);
            sleepers_.fetch_add(1);
            epoch_.wait(epoch);
            sleepers_.fetch_sub(1);
        }
    }

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> running_{false}, stop_{false};
    const Phase *phases_ = nullptr;  // these are written while no piece is out
    int64_t n_phases_ = 0, at_ = 0, pieces_ = 0;
    uint64_t number_ = 0;
    std::mutex turn_;
    std::vector<Counters> counters_;
    std::unique_ptr<std::byte, Free> scratch_;
    size_t scratch_bytes_ = 0;
    std::vector<std::thread> workers_;
};

// Parts of one piece of memory, each at a cache line: first sized without memory, then placed.
class Arena {
  public:
    explicit Arena(std::byte *base) : base_(base) {}
    template <class T>
    T *take(int64_t count) {
        T *at = base_ ? reinterpret_cast<T *>(base_ + used_) : nullptr;
        used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
        return at;
    }
    size_t used() const { return used_; }

  private:
    std::byte *base_;
    size_t used_ = 0;
};

}  // namespace dbrx
