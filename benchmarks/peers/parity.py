#!/usr/bin/env python3
"""Loss parity: the 200 steps of tests/train/parity_test.cpp in PyTorch, from the same weights over the same batches under the same schedule.

parity.py                writes tests/fixtures/train/parity.json: PyTorch's losses in f64 and f32 of every tenth step, and of its bf16 run
parity.py --tokens TEXT  writes tests/fixtures/train/tokens.u16 from a text first"""
import argparse
import collections
import json
import pathlib

import numpy as np
import torch

from pytorch_train import Llama, Run, cosine

FIXTURES = pathlib.Path(__file__).resolve().parents[2] / "tests/fixtures/train"
CONFIG = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}
SEED, STEPS, ROWS, TOKENS = 1, 200, 8, 64
PEAK, MINIMUM, WARMUP = 1e-3, 1e-4, 20


def make_tokens(text, count=73000):
    """Ids 0-255 are bytes, 256-511 the text's commonest pairs of bytes, taken from left to right."""
    data = pathlib.Path(text).read_bytes()[:4 * count]
    pairs = {p: 256 + i for i, (p, _) in enumerate(sorted(collections.Counter(zip(data, data[1:])).items(), key=lambda x: (-x[1], x[0]))[:256])}
    ids, i = [], 0
    while len(ids) < count:
        pair = pairs.get((data[i], data[i + 1]))
        ids.append(data[i] if pair is None else pair)
        i += 1 if pair is None else 2
    np.array(ids, "<u2").tofile(FIXTURES / "tokens.u16")


def batch(ids, step):
    """Rows of TOKENS + 1 ids, window after window; past the end it goes on inside the first window, so that no row comes twice."""
    starts = [(step * ROWS + r) * TOKENS % (len(ids) - TOKENS) for r in range(ROWS)]
    rows = torch.from_numpy(np.stack([ids[s:s + TOKENS + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def random_bits(key, place):
    """The splitmix64 of include/tinyllama/train/initialise.hpp, for an array of places."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (np.asarray(place, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def initial_weights(model, seed):
    """The weights that our Trainer begins with, by the formulas of initialise.hpp. Parameters come in the library's order."""
    d, layers, out = CONFIG["hidden_size"], CONFIG["num_hidden_layers"], {}
    order = ["model.embed_tokens"]
    for i in range(layers):
        order += [f"model.layers.{i}.{n}" for n in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                                    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for tensor, stem in enumerate(order + ["model.norm", "lm_head"]):
        shape = shapes[stem + ".weight"]
        if len(shape) == 1:
            out[stem + ".weight"] = np.ones(shape, np.float32)
            continue
        deviation = 1 / (np.sqrt(d) * layers) if stem.endswith(("o_proj", "down_proj")) else np.sqrt(2 / (5 * d))
        bits = random_bits(random_bits(seed, tensor), np.arange(np.prod(shape), dtype=np.uint64))
        u, v = ((bits >> np.uint64(32)).astype(np.float64) + 1) * 2.0**-32, (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32
        out[stem + ".weight"] = (deviation * np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)).astype(np.float32).reshape(shape)
    return out


def train(ids, precision):
    torch.set_default_dtype(torch.float64 if precision == "f64" else torch.float32)
    model = Llama(CONFIG)
    model.take(initial_weights(model, SEED))
    run = Run(model, cosine(PEAK, WARMUP, STEPS, MINIMUM), precision=precision)
    return [run.step(*batch(ids, i)) for i in range(STEPS)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", metavar="TEXT")
    o = p.parse_args()
    if o.tokens:
        make_tokens(o.tokens)
    ids = np.fromfile(FIXTURES / "tokens.u16", "<u2")
    curves = {precision: train(ids, precision) for precision in ("f64", "f32", "bf16")}
    logged = [0] + list(range(9, STEPS, 10))
    record = {"torch": torch.__version__, "steps": [i + 1 for i in logged]}
    for precision, curve in curves.items():
        record[precision] = [round(curve[i][0], 6) for i in logged]
    record["gradient_norms"] = [round(curves["f64"][i][1], 6) for i in logged]
    (FIXTURES / "parity.json").write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()) + "\n}\n")
    for precision in ("f32", "bf16"):
        print(precision, "worst against f64 over all steps:", max(abs(a[0] / b[0] - 1) for a, b in zip(curves[precision], curves["f64"])))


if __name__ == "__main__":
    main()
