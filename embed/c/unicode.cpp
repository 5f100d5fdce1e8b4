#include "unicode.h"

#include <algorithm>

#include "status.h"

namespace ferro_c {
namespace {

struct Run {
    uint32_t first, last;
};
struct Zero {
    uint32_t code;
};
struct Lower {
    uint32_t code;
    uint32_t to[2]; // 0: fewer
};
struct Decomposed {
    uint32_t code;
    uint32_t to[4];
};
struct Composed {
    uint32_t first, second, both;
};
struct Combining {
    uint32_t first, last, kind;
};

#include "unicode.inc"

template <size_t n> bool in(const Run (&runs)[n], char32_t c) {
    const Run *after = std::upper_bound(
        runs, runs + n, c, [](char32_t code, const Run &run) { return code < run.first; });
    return after != runs && c <= after[-1].last;
}

template <class Row, size_t n> const Row *find(const Row (&rows)[n], char32_t c) {
    const Row *row = std::lower_bound(
        rows, rows + n, c, [](const Row &entry, char32_t code) { return entry.code < code; });
    return row != rows + n && row->code == c ? row : nullptr;
}

// Korean syllables are composed by arithmetic: Unicode, section 3.12.
constexpr char32_t S = 0xac00, L = 0x1100, V = 0x1161, T = 0x11a7;
constexpr char32_t L_COUNT = 19, V_COUNT = 21, T_COUNT = 28, S_COUNT = L_COUNT * V_COUNT * T_COUNT;

uint32_t combining(char32_t c) {
    const Combining *end = COMBINING + sizeof COMBINING / sizeof *COMBINING;
    const Combining *after = std::upper_bound(
        COMBINING, end, c, [](char32_t code, const Combining &run) { return code < run.first; });
    return after != COMBINING && c <= after[-1].last ? after[-1].kind : 0;
}

void decompose(char32_t c, Text &out) {
    if (c >= S && c < S + S_COUNT) {
        const char32_t i = c - S;
        out += L + i / (V_COUNT * T_COUNT);
        out += V + i / T_COUNT % V_COUNT;
        if (i % T_COUNT) out += T + i % T_COUNT;
    } else if (const Decomposed *found = find(DECOMPOSED, c)) {
        for (uint32_t code : found->to)
            if (code) out += char32_t(code);
    } else {
        out += c;
    }
}

char32_t compose(char32_t a, char32_t b) { // 0: they do not join
    if (a >= L && a < L + L_COUNT && b >= V && b < V + V_COUNT)
        return S + ((a - L) * V_COUNT + (b - V)) * T_COUNT;
    if (a >= S && a < S + S_COUNT && (a - S) % T_COUNT == 0 && b > T && b < T + T_COUNT)
        return a + (b - T);
    const Composed *end = COMPOSED + sizeof COMPOSED / sizeof *COMPOSED;
    const Composed *found = std::lower_bound(
        COMPOSED, end, Composed{a, b, 0}, [](const Composed &x, const Composed &y) {
            return x.first != y.first ? x.first < y.first : x.second < y.second;
        });
    return found != end && found->first == a && found->second == b ? found->both : 0;
}

} // namespace

bool is_letter(char32_t c) { return in(LETTERS, c); }
bool is_number(char32_t c) { return in(NUMBERS, c); }
bool is_white(char32_t c) { return in(WHITE, c); }
bool is_space(char32_t c) { return in(SPACES, c); }
bool is_word(char32_t c) { return in(WORDS, c); }

int digit_of(char32_t c) {
    const Zero *end = ZEROS + sizeof ZEROS / sizeof *ZEROS;
    const Zero *after = std::upper_bound(
        ZEROS, end, c, [](char32_t code, const Zero &zero) { return code < zero.code; });
    return after != ZEROS && c <= after[-1].code + 9 ? int(c - after[-1].code) : -1;
}

Text composed(const Text &text) {
    Text apart;
    apart.reserve(text.size());
    for (char32_t c : text) decompose(c, apart);
    for (size_t i = 0; i < apart.size();) { // marks of a letter, in the order of their classes
        size_t end = i;
        while (end < apart.size() && combining(apart[end])) end++;
        std::stable_sort(apart.begin() + ptrdiff_t(i), apart.begin() + ptrdiff_t(end),
                         [](char32_t a, char32_t b) { return combining(a) < combining(b); });
        i = end + 1;
    }
    Text out;
    size_t starter = Text::npos;
    uint32_t before = 0; // class of the last mark that stayed after the starter
    for (char32_t c : apart) {
        const uint32_t kind = combining(c);
        const bool adjacent = starter != Text::npos && starter + 1 == out.size();
        if (starter != Text::npos && (adjacent || (before && before < kind)))
            if (const char32_t both = compose(out[starter], c)) {
                out[starter] = both;
                continue;
            }
        if (!kind) starter = out.size();
        before = kind;
        out += c;
    }
    return out;
}

Text lowered(const Text &text) {
    Text out;
    out.reserve(text.size());
    for (char32_t c : text) {
        const Lower *found = find(LOWER, c);
        if (!found) {
            out += c;
            continue;
        }
        for (uint32_t code : found->to)
            if (code) out += char32_t(code);
    }
    return out;
}

Text from_utf8(const char *text, size_t bytes) {
    static constexpr char32_t LEAST[] = {0, 0, 0x80, 0x800, 0x10000}; // of so many bytes
    Text out;
    for (size_t i = 0; i < bytes;) {
        const uint8_t lead = uint8_t(text[i]);
        const size_t count = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : 4;
        char32_t c = count == 1 ? lead : lead & (0xff >> (count + 1));
        bool sound = (count < 4 || lead >> 3 == 30) && count <= bytes - i;
        for (size_t k = 1; sound && k < count; k++) {
            const uint8_t next = uint8_t(text[i + k]);
            sound = next >> 6 == 2;
            c = c << 6 | (next & 0x3f);
        }
        if (!sound || c < LEAST[count] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000))
            fail(FERRO_PROMPT, "the prompt is not UTF-8 at byte %zu", i);
        out += c;
        i += count;
    }
    return out;
}

void to_utf8(char32_t c, std::string &out) {
    if (c < 0x80) {
        out += char(c);
        return;
    }
    const int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    out += char((0xff00 >> (more + 1) & 0xff) | c >> (6 * more));
    for (int i = more - 1; i >= 0; i--) out += char(0x80 | (c >> (6 * i) & 0x3f));
}

} // namespace ferro_c
