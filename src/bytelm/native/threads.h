// Threads of our own: any compiler will do for them, and they wait as suits kernels. For some microseconds they spin, then
// they give way. OpenMP's spin for milliseconds, or sleep at every barrier; and torch has a pool of those already.

#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace bytelm {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins for as long as a step of a kernel takes, then lets other threads run, until `done()`.
template <class Done> inline void wait_until(Done done) {
    constexpr int SPINS = 2000;
    for (int i = 0; !done(); i++) {
        if (i < SPINS)
            pause();
        else
            std::this_thread::yield();
    }
}

// Where all threads of a team meet.
class Barrier {
    std::atomic<int> arrived{0};
    std::atomic<uint32_t> round{0};

  public:
    void wait(int team) {
        if (team == 1) return;
        const uint32_t now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
        } else {
            wait_until([&] { return round.load(std::memory_order_acquire) != now; });
        }
    }
};

// Threads that wait for work. It is never destroyed, as they may be waiting when the process ends.
class ThreadPool {
    typedef void (*Work)(void*, int thread);
    struct alignas(64) Worker {
        std::atomic<uint64_t> jobs{0};  // that it was given
        std::atomic<bool> sleeps{false};
        std::mutex mutex;
        std::condition_variable woken;
    };

    std::mutex owner;
    std::vector<std::unique_ptr<Worker>> workers;
    std::atomic<int> left{0};  // workers that are not done
    Work work = nullptr;
    void* argument = nullptr;

    void serve(Worker& me, int thread) {
        for (uint64_t done = 0;; done++) {
            auto given = [&] { return me.jobs.load() != done; };
            // The next step of a model follows within a tenth of a millisecond.
            const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
            for (int i = 1; !given(); i++) {
                pause();
                if (i % 64 == 0 && std::chrono::steady_clock::now() > end) break;
            }
            if (!given()) {
                std::unique_lock<std::mutex> lock(me.mutex);
                me.sleeps.store(true);
                me.woken.wait(lock, given);
                me.sleeps.store(false);
            }
            work(argument, thread);
            left.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    void start(int threads) {
        while (int(workers.size()) < threads - 1) {
            workers.push_back(std::make_unique<Worker>());
            Worker* worker = workers.back().get();
            try {
                std::thread(&ThreadPool::serve, this, std::ref(*worker), int(workers.size())).detach();
            } catch (...) {
                workers.pop_back();
                throw;
            }
        }
    }

  public:
    static ThreadPool& mine() {  // of this process: threads do not survive a fork
        static std::atomic<ThreadPool*> pool{nullptr};
#if !defined(_WIN32)
        static std::atomic<int64_t> process{0};
        const int64_t now = int64_t(getpid());
        if (process.exchange(now) != now) pool.store(nullptr);
#endif
        ThreadPool* found = pool.load();
        if (!found) {
            ThreadPool* fresh = new ThreadPool;
            if (pool.compare_exchange_strong(found, fresh))
                found = fresh;
            else
                delete fresh;
        }
        return *found;
    }

    // work(argument, 0), ..., work(argument, threads - 1) at once. False, and nothing is done, if another thread of the
    // program has the pool, or the system gives no more threads.
    bool run(int threads, Work what, void* with) {
        std::unique_lock<std::mutex> turn(owner, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        try {
            start(threads);
        } catch (const std::system_error&) {
            return false;
        }
        work = what, argument = with;
        left.store(threads - 1);
        for (int i = 0; i < threads - 1; i++) {
            Worker& worker = *workers[i];
            worker.jobs.fetch_add(1);
            if (worker.sleeps.load()) {
                { std::lock_guard<std::mutex> lock(worker.mutex); }
                worker.woken.notify_one();
            }
        }
        what(with, 0);
        wait_until([&] { return left.load(std::memory_order_acquire) == 0; });
        return true;
    }
};

#if defined(BYTELM_TORCH_THREADS)
// OpenMP's threads, where the program has its functions, as with torch on Linux: work that alternates with torch's is
// best done by the threads that torch's waits on. Two pools would take the processor from each other.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;

    static const OpenMP& found() {
        static const OpenMP functions = [] {
            OpenMP found;
#if !defined(_WIN32)
            void* start = dlsym(RTLD_DEFAULT, "GOMP_parallel");
            memcpy(&found.parallel, &start, sizeof start);
#endif
            return found;
        }();
        return functions;
    }
};
#endif

// each(thread, team) on every thread of a team: of `threads`, or of one if the pool is busy.
template <class Each> inline void parallel(int threads, Each each) {
    struct Call {
        Each* each;
        int team;
    } call = {&each, threads};
    auto work = [](void* given, int thread) {
        const Call& call = *(const Call*)given;
        (*call.each)(thread, call.team);
    };
    if (threads < 2 || !ThreadPool::mine().run(threads, work, &call)) each(0, 1);
}

// each(i) for i below `count`; threads take the next `some` of them as they come.
template <class Each> inline void parallel_for(int64_t count, int threads, Each each, int64_t some = 1) {
    if (threads > 1 && count > some) {
        std::atomic<int64_t> next{0};
        auto take = [&](int, int) {
            for (int64_t i; (i = next.fetch_add(some)) < count;)
                for (int64_t end = i + some < count ? i + some : count; i < end; i++) each(i);
        };
#if defined(BYTELM_TORCH_THREADS)
        if (const auto start = OpenMP::found().parallel) {
            start([](void* work) { (*(decltype(take)*)work)(0, 1); }, &take, unsigned(threads), 0);
            return;
        }
#endif
        parallel(threads, take);
    } else {
        for (int64_t i = 0; i < count; i++) each(i);
    }
}

}  // namespace bytelm
