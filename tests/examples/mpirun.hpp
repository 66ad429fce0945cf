// Runs the project's programs under mpirun, where there is one and they were built with MPI.
#pragma once

#include "tests/examples/run.hpp"

namespace tinyllama::test {

/// mpirun with `ranks` ranks on whatever cores there are: as root too, without a network, and without the cores being divided among the ranks.
inline std::string mpirun(int ranks) {
  return "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_btl=self,vader OMPI_MCA_btl_vader_single_copy_mechanism=none "
         "mpirun --oversubscribe --bind-to none -n " + std::to_string(ranks) + " ";
}

/// Why nothing can be run under mpirun; "" where it can.
inline std::string no_mpirun() {
  if (run_line("mpirun --version").status != 0) return "no mpirun (Debian: openmpi-bin)";
  const Result r = run_line(mpirun(1) + quoted(program_path("mpi_ranks")));
  if (r.err.find("built without MPI") != r.err.npos) return "built without MPI (Debian: libopenmpi-dev)";
  return r.status == 0 ? "" : "mpirun does not run here: " + r.err.substr(0, 200);
}

inline Result run_ranks(int ranks, const std::string& program, const std::string& arguments) {
  return run_line(mpirun(ranks) + quoted(program_path(program)) + " " + arguments);
}

}  // namespace tinyllama::test
