// The file that runtime/compiled.py writes: records in sections, all checked when it is opened.
#pragma once
#include <stdint.h>
#include <string>
#include <vector>

#include "ferro.h"
#include "ferrotype.h"
#include "sha256.h"

namespace ferro_c {

constexpr uint32_t NONE = 0xffffffff;

// Records lie in the file as here: little-endian, without gaps.
struct Span { // of the section of texts
    uint32_t at, bytes;
};

enum Flag : uint32_t {
    ZERO_NEGATIVE = 1,   // an empty negative prompt means zeros
    EMBEDS_GUIDANCE = 2, // the U-Net takes the scale as an input
    POOLED = 4,
    TIME_IDS = 8,
    CHUNKS = 16,  // the U-Net reads text of any length
    LIMITED = 32, // guidance_low and _high hold
};

struct Model {
    uint32_t channels, side; // of latents; pixels that one stands for, each way
    uint32_t width, height, steps;
    Span sampler;
    uint32_t flags;
    uint32_t states, pooled; // channels that the U-Net reads
    uint32_t condition;      // numbers of timestep_cond
    Span name;
    uint32_t reserved;
    double guidance, guidance_low, guidance_high;
    float scaling, reserved2;
};

struct Encoder {
    uint32_t component, length;
    uint32_t start, end, pad, unknown; // ids
    uint32_t added, added_count, merges, merge_count;
    uint32_t states, pooled; // channels; 0: returns none
    uint32_t restore;        // weights leave the mean as it is
    uint32_t reserved;
};

struct Added { // a token that is found in the text itself, or in what its words are looked for in
    Span text;
    uint32_t id, normalized;
};

struct Merge {
    uint32_t left, right, rank, result;
};

struct WeightFile {
    uint32_t component;
    Span path;
    uint32_t reserved;
    uint64_t bytes;
    uint8_t sha256[32];
};

struct Program {
    uint32_t component, width, height, chunks; // width 0: of any size
    uint32_t rows;
    uint32_t port, port_count, reserved;
    uint64_t op, op_count, range, range_count;
    uint64_t arena; // bytes, without scratch; ft_op.scratch is where an op's may start
};

struct Offer { // a way to run a component, in the order of speed
    uint32_t program, reserved;
    uint64_t window, weights, other; // bytes; window 0: all weights stay
};

enum PortName : uint32_t {
    INPUT_IDS,
    SAMPLE,
    TIMESTEP,
    HIDDEN_STATES,
    TEXT_EMBEDS,
    TIME_NUMBERS,
    TIMESTEP_COND,
    LATENT_SAMPLE,
    STATES,
    POOLED_STATES,
    OUT_SAMPLE,
    PICTURE,
    PORT_NAMES,
};

struct Port { // an array in the arena
    uint32_t name, type, planar, channels, pixel, pixels;
    float shift; // added to an input; what an output has beyond the arena's
    uint32_t out;
    uint64_t offset, total; // total: elements of the array
};

struct Table {
    Span sampler;
    uint32_t steps, row, rows;
    float start_noise;
};

struct Row { // runtime/samplers.py
    float timestep, scale, a, b, cx, c0, c1, c2, cn;
};

template <class T> struct Section {
    const T *data = nullptr;
    uint64_t count = 0;
    const T &operator[](uint64_t i) const { return data[i]; }
    const T *begin() const { return data; }
    const T *end() const { return data + count; }
    bool holds(uint64_t first, uint64_t many) const {
        return first <= count && many <= count - first;
    }
};

class Programs {
  public:
    // Of bytes that start at a multiple of 64 and stay, and the SHA-256 of those from HASHED on.
    // Throws Error with FERRO_FORMAT.
    Programs(const void *data, uint64_t bytes, const Digest &hash);
    static constexpr uint64_t HASHED = 40;

    Section<char> text;
    const Model *model = nullptr;
    Section<Model> models;
    Section<Encoder> encoders;
    Section<Added> added;
    Section<Merge> merges;
    Section<double> frequencies;
    Section<float> preview;
    Section<WeightFile> files;
    Section<Program> programs;
    Section<Offer> offers;
    Section<Port> ports;
    Section<ft_op> ops;
    Section<ft_range> ranges;
    Section<Table> tables;
    Section<Row> rows;
    Section<uint32_t> symbols; // by encoder: of 256 bytes inside a word, then at its end
    Digest identity;           // of the bundle

    std::string spelled(const Span &span) const { return {text.data + span.at, span.bytes}; }
    const Encoder *encoder(uint32_t component) const;
    const WeightFile *file(uint32_t component) const;
    const Port *port(const Program &program, uint32_t name) const;
    uint32_t length() const { return encoders[0].length; } // tokens of a chunk

  private:
    template <class T> void take(Section<T> &section, const char *name);
    void check_model() const;
    void check_encoder(const Encoder &encoder) const;
    void check_program(const Program &program) const;
    void check_port(const Program &program, const Port &port) const;
    uint64_t elements(const Program &program, uint32_t name) const;
    const uint8_t *start;
    uint64_t size;
    uint32_t taken = 0;
};

} // namespace ferro_c
