// The window that weights pass through, and the guard against a file that is cut short.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "ferrotype.h"

namespace ft {

bool can_stream();

class Streamer {
  public:
    Streamer(const ft_range *list, size_t count, uint64_t window);
    ~Streamer();
    void begin(const void *weights, uint64_t bytes); // of a run
    bool wait_for(size_t op); // until all that the op reads is there; false: it cannot be read
    void touch_alone(uint64_t offset, uint64_t bytes);
    void finished(size_t op);
    void end();

  private:
    struct Span { // of addresses, whole pages
        char *start, *end;
    };
    Span pages(size_t index) const; // of a range
    void serve();
    bool bring_in(size_t index);
    void drop(size_t index);
    void drop_done(std::unique_lock<std::mutex> &lock, bool all);

    std::vector<ft_range> ranges;
    uint64_t window = 0, limit = 0, in_use = 0;
    std::vector<size_t> held; // indices of ranges
    char *base = nullptr;
    size_t next = 0, ready = 0, done = 0; // the range to bring; ranges that came; ops that ran
    bool running = false, failed = false, quit = false, idle = true;
    std::mutex mutex;
    std::condition_variable wake, arrived;
    std::thread thread; // last: it uses all of the above
};

bool guard_install(); // for the process; false: not here
class Guard {         // of the mapped weights, for a run
  public:
    Guard(const void *weights, uint64_t bytes);
    ~Guard();
    bool broken() const;

  private:
    int slot = -1;
};

} // namespace ft
