// Rows picked by index: gather, scatter, scatter_add.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "tinyllama/tensor/map.hpp"

HWY_BEFORE_NAMESPACE();
namespace tinyllama {
inline namespace TINYLLAMA_VEC_NAMESPACE {

namespace vec_detail {

template <class Many, class Few>
void check_rows(const char* operation, const Many& table, const Few& picked, std::span<const std::int32_t> ids) {
  static_assert(Many::rank == 2 && Few::rank == 2, "gather and scatter work on matrices");
  static_assert(is_float_element<typename Many::value_type> && is_float_element<typename Few::value_type>, "gather and scatter work on float, bf16 and f16");
  if (picked.extent(0) != static_cast<index_t>(ids.size()))
    throw Error(operation, "ids", std::to_string(picked.extent(0)) + " of them, one a row", std::to_string(ids.size()));
  if (picked.extent(1) != table.extent(1))
    throw Error(operation, "columns", std::to_string(table.extent(1)), std::to_string(picked.extent(1)));
  for (std::int32_t id : ids)
    if (id < 0 || id >= table.extent(0)) throw Error(operation, "id", "0 <= id < " + std::to_string(table.extent(0)), std::to_string(id));
}

// Columns are shared out, not rows: a row that occurs twice is then written by one thread, in the order of the ids.
template <class Device, class Table, class Rows, class F>
void scatter_rows(const char* operation, const Device& device, const Table& table, std::span<const std::int32_t> ids, const Rows& rows, const F& move) {
  static_assert(!std::is_const_v<typename Table::element_type>, "scatter: the table is a view of const elements");
  check_rows(operation, table, rows, ids);
  check_writable(operation, table.shape(), table.strides());
  const index_t count = static_cast<index_t>(ids.size()), columns = table.extent(1);
  if (count == 0) return;
  const index_t grain = std::max<index_t>(1, task_elements / count / 64) * 64;
  device.parallel_for(columns, grain, [&](index_t begin, index_t end) {
    for (index_t i = 0; i < count; ++i)
      move(end - begin, table.data() + ids[static_cast<std::size_t>(i)] * table.stride(0) + begin * table.stride(1),
           rows.data() + i * rows.stride(0) + begin * rows.stride(1));
  });
}

}  // namespace vec_detail

/// out [n, C] = rows `ids` (n of them) of table [V, C]. Throws Error for an id outside of the table.
template <class Device, class Out, class Table>
void gather(const Device& device, Out&& out_like, const Table& table_like, std::span<const std::int32_t> ids) {
  const auto out = as_view(out_like);
  const auto table = as_view(table_like);
  vec_detail::check_rows("gather", table, out, ids);
  vec_detail::check_writable("gather", out.shape(), out.strides());
  using T = typename decltype(out)::element_type;
  using U = const typename decltype(table)::value_type;
  const index_t columns = out.extent(1);
  device.parallel_for(out.extent(0), std::max<index_t>(1, vec_detail::task_elements / std::max<index_t>(1, columns)), [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i)
      vec_detail::map_run(columns, vec_detail::Same(), vec_detail::Run<T>{out.data() + i * out.stride(0), out.stride(1)},
                          vec_detail::Run<U>{table.data() + ids[static_cast<std::size_t>(i)] * table.stride(0), table.stride(1)});
  });
}

/// Row ids[i] of table [V, C] = row i of in [n, C]; of rows with the same id the last stays.
template <class Device, class Table, class In>
void scatter(const Device& device, Table&& table_like, std::span<const std::int32_t> ids, const In& in_like) {
  const auto table = as_view(table_like);
  const auto in = as_view(in_like);
  using T = typename decltype(table)::element_type;
  using U = const typename decltype(in)::value_type;
  vec_detail::scatter_rows("scatter", device, table, ids, in, [&](index_t n, T* to, U* from) HWY_ATTR {
    vec_detail::map_run(n, vec_detail::Same(), vec_detail::Run<T>{to, table.stride(1)}, vec_detail::Run<U>{from, in.stride(1)});
  });
}

/// Row ids[i] of table [V, C] += row i of in [n, C], in the order of i.
template <class Device, class Table, class In>
void scatter_add(const Device& device, Table&& table_like, std::span<const std::int32_t> ids, const In& in_like) {
  const auto table = as_view(table_like);
  const auto in = as_view(in_like);
  using T = typename decltype(table)::element_type;
  using U = const typename decltype(in)::value_type;
  vec_detail::scatter_rows("scatter_add", device, table, ids, in, [&](index_t n, T* to, U* from) HWY_ATTR {
    vec_detail::map_run(n, vec_detail::Plus(), vec_detail::Run<T>{to, table.stride(1)}, vec_detail::Run<const T>{to, table.stride(1)},
                        vec_detail::Run<U>{from, in.stride(1)});
  });
}

}  // namespace TINYLLAMA_VEC_NAMESPACE
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
