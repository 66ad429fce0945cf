#!/usr/bin/env python3
"""Loss parity on a card: STEPS steps of a model from the same weights over the same batches, ours in bf16 (with moments in f32, bf16 and 8 bits) and fp8, PyTorch in f32 and under bf16 autocast.

make_checkpoint --preset tinyllama_120m --format f32 --out DIR
cuda_parity.py --model DIR --batches IDS.npy [--program build/release/bin/train_step]"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

PEER = pathlib.Path(__file__).resolve().parent / "pytorch_train.py"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a folder in Hugging Face layout")
    p.add_argument("--batches", required=True, help="[steps, B, T + 1] ids, .npy")
    p.add_argument("--program", default="build/release/bin/train_step")
    p.add_argument("--lr", type=float, default=4e-4)
    p.add_argument("--warmup", type=int, default=50)
    o = p.parse_args()
    ids = np.load(o.batches).astype(np.int32)
    steps, rows, tokens = ids.shape
    curves = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        np.save(folder / "batches.npy", ids)
        np.save(folder / "inputs.npy", np.ascontiguousarray(ids[..., :-1]).reshape(steps * rows, tokens - 1))
        np.save(folder / "targets.npy", np.ascontiguousarray(ids[..., 1:]).reshape(steps * rows, tokens - 1))
        ours = [o.program, "--inputs", folder / "inputs.npy", "--targets", folder / "targets.npy", "--batch", str(rows), "--steps", str(steps)]
        theirs = [sys.executable, PEER, "--batches", folder / "batches.npy"]
        moments = {m: [*ours, "--moments", m] for m in ("bf16", "int8")}
        for name, command, precision in (("PyTorch f32", theirs, "f32"), ("PyTorch bf16", theirs, "bf16"), ("ours bf16", ours, "bf16"), ("moments bf16", moments["bf16"], "bf16"),
                                         ("moments int8", moments["int8"], "bf16"), ("ours fp8", ours, "fp8")):
            command = [*map(str, command), "--model", o.model, "--device", "cuda", "--precision", precision, "--lr", str(o.lr), "--schedule", f"{o.warmup},{steps},{o.lr / 10}", "--json"]
            curves[name] = np.array(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["losses"])
            print(f"{name:13s}" + "".join(f"  {i + 1}: {curves[name][i]:.4f}" for i in (0, 9, 49, 99, 199, steps - 1) if i < steps), flush=True)
    for a, b in (("ours bf16", "PyTorch f32"), ("ours bf16", "PyTorch bf16"), ("PyTorch bf16", "PyTorch f32"), ("moments bf16", "ours bf16"), ("moments int8", "ours bf16"), ("ours fp8", "ours bf16"), ("ours fp8", "PyTorch f32")):
        difference = curves[a] / curves[b] - 1
        print(f"{a} against {b}: mean of the steps {100 * difference.mean():+.3f}%, worst step {100 * np.abs(difference).max():.3f}%, last 50 {100 * difference[-50:].mean():+.3f}%")


if __name__ == "__main__":
    main()
