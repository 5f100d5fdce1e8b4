// A prompt's syntax and CLIP's byte-pair encoding; runtime/prompts.py and tokenizer.py in C++.
#pragma once
#include <vector>

#include "programs.h"
#include "unicode.h"

namespace ferro_c {

struct Piece { // of a prompt, and what the states of its tokens are multiplied by
    Text text;
    double weight;
};
using Pieces = std::vector<Piece>;

// The sections of a prompt between one BREAK and the next; throws Error for a weight out of range.
std::vector<Pieces> parse_prompt(const Text &prompt);

struct Tokens { // in chunks of what the text encoder reads
    uint32_t chunks = 0;
    bool dropped = false; // the end of the prompt did not fit
    std::vector<int32_t> ids;
    std::vector<float> weights;
};

class Tokenizer {
  public:
    Tokenizer(const Programs &programs, const Encoder &encoder);
    Tokens chunks(const std::string &prompt, uint32_t most) const;
    void pad(Tokens &tokens, uint32_t count) const; // with empty chunks

  private:
    using Ids = std::vector<uint32_t>;
    void encode(const Text &text, Ids &ids) const;
    void encode_normal(const Text &text, Ids &ids) const;
    void encode_words(const Text &text, Ids &ids) const;
    void encode_word(const std::string &bytes, Ids &ids) const;
    const Merge *find_merge(uint32_t left, uint32_t right) const;
    template <class Rest>
    void around_added(const Text &text, bool normalized, Ids &ids, Rest rest) const;
    void frame(Tokens &tokens, const std::vector<std::pair<uint32_t, double>> &row) const;

    struct Found {
        Text text;
        uint32_t id, normalized;
    };
    const Programs &programs;
    const Encoder &encoder;
    const uint32_t *symbols;
    std::vector<Found> added;
};

} // namespace ferro_c
