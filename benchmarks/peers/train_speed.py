#!/usr/bin/env python3
"""Speed of a training step beside PyTorch: tokens/s at TinyLlama's width, ours and the peer's modes in alternation.

Run it with the Python that has torch: PYTHON benchmarks/peers/train_speed.py [--layers 2,4] [--rounds 3]. The machine may be shared, so that
single figures say little: the median over the rounds and the ratios count. Every process takes the same steps from the same weights; the first
step is not timed."""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
CONTENDERS = {  # name: (ours, precision, options)
    "ours f32": (True, "f32", []),
    "PyTorch f32": (False, "f32", []),
    "PyTorch f32, compiled": (False, "f32", ["--compile"]),
    "ours bf16": (True, "bf16", []),
    "PyTorch bf16": (False, "bf16", []),
    "PyTorch bf16, compiled": (False, "bf16", ["--compile"]),
}


def flops_per_token(layers, tokens):
    """The paper's convention: 6 for each weight that a token is multiplied with, and attention."""
    d, n, kv, vocab = 2048, 5632, 256, 32000
    return 6 * (vocab * d + layers * (2 * d * d + 2 * d * kv + 3 * d * n)) + 12 * layers * d * tokens


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--programs", default=HERE.parents[1] / "build/release/bin", type=pathlib.Path, help="where make_checkpoint and train_step are")
    p.add_argument("--layers", default="2,4")
    p.add_argument("--tokens", type=int, default=512)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=4, help="of a process, with the first")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--only", default="", help="contenders whose name has this in it")
    o = p.parse_args()
    # Slows current numpy and torch builds; set on some machines for old ones.
    environment = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        ids = np.random.default_rng(1).integers(3, 32000, (1, o.tokens + 1))
        np.save(folder / "inputs.npy", ids[:, :-1].copy())
        np.save(folder / "targets.npy", ids[:, 1:].copy())
        for layers in map(int, o.layers.split(",")):
            model = folder / f"layers{layers}"
            make = [o.programs / "make_checkpoint", "--preset", "tinyllama_1b", "--layers", str(layers), "--format", "f32", "--out", model]
            subprocess.run(make, check=True)
            rates, losses = {name: [] for name in CONTENDERS if o.only in name}, {}
            for _ in range(o.rounds):
                for name in rates:
                    ours, precision, options = CONTENDERS[name]
                    command = [o.programs / "train_step"] if ours else [sys.executable, HERE / "pytorch_train.py"]
                    command += ["--model", model, "--inputs", folder / "inputs.npy", "--targets", folder / "targets.npy", "--steps", str(o.steps)]
                    command += ["--precision", precision, "--threads", str(o.threads), "--json", *options]
                    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                    result = json.loads(done.stdout.splitlines()[-1])
                    rates[name].append(result["tokens_per_second"])
                    losses[name] = result["losses"]
                    print(f"{layers} layers  {name:24} {rates[name][-1]:7.1f} tokens/s  load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
            median = {name: statistics.median(r) for name, r in rates.items()}
            flops = flops_per_token(layers, o.tokens)
            print(f"\n{layers} layers, B=1, T={o.tokens}, {o.threads} threads, {o.rounds} rounds of {o.steps - 1} steps\n")
            print("| | tokens/s, median | best | GFLOP/s | last loss | ours is |\n|---|---|---|---|---|---|")
            for name, rate in median.items():
                ours, precision, _ = CONTENDERS[name]
                base = f"ours {precision}"
                paired = [a / b for a, b in zip(rates.get(base, []), rates[name])]
                ratio = "" if ours or not paired else f"{statistics.median(paired):.2f}x"
                print(f"| {name} | {rate:.0f} | {max(rates[name]):.0f} | {rate * flops / 1e9:.0f} | {losses[name][-1]:.5f} | {ratio} |")
            peers = {n: r for n, r in median.items() if not CONTENDERS[n][0]}
            if peers and "ours bf16" in median:
                best = max(peers, key=peers.get)
                print(f"\nours bf16 / the best peer ({best}): {median['ours bf16'] / median[best]:.2f}x", flush=True)


if __name__ == "__main__":
    main()
