// Weights that are in memory only around their use, and what happens when their file is cut short.
//
// The weights are mapped from a file.  A thread goes through the ranges that a run reads, in the
// order of their use: it brings in as many as fit the window, and drops those whose last op is
// done.  The pages stay in the system's cache, where it may take them at any time; what is counted
// for the process is the window.
#include "stream.h"

#include <string.h>

#if defined(__unix__) || defined(__APPLE__)
#define FT_POSIX 1
#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ft {

#ifdef FT_POSIX
namespace {

#ifdef __linux__
constexpr int POPULATE_READ = 22; // MADV_POPULATE_READ, which older headers lack
#endif

// Where a page is touched, Linux maps those around it as well, as far as they are in its cache: 64
// KiB, or up to 2 MiB of a file that was just written.  But never what is advised otherwise: so
// what is in use is told apart from the rest, by an advice that only matters if a core is dumped.
void tell_apart(char *start, char *end, bool used) {
#ifdef MADV_DONTDUMP
    madvise(start, size_t(end - start), used ? MADV_DONTDUMP : MADV_DODUMP);
#else
    (void)start, (void)end, (void)used;
#endif
}

char *floor_to(char *p, uintptr_t unit) { return p - reinterpret_cast<uintptr_t>(p) % unit; }
char *ceil_to(char *p, uintptr_t unit) { return floor_to(p + unit - 1, unit); }

uintptr_t page_bytes() {
    static const uintptr_t bytes = uintptr_t(sysconf(_SC_PAGESIZE));
    return bytes;
}

// Bring pages in; false if the file no longer has them.
bool bring(char *start, char *end) {
#ifdef __linux__
    for (int tries = 0; tries < 3; tries++) {
        if (!madvise(start, size_t(end - start), POPULATE_READ)) return true;
        if (errno != EINTR && errno != EAGAIN) break;
    }
    if (errno == EFAULT) return false;
#endif
    for (const volatile char *p = start; p < end; p += page_bytes()) (void)*p; // as it always was
    return true;
}

} // namespace

bool can_stream() { return true; }

Streamer::Streamer(const ft_range *list, size_t count, uint64_t most)
    : ranges(list, list + count), window(most), held(count), thread([this] { serve(); }) {}

Streamer::~Streamer() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        quit = true;
    }
    wake.notify_all();
    thread.join();
}

void Streamer::begin(const void *weights, uint64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    base = static_cast<char *>(const_cast<void *>(weights));
    limit = bytes;
    next = done = 0;
    ready = 0;
    failed = false;
    running = true;
    wake.notify_all();
}

bool Streamer::wait_for(size_t op) {
    std::unique_lock<std::mutex> lock(mutex);
    arrived.wait(lock,
                 [&] { return failed || ready == ranges.size() || ranges[ready].first > op; });
    return !failed;
}

void Streamer::finished(size_t op) {
    std::lock_guard<std::mutex> lock(mutex);
    done = op + 1;
    wake.notify_all();
}

void Streamer::end() {
    std::unique_lock<std::mutex> lock(mutex);
    running = false;
    wake.notify_all();
    arrived.wait(lock, [&] { return idle; }); // whatever it held is dropped
    madvise(base, limit, MADV_DONTNEED);      // and what was touched beside that
    tell_apart(base, base + limit, false);
}

// What an op is about to read that is in no range comes without the pages around it.
void Streamer::touch_alone(uint64_t offset, uint64_t bytes) {
    char *const start = base + offset;
    tell_apart(floor_to(start, page_bytes()), ceil_to(start + bytes, page_bytes()), true);
}

Streamer::Span Streamer::pages(size_t index) const {
    char *const start = base + ranges[index].offset;
    return {floor_to(start, page_bytes()), ceil_to(start + ranges[index].bytes, page_bytes())};
}

// Drop the pages of a range, but for what ranges in use cover.
void Streamer::drop(size_t index) {
    const Span own = pages(index);
    for (char *from = own.start; from < own.end;) {
        char *end = own.end; // of pages that nobody uses
        bool used = false;
        for (const size_t other : held) {
            const Span span = pages(other);
            if (span.start <= from && from < span.end) from = span.end, used = true;
            if (span.start > from && span.start < end) end = span.start;
        }
        if (used) continue;
        madvise(from, size_t(end - from), MADV_DONTNEED);
        tell_apart(from, end, false);
        from = end;
    }
}

// Drop what is done with; called with the mutex, which is free while the system works.
void Streamer::drop_done(std::unique_lock<std::mutex> &lock, bool all) {
    for (size_t i = 0; i < held.size();) {
        const size_t index = held[i];
        if (!all && ranges[index].last >= done) {
            i++;
            continue;
        }
        held.erase(held.begin() + long(i));
        lock.unlock();
        drop(index);
        lock.lock();
        in_use -= ranges[index].bytes;
    }
}

// Bring a range in, while the next one is on its way from the disk; without the mutex.
bool Streamer::bring_in(size_t index) {
    if (index + 1 < ranges.size()) {
        const Span next_one = pages(index + 1);
        madvise(next_one.start, size_t(next_one.end - next_one.start), MADV_WILLNEED);
    }
    const Span own = pages(index);
    tell_apart(own.start, own.end, true);
    return bring(own.start, own.end);
}

void Streamer::serve() {
    std::unique_lock<std::mutex> lock(mutex);
    held.clear(); // its room is there: a run allocates nothing
    for (;;) {
        idle = !running;
        if (idle) arrived.notify_all();
        wake.wait(lock, [&] { return running || quit; });
        if (quit) return;
        idle = false;
        while (running && !failed) {
            const size_t seen = done; // it may go on while the system drops
            drop_done(lock, false);
            if (next == ranges.size() || in_use + ranges[next].bytes > window) {
                wake.wait(lock, [&] { return done != seen || !running; });
                continue;
            }
            const size_t index = next++;
            in_use += ranges[index].bytes;
            held.push_back(index);
            lock.unlock();
            const bool found = bring_in(index);
            lock.lock();
            if (!found) failed = true;
            ready = index + 1;
            arrived.notify_all();
        }
        wake.wait(lock, [&] { return !running; }); // after a failure, until the run has noticed
        drop_done(lock, true);
    }
}

// --- a file that was cut short ------------------------------------------------------------------

namespace {

constexpr int MOST_GUARDED = 32;
struct Guarded {
    std::atomic<char *> start{nullptr};
    std::atomic<uint64_t> bytes{0};
    std::atomic<bool> broken{false};
};
Guarded guarded[MOST_GUARDED];
struct sigaction before;
std::atomic<bool> installed{false};

// A page that the file no longer has: zeros take its place, and the runs that read it end.
bool replace_page(char *address) {
    bool ours = false;
    for (Guarded &g : guarded) {
        char *start = g.start.load();
        if (!start || address < start || address >= start + g.bytes.load()) continue;
        g.broken = ours = true;
    }
    if (!ours) return false;
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)); // no static: this is a signal handler
    void *at = floor_to(address, page);
    return mmap(at, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at;
}

void on_bus_error(int number, siginfo_t *info, void *context) {
    const bool fault = info->si_code == BUS_ADRERR; // else si_addr may be something else
    if (fault && replace_page(static_cast<char *>(info->si_addr))) return;
    if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(number, info, context);
    const bool sent = info->si_code <= 0; // by a process: it does not come again by itself
    if (before.sa_handler == SIG_IGN && sent) return;
    if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        return before.sa_handler(number);
    signal(SIGBUS, SIG_DFL); // the fault comes again and ends the process
    if (sent) raise(number);
}

} // namespace

bool guard_install() {
    if (installed.exchange(true)) return true;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return !sigaction(SIGBUS, &action, &before);
}

Guard::Guard(const void *weights, uint64_t bytes) {
    if (!installed || !bytes) return;
    for (slot = 0; slot < MOST_GUARDED; slot++) {
        char *nothing = nullptr;
        if (!guarded[slot].start.compare_exchange_strong(
                nothing, static_cast<char *>(const_cast<void *>(weights))))
            continue;
        guarded[slot].broken = false;
        guarded[slot].bytes = bytes;
        return;
    }
    slot = -1;
}

Guard::~Guard() {
    if (slot < 0) return;
    guarded[slot].bytes = 0;
    guarded[slot].start = nullptr;
}

bool Guard::broken() const { return slot >= 0 && guarded[slot].broken; }

#else // without mmap there is nothing to stream

bool can_stream() { return false; }
Streamer::Streamer(const ft_range *, size_t, uint64_t) {}
Streamer::~Streamer() {}
void Streamer::begin(const void *, uint64_t) {}
bool Streamer::wait_for(size_t) { return true; }
void Streamer::touch_alone(uint64_t, uint64_t) {}
void Streamer::finished(size_t) {}
void Streamer::end() {}
bool guard_install() { return false; }
Guard::Guard(const void *, uint64_t) {}
Guard::~Guard() {}
bool Guard::broken() const { return false; }

#endif

} // namespace ft
