#!/usr/bin/env python3
"""Attune's GPU forward against PyTorch's fused attention, in one process, on the same random tensors.

gpu_forward.py LIBRARY [--json FILE]      needs torch and an NVIDIA GPU; LIBRARY is libattune.so

Times are CUDA-event medians of runs taken in turns, so that clocks and temperature treat both sides alike. FLOPs are
4 * B * H * Mq * Mkv * K, half of it if causal; B * M = 16384 and H * K = 2048. "FA2" is FLASH_ATTENTION, "xFormers" is
EFFICIENT_ATTENTION: xFormers' own CUTLASS kernel as PyTorch ships it.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import attune
from attune import _library
from attune.ops import LowerTriangularMask, memory_efficient_attention

TOKENS, WIDTH = 16384, 2048
TURNS, CALLS = 15, 8
CASES = [
    # dtype, head dim, length, the peer
    *((dtype, k, 4096, "FA2") for dtype in ("bfloat16", "float16") for k in (64, 128, 256)),
    *(("float32", k, 2048, "xFormers") for k in (64, 128, 256)),
]
PEERS = {"FA2": SDPBackend.FLASH_ATTENTION, "xFormers": SDPBackend.EFFICIENT_ATTENTION}


def milliseconds(call):
    """One turn: the mean of a few calls."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


def race(ours, theirs):
    """Medians of both in milliseconds, turn by turn."""
    for call in (ours, theirs):
        for _ in range(3):
            call()
    turns = [(milliseconds(ours), milliseconds(theirs)) for _ in range(TURNS)]
    return [statistics.median(side) for side in zip(*turns)]


def measure(dtype, head_dim, length, peer, causal):
    shape = (TOKENS // length, length, WIDTH // head_dim, head_dim)
    query, key, value = (torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)) for _ in range(3))
    transposed = [x.transpose(1, 2) for x in (query, key, value)]
    bias = LowerTriangularMask() if causal else None

    def ours():
        return memory_efficient_attention(query, key, value, bias)

    def theirs():
        with sdpa_kernel(PEERS[peer]):
            return F.scaled_dot_product_attention(*transposed, is_causal=causal)

    difference = (ours().float() - theirs().transpose(1, 2).float()).abs().max().item()
    flops = 4 * TOKENS * length * WIDTH * (0.5 if causal else 1)
    tflops = [flops / (ms * 1e9) for ms in race(ours, theirs)]
    return {
        "dtype": dtype, "head_dim": head_dim, "length": length, "causal": causal, "kernel": attune.last_kernel(),
        "peer": peer, "tflops": tflops[0], "peer_tflops": tflops[1], "ratio": tflops[0] / tflops[1],
        "max_difference": difference,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    _library.load(arguments.library)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TFLOP/s")
    print(f"{'case':32} {'kernel':18} {'ours':>6} {'peer':>6}  ratio  max difference")
    rows = []
    for case in CASES:
        for causal in (False, True):
            row = measure(*case, causal)
            rows.append(row)
            name = f"{row['dtype']} K={row['head_dim']} S={row['length']}{' causal' if causal else ''}"
            print(
                f"{name:32} {row['kernel']:18} {row['tflops']:6.0f} {row['peer_tflops']:6.0f}  {row['ratio']:5.2f}"
                f"  {row['max_difference']:.1e} ({row['peer']})"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
