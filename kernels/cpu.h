// What a machine has, from what its identification registers say.
#pragma once
#include <stdint.h>

#include "internal.h"

namespace ft {

struct Registers { // of x86: CPUID, and XGETBV where CPUID says that the OS has turned it on
    uint32_t max_leaf;
    uint32_t leaf1_ecx;
    uint32_t leaf7_eax, leaf7_ebx, leaf7_ecx, leaf7_edx; // leaf 7.0; eax: its highest subleaf
    uint32_t leaf7_1_eax;
    uint64_t xcr0; // registers that the OS saves
};

Cpu from_registers(const Registers &registers);

} // namespace ft
