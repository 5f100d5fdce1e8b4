// libFuzzer's target: a file of programs, whatever it holds, is refused or run inside its memory.
//
//   clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -ffp-contract=off -Ikernels \
//     embed/c/fuzz.cpp embed/c/{programs,sampler,seeds,sha256,stage,tokenizer,unicode}.cpp \
//     kernels/*.cpp -pthread -o fuzz && ./fuzz -max_len=200000 corpus
//
// The file's own hash is not asked for: it would stop every change.  Weights are zeros.
#include <algorithm>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sampler.h"
#include "stage.h"
#include "status.h"
#include "tokenizer.h"

using namespace ferro_c;

namespace {

constexpr uint64_t MOST = 8 << 20; // bytes of an arena and of weights that are worth running
constexpr uint64_t MOST_OPS = 40;  // of a program: the rest is cut off
constexpr uint64_t MOST_WORK = 1 << 16;
const char PROMPT[] = "A (red:1.2) [apple] it's 12 caf\xc3\xa9 BREAK <|endoftext|>";

std::string zeros(uint64_t bytes) { // a file of so many
    static const std::string path = "/tmp/ferro-fuzz-" + std::to_string(getpid());
    static uint64_t size = 0;
    if (size != bytes) {
        FILE *file = fopen(path.c_str(), "wb");
        if (!file || ftruncate(fileno(file), off_t(bytes))) abort();
        fclose(file);
        size = bytes;
    }
    return path;
}

bool is_small(const ft_tensor &t) { return uint64_t(t.h) * t.w * t.c <= MOST_WORK && t.c <= 4096; }

// Whether its ops are done in no time; what they do is checked by ft_program_create in any case.
bool is_quick(const Programs &file, const Program &program) {
    if (program.op_count > MOST_OPS) return false;
    for (uint64_t i = 0; i < program.op_count; i++) {
        const ft_op &op = file.ops[program.op + i];
        for (const ft_tensor *t : {&op.out, &op.a, &op.b, &op.c})
            if (!is_small(*t)) return false;
    }
    return true;
}

void run(const Programs &file, const Offer &offer) {
    Choice choice;
    choice.offer = &offer;
    choice.program = &file.programs[offer.program];
    const Machine machine = {1, nullptr};
    const Program &program = *choice.program;
    const WeightFile &weights = *file.file(program.component);
    choice.arena = arena_bytes(file, program, machine);
    if (choice.arena > MOST || !weights.bytes || weights.bytes > MOST) return;
    Stage stage(file, zeros(weights.bytes), choice, machine);
    std::vector<float> values;
    for (uint32_t i = 0; i < program.port_count; i++) {
        const Port &port = file.ports[program.port + i];
        values.assign(port.total, 0.5f);
        if (port.name == INPUT_IDS)
            stage.write_ids(reinterpret_cast<const int32_t *>(values.data()));
        else if (!port.out)
            stage.write(port.name, values.data());
    }
    if (is_quick(file, program)) stage.run(nullptr);
    for (uint32_t i = 0; i < program.port_count; i++) {
        const Port &port = file.ports[program.port + i];
        values.assign(port.total, 0);
        if (port.out) stage.read(port.name, values.data()), stage.plane(port.name);
    }
}

void use(const Programs &file) {
    for (const Encoder &encoder : file.encoders) {
        try {
            const Tokenizer tokenizer(file, encoder);
            Tokens tokens = tokenizer.chunks(PROMPT, 3);
            tokenizer.pad(tokens, 3);
        } catch (const Error &) {
        }
    }
    uint64_t tried = 0;
    for (const Offer &offer : file.offers) {
        try {
            if (tried++ < 8) run(file, offer);
        } catch (const Error &) {
        }
    }
    for (uint64_t i = 0; i < std::min<uint64_t>(file.tables.count, 4); i++) {
        try {
            Noise noise(i);
            const auto predict = [](const Floats &x, float, Floats &out) { out = x; };
            if (file.tables[i].rows < 100)
                sample(file, file.tables[i], 64, noise, predict,
                       [](uint32_t, const Floats &, const Floats &) {});
        } catch (const Error &) {
        }
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    void *copy = nullptr; // of exactly this size, for AddressSanitizer, and aligned as a map is
    if (bytes < Programs::HASHED || posix_memalign(&copy, 64, bytes)) return 0;
    memcpy(copy, data, bytes);
    Digest hash;
    memcpy(hash.data(), data + 8, hash.size());
    try {
        use(Programs(copy, bytes, hash));
    } catch (const Error &) {
    } catch (const std::bad_alloc &) {
    }
    free(copy);
    return 0;
}
