// What the tokenizer knows of characters; unicode_tables.py writes the tables.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string>

namespace ferro_c {

using Text = std::u32string;

bool is_letter(char32_t c); // \p{L}, \p{N} and \s of the `tokenizers` library
bool is_number(char32_t c);
bool is_white(char32_t c);
bool is_space(char32_t c); // \s, \w and \d of Python; digit_of: -1 for none
bool is_word(char32_t c);
int digit_of(char32_t c);

Text composed(const Text &text); // normal form C
Text lowered(const Text &text);  // character by character

Text from_utf8(const char *text, size_t bytes); // throws Error for what is none
void to_utf8(char32_t c, std::string &out);

} // namespace ferro_c
