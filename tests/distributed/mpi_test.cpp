// Mpi under mpirun: every operation gives what it should, and a rank that dies or hangs is an Error of the others, naming rank and operation.
#include <doctest/doctest.h>

#include <chrono>

#include "tests/examples/mpirun.hpp"

namespace {

using namespace tinyllama::test;

bool skipped() {
  const std::string why = no_mpirun();
  if (!why.empty()) MESSAGE("skipped: " << why);
  return !why.empty();
}
double seconds_since(std::chrono::steady_clock::time_point start) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }

}  // namespace

TEST_CASE("mpi: all operations, on 1 to 4 ranks") {
  if (skipped()) return;
  for (const int ranks : {1, 2, 3, 4}) {
    const Result r = run_ranks(ranks, "mpi_ranks", "");
    CHECK_MESSAGE(r.status == 0, r.err);
    CHECK(r.out == std::to_string(ranks) + " ranks agree\n");
  }
}

TEST_CASE("mpi: a rank that is killed is an Error of the others, soon, with its number and the operation") {
  if (skipped()) return;
  for (const int dies : {0, 2}) {
    const auto start = std::chrono::steady_clock::now();
    const Result r = run_ranks(3, "mpi_ranks", "--die " + std::to_string(dies));
    CHECK(seconds_since(start) < 30);
    CHECK(r.status != 0);
    CHECK(r.out.empty());
    for (int rank = 0; rank < 3; ++rank) {
      const std::string says = "error: MPI rank " + std::to_string(rank) + " of 3: reduce of test: expected rank " + std::to_string(dies) + " to take part, found its process ";
      CHECK_MESSAGE((r.err.find(says) != r.err.npos) == (rank != dies), r.err);
    }
  }
}

TEST_CASE("mpi: a rank that hangs is an Error of the others when the time is up") {
  if (skipped()) return;
  const Result r = run_ranks(2, "mpi_ranks", "--hang 1 --timeout 2");
  CHECK(r.status != 0);
  CHECK_MESSAGE(r.err.find("error: MPI rank 0 of 2: reduce of test: expected all ranks to take part within 2 s, found ") != r.err.npos, r.err);
}
