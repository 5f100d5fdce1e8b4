#include "tokenizer.h"

#include <algorithm>
#include <math.h>
#include <queue>
#include <stdlib.h>
#include <string.h>

#include "status.h"

namespace ferro_c {
namespace {

constexpr double MORE = 1.1, LESS = 1 / 1.1, MAX_WEIGHT = 100;

// --- the syntax of prompts ----------------------------------------------------------------------

struct Mark { // of the syntax, at a place of the prompt
    enum Kind { NOTHING, ESCAPE, WEIGHT, BRACKET, BREAK } kind = NOTHING;
    size_t end = 0;
    double weight = 0;
};

size_t skip_spaces(const Text &s, size_t i) {
    while (i < s.size() && is_space(s[i])) i++;
    return i;
}

// Decimal digits to the nearest double, whatever the locale's point is.
double number(const std::string &digits, size_t fraction, bool negative) {
    const std::string text = digits + "e-" + std::to_string(fraction);
    const double value = strtod(text.c_str(), nullptr);
    return negative ? -value : value;
}

// ":1.3)" and the like, from the colon on.
bool read_weight(const Text &s, size_t i, Mark &mark) {
    i = skip_spaces(s, i + 1);
    const bool negative = i < s.size() && s[i] == U'-';
    if (i < s.size() && (s[i] == U'-' || s[i] == U'+')) i++;
    std::string digits;
    size_t whole = 0, fraction = 0;
    for (; i < s.size() && digit_of(s[i]) >= 0; i++, whole++) digits += char('0' + digit_of(s[i]));
    if (i < s.size() && s[i] == U'.') {
        i++;
        for (; i < s.size() && digit_of(s[i]) >= 0; i++, fraction++)
            digits += char('0' + digit_of(s[i]));
        if (!whole && !fraction) return false;
    } else if (!whole) {
        return false;
    }
    i = skip_spaces(s, i);
    if (i >= s.size() || s[i] != U')') return false;
    mark.kind = Mark::WEIGHT;
    mark.end = i + 1;
    mark.weight = number(digits, fraction, negative);
    return true;
}

Mark mark_at(const Text &s, size_t i) {
    static const Text WORD = U"BREAK";
    Mark mark;
    mark.end = i + 1;
    if (s[i] == U'\\') {
        mark.kind = Mark::ESCAPE;
        mark.end = std::min(i + 2, s.size());
    } else if (s[i] == U':') {
        read_weight(s, i, mark);
    } else if (s[i] == U'(' || s[i] == U')' || s[i] == U'[' || s[i] == U']') {
        mark.kind = Mark::BRACKET;
    } else if (!s.compare(i, WORD.size(), WORD)) {
        const size_t end = i + WORD.size();
        if ((i == 0 || !is_word(s[i - 1])) && (end == s.size() || !is_word(s[end]))) {
            mark.kind = Mark::BREAK;
            mark.end = end;
        }
    }
    return mark;
}

class Parser {
  public:
    std::vector<Pieces> parse(const Text &s) {
        sections.emplace_back();
        size_t end = 0;
        for (size_t i = 0; i < s.size();) {
            const Mark mark = mark_at(s, i);
            if (mark.kind == Mark::NOTHING) {
                i++;
                continue;
            }
            add(s.substr(end, i - end));
            take(s, i, mark);
            end = i = mark.end;
        }
        add(s.substr(end));
        while (close(U'(', MORE)) {
        }
        while (close(U'[', LESS)) {
        }
        return merged();
    }

  private:
    struct Open {
        char32_t bracket;
        size_t first; // piece inside
    };

    void take(const Text &s, size_t i, const Mark &mark) {
        const Text found = s.substr(i, mark.end - i);
        if (mark.kind == Mark::ESCAPE) return add(found.substr(1));
        if (mark.kind == Mark::BREAK) return sections.emplace_back(), void();
        if (found == U"(" || found == U"[") return opened.push_back({found[0], pieces.size()});
        const bool round = mark.kind == Mark::WEIGHT || found == U")";
        const double weight = mark.kind == Mark::WEIGHT ? mark.weight : round ? MORE : LESS;
        if (!close(round ? U'(' : U'[', weight)) add(found);
    }

    void add(const Text &text) {
        if (text.empty()) return;
        sections.back().push_back(pieces.size());
        pieces.push_back({text, 1.0});
    }

    bool close(char32_t bracket, double weight) {
        for (size_t i = opened.size(); i-- > 0;) {
            if (opened[i].bracket != bracket) continue;
            for (size_t p = opened[i].first; p < pieces.size(); p++) pieces[p].weight *= weight;
            opened.erase(opened.begin() + ptrdiff_t(i));
            return true;
        }
        return false;
    }

    std::vector<Pieces> merged() const { // neighbours of one weight are one piece
        std::vector<Pieces> out;
        for (const std::vector<size_t> &section : sections) {
            out.emplace_back();
            for (size_t index : section) {
                const Piece &piece = pieces[index];
                if (!(fabs(piece.weight) <= MAX_WEIGHT))
                    fail(FERRO_PROMPT, "weight %g in the prompt: it must be from %g to %g",
                         piece.weight, -MAX_WEIGHT, MAX_WEIGHT);
                if (!out.back().empty() && out.back().back().weight == piece.weight)
                    out.back().back().text += piece.text;
                else
                    out.back().push_back(piece);
            }
        }
        return out;
    }

    std::vector<std::vector<size_t>> sections; // indices of pieces
    Pieces pieces;
    std::vector<Open> opened;
};

// --- words --------------------------------------------------------------------------------------

enum class Class { WHITE, LETTER, NUMBER, OTHER };

Class class_of(char32_t c) {
    return is_white(c)    ? Class::WHITE
           : is_letter(c) ? Class::LETTER
           : is_number(c) ? Class::NUMBER
                          : Class::OTHER;
}

size_t run_end(const Text &s, size_t i, Class kind) {
    while (i < s.size() && class_of(s[i]) == kind) i++;
    return i;
}

// Where the word ends that starts at i, which is no white space; 1 if words of two kinds follow.
size_t word_end(const Text &s, size_t i, bool &literal) {
    static const Text LITERALS[] = {U"<|startoftext|>", U"<|endoftext|>"};
    static const Text ENDINGS[] = {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"};
    literal = false;
    for (const Text &text : LITERALS)
        if (!s.compare(i, text.size(), text)) return literal = true, i + text.size();
    for (const Text &text : ENDINGS)
        if (!s.compare(i, text.size(), text)) return i + text.size();
    const Class kind = class_of(s[i]);
    return kind == Class::NUMBER ? i + 1 : run_end(s, i, kind);
}

} // namespace

std::vector<Pieces> parse_prompt(const Text &prompt) { return Parser().parse(prompt); }

// --- tokens -------------------------------------------------------------------------------------

Tokenizer::Tokenizer(const Programs &file, const Encoder &one)
    : programs(file), encoder(one), symbols(file.symbols.data + 512 * (&one - file.encoders.data)) {
    for (uint32_t i = 0; i < encoder.added_count; i++) {
        const Added &token = programs.added[encoder.added + i];
        const std::string text = programs.spelled(token.text);
        added.push_back({from_utf8(text.data(), text.size()), token.id, token.normalized});
    }
}

// Ids of added tokens, the longest of those that begin at one place, and of what is between them.
template <class Rest>
void Tokenizer::around_added(const Text &text, bool normalized, Ids &ids, Rest rest) const {
    size_t end = 0;
    for (size_t i = 0; i < text.size();) {
        const Found *longest = nullptr;
        for (const Found &token : added)
            if (bool(token.normalized) == normalized && token.text[0] == text[i] &&
                (!longest || token.text.size() > longest->text.size()) &&
                !text.compare(i, token.text.size(), token.text))
                longest = &token;
        if (!longest) {
            i++;
            continue;
        }
        rest(text.substr(end, i - end));
        ids.push_back(longest->id);
        end = i = i + longest->text.size();
    }
    rest(text.substr(end));
}

void Tokenizer::encode(const Text &text, Ids &ids) const {
    around_added(text, false, ids, [&](const Text &rest) { encode_normal(rest, ids); });
}

void Tokenizer::encode_normal(const Text &text, Ids &ids) const {
    const Text normal = composed(text);
    Text narrow;
    for (size_t i = 0; i < normal.size(); i++)
        if (!is_white(normal[i]))
            narrow += normal[i];
        else if (i == 0 || !is_white(normal[i - 1]))
            narrow += U' ';
    around_added(lowered(narrow), true, ids, [&](const Text &rest) { encode_words(rest, ids); });
}

void Tokenizer::encode_words(const Text &s, Ids &ids) const {
    for (size_t i = 0; i < s.size();) {
        if (is_white(s[i])) {
            i++;
            continue;
        }
        bool literal;
        const size_t end = word_end(s, i, literal);
        while (i < end) { // a literal is split once more, by kinds
            const size_t stop = literal ? std::min(end, run_end(s, i, class_of(s[i]))) : end;
            std::string bytes;
            for (; i < stop; i++) to_utf8(s[i], bytes);
            encode_word(bytes, ids);
        }
    }
}

const Merge *Tokenizer::find_merge(uint32_t left, uint32_t right) const {
    const Merge *first = programs.merges.data + encoder.merges, *end = first + encoder.merge_count;
    const Merge *found =
        std::lower_bound(first, end, Merge{left, right, 0, 0}, [](const Merge &a, const Merge &b) {
            return a.left != b.left ? a.left < b.left : a.right < b.right;
        });
    return found != end && found->left == left && found->right == right ? found : nullptr;
}

// Byte-pair encoding: of all pairs of neighbours the earliest rank is joined, the leftmost first.
void Tokenizer::encode_word(const std::string &bytes, Ids &ids) const {
    struct Symbol {
        uint32_t id;
        size_t before, after; // neighbours; NOBODY at the ends
        bool gone;
    };
    struct Pair {
        uint32_t rank, result;
        size_t at;
        bool operator<(const Pair &other) const { // the greatest comes first
            return rank != other.rank ? rank > other.rank : at > other.at;
        }
    };
    constexpr size_t NOBODY = SIZE_MAX;
    std::vector<Symbol> word;
    for (size_t i = 0; i < bytes.size(); i++) {
        const bool last = i + 1 == bytes.size();
        uint32_t id = symbols[(last ? 256 : 0) + uint8_t(bytes[i])];
        if (id == NONE) id = encoder.unknown;
        if (id != NONE) word.push_back({id, NOBODY, NOBODY, false});
    }
    std::priority_queue<Pair> waiting;
    const auto consider = [&](size_t at) {
        if (at == NOBODY || word[at].after == NOBODY) return;
        if (const Merge *merge = find_merge(word[at].id, word[word[at].after].id))
            waiting.push({merge->rank, merge->result, at});
    };
    for (size_t i = 0; i < word.size(); i++) {
        word[i].before = i ? i - 1 : NOBODY;
        word[i].after = i + 1 < word.size() ? i + 1 : NOBODY;
    }
    for (size_t i = 0; i < word.size(); i++) consider(i);
    while (!waiting.empty()) {
        const Pair pair = waiting.top();
        waiting.pop();
        Symbol &left = word[pair.at];
        if (left.gone || left.after == NOBODY) continue;
        Symbol &right = word[left.after];
        const Merge *merge = find_merge(left.id, right.id);
        if (!merge || merge->rank != pair.rank) continue; // joined with others meanwhile
        left.id = merge->result;
        right.gone = true;
        left.after = right.after;
        if (left.after != NOBODY) word[left.after].before = pair.at;
        consider(left.before);
        consider(pair.at);
    }
    for (const Symbol &symbol : word)
        if (!symbol.gone) ids.push_back(symbol.id);
}

Tokens Tokenizer::chunks(const std::string &prompt, uint32_t most) const {
    using Weighted = std::vector<std::pair<uint32_t, double>>;
    const std::vector<Pieces> sections = parse_prompt(from_utf8(prompt.data(), prompt.size()));
    const size_t room = encoder.length - 2;
    Tokens found;
    for (size_t s = 0; s < sections.size(); s++) {
        Weighted tokens;
        for (const Piece &piece : sections[s]) {
            Ids ids;
            encode(piece.text, ids);
            for (uint32_t id : ids) tokens.push_back({id, piece.weight});
        }
        size_t pieces = (tokens.size() + room - 1) / room;
        if (!pieces && (s + 1 < sections.size() || !found.chunks)) pieces = 1; // as before a BREAK
        for (size_t p = 0; p < pieces; p++) {
            if (found.chunks == most) {
                found.dropped = true;
                break;
            }
            const auto first = tokens.begin() + ptrdiff_t(std::min(p * room, tokens.size()));
            const auto last = tokens.begin() + ptrdiff_t(std::min((p + 1) * room, tokens.size()));
            frame(found, Weighted(first, last));
        }
    }
    return found;
}

void Tokenizer::frame(Tokens &tokens, const std::vector<std::pair<uint32_t, double>> &row) const {
    const size_t start = tokens.ids.size();
    tokens.chunks++;
    tokens.ids.resize(start + encoder.length, int32_t(encoder.pad));
    tokens.weights.resize(start + encoder.length, 1.0f);
    tokens.ids[start] = int32_t(encoder.start);
    for (size_t i = 0; i < row.size(); i++) {
        tokens.ids[start + 1 + i] = int32_t(row[i].first);
        tokens.weights[start + 1 + i] = float(row[i].second);
    }
    tokens.ids[start + 1 + row.size()] = int32_t(encoder.end);
}

void Tokenizer::pad(Tokens &tokens, uint32_t count) const {
    while (tokens.chunks < count) frame(tokens, {});
}

} // namespace ferro_c
