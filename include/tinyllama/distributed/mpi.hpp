// Mpi: the communicator of processes that mpirun started, over MPI's nonblocking collectives. With the CMake target tinyllama::mpi.
//
// A rank that dies takes no part in what the others wait for, and MPI tells nobody: over shared memory it cannot know. So every wait here polls: the request,
// the other processes of this machine (a file descriptor of each becomes readable when it ends), and the clock.
#pragma once

#include <mpi.h>

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sched.h>

#include "tinyllama/distributed/communicator.hpp"
#include "tinyllama/io/file.hpp"

namespace tinyllama {

struct MpiOptions {
  /// How long a wait may take; 0: for ever. A rank of this machine that ends is noticed within some 0.2 s whatever this is; this is for the others, and for
  /// those that hang. Longer than the longest time in which ranks may fall apart: reading a model, for one.
  std::chrono::duration<double> timeout = std::chrono::seconds(25);
};

/// Memory is the host's. One thread at a time, that which made it. Initialises MPI if nobody has, and then ends it too; has a communicator of its own, so that
/// the program's messages and these do not meet.
class Mpi {
 public:
  class Request {
    friend class Mpi;
    MPI_Request handle = MPI_REQUEST_NULL;
    std::string_view operation = {}, what = {};
    void* scaled = nullptr;  // of a mean: what is still to be divided
    index_t n = 0;
    Format format = Format::f32;
  };

  explicit Mpi(const MpiOptions& options = {}) : options_(options) {
    int there = 0, level = 0;
    MPI_Initialized(&there);
    if (!there) check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level), "MPI_Init_thread", "");
    ours_ = !there;
    check(MPI_Comm_dup(MPI_COMM_WORLD, &comm_), "MPI_Comm_dup", "");
    MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
    MPI_Comm_rank(comm_, &rank_), MPI_Comm_size(comm_, &size_);
    check(MPI_Type_contiguous(2, MPI_BYTE, &bf16_), "MPI_Type_contiguous", ""), check(MPI_Type_commit(&bf16_), "MPI_Type_commit", "");
    check(MPI_Op_create(&fold_bf16<Reduction::sum>, 1, &bf16_sum_), "MPI_Op_create", ""), check(MPI_Op_create(&fold_bf16<Reduction::max>, 1, &bf16_max_), "MPI_Op_create", "");
    meet();
  }
  /// Sums that are to be under way at once: a nonblocking one takes a temporary copy of its input.
  static constexpr std::size_t in_flight = 2;
  Mpi(const Mpi&) = delete;
  Mpi& operator=(const Mpi&) = delete;
  /// Waits for the others, unless an Error is on its way: then nobody waits for anybody, and mpirun ends what is left.
  ~Mpi() {
    if (failed_ || std::uncaught_exceptions() > exceptions_) return;
    try {
      barrier("the end");
    } catch (const Error&) {
      return;
    }
    MPI_Op_free(&bf16_sum_), MPI_Op_free(&bf16_max_), MPI_Type_free(&bf16_), MPI_Comm_free(&comm_);
    if (ours_) MPI_Finalize();
  }

  int rank() const { return rank_; }
  int size() const { return size_; }
  /// Ranks that may use the same cores as this one, itself included: between them the threads are to be divided.
  int ranks_on_these_cores() const { return sharing_; }
  /// A rank of this machine whose process has ended, if there is one. From any thread.
  std::optional<int> lost() const {
    const Peer* const gone = ended();
    return gone ? std::optional(gone->rank) : std::nullopt;
  }

  Request start_all_reduce(void* out, index_t n, Format format, Reduction how, std::string_view what) {
    Request r = begin("all_reduce", what);
    const Folding f = folding(format, how);
    check(MPI_Iallreduce(MPI_IN_PLACE, out, count(n, r), f.type, f.op, comm_, &r.handle), r);
    return scaled(r, out, n, format, how);
  }
  Request start_reduce_scatter(void* out, const void* in, const Shards& shards, Format format, Reduction how, std::string_view what) {
    Request r = begin("reduce_scatter", what);
    const Folding f = folding(format, how);
    check(MPI_Ireduce_scatter(in, out, cut(shards, r).sizes.data(), f.type, f.op, comm_, &r.handle), r);
    return scaled(r, out, shards.of(rank_).size(), format, how);
  }
  Request start_all_gather(void* out, const void* in, const Shards& shards, Format format, std::string_view what) {
    Request r = begin("all_gather", what);
    const MPI_Datatype type = folding(format, Reduction::sum).type;
    const Cut& c = cut(shards, r);
    const bool in_place = in == static_cast<const std::byte*>(out) + row_bytes(format, shards.of(rank_).begin);
    const auto mine = static_cast<std::size_t>(rank_);
    check(MPI_Iallgatherv(in_place ? MPI_IN_PLACE : in, in_place ? 0 : c.sizes[mine], type, out, c.sizes.data(), c.begins.data(), type, comm_, &r.handle), r);
    return r;
  }
  Request start_broadcast(void* out, index_t n, Format format, int root, std::string_view what) {
    Request r = begin("broadcast", what);
    check(MPI_Ibcast(out, count(n, r), folding(format, Reduction::sum).type, root, comm_, &r.handle), r);
    return r;
  }

  void wait(Request& r) {
    using Clock = std::chrono::steady_clock;
    if (r.handle == MPI_REQUEST_NULL) return;
    const Clock::time_point start = Clock::now();
    Clock::time_point next_look = start + std::chrono::milliseconds(5);
    Clock::time_point gone_since = start;
    const Peer* gone = nullptr;
    for (int polls = 0; !done(r); ++polls) {
      const Clock::time_point now = Clock::now();
      if (now >= next_look) {
        next_look = now + std::chrono::milliseconds(5);
        // What a rank sent before it ended may still be under way.
        if (!gone) gone = ended(), gone_since = now;
        else if (now - gone_since > std::chrono::milliseconds(200))
          fail(r, "rank " + std::to_string(gone->rank) + " to take part", "its process " + std::to_string(gone->pid) + " has ended");
        if (options_.timeout.count() > 0 && now - start > options_.timeout)
          fail(r, "all ranks to take part within " + std::to_string(static_cast<int>(options_.timeout.count())) + " s", "a rank that has not: lost, or hanging");
      }
      // The others may need this core to get here: a round of a collective takes tens of microseconds, a layer's backward milliseconds.
      if (now - start < std::chrono::milliseconds(1)) std::this_thread::yield();
      else std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    finish(r);
  }
  /// MPI works on what was begun only while it is called.
  void progress() {
    int flag = 0;
    check(MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, comm_, &flag, MPI_STATUS_IGNORE), "progress", "");
  }

  void reduce(std::span<double> numbers, Reduction how, std::string_view what) {
    Request r = begin("reduce", what);
    check(MPI_Iallreduce(MPI_IN_PLACE, numbers.data(), count(static_cast<index_t>(numbers.size()), r), MPI_DOUBLE, how == Reduction::max ? MPI_MAX : MPI_SUM, comm_, &r.handle), r);
    wait(r);
    if (how == Reduction::mean)
      for (double& x : numbers) x /= size_;
  }
  void broadcast(std::span<std::byte> bytes, int root, std::string_view what) {
    Request r = begin("broadcast", what);
    check(MPI_Ibcast(bytes.data(), count(static_cast<index_t>(bytes.size()), r), MPI_BYTE, root, comm_, &r.handle), r);
    wait(r);
  }
  void barrier(std::string_view what) {
    Request r = begin("barrier", what);
    check(MPI_Ibarrier(comm_, &r.handle), r);
    wait(r);
  }

 private:
  struct Folding {
    MPI_Datatype type;
    MPI_Op op;
  };
  struct Peer {
    int rank;
    pid_t pid;
    detail::Descriptor process;  // or none, where the system has no such thing
  };
  /// Shards as MPI wants them: of each rank.
  struct Cut {
    std::vector<int> sizes, begins;
  };
  /// What each rank tells of itself.
  struct Introduction {
    std::array<char, 128> host{}, cores{};  // machine and process namespace; the cores it may use
    std::int64_t pid = 0;
  };

  template <Reduction R>
  static void fold_bf16(void* in, void* inout, int* n, MPI_Datatype*) {
    const auto* a = static_cast<const bf16*>(in);
    auto* b = static_cast<bf16*>(inout);
    for (int i = 0; i < *n; ++i) {
      const float x = static_cast<float>(a[i]), y = static_cast<float>(b[i]);
      b[i] = bf16(R == Reduction::max ? std::max(x, y) : x + y);
    }
  }
  Folding folding(Format f, Reduction how) const {
    if (f == Format::f32) return {MPI_FLOAT, how == Reduction::max ? MPI_MAX : MPI_SUM};
    if (f == Format::bf16) return {bf16_, how == Reduction::max ? bf16_max_ : bf16_sum_};
    throw Error(where(), "format", "f32 or bf16", std::string(name(f)));
  }
  std::string where() const { return "MPI rank " + std::to_string(rank_) + " of " + std::to_string(size_); }
  static Request begin(std::string_view operation, std::string_view what) {
    Request r;
    r.operation = operation, r.what = what;
    return r;
  }
  int count(index_t n, const Request& r) {
    if (n > std::numeric_limits<int>::max()) throw Error(where(), r.operation, "at most 2^31 - 1 elements", std::to_string(n));
    return static_cast<int>(n);
  }
  const Cut& cut(const Shards& s, const Request& r) {
    Cut& c = cuts_[{count(s.n, r), s.chunk}];
    for (int i = static_cast<int>(c.sizes.size()); i < size_; ++i) {
      c.sizes.push_back(static_cast<int>(s.of(i).size()));
      c.begins.push_back(static_cast<int>(s.of(i).begin));
    }
    return c;
  }
  Request scaled(Request r, void* out, index_t n, Format format, Reduction how) const {
    if (how == Reduction::mean) r.scaled = out, r.n = n, r.format = format;
    return r;
  }
  void finish(Request& r) const {
    const float by = 1.0f / static_cast<float>(size_);
    if (void* const out = std::exchange(r.scaled, nullptr)) {
      if (r.format == Format::f32) std::for_each_n(static_cast<float*>(out), r.n, [&](float& x) { x *= by; });
      else std::for_each_n(static_cast<bf16*>(out), r.n, [&](bf16& x) { x = bf16(static_cast<float>(x) * by); });
    }
  }
  bool done(Request& r) {
    int flag = 0;
    check(MPI_Test(&r.handle, &flag, MPI_STATUS_IGNORE), r);
    return flag != 0;
  }
  void check(int status, const Request& r) { check(status, r.operation, r.what); }
  void check(int status, std::string_view operation, std::string_view what) {
    if (status == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(status, text, &length);
    fail(operation, what, "success", std::string(text, static_cast<std::size_t>(length)));
  }
  [[noreturn]] void fail(const Request& r, const std::string& expected, const std::string& found) { fail(r.operation, r.what, expected, found); }
  [[noreturn]] void fail(std::string_view operation, std::string_view what, const std::string& expected, const std::string& found) {
    failed_ = true;
    throw Error(where(), std::string(operation) + (what.empty() ? "" : " of ") + std::string(what), expected, found);
  }

  /// Who is on this machine, and which cores they may use.
  void meet() {
    Introduction me;
    std::string host(256, '\0');
    gethostname(host.data(), host.size() - 1);
    host.resize(host.find('\0'));
    char space[64] = "";
    const ::ssize_t n = ::readlink("/proc/self/ns/pid", space, sizeof space - 1);  // process ids mean something within it
    host.append(" ").append(space, static_cast<std::size_t>(std::max<::ssize_t>(0, n)));
    std::copy_n(host.begin(), std::min(host.size(), me.host.size() - 1), me.host.begin());
    cpu_set_t set;
    CPU_ZERO(&set);
    sched_getaffinity(0, sizeof set, &set);
    std::copy_n(reinterpret_cast<const char*>(&set), std::min(sizeof set, me.cores.size()), me.cores.begin());
    me.pid = ::getpid();
    std::vector<Introduction> all(static_cast<std::size_t>(size_));
    Request r = begin("all_gather", "introductions");
    check(MPI_Iallgather(&me, sizeof me, MPI_BYTE, all.data(), sizeof me, MPI_BYTE, comm_, &r.handle), r);
    wait(r);
    sharing_ = 0;
    for (int i = 0; i < size_; ++i) {
      const Introduction& other = all[static_cast<std::size_t>(i)];
      if (other.host != me.host) continue;
      sharing_ += other.cores == me.cores;
      if (i == rank_) continue;
      const auto pid = static_cast<pid_t>(other.pid);
#if defined(SYS_pidfd_open)
      peers_.push_back({i, pid, detail::Descriptor(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)))});
#else
      peers_.push_back({i, pid, detail::Descriptor()});
#endif
    }
  }
  const Peer* ended() const {
    for (const Peer& p : peers_) {
      pollfd readable{p.process.get(), POLLIN, 0};
      if (p.process.get() >= 0 ? ::poll(&readable, 1, 0) > 0 : ::kill(p.pid, 0) != 0 && errno == ESRCH) return &p;
    }
    return nullptr;
  }

  MpiOptions options_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  MPI_Datatype bf16_ = MPI_DATATYPE_NULL;
  MPI_Op bf16_sum_ = MPI_OP_NULL, bf16_max_ = MPI_OP_NULL;
  int rank_ = 0, size_ = 1, sharing_ = 1;
  bool ours_ = false, failed_ = false;
  int exceptions_ = std::uncaught_exceptions();
  std::map<std::pair<index_t, index_t>, Cut> cuts_;  // by n and chunk; MPI reads them until the request is done
  std::vector<Peer> peers_;
};

/// Whether this process is one of several that mpirun, or what stands in for it, started. Asks the environment, so that a program alone need not start MPI.
inline bool launched_by_mpi() {
  for (const char* const name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE"})
    if (std::getenv(name)) return true;
  return false;
}

}  // namespace tinyllama
