// Staged: a communicator of host memory for ranks on cards, by way of page-locked host memory. Where there is no NCCL, or several ranks share a card, which NCCL refuses.
//
// MPI that takes cards' memory ("CUDA-aware") needs this too: it takes it in blocking operations, in which a rank that dies leaves the others hanging; Open MPI's nonblocking
// sums do not take it. So nothing overlaps with the card's work but the moving itself, and a training of speed wants Nccl.
#pragma once

#include <deque>
#include <string_view>

#include "tinyllama/distributed/communicator.hpp"

namespace tinyllama {

/// `M` moves the copies; it and the device outlive this. A start waits for the device, since it copies from it.
template <Communicator M, class D>
class Staged {
 public:
  class Request {
    friend class Staged;
    static constexpr auto none = static_cast<std::size_t>(-1);
    typename M::Request request = {};
    std::size_t room = none;
    void* to = nullptr;
    const void* from = nullptr;  // in host memory, when the request is done
    std::size_t bytes = 0;
  };

  Staged(M& communicator, D& dev) : m_(&communicator), dev_(&dev) {}
  int rank() const { return m_->rank(); }
  int size() const { return m_->size(); }

  Request start_all_reduce(void* out, index_t n, Format format, Reduction how, std::string_view what) {
    return in_place(out, row_bytes(format, n), [&](void* host) { return m_->start_all_reduce(host, n, format, how, what); });
  }
  Request start_reduce_scatter(void* out, const void* in, const Shards& s, Format format, Reduction how, std::string_view what) {
    Request r = take(out, row_bytes(format, s.of(rank()).size()));
    const void* const host = fetch(r, in, row_bytes(format, s.n));
    void* const sum = rooms_[r.room].result.reserve(r.bytes + 1);
    r.from = sum, r.request = m_->start_reduce_scatter(sum, host, s, format, how, what);
    return r;
  }
  Request start_all_gather(void* out, const void* in, const Shards& s, Format format, std::string_view what) {
    Request r = take(out, row_bytes(format, s.n));
    const void* const host = fetch(r, in, row_bytes(format, s.of(rank()).size()));
    void* const all = rooms_[r.room].result.reserve(r.bytes + 1);
    r.from = all, r.request = m_->start_all_gather(all, host, s, format, what);
    return r;
  }
  Request start_broadcast(void* out, index_t n, Format format, int root, std::string_view what) {
    return in_place(out, row_bytes(format, n), [&](void* host) { return m_->start_broadcast(host, n, format, root, what); });
  }
  void wait(Request& r) {
    if (r.room == Request::none) return;
    m_->wait(r.request);
    dev_->upload(r.to, r.from, r.bytes);
    rooms_[r.room].used = false, r.room = Request::none;
  }
  void progress() { m_->progress(); }

  void reduce(std::span<double> numbers, Reduction how, std::string_view what) { m_->reduce(numbers, how, what); }
  void broadcast(std::span<std::byte> bytes, int root, std::string_view what) { m_->broadcast(bytes, root, what); }
  void barrier(std::string_view what) { m_->barrier(what); }

 private:
  /// Of one operation under way; kept for later ones.
  struct Room {
    typename D::Staging input, result;
    bool used = false;
  };
  template <class F>
  Request in_place(void* array, std::size_t bytes, F&& start) {
    Request r = take(array, bytes);
    void* const host = fetch(r, array, bytes);
    r.from = host, r.request = start(host);
    return r;
  }
  Request take(void* to, std::size_t bytes) {
    Request r;
    for (r.room = 0; r.room < rooms_.size() && rooms_[r.room].used;) ++r.room;
    if (r.room == rooms_.size()) rooms_.emplace_back();
    rooms_[r.room].used = true;
    r.to = to, r.bytes = bytes;
    return r;
  }
  void* fetch(const Request& r, const void* from, std::size_t bytes) {
    void* const host = rooms_[r.room].input.reserve(bytes + 1);
    dev_->download(host, from, bytes);
    return host;
  }
  M* m_;
  D* dev_;
  std::deque<Room> rooms_;
};

}  // namespace tinyllama
