// Causal attention with grouped queries over a paged cache: online softmax, a page of 64 positions at a time, no T x T matrix.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cmath>
#include <cstring>
#include <limits>

#include <hwy/cache_control.h>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

// Query rows held in registers, and vectors of positions, or of V's columns, for each of them. More rows mean that a key is widened less often.
inline constexpr int attention_rows = lanes >= 16 ? 8 : lanes >= 8 ? 4 : 2;
inline constexpr int attention_vectors = lanes >= 4 ? 2 : 1;

/// Asks for the next page's counterpart of attention_vectors vectors. Pages lie far apart, so that the hardware foresees nothing; asking for it
/// bit by bit made decoding from memory 1.2 to 1.5 times as fast in f16 (Zen 4), asking for the page at once 1.1 times.
template <class E>
HWY_INLINE void PrefetchVectors(const E* p) {
  constexpr index_t line = 64 / static_cast<index_t>(sizeof(E));
  for (index_t i = 0; i < attention_vectors * lanes; i += line) hwy::Prefetch(p + i);
}

// s [R, 64] = q [R, hd] K^T: K lies transposed, so that a lane is a position.
template <class E, int R>
HWY_INLINE void Scores(const float* const (&q)[R], const E* k, const E* next, index_t head_dim, V scale, float (&s)[R][page_tokens]) {
  const D d;
  constexpr index_t step = attention_vectors * lanes;
  for (index_t p = 0; p < page_tokens; p += step) {
    V acc[R][attention_vectors];
    TINYLLAMA_UNROLL for (int r = 0; r < R; ++r)
      TINYLLAMA_UNROLL for (int j = 0; j < attention_vectors; ++j) acc[r][j] = hn::Zero(d);
    for (index_t i = 0; i < head_dim; ++i) {
      PrefetchVectors(next + i * page_tokens + p);
      V kv[attention_vectors];
      TINYLLAMA_UNROLL for (int j = 0; j < attention_vectors; ++j) kv[j] = Widen(d, k + i * page_tokens + p + j * lanes);
      TINYLLAMA_UNROLL for (int r = 0; r < R; ++r) {
        const V qi = hn::Set(d, q[r][i]);
        TINYLLAMA_UNROLL for (int j = 0; j < attention_vectors; ++j) acc[r][j] = hn::MulAdd(qi, kv[j], acc[r][j]);
      }
    }
    TINYLLAMA_UNROLL for (int r = 0; r < R; ++r)
      TINYLLAMA_UNROLL for (int j = 0; j < attention_vectors; ++j) hn::Store(hn::Mul(acc[r][j], scale), d, s[r] + p + j * lanes);
  }
}

// o [R, stride] = factor o + e [R, positions] V: a lane is a column of V.
template <class E, int R, int NV>
HWY_INLINE void Weighted(const float (&e)[R][page_tokens], const E* v, const E* next, index_t stride, index_t column, index_t positions,
                         const float (&factor)[R], float* const (&o)[R]) {
  const D d;
  V acc[R][NV];
  TINYLLAMA_UNROLL for (int r = 0; r < R; ++r)
    TINYLLAMA_UNROLL for (int j = 0; j < NV; ++j)
      acc[r][j] = hn::Mul(hn::Set(d, factor[r]), hn::LoadU(d, o[r] + column + j * lanes));
  for (index_t p = 0; p < positions; ++p) {
    PrefetchVectors(next + p * stride + column);
    V vv[NV];
    TINYLLAMA_UNROLL for (int j = 0; j < NV; ++j) vv[j] = Widen(d, v + p * stride + column + j * lanes);
    TINYLLAMA_UNROLL for (int r = 0; r < R; ++r) {
      const V w = hn::Set(d, e[r][p]);
      TINYLLAMA_UNROLL for (int j = 0; j < NV; ++j) acc[r][j] = hn::MulAdd(w, vv[j], acc[r][j]);
    }
  }
  TINYLLAMA_UNROLL for (int r = 0; r < R; ++r)
    TINYLLAMA_UNROLL for (int j = 0; j < NV; ++j) hn::StoreU(acc[r][j], d, o[r] + column + j * lanes);
}

/// Rows [row, row + count) against one page. With fewer rows than R the last is computed again in the place of those that are missing.
template <class E, int R>
void AttendPage(const AttentionTask& t, index_t row, index_t count, index_t page) {
  const D d;
  const index_t stride = head_stride(t.head_dim), p0 = page * page_tokens;
  const float* q[R];
  float* o[R];
  index_t seen[R], most = 0;  // positions of this page that a row sees
  for (int r = 0; r < R; ++r) {
    const index_t at = row + (r < count ? r : count - 1), token = at / t.group;
    const index_t last = t.position + token + 1 < t.end ? t.position + token + 1 : t.end;
    q[r] = t.q + token * t.ldq + at % t.group * t.head_dim;
    o[r] = t.o + at * stride;
    seen[r] = last - p0 < 0 ? 0 : last - p0 < page_tokens ? last - p0 : page_tokens;
    most = seen[r] > most ? seen[r] : most;
  }
  if (most == 0) return;
  alignas(64) float s[R][page_tokens];
  const std::byte* next = t.pages[row == 0 && (page + 1) * page_tokens < t.end ? page + 1 : page];
  const E* k = reinterpret_cast<const E*>(t.pages[page] + t.k_offset);
  const E *v = reinterpret_cast<const E*>(t.pages[page] + t.v_offset), *next_v = reinterpret_cast<const E*>(next + t.v_offset);
  Scores<E, R>(q, k, reinterpret_cast<const E*>(next + t.k_offset), t.head_dim, hn::Set(d, t.scale), s);
  if constexpr (has_scales<E>)
    for (int r = 0; r < count; ++r)
      for (index_t p = 0; p < page_tokens; p += lanes) hn::Store(hn::Mul(hn::Load(d, s[r] + p), hn::LoadU(d, PageScales(k, t.head_dim) + p)), d, s[r] + p);
  float factor[R];
  const V lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int r = 0; r < R; ++r) {
    if (r >= count) {
      for (index_t p = 0; p < most; p += lanes) hn::Store(hn::Load(d, s[r - 1] + p), d, s[r] + p);
      factor[r] = factor[r - 1];
      continue;
    }
    if (seen[r] == 0) {
      for (index_t p = 0; p < most; ++p) s[r][p] = 0;
      factor[r] = 1.0f;
      continue;
    }
    V m = lowest;
    if (seen[r] < page_tokens)
      for (index_t p = 0; p < page_tokens; p += lanes) {
        // Beyond what the row sees lie other rows' keys or memory that was never written.
        const V x = hn::IfThenElse(hn::Lt(hn::Iota(d, static_cast<float>(p)), hn::Set(d, static_cast<float>(seen[r]))), hn::Load(d, s[r] + p), lowest);
        hn::Store(x, d, s[r] + p);
      }
    for (index_t p = 0; p < page_tokens; p += lanes) m = hn::Max(m, hn::Load(d, s[r] + p));
    const float before = t.max[row + r], found = hn::GetLane(hn::MaxOfLanes(d, m)), max = found > before ? found : before;
    factor[r] = max == before ? 1.0f : std::exp(before - max);
    V sum = hn::Zero(d);
    const V vmax = hn::Set(d, max);
    for (index_t p = 0; p < page_tokens; p += lanes) {
      const V e = math::ExpNonPositive(d, hn::Sub(hn::Load(d, s[r] + p), vmax));
      hn::Store(has_scales<E> ? hn::Mul(e, hn::LoadU(d, PageScales(v, stride) + p)) : e, d, s[r] + p);
      sum = hn::Add(sum, e);
    }
    t.sum[row + r] = t.sum[row + r] * factor[r] + hn::GetLane(hn::SumOfLanes(d, sum));
    t.max[row + r] = max;
  }
  index_t column = 0;
  for (; column + attention_vectors * lanes <= stride; column += attention_vectors * lanes)
    Weighted<E, R, attention_vectors>(s, v, next_v, stride, column, most, factor, o);
  for (; column < stride; column += lanes) Weighted<E, R, 1>(s, v, next_v, stride, column, most, factor, o);
}

template <class E>
void Attend(const AttentionTask& t) {
  const index_t stride = head_stride(t.head_dim);
  for (index_t r = 0; r < t.rows; ++r) {
    t.max[r] = -std::numeric_limits<float>::infinity();
    t.sum[r] = 0;
    for (index_t i = 0; i < stride; ++i) t.o[r * stride + i] = 0;
  }
  constexpr int half = attention_rows / 2;
  for (index_t page = t.begin / page_tokens; page * page_tokens < t.end; ++page)
    for (index_t r = 0; r < t.rows; r += attention_rows) {
      const index_t count = t.rows - r < attention_rows ? t.rows - r : attention_rows;
      if (count > half) AttendPage<E, attention_rows>(t, r, count, page);
      else if (half > 1 && count > 1) AttendPage<E, half>(t, r, count, page);
      else AttendPage<E, 1>(t, r, 1, page);
    }
}

void attention(const AttentionTask& t) {
  if (t.format == Format::f32) Attend<float>(t);
  else if (t.format == Format::f16) Attend<f16>(t);
  else if (t.format == Format::bf16) Attend<bf16>(t);
  else if (t.format == Format::f8_e4m3) Attend<e4m3>(t);
  else Attend<std::int8_t>(t);
}

template <class E>
void StoreKv(const StoreTask& t) {
  E* k = reinterpret_cast<E*>(t.k_page) + t.slot;
  E* v = reinterpret_cast<E*>(t.v_page) + t.slot * head_stride(t.head_dim);
  for (index_t i = 0; i < t.head_dim; ++i) k[i * page_tokens] = static_cast<E>(t.k[i]);
  for (index_t i = 0; i < t.head_dim; ++i) v[i] = static_cast<E>(t.v[i]);
  for (index_t i = t.head_dim; i < head_stride(t.head_dim); ++i) v[i] = E();
}

/// Codes of 8 bits, `step` apart, and their scale.
void StoreCodes(const float* x, index_t n, std::byte* page, index_t at, index_t step, index_t slot, index_t rows) {
  float max = 0;
  for (index_t i = 0; i < n; ++i) {
    const float a = std::fabs(x[i]);
    if (!(a <= max) && max == max) max = a;  // a NaN stays, and makes the scale one
  }
  const float inverse = quantise_inverse(max), scale = max / 127.0f;
  for (index_t i = 0; i < n; ++i) {
    const float code = x[i] * inverse;
    reinterpret_cast<std::int8_t*>(page)[at + i * step] = code == code ? static_cast<std::int8_t>(std::nearbyint(code)) : std::int8_t{0};
  }
  std::memcpy(page + rows * page_tokens + slot * static_cast<index_t>(sizeof scale), &scale, sizeof scale);
}

void store_kv(const StoreTask& t) {
  const index_t stride = head_stride(t.head_dim);
  if (t.format == Format::q8_0) {
    StoreCodes(t.k, t.head_dim, t.k_page, t.slot, page_tokens, t.slot, t.head_dim);
    StoreCodes(t.v, t.head_dim, t.v_page, t.slot * stride, 1, t.slot, stride);
    std::memset(t.v_page + t.slot * stride + t.head_dim, 0, static_cast<std::size_t>(stride - t.head_dim));
    return;
  }
  if (t.format == Format::f32) StoreKv<float>(t);
  else if (t.format == Format::f16) StoreKv<f16>(t);
  else if (t.format == Format::bf16) StoreKv<bf16>(t);
  else StoreKv<e4m3>(t);
}

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
