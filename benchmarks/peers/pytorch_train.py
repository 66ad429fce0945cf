#!/usr/bin/env python3
"""The peer of examples/train_step: the same AdamW steps on the same ids with PyTorch's own operations; prints the same JSON.

A compact Llama whose parameters carry the Hugging Face names. bf16 is autocast with f32 master weights, as PyTorch users run it. Needs torch and
numpy only."""
import argparse
import contextlib
import json
import math
import pathlib
import shutil
import struct
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# ---- files ---------------------------------------------------------------------------------------------------------------------------------

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


def read_safetensors(path):
    """Every tensor of a file by name, as numpy arrays; bf16 becomes f32."""
    data = pathlib.Path(path).read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    out = {}
    for name, t in json.loads(data[8:8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = t["data_offsets"]
        array = np.frombuffer(data[8 + size + begin:8 + size + end], DTYPES[t["dtype"]]).reshape(t["shape"])
        out[name] = (array.astype("<u4") << 16).view("<f4") if t["dtype"] == "BF16" else array
    return out


def write_safetensors(path, tensors):
    """f32 tensors by name."""
    header, offset = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [offset, offset + 4 * t.size]}
        offset += 4 * t.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            file.write(np.ascontiguousarray(t, "<f4").tobytes())


# ---- the model -----------------------------------------------------------------------------------------------------------------------------


class RmsNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x, cos, sin):
    """Pairs (i, i + half), as in Hugging Face's layout. x [B, heads, T, head]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, self.heads, self.kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        self.head = d // self.heads
        kv = self.kv_heads * self.head
        self.q_proj, self.o_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k_proj, self.v_proj = nn.Linear(d, kv, bias=False), nn.Linear(d, kv, bias=False)

    def forward(self, x, cos, sin):
        rows, tokens, d = x.shape
        q, k, v = (p(x).view(rows, tokens, -1, self.head).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.o_proj(out.transpose(1, 2).reshape(rows, tokens, d))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, n = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(d, n, bias=False), nn.Linear(d, n, bias=False), nn.Linear(n, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, eps = c["hidden_size"], c.get("rms_norm_eps", 1e-5)
        self.input_layernorm, self.self_attn = RmsNorm(d, eps), Attention(c)
        self.post_attention_layernorm, self.mlp = RmsNorm(d, eps), FeedForward(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A model of a config.json's shape. forward(inputs [B, T], targets [B, T]) is the mean loss over the targets that count (-100 does not)."""

    def __init__(self, c):
        super().__init__()
        d = c["hidden_size"]
        self.config, self.model = c, nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], d)
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = RmsNorm(d, c.get("rms_norm_eps", 1e-5))
        self.tied = c.get("tie_word_embeddings", False)
        if not self.tied:
            self.lm_head = nn.Linear(d, c["vocab_size"], bias=False)
        half = d // c["num_attention_heads"] // 2
        angle = np.outer(np.arange(c["max_position_embeddings"]), float(c.get("rope_theta", 10000.0)) ** (-np.arange(half) / half))
        self.register_buffer("cos", torch.tensor(np.cos(angle), dtype=torch.float64), persistent=False)
        self.register_buffer("sin", torch.tensor(np.sin(angle), dtype=torch.float64), persistent=False)

    def logits(self, inputs):
        x = self.model.embed_tokens(inputs)
        # Under autocast the rotation runs in what the projections give, as in Hugging Face's model run in bf16: half the bytes.
        where = x.device.type
        kind = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else x.dtype
        cos, sin = self.cos[:inputs.shape[1]].to(kind), self.sin[:inputs.shape[1]].to(kind)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        x = self.model.norm(x)
        return F.linear(x, self.model.embed_tokens.weight) if self.tied else self.lm_head(x)

    def forward(self, inputs, targets):
        return F.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)

    def take(self, tensors):
        """The weights of arrays under their Hugging Face names."""
        with torch.no_grad():
            mine = dict(self.named_parameters())
            for name, p in mine.items():
                p.copy_(torch.from_numpy(np.array(tensors[name])))
        return self

    def arrays(self):
        return {name: p.detach().float().cpu().numpy() for name, p in self.named_parameters()}


def load(folder, double=False):
    folder = pathlib.Path(folder)
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    model = Llama(json.loads((folder / "config.json").read_text()))
    return model.take(read_safetensors(folder / "model.safetensors"))


# ---- training ------------------------------------------------------------------------------------------------------------------------------


def cosine(peak, warmup, steps, minimum):
    """The rate of step n, counted from 1: a line from 0 to the peak at step `warmup`, a cosine to the minimum at step `steps`."""

    def rate(n):
        if n < warmup:
            return peak * n / warmup
        return minimum if n >= steps else minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * (n - warmup) / (steps - warmup)))

    return rate


class Run:
    """AdamW on a model; step(inputs, targets) gives (loss, gradient norm before clipping)."""

    def __init__(self, model, rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, decay="matrices", clip=1.0, precision="f32", compiled=False):
        self.model, self.rate, self.clip, self.precision, self.steps = model, rate, clip, precision, 0
        gains = [p for p in model.parameters() if p.dim() == 1]
        matrices = [p for p in model.parameters() if p.dim() > 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": weight_decay if decay == "all" else 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate(1), betas=tuple(betas), eps=eps, fused=True)
        self.forward = torch.compile(model) if compiled else model

    def gradient(self, inputs, targets):
        self.optimizer.zero_grad()
        autocast = torch.autocast(inputs.device.type, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        with autocast:
            loss = self.forward(inputs, targets)
        loss.backward()
        return loss.item()

    def update(self):
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.steps)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip if self.clip > 0 else math.inf).item()
        self.optimizer.step()
        return norm

    def step(self, inputs, targets):
        loss = self.gradient(inputs, targets)
        return loss, self.update()


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a folder in Hugging Face layout")
    p.add_argument("--inputs", help="[B, T] ids, .npy")
    p.add_argument("--targets", help="[B, T] next ids; -100 does not count")
    p.add_argument("--batches", help="[steps, B, T + 1] ids, .npy, a batch for each step; instead of --inputs and --targets")
    p.add_argument("--steps", type=int, help="default: 1, or as many as there are batches")
    p.add_argument("--lr", type=float, default=4e-4)
    p.add_argument("--schedule", help="WARMUP,STEPS,MINIMUM: warm-up to --lr, then a cosine")
    p.add_argument("--betas", default="0.9,0.95")
    p.add_argument("--eps", type=float, default=1e-8)
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--decay", choices=("matrices", "all"), default="matrices")
    p.add_argument("--clip", type=float, default=1.0)
    p.add_argument("--precision", choices=("f32", "bf16", "f64"), default="bf16")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--compile", action="store_true", help="through torch.compile")
    p.add_argument("--gradients", help="safetensors file for the first step's gradients, not clipped")
    p.add_argument("--save", help="folder for the model after the last step")
    p.add_argument("--json", action="store_true", help="one JSON object")
    options = p.parse_args()
    if bool(options.batches) == bool(options.inputs and options.targets):
        p.error("needs --inputs and --targets, or --batches")
    return options


def main():
    o = parse()
    if o.threads:
        torch.set_num_threads(o.threads)
    if o.batches:
        ids = torch.from_numpy(np.load(o.batches).astype(np.int64))
        batches = [(b[:, :-1].contiguous(), b[:, 1:].contiguous()) for b in ids]
    else:
        batches = [tuple(torch.from_numpy(np.load(f).astype(np.int64)) for f in (o.inputs, o.targets))]
    batches = [tuple(t.to(o.device) for t in b) for b in batches]
    steps = o.steps or len(batches)
    rate = lambda n: o.lr
    if o.schedule:
        warmup, end, minimum = o.schedule.split(",")
        rate = cosine(o.lr, int(warmup), int(end), float(minimum))
    model = load(o.model, o.precision == "f64").to(o.device)
    run = Run(model, rate, [float(b) for b in o.betas.split(",")], o.eps, o.weight_decay, o.decay, o.clip, o.precision, o.compile)

    losses, norms, seconds = [], [], []
    for i in range(steps):
        start = time.perf_counter()
        losses.append(run.gradient(*batches[i % len(batches)]))
        if i == 0 and o.gradients:
            write_safetensors(o.gradients, {n: p.grad.float().cpu().numpy() for n, p in model.named_parameters()})
        norms.append(run.update())
        seconds.append(time.perf_counter() - start)
        if not o.json:
            print(f"step {i + 1}  loss {losses[-1]:.6f}  gradient norm {norms[-1]:.6f}", flush=True)
    if o.save:
        folder = pathlib.Path(o.save)
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", model.arrays())
        shutil.copy(pathlib.Path(o.model) / "config.json", folder / "config.json")
    timed = seconds[1:] or seconds
    rate = batches[0][0].numel() * len(timed) / sum(timed)
    if o.json:
        print(json.dumps({"losses": losses, "gradient_norms": norms, "tokens_per_second": rate, "step_seconds": seconds, "precision": o.precision,
                          "compiled": o.compile, "device": o.device, "gib": torch.cuda.max_memory_allocated() / 2**30 if o.device == "cuda" else None,
                          "threads": torch.get_num_threads(), "torch": torch.__version__}))
    else:
        print(f"{rate:.1f} tokens/s")


if __name__ == "__main__":
    main()
