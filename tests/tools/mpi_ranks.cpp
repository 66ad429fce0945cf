// mpi_ranks: under mpirun, every operation of the communicator Mpi against what it should give; or with --die or --hang R, what the others say when rank R does.
#include <CLI/CLI.hpp>

#include <iostream>

#if !defined(TINYLLAMA_MPI)
int main() {
  std::cerr << "built without MPI\n";
  return 3;
}
#else
#include <csignal>
#include <vector>

#include "tinyllama/distributed/mpi.hpp"
#include "tinyllama/distributed/parallel.hpp"

namespace tl = tinyllama;

namespace {

static_assert(tl::Communicator<tl::Mpi>);

int wrong = 0;
void check(bool right, const std::string& what) {
  if (right) return;
  ++wrong;
  std::cerr << what << " is wrong\n";
}

/// Rank r's element i; whole numbers small enough that sums are exact in bf16 too.
float value(int r, tl::index_t i) { return static_cast<float>((i * 7 + r * 3) % 11 - 5); }

template <class T>
std::vector<T> values(int rank, tl::index_t n) {
  std::vector<T> v;
  for (tl::index_t i = 0; i < n; ++i) v.push_back(T(value(rank, i)));
  return v;
}
float folded(int ranks, tl::index_t i, tl::Reduction how) {
  float sum = 0, most = -100;
  for (int r = 0; r < ranks; ++r) sum += value(r, i), most = std::max(most, value(r, i));
  return how == tl::Reduction::max ? most : how == tl::Reduction::mean ? sum / static_cast<float>(ranks) : sum;
}

template <class T>
void check_arrays(tl::Mpi& m, tl::index_t n) {
  constexpr tl::Format format = tl::format_of<T>;
  const int rank = m.rank(), ranks = m.size();
  const tl::Shards s = tl::shards_of(n, ranks);
  const tl::Interval mine = s.of(rank);
  const std::string what = std::string(tl::name(format)) + " [" + std::to_string(n) + "]";
  const auto same = [](T found, float expected) { return std::abs(static_cast<float>(found) - static_cast<float>(T(expected))) <= 0.01f * std::abs(expected); };
  for (const tl::Reduction how : {tl::Reduction::sum, tl::Reduction::max, tl::Reduction::mean}) {
    // Both under way at once.
    auto all = values<T>(rank, n);
    const auto in = values<T>(rank, n);
    std::vector<T> out(static_cast<std::size_t>(mine.size()) + 1, T(77.0f));
    auto first = m.start_all_reduce(all.data(), n, format, how, "test values");
    auto second = m.start_reduce_scatter(out.data(), in.data(), s, format, how, "test values");
    m.progress();
    m.wait(second), m.wait(first), m.wait(first);
    bool right = static_cast<float>(out.back()) == 77.0f;
    for (tl::index_t i = 0; i < n; ++i) right &= same(all[static_cast<std::size_t>(i)], folded(ranks, i, how));
    for (tl::index_t i = mine.begin; i < mine.end; ++i) right &= same(out[static_cast<std::size_t>(i - mine.begin)], folded(ranks, i, how));
    check(right, "all_reduce or reduce_scatter of " + what);
  }
  const auto whole = values<T>(1, n);
  std::vector<T> gathered(static_cast<std::size_t>(n)), in_place(static_cast<std::size_t>(n)), sent(static_cast<std::size_t>(n));
  std::copy(whole.begin() + mine.begin, whole.begin() + mine.end, in_place.begin() + mine.begin);
  if (rank == ranks - 1) sent = whole;
  auto a = m.start_all_gather(gathered.data(), whole.data() + mine.begin, s, format, "test values");
  auto b = m.start_all_gather(in_place.data(), in_place.data() + mine.begin, s, format, "test values");
  auto c = m.start_broadcast(sent.data(), n, format, ranks - 1, "test values");
  m.wait(c), m.wait(a), m.wait(b);
  const auto equal = [&](const std::vector<T>& found) {
    for (std::size_t i = 0; i < found.size(); ++i)
      if (static_cast<float>(found[i]) != static_cast<float>(whole[i])) return false;
    return true;
  };
  check(equal(gathered) && equal(in_place) && equal(sent), "all_gather or broadcast of " + what);
}

void check_numbers(tl::Mpi& m) {
  const double r = m.rank(), n = m.size();
  std::vector<double> sum{r, 1e15 + 1}, most{r, -r}, mean{r};
  m.reduce(sum, tl::Reduction::sum, "test"), m.reduce(most, tl::Reduction::max, "test"), m.reduce(mean, tl::Reduction::mean, "test");
  check(sum[0] == n * (n - 1) / 2 && sum[1] == n * (1e15 + 1) && most[0] == n - 1 && most[1] == 0 && mean[0] == (n - 1) / 2, "reduce of numbers");
  std::vector<std::byte> bytes(5, std::byte(m.rank()));
  m.broadcast(bytes, m.size() - 1, "test");
  check(bytes[4] == std::byte(m.size() - 1), "broadcast of bytes");
  m.barrier("test");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Checks the communicator Mpi; to be run by mpirun.");
  int die = -1, hang = -1;
  double timeout = 25;
  app.add_option("--die", die, "the rank that is killed");
  app.add_option("--hang", hang, "the rank that sleeps");
  app.add_option("--timeout", timeout, "seconds");
  CLI11_PARSE(app, argc, argv);
  std::signal(SIGTERM, SIG_IGN);
  try {
    tl::Mpi m({.timeout = std::chrono::duration<double>(timeout)});
    check_numbers(m);
    for (const tl::index_t n : {1, 15, 16, 17, 64, 1000, 100003}) check_arrays<float>(m, n), check_arrays<tl::bf16>(m, n);
    if (m.rank() == die) std::raise(SIGKILL);
    if (m.rank() == hang) ::sleep(static_cast<unsigned>(timeout) + 4);
    check_numbers(m);
    if (wrong == 0 && m.rank() == 0) std::cout << m.size() << " ranks agree" << std::endl;
  } catch (const tl::Error& e) {
    std::cerr << "error: " << e.what() << std::endl;
    return 1;
  }
  return wrong > 0;
}
#endif
