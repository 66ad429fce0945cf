// The README's program: text from a checkpoint in 20 lines.
#include <tinyllama/tinyllama.hpp>

#include <iostream>

namespace tl = tinyllama;

int main(int argc, char** argv) try {
  if (argc < 2) throw tl::Error("usage: hello_llama MODEL [PROMPT]");
  tl::Cpu dev;                                         // owns its threads
  const auto file = tl::open_checkpoint(argv[1]);      // a GGUF file, or a folder in Hugging Face layout
  tl::load_any(dev, file, {}, [&](const auto& model) { // as the preset that fits; tl::load<tl::tinyllama_1b>(dev, path) where it is known
    auto session = model.start();                      // a KV cache: a value; copy it to fork, truncate it to undo
    for (std::string_view piece : tl::generate(session, argc > 2 ? argv[2] : "The sky is", {.max_tokens = 64, .top_p = 0.9f, .seed = 1}))
      std::cout << piece << std::flush;
    std::cout << '\n';
  });
} catch (const tl::Error& e) {
  std::cerr << "error: " << e.what() << '\n';
  return 1;
}
