// The logs of a run that people open: its rows as CSV, cut back where a run resumes, and its loss curves as SVG.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "tinyllama/io/file.hpp"

namespace tinyllama {

namespace detail {

/// A number as a CSV field: whole numbers whole, others to 9 digits (a float's worth), whatever the locale; NaN as nothing.
inline std::string number_text(double x) {
  if (std::isnan(x)) return "";
  char text[32];
  const bool whole = std::abs(x) < 0x1p53 && x == std::trunc(x);
  const auto end = whole ? std::to_chars(text, text + sizeof text, static_cast<std::int64_t>(x))
                         : std::to_chars(text, text + sizeof text, x, std::chars_format::general, 9);
  return {text, end.ptr};
}

/// Appends to a file, each call by one write: what is killed in between leaves whole records and at most one that is cut short.
class AppendFile {
 public:
  AppendFile() = default;
  AppendFile(const std::filesystem::path& path, int flags)
      : name_(path.string()), fd_(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | flags, 0666)) {
    if (fd_.get() < 0) throw Error(name_, "", "a file that can be written", errno_text(errno));
  }
  void append(std::string_view text) {
    while (!text.empty()) {
      const ::ssize_t n = ::write(fd_.get(), text.data(), text.size());
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) throw Error(name_, "", "a file that can be written", errno_text(errno));
      text.remove_prefix(static_cast<std::size_t>(n));
    }
  }
  void truncate(std::uint64_t size) {
    if (::ftruncate(fd_.get(), static_cast<::off_t>(size)) != 0) throw Error(name_, "", "a file that can be cut", errno_text(errno));
  }
  const std::string& name() const { return name_; }

 private:
  std::string name_;
  Descriptor fd_;
};

}  // namespace detail

/// A CSV file that grows by a row now and then: the step, then the other columns. Rows are on disk as soon as row() returns (in the system's hands;
/// not synced).
class CsvLog {
 public:
  /// Begins a file with the header "step,COLUMNS...", in place of an old one; or, with `resumed_step`, goes on with the old one, whose rows after
  /// that step are cut off, as is a row that a killed process left unfinished. Throws Error where an old file has another header or is no such log.
  CsvLog(const std::filesystem::path& path, std::vector<std::string> columns, std::optional<std::int64_t> resumed_step = std::nullopt)
      : columns_(std::move(columns)) {
    std::string header = "step";
    for (const std::string& c : columns_) {
      if (c.empty() || c.find_first_of(",\"\r\n") != c.npos)
        throw Error(path.string(), "column", "a name without commas, quotes and line breaks", "'" + c + "'");
      header += "," + c;
    }
    header += "\n";
    std::error_code ignored;
    const bool resume = resumed_step && std::filesystem::exists(path, ignored) && std::filesystem::file_size(path, ignored) > 0;
    const std::uint64_t keep = resume ? kept_bytes(path, header, *resumed_step) : 0;
    file_ = detail::AppendFile(path, keep > 0 ? 0 : O_TRUNC);
    if (keep > 0) file_.truncate(keep);
    else file_.append(header);
  }

  /// `values`: one for each column; NaN leaves a field empty. Throws Error for another number of values, and where the disk is full.
  void row(std::int64_t step, std::span<const double> values) {
    if (values.size() != columns_.size())
      throw Error(file_.name(), "row", std::to_string(columns_.size()) + " values", std::to_string(values.size()));
    std::string text = std::to_string(step);
    for (const double v : values) text += "," + detail::number_text(v);
    file_.append(text + "\n");
  }
  void row(std::int64_t step, std::initializer_list<double> values) { row(step, std::span(values.begin(), values.size())); }

 private:
  /// Bytes up to the first row that is later than `step`, or unfinished.
  static std::uint64_t kept_bytes(const std::filesystem::path& path, std::string_view header, std::int64_t step) {
    const MappedFile file(path);
    const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
    const std::size_t first = text.find('\n');
    if (first == text.npos && header.starts_with(text)) return 0;  // killed while the header was written
    if (!text.starts_with(header))
      throw Error(path.string() + ":1", "header", std::string(header.substr(0, header.size() - 1)),
                  std::string(text.substr(0, std::min<std::size_t>(first, 200))));
    std::size_t at = header.size();
    for (std::size_t line = 2; at < text.size(); ++line) {
      const std::size_t end = text.find('\n', at);
      if (end == text.npos) break;
      std::int64_t found = 0;
      const auto [ptr, error] = std::from_chars(text.data() + at, text.data() + end, found);
      if (error != std::errc{} || *ptr != ',')
        throw Error(path.string() + ":" + std::to_string(line), "row", "a step and its values",
                    std::string(text.substr(at, std::min<std::size_t>(end - at, 60))));
      if (found > step) break;
      at = end + 1;
    }
    return at;
  }
  std::vector<std::string> columns_;
  detail::AppendFile file_;
};

/// Values by step. A `line` is drawn pale, with its running mean over it; `points` (validation) are dots, joined.
struct Curve {
  enum class Style : std::uint8_t { line, points };
  std::string name = {};
  std::vector<double> steps = {}, values = {};  // of equal length, steps rising; what is not finite leaves a gap
  Style style = Style::line;
};

struct LossPlot {
  std::string title = {}, x_label = "step", y_label = "loss";
  int width = 960, height = 540;  // pixels
  double smoothing = 0.02;        // share of a line's values that its running mean looks back on; 0: none
};

namespace detail {

inline std::string xml_text(std::string_view s) {
  std::string out;
  for (const char c : s) {
    if (c == '&') out += "&amp;";
    else if (c == '<') out += "&lt;";
    else if (c == '>') out += "&gt;";
    else if (c == '"') out += "&quot;";
    else out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out;
}

/// Beyond this a loss says no more than infinity would, and its labels would be as long.
inline bool drawable(double v) { return std::abs(v) < 1e30; }

inline std::string fixed(double x, int digits) {
  char text[400];
  return {text, std::to_chars(text, text + sizeof text, x, std::chars_format::fixed, digits).ptr};
}

/// An axis: its range, widened to whole ticks of 1, 2 or 5 times a power of ten, of which there are about `wanted`.
struct Axis {
  double from = 0, to = 1, step = 1;
  int digits = 0;  // after the point, in a label
  double pixel_from = 0, pixel_to = 1;

  Axis(double low, double high, int wanted, bool widen) {
    if (!(high > low)) low -= 0.5 * std::max(1e-3, std::abs(low)), high += 0.5 * std::max(1e-3, std::abs(high));
    const double raw = (high - low) / wanted, power = std::pow(10.0, std::floor(std::log10(raw)));
    for (const double factor : {1.0, 2.0, 5.0, 10.0})
      if ((step = factor * power) >= raw) break;
    digits = std::clamp(static_cast<int>(-std::floor(std::log10(step) + 1e-9)), 0, 12);
    from = widen ? std::floor(low / step + 1e-9) * step : low;
    to = widen ? std::ceil(high / step - 1e-9) * step : high;
  }
  double at(double x) const { return std::clamp(pixel_from + (x - from) / (to - from) * (pixel_to - pixel_from), -1e5, 1e5); }
  /// Calls f(value) at each tick.
  template <class F>
  void ticks(F&& f) const {
    for (double k = std::ceil(from / step - 1e-9) + 0.0; k * step <= to + 1e-9 * step; ++k) f(k * step);
  }
};

/// Thousands and millions as k and M where the axis goes that far.
inline std::string step_text(double x, const Axis& axis) {
  const double unit = axis.to >= 1e6 ? 1e6 : axis.to >= 1e4 ? 1e3 : 1;
  const int digits = std::clamp(static_cast<int>(-std::floor(std::log10(axis.step / unit) + 1e-9)), 0, 6);
  return fixed(x / unit, x == 0 ? 0 : digits) + (unit == 1 || x == 0 ? "" : unit == 1e3 ? "k" : "M");
}

/// Means over `window` values around each, so that the curve does not lag behind what it shows. Windows are cut at both sides alike where the curve
/// begins, which is steep, and at one side where it ends. What is not finite is left out, and stays a gap.
inline std::vector<double> running_mean(std::span<const double> values, double window) {
  const std::size_t half = static_cast<std::size_t>(window / 2);
  std::vector<double> sum{0}, count{0};  // of the values before each
  for (const double v : values) {
    sum.push_back(sum.back() + (drawable(v) ? v : 0));
    count.push_back(count.back() + (drawable(v) ? 1 : 0));
  }
  std::vector<double> out(values.begin(), values.end());
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (!drawable(out[i])) continue;
    const std::size_t from = i - std::min(half, i), to = i + 1 + std::min({half, i, out.size() - 1 - i});
    out[i] = (sum[to] - sum[from]) / (count[to] - count[from]);
  }
  return out;
}

/// A path through the values, at most four to a pixel column (first, least, most, last): a million steps draw as a thousand would.
inline std::string svg_path(std::span<const double> steps, std::span<const double> values, const Axis& x, const Axis& y) {
  std::string d;
  bool pen_up = true;
  const auto go = [&](std::size_t i) {
    d += (pen_up ? "M" : "L") + fixed(x.at(steps[i]), 1) + " " + fixed(y.at(values[i]), 1);
    pen_up = false;
  };
  for (std::size_t i = 0; i < values.size();) {
    if (!drawable(values[i])) {
      pen_up = true, ++i;
      continue;
    }
    const double column = std::floor(x.at(steps[i]));
    std::array<std::size_t, 4> keep{i, i, i, i};
    std::size_t end = i;
    const bool alone = pen_up && (i + 1 == values.size() || !drawable(values[i + 1]));
    for (; end < values.size() && drawable(values[end]) && std::floor(x.at(steps[end])) == column; ++end) {
      if (values[end] < values[keep[1]]) keep[1] = end;
      if (values[end] > values[keep[2]]) keep[2] = end;
      keep[3] = end;
    }
    std::sort(keep.begin(), keep.end());
    for (auto k = keep.begin(), last = std::unique(keep.begin(), keep.end()); k != last; ++k) go(*k);
    if (alone) d += "h0";  // round ends make it a dot
    i = end;
  }
  return d;
}

/// A range that has to be seen.
struct Range {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  void add(double v) {
    if (drawable(v)) low = std::min(low, v), high = std::max(high, v);
  }
  bool empty() const { return low > high; }
};

/// Least and greatest value of a line, but for the outermost 1%: one spike must not flatten the curve. Its first value counts, from which it falls.
inline void add_without_spikes(Range& r, std::span<const double> values) {
  std::vector<double> v;
  std::copy_if(values.begin(), values.end(), std::back_inserter(v), drawable);
  if (v.empty()) return;
  r.add(v.front());
  std::sort(v.begin(), v.end());
  const std::size_t out = v.size() / 100;
  r.add(v[out]), r.add(v[v.size() - 1 - out]);
}

inline std::string loss_svg(std::span<const Curve> curves, const LossPlot& o) {
  constexpr std::array<std::string_view, 6> colours{"#2563eb", "#ea580c", "#059669", "#7c3aed", "#db2777", "#475569"};
  Range xs, ys;
  std::vector<std::vector<double>> means;  // of each curve; empty where there is none
  for (const Curve& c : curves) {
    for (std::size_t i = 0; i < c.steps.size(); ++i)
      if (drawable(c.values[i])) xs.add(c.steps[i]);
    const double window = o.smoothing * static_cast<double>(c.values.size());
    // Twice half the window: weights that fall off on both sides, and a spike does not become a box.
    means.push_back(c.style == Curve::Style::line && window >= 4 ? running_mean(running_mean(c.values, window / 2), window / 2)
                                                                 : std::vector<double>{});
    if (means.back().empty()) std::for_each(c.values.begin(), c.values.end(), [&](double v) { ys.add(v); });
    else add_without_spikes(ys, c.values);
  }
  const bool nothing = xs.empty() || ys.empty();
  const double left = 68, right = o.width - 24.0, top = o.title.empty() ? 24 : 56, bottom = o.height - 56.0;
  Axis x(nothing ? 0 : xs.low, nothing ? 1 : xs.high, std::max(2, o.width / 120), false),
      y(nothing ? 0 : ys.low, nothing ? 1 : ys.high, std::max(2, o.height / 60), true);
  x.pixel_from = left, x.pixel_to = right, y.pixel_from = bottom, y.pixel_to = top;

  const std::string w = std::to_string(o.width), h = std::to_string(o.height);
  std::string s = "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + w + " " + h + "\" width=\"" + w + "\" height=\"" + h +
                  "\" font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\" font-size=\"13\" fill=\"#4b5563\">\n"
                  "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n";
  const auto text = [&](double at_x, double at_y, std::string_view attributes, std::string_view what) {
    s += "<text x=\"" + fixed(at_x, 1) + "\" y=\"" + fixed(at_y, 1) + "\" " + std::string(attributes) + ">" + xml_text(what) + "</text>\n";
  };
  const auto line = [&](double x1, double y1, double x2, double y2, std::string_view colour) {
    s += "<path d=\"M" + fixed(x1, 1) + " " + fixed(y1, 1) + "L" + fixed(x2, 1) + " " + fixed(y2, 1) + "\" stroke=\"" +
         std::string(colour) + "\"/>\n";
  };
  if (!o.title.empty()) text(left, 34, "font-size=\"17\" font-weight=\"600\" fill=\"#111827\"", o.title);
  y.ticks([&](double v) {
    line(left, y.at(v), right, y.at(v), "#e5e7eb");
    text(left - 10, y.at(v) + 4.5, "text-anchor=\"end\"", fixed(v, y.digits));
  });
  x.ticks([&](double v) {
    line(x.at(v), bottom, x.at(v), bottom + 5, "#9ca3af");
    text(x.at(v), bottom + 21, "text-anchor=\"middle\"", step_text(v, x));
  });
  line(left, bottom, right, bottom, "#9ca3af");
  text((left + right) / 2, o.height - 12, "text-anchor=\"middle\"", o.x_label);
  text(18, (top + bottom) / 2, "text-anchor=\"middle\" transform=\"rotate(-90 18 " + fixed((top + bottom) / 2, 1) + ")\"", o.y_label);
  if (nothing) text((left + right) / 2, (top + bottom) / 2, "text-anchor=\"middle\"", "no values yet");

  s += "<clipPath id=\"plot\"><rect x=\"" + fixed(left - 6, 1) + "\" y=\"" + fixed(top - 6, 1) + "\" width=\"" + fixed(right - left + 12, 1) +
       "\" height=\"" + fixed(bottom - top + 8, 1) +
       "\"/></clipPath>\n<g clip-path=\"url(#plot)\" fill=\"none\" stroke-linejoin=\"round\" stroke-linecap=\"round\">\n";
  for (std::size_t i = 0; i < curves.size(); ++i) {
    const Curve& c = curves[i];
    const std::string colour(colours[i % colours.size()]);
    const auto path = [&](std::span<const double> values, const char* style) {
      s += "<path d=\"" + svg_path(c.steps, values, x, y) + "\" stroke=\"" + colour + "\" " + style + "/>\n";
    };
    if (!means[i].empty()) path(c.values, "stroke-width=\"1\" stroke-opacity=\"0.28\"");
    path(means[i].empty() ? c.values : means[i], "stroke-width=\"2\"");
    if (c.style == Curve::Style::points)
      for (std::size_t k = 0; k < c.values.size(); ++k)
        if (drawable(c.values[k]))
          s += "<circle cx=\"" + fixed(x.at(c.steps[k]), 1) + "\" cy=\"" + fixed(y.at(c.values[k]), 1) + "\" r=\"4\" fill=\"" + colour +
               "\" stroke=\"#ffffff\" stroke-width=\"1.5\"><title>" + xml_text(c.name) + " " + fixed(c.values[k], 4) + ", " + xml_text(o.x_label) +
               " " + number_text(c.steps[k]) + "</title></circle>\n";
  }
  s += "</g>\n";
  // The legend, upper right, where a falling curve leaves room: the name, the latest value, a mark.
  for (std::size_t i = 0; i < curves.size(); ++i) {
    const Curve& c = curves[i];
    const std::string colour(colours[i % colours.size()]);
    const double row = top + 16 + 22 * static_cast<double>(i);
    const auto& shown = means[i].empty() ? c.values : means[i];
    const auto last = std::find_if(shown.rbegin(), shown.rend(), [](double v) { return drawable(v); });
    const std::string value = last == shown.rend() ? "" : "  " + fixed(*last, std::max(3, y.digits + 1));
    text(right - 42, row + 4.5, "text-anchor=\"end\" fill=\"#111827\" stroke=\"#ffffff\" stroke-width=\"4\" paint-order=\"stroke\"", c.name + value);
    s += "<path d=\"M" + fixed(right - 34, 1) + " " + fixed(row, 1) + "h26\" stroke=\"" + colour + "\" stroke-width=\"2\"/>\n";
    if (c.style == Curve::Style::points)
      s += "<circle cx=\"" + fixed(right - 21, 1) + "\" cy=\"" + fixed(row, 1) + "\" r=\"4\" fill=\"" + colour +
           "\" stroke=\"#ffffff\" stroke-width=\"1.5\"/>\n";
  }
  return s + "</svg>\n";
}

}  // namespace detail

/// Draws the curves into one SVG file, which any browser shows; the file appears whole or stays as it was. Values that are not finite, or beyond
/// 1e30, are gaps, and a plot without any value is an empty frame. Throws Error for a curve whose steps and values differ in number or whose steps
/// are no rising numbers.
inline void write_loss_svg(const std::filesystem::path& path, std::span<const Curve> curves, const LossPlot& options = {}) {
  if (options.width < 200 || options.height < 150 || options.width > 20000 || options.height > 20000)
    throw Error(path.string(), "size", "200 x 150 to 20000 x 20000 pixels", std::to_string(options.width) + " x " + std::to_string(options.height));
  if (!(options.smoothing >= 0 && options.smoothing <= 1)) throw Error(path.string(), "smoothing", "0 to 1", std::to_string(options.smoothing));
  for (const Curve& c : curves) {
    if (c.steps.size() != c.values.size())
      throw Error(path.string(), c.name, std::to_string(c.steps.size()) + " values", std::to_string(c.values.size()));
    for (std::size_t i = 0; i < c.steps.size(); ++i)
      if (!detail::drawable(c.steps[i]) || (i > 0 && c.steps[i] < c.steps[i - 1]))
        throw Error(path.string(), c.name, "steps that rise", std::to_string(c.steps[i]) + " at " + std::to_string(i));
  }
  const std::string svg = detail::loss_svg(curves, options);
  write_file_atomically(path, [&](FileWriter& file) { file.write(svg); });
}

}  // namespace tinyllama
