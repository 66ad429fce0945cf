// Where tests find their files: committed fixtures, data that may not be committed, SmolLM2, and a folder to write into; files as strings.
#pragma once

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

namespace tinyllama::test {

/// A committed file under tests/fixtures.
inline std::filesystem::path fixture(const std::string& name) { return std::filesystem::path(TINYLLAMA_TEST_FIXTURES) / name; }

/// A file under $TINYLLAMA_TEST_DATA (default: the folder `shared` beside the repository), or nothing where it is absent.
inline std::optional<std::filesystem::path> test_data(const std::string& name) {
  const char* folder = std::getenv("TINYLLAMA_TEST_DATA");
  const auto path = std::filesystem::path(folder ? folder : TINYLLAMA_TEST_DATA_DEFAULT) / name;
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return std::nullopt;
  return path;
}

/// SmolLM2-135M-Instruct (Q4_1 GGUF): $TINYLLAMA_SMOLLM2, or where cmake/fetch_smollm2.sh puts it; nothing where it is absent.
inline std::optional<std::filesystem::path> smollm2_gguf() {
  const char* file = std::getenv("TINYLLAMA_SMOLLM2");
  const auto path = file ? std::filesystem::path(file) : std::filesystem::path(TINYLLAMA_TEST_CACHE) / "SmolLM2-135M-Instruct.Q4_1.gguf";
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return std::nullopt;
  return path;
}

/// A file's bytes; a file that cannot be read fails the test.
inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error(path.string() + ": cannot be read");
  return {std::istreambuf_iterator<char>(in), {}};
}
inline void write_file(const std::filesystem::path& path, std::string_view content) {
  std::ofstream(path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
}

/// A new, empty folder that is removed with all it holds.
class TempFolder {
 public:
  TempFolder() {
    static std::atomic<unsigned> count{0};
    // Tests run as many processes at once: a random part keeps their folders apart.
    path_ = std::filesystem::temp_directory_path() / ("tinyllama-test-" + std::to_string(std::random_device{}()) + "-" + std::to_string(count++));
    std::filesystem::create_directories(path_);
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

}  // namespace tinyllama::test
