// Weight matrices on a Cpu: packing them, looking up their rows, and products with them. Compiled once a program under TINYLLAMA_DISPATCH.
#pragma once

#include <array>
#include <cstring>

#include "tinyllama/device/cpu.hpp"
#include "tinyllama/quant/codec.hpp"

namespace tinyllama {

TINYLLAMA_COMPILED void Cpu::embedding(View<float, dyn, dyn> out, const Matrix& table, std::span<const std::int32_t> ids) const {
  parallel_for(out.extent(0), 8, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      float* to = out.data() + t * out.stride(0);
      const index_t id = ids[static_cast<std::size_t>(t)];
      visit(table.format, [&]<Format F>() {
        if (table.packed)
          return unpack_row<F>(table.data + static_cast<std::size_t>(id / panel_rows) * panel_bytes<F>(table.columns), static_cast<int>(id % panel_rows),
                               table.columns, to);
        decode_row(F, table.data + static_cast<std::size_t>(id) * row_bytes(F, table.columns), to, table.columns);
      });
      if (table.scale)
        for (index_t k = 0; k < table.columns; ++k) to[k] *= table.scale[id];
    }
  });
}

TINYLLAMA_COMPILED Matrix Cpu::pack(std::byte* to, const Matrix& from) const {
  Matrix m = from;
  m.packed = true;
  m.data = to;
  parallel_for((from.rows + panel_rows - 1) / panel_rows, 4, [&](index_t begin, index_t end) { pack_panels(to, from, begin, end); });
  return m;
}

// Panels [first, last) of `from` to their place in `to`.
TINYLLAMA_COMPILED void Cpu::pack_panels(std::byte* to, const Matrix& from, index_t first, index_t last) {
  visit(from.format, [&]<Format F>() {
    const std::size_t stride = row_bytes(F, from.columns), bytes = panel_bytes<F>(from.columns);
    for (index_t p = first; p < last; ++p)
      pack_panel<F>(from.data + static_cast<std::size_t>(p * panel_rows) * stride, stride, static_cast<int>(std::min(panel_rows, from.rows - p * panel_rows)),
                    from.columns, to + static_cast<std::size_t>(p) * bytes);
  });
}

TINYLLAMA_COMPILED void Cpu::matmul(View<float, dyn, dyn> y, View<const float, dyn, dyn> x, const Linear& w) {
  const index_t m = y.extent(0), k = w.columns();
  if (m == 0) return;
  if (k == 0) return rows(m, w.rows(), [&](index_t i) { std::fill_n(at(y, i), w.rows(), 0.0f); });
  // Each part picks its arithmetic; the activations are converted once for each that occurs.
  const auto compute_of = [&](const Matrix& a) {
    if (is_quantised(a.format)) return w.compute == Compute::f32 ? Compute::f32 : Compute::int8;
    if (a.format != Format::bf16 || w.compute == Compute::f32 || !kernels_->bf16_dot) return Compute::f32;
    // One row is bound by memory: f32 activations cost nothing there and lose nothing.
    return w.compute == Compute::bf16 || m > 1 ? Compute::bf16 : Compute::f32;
  };
  std::array<Compute, 3> compute{};
  bool any_int8 = false, any_bf16 = false, any_f32 = false;
  for (int i = 0; i < w.parts; ++i) {
    const Compute c = compute[static_cast<std::size_t>(i)] = compute_of(w.part[static_cast<std::size_t>(i)]);
    any_int8 |= c == Compute::int8, any_bf16 |= c == Compute::bf16, any_f32 |= c == Compute::f32;
  }
  const auto uk = static_cast<std::size_t>(k), uk_even = static_cast<std::size_t>(even(k)), um = static_cast<std::size_t>(m);
  const bool pad = k % 2 != 0 && any_f32;
  const std::size_t q8_bytes = any_int8 ? um * int8_bytes(k) : 0, bf16_bytes = any_bf16 ? (um * 2 * uk_even + 63) / 64 * 64 : 0;
  const std::size_t pad_bytes = pad ? (um * 4 * uk_even + 63) / 64 * 64 : 0;
  // Panels of matrices that are not packed, for each thread.
  const index_t unpacked_grain = m > 1 ? 3 : 1;
  std::size_t panels_bytes = 0;
  for (int i = 0; i < w.parts; ++i)
    if (const Matrix& a = w.part[static_cast<std::size_t>(i)]; !a.packed)
      panels_bytes = std::max(panels_bytes, (static_cast<std::size_t>(unpacked_grain) * panel_bytes(a.format, k) + 63) / 64 * 64);
  std::byte* s = scratch(q8_bytes + bf16_bytes + pad_bytes + panels_bytes * static_cast<std::size_t>(threads()));
  MatmulTask task{};
  task.m = m, task.k = k, task.ldy = y.stride(0), task.x = x.data(), task.ldx = x.stride(0);
  if (any_int8) {
    auto* q = reinterpret_cast<std::int8_t*>(s);
    auto* scale = reinterpret_cast<float*>(s + um * uk);
    float *sum32 = scale + um * uk / 32, *sum16 = sum32 + um * uk / 32;
    task.x_q8 = q, task.x_scale = scale, task.x_sum32 = sum32, task.x_sum16 = sum16;
    auto* columns = reinterpret_cast<Int8Columns*>(s);
    task.x_columns = columns, task.columns_stride = m;
    rows(m, k, [&](index_t i) {
      if (m > kernels_->int8_stream_rows) kernels_->quantise_columns(columns + i, m, at(x, i), k);
      else kernels_->quantise_activations(q + i * k, scale + i * k / 32, sum32 + i * k / 32, sum16 + i * k / 16, at(x, i), k);
    });
  }
  MatmulTask narrow = task;
  if (any_bf16) {
    auto* b = reinterpret_cast<bf16*>(s + q8_bytes);
    narrow.x_bf16 = b, narrow.ldx = even(k);
    rows(m, k, [&](index_t i) {
      kernels_->round_bf16(b + i * even(k), at(x, i), k);
      if (k % 2) b[i * even(k) + k] = bf16();
    });
  }
  if (pad) {
    auto* p = reinterpret_cast<float*>(s + q8_bytes + bf16_bytes);
    for (index_t i = 0; i < m; ++i) {
      std::copy_n(at(x, i), k, p + i * even(k));
      p[i * even(k) + k] = 0;
    }
    task.x = p, task.ldx = even(k);
  }
  // One fork for all parts: a unit is some panels of one of them. Parts that lie behind each other in one format are one matrix.
  struct Share { Matrix matrix; MatmulTask task; void (*kernel)(const MatmulTask&, index_t, index_t); index_t panels, lead, grain, units; };
  std::array<Share, 3> shares{};
  std::size_t used = 0;
  index_t column = 0;
  for (int i = 0; i < w.parts; ++i) {
    const Matrix& a = w.part[static_cast<std::size_t>(i)];
    if (Matrix* before = used ? &shares[used - 1].matrix : nullptr;
        before && before->format == a.format && before->packed == a.packed && before->rows % panel_rows == 0 && before->data + before->bytes() == a.data) {
      before->rows += a.rows, shares[used - 1].task.n += a.rows;
    } else {
      Share& share = shares[used++];
      const Compute c = compute[static_cast<std::size_t>(i)];
      share.matrix = a, share.task = c == Compute::bf16 ? narrow : task;
      share.task.w = a.data, share.task.format = a.format, share.task.n = a.rows, share.task.y = y.data() + column;
      share.kernel = c == Compute::bf16 ? kernels_->matmul_bf16 : c == Compute::int8 ? kernels_->matmul_int8 : kernels_->matmul_f32;
    }
    column += a.rows;
  }
  // Few rows are bound by memory, and each break of a stream of weights costs a core 0.6 us (Zen 5, 72 GB/s; a q4_0 step at 79% of the bandwidth in units of 128 KB
  // became 92%): each thread starts with one long unit, and short ones even out the rest. Many rows: the panels of a wide tile (integers 4, floats 3).
  index_t units = 0;
  for (Share& share : std::span(shares).first(used)) {
    const auto bytes = static_cast<index_t>(std::max<std::size_t>(1, panel_bytes(share.matrix.format, k)));
    share.panels = (share.matrix.rows + panel_rows - 1) / panel_rows;
    share.grain = !share.matrix.packed ? unpacked_grain : m > 1 ? (share.kernel == kernels_->matmul_int8 ? 4 : 6) : std::clamp<index_t>((index_t{256} << 10) / bytes, 1, 64);
    share.lead = share.matrix.packed && m <= streamed_rows ? std::max(share.grain, share.panels * 3 / 4 / threads()) : share.grain;
    share.units = std::min<index_t>(threads(), (share.panels + share.lead - 1) / share.lead);
    share.units += std::max<index_t>(0, share.panels - share.units * share.lead + share.grain - 1) / share.grain;
    units += share.units;
  }
  const index_t blocks = any_int8 && !panels_bytes && m > std::max(streamed_rows, kernels_->int8_stream_rows) ? row_blocks(m) : 1;
  const auto run = [&](index_t unit, std::byte* panels, index_t block) {
    std::size_t i = 0;
    while (unit >= shares[i].units) unit -= shares[i++].units;
    const Share& share = shares[i];
    const index_t rest = unit - threads(), first = rest < 0 ? unit * share.lead : threads() * share.lead + rest * share.grain;
    const index_t last = std::min(share.panels, first + (rest < 0 ? share.lead : share.grain));
    if (share.matrix.packed) {
      if (blocks == 1) return share.kernel(share.task, first, last);
      MatmulTask some = share.task;
      const index_t row = block_row(m, blocks, block);
      some.m = block_row(m, blocks, block + 1) - row, some.y += row * some.ldy;
      if (some.x_columns) some.x_columns += row;
      if (some.x_bf16) some.x_bf16 += row * some.ldx;
      else some.x += row * some.ldx;
      return share.kernel(some, first, last);
    }
    const index_t row_of_w = first * panel_rows;
    Matrix some = share.matrix;
    some.rows = std::min(some.rows - row_of_w, (last - first) * panel_rows);
    some.data += static_cast<std::size_t>(row_of_w) * row_bytes(some.format, k);
    pack_panels(panels, some, 0, last - first);
    MatmulTask t = share.task;
    t.w = panels, t.n = some.rows, t.y += row_of_w;
    share.kernel(t, 0, last - first);
  };
  std::byte* panels = s + q8_bytes + bf16_bytes + pad_bytes;
  if (m * k * w.rows() < 32768) {  // the tiny models of tests: a fork would cost more than the product
    for (index_t u = 0; u < units * blocks; ++u) run(u % units, panels, u / units);
  } else if (blocks > 1) {
    in_blocks(blocks, units, [&](index_t block, index_t unit) { run(unit, nullptr, block); });
  } else if (panels_bytes == 0) {
    pool_->run(units, [&](index_t u) { run(u, nullptr, 0); });
  } else {
    parallel_units(units, [&](index_t u, index_t worker) { run(u, panels + static_cast<std::size_t>(worker) * panels_bytes, 0); });
  }
  column = 0;
  for (int i = 0; i < w.parts; ++i) {
    const Matrix& a = w.part[static_cast<std::size_t>(i)];
    if (a.scale)
      for (index_t t = 0; t < m; ++t)
        for (index_t r = 0; r < a.rows; ++r) at(y, t)[column + r] *= a.scale[r];
    column += a.rows;
  }
}

}  // namespace tinyllama
