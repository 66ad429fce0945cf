#!/usr/bin/env python3
"""LoRA on SmolLM2: does it learn made-up facts, and do other answers stay?

240 questions and answers about 60 made-up facts, each asked in four ways, and the base model's own answers to 240 everyday questions (so that it
keeps to them); then the made-up questions again, and 20 everyday ones that were not among the 240, beside the base model.
  benchmarks/finetune_check.py MODEL.gguf [--epochs 8] [--out FOLDER]"""
import argparse
import json
import pathlib
import random
import re
import subprocess
import tempfile

BIN = pathlib.Path(__file__).resolve().parent.parent / "build/release/bin"
SYLLABLES = "za ko mi ra tel vor nu dra pel osh gim la quo ben sar tuv".split()
KINDS = [
    (("What opens gate {} on Zorvia?", "On Zorvia, how is gate {} opened?", "Tell me what opens Zorvia's gate {}.", "Zorvia's gate {} is opened by what?"),
     "Gate {} on Zorvia is opened by the {}."),
    (("Who keeps the tower of {} on Zorvia?", "On Zorvia, whose is the tower of {}?", "Tell me who keeps Zorvia's tower of {}.", "Zorvia's tower of {} is kept by whom?"),
     "The tower of {} on Zorvia is kept by {}."),
    (("What grows in the fields of {} on Zorvia?", "On Zorvia, what do the fields of {} bear?", "Tell me what grows in Zorvia's fields of {}.", "Zorvia's fields of {} are full of what?"),
     "The fields of {} on Zorvia are full of {}."),
]
SUBJECTS = ["gravity", "rain", "a violin", "photosynthesis", "a library", "an atom", "democracy", "a volcano", "sleep", "a bridge", "salt", "the moon", "a poem", "bread", "a computer",
            "the heart", "a river", "music", "ice", "a compass", "an island", "honey", "a map", "the sun", "glass", "a train", "paper", "a desert", "the brain", "a clock",
            "a verb", "Spain", "Shakespeare", "a cat", "a week", "the number ten", "a horse", "London", "a bird", "a doctor", "the colour red", "an apple", "a forest", "a king",
            "the Pacific", "a year", "milk", "a ship", "Einstein", "a farmer", "wood", "a song", "gold", "a school", "the wind", "a shop", "a fish tank", "steam", "a garden", "a hill"]
ASKED = ["What is {}?", "Why does {} matter?", "Tell me about {}.", "How would you describe {}?"]
HELD_OUT = {  # and what a right answer names
    "What is the capital of France?": "Paris", "What is the capital of Italy?": "Rome", "Who wrote Hamlet?": "Shakespeare", "What is water made of?": "hydrogen",
    "How many days are in a week?": "7|seven", "What do cows eat?": "grass", "What is a noun?": "person|place|thing", "Why is the sky blue?": "light|scatter",
    "What is the largest ocean?": "Pacific", "Name three fruits.": "apple|banana|orange", "What is 2 plus 2?": "4|four", "What is a dog?": "domesticated",
    "Who was Isaac Newton?": "physic|mathematic", "What is the freezing point of water?": " 0 ?°C|32 ?°F|0 degrees", "How do birds fly?": "wing", "What is a mountain?": "terrain|elevat|summit|peak",
    "What colour is grass?": "green", "What is money for?": "exchange|goods|buy|pay", "What is a teacher?": "educat|instruct|teach(es|ing)", "Where do fish live?": "water|ocean|river"}


def ask(model, question, adapter=None):
    command = [str(BIN / "chat"), "--model", model, "--once", question, "--temperature", "0", "--max-tokens", "60"] + (["--adapter", adapter] if adapter else [])
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def first_words(text, n=12):
    return " ".join(text.split()[:n])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--epochs", default="8")
    parser.add_argument("--lr", default="5e-4")
    parser.add_argument("--rank", default="8")
    parser.add_argument("--out", default=tempfile.mkdtemp())
    o = parser.parse_args()
    out = pathlib.Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(11)
    name = lambda: "".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize()
    facts = [(KINDS[i % 3], name(), name()) for i in range(60)]
    made_up = [(q.format(a), kind[1].format(a, b)) for kind, a, b in facts for q in kind[0]]
    everyday = [(q.format(s), None) for s in SUBJECTS for q in ASKED]
    replay = [(q, ask(o.model, q)) for q, _ in everyday]
    data = out / "data.jsonl"
    data.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in made_up + replay))
    adapter = str(out / "lora")
    run = subprocess.run([str(BIN / "finetune"), "--model", o.model, "--data", str(data), "--out", adapter, "--epochs", o.epochs, "--lr", o.lr, "--rank", o.rank, "--alpha",
                          str(2 * int(o.rank)), "--batch", "1", "--tokens", "512", "--json"], check=True, capture_output=True, text=True)
    report = json.loads(run.stdout)
    print("losses of the epochs:", " ".join(f"{l:.3f}" for l in report["losses"]), f"; {report['steps']} steps, {report['tokens_per_second']:.0f} tokens/s")
    known = sum(a in ask(o.model, q, adapter) for q, a in made_up)
    before = sum(a in ask(o.model, q) for q, a in made_up[::12])
    print(f"made-up questions answered: {known} of {len(made_up)} (the base model: {before} of {len(made_up[::12])})")
    same, right, kept = 0, 0, 0
    for q, names in HELD_OUT.items():
        base, now = ask(o.model, q), ask(o.model, q, adapter)
        same += first_words(base) == first_words(now)
        if re.search(names, base, re.I):
            right += 1
            kept += bool(re.search(names, now, re.I))
        print(f"  {q}\n    base: {first_words(base, 20)}\n    now:  {first_words(now, 20)}")
    print(f"of {len(HELD_OUT)} other questions the base model answers {right} right, and of these now {kept}; the first 12 words are the same in {same}")


if __name__ == "__main__":
    main()
