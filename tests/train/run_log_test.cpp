// CSV logs that survive kills and resumes; loss curves as SVG.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "tests/support.hpp"
#include "tinyllama/train/run_log.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

namespace {


constexpr double missing = std::numeric_limits<double>::quiet_NaN();

int count(const std::string& text, const std::string& part) {
  int n = 0;
  for (auto at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++n;
  return n;
}

/// Every tag closed, in order: what a browser demands of XML.
bool well_formed(const std::string& svg) {
  std::vector<std::string> open;
  for (std::size_t at = svg.find('<'); at != svg.npos; at = svg.find('<', at)) {
    const std::size_t end = svg.find('>', at);
    if (end == svg.npos) return false;
    const std::string tag = svg.substr(at + 1, end - at - 1);
    if (count(tag, "\"") % 2 || tag.find('<') != tag.npos) return false;
    const std::string name = tag.substr(tag[0] == '/', tag.find_first_of(" /", 1) - (tag[0] == '/'));
    if (tag[0] == '/') {
      if (open.empty() || open.back() != tag.substr(1)) return false;
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(name);
    }
    at = end;
  }
  return open.empty();
}

}  // namespace

TEST_CASE("csv: rows, in numbers that read back") {
  const TempFolder folder;
  CsvLog log(folder / "log.csv", {"loss", "tokens", "validation"});
  log.row(1, {2.5, 3e12, missing});
  CHECK(read_file(folder / "log.csv") == "step,loss,tokens,validation\n1,2.5,3000000000000,\n");  // there at once
  log.row(20, {static_cast<double>(0.1f), -0.0, 4.25});
  log.row(1'430'512, {1.0 / 3, std::numeric_limits<double>::infinity(), 1e-7});
  CHECK(read_file(folder / "log.csv") == "step,loss,tokens,validation\n1,2.5,3000000000000,\n20,0.100000001,0,4.25\n1430512,0.333333333,inf,1e-07\n");
  CHECK(std::strtof("0.100000001", nullptr) == 0.1f);
}

TEST_CASE("csv: a resumed run cuts what came after its step") {
  const TempFolder folder;
  const auto path = folder / "log.csv";
  const auto resumed = [&](const std::string& old, std::int64_t step) {
    write_file(path, old);
    CsvLog(path, {"a"}, step).row(99, {9});
    return read_file(path);
  };
  const std::string rows = "step,a\n1,1\n2,2\n2,2.5\n3,3\n";
  CHECK(resumed(rows, 2) == "step,a\n1,1\n2,2\n2,2.5\n99,9\n");
  CHECK(resumed(rows, 3) == rows + "99,9\n");
  CHECK(resumed(rows, 100) == rows + "99,9\n");
  CHECK(resumed(rows, 0) == "step,a\n99,9\n");
  CHECK(resumed(rows + "4,4", 4) == rows + "99,9\n");  // killed in the middle of a row: whether it was "4,4" or "4,44" nobody knows
  CHECK(resumed(rows + "4", 4) == rows + "99,9\n");
  CHECK(resumed("step,", 4) == "step,a\n99,9\n");  // or of the header
  CHECK(resumed("", 4) == "step,a\n99,9\n");
  std::filesystem::remove(path);
  CsvLog(path, {"a"}, 5).row(6, {1});  // nothing to go on with
  CHECK(read_file(path) == "step,a\n6,1\n");
  CsvLog(path, {"b"});  // a new run begins anew
  CHECK(read_file(path) == "step,b\n");
}

TEST_CASE("csv: what cannot be logged") {
  const TempFolder folder;
  const auto path = folder / "log.csv";
  write_file(path, "step,other\n1,2\n");
  CHECK_THROWS_WITH_AS(CsvLog(path, {"a"}, 1), doctest::Contains("log.csv:1: header: expected step,a, found step,other"), Error);
  write_file(path, "something else");
  CHECK_THROWS_WITH_AS(CsvLog(path, {"a"}, 1), doctest::Contains("header"), Error);
  CHECK(read_file(path) == "something else");
  write_file(path, "step,a\n1,2\nx,3\n");
  CHECK_THROWS_WITH_AS(CsvLog(path, {"a"}, 5), doctest::Contains("log.csv:3: row"), Error);
  write_file(path, "step,a\n\n");
  CHECK_THROWS_WITH_AS(CsvLog(path, {"a"}, 5), doctest::Contains("log.csv:2: row"), Error);
  CHECK_THROWS_WITH_AS(CsvLog(path, {"a,b"}), doctest::Contains("'a,b'"), Error);
  CHECK_THROWS_WITH_AS(CsvLog(path, {""}), doctest::Contains("column"), Error);
  CHECK_THROWS_WITH_AS(CsvLog(folder / "none" / "log.csv", {"a"}), doctest::Contains("none"), Error);
  CsvLog log(path, {"a"});
  CHECK_THROWS_WITH_AS(log.row(1, {1, 2}), doctest::Contains("expected 1 values, found 2"), Error);
  if (std::filesystem::exists("/dev/full")) CHECK_THROWS_WITH_AS(CsvLog("/dev/full", {"a"}), doctest::Contains("/dev/full"), Error);
}

TEST_CASE("svg: ticks are round numbers") {
  const auto ticks = [](double low, double high, int wanted, bool widen) {
    const detail::Axis axis(low, high, wanted, widen);
    std::string s;
    axis.ticks([&](double v) { s += detail::fixed(v, axis.digits) + " "; });
    return s;
  };
  CHECK(ticks(0, 100, 5, false) == "0 20 40 60 80 100 ");
  CHECK(ticks(2.1, 10.9, 9, true) == "2 3 4 5 6 7 8 9 10 11 ");
  CHECK(ticks(3.12, 3.27, 5, true) == "3.10 3.15 3.20 3.25 3.30 ");
  CHECK(ticks(1, 1999, 8, false) == "500 1000 1500 ");
  CHECK(ticks(-3, 3, 3, true) == "-4 -2 0 2 4 ");
  CHECK(ticks(0, 0, 4, true) == "-0.0005 0.0000 0.0005 ");
  const auto label = [](double low, double high, double v) { return detail::step_text(v, detail::Axis(low, high, 8, false)); };
  CHECK(label(0, 2000, 500) == "500");
  CHECK(label(0, 40000, 5000) == "5k");
  CHECK(label(0, 1430512, 200000) == "0.2M");
  CHECK(label(0, 1430512, 0) == "0");
}

TEST_CASE("svg: the running mean does not lag and begins at the first value") {
  std::vector<double> line;
  for (int i = 0; i < 50; ++i) line.push_back(100 - 2 * i);
  const auto mean = detail::running_mean(line, 10);
  for (std::size_t i = 0; i + 6 < line.size(); ++i) CHECK(mean[i] == doctest::Approx(line[i]));
  const auto gap = detail::running_mean(std::vector<double>{6, 4, missing, 8, 8}, 2);
  CHECK(gap[0] == 6);
  CHECK(gap[1] == 5);  // of 6 and 4
  CHECK(std::isnan(gap[2]));
  CHECK(gap[3] == 8);
}

TEST_CASE("svg: a plot of training and validation") {
  const TempFolder folder;
  Curve training{.name = "training <a> & \"b\""}, validation{.name = "validation", .style = Curve::Style::points};
  for (int i = 0; i < 200'000; ++i) {
    training.steps.push_back(i);
    training.values.push_back(i == 777 ? missing : 3 + 7 * std::exp(-i / 9000.0) + (i % 7) * 0.05);
    if (i % 20'000 == 0) validation.steps.push_back(i), validation.values.push_back(3.2 + 7 * std::exp(-i / 9000.0));
  }
  training.values[100'000] = 1e6;  // a spike
  write_loss_svg(folder / "loss.svg", std::vector{training, validation}, {.title = "A run"});
  const std::string svg = read_file(folder / "loss.svg");
  CHECK(well_formed(svg));
  CHECK(svg.size() < 200'000);  // however long the run
  CHECK(svg.find("training &lt;a&gt; &amp; &quot;b&quot;") != svg.npos);
  CHECK(svg.find(">A run<") != svg.npos);
  CHECK(svg.find("nan") == svg.npos);
  CHECK(svg.find("inf") == svg.npos);
  CHECK(count(svg, "<circle") == 11);  // ten points and the legend's
  CHECK(count(svg, "stroke=\"#2563eb\"") == 3);  // raw, mean, legend
  CHECK(svg.find(">150k<") != svg.npos);
  CHECK(svg.find("</text>") != svg.npos);
  // The picture is the right way up: the last validation point stands lower than the first, and to the right.
  const auto circle = [&](std::size_t at, const char* key) { return std::stod(svg.substr(svg.find(key, at) + 4)); };
  const std::size_t first = svg.find("<circle");
  std::size_t last = first;
  for (int i = 0; i < 9; ++i) last = svg.find("<circle", last + 1);
  CHECK(circle(first, "cx=\"") < circle(last, "cx=\""));
  CHECK(circle(first, "cy=\"") < circle(last, "cy=\"") - 200);
}

TEST_CASE("svg: hardly anything to draw, and nothing") {
  const TempFolder folder;
  const auto drawn = [&](const std::vector<Curve>& curves) {
    write_loss_svg(folder / "loss.svg", curves);
    const std::string svg = read_file(folder / "loss.svg");
    CHECK(well_formed(svg));
    CHECK(svg.find("nan") == svg.npos);
    CHECK(svg.find("inf") == svg.npos);
    return svg;
  };
  CHECK(drawn({}).find("no values yet") != std::string::npos);
  CHECK(drawn({{.name = "a"}}).find("no values yet") != std::string::npos);
  CHECK(drawn({{.name = "a", .steps = {1, 2}, .values = {missing, missing}}}).find("no values yet") != std::string::npos);
  CHECK(drawn({{.name = "a", .steps = {5}, .values = {2.5}}}).find("h0\"") != std::string::npos);  // a dot
  CHECK(drawn({{.name = "a", .steps = {0, 1, 2}, .values = {0, 0, 0}}}).find("no values yet") == std::string::npos);
  CHECK(count(drawn({{.name = "a", .steps = {0, 1, 2, 3, 4}, .values = {1, 2, missing, 2, 1}}}), "L") >= 2);
  CHECK(drawn({{.name = "a", .steps = {0, 1}, .values = {-1e300, 1e300}}}).find("no values yet") != std::string::npos);  // as far gone as infinity
  CHECK(drawn({{.name = "a", .steps = {0, 1, 2}, .values = {1e300, 1, 2}}}).size() < 5'000);
}

TEST_CASE("svg: what cannot be drawn") {
  const TempFolder folder;
  const auto refuses = [&](const Curve& c, const char* what) {
    CHECK_THROWS_WITH_AS(write_loss_svg(folder / "loss.svg", std::vector{c}), doctest::Contains(what), Error);
  };
  refuses({.name = "c", .steps = {1, 2}, .values = {1}}, "c: expected 2 values, found 1");
  refuses({.name = "c", .steps = {2, 1}, .values = {1, 1}}, "steps that rise");
  refuses({.name = "c", .steps = {missing}, .values = {1}}, "steps that rise");
  const std::vector<Curve> none;
  CHECK_THROWS_WITH_AS(write_loss_svg(folder / "loss.svg", none, {.width = 10}), doctest::Contains("size"), Error);
  CHECK_THROWS_WITH_AS(write_loss_svg(folder / "loss.svg", none, {.smoothing = -1}), doctest::Contains("smoothing"), Error);
  CHECK_THROWS_WITH_AS(write_loss_svg(folder / "none" / "loss.svg", none), doctest::Contains("none"), Error);
  CHECK(!std::filesystem::exists(folder / "loss.svg"));
}
