// SHA-256 (FIPS 180-4).
#pragma once
#include <array>
#include <stddef.h>
#include <stdint.h>

namespace ferro_c {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
  public:
    void add(const void *data, size_t bytes);
    Digest finish();

  private:
    void block(const uint8_t *data);
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t rest[64] = {};
    size_t held = 0;
    uint64_t total = 0;
};

Digest sha256(const void *data, size_t bytes);

} // namespace ferro_c
