// The operations of CudaDevice as launches of kernels. For nvcc; units of other compilers link with one that has these (device/cuda.cu).
#pragma once

#include "tinyllama/device/cuda.cuh"
#include "tinyllama/device/cuda_decode.cuh"
#include "tinyllama/device/cuda_products.cuh"
#include "tinyllama/kernels/cuda/attention_launch.cuh"
#include "tinyllama/kernels/cuda/attention_scores.cuh"
#include "tinyllama/kernels/cuda/embedding.cuh"
#include "tinyllama/kernels/cuda/rmsnorm.cuh"
#include "tinyllama/kernels/cuda/rope.cuh"
#include "tinyllama/kernels/cuda/sample.cuh"
#include "tinyllama/kernels/cuda/softmax.cuh"
#include "tinyllama/kernels/cuda/swiglu.cuh"

namespace tinyllama {

template <class A>
bool CudaDevice<A>::hopper() {
  if (hopper_ < 0) {
    const cuda::Current here(card_);
    hopper_ = capability_ == 90 && cuda::hopper::compiled();
  }
  return hopper_;
}

template <class A>
typename CudaDevice<A>::Batch CudaDevice<A>::batch(std::span<const std::int32_t> ids, std::span<const Sequence> sequences) {
  return batch(ids, nullptr, static_cast<index_t>(ids.size()), sequences);
}
template <class A>
typename CudaDevice<A>::Batch CudaDevice<A>::batch(DeviceIds ids, std::span<const Sequence> sequences) { return batch({}, ids.data, ids.count, sequences); }

template <class A>
typename CudaDevice<A>::Batch CudaDevice<A>::batch(std::span<const std::int32_t> ids, const std::int32_t* on_card, index_t rows, std::span<const Sequence> sequences) {
  index_t pages = 0;
  for (const Sequence& s : sequences) {
    rows = std::max(rows, s.first_row + s.tokens);
    if (s.pages) pages += (s.position + s.tokens + page_tokens - 1) / page_tokens;
  }
  // One array: sequences, ids, positions, page_first, page table; what grows from step to step comes last.
  const auto n = static_cast<std::size_t>(rows);
  const std::size_t ids_at = sequences.size() * sizeof(cuda::BatchSequence), pages_at = (ids_at + 3 * n * sizeof(std::int32_t) + 7) / 8 * 8;
  std::byte* const host = batch_upload_.begin(pages_at + static_cast<std::size_t>(pages) * sizeof(std::byte*));
  auto* sequence = reinterpret_cast<cuda::BatchSequence*>(host);
  auto *id = reinterpret_cast<std::int32_t*>(host + ids_at), *position = id + n, *page_of = position + n;
  auto** page = reinterpret_cast<std::byte**>(host + pages_at);
  Batch b;
  std::copy(ids.begin(), ids.end(), id);
  std::int32_t first_page = 0;
  for (const Sequence& s : sequences) {
    *sequence++ = {static_cast<std::int32_t>(s.first_row), static_cast<std::int32_t>(s.tokens), static_cast<std::int32_t>(s.position), first_page};
    const auto count = s.pages ? static_cast<std::int32_t>((s.position + s.tokens + page_tokens - 1) / page_tokens) : 0;
    if (count) std::copy_n(s.pages, count, page + first_page);
    for (index_t t = 0; t < s.tokens; ++t) position[s.first_row + t] = static_cast<std::int32_t>(s.position + t), page_of[s.first_row + t] = first_page;
    first_page += count;
    b.most_tokens = std::max(b.most_tokens, static_cast<int>(s.tokens));
  }
  std::byte* const card = batch_upload_.send();
  b.sequences = reinterpret_cast<const cuda::BatchSequence*>(card), b.pages = reinterpret_cast<std::byte* const*>(card + pages_at);
  const auto* const numbers = reinterpret_cast<const std::int32_t*>(card + ids_at);
  b.ids = on_card ? on_card : numbers, b.positions = numbers + n, b.page_first = b.positions + n;
  b.rows = static_cast<int>(rows), b.count = static_cast<int>(sequences.size());
  b.host_sequences = sequences;
  planned_ = false;
  if (split_) split_->normed = nullptr;  // of a step that was given up
  return last_ = b;
}

template <class A>
Matrix CudaDevice<A>::pack(std::byte* to, const Matrix& from) const {
  const auto row = static_cast<index_t>(row_bytes(from.format, from.columns));
  Matrix m = from;
  m.packed = true, m.data = to, m.scale = nullptr;
  const std::size_t bytes = packed_bytes(from.format, from.rows, from.columns);
  if (!is_quantised(from.format) && row == cuda::packed_row_bytes(from.format, from.columns)) {
    upload(to, from.data, bytes);
  } else {
    std::vector<std::byte> host(bytes);
    cuda::pack_rows(from.format, from.columns, from.data, 0, from.rows, host.data(), from.scale);
    upload(to, host.data(), bytes);
  }
  return m;
}

template <class A>
void CudaDevice<A>::embedding(View<float, dyn, dyn> out, const Matrix& table, const Batch& b) {
  const cuda::Current here(card_);
  if (!table.packed) throw Error("embedding", "table", "packed by the device", "rows as in a file");
  cuda::embedding(stream(), table.format, {out.data(), out.stride(0), table.data, static_cast<int>(table.columns), b.ids, b.rows});
}

template <class A>
void CudaDevice<A>::rope_angles(View<float, dyn, dyn> cos, View<float, dyn, dyn> sin, std::span<const double> frequencies, const Batch& b) {
  const cuda::Current here(card_);
  cuda::RopeAnglesTask t{cos.data(), sin.data(), b.positions, b.rows, static_cast<int>(frequencies.size()), {}};
  detail::expect_extent("rope_angles", "frequencies", cos.extent(1), static_cast<index_t>(frequencies.size()));
  if (frequencies.size() > std::size(t.frequencies)) throw Error("rope_angles", "frequencies", "at most " + std::to_string(std::size(t.frequencies)), std::to_string(frequencies.size()));
  if (!cos.contiguous() || !sin.contiguous()) throw Error("rope_angles", "cos and sin", "contiguous rows", "strides");
  std::copy(frequencies.begin(), frequencies.end(), t.frequencies);
  cuda::rope_angles(stream(), t);
}

template <class A>
void CudaDevice<A>::rmsnorm(View<A, dyn, dyn> out, View<const float, dyn, dyn> x, const float* gain, float eps) {
  const cuda::Current here(card_);
  forget_norm(out.data());
  // Without a residual x is only read.
  cuda::rmsnorm<A>(stream(), {out.data(), out.stride(0), const_cast<float*>(x.data()), x.stride(0), nullptr, 0, gain, static_cast<int>(x.extent(0)), static_cast<int>(x.extent(1)), eps});
}

template <class A>
void CudaDevice<A>::add_rmsnorm(View<A, dyn, dyn> out, View<float, dyn, dyn> x, View<const float, dyn, dyn> residual, const float* gain, float eps) {
  const cuda::Current here(card_);
  forget_norm(out.data());
  cuda::rmsnorm<A>(stream(), {out.data(), out.stride(0), x.data(), x.stride(0), residual.data(), residual.stride(0), gain, static_cast<int>(x.extent(0)), static_cast<int>(x.extent(1)), eps});
}

template <class A>
void CudaDevice<A>::add(View<float, dyn, dyn> x, View<const float, dyn, dyn> residual) {
  const cuda::Current here(card_);
  cuda::add(stream(), x.data(), x.stride(0), residual.data(), residual.stride(0), x.extent(0), x.extent(1));
}

template <class A>
void CudaDevice<A>::rope(View<A, dyn, dyn> x, View<const float, dyn, dyn> cos, View<const float, dyn, dyn> sin, index_t heads, RopeLayout layout) {
  const cuda::Current here(card_);
  if (cos.stride(0) != sin.stride(0)) throw Error("rope", "cos and sin", "rows at the same distance", std::to_string(cos.stride(0)) + " and " + std::to_string(sin.stride(0)));
  cuda::rope<A>(stream(), {x.data(), x.stride(0), cos.data(), sin.data(), cos.stride(0), static_cast<int>(x.extent(0)), static_cast<int>(heads), static_cast<int>(2 * cos.extent(1)), layout});
}

namespace cuda {
template <class A>
StoreKvArgs<A> store_args(View<const A, dyn, dyn> k, View<const A, dyn, dyn> v, const CacheShape& shape, index_t layer, const BatchView& b) {
  StoreKvArgs<A> a{};
  a.k = k.data(), a.v = v.data(), a.ldk = k.stride(0), a.ldv = v.stride(0);
  a.tokens = b.rows, a.kv_heads = static_cast<int>(shape.kv_heads), a.head_dim = static_cast<int>(shape.head_dim), a.format = shape.format;
  a.pages = b.pages, a.page_first = b.page_first, a.position = b.positions;
  a.k_offset = shape.k_offset(layer, 0), a.v_offset = shape.v_offset(layer, 0), a.head_bytes = shape.head_bytes();
  return a;
}
}  // namespace cuda

template <class A>
void CudaDevice<A>::store_kv(View<const A, dyn, dyn> k, View<const A, dyn, dyn> v, const CacheShape& shape, index_t layer, const Batch& b) {
  const cuda::Current here(card_);
  cuda::store_kv(stream(), cuda::store_args<A>(k, v, shape, layer, b));
  cuda::launched("store_kv");
}

template <class A>
void CudaDevice<A>::rope_store_kv(View<A, dyn, dyn> q, View<const A, dyn, dyn> k, View<const A, dyn, dyn> v, View<const float, dyn, dyn> cos, View<const float, dyn, dyn> sin,
                                  RopeLayout layout, const CacheShape& shape, index_t layer, const Batch& b, const cuda::RowScale& scale) {
  auto a = cuda::store_args<A>(k, v, shape, layer, b);
  a.q = q.data(), a.ldq = q.stride(0), a.heads = static_cast<int>(q.extent(1) / shape.head_dim);
  a.cos = cos.data(), a.sin = sin.data(), a.ld_angles = cos.stride(0), a.layout = layout, a.scale = scale;
  cuda::store_kv(stream(), a);
  cuda::launched("rope_store_kv");
}

/// Once a step: its layers share the plans.
template <class A>
void CudaDevice<A>::plan_attention(const CacheShape& shape, index_t group, const Batch& b) {
  if (std::exchange(planned_, true)) return;
  const bool tensor_cores = by_tensor_cores(shape);
  const auto many = [&](const Sequence& s) { return by_flash(shape, group, s); };
  index_t rows = 0;
  for (const Sequence& s : b.host_sequences)
    if (!many(s)) rows = std::max(rows, s.tokens * group);
  const index_t tile = !tensor_cores ? cuda::any_tile_rows : rows <= 8 ? 8 : rows <= 16 ? 16 : 32;
  const index_t blocks = multiprocessors_ * (tensor_cores ? cuda::paged_blocks_per_sm(shape.head_dim, tile) : 2);
  auto few = cuda::plan_even(b.host_sequences, shape.kv_heads, group, tile, blocks, [&](const Sequence& s) { return !many(s); });
  // A step that may become a graph: the launch and its memory are those of the longest sequences. A block cuts one tile at most.
  if (b.most_tokens == 1 && !few.empty()) few.pad(static_cast<std::int32_t>(blocks)), few.parts = static_cast<std::int32_t>(2 * blocks);
  few_.send(std::move(few));
  index_t many_rows = 0;
  for (const Sequence& s : b.host_sequences)
    if (many(s)) many_rows += s.tokens * group * shape.kv_heads;
  many_.send(cuda::plan_whole(b.host_sequences, shape.kv_heads, group, cuda::flash_tile_rows(shape.head_dim, many_rows, multiprocessors_), multiprocessors_, many));
  if (const std::size_t counters = static_cast<std::size_t>(std::max(few_.plan.parts, many_.plan.parts)) * sizeof(unsigned); counters > counters_.size()) {
    counters_.reserve(2 * counters);
    zero(counters_.data(), counters_.size());  // the kernels leave them at zero
  }
}

template <class A>
void CudaDevice<A>::attention(View<A, dyn, dyn> out, View<const A, dyn, dyn> q, const CacheShape& shape, index_t layer, const Batch& b) {
  const cuda::Current here(card_);
  const index_t group = q.extent(1) / shape.head_dim / shape.kv_heads;
  plan_attention(shape, group, b);
  cuda::AttentionArgs<A, A> a{};
  a.q = q.data(), a.out = out.data(), a.ldq = q.stride(0), a.ldo = out.stride(0);
  a.head_dim = static_cast<int>(shape.head_dim), a.group = static_cast<int>(group), a.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim)), a.format = shape.format;
  a.pages = b.pages, a.k_offset = shape.k_offset(layer, 0), a.v_offset = shape.v_offset(layer, 0), a.head_bytes = shape.head_bytes();
  // The prefill kernel's operands are of 16 bits: pages of e4m3 become some in scratch, behind the partial results of the other kernel and the table of pages.
  const bool expands = shape.format == Format::f8_e4m3 && !many_.plan.empty();
  const auto pages_of = [](const Sequence& s) { return (s.position + s.tokens + page_tokens - 1) / page_tokens; };
  const index_t page_bytes = cuda::expanded_page_bytes(shape.kv_heads, shape.head_dim);
  index_t all_pages = 0, many_pages = 0;
  if (expands)
    for (const Sequence& s : b.host_sequences) all_pages += pages_of(s), many_pages += by_flash(shape, group, s) ? pages_of(s) : 0;
  const std::size_t table_at = (few_.plan.scratch_bytes(shape.head_dim) + 255) / 256 * 256, pages_at = (table_at + static_cast<std::size_t>(all_pages) * sizeof(std::byte*) + 255) / 256 * 256;
  std::byte* const memory = scratch(expands ? pages_at + static_cast<std::size_t>(many_pages * page_bytes) : few_.plan.scratch_bytes(shape.head_dim));
  a.scratch = reinterpret_cast<float*>(memory), a.counters = reinterpret_cast<unsigned*>(counters_.data());
  if constexpr (std::is_same_v<A, bf16>) {
    if (expands) {
      cuda::ExpandArgs e{shape.format, a.head_dim, static_cast<int>(shape.kv_heads), 0, b.pages, a.k_offset, a.v_offset, a.head_bytes, memory + pages_at, reinterpret_cast<const std::byte**>(memory + table_at)};
      auto wide = many_.of(a);
      wide.format = Format::bf16, wide.pages = e.out_pages, wide.k_offset = 0, wide.head_bytes = cuda::expanded_head_bytes(shape.head_dim), wide.v_offset = wide.head_bytes / 2;
      for (const Sequence& s : b.host_sequences) {
        e.count = static_cast<int>(pages_of(s));
        if (by_flash(shape, group, s)) cuda::expand_cache(stream(), e), e.out += e.count * page_bytes;
        e.pages += e.count, e.out_pages += e.count;
      }
      cuda::attention_flash<A>(stream(), wide);
    } else if (!many_.plan.empty()) {
      cuda::attention_flash<A>(stream(), many_.of(a));
    }
    if (by_tensor_cores(shape)) return cuda::attention_paged<A>(stream(), few_.of(a));
  }
  cuda::attention_any(stream(), few_.of(a));
}

template <class A>
std::vector<float> CudaDevice<A>::attention_probabilities(View<const A, dyn, dyn> q, const CacheShape& shape, index_t layer, const Sequence& s) {
  const cuda::Current here(card_);
  int index = 0;
  while (index < last_.count && last_.host_sequences[static_cast<std::size_t>(index)].first_row != s.first_row) ++index;
  if (index == last_.count) throw Error("attention_probabilities", "sequence", "one of the last batch", "row " + std::to_string(s.first_row));
  const index_t heads = q.extent(1) / shape.head_dim, length = s.position + s.tokens, rows = heads * s.tokens;
  std::vector<float> p(static_cast<std::size_t>(rows * length));
  auto* scores = reinterpret_cast<float*>(scratch(p.size() * sizeof(float)));
  const cuda::ScoresTask<A> t{scores, q.data(), q.stride(0), static_cast<int>(heads), static_cast<int>(shape.kv_heads), static_cast<int>(shape.head_dim),
                              1.0f / std::sqrt(static_cast<float>(shape.head_dim)), shape.k_offset(layer, 0), shape.head_bytes()};
  cuda::attention_scores(stream(), shape.format, t, last_, index, static_cast<int>(s.tokens));
  cuda::softmax(stream(), {scores, length, scores, length, static_cast<int>(rows), static_cast<int>(length), 1.0f});
  download(p.data(), scores, p.size() * sizeof(float));
  return p;
}

template <class A>
void CudaDevice<A>::last_rows(View<A, dyn, dyn> out, View<const A, dyn, dyn> x, const Batch& b) {
  const cuda::Current here(card_);
  cuda::last_rows(stream(), out.data(), out.stride(0), x.data(), x.stride(0), x.extent(1), b);
}

template <class A>
void CudaDevice<A>::swiglu(View<A, dyn, dyn> out, View<const A, dyn, dyn> gate, View<const A, dyn, dyn> up) {
  const cuda::Current here(card_);
  cuda::swiglu<A>(stream(), {out.data(), out.stride(0), gate.data(), up.data(), gate.stride(0), up.stride(0), static_cast<int>(out.extent(0)), static_cast<int>(out.extent(1))});
}

template <class A>
void CudaDevice<A>::softmax(View<float, dyn, dyn> out, View<const float, dyn, dyn> x, float scale) {
  const cuda::Current here(card_);
  cuda::softmax(stream(), {out.data(), out.stride(0), x.data(), x.stride(0), static_cast<int>(x.extent(0)), static_cast<int>(x.extent(1)), scale});
}

template <class A>
void CudaDevice<A>::argmax(std::int32_t* ids, View<const float, dyn, dyn> x) {
  const cuda::Current here(card_);
  cuda::sample(stream(), {ids, x.data(), x.stride(0), static_cast<int>(x.extent(0)), static_cast<int>(x.extent(1)), nullptr});
}

template <class A>
void CudaDevice<A>::sample(std::int32_t* ids, View<const float, dyn, dyn> x, std::span<const Draw> how) {
  const cuda::Current here(card_);
  detail::expect_extent("sample", "draws", x.extent(0), static_cast<index_t>(how.size()));
  if (x.extent(1) > 1 << 18) throw Error("sample", "logits", "at most 262144 in a row", std::to_string(x.extent(1)));
  if (!how.empty()) std::memcpy(draws_.begin(how.size_bytes()), how.data(), how.size_bytes());
  const std::byte* const draws = how.empty() ? nullptr : draws_.send();
  cuda::sample(stream(), {ids, x.data(), x.stride(0), static_cast<int>(x.extent(0)), static_cast<int>(x.extent(1)), reinterpret_cast<const Draw*>(draws)});
}

}  // namespace tinyllama
