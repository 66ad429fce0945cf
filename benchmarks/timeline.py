#!/usr/bin/env python3
"""What cards did in one training step: time by kernel, how much of the ranks' communication computing hides, and a picture.

    CUDA_INJECTION64_PATH=build/release/benchmarks/libcuda_timeline.so TINYLLAMA_TIMELINE=t mpirun -n 2 ranks_bench --device cuda --parallel fsdp ...
    benchmarks/timeline.py t.0.tsv t.1.tsv [--svg step.svg] [--step N] [--top 30]

A step ends where its last AdamW kernel does; --step counts from the end, 1 is the last. Kernels that run at once (streams) count in full each, so that their
sum may exceed the step. NCCL's kernels begin when the host's order comes and wait for the other ranks on the card: their time is waiting and moving.
Only Python's standard library is needed."""
import argparse
import collections
import re
import sys
from html import escape

COLOURS = [  # first that matches
    ("nccl", "NCCL", "#db2777"),
    ("cudnn|flash|sdpa|attention", "attention", "#7c3aed"),
    ("gemm|nvjet|cutlass|matmul|gated|product", "products", "#2563eb"),
    ("adamw", "AdamW", "#059669"),
    ("", "others", "#94a3b8"),
]


def kind(name):
    return next((label, colour) for pattern, label, colour in COLOURS if re.search(pattern, name, re.I))


def short(name):
    """A kernel's name without return type, namespaces, template arguments and parameters."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = re.sub(r"^void ", "", name)
    if name.startswith(("nvjet", "cudnn", "sm80", "sm90", "cutlass")) and len(name) > 60:
        return name[:60]
    out, depth = "", 0
    for c in name:
        depth += (c in "<(") - (c in ">)")
        if depth == 0 and c not in ">)":
            out += c
    names = [part for part in out.split("::") if part]
    return "::".join(names[-2:] if names[-1] == "kernel" else names[-1:]).strip() or name[:60]


def read(path):
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip("\n").split("\t", 4) for line in file]
    if not lines:
        sys.exit(f"{path}: no records")
    return sorted((int(s), int(e), int(stream), name) for s, e, stream, _, name in lines)


def steps(records):
    """Where steps end: at the last of AdamW's kernels before other work. Its pieces follow each other within a millisecond."""
    ends = []
    for start, end, _, name in records:
        if "adamw" not in name:
            continue
        if ends and start - ends[-1] < 1_000_000:
            ends[-1] = max(ends[-1], end)
        else:
            ends.append(end)
    return ends


def union(intervals):
    out = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([start, end])
    return out


def length(intervals):
    return sum(end - start for start, end in intervals)


def common(a, b):
    total = i = j = 0
    while i < len(a) and j < len(b):
        total += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", help="of each rank")
    p.add_argument("--step", type=int, default=1, help="from the end")
    p.add_argument("--top", type=int, default=30, help="kernels in the table")
    p.add_argument("--svg")
    o = p.parse_args()
    picture = []
    for rank, path in enumerate(o.files):
        records = read(path)
        ends = steps(records)
        if len(ends) <= o.step:
            sys.exit(f"{path}: {len(ends)} steps, expected more than {o.step}")
        begin, end = ends[-o.step - 1], ends[-o.step]
        step = [(max(s, begin), min(e, end), stream, name) for s, e, stream, name in records if e > begin and s < end]
        wires = union((s, e) for s, e, _, name in step if kind(name)[0] == "NCCL")
        work = union((s, e) for s, e, _, name in step if kind(name)[0] != "NCCL")
        ms = 1e-6
        total, both = end - begin, common(wires, work)
        print(f"rank {rank}: step of {total * ms:.2f} ms; computing {length(work) * ms:.2f}, NCCL {length(wires) * ms:.2f}, of it beside computing {both * ms:.2f}, alone "
              f"{(length(wires) - both) * ms:.2f}; neither {(total - length(work) - length(wires) + both) * ms:.2f}")
        sums = collections.defaultdict(lambda: [0, 0])
        for s, e, _, name in step:
            sums[short(name)][0] += e - s
            sums[short(name)][1] += 1
        if rank == 0:
            print("\n| kernel | ms | of the step | launches |\n|---|---|---|---|")
            for name, (time, n) in sorted(sums.items(), key=lambda x: -x[1][0])[:o.top]:
                print(f"| {name} | {time * ms:.2f} | {100 * time / total:.1f}% | {n} |")
            print()
        picture.append((rank, begin, end, step))
    if o.svg:
        draw(picture, o.svg)


def draw(picture, path):
    width, left, lane, gap = 1400, 90, 26, 34
    span = max(end - begin for _, begin, end, _ in picture)
    scale = (width - left - 20) / span
    height = 60 + len(picture) * (2 * lane + gap)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>']
    x = left
    for _, label, colour in COLOURS:
        out.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/><text x="{x + 17}" y="21">{label}</text>')
        x += 110
    for row, (rank, begin, end, step) in enumerate(picture):
        y = 40 + row * (2 * lane + gap)
        for at, label in ((y, f"rank {rank}"), (y + lane, "NCCL")):
            out.append(f'<text x="8" y="{at + 17}">{label}</text>')
        pixels = {}  # a rectangle a pixel and kind: where kernels are shorter than that, the one that fills most of it
        for s, e, _, name in step:
            label, colour = kind(name)
            below = label == "NCCL"
            first, last = int((s - begin) * scale), int((e - begin) * scale)
            for pixel in range(first, last + 1):
                covered = min(e - begin, (pixel + 1) / scale) - max(s - begin, pixel / scale)
                pixels.setdefault((below, pixel), collections.Counter())[colour] += covered
        runs = []
        for (below, pixel), colours in sorted(pixels.items()):
            colour, covered = colours.most_common(1)[0]
            if covered * scale < 0.3:
                continue
            if runs and runs[-1][0] == below and runs[-1][3] == colour and runs[-1][2] == pixel:
                runs[-1][2] = pixel + 1
            else:
                runs.append([below, pixel, pixel + 1, colour])
        for below, first, last, colour in runs:
            out.append(f'<rect x="{left + first}" y="{y + lane * below}" width="{last - first}" height="{lane - 4}" fill="{colour}"/>')
        out.append(f'<text x="{left}" y="{y + 2 * lane + 12}" fill="#475569">0</text><text x="{left + (end - begin) * scale - 60:.0f}" y="{y + 2 * lane + 12}" fill="#475569">'
                   f'{escape(f"{(end - begin) * 1e-6:.1f} ms")}</text>')
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join([*out, "</svg>", ""]))


if __name__ == "__main__":
    main()
