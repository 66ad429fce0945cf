// Python pickles of plain data: a small machine for the opcodes that torch.save writes. It builds values and never calls anything.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tinyllama/io/gguf.hpp"

namespace tinyllama::detail {

/// A value; others are named by their number in the Pickle, so that a value may stand in many places at no cost, and in a cycle.
struct PickleValue {
  enum class Kind : std::uint8_t { none, boolean, integer, real, string, tuple, list, dict, global, call, persistent };
  Kind kind = Kind::none;
  std::int64_t integer = 0;             // of an integer, a boolean
  double real = 0;
  std::string_view text = {};           // of a string; "module name" of a global
  std::vector<std::uint32_t> items = {};  // of a tuple, a list; a dict: key, value, key, value...; a call: function, arguments; persistent: the id
};

/// The value of a pickle of protocol 2. Calls, also of classes, stay what they are, unless it is OrderedDict(), which is a dict.
class Pickle {
 public:
  using Kind = PickleValue::Kind;

  /// `bytes` is the caller's to keep alive; `name` is for messages; `globals` are all the "module name" that may be mentioned. Throws Error.
  Pickle(std::string name, std::span<const std::byte> bytes, std::span<const std::string_view> globals)
      : name_(std::move(name)), reader_(name_, bytes), globals_(globals) {
    while (!step()) {
    }
  }

  Pickle(const Pickle&) = delete;  // the reader names the file through name_
  Pickle& operator=(const Pickle&) = delete;

  const PickleValue& operator[](std::uint32_t i) const { return values_[i]; }
  const PickleValue& root() const { return values_[root_]; }

  /// The value of the text key, or null. Linear in the size of the dict.
  const PickleValue* find(const PickleValue& dict, std::string_view key) const {
    const PickleValue* found = nullptr;
    if (dict.kind == Kind::dict)
      for (std::size_t i = 0; i < dict.items.size(); i += 2)
        if (const PickleValue& k = values_[dict.items[i]]; k.kind == Kind::string && k.text == key) found = &values_[dict.items[i + 1]];
    return found;
  }

 private:
  static constexpr std::size_t most_values = std::size_t{1} << 20;  // a state dict of 200 tensors has some 5,000

  Error wrong(std::string_view expected, std::string_view found) const {
    return Error(name_, "pickle", expected, std::string(found) + " at offset " + std::to_string(reader_.position()));
  }
  void push(PickleValue v) {
    if (values_.size() >= most_values) throw wrong("at most " + std::to_string(most_values) + " values", "more");
    stack_.push_back(static_cast<std::uint32_t>(values_.size()));
    values_.push_back(std::move(v));
  }
  void push(std::int64_t v, Kind kind = Kind::integer) { push(PickleValue{.kind = kind, .integer = v}); }

  /// What lies above the last mark; popping goes no deeper.
  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  std::uint32_t pop() {
    const std::uint32_t v = top();
    stack_.pop_back();
    return v;
  }
  std::uint32_t top() const {
    if (stack_.size() <= floor()) throw wrong("a value on the stack", "none");
    return stack_.back();
  }
  std::vector<std::uint32_t> pop(std::size_t n) {
    if (stack_.size() - floor() < n) throw wrong(std::to_string(n) + " values on the stack", std::to_string(stack_.size() - floor()));
    std::vector<std::uint32_t> v(stack_.end() - static_cast<std::ptrdiff_t>(n), stack_.end());
    stack_.resize(stack_.size() - n);
    return v;
  }
  std::vector<std::uint32_t> pop_mark() {
    if (marks_.empty()) throw wrong("a mark", "none");
    std::vector<std::uint32_t> v = pop(stack_.size() - marks_.back());
    marks_.pop_back();
    return v;
  }

  void memorise(std::uint32_t at) {
    if (memo_.size() >= most_values) throw wrong("at most " + std::to_string(most_values) + " remembered values", "more");
    memo_[at] = top();
  }
  void recall(std::uint32_t at) {
    const auto it = memo_.find(at);
    if (it == memo_.end()) throw wrong("a remembered value", "number " + std::to_string(at) + ", which is none");
    stack_.push_back(it->second);
  }

  std::string_view text(std::uint64_t n) {
    const auto bytes = reader_.take(n, "pickle");
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  std::string_view line() {
    const auto* const from = reader_.here();
    const void* const end = reader_.remaining() ? std::memchr(from, '\n', reader_.remaining()) : nullptr;
    if (!end) throw wrong("a line", "none");
    const std::string_view s = text(static_cast<std::uint64_t>(static_cast<const std::byte*>(end) - from) + 1);
    return s.substr(0, s.size() - 1);
  }

  void global() {
    const std::string_view module = line(), function = line();
    for (const std::string_view g : globals_)
      if (g.size() == module.size() + 1 + function.size() && g.starts_with(module) && g[module.size()] == ' ' && g.ends_with(function))
        return push(PickleValue{.kind = Kind::global, .text = g});
    throw wrong("only what a dict of tensors needs", "'" + std::string(module.substr(0, 100)) + "." + std::string(function.substr(0, 100)) + "'");
  }
  void reduce() {
    const std::uint32_t arguments = pop(), function = pop();
    if (values_[function].kind != Kind::global || values_[arguments].kind != Kind::tuple) throw wrong("a function and a tuple", "other values");
    if (values_[function].text == "collections OrderedDict" && values_[arguments].items.empty()) push(PickleValue{.kind = Kind::dict});
    else push(PickleValue{.kind = Kind::call, .items = {function, arguments}});
  }
  void extend(Kind kind, const std::vector<std::uint32_t>& items) {
    PickleValue& to = values_[top()];
    if (to.kind != kind || (kind == Kind::dict && items.size() % 2))
      throw wrong(kind == Kind::dict ? "a dict to add pairs to" : "a list to add to", "another value");
    to.items.insert(to.items.end(), items.begin(), items.end());
  }
  void long_integer() {
    const auto bytes = reader_.take(reader_.value<std::uint8_t>("pickle"), "pickle");
    if (bytes.size() > 8) throw wrong("an integer of at most 8 bytes", std::to_string(bytes.size()));
    std::uint64_t v = !bytes.empty() && (bytes.back() & std::byte{0x80}) != std::byte{} ? ~std::uint64_t{0} : 0;
    std::memcpy(&v, bytes.data(), bytes.size());
    push(static_cast<std::int64_t>(v));
  }
  void real() {
    const auto bytes = reader_.take(8, "pickle");
    std::uint64_t bits = 0;
    for (const std::byte b : bytes) bits = bits << 8 | std::to_integer<std::uint64_t>(b);
    push(PickleValue{.kind = Kind::real, .real = std::bit_cast<double>(bits)});
  }

  /// One opcode (Python's pickletools.py lists them); true after the last.
  bool step() {
    switch (const auto op = reader_.value<std::uint8_t>("pickle")) {
      case 0x80:  // PROTO
        if (const auto v = reader_.value<std::uint8_t>("pickle"); v != 2) throw wrong("protocol 2, torch.save's", std::to_string(v));
        break;
      case '.':  // STOP
        if (stack_.size() != 1 || !marks_.empty()) throw wrong("one value at the end", std::to_string(stack_.size()));
        root_ = stack_[0];
        return true;
      case '(': marks_.push_back(stack_.size()); break;                                              // MARK
      case 'N': push(PickleValue{}); break;                                                          // NONE
      case 0x88: push(1, Kind::boolean); break;                                                      // NEWTRUE
      case 0x89: push(0, Kind::boolean); break;                                                      // NEWFALSE
      case 'K': push(reader_.value<std::uint8_t>("pickle")); break;                                  // BININT1
      case 'M': push(reader_.value<std::uint16_t>("pickle")); break;                                 // BININT2
      case 'J': push(reader_.value<std::int32_t>("pickle")); break;                                  // BININT
      case 0x8a: long_integer(); break;                                                              // LONG1
      case 'G': real(); break;                                                                       // BINFLOAT
      case 'X': push(PickleValue{.kind = Kind::string, .text = text(reader_.value<std::uint32_t>("pickle"))}); break; // BINUNICODE
      case '}': push(PickleValue{.kind = Kind::dict}); break;                                        // EMPTY_DICT
      case ']': push(PickleValue{.kind = Kind::list}); break;                                        // EMPTY_LIST
      case ')': push(PickleValue{.kind = Kind::tuple}); break;                                       // EMPTY_TUPLE
      case 't': push(PickleValue{.kind = Kind::tuple, .items = pop_mark()}); break;                  // TUPLE
      case 0x85: case 0x86: case 0x87: push(PickleValue{.kind = Kind::tuple, .items = pop(op - 0x84u)}); break; // TUPLE1 to TUPLE3
      case 's': extend(Kind::dict, pop(2)); break;                                                   // SETITEM
      case 'u': extend(Kind::dict, pop_mark()); break;                                               // SETITEMS
      case 'a': extend(Kind::list, pop(1)); break;                                                   // APPEND
      case 'e': extend(Kind::list, pop_mark()); break;                                               // APPENDS
      case 'q': memorise(reader_.value<std::uint8_t>("pickle")); break;                              // BINPUT
      case 'r': memorise(reader_.value<std::uint32_t>("pickle")); break;                             // LONG_BINPUT
      case 'h': recall(reader_.value<std::uint8_t>("pickle")); break;                                // BINGET
      case 'j': recall(reader_.value<std::uint32_t>("pickle")); break;                               // LONG_BINGET
      case 'c': global(); break;                                                                     // GLOBAL
      case 'R': reduce(); break;                                                                     // REDUCE
      case 'Q': push(PickleValue{.kind = Kind::persistent, .items = {pop()}}); break;                // BINPERSID
      case 'b':                                                                                          // BUILD: the attributes of an OrderedDict
        pop();
        if (values_[top()].kind != Kind::dict) throw wrong("attributes of a dict only", "those of another value");
        break;
      default: throw wrong("an opcode that torch.save writes for a dict of tensors", "opcode " + std::to_string(op));
    }
    return false;
  }

  std::string name_;
  ByteReader reader_;
  std::span<const std::string_view> globals_;
  std::vector<PickleValue> values_;
  std::vector<std::uint32_t> stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint32_t, std::uint32_t> memo_;
  std::uint32_t root_ = 0;
};

}  // namespace tinyllama::detail
