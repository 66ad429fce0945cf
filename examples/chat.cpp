// chat: a conversation in a terminal. Ctrl-C stops the answer and not the program; /reset forgets, /quit or end of input leaves.
#include <tinyllama/tinyllama.hpp>

#include <atomic>
#include <chrono>
#include <csignal>

#include "common.hpp"
#include "options.hpp"

namespace tl = tinyllama;

namespace {

std::atomic<bool> interrupted = false;  // lock-free, so that a signal handler may set it

template <class Session>
struct Conversation {
  Session session;
  tl::ChatTemplate format;
  tl::GenerateOptions options;
  std::string system;
  std::vector<tl::Message> messages = {};
  std::size_t in_cache = 0;  // messages that the session holds

  /// Streams the answer to `question`.
  void ask(const std::string& question) {
    const tl::Tokenizer& tokenizer = session.model().tokenizer();
    if (messages.empty() && !system.empty()) messages.push_back({"system", system});
    messages.push_back({"user", question});
    const auto ids = tl::render_turn(tokenizer, format, messages, in_cache, true);
    tl::GenerateOptions o = options;
    o.stop_ids = tl::stop_ids(tokenizer, format);
    o.ignore_eos = true;  // it is among them
    for (const std::string& s : tl::stop_strings(format)) o.stop_strings.push_back(s);
    std::stop_source stop;
    o.stop = stop.get_token();
    const auto show = example::progress("reading");
    o.progress = [&](std::size_t done, std::size_t total) {
      if (interrupted) stop.request_stop();
      if (show) show(done, total);
    };

    const tl::index_t before = session.length(), answer_at = before + static_cast<tl::index_t>(ids.size());
    std::string answer;
    int tokens = 0;
    auto generation = tl::generate(session, ids, o);
    if (!generation.start()) {  // cancelled while reading: as if it had never been asked
      session.truncate(before);
      messages.pop_back();
      std::cout << "(stopped)\n";
      return;
    }
    const auto started = std::chrono::steady_clock::now();
    const tl::Finish finish = generation.run([&](const tl::Token& t) {
      tokens += t.id >= 0;
      answer += t.text;
      std::cout << t.text << std::flush;
      return !interrupted;
    });
    const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    std::cout << std::endl;
    if (isatty(STDOUT_FILENO)) std::fprintf(stderr, "\033[2m[%d tokens, %.1f/s%s]\033[0m\n", tokens, tokens / took, finish == tl::Finish::cancelled ? ", stopped" : "");
    if (finish == tl::Finish::context_full) std::cerr << "[the context is full: /reset starts anew]\n";
    if (finish == tl::Finish::stop_string) {  // the cache holds the stop string; put the shown answer in its place
      session.truncate(answer_at);
      session.prefill(tokenizer.encode(answer, {.continuation = true}));
    }
    messages.push_back({"assistant", answer});
    in_cache = messages.size();
  }

  void reset() {
    session.truncate(0);
    messages.clear();
    in_cache = 0;
  }
};

template <class Model>
void chat(const Model& model, const tl::GenerateOptions& options, const std::string& name, const std::string& system, const std::string& once) {
  const auto format = name.empty() ? tl::detect_chat_template(model.tokenizer().vocabulary()) : tl::parse_chat_template(name);
  if (format == tl::ChatTemplate::none)
    throw tl::Error("chat", "template", "one that the file names, or --template zephyr, chatml, human or llama2", "a model without (use generate)");
  Conversation<decltype(model.start())> conversation{model.start(), format, options, system};
  if (!once.empty()) return conversation.ask(once);
  std::string line;
  while (std::cout << "> " << std::flush, interrupted = false, true) {
    if (!std::getline(std::cin, line)) {
      if (!interrupted) break;
      std::cin.clear();  // Ctrl-C at the prompt: an empty line
      std::cout << '\n';
      continue;
    }
    if (line == "/quit" || line == "/exit") break;
    if (line == "/reset") {
      conversation.reset();
    } else if (line.starts_with('/')) {
      std::cout << "/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer\n";
    } else if (!line.empty()) {
      conversation.ask(line);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("A conversation with a chat model. Commands: /reset, /quit; Ctrl-C stops an answer.");
  example::ModelOptions model;
  tl::GenerateOptions options;
  options.max_tokens = 1024;
  options.temperature = 0.2f;
  std::string format, system, once;
  model.add_to(app);
  example::add_generate_options(app, options);
  app.add_option("--template", format, "zephyr, chatml, human or llama2; default: the one that the file names");
  app.add_option("--system", system, "the system message");
  app.add_option("--once", once, "answer this and leave");
  return example::run_main(argc, argv, app, [&] {
    struct sigaction action = {};
    action.sa_handler = [](int) { interrupted = true; };  // without SA_RESTART, so that reading a line ends too
    if (once.empty()) sigaction(SIGINT, &action, nullptr);
    example::with_model(tl::open_checkpoint(model.path), model, model.load(), [&](const auto& m) { chat(m, options, format, system, once); });
  });
}
