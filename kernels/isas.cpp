// The table of instruction sets: dispatch, tests and benchmarks all loop over it.
#include <initializer_list>

#include "tables.h"

namespace ft {
namespace {

// Of each pair of types the first set of tiles that has it.
Kernels join(const Rows &rows, const WinogradKernels &winograd,
             std::initializer_list<const Tiles *> layers) {
    Kernels k = {};
    for (const Tiles *tiles : layers)
        for (int a = 0; a < 3; a++)
            for (int w = 0; w < 3; w++)
                if (!k.tile[a][w].run) k.tile[a][w] = tiles->of[a][w];
    for (const Tiles *tiles : layers)
        if (!k.narrow.run) k.narrow = tiles->narrow;
    k.finish = rows.finish;
    k.softmax = rows.softmax;
    k.rescale = rows.rescale;
    k.scaled = rows.scaled;
    k.moments = rows.moments;
    k.affine = rows.affine;
    k.layer_norm = rows.layer_norm;
    k.unary = rows.unary;
    k.to_int8 = rows.to_int8;
    k.widen = rows.widen;
    k.winograd = winograd;
    k.burn = (*layers.begin())->burn;
    return k;
}

const Kernels scalar = join(scalar_rows, scalar_winograd, {&scalar_tiles});

#if defined(__x86_64__)
const Kernels avx2 = join(avx2_rows, avx2_winograd, {&avx2_tiles});
const Kernels avx512 = join(avx512_rows, avx512_winograd, {&avx512_tiles, &avx2_tiles});
const Kernels avx512_vnni = join(avx512_rows, avx512_winograd, {&avx512_vnni_tiles, &avx512_tiles});
const Kernels avx512_bf16 = join(avx512_bf16_rows, avx512_bf16_winograd,
                                 {&avx512_bf16_tiles, &avx512_vnni_tiles, &avx512_tiles});
const Kernels amx = join(avx512_bf16_rows, avx512_bf16_winograd,
                         {&amx_tiles, &avx512_bf16_tiles, &avx512_vnni_tiles, &avx512_tiles});
#elif defined(__aarch64__)
const Kernels neon = join(neon_rows, neon_winograd, {&neon_tiles});
const Kernels neon_dot = join(neon_rows, neon_winograd, {&neon_dot_tiles, &neon_tiles});
const Kernels neon_bf16 =
    join(neon_rows, neon_winograd, {&neon_bf16_tiles, &neon_dot_tiles, &neon_tiles});
const Kernels neon_i8mm = join(neon_rows, neon_winograd,
                               {&neon_i8mm_tiles, &neon_bf16_tiles, &neon_dot_tiles, &neon_tiles});
#endif

#if defined(__x86_64__)
bool runs_amx(const Cpu &c) {
#if defined(FERROTYPE_EMULATE_AMX) // tests of the kernel's logic: the tiles are plain C
    return c.avx512_bf16;
#else
    return c.amx;
#endif
}
#endif

const Cpu &cpu() {
    static const Cpu found = detect();
    return found;
}

} // namespace

const Isa isas[] = {
#if defined(__x86_64__)
    {"amx", runs_amx, &amx, amx_enter},
    {"avx512bf16", [](const Cpu &c) { return c.avx512_bf16; }, &avx512_bf16, nullptr},
    {"avx512vnni", [](const Cpu &c) { return c.avx512_vnni; }, &avx512_vnni, nullptr},
    {"avx512", [](const Cpu &c) { return c.avx512; }, &avx512, nullptr},
    {"avx2", [](const Cpu &c) { return c.avx2; }, &avx2, nullptr},
#elif defined(__aarch64__)
    {"neon-i8mm", [](const Cpu &c) { return c.neon_i8mm; }, &neon_i8mm, nullptr},
    {"neon-bf16", [](const Cpu &c) { return c.neon_bf16; }, &neon_bf16, nullptr},
    {"neon-dot", [](const Cpu &c) { return c.neon_dot; }, &neon_dot, nullptr},
    {"neon", [](const Cpu &c) { return c.neon; }, &neon, nullptr},
#endif
    {"scalar", [](const Cpu &) { return true; }, &scalar, nullptr},
};

const int isa_count = sizeof isas / sizeof isas[0];

const Isa *find_isa(const char *name) {
    for (const Isa &isa : isas)
        if ((!name || !strcmp(name, isa.name)) && isa.supported(cpu())) return &isa;
    return nullptr;
}

} // namespace ft
