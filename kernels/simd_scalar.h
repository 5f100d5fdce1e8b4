// One element at a time: element i of a row of any type.
#pragma once
#include "internal.h"

namespace {

inline float get(const char *p, uint32_t type, int64_t i) {
    if (type == FT_F32) {
        float x;
        memcpy(&x, p + 4 * i, 4);
        return x;
    }
    uint16_t h;
    memcpy(&h, p + 2 * i, 2);
    return type == FT_BF16 ? ft::bf16_to_float(h) : ft::f16_to_float(h);
}

inline void put(char *p, uint32_t type, int64_t i, float x) {
    if (type == FT_F32) {
        memcpy(p + 4 * i, &x, 4);
    } else {
        const uint16_t h = type == FT_BF16 ? ft::float_to_bf16(x) : ft::float_to_f16(x);
        memcpy(p + 2 * i, &h, 2);
    }
}

} // namespace
