// What a training run shows: a live line or plain lines, the log and its plot; and the machine's multiply rate that shares are taken of.
#pragma once

#include <tinyllama/train/run_log.hpp>
#include <tinyllama/train/tensorboard.hpp>
#include <tinyllama/training.hpp>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "common.hpp"

namespace example {

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// FLOP/s of the best of a few large matrix products, some 0.3 s of them: what this machine gives while others may be using it too.
template <class D>
double measured_peak(D& dev, tinyllama::Precision precision) {
  using namespace tinyllama;
  using A = typename D::activation;
  constexpr index_t m = D::host_memory ? 512 : 8192, n = D::host_memory ? 2048 : 8192, k = D::host_memory ? 1024 : 8192;
  std::vector<A> some(static_cast<std::size_t>(std::max(m, n) * k));
  for (std::size_t i = 0; i < some.size(); ++i) some[i] = static_cast<A>(static_cast<float>(i * 2654435761u % 65536) / 65536.0f - 0.5f);
  const Memory<D> operands(dev, some.size() * sizeof(A)), product(dev, static_cast<std::size_t>(m * n) * sizeof(A));
  dev.upload(operands.data(), some.data(), some.size() * sizeof(A));
  const auto* in = reinterpret_cast<const A*>(operands.data());
  double best = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 3 || seconds_since(start) < 0.3; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    gemm(dev, View<A, dyn, dyn>(reinterpret_cast<A*>(product.data()), {m, n}), View<const A, dyn, dyn>(in, {m, k}), View<const A, dyn, dyn>(in, {n, k}), {.bf16 = precision == Precision::bf16});
    if constexpr (!D::host_memory) dev.synchronize();
    best = std::max(best, 2.0 * m * n * k / seconds_since(begin));
  }
  return best;
}

/// One step, and what is known after it. NaN: not measured.
struct RunRow {
  std::int64_t step = 0, steps = 0, tokens = 0, tokens_left = 0;
  tinyllama::StepReport report = {};
  double rate = 0, share = 0, seconds = 0;  // tokens/s and share of peak FLOP/s of this step, seconds in steps since the program began
  double validation_loss = std::numeric_limits<double>::quiet_NaN();
};

/// A line for people: it is rewritten in place on a terminal (standard error), else printed each `every` steps (standard output).
class RunDisplay {
 public:
  RunDisplay(bool quiet, std::int64_t every) : live_(!quiet && isatty(STDERR_FILENO)), quiet_(quiet), every_(every) {}
  RunDisplay(const RunDisplay&) = delete;
  RunDisplay& operator=(const RunDisplay&) = delete;
  ~RunDisplay() {
    if (open_) std::fputc('\n', stderr);
  }

  void show(const RunRow& r) {
    rate_ = rate_ == 0 ? r.rate : rate_ + 0.1 * (r.rate - rate_), share_ = share_ == 0 ? r.share : share_ + 0.1 * (r.share - share_);
    const bool validated = std::isfinite(r.validation_loss);
    if (quiet_ || (!live_ && !validated && r.step % every_ != 0 && r.step != r.steps)) return;
    char text[256], validation[64] = "";
    if (validated) std::snprintf(validation, sizeof validation, "  validation loss %.4f", r.validation_loss);
    std::snprintf(text, sizeof text, "step %lld/%lld  loss %.4f%s  lr %.2e  gradient norm %.3g%s  %.0f tokens/s  %.0f%% of peak  %s left",
                  static_cast<long long>(r.step), static_cast<long long>(r.steps), static_cast<double>(r.report.loss), validation,
                  static_cast<double>(r.report.lr), static_cast<double>(r.report.gradient_norm),
                  r.report.skipped ? " (not finite: skipped)" : "", rate_, 100 * share_,
                  duration(static_cast<double>(r.tokens_left) / rate_).c_str());
    if (live_) {
      open_ = !validated && !r.report.skipped;  // these two stay
      std::fprintf(stderr, "\r%s\033[K%s", text, open_ ? "" : "\n");
      std::fflush(stderr);
    } else {
      std::cout << text << std::endl;
    }
  }
  /// Says something in place of the live line.
  void say(const std::string& text) {
    if (quiet_) return;
    open_ = false;
    if (live_) std::fprintf(stderr, "\r\033[K%s\n", text.c_str());
    else std::cout << text << std::endl;
  }

 private:
  static std::string duration(double s) {
    const auto n = static_cast<long long>(std::min(s, 1e9));
    char text[48];
    if (n >= 86400) std::snprintf(text, sizeof text, "%lld d %02lld h", n / 86400, n / 3600 % 24);
    else if (n >= 3600) std::snprintf(text, sizeof text, "%lld h %02lld min", n / 3600, n / 60 % 60);
    else std::snprintf(text, sizeof text, "%lld:%02lld", n / 60, n % 60);
    return text;
  }
  bool live_, quiet_, open_ = false;  // open: the cursor is behind the live line
  std::int64_t every_;
  double rate_ = 0, share_ = 0;  // running means
};

/// The run's log as CSV, its curves as SVG, and TensorBoard's events where a folder is given.
class RunFiles {
 public:
  struct Paths {
    std::filesystem::path csv, svg, tensorboard;
  };
  RunFiles(Paths paths, std::string title, std::optional<std::int64_t> resumed_step)
      : paths_(std::move(paths)), title_(std::move(title)), csv_(paths_.csv, columns, resumed_step) {
    if (resumed_step) read_curves();
    if (!paths_.tensorboard.empty()) events_.emplace(paths_.tensorboard, resumed_step ? std::optional(*resumed_step + 1) : std::nullopt);
  }

  void add(const RunRow& r) {
    const auto tokens = static_cast<double>(r.tokens);
    csv_.row(r.step, {r.report.loss, r.validation_loss, r.report.lr, r.report.gradient_norm, tokens, r.rate, r.share, r.seconds});
    add_to_curves(static_cast<double>(r.step), r.report.loss, r.validation_loss);
    if (!events_) return;
    events_->scalars(r.step, {{"train/loss", r.report.loss}, {"train/learning_rate", r.report.lr}, {"train/gradient_norm", r.report.gradient_norm},
                              {"speed/tokens_per_second", static_cast<float>(r.rate)}, {"speed/share_of_peak", static_cast<float>(r.share)}});
    if (std::isfinite(r.validation_loss)) events_->scalars(r.step, {{"validation/loss", static_cast<float>(r.validation_loss)}});
  }
  void draw() const {
    const std::vector<tinyllama::Curve> curves{train_, validation_};
    tinyllama::write_loss_svg(paths_.svg, std::span(curves).first(validation_.steps.empty() ? 1 : 2), {.title = title_});
  }
  const tinyllama::Curve& training() const { return train_; }
  const tinyllama::Curve& validation() const { return validation_; }

 private:
  static inline const std::vector<std::string> columns{"loss",   "validation_loss",   "learning_rate", "gradient_norm",
                                                       "tokens", "tokens_per_second", "share_of_peak", "seconds"};

  void add_to_curves(double step, double loss, double validation_loss) {
    train_.steps.push_back(step), train_.values.push_back(loss);
    if (std::isfinite(validation_loss)) validation_.steps.push_back(step), validation_.values.push_back(validation_loss);
  }
  /// The curves of a resumed run begin where the run did.
  void read_curves() {
    std::ifstream in(paths_.csv);
    std::string line, field;
    std::getline(in, line);
    while (std::getline(in, line)) {
      double values[3];
      std::istringstream fields(line);
      for (double& v : values)
        v = std::getline(fields, field, ',') && !field.empty() ? std::strtod(field.c_str(), nullptr) : std::numeric_limits<double>::quiet_NaN();
      add_to_curves(values[0], values[1], values[2]);
    }
  }
  Paths paths_;
  std::string title_;
  tinyllama::CsvLog csv_;
  std::optional<tinyllama::TensorBoardLog> events_;
  tinyllama::Curve train_{.name = "training"}, validation_{.name = "validation", .style = tinyllama::Curve::Style::points};
};

}  // namespace example
