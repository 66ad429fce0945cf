#!/usr/bin/env python3
"""Speed and perplexity beside llama.cpp or its fork ik_llama.cpp, on the same GGUF files.

llama_cpp.py --peer-bin FOLDER --ours FOLDER FILE.gguf ...              prefill and decode, tokens/s
llama_cpp.py --peer-bin FOLDER --ours FOLDER --text TEXT FILE.gguf ...  perplexity of a text

The folders hold built programs: llama-bench and llama-perplexity; model_bench and perplexity. make_checkpoint writes files with random weights.
In each round each work is done by every contender, one process after another, in turning order: the machine may be shared and its bandwidth
changes within seconds, so the ratios of a round's neighbours count, and their median is printed. Decoding: the peer makes tokens from an empty
cache (tg128); ours makes them at the position that is the mean of those (batch/1 of model_bench, at 64)."""
import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile


def output(command, merged=False):
    done = subprocess.run([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT if merged else subprocess.PIPE, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nexit status {done.returncode}\n{done.stdout[-1500:]}{'' if merged else done.stderr[-1500:]}")
    return done.stdout


def our_speed(o, file, kind, n):
    """Tokens/s, and the bandwidth that the same process measured."""
    work = f"prefill/{n}" if kind == "pp" else "batch/1"
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        output([o.ours / "model_bench", f"--model={file}", f"--benchmark_filter=/{work}(/|$)", f"--benchmark_repetitions={o.repetitions}",
                          f"--benchmark_min_time={o.seconds}", f"--benchmark_out={report.name}", "--benchmark_out_format=json"])
        told = json.load(open(report.name))
        runs = [r for r in told["benchmarks"] if r["run_type"] == "iteration"]
    if not runs:
        sys.exit(f"{o.ours}/model_bench knows no {work}")
    return statistics.median(r["tokens/s"] for r in runs), float(told["context"]["limit: read GB/s"].split()[0])


def peer_speed(o, file, kind, n, options):
    command = [o.peer_bin / "llama-bench", "-m", file, "-p", n if kind == "pp" else 0, "-n", 0 if kind == "pp" else n, "-t", o.threads, "-fa", 1,
               "-r", o.repetitions, "-o", "json", *options]
    printed = output(command)
    return statistics.median(json.loads(printed[printed.index("["):])[0]["samples_ts"])


def speed(o, variants):
    print(f"{o.threads} threads, {o.rounds} rounds of {o.repetitions}; tokens/s, median (best); ours/peer: median of the rounds' ratios\n")
    print("| file | work | ours | " + " | ".join(f"{v} | ours/{v}" for v in variants) + " |\n|---" + "|---" * (2 + 2 * len(variants)) + "|", flush=True)
    for file in o.files:
        for kind, n in [("pp", n) for n in o.prefill] + [("tg", n) for n in o.decode]:
            rates, reads = {name: [] for name in ["ours", *variants]}, []
            for i in range(o.rounds):
                names = list(rates)
                for name in names[i % len(names):] + names[:i % len(names)]:
                    if name == "ours":
                        rate, read = our_speed(o, file, kind, n)
                        reads.append(read)
                    else:
                        rate = peer_speed(o, file, kind, n, variants[name])
                    rates[name].append(rate)
                    note = f"read {reads[-1]:.1f} GB/s  " if name == "ours" else ""
                    print(f"{file.name} {kind}{n} {name:14} {rate:8.2f} tokens/s  {note}load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
            cells = [f"{statistics.median(rates['ours']):.1f} ({max(rates['ours']):.1f})"]
            for v in variants:
                ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates[v]))
                cells += [f"{statistics.median(rates[v]):.1f} ({max(rates[v]):.1f})", f"{ratio:.2f}x"]
            print(f"| {file.name} | {kind}{n} | " + " | ".join(cells) + " |", flush=True)


def perplexity(o, variants):
    name, options = next(iter(variants.items()))
    print(f"context {o.context}, at most {o.chunks} chunks; cache f16\n")
    print(f"| file | chunks | {name} | " + " | ".join(f"ours, {d} | ours/{name}" for d in o.dtypes) + " |\n|---|---|---" + "|---" * (2 * len(o.dtypes)) + "|", flush=True)
    for file in o.files:
        printed = output([o.peer_bin / "llama-perplexity", "-m", file, "-f", o.text, "-c", o.context, "--chunks", o.chunks, "-t", o.threads, "-fa", "on", *options], merged=True)
        found = re.search(r"PPL over (\d+) chunks.*= ([\d.]+)", printed)
        if not found:
            sys.exit(f"{file}: llama-perplexity gives none\n{printed[-1500:]}")
        chunks, peer, cells = int(found[1]), float(found[2]), []
        for dtype in o.dtypes:
            ours = json.loads(output([o.ours / "perplexity", "--model", file, "--text", o.text, "--context", o.context, "--chunks", o.chunks, "--threads", o.threads,
                                      "--dtype", dtype, "--json"]))
            if ours["chunks"] != chunks:
                sys.exit(f"{file}: our tokenizer makes {ours['chunks']} chunks of the text, the peer's {chunks}")
            cells += [f"{ours['perplexity']:.4f}", f"{ours['perplexity'] / peer:.5f}"]
        print(f"| {file.name} | {chunks} | {peer:.4f} | " + " | ".join(cells) + " |", flush=True)


def main():
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE.gguf")
    p.add_argument("--peer-bin", required=True, type=pathlib.Path, help="where llama-bench and llama-perplexity are")
    p.add_argument("--ours", default=pathlib.Path(__file__).resolve().parents[2] / "build/release/bin", type=pathlib.Path, help="where model_bench and perplexity are")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--repetitions", type=int, default=2, help="in a process")
    p.add_argument("--seconds", type=float, default=0.3, help="of a repetition of ours, at least")
    p.add_argument("--prefill", type=numbers, default=[128, 512, 2048])
    p.add_argument("--decode", type=numbers, default=[128])
    p.add_argument("--peer-options", default="", help="more options for the peer's programs, such as '-thp 1'")
    p.add_argument("--text", help="a file of English: perplexity instead of speed")
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--chunks", type=int, default=20)
    p.add_argument("--dtypes", default="auto,f32", help="our arithmetic, with --text")
    o = p.parse_args()
    o.dtypes = o.dtypes.split(",")
    # Ours takes a thread for each core that it may use, so both are held to as many cores as threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:o.threads])
    variants = {"peer": o.peer_options.split()}
    if o.text:
        return perplexity(o, variants)
    if "-rtr" in subprocess.run([o.peer_bin / "llama-bench", "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout:
        variants["peer repacked"] = variants["peer"] + ["-rtr", "1"]  # ik_llama.cpp; llama.cpp repacks where it can
    speed(o, variants)


if __name__ == "__main__":
    main()
