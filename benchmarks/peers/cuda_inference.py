#!/usr/bin/env python3
"""On one card, in one run: our logits beside Hugging Face transformers' on the same checkpoint, and the speed of a compiled PyTorch model of the same shape.

make_checkpoint --preset tinyllama_1b --format bf16 --out DIR
cuda_inference.py --model DIR --logits build/release/bin/logits [--speed]
"""
import argparse
import pathlib
import subprocess
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F


def compare(model_path, program, positions=512):
    """Top-1 agreement and relative errors of transformers' bf16 and ours against transformers in f32, all on this card."""
    from transformers import LlamaForCausalLM

    ids = [1] + [(i * 7919 + 13) % 31990 + 5 for i in range(positions - 1)]
    logits = {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        model = LlamaForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="sdpa").cuda().eval()
        with torch.no_grad():
            logits[name] = model(torch.tensor([ids]).cuda()).logits[0].float().cpu().numpy()
        del model
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("ours", ["--dtype", "auto", "--cache", "bf16"]), ("ours, token by token", ["--dtype", "auto", "--cache", "bf16", "--step"]),
                              ("ours, q8_0 cache", ["--dtype", "auto", "--cache", "q8_0"]), ("ours, f8_e4m3 cache", ["--dtype", "auto", "--cache", "f8_e4m3"])):
            out = pathlib.Path(folder) / "logits.npy"
            subprocess.run([program, "--model", model_path, "--device", "cuda", "--ids", ",".join(map(str, ids)), "--out", str(out), *options], check=True)
            logits[name] = np.load(out)
    reference = logits.pop("f32")
    best = reference.argmax(-1)
    margin = np.sort(reference, -1)[:, -1] - np.sort(reference, -1)[:, -2]
    print(f"{positions} positions; the best token leads by {np.median(margin):.3f} in the median, logits have a deviation of {reference.std():.3f}")
    for name, l in logits.items():
        error = np.linalg.norm(l - reference) / np.linalg.norm(reference)
        print(f"  {name:22s} relative error {error:.2e}, the same best token at {100 * (l.argmax(-1) == best).mean():.2f}%,"
              f" as transformers' bf16 at {100 * (l.argmax(-1) == logits['bf16'].argmax(-1)).mean():.2f}%", flush=True)


class Model(torch.nn.Module):
    """TinyLlama-1.1B's step with a static cache: what torch.compile makes the most of."""
    L, D, H, KV, HD, FFN, V = 22, 2048, 32, 4, 64, 5632, 32000

    def __init__(self, batch, positions):
        super().__init__()
        w = lambda *s: torch.nn.Parameter(torch.randn(*s, device="cuda", dtype=torch.bfloat16) * 0.02, requires_grad=False)
        self.embedding, self.head = w(self.V, self.D), w(self.V, self.D)
        self.qkv = torch.nn.ParameterList(w((self.H + 2 * self.KV) * self.HD, self.D) for _ in range(self.L))
        self.o = torch.nn.ParameterList(w(self.D, self.D) for _ in range(self.L))
        self.gate_up = torch.nn.ParameterList(w(2 * self.FFN, self.D) for _ in range(self.L))
        self.down = torch.nn.ParameterList(w(self.D, self.FFN) for _ in range(self.L))
        angles = torch.arange(positions, device="cuda")[:, None] * 10000.0 ** (-torch.arange(0, self.HD, 2, device="cuda") / self.HD)
        self.register_buffer("cos", angles.cos()), self.register_buffer("sin", angles.sin())
        self.register_buffer("cache", torch.randn(self.L, 2, batch, self.KV, positions, self.HD, device="cuda", dtype=torch.bfloat16))

    def rope(self, x, at):
        c, s = self.cos[at], self.sin[at]
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    def forward(self, ids, at, causal: bool):
        B, T = ids.shape
        x = self.embedding[ids]
        norm = lambda x: F.rms_norm(x.float(), (self.D,), eps=1e-5).to(torch.bfloat16)
        for l in range(self.L):
            q, k, v = (norm(x) @ self.qkv[l].T).split([self.H * self.HD, self.KV * self.HD, self.KV * self.HD], -1)
            q, k, v = (t.view(B, T, -1, self.HD).transpose(1, 2) for t in (q, k, v))
            q, k = self.rope(q, at), self.rope(k, at)
            if causal:
                a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            else:
                self.cache[l, 0][:, :, at], self.cache[l, 1][:, :, at] = k, v
                mask = torch.arange(self.cache.shape[4], device="cuda")[None, :] <= at[:, None]
                a = F.scaled_dot_product_attention(q, self.cache[l, 0], self.cache[l, 1], attn_mask=mask, enable_gqa=True)
            x = x + a.transpose(1, 2).reshape(B, T, -1) @ self.o[l].T
            gate, up = (norm(x) @ self.gate_up[l].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ self.down[l].T
        return (norm(x[:, -1:]) @ self.head.T).argmax(-1)


def rate(f, tokens):
    """Tokens a second of f(), which gives `tokens`: the median of 5 runs, after 3."""
    times = []
    for i in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return tokens / sorted(times)[2]


def speed():
    torch.set_float32_matmul_precision("high")
    with torch.no_grad():
        for batch, position in ((1, 16), (16, 512), (100, 512)):
            model = Model(batch, position + 64)
            step = torch.compile(model, mode="reduce-overhead", fullgraph=True)

            def chain(n=32):
                ids, at = torch.ones(batch, 1, device="cuda", dtype=torch.long), torch.tensor([position], device="cuda")
                for _ in range(n):
                    torch.compiler.cudagraph_mark_step_begin()
                    ids = step(ids, at, False).clone()
                    at += 1

            print(f"  PyTorch {torch.__version__} compiled, decode, {batch} sequences behind {position}: {rate(chain, 32 * batch):.0f} tokens/s", flush=True)
            del model, step
            torch._dynamo.reset()
            torch.cuda.empty_cache()
        model = Model(1, 2048)
        step = torch.compile(model, fullgraph=True)
        ids, at = torch.randint(0, 32000, (1, 2048), device="cuda"), torch.arange(2048, device="cuda")
        print(f"  PyTorch compiled, prefill of 2048: {rate(lambda: step(ids, at, True), 2048):.0f} tokens/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with model.safetensors and config.json")
    parser.add_argument("--logits", help="our program of that name")
    parser.add_argument("--speed", action="store_true", help="time PyTorch")
    o = parser.parse_args()
    print(torch.cuda.get_device_name())
    if o.model and o.logits:
        compare(o.model, o.logits)
    if o.speed:
        speed()


if __name__ == "__main__":
    main()
