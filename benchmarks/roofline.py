#!/usr/bin/env python3
"""Draws kernels under the roofs of the machine that ran them: arithmetic intensity against GFLOP/s, one SVG.

    kernels_bench --benchmark_out=kernels.json
    benchmarks/roofline.py kernels.json [more.json ...] [--peers peers.json] [--only REGEX] [--title TEXT] --out roofline.svg

The files are what Google Benchmark writes as JSON; roofs are the "limit: ..." entries of their contexts (of the first file that has any). A benchmark with the
counters GFLOP/s and GB/s is a point at their quotient; for kernels of kernels_bench that report one of the two, the other follows from the shapes below. Others
(moves without arithmetic) are left out. Bytes are weights and caches; activations count where a kernel reads nothing else: they stay in the CPU's caches,
so that its point may stand above the roof. peers.json: [{"name": "...", "flop_per_byte": 1.0, "gflops": 10.0}, ...].
"""
import argparse
import json
import math
import re
import sys
from html import escape

# kernels_bench: TinyLlama-1.1B's shapes.
HIDDEN, KV_WIDTH = 2048, 256
# Operations for each byte of kernels that report bytes alone, an exponential or a root counted as one.
PER_BYTE = {"rmsnorm": 4 / 8, "add_rmsnorm": 5 / 16, "rope": 3 / 8, "swiglu": 5 / 12, "softmax": 4 / 8}

# What computes: colour, name in the legend.
KINDS = {
    "f32": ("#2563eb", "matmul in f32"),
    "bf16": ("#ea580c", "matmul by bf16 dot products"),
    "int8": ("#059669", "matmul by int8 dot products"),
    "attention": ("#7c3aed", "attention"),
    "rows": ("#475569", "norms, rope, swiglu, softmax"),
    "model": ("#0891b2", "whole models"),
    "peer": ("#db2777", "peers"),
}
LIMITS = {"f32": "limit: f32 multiply-add GFLOP/s", "bf16": "limit: bf16 dot GFLOP/s", "int8": "limit: int8 dot GOP/s"}
READ = "limit: read GB/s"

WIDTH, HEIGHT = 1200, 760
LEFT, RIGHT, TOP, BOTTOM = 76, WIDTH - 28, 64, HEIGHT - 60
FONT, CHARACTER = 12, 6.6  # pixels; a character's mean width, generously


class Point:
    def __init__(self, kind, label, flop_per_byte, gflops):
        self.kind, self.label, self.flop_per_byte, self.gflops = kind, label, flop_per_byte, gflops


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    start = re.search(r"^[{\[]", text, re.M)  # programs may print a line before it
    try:
        return json.loads(text[start.start() if start else 0:])
    except ValueError as error:
        sys.exit(f"{path}: expected JSON, found {error}")


def limits_of(context):
    """{"read": GB/s, "f32": GFLOP/s, ...}: the best of each; what the build could not measure (0) is no roof."""
    found = {}
    for name, key in {"read": READ, **LIMITS}.items():
        number = re.match(r"[0-9.]+", str(context.get(key, "")))
        if number and float(number[0]) > 0:
            found[name] = float(number[0])
    return found


def rows_text(n):
    return "1 row" if n == 1 else f"{n} rows"


def point_of(run):
    """The benchmark as a point, or None."""
    name = re.sub(r"/(min_time|min_warmup_time|repeats|iterations|threads|real_time|process_time|manual_time)(:[^/]*)?(?=/|$)", "", run["name"])
    name = re.sub(r"_(mean|median|stddev|cv)$", "", name)
    gflops, gbytes = run.get("GFLOP/s", 0), run.get("GB/s", 0)
    arguments = [int(a) for a in re.findall(r"/(\d+)(?=/|$)", name)]

    if m := re.match(r"matmul<(.+?)(, computed in f32)?>\[(\d+),(\d+)\]", name):
        if not (gflops > 0 and gbytes > 0):
            return None
        form, in_f32, rows = m[1], m[2], arguments[0]
        kind = "int8" if form.startswith("q") and not in_f32 else "bf16" if form == "bf16" and rows > 1 and not in_f32 else "f32"
        return Point(kind, f"{form}{' in f32' if in_f32 else ''}, {rows_text(rows)}", gflops / gbytes, gflops)
    if m := re.match(r"attention_(prefill|decode)<(\w+)(, computed in f32)?>", name):
        length = arguments[0]
        if m[1] == "prefill" and gflops > 0:
            operations = 2.0 * HIDDEN * length * (length + 1)
            size = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}.get(m[2])
            moved = length * (2 * KV_WIDTH * size + 2 * HIDDEN * 4) if size else 0  # the cache, queries and results
            return Point("attention", f"prefill of {length}, {m[2]}{' in f32' if m[3] else ''}", operations / moved, gflops) if moved else None
        return Point("attention", f"decode at {length}, {m[2]}", gflops / gbytes, gflops) if gflops > 0 and gbytes > 0 else None
    if (m := re.match(r"(\w+)\[", name)) and m[1] in PER_BYTE and gbytes > 0:
        layout = " interleaved" if m[1] == "rope" and arguments[1:] == [1] else ""
        return Point("rows", f"{m[1]}{layout}, {rows_text(arguments[0])}", PER_BYTE[m[1]], gbytes * PER_BYTE[m[1]])
    if gflops > 0 and gbytes > 0:
        return Point("model", name, gflops / gbytes, gflops)
    return None


# Of everything that kernels_bench runs, what one picture can hold; names are Google Benchmark's.
DEFAULT = (r"^matmul<\w+>\[11264,2048\]/M/(1|512)(/|$)|^attention_(prefill|decode)<\w+>/\w+/2048(/|$)|"
           r"^(add_)?rmsnorm.*/512(/|$)|^rope.*/512/0(/|$)|^swiglu.*/512(/|$)|^softmax.*/64(/|$)|/(prefill|decode|batch)/\d+(/|$)")


def points_of(runs, only):
    """One point for each benchmark: the median where there are repetitions, else the last."""
    by_name = {}
    for run in runs:
        if run.get("run_type") == "aggregate" and run.get("aggregate_name") != "median":
            continue
        if run.get("error_occurred") or not re.search(only, run["name"]):
            continue
        point = point_of(run)
        if point:
            by_name[point.label] = point
    return list(by_name.values())


class LogAxis:
    def __init__(self, values, pixel_from, pixel_to):
        self.low, self.high = math.log10(min(values)), math.log10(max(values))
        self.pixel_from, self.pixel_to = pixel_from, pixel_to

    def at(self, value):
        return self.pixel_from + (math.log10(value) - self.low) / (self.high - self.low) * (self.pixel_to - self.pixel_from)

    def ticks(self):
        """(value, whether it gets a label): 1, 2 and 5 times the powers of ten."""
        for power in range(math.floor(self.low), math.ceil(self.high) + 1):
            for factor in range(1, 10):
                value = factor * 10.0**power
                if self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9:
                    yield value, factor in (1, 2, 5)


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def clip(ax, ay, bx, by, box):
    """Length of the line a-b inside the box (Liang and Barsky)."""
    first, last = 0.0, 1.0
    for start, delta, low, high in ((ax, bx - ax, box[0], box[2]), (ay, by - ay, box[1], box[3])):
        if delta == 0:
            if not low < start < high:
                return 0.0
            continue
        enter, leave = sorted(((low - start) / delta, (high - start) / delta))
        first, last = max(first, enter), min(last, leave)
    return max(0.0, last - first) * math.hypot(bx - ax, by - ay)


def lines_cross(a, b):
    def side(line, x, y):
        return (line[2] - line[0]) * (y - line[1]) - (line[3] - line[1]) * (x - line[0])
    return side(a, b[0], b[1]) * side(a, b[2], b[3]) < 0 and side(b, a[0], a[1]) * side(b, a[2], a[3]) < 0


def place_labels(marks, taken, lines):
    """A box for the label of each mark (x, y, text): near it, off marks, lines, other labels and `taken`. Each takes the best place that the others
    leave, a few times over. Returns the boxes, and the leaders of those that stand away from their marks."""
    dots = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in marks]
    boxes, leaders = {}, {}

    def candidates(x, y, text):
        width, height = CHARACTER * len(text) + 4, FONT + 4
        for distance in (10, 18, 28, 40, 54, 70, 88, 108, 130, 155, 180):
            for angle in range(0, 360, 15):
                c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
                cx, cy = x + distance * c, y + distance * s  # on the side of the box that faces the mark
                left = cx if c > 0.3 else cx - width if c < -0.3 else cx - width / 2
                top = cy - height / 2 if abs(c) > 0.3 else cy - height if s < 0 else cy
                box = (left, top, left + width, top + height)
                if LEFT + 2 <= box[0] and box[2] <= RIGHT - 2 and TOP + 2 <= box[1] and box[3] <= BOTTOM - 2:
                    yield distance + 0.05 * min(angle, 360 - angle), box, (x, y, cx, cy) if distance > 18 else None

    def cost_of(i, box, leader):
        cost = sum(40 + 8 * overlap(box, other) for other in [*boxes.values(), *dots, *taken] if overlap(box, other) > 0)
        cost += sum(45 for line in lines if clip(*line, box) > 0)
        cost += sum(120 for other in leaders.values() if clip(*other, box) > 0)
        if leader:
            cost += sum(120 for other in boxes.values() if clip(*leader, other) > 0)
            cost += sum(60 for j, dot in enumerate(dots) if j != i and clip(*leader, dot) > 4)
            cost += sum(80 for other in leaders.values() if lines_cross(leader, other))
        return cost

    for sweep in range(5):
        for i in sorted(range(len(marks)), key=lambda i: (marks[i][1], marks[i][0])):
            boxes.pop(i, None), leaders.pop(i, None)
            best = math.inf
            for base, box, leader in sorted(candidates(*marks[i]), key=lambda c: c[0]):
                if base >= best:
                    break
                cost = base + cost_of(i, box, leader)
                if cost < best:
                    best, boxes_i, leader_i = cost, box, leader
            boxes[i] = boxes_i
            if leader_i:
                leaders[i] = leader_i
    return boxes, list(leaders.values())


def draw(points, limits, title, subtitle):
    peaks = {name: limits[name] for name in LIMITS if name in limits}
    read, top = limits["read"], max(peaks.values())
    xs = [p.flop_per_byte for p in points] + [top / read]
    ys = [p.gflops for p in points] + [top]
    x = LogAxis([min(xs) / 3, max(xs) * 4], LEFT, RIGHT)
    y = LogAxis([min(ys) / 2.5, max(ys) * 1.8], BOTTOM, TOP)
    x_low, x_high, y_low = 10**x.low, 10**x.high, 10**y.low
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
           f'font-family="system-ui, \'Segoe UI\', \'DejaVu Sans\', sans-serif" font-size="{FONT}" fill="#4b5563">',
           '<rect width="100%" height="100%" fill="#ffffff"/>']

    def text(at_x, at_y, what, attributes=""):
        out.append(f'<text x="{at_x:.1f}" y="{at_y:.1f}" {attributes}>{escape(what)}</text>')

    def line(x1, y1, x2, y2, attributes):
        out.append(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" {attributes}/>')

    def mark(kind, at_x, at_y, tip=""):
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        colour = KINDS[kind][0]
        if kind == "peer":
            out.append(f'<path d="M{at_x:.1f} {at_y - 6:.1f}l6 6l-6 6l-6 -6z" fill="#ffffff" stroke="{colour}" stroke-width="2">{inside}</path>')
        else:
            out.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4.5" fill="{colour}" stroke="#ffffff" stroke-width="1.2">{inside}</circle>')

    text(LEFT, 30, title, 'font-size="17" font-weight="600" fill="#111827"')
    text(LEFT, 50, subtitle)
    for value, labelled in y.ticks():
        line(LEFT, y.at(value), RIGHT, y.at(value), f'stroke="{"#e5e7eb" if labelled else "#f3f4f6"}"')
        if labelled:
            text(LEFT - 10, y.at(value) + 4.5, number(value), 'text-anchor="end"')
    for value, labelled in x.ticks():
        line(x.at(value), BOTTOM, x.at(value), BOTTOM + (5 if labelled else 3), 'stroke="#9ca3af"')
        if labelled:
            text(x.at(value), BOTTOM + 20, number(value), 'text-anchor="middle"')
    line(LEFT, BOTTOM, RIGHT, BOTTOM, 'stroke="#9ca3af"')
    text((LEFT + RIGHT) / 2, HEIGHT - 14, "floating-point (or integer) operations for each byte from memory", 'text-anchor="middle"')
    middle = (TOP + BOTTOM) / 2
    text(20, middle, "GFLOP/s", f'text-anchor="middle" transform="rotate(-90 20 {middle:.1f})"')

    # Roofs: the slope up to the highest peak, and each peak from the slope on.
    from_x = max(x_low, y_low / read)
    slope = (x.at(from_x), y.at(from_x * read), x.at(top / read), y.at(top))
    line(*slope, 'stroke="#111827" stroke-width="2"')
    lines, taken = [slope], []
    for name, peak in peaks.items():
        roof = (x.at(peak / read), y.at(peak), x.at(x_high), y.at(peak))
        line(*roof, f'stroke="{KINDS[name][0]}" stroke-width="2"')
        lines.append(roof)
        what = f"{name} {peak:.0f} {'GOP/s' if name == 'int8' else 'GFLOP/s'}"
        at = roof[0] + 10
        text(at, roof[1] - 6, what, f'font-weight="600" fill="{KINDS[name][0]}"')
        taken.append((at, roof[1] - 20, at + 7.4 * len(what), roof[1] - 2))
    # The slope's name stands above it, turned, as far down as no mark is in its way. Its box: small upright ones.
    marks = [(x.at(p.flop_per_byte), y.at(p.gflops), p.label) for p in points]
    what, angle = f"read {read:.1f} GB/s", math.atan2(slope[3] - slope[1], slope[2] - slope[0])
    for share in (0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        at_x, at_y = slope[0] + share * (slope[2] - slope[0]), slope[1] + share * (slope[3] - slope[1])
        turned = []
        for k in range(-4, 5):
            along = k / 4 * 3.7 * len(what)
            cx, cy = at_x + along * math.cos(angle) + 12 * math.sin(angle), at_y + along * math.sin(angle) - 12 * math.cos(angle)
            turned.append((cx - 12, cy - 9, cx + 12, cy + 9))
        if not any(overlap((u - 6, v - 6, u + 6, v + 6), box) for u, v, _ in marks for box in turned):
            break
    taken += turned
    text(at_x, at_y - 8, what, 'text-anchor="middle" font-weight="600" fill="#111827" '
         f'transform="rotate({math.degrees(angle):.1f} {at_x:.1f} {at_y:.1f})"')

    # The legend, lower right, where the roofs leave room; a label finds its own place around it.
    kinds = [k for k in KINDS if any(p.kind == k for p in points)]
    legend_width = 52 + CHARACTER * max(len(KINDS[k][1]) for k in kinds)
    legend = (RIGHT - legend_width - 8, BOTTOM - 22 * len(kinds) - 18, RIGHT - 8, BOTTOM - 10)
    taken.append(legend)

    boxes, leaders = place_labels(marks, taken, lines)
    for leader in leaders:
        line(*leader, 'stroke="#9ca3af" stroke-width="0.8"')
    for p, (at_x, at_y, _) in zip(points, marks):
        mark(p.kind, at_x, at_y, f"{p.label}: {number(p.flop_per_byte)} FLOP/byte, {number(p.gflops)} GFLOP/s")
    for i, p in enumerate(points):
        box = boxes[i]
        text((box[0] + box[2]) / 2, box[3] - 4, p.label,
             f'text-anchor="middle" fill="{KINDS[p.kind][0]}" stroke="#ffffff" stroke-width="3" stroke-linejoin="round" paint-order="stroke"')

    size = f'width="{legend[2] - legend[0]:.1f}" height="{legend[3] - legend[1]:.1f}"'
    out.append(f'<rect x="{legend[0]:.1f}" y="{legend[1]:.1f}" {size} fill="#ffffff" stroke="#e5e7eb"/>')
    for i, kind in enumerate(kinds):
        row = legend[1] + 18 + 22 * i
        mark(kind, legend[0] + 16, row)
        text(legend[0] + 32, row + 4.5, KINDS[kind][1], 'fill="#111827"')
    return "\n".join([*out, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description="Kernels under the roofs of the machine, as an SVG.")
    parser.add_argument("results", nargs="+", help="JSON of Google Benchmark")
    parser.add_argument("--peers", help='JSON: [{"name", "flop_per_byte", "gflops"}, ...]')
    parser.add_argument("--only", default=DEFAULT, help="regular expression for the benchmarks' names")
    parser.add_argument("--title", default="Kernels at TinyLlama-1.1B's shapes")
    parser.add_argument("--out", required=True)
    o = parser.parse_args()

    limits, runs, subtitle = {}, [], ""
    for path in o.results:
        result = read_json(path)
        if not isinstance(result, dict) or "benchmarks" not in result:
            sys.exit(f"{path}: expected the JSON of Google Benchmark, found none of its keys")
        context = result.get("context", {})
        runs += result["benchmarks"]
        if not limits and limits_of(context):
            limits = limits_of(context)
            subtitle = ", ".join(filter(None, [context.get("instruction set", ""), f"{context['threads']} threads" if "threads" in context else "",
                                               str(context.get("date", ""))[:10], "roofs measured in the same run"]))
    if "read" not in limits or len(limits) < 2:
        sys.exit(f'{o.results[0]}: expected a context with "{READ}" and a rate (kernels_bench writes them), found {limits or "none"}')
    points = points_of(runs, o.only)
    for peer in read_json(o.peers) if o.peers else []:
        try:
            points.append(Point("peer", str(peer["name"]), float(peer["flop_per_byte"]), float(peer["gflops"])))
        except (KeyError, TypeError, ValueError):
            sys.exit(f"{o.peers}: expected name, flop_per_byte and gflops, found {peer}")
    points = [p for p in points if p.flop_per_byte > 0 and p.gflops > 0]
    if not points:
        sys.exit(f"{o.results[0]}: expected benchmarks with GFLOP/s and GB/s, found none")
    with open(o.out, "w", encoding="utf-8") as file:
        file.write(draw(points, limits, o.title, subtitle))
    print(f"{o.out}: {len(points)} points")


if __name__ == "__main__":
    main()
