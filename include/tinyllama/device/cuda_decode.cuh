// The persistent decode kernel (kernels/cuda/decode.cuh) as a step that CudaDevice offers: what it needs once for a model, and once a token.
#pragma once

#include "tinyllama/device/cuda.cuh"
#include "tinyllama/kernels/cuda/decode.cuh"

namespace tinyllama {
namespace cuda {

struct DecodeState {
  DecodePlan plan;
  PoolMemory memory;  // layers, frequencies, exchange
  Upload upload;      // of a step: pages, token, position
  DecodeState(int card, cudaMemPool_t pool, cudaStream_t stream) : memory(card, pool, stream), upload(card, pool, stream) {}
};

/// What a step begins with; the kernel leaves the next token and its position here.
struct DecodeStart {
  std::int32_t token, position;
};

}  // namespace cuda

/// Null where the kernel does not take the model, or would multiply in less than the asked precision: it rounds activations to 8 bits for block formats.
template <class A>
std::shared_ptr<cuda::DecodeState> CudaDevice<A>::prepare_decode(const cuda::ModelPointers& m) {
  const cuda::Current here(card_);
  std::vector<cuda::DecodeLayer> layers;
  bool exact = true;
  const auto one = [&](const Linear& l, int part) {
    const Matrix& w = l.part[static_cast<std::size_t>(part)];
    exact = exact && (!is_quantised(w.format) || (l.compute != Compute::f32 && !std::is_same_v<A, float>));
    return cuda::DecodeMatrix{w.data, w.format};
  };
  for (const auto& l : m.layers)
    layers.push_back({l.attn_norm, l.ffn_norm, one(l.qkv, 0), one(l.qkv, 1), one(l.qkv, 2), one(l.o, 0), one(l.gate_up, 0), one(l.gate_up, 1), one(l.down, 0)});
  auto state = std::make_shared<cuda::DecodeState>(card_, pool_.get(), stream());
  cuda::DecodeModel model{static_cast<int>(layers.size()), m.hidden, m.heads, m.kv_heads, static_cast<int>(m.cache.head_dim), m.ffn, m.vocab, m.eps, m.rope, m.cache.format,
                          {m.embedding.data, m.embedding.format}, one(m.head, 0), nullptr, m.final_norm, nullptr};
  if (!exact || !cuda::make_decode_plan(state->plan, model, layers.data())) return nullptr;
  const auto rounded = [](std::size_t bytes) { return (bytes + 255) / 256 * 256; };
  const std::size_t layers_bytes = rounded(layers.size() * sizeof(cuda::DecodeLayer)), frequencies_bytes = rounded(m.frequencies.size() * sizeof(double));
  std::byte* const at = state->memory.reserve(layers_bytes + frequencies_bytes + state->plan.exchange_bytes);
  upload(at, layers.data(), layers.size() * sizeof(cuda::DecodeLayer));
  upload(at + layers_bytes, m.frequencies.data(), m.frequencies.size() * sizeof(double));
  zero(at + layers_bytes + frequencies_bytes, state->plan.exchange_bytes);
  state->plan.model.layer = reinterpret_cast<const cuda::DecodeLayer*>(at), state->plan.model.frequencies = reinterpret_cast<const double*>(at + layers_bytes);
  cuda::place_decode_exchange(state->plan, at + layers_bytes + frequencies_bytes);
  return state;
}

template <class A>
bool CudaDevice<A>::decode(const Prepared& prepared, float* logits, std::int32_t id, const Sequence& s, std::int32_t* tokens, index_t steps) {
  if (!prepared.decode) return false;
  const cuda::Current here(card_);
  cuda::DecodeState& state = *prepared.decode;
  const auto pages = static_cast<std::size_t>((s.position + steps + page_tokens - 1) / page_tokens), bytes = pages * sizeof(std::byte*);
  std::byte* const host = state.upload.begin(bytes + sizeof(cuda::DecodeStart));
  const cuda::DecodeStart start{id, static_cast<std::int32_t>(s.position)};
  std::memcpy(host, s.pages, bytes), std::memcpy(host + bytes, &start, sizeof start);
  std::byte* const card = state.upload.send();
  auto* const at = reinterpret_cast<cuda::DecodeStart*>(card + bytes);
  const cuda::DecodeStep step{reinterpret_cast<std::byte* const*>(card), &at->token, &at->position, logits, tokens, static_cast<int>(steps)};
  cuda::check(cuda::launch_decode(stream(), state.plan, step), "launch", "decode");
  return true;
}

}  // namespace tinyllama
