// tokenizer.model: SentencePiece's model file, a protocol buffer, read into a Vocabulary.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "tinyllama/error.hpp"
#include "tinyllama/text/vocabulary.hpp"

namespace tinyllama {
namespace detail {

/// The fields of one protocol buffer message, in order. Throws Error where the bytes are none.
class ProtobufReader {
 public:
  struct Field {
    std::uint64_t number;
    unsigned wire;            // 0 varint, 1 eight bytes, 2 bytes, 5 four bytes
    std::uint64_t value = 0;  // of wire types 0, 1 and 5
    std::string_view bytes;   // of wire type 2
  };

  ProtobufReader(std::string_view bytes, std::string_view file, std::string message) : rest_(bytes), file_(file), message_(std::move(message)) {}

  std::optional<Field> next() {
    if (rest_.empty()) return std::nullopt;
    const std::uint64_t tag = varint();
    Field f{tag >> 3, static_cast<unsigned>(tag & 7), 0, {}};
    if (f.number == 0) throw damaged("a field number above 0", "0");
    switch (f.wire) {
      case 0: f.value = varint(); break;
      case 1: f.value = fixed(8); break;
      case 5: f.value = fixed(4); break;
      case 2: f.bytes = take(varint()); break;
      default: throw damaged("a wire type of 0, 1, 2 or 5", std::to_string(f.wire));
    }
    return f;
  }

  // Typed access; a field of that number with another wire type is an Error.
  std::string_view bytes(const Field& f) const { return of_wire(f, 2), f.bytes; }
  std::uint64_t integer(const Field& f) const { return of_wire(f, 0), f.value; }
  bool boolean(const Field& f) const { return integer(f) != 0; }
  float real(const Field& f) const { return of_wire(f, 5), std::bit_cast<float>(static_cast<std::uint32_t>(f.value)); }

 private:
  Error damaged(std::string_view expected, std::string_view found) const { return Error(file_, message_, expected, found); }
  void of_wire(const Field& f, unsigned wire) const {
    if (f.wire != wire) throw damaged("wire type " + std::to_string(wire) + " for field " + std::to_string(f.number), std::to_string(f.wire));
  }
  std::string_view take(std::uint64_t n) {
    if (n > rest_.size()) throw damaged(std::to_string(n) + " bytes", std::to_string(rest_.size()) + " (truncated or damaged)");
    const std::string_view part = rest_.substr(0, static_cast<std::size_t>(n));
    rest_.remove_prefix(part.size());
    return part;
  }
  std::uint64_t fixed(std::size_t n) {
    const std::string_view b = take(n);
    std::uint64_t v = 0;
    for (std::size_t i = 0; i < n; ++i) v |= static_cast<std::uint64_t>(static_cast<unsigned char>(b[i])) << (8 * i);
    return v;
  }
  std::uint64_t varint() {
    std::uint64_t v = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto b = static_cast<unsigned char>(take(1)[0]);
      v |= static_cast<std::uint64_t>(b & 0x7fu) << shift;
      if (b < 0x80) return v;
    }
    throw damaged("a varint of at most 10 bytes", "a longer one");
  }
  std::string_view rest_, file_;
  std::string message_;
};

}  // namespace detail

/// Reads the bytes of a tokenizer.model; `name` is for messages. Field numbers are those of sentencepiece_model.proto.
/// Throws Error for a damaged file, and for what is not BPE with the identity normaliser, naming it.
inline Vocabulary read_tokenizer_model(std::string_view bytes, std::string_view name) {
  using Reader = detail::ProtobufReader;
  Vocabulary v;
  v.source = name;
  std::string bos = "<s>", eos = "</s>", pad = "<pad>";
  std::uint64_t model_type = 1;                                             // proto defaults
  bool byte_fallback = false, extra_spaces = true, escape = true, prefix = true, suffix = false;

  const auto piece = [&](std::string_view message) {
    Piece p;
    std::uint64_t type = 1;
    Reader r(message, name, "piece " + std::to_string(v.pieces.size()));
    while (const auto f = r.next()) {
      if (f->number == 1) p.text = r.bytes(*f);
      if (f->number == 2) p.score = r.real(*f);
      if (f->number == 3) type = r.integer(*f);
    }
    const std::string subject = "piece " + std::to_string(v.pieces.size());
    if (p.text.empty()) throw Error(name, subject, "a text", "none");
    if (type < 1 || type > 6) throw Error(name, subject, "a type from 1 to 6", std::to_string(type));
    p.type = static_cast<PieceType>(type);
    if (p.type == PieceType::unknown) {
      if (v.unk >= 0) throw Error(name, subject, "one unknown piece", "a second one");
      v.unk = static_cast<std::int32_t>(v.pieces.size());
    }
    v.pieces.push_back(std::move(p));
  };
  const auto trainer = [&](std::string_view message) {
    Reader r(message, name, "trainer_spec");
    while (const auto f = r.next()) switch (f->number) {
        case 3: model_type = r.integer(*f); break;
        case 24: suffix = r.boolean(*f); break;
        case 35: byte_fallback = r.boolean(*f); break;
        case 44: v.unk_surface = r.bytes(*f); break;
        case 46: bos = r.bytes(*f); break;
        case 47: eos = r.bytes(*f); break;
        case 48: pad = r.bytes(*f); break;
        default: break;
      }
  };
  const auto normaliser = [&](std::string_view message, std::string_view which) {
    Reader r(message, name, std::string(which));
    while (const auto f = r.next()) {
      if (f->number == 2 && !r.bytes(*f).empty())
        throw Error(name, which, "the identity",
                    "a character map of " + std::to_string(f->bytes.size()) + " bytes (nmt_nfkc and the like are not supported)");
      if (f->number == 3) prefix = r.boolean(*f);
      if (f->number == 4) extra_spaces = r.boolean(*f);
      if (f->number == 5) escape = r.boolean(*f);
    }
  };

  Reader model(bytes, name, "model");
  while (const auto f = model.next()) {
    if (f->number == 1) piece(model.bytes(*f));
    if (f->number == 2) trainer(model.bytes(*f));
    if (f->number == 3) normaliser(model.bytes(*f), "normalizer_spec");
    if (f->number == 5) {
      const bool kept[] = {prefix, extra_spaces, escape};  // the denormaliser has a map only
      normaliser(model.bytes(*f), "denormalizer_spec");
      prefix = kept[0], extra_spaces = kept[1], escape = kept[2];
    }
  }
  if (v.pieces.empty()) throw Error(name, "model", "pieces", "none: not a SentencePiece model");
  if (model_type != 2) {
    constexpr std::string_view types[] = {"unigram", "BPE", "word", "char"};
    throw Error(name, "model type", "BPE", model_type >= 1 && model_type <= 4 ? std::string(types[model_type - 1]) : std::to_string(model_type));
  }
  if (extra_spaces) throw Error(name, "normalizer_spec", "remove_extra_whitespaces = false", "true (not supported)");
  if (!escape) throw Error(name, "normalizer_spec", "escape_whitespaces = true", "false (not supported)");
  if (suffix) throw Error(name, "trainer_spec", "treat_whitespace_as_suffix = false", "true (not supported)");
  if (v.unk < 0) throw Error(name, "model", "an unknown piece", "none");
  v.byte_fallback = byte_fallback;
  v.add_space_prefix = prefix;
  for (std::size_t i = 0; i < v.pieces.size(); ++i) {
    if (v.pieces[i].type != PieceType::control) continue;
    if (v.pieces[i].text == bos) v.bos = static_cast<std::int32_t>(i);
    if (v.pieces[i].text == eos) v.eos = static_cast<std::int32_t>(i);
    if (v.pieces[i].text == pad) v.pad = static_cast<std::int32_t>(i);
  }
  v.add_bos = v.bos >= 0;
  return v;
}

}  // namespace tinyllama
