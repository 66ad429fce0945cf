// A library that any CUDA program loads by CUDA_INJECTION64_PATH: writes when each kernel, copy and fill ran on the card, for timeline.py. By CUPTI's activity records.
//
//   CUDA_INJECTION64_PATH=libcuda_timeline.so TINYLLAMA_TIMELINE=t mpirun -n 2 ranks_bench --device cuda ...    one file a process: t.0.tsv, t.1.tsv
//
// Lines of the file: start and end in ns, stream, bytes (of copies and fills) or 0, name.
#include <cupti.h>

#include <cxxabi.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Record {
  std::uint64_t start, end, bytes;
  std::uint32_t stream;
  const char* name;  // of a kernel, CUPTI's for as long as the process runs
};
std::mutex records_mutex;
std::vector<Record> records;

void check(CUptiResult result, const char* call) {
  if (result == CUPTI_SUCCESS) return;
  const char* why = "?";
  cuptiGetResultString(result, &why);
  std::fprintf(stderr, "cuda_timeline: %s: %s\n", call, why);
}

constexpr std::size_t buffer_bytes = std::size_t{4} << 20, alignment = 8;

void CUPTIAPI give_buffer(std::uint8_t** buffer, std::size_t* size, std::size_t* most_records) {
  *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(alignment, buffer_bytes));
  *size = *buffer ? buffer_bytes : 0;
  *most_records = 0;
}

void CUPTIAPI take_buffer(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t, std::size_t valid) {
  const std::lock_guard lock(records_mutex);
  CUpti_Activity* a = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &a) == CUPTI_SUCCESS) {
    if (a->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto& k = *reinterpret_cast<const CUpti_ActivityKernel10*>(a);
      records.push_back({k.start, k.end, 0, k.streamId, k.name});
    } else if (a->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto& m = *reinterpret_cast<const CUpti_ActivityMemcpy6*>(a);
      records.push_back({m.start, m.end, m.bytes, m.streamId, "memcpy"});
    } else if (a->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      const auto& m = *reinterpret_cast<const CUpti_ActivityMemset4*>(a);
      records.push_back({m.start, m.end, m.bytes, m.streamId, "memset"});
    }
  }
  std::free(buffer);
}

void write() {
  check(cuptiActivityFlushAll(1), "cuptiActivityFlushAll");
  const char* const prefix = std::getenv("TINYLLAMA_TIMELINE");
  const char* const rank = std::getenv("OMPI_COMM_WORLD_RANK");
  const std::string path = std::string(prefix ? prefix : "timeline") + "." + (rank ? rank : "0") + ".tsv";
  std::FILE* const file = std::fopen(path.c_str(), "w");
  if (!file) return std::perror(path.c_str());
  const std::lock_guard lock(records_mutex);
  for (const Record& r : records) {
    int status = 0;
    char* const plain = abi::__cxa_demangle(r.name, nullptr, nullptr, &status);
    std::fprintf(file, "%llu\t%llu\t%u\t%llu\t%s\n", static_cast<unsigned long long>(r.start), static_cast<unsigned long long>(r.end), r.stream,
                 static_cast<unsigned long long>(r.bytes), plain ? plain : r.name);
    std::free(plain);
  }
  std::fclose(file);
}

}  // namespace

/// What the driver calls when it starts.
extern "C" int InitializeInjection() {
  check(cuptiActivityRegisterCallbacks(give_buffer, take_buffer), "cuptiActivityRegisterCallbacks");
  for (const CUpti_ActivityKind kind : {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET}) check(cuptiActivityEnable(kind), "cuptiActivityEnable");
  std::atexit(write);
  return 1;
}
