#!/usr/bin/env python3
"""Predicts the throughput of TinyLlama-1.1B on many GPUs from one GPU's measured step, the bytes that each sharding moves, and the links' speeds.

    benchmarks/scaling.py                         the tables of SCALING.md
    benchmarks/scaling.py --rate 82000            with another measured step
    benchmarks/scaling.py --check                 and that the bytes are those of the formulas

The model is a timeline of two queues, as the code has them: the device computes part after part (embedding, 22 blocks, norm and head), the wires carry one
collective at a time, and each waits for the other where distributed/parallel.hpp makes it wait.
"""
import argparse
import dataclasses

LAYERS, HIDDEN, KV, FFN, VOCAB, CONTEXT = 22, 2048, 256, 5632, 32000, 2048
BLOCK = 2 * HIDDEN + HIDDEN * (2 * HIDDEN + 2 * KV + 3 * FFN)
PARTS = [VOCAB * HIDDEN] + [BLOCK] * LAYERS + [HIDDEN + VOCAB * HIDDEN]  # weights, in the order of a forward pass
assert sum(PARTS) == 1_100_048_384
# Multiplications of a token in each part: its matrices, and attention's scores and sums over half the context on average.
WORK = [0.0] + [BLOCK - 2 * HIDDEN + HIDDEN * CONTEXT] * LAYERS + [VOCAB * HIDDEN]


@dataclasses.dataclass
class Machine:
    name: str
    ranks: int
    wires: float    # bytes/s: NCCL's bus bandwidth, what a ring carries past each GPU
    latency: float  # s of a collective, whatever its size


@dataclasses.dataclass
class Case:
    rate: float = 75_800         # tokens/s of one GPU, optimizer included, at `rows` rows: ours, an H100
    rows: int = 16               # of 2048 tokens, a micro-batch
    micro: int = 1               # micro-batches a step
    weight_bytes: int = 2        # of a weight on the wires
    gradient_bytes: int = 4
    memory: float = 3.35e12 * 0.9  # bytes/s of the card's memory, for AdamW
    optimizer_bytes: int = 30    # of a weight: value, two moments read and written, gradient read, bf16 copy written
    taken: float = 0.17          # of the computing, by NCCL's kernels while they run beside it: measured on a product and swiglu's gradient
    lost: float = 0.03           # of a step of several GPUs, to what the timeline has not: measured on two, see SCALING.md


class Timeline:
    """Two queues, and how long each had work: while both have, the wires take their part of the device."""

    def __init__(self, machine, case):
        self.m, self.c, self.device, self.wires, self.on_wires, self.computed, self.sent = machine, case, 0.0, 0.0, 0.0, 0.0, 0.0

    def collective(self, part, size, rounds=1):
        """Asked for now; returns when it is done. A ring moves (n - 1) / n of the bytes past each GPU, twice for an all_reduce."""
        bytes_ = rounds * (self.m.ranks - 1) / self.m.ranks * PARTS[part] * size
        took = bytes_ / self.m.wires + self.m.latency if self.m.ranks > 1 else 0.0
        self.wires = max(self.wires, self.device) + took
        self.on_wires += took
        self.sent += bytes_
        return self.wires

    def compute(self, seconds, after=0.0):
        self.device = max(self.device, after) + seconds
        self.computed += seconds


def step(sharding, machine, case):
    """Seconds of a step of case.micro micro-batches in the steady state, and bytes that pass each GPU."""
    tokens = case.rows * CONTEXT
    optimizer = sum(PARTS) * case.optimizer_bytes / case.memory
    forward = (tokens / case.rate - optimizer) / 3  # backward is twice as much
    share = [w / sum(WORK) for w in WORK]
    t = Timeline(machine, case)
    parts = range(len(PARTS))
    there = {p: t.collective(p, case.weight_bytes) for p in parts} if sharding == "zero1" else {}  # sent round behind the step before
    t.device = 0.0
    for micro in range(case.micro):
        last = micro + 1 == case.micro
        if sharding == "fsdp":
            there = {0: t.collective(0, case.weight_bytes)}
        for p in parts:
            if sharding == "fsdp" and p + 1 < len(PARTS):
                # the buffer of part p - 1 is free once it has computed: device time now
                t.device = max(t.device, there[p])
                there[p + 1] = t.collective(p + 1, case.weight_bytes)
            t.compute(forward * share[p], there.get(p, 0.0))
        there = {} if sharding != "fsdp" else {len(PARTS) - 1: 0.0, len(PARTS) - 2: 0.0}  # these two are still there
        sums = []
        for p in reversed(parts):
            if sharding == "fsdp":
                if p > 1 and p - 1 not in there:
                    there[p - 1] = t.collective(p - 1, case.weight_bytes)
                if len(sums) > 1:
                    t.device = max(t.device, sums[-2])  # two buffers of gradients
            t.compute(2 * forward * share[p], there.get(p, 0.0))
            if sharding == "fsdp" or (last and sharding == "zero1"):
                sums.append(t.collective(p, case.gradient_bytes))
            elif last and sharding == "ddp":
                sums.append(t.collective(p, case.gradient_bytes, 2))
        if sums:
            t.device = max(t.device, sums[-1])
    t.compute(optimizer / (machine.ranks if sharding in ("zero1", "fsdp") else 1))
    return t.device + case.taken * min(t.on_wires, t.computed) + (case.lost * t.computed if machine.ranks > 1 else 0.0), t.sent


def memory(sharding, ranks, case):
    """GiB of weights (f32 and the bf16 copy that products read), gradients and moments on a card, and of fsdp's buffers."""
    n, own = sum(PARTS), sum(PARTS) / ranks
    if sharding == "ddp":
        b = 18 * n
    elif sharding == "zero1":
        b = 6 * n + 18 * own  # own f32 weights, their copy on its way, moments and summed gradients
    else:
        b = 18 * own + 2 * max(PARTS) * (case.weight_bytes + 4)  # and addends, small
    if case.gradient_bytes == 2:
        b += 2 * (max(PARTS) + (25 * 2**18 if sharding == "ddp" else 0))  # room for one message
    return b / 2**30


def table(machine, case, title):
    print(f"\n{title}\n")
    print("| sharding | GB past each GPU a step | step, ms | tokens/s | of so many single GPUs | days for 3T tokens | state, GiB a GPU |")
    print("|---|---|---|---|---|---|---|")
    tokens = machine.ranks * case.micro * case.rows * CONTEXT
    single, _ = step("none", Machine("one", 1, 1, 0), case)
    for sharding in ("ddp", "zero1", "fsdp"):
        seconds, sent = step(sharding, machine, case)
        rate = tokens / seconds
        print(f"| {sharding} | {sent / 1e9:.1f} | {1e3 * seconds:.0f} | {rate:,.0f} | {100 * single / seconds:.1f}% | {3e12 / rate / 86400:.1f} | "
              f"{memory(sharding, machine.ranks, case):.1f} |")


def check():
    n = sum(PARTS)
    eight, f32 = Machine("", 8, 360e9, 0.0), Case(weight_bytes=4, lost=0.0)
    for sharding, bytes_ in (("ddp", 2 * 4 * n), ("zero1", 4 * n + 4 * n), ("fsdp", 4 * (n + n - PARTS[0] - PARTS[-1] - PARTS[-2]) + 4 * n)):
        _, sent = step(sharding, eight, f32)
        assert abs(sent / (7 / 8 * bytes_) - 1) < 1e-9, (sharding, sent, bytes_)
    one, _ = step("fsdp", Machine("", 1, 1, 0), f32)
    assert abs(one - 16 * CONTEXT / f32.rate) < 1e-9
    slow, _ = step("ddp", Machine("", 8, 1e9, 0.0), f32)  # then the wires are all there is
    assert abs(slow / (7 / 8 * 8 * n / 1e9) - 1) < 0.1
    print("the bytes are those of the formulas")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rate", type=float, default=Case.rate, help="tokens/s of one GPU's step")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        return check()
    nvlink, eight_nics, one_nic = 210e9, 210e9, 45e9
    for name, size in (("f32", 4), ("bf16", 2)):
        table(Machine("2", 2, nvlink, 30e-6), Case(rate=options.rate, gradient_bytes=size), f"2 GPUs, one micro-batch of 16 rows, gradients in {name}: as measured")
    table(Machine("4", 4, nvlink, 30e-6), Case(rate=77_800), "4 GPUs (H200s, 77,800 tokens/s alone), one micro-batch of 16 rows: as measured")
    for name, size in (("gradients in f32", 4), ("gradients in bf16 (--wire bf16)", 2)):
        case = Case(rate=options.rate, gradient_bytes=size)
        print(f"\n### {name}")
        table(Machine("8", 8, nvlink, 30e-6), dataclasses.replace(case, micro=8), "8 GPUs, 8 micro-batches of 16 rows (the paper's batch of 2.1M tokens)")
        table(Machine("8", 8, nvlink, 30e-6), case, "8 GPUs, one micro-batch of 16 rows (0.26M tokens)")
        few = dataclasses.replace(case, rows=8)
        table(Machine("16x8", 128, eight_nics, 150e-6), few, "16 x 8 GPUs, 8 network cards of 400 Gb/s a machine, 8 rows (2.1M tokens)")
        table(Machine("16x8", 128, one_nic, 150e-6), few, "16 x 8 GPUs, one network card of 400 Gb/s a machine, 8 rows (2.1M tokens)")


if __name__ == "__main__":
    main()
