#!/usr/bin/env python3
"""Writes tests/fixtures/tokenizer: small tokenizers trained here on texts of our own, and vectors made with the reference packages.

Needs tokenizers, sentencepiece 0.1.99, jinja2 and gguf (all from PyPI). Usage: make_tokenizer_fixtures.py SMOLLM2.gguf OUTPUT_FOLDER
"""
import json
import pathlib
import random
import sys

import gguf
import jinja2
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenizer_texts import CODE, EDGES, PHRASES, all_texts, mixtures

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def pre_tokenizer(kind):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if kind == "llama3":
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level])
    return byte_level


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r, separators=(",", ":")) + "\n" for r in rows))


def corpus(phrases):
    r = random.Random(3)
    words = " ".join(phrases + CODE).split(" ")
    return [" ".join(r.choice(words) for _ in range(r.randint(3, 20))) for _ in range(3000)] + (phrases + CODE) * 20


def smollm2(path, out):
    """The real vocabulary, under its own pre-tokenizer and two others."""
    fields = gguf.GGUFReader(path).fields
    tokens, merges = (fields["tokenizer.ggml." + k].contents() for k in ("tokens", "merges"))
    kinds = {}
    for kind in ("smollm", "gpt2", "llama3"):
        t = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges], ignore_merges=kind == "llama3"))
        t.pre_tokenizer, t.decoder = pre_tokenizer(kind), decoders.ByteLevel()
        kinds[kind] = t
    rows = []
    for text in all_texts():
        row = {"text": text}
        for kind, t in kinds.items():
            row[kind] = t.encode(text).ids
        row["decoded"] = kinds["smollm"].decode(row["smollm"])
        rows.append(row)
    write_lines(out / "smollm2_vectors.jsonl", rows)
    types = fields["tokenizer.ggml.token_type"].contents()
    kinds["smollm"].add_special_tokens([s for s, kind in zip(tokens, types) if kind == 3])
    chat(kinds["smollm"], fields["tokenizer.chat_template"].contents(), out / "smollm2_chat.jsonl")


def byte_level(out):
    out.mkdir(exist_ok=True)
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizer("smollm"), decoders.ByteLevel()
    t.train_from_iterator(corpus(PHRASES), trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_tokens([AddedToken("<tool>", normalized=False)])
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.save(str(out / "tokenizer.json"))
    config = {"add_bos_token": False, "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}, "pad_token": "<|endoftext|>",
              "chat_template": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    rows = []
    r = random.Random(5)
    kinds = {}
    for kind in ("smollm", "gpt2", "llama3"):
        kinds[kind] = Tokenizer.from_file(str(out / "tokenizer.json"))
        kinds[kind].pre_tokenizer = pre_tokenizer(kind)
    texts = PHRASES + CODE + EDGES + mixtures(6, 40) + ["call <tool> now", "<tool>", " <tool> <tool><tool>x", "<|im_start|>user\nHi <tool><|im_end|>\n"]
    for text in texts:
        # special: what the package does with special tokens in a text; else the text around them is cut so that it has none
        row = {"text": text, "special": kinds["smollm"].encode(text, add_special_tokens=False).ids}
        if not any(s in text for s in SPECIAL):
            for kind, k in kinds.items():
                row[kind] = k.encode(text, add_special_tokens=False).ids
        ids = [r.randrange(t.get_vocab_size()) for _ in range(r.randint(1, 8))]
        row["ids"], row["decoded"], row["decoded_special"] = ids, t.decode(ids), t.decode(ids, skip_special_tokens=False)
        rows.append(row)
    write_lines(out / "vectors.jsonl", rows)
    chat(t, config["chat_template"], out / "chatml.jsonl")


ZEPHYR = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}"
          "{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}{% if loop.index0 == 0 and system != false %}"
          "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
          "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
          "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
CONVERSATIONS = [
    [("user", "Hi")],
    [("user", "What is the capital of France?")],
    [("system", "You are a careful sailor."), ("user", "Where's the boat?\n\nTell me in 10 words.")],
    [("user", "one"), ("assistant", "two"), ("user", "three 3")],
    [("system", "Short answers.\nNo lists."), ("user", "caf\u00e9  \u4e2d\u6587 \U0001f600?"), ("assistant", "Oui, \u00e7a va."), ("user", "x = [1, 2];"), ("assistant", "ok"), ("user", "bye")],
    [("user", "a"), ("assistant", "It's late; we'll sleep.")],
]


def chat(t, template, path, **tokens):
    """The ids of conversations: the text that the Jinja template makes (transformers' settings), with its special tokens recognised."""
    render = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render
    rows = []
    for c in CONVERSATIONS:
        messages = [{"role": r, "content": m} for r, m in c]
        for prompt in (False, True):
            text = render(messages=messages, add_generation_prompt=prompt, **tokens)
            rows.append({"messages": messages, "prompt": prompt, "rendered": text, "ids": t.encode(text, add_special_tokens=False).ids})
    write_lines(path, rows)


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def with_unused(model, share, seed):
    """The same model, with some learned pieces marked UNUSED (field 3, value 5)."""
    r, out, at, n = random.Random(seed), b"", 0, 0
    while at < len(model):
        start = at
        key, at = varint(model, at)
        length, at = varint(model, at)
        body = model[at:at + length]
        at += length
        n += key >> 3 == 1
        normal = b"\x18" not in body[-2:-1]
        if key >> 3 == 1 and n > 280 and normal and len(body) < 120 and r.random() < share:
            out += bytes([key, len(body) + 2]) + body + b"\x18\x05"
        else:
            out += model[start:at]
    return out


def sentencepiece_models(out):
    out.mkdir(exist_ok=True)
    (out / "corpus.tmp").write_text("\n".join(corpus(PHRASES[:15] + PHRASES[23:26])))
    common = dict(input=str(out / "corpus.tmp"), model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
                  minloglevel=2, split_digits=True, allow_whitespace_only_pieces=True)
    variants = {"llama": dict(vocab_size=700, byte_fallback=True, character_coverage=0.98),
                "user": dict(vocab_size=700, byte_fallback=True, character_coverage=0.98, pad_id=3, control_symbols=["<ctl>"],
                             user_defined_symbols=["<user>", "ab", "\u2581\u2581x", "boat"]),
                "no_bytes": dict(vocab_size=500, byte_fallback=False, character_coverage=0.98),
                "no_prefix": dict(vocab_size=600, byte_fallback=True, character_coverage=0.98, add_dummy_prefix=False)}
    r = random.Random(7)
    for name, options in variants.items():
        sentencepiece.SentencePieceTrainer.train(model_prefix=str(out / name), **common, **options)
        (out / f"{name}.vocab").unlink()
        path = out / f"{name}.model"
        if name == "user":
            path.write_bytes(with_unused(path.read_bytes(), 0.2, 8))
        p = sentencepiece.SentencePieceProcessor(model_file=str(path))
        texts = [t.encode() for t in PHRASES[:12] + CODE + EDGES + mixtures(9, 40) + ["<user>ab<ctl>", "the boat, the boats  x   x", "abab cab"]]
        texts += [b"\xff", b"a\xc3", b"\xe2\x96", b"\xed\xa0\x80 b", b"\xf5\x80\x80\x80", b"\xc0\xaf", b"ok \xf0\x9f\x98 ok"]
        rows = []
        for text in texts:
            ids = [r.choice([r.randrange(p.vocab_size()), r.randrange(260 if name != "no_bytes" else 5)]) for _ in range(r.randint(1, 8))]
            rows.append({"hex": text.hex(), "encoded": p.encode(text), "ids": ids, "decoded": p.decode(ids)})
        write_lines(out / f"{name}.jsonl", rows)
    (out / "corpus.tmp").unlink()


def llama_json(model_file, out):
    """tokenizer.json as transformers converts a Llama model: every way in which a piece falls into two is a merge, by score, then by ids."""
    p = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [p.id_to_piece(i) for i in range(p.vocab_size())]
    vocab = {s: i for i, s in enumerate(pieces)}
    merges = []
    for i, s in enumerate(pieces):
        if not (p.is_control(i) or p.is_unknown(i) or p.is_byte(i)):
            merges += [(-p.get_score(i), i, vocab[s[:k]], vocab[s[k:]]) for k in range(1, len(s)) if s[:k] in vocab and s[k:] in vocab]
    t = Tokenizer(models.BPE(vocab, [(pieces[a], pieces[b]) for _, _, a, b in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([AddedToken(s, normalized=False) for s in ("<unk>", "<s>", "</s>")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    t.save(str(out))
    return t


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    smollm2(sys.argv[1], folder)
    byte_level(folder / "byte_level")
    sentencepiece_models(folder / "sentencepiece")
    llama = llama_json(folder / "sentencepiece/llama.model", folder / "sentencepiece/llama.json")
    chat(llama, ZEPHYR, folder / "sentencepiece/zephyr.jsonl", bos_token="<s>", eos_token="</s>")
    chat(llama, LLAMA2, folder / "sentencepiece/llama2.jsonl", bos_token="<s>", eos_token="</s>")
