// Weights mapped from a packed file: the same bits, and never another checkpoint's or a damaged one's.
#include "tinyllama/model/packed_file.hpp"

#include <doctest/doctest.h>

#include <fstream>

#include "tests/model/golden.hpp"

namespace tl = tinyllama;
using namespace tinyllama::test;

namespace {

template <class C>
struct Packed {
  tl::Cpu dev{{.threads = 2, .kernels = nullptr}};
  std::vector<std::int32_t> ids = std::vector<std::int32_t>{5, 3, 8, 13, 21, 2, 7};
  // Whether the weights came from the file, and the logits.
  std::pair<bool, std::vector<float>> load(const std::filesystem::path& packed) {
    const auto model = tl::load<C>(dev, golden_folder<C>(), {.packed = packed});
    auto session = model.start();
    const auto l = session.prefill(ids);
    return {model.weights().mapped.has_value(), {l.begin(), l.end()}};
  }
};

void overwrite(const std::filesystem::path& path, std::size_t at, std::size_t count) {
  std::fstream f(path, std::ios::in | std::ios::out | std::ios::binary);
  f.seekp(static_cast<std::streamoff>(at));
  for (std::size_t i = 0; i < count; ++i) f.put('\x5a');
}

template <class C>
void check_packed() {
  const TempFolder folder;
  const auto file = folder.path() / "weights.packed";
  Packed<C> p;
  const auto expected = p.load({});
  CHECK_FALSE(expected.first);
  const auto check = [&](bool mapped) {
    const auto got = p.load(file);
    CHECK(got.first == mapped);
    CHECK(got.second == expected.second);
  };
  check(false);  // written
  const auto size = std::filesystem::file_size(file);
  check(true);
  SUBCASE("cut short") { std::filesystem::resize_file(file, size - 1); }
  SUBCASE("another version") { overwrite(file, 8, 1); }
  SUBCASE("another layout") { overwrite(file, 16, 1); }
  SUBCASE("another checkpoint") { overwrite(file, 24, 1); }
  SUBCASE("other weights") { overwrite(file, tl::packed_file_offset, size - tl::packed_file_offset); }
  SUBCASE("not a packed file") { std::ofstream(file, std::ios::binary) << "text"; }
  check(false);  // written anew
  CHECK(std::filesystem::file_size(file) == size);
  check(true);
}

}  // namespace

TEST_CASE("packed file: an untied model") { check_packed<golden_gqa>(); }
TEST_CASE("packed file: a tied one") { check_packed<golden_tied>(); }

TEST_CASE("packed file: other weights of the same shape are another checkpoint") {
  const TempFolder folder;
  const auto other = folder.path() / "other", file = folder.path() / "weights.packed";
  std::filesystem::copy(golden_folder<golden_gqa>(), other);
  std::filesystem::permissions(other / "model.safetensors", std::filesystem::perms::owner_write, std::filesystem::perm_options::add);
  overwrite(other / "model.safetensors", std::filesystem::file_size(other / "model.safetensors") - 32, 16);  // the last tensor's last row
  const auto a = tl::open_checkpoint(golden_folder<golden_gqa>()), b = tl::open_checkpoint(other);
  const auto ha = tl::packed_header(golden_gqa{}, a), hb = tl::packed_header(golden_gqa{}, b);
  CHECK(ha.layout == hb.layout);
  CHECK(ha.source != hb.source);
  Packed<golden_gqa> p;
  p.load(file);
  CHECK_FALSE(tl::load<golden_gqa>(p.dev, b, {.packed = file}).weights().mapped);
  CHECK_FALSE(p.load(file).first);  // the file is now the other's
}

TEST_CASE("packed file: a place that cannot be written is an Error that names it") {
  Packed<golden_gqa> p;
  CHECK_THROWS_WITH_AS(p.load("/nowhere/weights.packed"), doctest::Contains("/nowhere/weights.packed"), tl::Error);
}
