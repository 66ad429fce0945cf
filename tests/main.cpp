// The main function of every test program: doctest's, with an exit status for "skipped".
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstring>

namespace {

int skipped = 0;  // test cases that said MESSAGE("skipped: ...")
int run = 0;      // test cases that ran

/// Counts the test cases that report themselves as skipped; doctest knows no such outcome.
struct SkipCounter : doctest::IReporter {
  explicit SkipCounter(const doctest::ContextOptions&) {}
  void test_case_start(const doctest::TestCaseData&) override { ++run; said_so_ = false; }
  void test_case_end(const doctest::CurrentTestCaseStats& stats) override { skipped += said_so_ && stats.failure_flags == 0; }
  void log_message(const doctest::MessageData& m) override { said_so_ |= std::strncmp(m.m_string.c_str(), "skipped:", 8) == 0; }

  void report_query(const doctest::QueryData&) override {}
  void test_run_start() override {}
  void test_run_end(const doctest::TestRunStats&) override {}
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_exception(const doctest::TestCaseException&) override {}
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData&) override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}

 private:
  bool said_so_ = false;
};

}  // namespace

REGISTER_LISTENER("skips", 1, SkipCounter);

int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  const int failed = context.run();
  if (failed || context.shouldExit()) return failed;
  return run > 0 && skipped == run ? 77 : 0;  // CTest's SKIP_RETURN_CODE; CTest runs one case a process
}
