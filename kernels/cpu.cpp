// Which instruction sets this machine, and its operating system, really run.
#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace ft {
namespace {

// Registers in XCR0: without them a thread switch would lose what they hold.
constexpr uint64_t XMM_YMM = 0x6, OPMASK_ZMM = 0xe0, TILES = 0x60000;

bool bit(uint32_t x, int n) { return x >> n & 1; }

} // namespace

Cpu from_registers(const Registers &r) {
    Cpu cpu = {};
    const bool xsave = r.max_leaf >= 7 && bit(r.leaf1_ecx, 27);
    const auto saves = [&](uint64_t registers) {
        return xsave && (r.xcr0 & registers) == registers;
    };
    const uint32_t leaf7_1_eax = r.leaf7_eax >= 1 ? r.leaf7_1_eax : 0;
    const bool avx = bit(r.leaf1_ecx, 28), fma = bit(r.leaf1_ecx, 12), f16c = bit(r.leaf1_ecx, 29);
    cpu.avx2 = saves(XMM_YMM) && avx && fma && f16c && bit(r.leaf7_ebx, 5);
    cpu.avx512 = cpu.avx2 && saves(OPMASK_ZMM) && bit(r.leaf7_ebx, 16) &&              // F
                 bit(r.leaf7_ebx, 17) && bit(r.leaf7_ebx, 30) && bit(r.leaf7_ebx, 31); // DQ, BW, VL
    cpu.avx512_vnni = cpu.avx512 && bit(r.leaf7_ecx, 11);
    cpu.avx512_bf16 = cpu.avx512_vnni && bit(leaf7_1_eax, 5);
    cpu.amx = cpu.avx512_bf16 && saves(TILES) && bit(r.leaf7_edx, 22) && bit(r.leaf7_edx, 24) &&
              bit(r.leaf7_edx, 25);
    return cpu;
}

#if defined(__x86_64__)

namespace {

Registers registers() {
    Registers r = {};
    uint32_t a = 0, b = 0, c = 0, d = 0;
    __get_cpuid(0, &r.max_leaf, &b, &c, &d);
    __get_cpuid(1, &a, &b, &r.leaf1_ecx, &d);
    __get_cpuid_count(7, 0, &r.leaf7_eax, &r.leaf7_ebx, &r.leaf7_ecx, &r.leaf7_edx);
    __get_cpuid_count(7, 1, &r.leaf7_1_eax, &b, &c, &d);
    if (bit(r.leaf1_ecx, 27)) {
        __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
        r.xcr0 = uint64_t(d) << 32 | a;
    }
    return r;
}

// Linux hands out the tiles' registers on request only, as they make every thread's state larger.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

} // namespace

Cpu detect() {
    Cpu cpu = from_registers(registers());
    cpu.amx = cpu.amx && may_use_tiles();
    return cpu;
}

#elif defined(__aarch64__) && defined(__linux__)

Cpu detect() {
    constexpr int ASIMD = 1, ASIMD_HP = 10, ASIMD_DP = 20; // of HWCAP
    constexpr int I8MM = 13, BF16 = 14;                    // of HWCAP2
    Cpu cpu = {};
    cpu.neon = bit(uint32_t(getauxval(AT_HWCAP)), ASIMD);
    cpu.neon_fp16 = cpu.neon && bit(uint32_t(getauxval(AT_HWCAP)), ASIMD_HP);
    cpu.neon_dot = cpu.neon && bit(uint32_t(getauxval(AT_HWCAP)), ASIMD_DP);
    cpu.neon_bf16 = cpu.neon_dot && bit(uint32_t(getauxval(AT_HWCAP2)), BF16);
    cpu.neon_i8mm = cpu.neon_bf16 && bit(uint32_t(getauxval(AT_HWCAP2)), I8MM);
    return cpu;
}

#elif defined(__aarch64__) && defined(__APPLE__)

namespace {

bool has(const char *name) {
    int value = 0;
    size_t bytes = sizeof value;
    return sysctlbyname(name, &value, &bytes, nullptr, 0) == 0 && value;
}

} // namespace

Cpu detect() {
    Cpu cpu = {};
    cpu.neon = true; // every Mac and iPhone of this architecture
    cpu.neon_fp16 = has("hw.optional.arm.FEAT_FP16");
    cpu.neon_dot = has("hw.optional.arm.FEAT_DotProd");
    cpu.neon_bf16 = cpu.neon_dot && has("hw.optional.arm.FEAT_BF16");
    cpu.neon_i8mm = cpu.neon_bf16 && has("hw.optional.arm.FEAT_I8MM");
    return cpu;
}

#else

Cpu detect() { return {}; }

#endif

} // namespace ft
