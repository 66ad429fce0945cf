// bf16, f16 and e4m3: all bit patterns, all ties, and the ends of the range, against double arithmetic.
#include "tinyllama/tensor/dtype.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace tl = tinyllama;

namespace {

// The value of a bit pattern by the definition of the format.
double value(std::uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, e = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1), m = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (e == (1 << exponent_bits) - 1) return m ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (e == 0) return sign * std::ldexp(m, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + m, e - bias - mantissa_bits);
}

// Checks T over all patterns: widening is exact; narrowing returns it; the midpoint to the next pattern goes to the even one, and
// the floats on either side of the midpoint to the nearer one.
template <class T>
void check_all(int exponent_bits, int mantissa_bits) {
  const auto infinity = static_cast<std::uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  int wrong = 0;
  for (int i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const double exact = value(bits, exponent_bits, mantissa_bits);
    const float widened = T::from_bits(bits);
    if (std::isnan(exact)) {
      wrong += !std::isnan(widened) || !std::isnan(static_cast<float>(T(widened)));
      continue;
    }
    wrong += static_cast<double>(widened) != exact || std::signbit(widened) != std::signbit(exact) || T(widened).bits != bits;
    if ((bits & 0x7fff) >= infinity) continue;
    const auto next = static_cast<std::uint16_t>(bits + 1);  // away from zero
    // The step after the largest number leads to where the next power of two would be.
    const double beyond = (next & 0x7fff) == infinity ? 2.0 * exact - value(static_cast<std::uint16_t>(bits - 1), exponent_bits, mantissa_bits)
                                                      : value(next, exponent_bits, mantissa_bits);
    const float middle = static_cast<float>((exact + beyond) / 2.0);
    if (static_cast<double>(middle) != (exact + beyond) / 2.0) continue;  // below f32's own resolution
    const float away = std::nextafter(middle, middle < 0 ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity());
    wrong += T(middle).bits != (bits & 1 ? next : bits);
    wrong += T(std::nextafter(middle, 0.0f)).bits != bits;
    wrong += T(away).bits != next;
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("bf16 converts exactly and rounds to nearest even") { check_all<tl::bf16>(8, 7); }
TEST_CASE("f16 converts exactly and rounds to nearest even") { check_all<tl::f16>(5, 10); }

TEST_CASE("e4m3 converts exactly, rounds to nearest even, saturates, and keeps NaNs") {
  static_assert(static_cast<float>(tl::e4m3::from_bits(0x7e)) == 448.0f && static_cast<float>(tl::e4m3::from_bits(0x01)) == 0x1p-9f && tl::e4m3(-1.0f).bits == 0xb8);
  constexpr float inf = std::numeric_limits<float>::infinity();
  int wrong = 0;
  for (int i = 0; i < 256; ++i) {
    const auto bits = static_cast<std::uint8_t>(i);
    const int e = (i >> 3) & 15, m = i & 7;
    const float widened = tl::e4m3::from_bits(bits), sign = i & 0x80 ? -1.0f : 1.0f;
    if ((i & 0x7f) == 0x7f) {
      wrong += !std::isnan(widened) || (tl::e4m3(widened).bits & 0x7f) != 0x7f;
      continue;
    }
    wrong += widened != sign * (e ? std::ldexp(8.0f + static_cast<float>(m), e - 10) : std::ldexp(static_cast<float>(m), -9)) || std::signbit(widened) != std::signbit(sign);
    wrong += tl::e4m3(widened).bits != bits;
    if ((i & 0x7f) == 0x7e) continue;
    const float next = tl::e4m3::from_bits(static_cast<std::uint8_t>(i + 1)), middle = (widened + next) / 2;
    wrong += tl::e4m3(middle).bits != (i & 1 ? i + 1 : i);
    wrong += tl::e4m3(std::nextafter(middle, 0.0f)).bits != i;
    wrong += tl::e4m3(std::nextafter(middle, sign * inf)).bits != i + 1;
  }
  CHECK(wrong == 0);
  for (const float x : {449.0f, 464.0f, 480.0f, 1e30f, inf}) CHECK((tl::e4m3(x).bits == 0x7e && tl::e4m3(-x).bits == 0xfe));
  CHECK(tl::e4m3(1e-30f).bits == 0);
  CHECK(tl::e4m3(-0.0f).bits == 0x80);
  CHECK(tl::e4m3(std::numeric_limits<float>::quiet_NaN()).bits == 0x7f);
}

TEST_CASE("conversions keep infinities, NaNs and signs, and overflow to infinity") {
  constexpr float inf = std::numeric_limits<float>::infinity();
  CHECK(static_cast<float>(tl::f16(65519.0f)) == 65504.0f);
  CHECK(static_cast<float>(tl::f16(65520.0f)) == inf);
  CHECK(static_cast<float>(tl::f16(-1e30f)) == -inf);
  CHECK(static_cast<float>(tl::bf16(std::numeric_limits<float>::max())) == inf);
  CHECK(tl::f16(-0.0f).bits == 0x8000);
  CHECK(tl::f16(1e-10f).bits == 0);
  CHECK(std::isnan(static_cast<float>(tl::bf16(std::bit_cast<float>(0x7f800001u)))));  // its upper half alone would be infinity
  CHECK(std::isnan(static_cast<float>(tl::f16(std::bit_cast<float>(0x7f800001u)))));
}

TEST_CASE("formats are found by name in any case, and an unknown one lists them") {
  CHECK(tl::parse_format("Q4_K") == tl::Format::q4_K);
  CHECK(tl::parse_format("bf16") == tl::Format::bf16);
  CHECK_THROWS_WITH_AS(tl::parse_format("q9"), "format: expected one of f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_K, q5_K, q6_K, f8_e4m3, found 'q9'", tl::Error);
  CHECK(tl::row_bytes(tl::Format::q4_K, 2048) == 1152);
}
