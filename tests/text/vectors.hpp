// What the tests of text share: vectors from JSON lines, and small vocabularies.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "tests/support.hpp"
#include "tinyllama/text/tokenizer.hpp"

namespace tinyllama::test {

using nlohmann::json;
using Ids = std::vector<std::int32_t>;


/// The objects of a JSON lines file; fewer than `least` fails the test.
inline std::vector<json> vectors(const std::filesystem::path& path, std::size_t least) {
  std::istringstream in(read_file(path));
  std::vector<json> rows;
  for (std::string line; std::getline(in, line);) rows.push_back(json::parse(line));
  REQUIRE(rows.size() >= least);
  return rows;
}

inline std::string from_hex(const std::string& hex) {
  std::string s;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) s.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return s;
}

/// SentencePiece with byte pieces 3 to 258 and the given pieces from 259 on, the first of them merged first.
inline Vocabulary small_sentencepiece(const std::vector<std::string>& learned) {
  Vocabulary v;
  v.pieces = {{"<unk>", 0, PieceType::unknown}, {"<s>", 0, PieceType::control}, {"</s>", 0, PieceType::control}};
  for (int b = 0; b < 256; ++b) {
    const char* digits = "0123456789ABCDEF";
    v.pieces.push_back({std::string("<0x") + digits[b / 16] + digits[b % 16] + ">", 0, PieceType::byte});
  }
  for (std::size_t i = 0; i < learned.size(); ++i) v.pieces.push_back({learned[i], -static_cast<float>(i), PieceType::normal});
  v.unk = 0, v.bos = 1, v.eos = 2;
  return v;
}

/// Byte-level: ids 0 to 255 are the bytes, 256 and 257 control pieces, then one piece for each merge.
inline Vocabulary small_byte_level(const std::vector<std::pair<std::string, std::string>>& merges) {
  Vocabulary v;
  v.kind = Vocabulary::Kind::byte_level_bpe;
  v.pre_tokenizer = PreTokenizer::gpt2;
  v.add_bos = v.add_space_prefix = false;
  for (const char32_t c : detail::byte_alphabet) {
    std::string s;
    detail::append_utf8(s, c);
    v.pieces.push_back({s, 0, PieceType::normal});
  }
  v.pieces.push_back({"<|im_start|>", 0, PieceType::control});
  v.pieces.push_back({"<|im_end|>", 0, PieceType::control});
  for (const auto& [left, right] : merges) v.pieces.push_back({left + right, 0, PieceType::normal});
  v.merges = merges;
  v.bos = 256, v.eos = 257;
  return v;
}

inline bool is_utf8(std::string_view s) {
  for (std::size_t i = 0; i < s.size();) {
    const auto c = detail::code_point(s, i);
    if (!c.valid) return false;
    i += static_cast<std::size_t>(c.size);
  }
  return true;
}

}  // namespace tinyllama::test
