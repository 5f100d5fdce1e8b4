// A component's turn: its weights mapped, its arena, its program; all gone with the object.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "programs.h"

namespace ferro_c {

class Mapping { // of a file, read only, or of memory
  public:
    Mapping() = default;
    explicit Mapping(const std::string &path); // throws Error with FERRO_FILE
    static Mapping memory(uint64_t bytes);     // zeros; FERRO_MEMORY
    Mapping(Mapping &&other) noexcept;
    Mapping &operator=(Mapping &&other) noexcept;
    ~Mapping();
    char *data() const { return at; }
    uint64_t bytes() const { return size; }
    bool unchanged() const;               // whether the file still has as many bytes
    Digest hash(uint64_t from = 0) const; // of the file, which does not come into memory for it
    void forget() const;                  // pages that were touched; they come again

  private:
    char *at = nullptr;
    uint64_t size = 0;
    int file = -1;
};

struct Machine { // how programs are run
    uint32_t threads;
    const char *isa;
};

struct Choice { // a way to run a component
    const Offer *offer = nullptr;
    const Program *program = nullptr;
    uint64_t arena = 0, other = 0;
    uint64_t peak() const { return offer->weights + arena + other; }
};

// Bytes of a program's arena with the scratch that its ops need there; throws FERRO_FORMAT.
uint64_t arena_bytes(const Programs &programs, const Program &program, const Machine &machine);

class Stage {
  public:
    Stage(const Programs &programs, const std::string &weights, const Choice &choice,
          const Machine &machine);
    void write(uint32_t name, const float *values);
    void write_ids(const int32_t *ids);
    void read(uint32_t name, float *values) const;
    const float *plane(uint32_t name) const;  // of a planar output that is whole; else null
    void run(const std::atomic<int> *cancel); // throws FERRO_CANCELLED, FERRO_FILE

  private:
    struct Free {
        void operator()(ft_program *program) const { ft_program_free(program); }
    };
    const Programs &programs;
    const Program &program;
    Mapping weights, arena;
    std::unique_ptr<ft_program, Free> engine;
};

} // namespace ferro_c
