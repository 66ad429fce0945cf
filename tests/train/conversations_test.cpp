// Training samples from conversations: the reference tokenizers' ids, and losses exactly on answers and what closes them.
#include <doctest/doctest.h>

#include <fstream>

#include "tests/text/vectors.hpp"
#include "tinyllama/io/tokenizer_file.hpp"
#include "tinyllama/train/conversations.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

namespace {

using Talk = std::vector<Message>;

/// Ids of the whole conversation: the sample's, and the last one that it has to say.
Ids whole(const Sample& s) {
  Ids ids = s.ids;
  ids.push_back(s.targets.back());
  return ids;
}

/// What the sample teaches: the text of each stretch of counted targets, control pieces shown. Checks that every target is the id that follows.
std::vector<std::string> learned(const Tokenizer& t, const Sample& s) {
  REQUIRE(s.ids.size() == s.targets.size());
  std::vector<std::string> out;
  Ids run;
  for (std::size_t i = 0; i <= s.targets.size(); ++i) {
    const std::int32_t id = i < s.targets.size() ? s.targets[i] : not_counted;
    if (id != not_counted) {
      if (i + 1 < s.ids.size()) REQUIRE(id == s.ids[i + 1]);
      run.push_back(id);
    } else if (!run.empty()) {
      std::string text;
      for (const auto r : run) text += t.piece(r);
      out.push_back(text);
      run.clear();
    }
  }
  return out;
}

Talk messages_of(const json& row) {
  Talk out;
  for (const json& m : row["messages"]) out.push_back({m["role"].get<std::string>(), m["content"].get<std::string>()});
  return out;
}

/// The ids of conversations that end in an answer, against the reference tokenizer's ids of the text that Jinja made; `end`: ids after the
/// closing piece, which nobody has to say.
int check_reference(const Tokenizer& t, ChatTemplate how, const std::filesystem::path& file, bool bos, std::size_t end) {
  int checked = 0;
  for (const json& row : vectors(file, 12)) {
    const Talk talk = messages_of(row);
    if (row["prompt"] || talk.back().role != "assistant") continue;
    Ids expected = row["ids"].get<Ids>();
    if (bos) expected.insert(expected.begin(), t.bos());
    expected.resize(expected.size() - end);
    INFO(row["rendered"].dump());
    CHECK(whole(conversation_sample(t, how, talk)) == expected);
    ++checked;
  }
  return checked;
}

const Talk two_turns{{"system", "Be kind."}, {"user", "one"}, {"assistant", "two, it's"}, {"user", "three"}, {"assistant", "four\n\nfive  "}};

Tokenizer llama() { return load_tokenizer(fixture("tokenizer/sentencepiece/llama.model")); }
Tokenizer chatml() { return load_tokenizer(fixture("tokenizer/byte_level")); }

std::filesystem::path write(const TempFolder& folder, const std::string& text) {
  std::ofstream(folder / "talk.jsonl", std::ios::binary) << text;
  return folder / "talk.jsonl";
}

}  // namespace

TEST_CASE("conversations: the ids are the reference's") {
  CHECK(check_reference(llama(), ChatTemplate::zephyr, fixture("tokenizer/sentencepiece/zephyr.jsonl"), true, 2) >
        0);  // "\n" is "▁" and <0x0A> after </s>
  CHECK(check_reference(chatml(), ChatTemplate::chatml, fixture("tokenizer/byte_level/chatml.jsonl"), false, 1) > 0);
}

TEST_CASE("conversations: the ids are the reference's, with SmolLM2's tokenizer") {
  const auto file = smollm2_gguf();
  if (!file) {
    MESSAGE("skipped: SmolLM2's GGUF file is not there");
    return;
  }
  const Tokenizer t = load_tokenizer(*file);
  CHECK(check_reference(t, ChatTemplate::chatml, fixture("tokenizer/smollm2_chat.jsonl"), false, 1) > 0);
  CHECK(learned(t, conversation_sample(t, ChatTemplate::chatml, two_turns)) ==
        std::vector<std::string>{"two, it's<|im_end|>", "four\n\nfive  <|im_end|>"});
}

TEST_CASE("conversations: the ids are the chat's, with Llama 2's tokenizer") {
  const auto file = test_data("tokenizer/tokenizer.model");
  if (!file) {
    MESSAGE("skipped: Llama 2's tokenizer.model is not there");
    return;
  }
  const Tokenizer t = load_tokenizer(*file);
  for (const Talk& talk : {two_turns, Talk{{"user", "Hi"}, {"assistant", "  spaces, \t tabs and 日本語 🙂"}}, Talk{{"user", ""}, {"assistant", ""}},
                           Talk{{"user", "a"}, {"assistant", "<s></s><|user|>\n"}, {"user", "b"}, {"assistant", "c"}}}) {
    const Sample s = conversation_sample(t, ChatTemplate::zephyr, talk);
    Ids expected = render(t, ChatTemplate::zephyr, talk, false);
    expected.resize(static_cast<std::size_t>(expected.rend() - std::find(expected.rbegin(), expected.rend(), t.eos())));
    CHECK(whole(s) == expected);
    // As a chat has it in its cache: prompt, answer as generated, the next turn.
    Ids cache;
    std::size_t first = 0;
    for (std::size_t i = 0; i < talk.size(); ++i) {
      if (talk[i].role != "assistant") continue;
      for (const auto id : render_turn(t, ChatTemplate::zephyr, std::span(talk).first(i), first, true)) cache.push_back(id);
      for (const auto id : t.encode(talk[i].content, {.continuation = true})) cache.push_back(id);
      first = i + 1;
    }
    CHECK(s.ids == cache);
  }
  CHECK(learned(t, conversation_sample(t, ChatTemplate::zephyr, two_turns)) == std::vector<std::string>{"two, it's</s>", "four\n\nfive  </s>"});
  CHECK(conversation_sample(t, ChatTemplate::zephyr, Talk{{"user", "Hi"}, {"assistant", "Yes"}}) ==
        Sample{{1, 529, 29989, 1792, 29989, 29958, 13, 18567, 2, 29871, 13, 29966, 29989, 465, 22137, 29989, 29958, 13, 8241},
               {-100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, 8241, 2}});
}

TEST_CASE("conversations: what is learned, by template") {
  using Texts = std::vector<std::string>;
  const Tokenizer sp = llama(), bpe = chatml();
  const auto taught = [&](ChatTemplate how, Answers answers) {
    const Tokenizer& t = how == ChatTemplate::chatml ? bpe : sp;
    return learned(t, conversation_sample(t, how, two_turns, answers));
  };
  CHECK(taught(ChatTemplate::zephyr, Answers::all) == Texts{"two, it's</s>", "four\n\nfive  </s>"});
  CHECK(taught(ChatTemplate::zephyr, Answers::last) == Texts{"four\n\nfive  </s>"});
  CHECK(taught(ChatTemplate::chatml, Answers::all) == Texts{"two, it's<|im_end|>", "four\n\nfive  <|im_end|>"});
  CHECK(taught(ChatTemplate::chatml, Answers::last) == Texts{"four\n\nfive  <|im_end|>"});
  CHECK(taught(ChatTemplate::llama2, Answers::all) == Texts{" two, it's </s>", " four\n\nfive   </s>"});
  CHECK(taught(ChatTemplate::human, Answers::all) == Texts{" two, it's### Human:", " four\n\nfive  </s>"});
  CHECK(taught(ChatTemplate::human, Answers::last) == Texts{" four\n\nfive  </s>"});
  // Where another than the user speaks next, nothing marks the end.
  CHECK(learned(sp,
                conversation_sample(sp, ChatTemplate::human, Talk{{"user", "a"}, {"assistant", "b"}, {"system", "### Human"}, {"assistant", "c"}})) ==
        Texts{" b", " c</s>"});
}

TEST_CASE("conversations: a prompt and its answer are never merged") {
  const Tokenizer t(small_byte_level({{"\u010a", "\u010a"}}));  // two line breaks are a piece
  const Talk talk{{"user", "u"}, {"assistant", "\nx"}};
  const Sample s = conversation_sample(t, ChatTemplate::chatml, talk);
  const Ids prompt = render(t, ChatTemplate::chatml, std::span(talk).first(1), true);
  REQUIRE(s.ids.size() > prompt.size());
  CHECK(Ids(s.ids.begin(), s.ids.begin() + static_cast<std::ptrdiff_t>(prompt.size())) == prompt);
  CHECK(learned(t, s) == std::vector<std::string>{"\nx<|im_end|>"});
  CHECK(s.counted() == 3);
}

TEST_CASE("conversations: ends and beginnings") {
  const Tokenizer t = llama();
  const auto sample = [&](const Talk& talk, Answers a = Answers::all) { return conversation_sample(t, ChatTemplate::zephyr, talk, a); };
  const Talk talk{{"user", "a"}, {"assistant", "b"}};
  Talk longer = talk;
  longer.push_back({"user", "and?"});
  CHECK(sample(longer) == sample(talk));  // a question without an answer teaches nothing
  CHECK(sample(longer, Answers::last) == sample(talk));
  CHECK(sample({{"user", "a"}}) == Sample{});
  CHECK(sample({{"user", "a"}}, Answers::last) == Sample{});
  CHECK(sample({}) == Sample{});
  CHECK(learned(t, sample({{"assistant", "Welcome"}, {"user", "x"}, {"assistant", ""}})) == std::vector<std::string>{"Welcome</s>", "</s>"});
  CHECK_THROWS_WITH_AS(sample({{"user", "a"}, {"robot", "b"}}), doctest::Contains("robot"), Error);
  CHECK_THROWS_AS(conversation_sample(t, ChatTemplate::none, talk), Error);
  CHECK_THROWS_WITH_AS(conversation_sample(t, ChatTemplate::chatml, talk), doctest::Contains("<|im_start|>"), Error);
}

TEST_CASE("conversations: every layout of a line is the same conversation") {
  const TempFolder folder;
  const Tokenizer t = llama();
  const auto first = [&](const std::string& line) {
    const auto r = read_conversations(write(folder, line), t, {.chat_template = ChatTemplate::zephyr});
    REQUIRE(r.samples.size() == 1);
    return r.samples[0];
  };
  const Sample plain = conversation_sample(t, ChatTemplate::zephyr, Talk{{"user", "q"}, {"assistant", "a"}});
  for (const char* line : {R"({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})",
                           R"({"id": 5, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})",
                           R"({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})",
                           R"({"prompt": "q", "completion": "a"})", R"({"prompt": "q", "response": "a"})",
                           R"({"question": "q", "answer": "a", "system": ""})", R"({"instruction": "q", "input": "", "output": "a"})",
                           R"({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]})"}) {
    INFO(line);
    CHECK(first(line) == plain);
  }
  const Sample system = conversation_sample(t, ChatTemplate::zephyr, Talk{{"system", "s"}, {"user", "q"}, {"assistant", "a"}});
  CHECK(first(R"({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})") == system);
  CHECK(first(R"({"system": "s", "question": "q", "answer": "a"})") == system);
  CHECK(first(R"({"instruction": "q", "input": "i", "output": "a"})") ==
        conversation_sample(t, ChatTemplate::zephyr, Talk{{"user", "q\n\ni"}, {"assistant", "a"}}));
}

TEST_CASE("conversations: a file, its report, and samples that are too long") {
  const TempFolder folder;
  const Tokenizer t = llama();
  const std::string shorter = R"({"question": "q", "answer": "a"})", longer = R"({"question": "q", "answer": "aaaa bbbb cccc dddd eeee ffff"})",
                    prompt = R"({"question": "a very long question, which fills the row", "answer": "a"})",
                    silent = R"({"messages": [{"role": "user", "content": "q"}]})";
  const auto path = write(folder, "\xef\xbb\xbf" + shorter + "\r\n\n  \n" + longer + "\n" + silent + "\n" + prompt);
  const auto all = read_conversations(path, t, {.chat_template = ChatTemplate::zephyr});
  CHECK(all.lines == 4);
  CHECK(all.samples.size() == 3);
  CHECK(all.without_answer == 1);
  CHECK(all.dropped + all.truncated == 0);
  const index_t fits = all.samples[0].tokens();
  REQUIRE(all.samples[1].tokens() > fits + 1);
  CHECK(all.tokens == all.samples[0].tokens() + all.samples[1].tokens() + all.samples[2].tokens());
  CHECK(all.counted == all.samples[0].counted() + all.samples[1].counted() + all.samples[2].counted());

  const auto dropped = read_conversations(path, t, {.chat_template = ChatTemplate::zephyr, .max_tokens = fits});
  CHECK(dropped.samples == std::vector{all.samples[0]});
  CHECK(dropped.dropped == 2);

  const auto cut = read_conversations(path, t, {.chat_template = ChatTemplate::zephyr, .max_tokens = fits + 1, .too_long = TooLong::truncate});
  CHECK(cut.samples.size() == 2);
  CHECK(cut.truncated == 1);
  CHECK(cut.dropped == 1);  // of the long prompt no answer is left
  Sample expected = all.samples[1];
  expected.ids.resize(static_cast<std::size_t>(fits) + 1);
  expected.targets.resize(static_cast<std::size_t>(fits) + 1);
  CHECK(cut.samples[1] == expected);
  CHECK(expected.counted() > 0);

  // Without a template by name it is the vocabulary's.
  CHECK(read_conversations(write(folder, shorter), chatml()).samples[0] ==
        conversation_sample(chatml(), ChatTemplate::chatml, Talk{{"user", "q"}, {"assistant", "a"}}));
  CHECK_THROWS_WITH_AS(read_conversations(path, t), doctest::Contains("chat template"), Error);
}

TEST_CASE("conversations: bad lines are named") {
  const TempFolder folder;
  const Tokenizer t = llama();
  const std::string good = R"({"question": "q", "answer": "a"})";
  const auto refuses = [&](const std::string& line, const char* what) {
    INFO(line);
    const auto path = write(folder, good + "\n\n" + line + "\n" + good);
    CHECK_THROWS_WITH_AS(read_conversations(path, t, {.chat_template = ChatTemplate::zephyr}), doctest::Contains((path.string() + ":3: ").c_str()),
                         Error);
    CHECK_THROWS_WITH_AS(read_conversations(path, t, {.chat_template = ChatTemplate::zephyr}), doctest::Contains(what), Error);
  };
  refuses(R"({"question": "q", "answer": )", "valid JSON");
  refuses(R"({"question": "q", "answer": "a"} {})", "valid JSON");
  refuses("{\"question\": \"\xff\", \"answer\": \"a\"}", "valid JSON");
  refuses(std::string(100, '[') + std::string(100, ']'), "levels");
  refuses(R"({"question": "q", "question": "r", "answer": "a"})", "twice");
  refuses("[1]", "an object");
  refuses("{}", "an empty object");
  refuses(R"({"text": "plain", "x": 1})", "found text, x");
  refuses(R"({"question": "q"})", "found question");
  refuses(R"({"question": 5, "answer": "a"})", "a string or a list of messages");
  refuses(R"({"question": "q", "answer": {}})", "a string or a list of messages");
  refuses(R"({"question": "q", "answer": "a", "system": 7})", "system");
  refuses(R"({"messages": "hello"})", "a list of messages");
  refuses(R"({"messages": []})", "a list of messages");
  refuses(R"({"messages": ["hello"]})", "messages[0]");
  refuses(R"({"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "x"}]})",
          "messages[1]: expected the role system, user or assistant, found 'tool'");
  refuses(R"({"messages": [{"role": "user"}]})", "content");
  refuses(R"({"messages": [{"content": "q"}]})", "role");
  refuses(R"({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]})", "content: expected a string");
  refuses(R"({"conversations": [{"from": "human", "content": "q"}]})", "value");

  CHECK_THROWS_WITH_AS(read_conversations(folder / "none.jsonl", t), doctest::Contains("none.jsonl"), Error);
  CHECK_THROWS_AS(read_conversations(write(folder, ""), t), Error);
  CHECK_THROWS_WITH_AS(read_conversations(write(folder, "\n\n"), t, {.chat_template = ChatTemplate::zephyr}), doctest::Contains("0 lines"), Error);
  CHECK_THROWS_WITH_AS(read_conversations(write(folder, good), t, {.chat_template = ChatTemplate::zephyr, .max_tokens = 3}),
                       doctest::Contains("1 too long"), Error);
  CHECK_THROWS_WITH_AS(read_conversations(write(folder, good), t, {.max_tokens = 0}), doctest::Contains("max_tokens"), Error);
}

TEST_CASE("conversations: damaged lines give an Error or a sample, and nothing else") {
  const TempFolder folder;
  const Tokenizer t = chatml();
  for (const std::string& good : {std::string(R"({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\u00e9"}]})"),
                                  std::string(R"({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})"),
                                  std::string(R"({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]})")}) {
    int errors = 0, successes = 0;
    const auto attempt = [&](const std::string& bad) {
      try {
        for (const Sample& s : read_conversations(write(folder, bad), t).samples) REQUIRE(s.ids.size() == s.targets.size());
        ++successes;
      } catch (const Error&) {
        ++errors;
      }
    };
    for (std::size_t i = 0; i < good.size(); ++i) {
      attempt(good.substr(0, i));
      for (int bit = 0; bit < 8; ++bit) {
        std::string bad = good;
        bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
        attempt(bad);
      }
    }
    CHECK(errors > 100);
    CHECK(successes > 10);
  }
}
