#!/usr/bin/env python3
"""Attune's GPU forward against PyTorch's fused attention, in one process, on the same random tensors.

gpu_forward.py LIBRARY [--dtype D ...] [--head-dim K ...] [--length S ...] [--family F] [--peers P ...] [--turns N]
               [--calls N] [--rising G] [--matmul] [--json FILE]

Needs torch and an NVIDIA GPU; LIBRARY is libattune.so. Times are CUDA-event medians of runs taken in turns, so that
clocks and temperature treat all sides alike. FLOPs are 4 * B * H * Mq * Mkv * K, half of it if causal; B * M = 16384 and
H * K = 2048 (3072 for K = 96 and 192). Peers: cuDNN, FA2 (FLASH_ATTENTION) and xFormers (EFFICIENT_ATTENTION: xFormers'
own CUTLASS kernel as PyTorch ships it), each where it runs. "ratio" is ours over the best of them. --rising
scales keys from G at a sequence's beginning to 0.05 at its end, so that the maximum keeps rising for kernels that walk from
the last key to the first: the worst data for a softmax that bets on it. --matmul lets a cuBLAS product take its turns
beside them, too, and prints ours over it.
"""

import math
import statistics

import torch
import torch.nn.functional as F

from gpu_bench import (  # isort: skip, finds attune
    TOKENS, WIDTH, Peer, add_peers, begin, matmul, matmul_tflops, new_parser, race, result_of, write,
)

import attune
from attune.ops import LowerTriangularMask, fmha, memory_efficient_attention

PEERS = {"bfloat16": ("cuDNN", "FA2"), "float16": ("cuDNN", "FA2"), "float32": ("xFormers",)}


def measure(dtype, head_dim, length, causal, op, names, rising, beside):
    width = 3072 if head_dim % 96 == 0 else WIDTH
    shape = (TOKENS // length, length, width // head_dim, head_dim)
    query, key, value = (torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for _ in range(3))
    if rising:
        key *= torch.linspace(rising, 0.05, length, device="cuda").to(key.dtype)[:, None, None]
    transposed = [x.transpose(1, 2) for x in (query, key, value)]
    bias = LowerTriangularMask() if causal else None

    def ours():
        return memory_efficient_attention(query, key, value, bias, op=op)

    def theirs():
        return F.scaled_dot_product_attention(*transposed, is_causal=causal)

    peers = {name: Peer(name, theirs) for name in PEERS[dtype] if name in names}
    output = ours()
    kernel = attune.last_kernel()
    difference = max(
        (output.float() - result_of(p).transpose(1, 2).float()).abs().max().item() for p in peers.values()
    )
    flops = 4 * TOKENS * length * width * (0.5 if causal else 1)
    ceiling = [matmul()] if beside else []
    times = race(ours, *peers.values(), *ceiling)
    tflops = [flops / (ms * 1e9) for ms in times[: 1 + len(peers)]]
    return {
        "dtype": dtype, "head_dim": head_dim, "length": length, "causal": causal, "kernel": kernel,
        "tflops": tflops[0], "peers": dict(zip(peers, tflops[1:])), "ratio": tflops[0] / max(tflops[1:]),
        "max_difference": difference, "of_matmul": tflops[0] / matmul_tflops(times[-1]) if beside else None,
    }  # fmt: skip


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 192, 256])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 2048, 4096, 8192, 16384])
    parser.add_argument("--family", choices=["sm90", "mma", "simt"], help="force a kernel family")
    parser.add_argument("--rising", type=float, metavar="G", help="keys that keep the maximum rising")
    parser.add_argument("--matmul", action="store_true", help="race a cuBLAS product beside them")
    add_peers(parser, ["cuDNN", "FA2", "xFormers"])
    arguments = begin(parser, "TFLOP/s")
    op = (getattr(fmha, arguments.family).FwOp, None) if arguments.family else None
    print(f"{'case':36} {'kernel':20} {'ours':>5}  ratio  peers; largest difference")
    rows = []
    for dtype in arguments.dtype:
        for head_dim in arguments.head_dim:
            for causal in (False, True):
                for length in arguments.length:
                    row = measure(
                        dtype, head_dim, length, causal, op, arguments.peers, arguments.rising, arguments.matmul
                    )
                    rows.append(row)
                    name = f"{dtype} K={head_dim} S={length}{' causal' if causal else ''}"
                    peers = ", ".join(f"{name} {tflops:.0f}" for name, tflops in row["peers"].items())
                    print(
                        f"{name:36} {row['kernel']:20} {row['tflops']:5.0f}  {row['ratio']:5.2f}  {peers};"
                        f" {row['max_difference']:.1e}"
                        + (f"; {row['of_matmul']:.3f} of cuBLAS" if arguments.matmul else ""),
                        flush=True,
                    )
    mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in rows))
    print(f"ratio to the best peer: geometric mean {mean:.2f}, smallest {min(row['ratio'] for row in rows):.2f}")
    if arguments.json:
        write(arguments.json, "forward", rows)


if __name__ == "__main__":
    main()
