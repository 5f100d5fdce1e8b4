// A small pool of threads: jobs are taken from a counter, idle threads sleep.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "internal.h"

namespace ft {
namespace {
// Between two ops of a run the next jobs are microseconds away: look that often before sleeping.
constexpr int LOOKS = 2000;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}
} // namespace

struct Pool::State {
    int count = 0;
    std::thread workers[FT_MAX_THREADS];
    std::mutex mutex;
    std::condition_variable wake, done;
    std::atomic<uint64_t> round{0}; // of jobs; renewed under the mutex
    std::atomic<bool> quit{false};
    std::atomic<int64_t> next{0};
    std::atomic<int> busy{0};
    int64_t jobs = 0;
    void (*job)(const void *, int64_t, int) = nullptr;
    const void *context = nullptr;

    void work(int thread) {
        for (int64_t i; (i = next.fetch_add(1)) < jobs;) job(context, i, thread);
    }

    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            quit = true;
        }
        wake.notify_all();
        for (int t = 1; t < count; t++) workers[t].join();
    }

    void serve(int thread, void (*enter)()) {
        if (enter) enter();
        uint64_t seen = 0;
        for (;;) {
            for (int i = 0; i < LOOKS && round.load() == seen && !quit; i++) pause();
            if (round.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return round.load() != seen || quit; });
            }
            if (quit) return;
            seen = round.load();
            work(thread);
            if (busy.fetch_sub(1) == 1) {
                std::lock_guard<std::mutex> lock(mutex);
                done.notify_one();
            }
        }
    }
};

Pool::Pool(int threads, void (*enter)()) : state(new State) {
    State *s = state;
    try {
        for (s->count = 1; s->count < threads; s->count++)
            s->workers[s->count] = std::thread([s, enter, t = s->count] { s->serve(t, enter); });
    } catch (...) { // the system's limit of threads: those that run must not outlive their state
        s->stop();
        delete s;
        throw;
    }
}

Pool::~Pool() {
    state->stop();
    delete state;
}

int Pool::threads() const { return state->count; }

void Pool::run(int64_t count, void (*job)(const void *, int64_t, int), const void *context) {
    State &s = *state;
    if (s.count == 1 || count == 1) {
        for (int64_t i = 0; i < count; i++) job(context, i, 0);
        return;
    }
    {
        std::lock_guard<std::mutex> lock(s.mutex);
        s.job = job;
        s.context = context;
        s.jobs = count;
        s.next = 0;
        s.busy = s.count - 1;
        s.round.fetch_add(1);
    }
    s.wake.notify_all();
    s.work(0);
    for (int i = 0; i < LOOKS && s.busy.load(); i++) pause();
    if (s.busy.load()) {
        std::unique_lock<std::mutex> lock(s.mutex);
        s.done.wait(lock, [&] { return s.busy.load() == 0; });
    }
}

} // namespace ft
