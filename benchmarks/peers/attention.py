"""Attention of PyTorch's backends on the shapes of cuda_attention_bench: prefill causal (TFLOP/s, causal FLOPs) and decoding (GB/s of K and V)."""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def seconds(f, calls):
    """Median seconds of a call, from a CUDA graph of `calls` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            f(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            f(i)
    graph.replay()
    times = []
    for _ in range(11):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / calls)
    return sorted(times)[len(times) // 2]


def main():
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    print(torch.cuda.get_device_name(), torch.__version__, "cudnn", torch.backends.cudnn.version())
    for batch, tokens, kv, group, dim in [(1, 512, 4, 8, 64), (1, 2048, 4, 8, 64), (8, 2048, 4, 8, 64), (1, 8192, 4, 8, 64),
                                          (1, 512, 8, 4, 128), (1, 2048, 8, 4, 128), (8, 2048, 8, 4, 128), (1, 8192, 8, 4, 128)]:
        q = torch.randn(batch, tokens, kv * group, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        k, v = (torch.randn(batch, tokens, kv, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
        flops = 2.0 * batch * tokens * tokens * kv * group * dim
        line = f"  B {batch} T {tokens:5} heads {kv * group} kv {kv} head_dim {dim:3}:"
        for name, backend in backends.items():
            try:
                with sdpa_kernel(backend):
                    t = seconds(lambda i: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), max(2, int(2e12 / flops)))
                line += f"  {name} {flops / t * 1e-12:.0f}"
            except Exception as e:  # a backend may not take a shape
                line += f"  {name} none ({str(e)[:60]})"
        print(line, flush=True)
    for length in (512, 2048):
        for batch in (1, 16, 100, 256):
            copies = max(2, min(400, (400 << 20) // (batch * length * 4 * 64 * 4)))
            q = torch.randn(batch, 32, 1, 64, device="cuda", dtype=torch.bfloat16)
            kv = [[torch.randn(batch, 4, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(copies)]
            line = f"  decode bf16 head_dim 64, {batch:3} sequences of {length:4}:"
            for name, backend in backends.items():
                try:
                    with sdpa_kernel(backend):
                        t = seconds(lambda i: F.scaled_dot_product_attention(q, kv[i][0], kv[i][1], enable_gqa=True), copies)
                    line += f"  {name} {t * 1e6:.2f} us {batch * length * 4 * 64 * 4 / t * 1e-9:.0f} GB/s"
                except Exception as e:
                    line += f"  {name} none ({str(e)[:60]})"
            print(line, flush=True)
            del kv


if __name__ == "__main__":
    main()
