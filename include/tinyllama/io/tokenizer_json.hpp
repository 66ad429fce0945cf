// tokenizer.json of Hugging Face's tokenizers, and tokenizer_config.json beside it, read into a Vocabulary.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tinyllama/error.hpp"
#include "tinyllama/io/json.hpp"
#include "tinyllama/text/byte_level_bpe.hpp"
#include "tinyllama/text/sentencepiece_bpe.hpp"
#include "tinyllama/text/vocabulary.hpp"

namespace tinyllama {
namespace detail {

inline constexpr std::string_view gpt2_pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view llama3_pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// Reads one tokenizer.json. What the library does not do is refused by name, rather than encoded differently.
class TokenizerJson {
 public:
  TokenizerJson(const json& root, std::string_view file) : root_(root), file_(file) { v_.source = file; }

  Vocabulary read() {
    const JsonObject model = object(root_, "model");
    const std::string type = model.string("type", "BPE");  // older files have no type
    if (type != "BPE") throw Error(file_, "model.type", "BPE", "'" + type + "'");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
      if (!model.string(key, "").empty()) throw Error(file_, std::string("model.") + key, "none", "'" + model.string(key, "") + "'");
    if (model.number("dropout", 0) != 0) throw Error(file_, "model.dropout", "none", std::to_string(model.number("dropout", 0)));
    v_.byte_fallback = model.boolean("byte_fallback", false);
    v_.kind = v_.byte_fallback ? Vocabulary::Kind::sentencepiece_bpe : Vocabulary::Kind::byte_level_bpe;
    v_.ignore_merges = model.boolean("ignore_merges", false);
    v_.add_bos = false;
    read_pieces(model);
    read_merges(model);
    if (v_.byte_fallback) read_llama_steps();
    else read_byte_level_steps();
    for (const json* step : steps("post_processor", "processors")) read_post_processor(*step);
    return std::move(v_);
  }

 private:
  JsonObject object(const json& parent, std::string_view key) const {
    const json* v = JsonObject(parent, file_).find(key);
    if (!v || !v->is_object()) throw JsonObject(parent, file_).wrong(key, "an object");
    return JsonObject(*v, file_);
  }
  static std::string type_of(const json& step) {
    const auto t = step.find("type");
    return t != step.end() && t->is_string() ? t->get<std::string>() : "a step without a type";
  }
  Error unsupported(std::string_view subject, std::string_view expected, const json& step) const {
    std::string found = step.is_object() ? json_excerpt(step) : json_text(step);
    return Error(file_, subject, expected, found);
  }
  static std::string json_excerpt(const json& step) {
    std::string s = step.dump(-1, ' ', true, json::error_handler_t::replace);
    return s.size() > 160 ? s.substr(0, 157) + "..." : s;
  }

  /// A member that is null, one step, or a Sequence of steps under `list`.
  std::vector<const json*> steps(std::string_view key, const char* list) const {
    std::vector<const json*> out;
    const json* v = JsonObject(root_, file_).find(key);
    if (!v) return out;
    if (!v->is_object()) throw JsonObject(root_, file_).wrong(key, "an object or null");
    if (type_of(*v) != "Sequence") return {v};
    const auto parts = v->find(list);
    if (parts == v->end() || !parts->is_array()) throw Error(file_, key, std::string("a Sequence with ") + list, json_text(*v));
    for (const json& part : *parts) {
      if (!part.is_object()) throw Error(file_, key, "a Sequence of objects", json_text(part));
      out.push_back(&part);
    }
    return out;
  }

  std::int32_t id_of(const json& value, std::string_view text) const {
    // An id beyond any count leaves no room for a table: holes are filled, at most as many as there are pieces.
    const std::uint64_t most = 2 * (known_ + 16);
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() >= most)
      throw Error(file_, "id of '" + std::string(text.substr(0, 60)) + "'", "an id below " + std::to_string(most), json_text(value));
    return static_cast<std::int32_t>(value.get<std::uint64_t>());
  }
  Piece& place(std::int32_t id) {
    const auto i = static_cast<std::size_t>(id);
    if (v_.pieces.size() <= i) v_.pieces.resize(i + 1, Piece{"", 0, PieceType::unused});
    return v_.pieces[i];
  }

  void read_pieces(const JsonObject& model) {
    const json* vocab = model.find("vocab");
    if (!vocab || !vocab->is_object()) throw model.wrong("vocab", "an object");
    const json* added = JsonObject(root_, file_).find("added_tokens");
    if (added && !added->is_array()) throw JsonObject(root_, file_).wrong("added_tokens", "an array");
    known_ = vocab->size() + (added ? added->size() : 0);
    if (known_ > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max() / 8))
      throw Error(file_, "vocab", "below 2^28 pieces", std::to_string(known_));
    const std::string unk = model.string("unk_token", "");
    for (const auto& [text, value] : vocab->items()) {
      if (text.empty()) throw Error(file_, "vocab", "texts", "an empty one");
      const std::int32_t id = id_of(value, text);
      Piece& p = place(id);
      if (!p.text.empty()) throw Error(file_, "vocab", "each id once", "id " + std::to_string(id) + " for '" + p.text + "' and '" + text + "'");
      const bool byte = v_.byte_fallback && byte_of_piece(text) >= 0;
      p = {text, 0, byte ? PieceType::byte : PieceType::normal};
      ids_.emplace(text, id);
      if (!unk.empty() && text == unk) {
        v_.unk = id;
        if (v_.byte_fallback) p.type = PieceType::unknown;
      }
    }
    if (!unk.empty() && v_.unk < 0) throw Error(file_, "model.unk_token", "a piece of the vocabulary", "'" + unk + "'");
    if (added)
      for (const json& token : *added) read_added_token(token);
  }

  void read_added_token(const json& token) {
    if (!token.is_object()) throw Error(file_, "added_tokens", "objects", json_text(token));
    const JsonObject o(token, file_);
    const std::string text = o.string("content", "");
    if (text.empty()) throw o.wrong("content", "a text");
    if (!o.find("id")) throw o.wrong("id", "an id");
    const std::int32_t id = id_of(*o.find("id"), text);
    Piece& p = place(id);
    const auto known = ids_.find(text);
    if ((!p.text.empty() && p.text != text) || (known != ids_.end() && known->second != id))
      throw Error(file_, "added_tokens", "one id for each text", "'" + text + "' with id " + std::to_string(id) + ", which contradicts the vocabulary");
    const bool special = o.boolean("special", false);
    if (!special)  // found in any text, so how it is found matters; special ones are found on request only, exactly as written
      for (const char* flag : {"single_word", "lstrip", "rstrip"})
        if (o.boolean(flag, false)) throw Error(file_, "added token '" + text + "'", std::string(flag) + " = false", "true (not supported)");
    ids_.emplace(text, id);
    if (p.type == PieceType::unknown) return;
    p = {v_.byte_fallback && !special ? with_space_symbols(text) : text, 0, special ? PieceType::control : PieceType::user_defined};
  }

  void read_merges(const JsonObject& model) {
    const json* merges = model.find("merges");
    if (!merges || !merges->is_array()) throw model.wrong("merges", "an array");
    if (v_.byte_fallback)
      for (Piece& p : v_.pieces) p.score = -std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < merges->size(); ++i) {
      const json& m = (*merges)[i];
      std::pair<std::string, std::string> merge;
      if (m.is_string()) {
        merge = split_merge(m.get_ref<const std::string&>(), i, file_);
      } else if (m.is_array() && m.size() == 2 && m[0].is_string() && m[1].is_string()) {  // newer files
        merge = {m[0].get<std::string>(), m[1].get<std::string>()};
      } else {
        throw Error(file_, "merge " + std::to_string(i), "\"a b\" or [\"a\", \"b\"]", json_text(m));
      }
      if (v_.byte_fallback)  // a score for those who need one (GGUF): the place of the first merge that makes the piece; exact up to 2^24
        if (const auto made = ids_.find(merge.first + merge.second); made != ids_.end()) {
          float& score = v_.pieces[static_cast<std::size_t>(made->second)].score;
          score = std::max(score, -static_cast<float>(i));
        }
      v_.merges.push_back(std::move(merge));
    }
  }

  /// Llama: spaces become U+2581, one is put before, and merges run over the whole text.
  void read_llama_steps() {
    bool replaced = false;
    v_.add_space_prefix = false;
    for (const json* step : steps("normalizer", "normalizers")) {
      const JsonObject o(*step, file_);
      const std::string type = type_of(*step);
      const auto pattern = step->find("pattern");
      if (type == "Prepend" && o.string("prepend", "") == space_symbol) v_.add_space_prefix = true;
      else if (type == "Replace" && o.string("content", "") == space_symbol && pattern != step->end() && *pattern == json{{"String", " "}}) replaced = true;
      else throw unsupported("normalizer", "Prepend U+2581 and Replace \" \" by U+2581", *step);
    }
    for (const json* step : steps("pre_tokenizer", "pretokenizers")) {
      const JsonObject o(*step, file_);
      if (type_of(*step) != "Metaspace" || o.string("replacement", space_symbol) != space_symbol || o.boolean("split", true))
        throw unsupported("pre_tokenizer", "null, or Metaspace with U+2581 and split = false (byte_fallback is set)", *step);
      const std::string scheme = o.string("prepend_scheme", o.boolean("add_prefix_space", true) ? "always" : "never");
      if (scheme != "always" && scheme != "first" && scheme != "never") throw unsupported("pre_tokenizer", "prepend_scheme always, first or never", *step);
      replaced = true;
      v_.add_space_prefix = scheme != "never";
    }
    if (!replaced) throw Error(file_, "normalizer", "spaces replaced by U+2581 (byte_fallback is set)", "no such step");
  }

  void read_byte_level_steps() {
    for (const json* step : steps("normalizer", "normalizers")) throw unsupported("normalizer", "none (byte-level BPE)", *step);
    bool digits = false, byte_level = false, split = false;
    v_.add_space_prefix = false;
    for (const json* step : steps("pre_tokenizer", "pretokenizers")) {
      const JsonObject o(*step, file_);
      const std::string type = type_of(*step);
      if (byte_level) throw unsupported("pre_tokenizer", "nothing after ByteLevel", *step);
      if (type == "Digits" && o.boolean("individual_digits", false) && !split && !digits) {
        digits = true;
      } else if (type == "Split" && !digits && !split) {
        split = true;
        v_.pre_tokenizer = pattern_of(*step);
      } else if (type == "ByteLevel") {
        byte_level = true;
        v_.add_space_prefix = o.boolean("add_prefix_space", true);
        const bool own_pattern = o.boolean("use_regex", true);
        if (own_pattern ? split : digits) throw unsupported("pre_tokenizer", "one pattern: ByteLevel's own, or Split", *step);
        if (digits && v_.add_space_prefix) throw unsupported("pre_tokenizer", "add_prefix_space = false after Digits", *step);
        if (own_pattern) v_.pre_tokenizer = digits ? PreTokenizer::smollm : PreTokenizer::gpt2;
      } else {
        throw unsupported("pre_tokenizer", "ByteLevel, after Digits (individual) or Split, or neither", *step);
      }
    }
    if (!byte_level) throw Error(file_, "pre_tokenizer", "ByteLevel (or a model with byte_fallback)", "none");
  }

  PreTokenizer pattern_of(const json& step) const {
    const JsonObject o(step, file_);
    const auto pattern = step.find("pattern");
    if (o.string("behavior", "") == "Isolated" && !o.boolean("invert", false) && pattern != step.end()) {
      if (*pattern == json{{"Regex", gpt2_pattern}}) return PreTokenizer::gpt2;
      if (*pattern == json{{"Regex", llama3_pattern}}) return PreTokenizer::llama3;
    }
    throw unsupported("pre_tokenizer", "Split by the pattern of GPT-2 or Llama 3, isolated", step);
  }

  /// TemplateProcessing says which pieces stand around a text.
  void read_post_processor(const json& step) {
    const std::string type = type_of(step);
    if (type == "ByteLevel") return;  // offsets only
    const auto single = step.find("single");
    if (type != "TemplateProcessing" || single == step.end() || !single->is_array())
      throw unsupported("post_processor", "ByteLevel or TemplateProcessing", step);
    bool text_seen = false;
    for (const json& item : *single) {
      if (item.is_object() && item.contains("Sequence")) {
        text_seen = true;
        continue;
      }
      const auto special = item.is_object() ? item.find("SpecialToken") : item.end();
      const bool named = item.is_object() && special != item.end() && special->is_object() && special->contains("id") && (*special)["id"].is_string();
      const auto id = named ? ids_.find((*special)["id"].get<std::string>()) : ids_.end();
      if (id == ids_.end() || (text_seen ? v_.add_eos : v_.add_bos)) throw unsupported("post_processor", "one known piece before and after the text", step);
      (text_seen ? v_.add_eos : v_.add_bos) = true;
      (text_seen ? v_.eos : v_.bos) = id->second;
    }
  }

  const json& root_;
  std::string file_;
  Vocabulary v_;
  std::size_t known_ = 0;  // entries of vocab and added_tokens
  std::unordered_map<std::string, std::int32_t> ids_;
};

/// Sets `id` to the piece that has this text among the control pieces, else among all; leaves it where there is none.
inline void assign_piece(const Vocabulary& v, std::string_view text, std::int32_t& id) {
  std::int32_t found = -1;
  for (std::size_t i = 0; i < v.pieces.size(); ++i)
    if (v.pieces[i].text == text && (found < 0 || v.pieces[i].type == PieceType::control)) found = static_cast<std::int32_t>(i);
  if (found >= 0) id = found;
}

}  // namespace detail

/// Reads the text of a tokenizer.json; `name` is for messages. BPE in two kinds: with byte_fallback (Llama), and byte-level (GPT-2, SmolLM2,
/// Llama 3). Without a configuration beside it, bos and eos are the post-processor's, else pieces of the usual names.
inline Vocabulary read_tokenizer_json(std::string_view text, std::string_view name) {
  const detail::json root = detail::parse_json(text, name);
  if (!root.is_object()) throw Error(name, "JSON", "an object", std::string(root.type_name()));
  Vocabulary v = detail::TokenizerJson(root, name).read();
  for (const char* s : {"<|endoftext|>", "<|begin_of_text|>", "<s>"})
    if (std::int32_t found = -1; v.bos < 0 || !v.add_bos) detail::assign_piece(v, s, found), v.bos = found >= 0 ? found : v.bos;
  for (const char* s : {"<|endoftext|>", "<|end_of_text|>", "</s>"})
    if (std::int32_t found = -1; v.eos < 0 || !v.add_eos) detail::assign_piece(v, s, found), v.eos = found >= 0 ? found : v.eos;
  return v;
}

/// What tokenizer_config.json adds: the chat template, which pieces are bos, eos and pad, whether to put them; and for a tokenizer.model the
/// pieces of added_tokens_decoder. Throws Error naming `where`.
inline void apply_tokenizer_config(Vocabulary& v, const detail::json& config, std::string_view where) {
  using detail::json;
  const detail::JsonObject o(config, where);
  if (const json* added = o.find("added_tokens_decoder"); added && added->is_object()) {
    std::vector<std::pair<std::size_t, const json*>> tokens;
    for (const auto& [key, token] : added->items()) {
      const bool digits = !key.empty() && key.size() < 10 && std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
      if (!digits || !token.is_object()) throw Error(where, "added_tokens_decoder", "ids and objects", "'" + key + "'");
      tokens.emplace_back(std::stoul(key), &token);
    }
    std::sort(tokens.begin(), tokens.end());
    for (const auto& [id, token] : tokens) {
      const detail::JsonObject t(*token, where);
      const std::string text = t.string("content", "");
      if (id < v.pieces.size() || text.empty()) continue;
      if (id != v.pieces.size()) throw Error(where, "added_tokens_decoder", "the next id, " + std::to_string(v.pieces.size()), std::to_string(id));
      v.pieces.push_back({text, 0, t.boolean("special", false) ? PieceType::control : PieceType::user_defined});
    }
  }
  const auto piece = [&](const char* key, std::int32_t& id) {
    const json* token = o.find(key);
    if (token && token->is_object()) token = detail::JsonObject(*token, where).find("content");
    if (token && token->is_string()) detail::assign_piece(v, token->get<std::string>(), id);
  };
  piece("bos_token", v.bos), piece("eos_token", v.eos), piece("pad_token", v.pad);
  v.add_bos = o.boolean("add_bos_token", v.add_bos);
  v.add_eos = o.boolean("add_eos_token", v.add_eos);
  if (const json* chat = o.find("chat_template"); chat && chat->is_string()) {
    v.chat_template = chat->get<std::string>();
  } else if (chat && chat->is_array()) {  // named ones: "default", else the first
    std::optional<std::string> chosen;
    for (const json& c : *chat) {
      if (!c.is_object()) throw Error(where, "chat_template", "objects with name and template", detail::json_text(c));
      const detail::JsonObject named(c, where);
      if (!chosen || named.string("name", "") == "default") chosen = named.string("template", "");
    }
    v.chat_template = chosen.value_or("");
  }
}

}  // namespace tinyllama
