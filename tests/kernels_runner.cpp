// Runs cases of the native engine's tests where Python cannot load it: under sanitizers, for
// another machine under an emulator.  The arena and the weights are allocated at exactly their
// size.
//
//   runner isas                      names, each with 1 if this machine runs it
//   runner run ISA CASES RESULTS     the formats are those of tests/kernels_builds.py
//   runner cpu                       dumps of registers from standard input, a line each
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu.h"
#include "ferrotype.h"

namespace {

constexpr uint64_t MOST = 1 << 28; // bytes of an arena

struct Header {
    uint32_t threads, scratch_first;
    uint64_t arena_bytes, weight_bytes;
    ft_op op;
};

enum Status : uint32_t { DONE = 0, REFUSED = 1, CONTRADICTION = 2 };

struct Buffer { // what AddressSanitizer surrounds
    void *data = nullptr;
    explicit Buffer(size_t bytes) {
        if (posix_memalign(&data, 4096, bytes)) abort();
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer &) = delete;
    char *at(size_t i) { return static_cast<char *>(data) + i; }
};

void read_all(FILE *file, void *to, size_t bytes) {
    if (bytes && fread(to, bytes, 1, file) != 1) {
        fprintf(stderr, "the file of cases is too short\n");
        exit(2);
    }
}

void move_tensors(ft_op &op, uint64_t by) {
    for (ft_tensor *t : {&op.out, &op.a, &op.b, &op.c, &op.add})
        if (t->h) t->offset += by;
}

// The arena's tensors and its scratch come in either order, so that each is once at the end.
Status run(Header &h, const char *isa, FILE *cases, std::vector<char> &tensors,
           std::string &message) {
    char line[512] = "";
    tensors.resize(h.arena_bytes);
    read_all(cases, tensors.data(), tensors.size());
    Buffer weights(h.weight_bytes);
    read_all(cases, weights.data, h.weight_bytes);
    uint64_t scratch = ft_op_scratch(&h.op, h.threads, isa);
    const bool malformed = scratch == UINT64_MAX;
    if (malformed || scratch > MOST) scratch = 0;
    const uint64_t start = h.scratch_first ? scratch : 0;
    if (start) move_tensors(h.op, start);
    h.op.scratch = h.scratch_first ? 0 : (h.arena_bytes + 63) / 64 * 64;
    const uint64_t size = h.scratch_first ? start + h.arena_bytes
                          : scratch       ? h.op.scratch + scratch
                                          : h.arena_bytes;
    Buffer arena(size);
    memset(arena.data, 0xff, size);
    memcpy(arena.at(start), tensors.data(), tensors.size());
    ft_program *program =
        ft_program_create(&h.op, 1, size, h.weight_bytes, h.threads, isa, line, sizeof line);
    message = line;
    if (!program) return message.empty() ? CONTRADICTION : REFUSED;
    if (!malformed) ft_program_run(program, arena.data, weights.data, nullptr, nullptr);
    ft_program_free(program);
    memcpy(tensors.data(), arena.at(start), tensors.size());
    return malformed ? CONTRADICTION : DONE;
}

int run_cases(const char *isa, const char *in, const char *out) {
    FILE *cases = fopen(in, "rb"), *results = fopen(out, "wb");
    if (!cases || !results) return 2;
    uint32_t count;
    read_all(cases, &count, sizeof count);
    for (uint32_t i = 0; i < count; i++) {
        Header header;
        read_all(cases, &header, sizeof header);
        fprintf(stderr, "\rcase %u", i); // the last one is the one that a sanitizer stops
        std::vector<char> arena;
        std::string message;
        const uint32_t status = run(header, isa, cases, arena, message);
        const uint32_t length = uint32_t(message.size());
        fwrite(&status, sizeof status, 1, results);
        fwrite(&length, sizeof length, 1, results);
        fwrite(message.data(), 1, length, results);
        if (status == DONE) fwrite(arena.data(), 1, arena.size(), results);
    }
    fclose(cases);
    return fclose(results) ? 2 : 0;
}

int list_isas() {
    printf("%u\n", ft_op_bytes());
    for (uint32_t i = 0; ft_isa_name(i); i++)
        printf("%s %d\n", ft_isa_name(i), ft_isa_supported(i));
    return 0;
}

int list_features() {
    ft::Registers r;
    unsigned long long xcr0;
    while (scanf("%x %x %x %x %x %x %x %llx", &r.max_leaf, &r.leaf1_ecx, &r.leaf7_eax, &r.leaf7_ebx,
                 &r.leaf7_ecx, &r.leaf7_edx, &r.leaf7_1_eax, &xcr0) == 8) {
        r.xcr0 = xcr0;
        const ft::Cpu cpu = ft::from_registers(r);
        printf("%s%s%s%s%s\n", cpu.avx2 ? "avx2 " : "", cpu.avx512 ? "avx512 " : "",
               cpu.avx512_vnni ? "avx512_vnni " : "", cpu.avx512_bf16 ? "avx512_bf16 " : "",
               cpu.amx ? "amx " : "");
    }
    return 0;
}

} // namespace

int main(int count, char **arguments) {
    const std::string command = count > 1 ? arguments[1] : "";
    if (command == "isas") return list_isas();
    if (command == "cpu") return list_features();
    if (command == "run" && count == 5) return run_cases(arguments[2], arguments[3], arguments[4]);
    fprintf(stderr, "usage: runner isas | cpu | run ISA CASES RESULTS\n");
    return 2;
}
