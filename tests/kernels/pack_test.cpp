// Panels hold what the rows held: exactly, for every format, with any number of rows.
#include "tinyllama/kernels/pack.hpp"

#include "tests/kernels/agree.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

// Any bytes are a valid row, but a scale that is NaN compares with nothing: exponents of f16 fields are kept below 31.
void fill(Format f, std::vector<std::byte>& rows, Random& random) {
  for (std::byte& b : rows) b = random.byte();
  const auto size = static_cast<std::size_t>(info(f).bytes);
  const auto tame = [&](std::size_t at) { rows.at(at + 1) &= std::byte{0xbf}; };
  for (std::size_t at = 0; at + size <= rows.size(); at += size) {
    if (f == Format::f16 || f == Format::bf16) tame(at);
    else if (f == Format::f32) tame(at + 2);
    else if (f == Format::f8_e4m3) rows[at] &= std::byte{0xbf};
    else if (f == Format::q6_K) tame(at + size - 2);
    else tame(at);
    if (f == Format::q4_1 || f == Format::q5_1 || f == Format::q4_K || f == Format::q5_K) tame(at + 2);
  }
}

}  // namespace

TEST_CASE("a packed panel gives back each row") {
  Random random(1);
  for (const FormatInfo& format : formats)
    for (const index_t blocks : {1, 2, 3, 7})
      for (const int rows : {1, 2, 15, 16}) {
        const index_t k = blocks * format.block;
        CAPTURE(std::string(format.name));
        CAPTURE(k);
        CAPTURE(rows);
        const std::size_t stride = row_bytes(format.format, k);
        std::vector<std::byte> stored(stride * static_cast<std::size_t>(rows)), panel(panel_bytes(format.format, k), std::byte{0xff});
        fill(format.format, stored, random);
        visit(format.format, [&]<Format F>() { pack_panel<F>(stored.data(), stride, rows, k, panel.data()); });
        for (int r = 0; r < 16; ++r) {
          std::vector<float> expected(static_cast<std::size_t>(k)), got(expected);
          visit(format.format, [&]<Format F>() { unpack_row<F>(panel.data(), r, k, got.data()); });
          // Rows that a panel lacks: scale 0, so that a product with them is 0.
          if (r < rows) decode_row(format.format, stored.data() + static_cast<std::size_t>(r) * stride, expected.data(), k);
          check_close(got, expected, [](index_t) { return 0.0; });
        }
      }
}

TEST_CASE("packed sizes: what the formats take, and the K formats' unpacked 6-bit scales") {
  CHECK(packed_bytes(Format::bf16, 32, 64) == 2 * 32 * 64);
  CHECK(packed_bytes(Format::bf16, 17, 63) == 2 * 32 * 64);
  CHECK(packed_bytes(Format::q8_0, 16, 32) == 16 * 34);
  CHECK(packed_bytes(Format::q4_0, 16, 32) == 16 * 18);
  CHECK(packed_bytes(Format::q4_1, 16, 32) == 16 * 20);
  CHECK(packed_bytes(Format::q5_0, 16, 32) == 16 * 22);
  CHECK(packed_bytes(Format::q5_1, 16, 32) == 16 * 24);
  CHECK(packed_bytes(Format::q4_K, 16, 256) == 16 * (144 + 4));
  CHECK(packed_bytes(Format::q5_K, 16, 256) == 16 * (176 + 4));
  CHECK(packed_bytes(Format::q6_K, 16, 256) == 16 * 210);
}
