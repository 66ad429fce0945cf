// JSON from files, parsed with nlohmann-json: bounded in depth, and a key that stands twice is an Error.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "tinyllama/io/file.hpp"

namespace tinyllama::detail {

using json = nlohmann::json;

/// The value that `text` holds. Throws Error, and nothing else, naming `where`.
inline json parse_json(std::string_view text, std::string_view where, int max_depth = 64) {
  std::vector<std::set<std::string>> keys;
  const json::parser_callback_t watch = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > max_depth) throw Error(where, "JSON", "at most " + std::to_string(max_depth) + " levels", "more");
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
      throw Error(where, value.get<std::string>(), "the key once", "it twice");
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception& e) {
    throw Error(where, "JSON", "valid JSON", std::string(e.what()).substr(0, 200));  // it quotes the file, at any length
  }
}

inline json read_json(const std::filesystem::path& path, int max_depth = 64) {
  const MappedFile file(path);
  const auto bytes = file.bytes();
  json j = parse_json({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path.string(), max_depth);
  if (!j.is_object()) throw Error(path.string(), "JSON", "an object", std::string(j.type_name()));
  return j;
}

/// What to say of a value that is not what was expected: short, and its content only where it cannot be long.
inline std::string json_text(const json& v) {
  if (v.is_structured()) return "an " + std::string(v.type_name());
  std::string s = v.dump(-1, ' ', true, json::error_handler_t::replace);
  if (s.size() > 60) s = s.substr(0, 57) + "...";
  return s;
}

/// Typed members of an object. An absent or null member is the fallback, or an Error where there is none.
class JsonObject {
 public:
  JsonObject(const json& object, std::string_view where) : object_(object), where_(where) {}

  const json* find(std::string_view key) const {
    const auto it = object_.find(std::string(key));
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  int integer(std::string_view key, std::optional<int> fallback = std::nullopt) const {
    const json* v = find(key);
    if (!v && fallback) return *fallback;
    constexpr auto most = std::numeric_limits<int>::max();
    if (v && v->is_number_unsigned() && v->get<std::uint64_t>() <= static_cast<std::uint64_t>(most)) return static_cast<int>(v->get<std::uint64_t>());
    throw wrong(key, "an integer from 0 to " + std::to_string(most));
  }
  double number(std::string_view key, std::optional<double> fallback = std::nullopt) const {
    const json* v = find(key);
    if (!v && fallback) return *fallback;
    if (v && v->is_number()) return v->get<double>();
    throw wrong(key, "a number");
  }
  bool boolean(std::string_view key, bool fallback) const {
    const json* v = find(key);
    if (!v) return fallback;
    if (v->is_boolean()) return v->get<bool>();
    throw wrong(key, "true or false");
  }
  std::string string(std::string_view key, std::string_view fallback) const {
    const json* v = find(key);
    if (!v) return std::string(fallback);
    if (v->is_string()) return v->get<std::string>();
    throw wrong(key, "a string");
  }
  Error wrong(std::string_view key, std::string_view expected) const {
    const json* v = find(key);
    return Error(where_, key, expected, v ? json_text(*v) : "nothing");
  }

 private:
  const json& object_;
  std::string_view where_;
};

}  // namespace tinyllama::detail
