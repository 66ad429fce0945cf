// Pairs of answers: the whole conversation on both sides, losses where they differ.
#include <doctest/doctest.h>

#include <fstream>

#include "tests/text/vectors.hpp"
#include "tinyllama/io/tokenizer_file.hpp"
#include "tinyllama/train/preferences.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

namespace {

using Talk = std::vector<Message>;

Tokenizer llama() { return load_tokenizer(fixture("tokenizer/sentencepiece/llama.model")); }

std::filesystem::path write(const TempFolder& folder, const std::string& text) {
  std::ofstream(folder / "pairs.jsonl", std::ios::binary) << text;
  return folder / "pairs.jsonl";
}

std::string learned(const Tokenizer& t, const Sample& s) {
  std::string text;
  for (const auto id : s.targets)
    if (id != not_counted) text += t.piece(id);
  return text;
}

const PreferenceOptions zephyr{.chat_template = ChatTemplate::zephyr};

}  // namespace

TEST_CASE("preferences: every layout of a line is the same pair") {
  const TempFolder folder;
  const Tokenizer t = llama();
  const Sample chosen = conversation_sample(t, ChatTemplate::zephyr, Talk{{"user", "q"}, {"assistant", "good"}});
  const Sample rejected = conversation_sample(t, ChatTemplate::zephyr, Talk{{"user", "q"}, {"assistant", "very bad"}});
  const std::string user = R"({"role": "user", "content": "q"})", good = R"({"role": "assistant", "content": "good"})",
                    bad = R"({"role": "assistant", "content": "very bad"})";
  for (const std::string& line : {std::string(R"({"prompt": "q", "chosen": "good", "rejected": "very bad"})"),
                                  std::string(R"({"question": "q", "chosen": "good", "rejected": "very bad", "score": 3})"),
                                  R"({"prompt": [)" + user + R"(], "chosen": "good", "rejected": "very bad"})",
                                  R"({"prompt": [)" + user + R"(], "chosen": [)" + good + R"(], "rejected": [)" + bad + "]}",
                                  R"({"prompt": "q", "chosen": [)" + user + "," + good + R"(], "rejected": [)" + user + "," + bad + "]}",
                                  R"({"chosen": [)" + user + "," + good + R"(], "rejected": [)" + user + "," + bad + "]}"}) {
    INFO(line);
    const auto r = read_preferences(write(folder, line), t, zephyr);
    REQUIRE(r.pairs.size() == 1);
    CHECK(r.pairs[0].chosen == chosen);
    CHECK(r.pairs[0].rejected == rejected);
  }
  const auto r = read_preferences(write(folder, R"({"prompt": "q", "system": "s", "chosen": "good", "rejected": "bad"})"), t, zephyr);
  CHECK(r.pairs[0].chosen == conversation_sample(t, ChatTemplate::zephyr, Talk{{"system", "s"}, {"user", "q"}, {"assistant", "good"}}));
}

TEST_CASE("preferences: of a longer conversation only what differs is learned") {
  const Tokenizer t = llama();
  const Talk chosen{{"user", "a"}, {"assistant", "b"}, {"user", "c"}, {"assistant", "good"}, {"user", "d"}, {"assistant", "end"}},
      rejected{{"user", "a"}, {"assistant", "b"}, {"user", "c"}, {"assistant", "bad"}};
  const PreferencePair p = preference_pair(t, ChatTemplate::zephyr, chosen, rejected);
  CHECK(learned(t, p.chosen) == "good</s>end</s>");
  CHECK(learned(t, p.rejected) == "bad</s>");
  CHECK(p.rejected.ids == conversation_sample(t, ChatTemplate::zephyr, rejected).ids);
}

TEST_CASE("preferences: a file and its report") {
  const TempFolder folder;
  const Tokenizer t = llama();
  const std::string pair = R"({"prompt": "q", "chosen": "good", "rejected": "bad"})",
                    same = R"({"prompt": "q", "chosen": "good", "rejected": "good"})",
                    big = R"({"prompt": "q", "chosen": "good", "rejected": "a long and winding answer that says nothing at all"})";
  const auto path = write(folder, pair + "\n" + same + "\n\n" + big + "\n");
  const auto all = read_preferences(path, t, zephyr);
  CHECK(all.lines == 3);
  CHECK(all.pairs.size() == 2);
  CHECK(all.identical == 1);
  const index_t fits = std::max(all.pairs[0].chosen.tokens(), all.pairs[0].rejected.tokens());
  REQUIRE(all.pairs[1].rejected.tokens() > fits);
  const auto dropped = read_preferences(path, t, {.chat_template = ChatTemplate::zephyr, .max_tokens = fits});
  CHECK(dropped.pairs.size() == 1);
  CHECK(dropped.dropped == 1);
  const auto cut = read_preferences(path, t, {.chat_template = ChatTemplate::zephyr, .max_tokens = fits, .too_long = TooLong::truncate});
  CHECK(cut.pairs.size() == 2);
  CHECK(cut.truncated == 1);
  CHECK(cut.pairs[1].rejected.tokens() == fits);
  CHECK(cut.pairs[1].chosen == all.pairs[1].chosen);
}

TEST_CASE("preferences: bad lines are named") {
  const TempFolder folder;
  const Tokenizer t = llama();
  const auto refuses = [&](const std::string& line, const char* what) {
    INFO(line);
    const auto path = write(folder, R"({"prompt": "q", "chosen": "good", "rejected": "bad"})"
                                    "\n" + line + "\n");
    CHECK_THROWS_WITH_AS(read_preferences(path, t, zephyr), doctest::Contains((path.string() + ":2: ").c_str()), Error);
    CHECK_THROWS_WITH_AS(read_preferences(path, t, zephyr), doctest::Contains(what), Error);
  };
  refuses(R"({"prompt": "q", "chosen": "good"})", "rejected");
  refuses(R"({"chosen": "good", "rejected": "bad"})", "prompt");
  refuses(R"({"prompt": 3, "chosen": "good", "rejected": "bad"})", "prompt");
  refuses(R"({"prompt": "q", "chosen": 1, "rejected": "bad"})", "chosen");
  refuses(R"({"prompt": "q", "chosen": [], "rejected": "bad"})", "chosen");
  refuses("{", "valid JSON");
  const std::string ends = R"([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}])";
  refuses(R"({"prompt": "q", "rejected": "bad", "chosen": )" + ends + "}", "an assistant's message as the last, found user's");
  const auto talk = [](const char* q, const char* a) {
    return std::string(R"([{"role": "user", "content": ")") + q + R"("}, {"role": "assistant", "content": ")" + a + R"("}])";
  };
  refuses(R"({"chosen": )" + talk("q", "good") + R"(, "rejected": )" + talk("other", "bad") + "}", "differ at 0, the user's");

  CHECK_THROWS_WITH_AS(read_preferences(write(folder, R"({"prompt": "q", "chosen": "a", "rejected": "a"})"), t, zephyr),
                       doctest::Contains("1 with equal answers"), Error);
  CHECK_THROWS_WITH_AS(preference_pair(t, ChatTemplate::zephyr, Talk{{"user", "a"}, {"assistant", "b"}},
                                       Talk{{"user", "a"}, {"assistant", "b"}, {"user", "c"}, {"assistant", "d"}}),
                       doctest::Contains("the beginning of the other"), Error);
  CHECK_THROWS_WITH_AS(read_preferences(folder / "none.jsonl", t), doctest::Contains("none.jsonl"), Error);
  CHECK_THROWS_WITH_AS(read_preferences(folder / "none.jsonl", t, {.max_tokens = -1}), doctest::Contains("max_tokens"), Error);
}
