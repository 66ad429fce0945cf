// After the first call of each operation on its largest operands, nothing is allocated again.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "tests/kernels/agree.hpp"
#include "tinyllama/device/cpu.hpp"
#include "tinyllama/train/trainer.hpp"

namespace {

std::atomic<bool> counting{false};
std::atomic<long> allocations{0};

void* counted(std::size_t bytes, std::size_t align) {
  if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
  if (bytes >> 40) return nullptr;  // what no test machine has; the address sanitizer would not return
  void* p = nullptr;
  if (posix_memalign(&p, std::max(align, sizeof(void*)), bytes ? bytes : 1) != 0) return nullptr;
  return p;
}
void* counted_or_throw(std::size_t bytes, std::size_t align = alignof(std::max_align_t)) {
  if (void* p = counted(bytes, align)) return p;
  throw std::bad_alloc();
}

using namespace tinyllama;
using namespace tinyllama::test;

template <class F>
long count(F&& f) {
  allocations = 0;
  counting = true;
  f();
  counting = false;
  return allocations;
}

struct tiny : llama_defaults {
  static constexpr int layers = 2, hidden = 64, heads = 4, kv_heads = 2, ffn = 96, vocab = 300, context = 64;
};

}  // namespace

void* operator new(std::size_t n) { return counted_or_throw(n); }
void* operator new[](std::size_t n) { return counted_or_throw(n); }
void* operator new(std::size_t n, std::align_val_t a) { return counted_or_throw(n, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t n, std::align_val_t a) { return counted_or_throw(n, static_cast<std::size_t>(a)); }
// Not inlined, where g++ would see free() at the end of a new-expression and warn.
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

// Cpu::allocate's own way to memory.
extern "C" void* aligned_alloc(std::size_t align, std::size_t bytes) noexcept { return counted(bytes, align); }

TEST_CASE("the counter sees operator new and the device's memory") {
  Cpu dev({.threads = 1});
  // Called by name: a compiler may leave out a pair of new and delete expressions, and clang does.
  CHECK(count([] { ::operator delete(::operator new(4)); }) == 1);
  CHECK(count([&] { dev.deallocate(dev.allocate(1000)); }) == 1);
  CHECK(count([&] { dev.reserve_scratch(1 << 20); }) == 1);
}

TEST_CASE("a second round of all operations allocates nothing") {
  Random random(2);
  constexpr index_t rows = 20, heads = 4, kv_heads = 2, hd = 64, k = heads * hd, n = 300;
  std::vector<TestMatrix> matrices;
  for (const Format f : {Format::q4_K, Format::bf16, Format::f32}) matrices.emplace_back(f, n, k, random);
  Linear packed, stored;
  for (const TestMatrix& m : matrices) {
    packed.part[static_cast<std::size_t>(packed.parts++)] = {m.format, true, n, k, m.packed.data()};
    stored.part[static_cast<std::size_t>(stored.parts++)] = {m.format, false, n, k, m.stored.data()};
  }
  const CacheShape shape{Format::f16, 1, kv_heads, hd};
  std::vector<std::vector<std::byte>> memory(12, std::vector<std::byte>(static_cast<std::size_t>(shape.page_bytes())));
  std::vector<std::byte*> pages;
  for (auto& m : memory) pages.push_back(m.data());
  const Sequence batch[] = {{0, rows - 1, 0, pages.data()}, {rows - 1, 1, 350, pages.data() + 4}};
  std::vector<float> a = random.vector(rows * k), b = random.vector(rows * k), y(static_cast<std::size_t>(rows * 3 * n)), gain = random.vector(k);
  const std::vector<float> kv = random.vector(rows * kv_heads * hd), angle = random.vector(rows * hd / 2);
  const std::vector<std::int32_t> ids(static_cast<std::size_t>(rows), 7);
  for (const int threads : {1, 3}) {
    Cpu dev({.threads = threads});
    const auto round = [&] {
      const auto view = [](auto& v, index_t columns) { return View<float, dyn, dyn>(const_cast<float*>(v.data()), {rows, columns}); };
      dev.embedding(view(a, k), packed.part[0], ids);
      dev.embedding(view(a, k), stored.part[0], ids);
      dev.rmsnorm(view(a, k), view(b, k), gain.data(), 1e-5f);
      dev.add_rmsnorm(view(a, k), view(b, k), view(a, k), gain.data(), 1e-5f);
      dev.add(view(a, k), view(b, k));
      dev.rope(view(a, k), view(angle, hd / 2), view(angle, hd / 2), heads, RopeLayout::half);
      dev.store_kv(view(kv, kv_heads * hd), view(kv, kv_heads * hd), shape, 0, batch);
      dev.attention(view(b, k), view(a, k), shape, 0, batch);
      dev.swiglu(view(a, k), view(a, k), view(b, k));
      dev.softmax(view(a, k), view(a, k), 1.0f);
      dev.matmul(view(y, 3 * n), view(a, k), packed);
      dev.matmul(view(y, 3 * n), view(a, k), stored);
      dev.matmul(slice(view(y, 3 * n), 0, 1), slice(view(a, k), 0, 1), packed);
    };
    round();
    CHECK(count([&] { for (int i = 0; i < 3; ++i) round(); }) == 0);
  }
}

TEST_CASE("scratch reserved as documented is enough: not even the first matmul or attention allocates") {
  Random random(2);
  for (const FormatInfo& f : formats) {
    CAPTURE(std::string(f.name));
    constexpr index_t rows = 100, k = 512, n = 64;
    const TestMatrix m(f.format, n, k, random);
    const auto x = random.vector(rows * k);
    std::vector<float> y(static_cast<std::size_t>(rows * n));
    Cpu dev({.threads = 2});
    dev.reserve_scratch(Cpu::matmul_scratch(rows, k));
    CHECK(count([&] { dev.matmul({y.data(), {rows, n}}, {x.data(), {rows, k}}, Linear(Matrix{f.format, true, n, k, m.packed.data()})); }) == 0);
  }
  const CacheShape shape{Format::f16, 1, 2, 64};
  std::vector<std::byte> page(static_cast<std::size_t>(shape.page_bytes()));
  std::vector<std::byte*> pages(20, page.data());
  const Sequence batch[] = {{0, 3, 1000, pages.data()}, {3, 1, 0, pages.data()}, {4, 50, 10, pages.data()}};
  const auto q = random.vector(54 * 256);
  std::vector<float> out(q.size());
  Cpu dev({.threads = 2});
  dev.reserve_scratch(Cpu::attention_scratch(shape, 4, 4, 1003));
  CHECK(count([&] { dev.attention({out.data(), {54, 256}}, {q.data(), {54, 256}}, shape, 0, batch); }) == 0);
}

TEST_CASE("after the first step of a shape, training allocates nothing") {
  std::vector<std::int32_t> ids(256), targets(256);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i * 7 % 300), targets[i] = static_cast<std::int32_t>(i * 11 % 300);
  for (const int threads : {1, 3})
    for (const Checkpointing how : {Checkpointing::none, Checkpointing::selective, Checkpointing::layer})
      for (const bool lora : {false, true}) {
        CAPTURE(threads);
        CAPTURE(static_cast<int>(how));
        CAPTURE(lora);
        Cpu dev({.threads = threads});
        TrainerOptions options{.checkpointing = how, .tokens = 32, .micro_rows = 2, .logits_rows = 40};
        if (lora) options.lora = LoraOptions{.rank = 4, .dropout = 0.1f, .slots = AdapterSlots::every()};
        Trainer<tiny> trainer(dev, options);
        trainer.step(ids, targets);
        CHECK(count([&] { for (int i = 0; i < 3; ++i) trainer.step(ids, targets), trainer.evaluate(ids, targets); }) == 0);
      }
}
