#!/usr/bin/env python3
"""Writes include/tinyllama/text/unicode_categories.hpp: the letters and numbers as the regular expressions of Hugging Face's tokenizers see them.

The package `tokenizers` itself is asked, character by character, so that the table is the reference's own (0.23: Oniguruma with Unicode 16).
Usage: unicode_categories.py > include/tinyllama/text/unicode_categories.hpp
"""
from tokenizers import Regex, pre_tokenizers

EVERY = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def ranges(pattern):
    splitter = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    members = sorted({ord(c) for word, _ in splitter.pre_tokenize_str("".join(map(chr, EVERY))) for c in word})
    out = []
    for c in members:
        if out and c == out[-1][1] + 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def table(name, pattern):
    rows, line = [], "   "
    found = ranges(pattern)
    for first, last in found:
        item = f" {{{first:#x}, {last:#x}}},"
        if len(line) + len(item) > 148:
            rows.append(line)
            line = "   "
        line += item
    rows.append(line)
    return f"inline constexpr std::array<CodeRange, {len(found)}> {name}{{{{\n" + "\n".join(rows) + "\n}};\n"


print("""// Which characters are letters (L) and numbers (N) in Unicode 16: data, written by tests/tools/unicode_categories.py.
#pragma once

#include <array>

namespace tinyllama::detail {

struct CodeRange {
  char32_t first, last;
};
""")
print(table("letter_ranges", r"\p{L}"))
print(table("number_ranges", r"\p{N}"))
print("}  // namespace tinyllama::detail")
