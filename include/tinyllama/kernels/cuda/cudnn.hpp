// cuDNN's graph API, found at run time: its functions, descriptors as C++ objects, and a graph that is put together node by node. Host code; without
// cuDNN's headers, or without the library on the machine, there is none, and nothing else changes.
#pragma once

#include "tinyllama/device/cuda_runtime.cuh"

#if __has_include(<cudnn_graph.h>) && __has_include(<dlfcn.h>)
#define TINYLLAMA_CUDNN 1
#include <cudnn_graph.h>
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace tinyllama::cuda {

/// The library's functions that we call.
struct CudnnApi {
  decltype(&::cudnnCreate) create;
  decltype(&::cudnnDestroy) destroy;
  decltype(&::cudnnSetStream) set_stream;
  decltype(&::cudnnGetVersion) version;
  decltype(&::cudnnGetErrorString) error_string;
  decltype(&::cudnnGetLastErrorString) last_error;
  decltype(&::cudnnBackendCreateDescriptor) create_descriptor;
  decltype(&::cudnnBackendDestroyDescriptor) destroy_descriptor;
  decltype(&::cudnnBackendSetAttribute) set_attribute;
  decltype(&::cudnnBackendGetAttribute) get_attribute;
  decltype(&::cudnnBackendFinalize) finalize;
  decltype(&::cudnnBackendExecute) execute;

  /// Null where there is no library (libcudnn.so.9 where the loader looks, or at $TINYLLAMA_CUDNN_LIBRARY).
  static const CudnnApi* find() {
    static const std::unique_ptr<const CudnnApi> api = open();
    return api.get();
  }
  void check(cudnnStatus_t s, const char* call) const {
    if (s == CUDNN_STATUS_SUCCESS) return;
    char why[512] = "";
    last_error(why, sizeof why);
    throw Error("cuDNN", call, "success", std::string(error_string(s)) + ": " + why);
  }

 private:
  static std::unique_ptr<const CudnnApi> open() {
    const char* named = std::getenv("TINYLLAMA_CUDNN_LIBRARY");
    void* const library = dlopen(named ? named : "libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (!library) return nullptr;
    auto a = std::make_unique<CudnnApi>();
    bool all = true;
    const auto get = [&]<class F>(F& f, const char* name) { all = (f = reinterpret_cast<F>(dlsym(library, name))) != nullptr && all; };
    get(a->create, "cudnnCreate"), get(a->destroy, "cudnnDestroy"), get(a->set_stream, "cudnnSetStream"), get(a->version, "cudnnGetVersion");
    get(a->error_string, "cudnnGetErrorString"), get(a->last_error, "cudnnGetLastErrorString");
    get(a->create_descriptor, "cudnnBackendCreateDescriptor"), get(a->destroy_descriptor, "cudnnBackendDestroyDescriptor");
    get(a->set_attribute, "cudnnBackendSetAttribute"), get(a->get_attribute, "cudnnBackendGetAttribute");
    get(a->finalize, "cudnnBackendFinalize"), get(a->execute, "cudnnBackendExecute");
    // From 9.6 on sums of dQ need not be zero before, from 9.10 on scores may be -inf.
    if (!all || a->version() < 91000) return nullptr;
    return a;
  }
};

/// A descriptor of the backend, move-only.
class CudnnDescriptor {
 public:
  CudnnDescriptor(const CudnnApi& api, cudnnBackendDescriptorType_t type) : api_(&api) { api.check(api.create_descriptor(type, &d_), "cudnnBackendCreateDescriptor"); }
  CudnnDescriptor(CudnnDescriptor&& o) noexcept : api_(o.api_), d_(std::exchange(o.d_, nullptr)) {}
  CudnnDescriptor& operator=(CudnnDescriptor&& o) noexcept {
    std::swap(api_, o.api_), std::swap(d_, o.d_);
    return *this;
  }
  ~CudnnDescriptor() {
    if (d_) api_->destroy_descriptor(d_);
  }
  cudnnBackendDescriptor_t get() const { return d_; }

  CudnnDescriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::int64_t count, const void* values) {
    api_->check(api_->set_attribute(d_, name, type, count, values), "cudnnBackendSetAttribute");
    return *this;
  }
  CudnnDescriptor& set(cudnnBackendAttributeName_t n, const CudnnDescriptor& d) { return set(n, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &d.d_); }
  CudnnDescriptor& set(cudnnBackendAttributeName_t n, cudnnDataType_t v) { return set(n, CUDNN_TYPE_DATA_TYPE, 1, &v); }
  CudnnDescriptor& set(cudnnBackendAttributeName_t n, std::int64_t v) { return set(n, CUDNN_TYPE_INT64, 1, &v); }
  CudnnDescriptor& set(cudnnBackendAttributeName_t n, bool v) { return set(n, CUDNN_TYPE_BOOLEAN, 1, &v); }
  CudnnDescriptor& finalize() {
    api_->check(api_->finalize(d_), "cudnnBackendFinalize");
    return *this;
  }
  bool try_finalize() { return api_->finalize(d_) == CUDNN_STATUS_SUCCESS; }

 private:
  const CudnnApi* api_;
  cudnnBackendDescriptor_t d_ = nullptr;
};

using CudnnShape = std::array<std::int64_t, 4>;
constexpr CudnnShape contiguous(const CudnnShape& s) { return {s[1] * s[2] * s[3], s[2] * s[3], s[3], 1}; }

/// A graph of operations on tensors of four axes, and then the plan that executes it.
class CudnnGraph {
 public:
  struct Tensor {
    CudnnShape shape, strides;
    std::size_t at;      // in tensors_
    std::int64_t id;
  };
  explicit CudnnGraph(const CudnnApi& api) : api_(&api) {}

  /// What lies in memory; its place is given at execute() under the id.
  Tensor tensor(std::int64_t id, cudnnDataType_t type, const CudnnShape& shape, const CudnnShape& strides) { return add(id, type, shape, strides, false, false); }
  /// A number that the host gives at execute().
  Tensor number(std::int64_t id) { return add(id, CUDNN_DATA_FLOAT, {1, 1, 1, 1}, {1, 1, 1, 1}, false, true); }
  /// What is between operations.
  Tensor between(cudnnDataType_t type, const CudnnShape& shape, const CudnnShape& strides) { return add(next_++, type, shape, strides, true, false); }
  Tensor between(const CudnnShape& shape) { return between(CUDNN_DATA_FLOAT, shape, contiguous(shape)); }

  Tensor matmul(const Tensor& a, const Tensor& b, const Tensor& c) {
    parts_.emplace_back(*api_, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    parts_.back().set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_DATA_FLOAT).finalize();
    operation(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR)
        .set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, tensors_[a.at]).set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, tensors_[b.at]).set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, tensors_[c.at])
        .set(CUDNN_ATTR_OPERATION_MATMUL_DESC, parts_.back()).finalize();
    return c;
  }
  /// y = mode(x), mode(x, b), or (BINARY_SELECT) t ? x : b
  Tensor pointwise(cudnnPointwiseMode_t mode, const Tensor& x, const Tensor* b, const Tensor& y, const Tensor* t = nullptr, int axis = -1, cudnnDataType_t compute = CUDNN_DATA_FLOAT) {
    parts_.emplace_back(*api_, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    CudnnDescriptor& p = parts_.back();
    p.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode).set(CUDNN_ATTR_POINTWISE_MATH_PREC, compute);
    if (axis >= 0) p.set(CUDNN_ATTR_POINTWISE_AXIS, std::int64_t{axis});
    p.finalize();
    CudnnDescriptor& o = operation(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    o.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, p).set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, tensors_[x.at]);
    if (b) o.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, tensors_[b->at]);
    if (t) o.set(CUDNN_ATTR_OPERATION_POINTWISE_TDESC, tensors_[t->at]);
    o.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, tensors_[y.at]).finalize();
    return y;
  }
  Tensor binary(cudnnPointwiseMode_t mode, const Tensor& x, const Tensor& b) { return pointwise(mode, x, &b, between(x.shape)); }
  Tensor unary(cudnnPointwiseMode_t mode, const Tensor& x) { return pointwise(mode, x, nullptr, between(x.shape)); }
  Tensor reduce(cudnnReduceTensorOp_t how, const Tensor& x, const Tensor& y) {
    parts_.emplace_back(*api_, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    parts_.back().set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &how).set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_DATA_FLOAT).finalize();
    operation(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR)
        .set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, tensors_[x.at]).set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, tensors_[y.at])
        .set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, parts_.back()).finalize();
    return y;
  }
  Tensor reshape(const Tensor& x, const Tensor& y) {
    operation(CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR)
        .set(CUDNN_ATTR_OPERATION_RESHAPE_XDESC, tensors_[x.at]).set(CUDNN_ATTR_OPERATION_RESHAPE_YDESC, tensors_[y.at]).finalize();
    return y;
  }

  /// Asks the library for a plan. False, and why in failure(), where it has none. With the properties of a `card` in place of a handle none needs to be there
  /// (and the plan cannot be executed): so graphs are tested.
  bool build(cudnnHandle_t handle, const CudnnDescriptor* card = nullptr) {
    std::vector<cudnnBackendDescriptor_t> list;
    for (const CudnnDescriptor& o : operations_) list.push_back(o.get());
    CudnnDescriptor graph(*api_, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    graph.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, static_cast<std::int64_t>(list.size()), list.data());
    if (!card) graph.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    if (!graph.try_finalize()) return failed("the graph");
    CudnnDescriptor heuristics(*api_, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph).set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    if (card) heuristics.set(CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, *card);
    if (!heuristics.try_finalize()) return failed("the heuristics");
    std::vector<CudnnDescriptor> configs;
    std::vector<cudnnBackendDescriptor_t> raw;
    for (int i = 0; i < 8; ++i) configs.emplace_back(*api_, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR), raw.push_back(configs.back().get());
    std::int64_t count = 0;
    if (api_->get_attribute(heuristics.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, static_cast<std::int64_t>(raw.size()), &count, raw.data()) != CUDNN_STATUS_SUCCESS)
      return failed("engines");
    for (std::int64_t i = 0; i < std::min<std::int64_t>(count, 8); ++i) {
      CudnnDescriptor plan(*api_, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
      plan.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, configs[static_cast<std::size_t>(i)]);
      if (card) plan.set(CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, *card);
      else plan.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
      if (!plan.try_finalize()) continue;
      std::int64_t bytes = 0, got = 0;
      api_->check(api_->get_attribute(plan.get(), CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &got, &bytes), "cudnnBackendGetAttribute");
      plan_ = std::make_unique<CudnnDescriptor>(std::move(plan)), workspace_ = static_cast<std::size_t>(bytes);
      return true;
    }
    return failed("a plan (" + std::to_string(count) + " engines)");
  }
  std::size_t workspace() const { return workspace_; }
  const std::string& failure() const { return failure_; }

  /// `ids` and `places` go together: device memory, or the host's for numbers.
  void execute(cudnnHandle_t handle, const std::vector<std::int64_t>& ids, std::vector<void*> places, void* workspace) const {
    CudnnDescriptor pack(*api_, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
    pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, static_cast<std::int64_t>(ids.size()), ids.data());
    pack.set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, static_cast<std::int64_t>(places.size()), places.data());
    pack.set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace).finalize();
    api_->check(api_->execute(handle, plan_->get(), pack.get()), "cudnnBackendExecute");
  }

 private:
  Tensor add(std::int64_t id, cudnnDataType_t type, const CudnnShape& shape, const CudnnShape& strides, bool is_virtual, bool by_value) {
    tensors_.emplace_back(*api_, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    tensors_.back()
        .set(CUDNN_ATTR_TENSOR_UNIQUE_ID, id).set(CUDNN_ATTR_TENSOR_DATA_TYPE, type).set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, std::int64_t{16})
        .set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, shape.data()).set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides.data())
        .set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, is_virtual).set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, by_value).finalize();
    return {shape, strides, tensors_.size() - 1, id};
  }
  CudnnDescriptor& operation(cudnnBackendDescriptorType_t type) { return operations_.emplace_back(*api_, type); }
  bool failed(const std::string& what) {
    char why[512] = "";
    api_->last_error(why, sizeof why);
    failure_ = what + ": " + why;
    return false;
  }

  const CudnnApi* api_;
  std::vector<CudnnDescriptor> tensors_, parts_, operations_;
  std::unique_ptr<CudnnDescriptor> plan_;
  std::size_t workspace_ = 0;
  std::int64_t next_ = 1000;
  std::string failure_;
};

}  // namespace tinyllama::cuda
#endif
