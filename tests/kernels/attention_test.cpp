// Attention and the KV cache of every instruction set against the reference: grouped queries, pages, causal masks, unwritten memory.
#include "tests/kernels/agree.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

struct Case {
  Format format;
  index_t head_dim, group, tokens, position, begin, end;
};

// A cache of one head in pages, each byte NaN until written; K and V of positions [0, length).
struct Pages {
  Format format;
  index_t head_dim, length;
  std::vector<std::vector<std::byte>> memory;
  std::vector<std::byte*> base;
  static constexpr index_t k_offset = 64;  // as if another layer came first
  index_t v_offset() const { return k_offset + page_k_bytes(format, head_dim) + 128; }

  Pages(Format f, index_t dim, index_t positions, const Kernels& kernels, Random& random) : format(f), head_dim(dim), length(positions) {
    for (index_t p = 0; p < length; p += page_tokens) {
      memory.emplace_back(static_cast<std::size_t>(v_offset() + page_v_bytes(f, dim)), std::byte{0xff});  // 0xff.. is a NaN in every format
      base.push_back(memory.back().data());
    }
    for (index_t p = 0; p < length; ++p) {
      const auto k = random.vector(head_dim), v = random.vector(head_dim);
      std::byte* page = base[static_cast<std::size_t>(p / page_tokens)];
      kernels.store_kv({k.data(), v.data(), head_dim, p % page_tokens, page + k_offset, page + v_offset(), format});
    }
  }
};

// `narrow`: attention_bf16, whose products are of numbers rounded to bf16.
void check_attention(const Kernels& kernels, const Case& c, bool narrow = false) {
  CAPTURE(std::string(name(c.format)));
  CAPTURE(c.head_dim);
  CAPTURE(c.group);
  CAPTURE(c.tokens);
  CAPTURE(c.position);
  CAPTURE(c.begin);
  CAPTURE(c.end);
  Random random(static_cast<std::uint64_t>(c.head_dim * 1000 + c.position + c.group));
  const Pages pages(c.format, c.head_dim, c.position + c.tokens, reference::kernels, random);
  const index_t rows = c.tokens * c.group, stride = head_stride(c.head_dim), ldq = c.group * c.head_dim + 7;
  const auto q = random.vector((c.tokens - 1) * ldq + c.group * c.head_dim, 2.0f);
  struct Result {
    std::vector<float> o, max, sum;
  };
  const Result empty{std::vector<float>(static_cast<std::size_t>(rows * stride), not_a_number), std::vector<float>(static_cast<std::size_t>(rows), not_a_number),
                     std::vector<float>(static_cast<std::size_t>(rows), not_a_number)};
  Result expected = empty, got = empty;
  AttentionTask t{};
  t.q = q.data(), t.ldq = ldq, t.head_dim = c.head_dim, t.group = c.group, t.rows = rows, t.position = c.position;
  t.pages = pages.base.data(), t.k_offset = Pages::k_offset, t.v_offset = pages.v_offset(), t.format = c.format;
  t.begin = c.begin, t.end = c.end, t.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  t.o = expected.o.data(), t.max = expected.max.data(), t.sum = expected.sum.data();
  reference::attention(t);
  t.o = got.o.data(), t.max = got.max.data(), t.sum = got.sum.data();
  narrow ? kernels.attention_bf16(t) : kernels.attention(t);
  // A rounding to bf16 is half of 2^-8; each product has two of them in the scores, and two beside the values.
  const double rounding = narrow && kernels.bf16_dot ? 0x1p-8 : 0;
  for (index_t r = 0; r < rows; ++r) {
    CAPTURE(r);
    const auto ur = static_cast<std::size_t>(r);
    const index_t last = std::min(c.end, c.position + r / c.group + 1);
    if (last <= c.begin) {  // the row sees nothing of the range
      CHECK(got.max[ur] == -std::numeric_limits<float>::infinity());
      CHECK(got.sum[ur] == 0.0f);
      for (index_t d = 0; d < stride; ++d) REQUIRE(got.o[static_cast<std::size_t>(r * stride + d)] == 0.0f);
      continue;
    }
    // A score is a sum of head_dim products; its error multiplies the exponential. Beside that: the rounding of score - max, exp, and a sum
    // of one weighted value for each position, rescaled once a page.
    double most = 0;
    std::vector<double> weighted(static_cast<std::size_t>(stride));
    for (index_t p = c.begin; p < last; ++p) {
      const std::byte *k = pages.base[static_cast<std::size_t>(p / page_tokens)] + Pages::k_offset, *v = k - Pages::k_offset + pages.v_offset();
      double size = 0, dot = 0;
      for (index_t d = 0; d < c.head_dim; ++d) {
        const double term = static_cast<double>(q[static_cast<std::size_t>(r / c.group * ldq + r % c.group * c.head_dim + d)]) *
                            reference::load_k(c.format, k, c.head_dim, p % page_tokens, d);
        size += std::fabs(term), dot += term;
      }
      most = std::max(most, size * t.scale);
      for (index_t d = 0; d < stride; ++d)
        weighted[static_cast<std::size_t>(d)] += std::exp(dot * t.scale - expected.max[ur]) / expected.sum[ur] *
                                                 std::fabs(reference::load_v(c.format, v, c.head_dim, p % page_tokens, d));
    }
    const double bound = (sum_bound + rounding) * (2 * most + 2);
    CHECK(std::fabs((got.max[ur] + std::log(static_cast<double>(got.sum[ur]))) - (expected.max[ur] + std::log(static_cast<double>(expected.sum[ur])))) <= bound);
    for (Result* result : {&expected, &got})
      for (index_t d = 0; d < stride; ++d) result->o[static_cast<std::size_t>(r * stride + d)] /= result->sum[ur];
    check_close(got.o.data() + r * stride, expected.o.data() + r * stride, stride, [&](index_t d) { return bound * weighted[static_cast<std::size_t>(d)]; });
  }
}

}  // namespace

TEST_CASE("store_kv writes its slot, transposed K and padded V, and nothing else") {
  for_each_table([](const Kernels& kernels) {
    for (const Format f : {Format::f32, Format::f16, Format::bf16, Format::f8_e4m3, Format::q8_0})
      for (const index_t head_dim : {1, 8, 15, 16, 17, 48, 64, 128})
        for (const index_t slot : {0, 1, 37, 63}) {
          CAPTURE(std::string(name(f)));
          CAPTURE(head_dim);
          CAPTURE(slot);
          Random random(static_cast<std::uint64_t>(head_dim));
          auto k = random.vector(head_dim), v = random.vector(head_dim, 1e-3f);
          if (head_dim > 8) k[3] = 1e6f, v[7] = 1e-7f, v[5] = not_a_number;  // beyond f16, subnormal in f16
          std::vector<std::byte> expected_k(static_cast<std::size_t>(page_k_bytes(f, head_dim)), std::byte{0xa5}), got_k(expected_k);
          std::vector<std::byte> expected_v(static_cast<std::size_t>(page_v_bytes(f, head_dim)), std::byte{0xa5}), got_v(expected_v);
          reference::store_kv({k.data(), v.data(), head_dim, slot, expected_k.data(), expected_v.data(), f});
          kernels.store_kv({k.data(), v.data(), head_dim, slot, got_k.data(), got_v.data(), f});
          CHECK(got_k == expected_k);
          CHECK(got_v == expected_v);
        }
  });
}

TEST_CASE("attention: head dimensions, groups and cache formats") {
  for_each_table([](const Kernels& kernels) {
    for (const Format f : {Format::f32, Format::f16, Format::bf16, Format::f8_e4m3, Format::q8_0})
      for (const index_t head_dim : {8, 16, 48, 64, 80, 128})
        for (const index_t group : {1, 3, 8})
          for (const index_t position : {0, 1, 62, 63, 64, 130}) check_attention(kernels, {f, head_dim, group, 1, position, 0, position + 1});
  });
}

TEST_CASE("attention: nothing is left of the pages before where scores leap by more than a float's exponents") {
  for_each_table([](const Kernels& kernels) {
    for (const Format f : {Format::f32, Format::f16, Format::q8_0})
      for (const bool narrow : {false, true}) {
        CAPTURE(std::string(name(f)));
        CAPTURE(narrow);
        constexpr index_t head_dim = 16, group = 5, tokens = 3, rows = group * tokens;
        Random random(1);
        Pages pages(f, head_dim, 64 + tokens, kernels, random);
        for (index_t p = 0; p < pages.length; ++p) {
          const std::vector<float> k(head_dim, p < 64 ? 0.0f : 6.25f), v(head_dim, p < 64 ? 1000.0f : 1.0f);
          std::byte* page = pages.base[static_cast<std::size_t>(p / page_tokens)];
          kernels.store_kv({k.data(), v.data(), head_dim, p % page_tokens, page + Pages::k_offset, page + pages.v_offset(), f});
        }
        const std::vector<float> q(static_cast<std::size_t>(rows * head_dim), 8.0f);
        std::vector<float> o(static_cast<std::size_t>(rows * head_stride(head_dim))), max(rows), sum(rows);
        AttentionTask t{};
        t.q = q.data(), t.ldq = group * head_dim, t.head_dim = head_dim, t.group = group, t.rows = rows, t.position = 64;
        t.pages = pages.base.data(), t.k_offset = Pages::k_offset, t.v_offset = pages.v_offset(), t.format = f;
        t.begin = 0, t.end = 64 + tokens, t.scale = 0.25f;
        t.o = o.data(), t.max = max.data(), t.sum = sum.data();
        narrow ? kernels.attention_bf16(t) : kernels.attention(t);
        for (index_t r = 0; r < rows; ++r) {
          const auto ur = static_cast<std::size_t>(r);
          CHECK(std::fabs(max[ur] - 200.0f) < 1.0f);  // 16 times 8 times 6.25, times the scale
          for (index_t d = 0; d < head_dim; ++d) REQUIRE(std::fabs(o[static_cast<std::size_t>(r * head_stride(head_dim) + d)] / sum[ur] - 1.0f) < 0.01f);
        }
      }
  });
}

TEST_CASE("attention: a head of any width up to the largest") {
  for_each_table([](const Kernels& kernels) {
    for (const index_t head_dim : {1, 2, 15, 17, 33, 256}) check_attention(kernels, {Format::f32, head_dim, 2, 5, 60, 0, 65});
  });
}

TEST_CASE("attention: several tokens see up to themselves, across pages") {
  for_each_table([](const Kernels& kernels) {
    for (const Format f : {Format::f32, Format::f16, Format::bf16, Format::f8_e4m3, Format::q8_0})
      for (const index_t tokens : {2, 3, 5, 16, 21})
        for (const index_t group : {1, 3, 4})
          for (const index_t position : {0, 50, 63, 64, 120}) check_attention(kernels, {f, 16, group, tokens, position, 0, position + tokens});
    check_attention(kernels, {Format::f16, 64, 8, 8, 500, 0, 508});
    check_attention(kernels, {Format::f32, 64, 1, 64, 0, 0, 64});
    check_attention(kernels, {Format::f32, 64, 1, 130, 0, 0, 130});
  });
}

TEST_CASE("attention_bf16: blocks of prefill, across pages, every head dimension") {
  for_each_table([](const Kernels& kernels) {
    for (const Format f : {Format::f32, Format::f16, Format::bf16, Format::f8_e4m3, Format::q8_0})
      for (const index_t head_dim : {1, 8, 15, 48, 64, 80, 128, 256})
        for (const index_t group : {1, 3, 8})
          for (const index_t position : {0, 63, 130}) {
            const index_t tokens = prefill_rows(head_dim) / group;
            check_attention(kernels, {f, head_dim, group, tokens, position, 0, position + tokens}, true);
            check_attention(kernels, {f, head_dim, group, 5, position, 0, position + 5}, true);
          }
  });
}

TEST_CASE("attention to a range of positions, as the parts of a split sequence") {
  for_each_table([](const Kernels& kernels) {
    for (const index_t begin : {0, 64, 256})
      for (const index_t end : {begin + 1, begin + 40, begin + 64, begin + 256})
        for (const index_t tokens : {1, 3}) check_attention(kernels, {Format::f16, 32, 4, tokens, 511, begin, end});
    // Of three tokens at 255, 256, 257 the first sees nothing of the range that begins at 256.
    check_attention(kernels, {Format::f32, 16, 1, 3, 255, 256, 258});
    for (const bool narrow : {false, true}) check_attention(kernels, {Format::f32, 16, 5, 3, 255, 256, 258}, narrow);
  });
}

TEST_CASE("attention: scores far apart do not overflow, and early pages fade") {
  for_each_table([](const Kernels& kernels) {
    Random random(9);
    const index_t head_dim = 16, length = 200;
    Pages pages(Format::f32, head_dim, length, reference::kernels, random);
    auto q = random.vector(head_dim);
    // Scores rise by some 40 from page to page: exp(score) alone would overflow, and the first page's share underflows.
    for (index_t p = 0; p < length; ++p) {
      std::vector<float> k(static_cast<std::size_t>(head_dim)), v(k);
      for (std::size_t d = 0; d < k.size(); ++d) k[d] = q[d] * static_cast<float>(p), v[d] = static_cast<float>(p);
      std::byte* page = pages.base[static_cast<std::size_t>(p / page_tokens)];
      kernels.store_kv({k.data(), v.data(), head_dim, p % page_tokens, page + Pages::k_offset, page + pages.v_offset(), Format::f32});
    }
    std::vector<float> o(16), max(1), sum(1);
    AttentionTask t{};
    t.q = q.data(), t.ldq = head_dim, t.head_dim = head_dim, t.group = 1, t.rows = 1, t.position = length - 1, t.pages = pages.base.data();
    t.k_offset = Pages::k_offset, t.v_offset = pages.v_offset(), t.format = Format::f32, t.end = length, t.scale = 1.0f;
    t.o = o.data(), t.max = max.data(), t.sum = sum.data();
    kernels.attention(t);
    double squares = 0, e = 0, ev = 0;
    for (const float x : q) squares += static_cast<double>(x) * x;
    for (index_t p = 0; p < length; ++p) {
      const double w = std::exp(squares * static_cast<double>(p - (length - 1)));
      e += w, ev += w * static_cast<double>(p);
    }
    // Scores near 2,000 and more carry an absolute error of sum_bound times that.
    CHECK(std::fabs(o[0] / sum[0] - ev / e) <= 2 * sum_bound * squares * length * length);
    CHECK(std::isfinite(sum[0]));
  });
}
