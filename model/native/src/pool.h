// Threads, and how they share work.
//
// A job is a list of phases; a phase is a number of pieces. Each thread has a share of them, pieces behind each other, so
// that it reads on in memory where it was; whoever has done his takes from the others'. Who finishes the last piece of a
// phase opens the next: it alone prepares what the pieces need (norms, rounded activations, the router's choice), then
// hands out tickets. So nobody waits for a thread that has no piece in hand: one that the machine gave to another program
// is missed, not waited for.
//
//     ticket = phase's number << 32 | pieces left of a share      phase 7, pieces 3 to 5: 7|3 (3 is next), 7|2, 7|1, 7|0, 8|...
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
    explicit Pool(int threads) : counters_(threads), shares_(threads) {
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
        for (;;) {
            const uint32_t seen = epoch_.load();
            if (!running_.load()) return;
            if (!take_piece(0)) wait(0, seen);
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
    static constexpr int LOOKS = 32;                              // at what was announced, between two looks at the clock

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

    struct alignas(64) Share {
        std::atomic<uint64_t> ticket{0};
        int64_t end = 0;  // the piece behind the last; it stays until all pieces are done
    };

    void serve(int thread) {
        for (;;) {
            const uint32_t seen = epoch_.load();
            if (stop_.load()) return;
            if (!take_piece(thread)) wait(thread, seen);
        }
    }

    bool take_piece(int thread) {
        for (int i = 0; i < threads(); ++i) {
            Share &share = shares_[size_t((thread + i) % threads())];
            uint64_t ticket = share.ticket.load(std::memory_order_acquire);
            while (uint32_t(ticket) != 0) {
                if (!share.ticket.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
                phases_[at_].work(share.end - int64_t(uint32_t(ticket)), thread);
                if (is_last()) open_next();
                return true;
            }
        }
        return false;
    }

    bool is_last() { return left_.fetch_sub(1, std::memory_order_acq_rel) == 1; }

    void open_next() {
        while (++at_ < n_phases_) {
            const int64_t pieces = phases_[at_].open ? phases_[at_].open() : 1;
            if (pieces == 0) continue;
            left_.store(pieces + 1, std::memory_order_relaxed);  // one more, so that nobody opens the next phase before this is done:
            ++number_;
            for (int64_t t = 0; t < threads(); ++t) {
                const int64_t begin = pieces * t / threads(), end = pieces * (t + 1) / threads();
                shares_[size_t(t)].end = end;
                shares_[size_t(t)].ticket.store(number_ << 32 | uint64_t(end - begin), std::memory_order_release);
            }
            announce();
            if (!is_last()) return;
        }
        running_.store(false);
        announce();
    }

    void announce() {
        epoch_.fetch_add(1);
        if (sleepers_.load()) epoch_.notify_all();
    }

    // Until something was announced since `seen`: spin for a while, then sleep. A thread whose waits are long again and again
    // shares its core with other programs: then it sleeps at once, so that they, or its own partners, can run meanwhile.
    void wait(int thread, uint32_t seen) {
        using clock = std::chrono::steady_clock;
        Counters &counters = counters_[size_t(thread)];
        const auto begin = clock::now();
        const auto spin = counters.long_waits < MANY ? SPIN : std::chrono::microseconds(0);
        auto waited = begin - begin;
        add(counters.barriers, 1);
        do {
            for (int i = 0; i < LOOKS && epoch_.load(std::memory_order_relaxed) == seen; ++i) relax();
            waited = clock::now() - begin;
        } while (epoch_.load() == seen && waited < spin);
        if (epoch_.load() == seen) {
            add(counters.sleeps, 1);
            sleepers_.fetch_add(1);
            epoch_.wait(seen);
            sleepers_.fetch_sub(1);
            waited = clock::now() - begin;
        }
        add(counters.waited_ns, std::chrono::nanoseconds(waited).count());
        counters.long_waits = std::clamp(counters.long_waits + (waited < SPIN ? -1 : 1), 0, 2 * MANY);
    }

    alignas(64) std::atomic<int64_t> left_{0};    // pieces of the phase that are not done
    alignas(64) std::atomic<uint32_t> epoch_{0};  // counts what was announced: pieces to take, the end of a job or of the pool
    std::atomic<int> sleepers_{0};
    std::atomic<bool> running_{false}, stop_{false};
    const Phase *phases_ = nullptr;  // these are written while no piece is out
    int64_t n_phases_ = 0, at_ = 0;
    uint64_t number_ = 0;
    std::mutex turn_;
    std::vector<Counters> counters_;
    std::vector<Share> shares_;
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
