#!/usr/bin/env python3
"""Attune's GPU forward for one query of each batch entry, as in decoding, against PyTorch's fused attention.

gpu_decode.py LIBRARY [--head-dim K ...] [--keys N ...] [--dtype D] [--json FILE]      needs torch and an NVIDIA GPU

Time of one of many calls in a CUDA graph, in microseconds: CUDA-event medians of turns in random orders. TB/s counts
the keys and values, each once; "ratio" is the best peer's time over ours. Peers: cuDNN and FA2, which splits keys too, where
they run.
"""

import json

import torch
import torch.nn.functional as F

from gpu_bench import GRAPH_CALLS, Peer, begin, graphed, new_parser, race  # isort: skip, finds attune

import attune
from attune.ops import memory_efficient_attention

SHAPES = [(1, 8, 8), (1, 32, 8), (1, 32, 32), (4, 32, 8), (4, 32, 32), (16, 32, 8), (16, 32, 32)]  # B, H, heads of keys
MOST_BYTES = 20 << 30  # of keys and values


def sides(batch, heads, key_heads, keys, head_dim, dtype):
    """Ours and the peers that run, by name: calls without arguments."""
    query = torch.randn((batch, 1, heads, head_dim), device="cuda", dtype=dtype)
    key, value = (torch.randn((batch, keys, key_heads, head_dim), device="cuda", dtype=dtype) for _ in range(2))
    transposed = [x.transpose(1, 2) for x in (query, key, value)]

    def theirs():
        return F.scaled_dot_product_attention(*transposed, enable_gqa=heads != key_heads)

    return {
        "Attune": lambda: memory_efficient_attention(query, key, value),
        **{name: Peer(name, theirs) for name in ("cuDNN", "FA2")},
    }


def measure(batch, heads, key_heads, keys, head_dim, dtype):
    calls = sides(batch, heads, key_heads, keys, head_dim, dtype)
    calls["Attune"]()
    row = {"batch": batch, "heads": heads, "key_heads": key_heads, "keys": keys, "head_dim": head_dim}
    row["kernel"] = attune.last_kernel()
    ms = race(*(graphed(call) for call in calls.values()))
    row["us"] = {name: side / GRAPH_CALLS * 1e3 for name, side in zip(calls, ms)}
    ours, *peers = row["us"].values()
    row["ratio"] = min(peers) / ours
    row["tb_s"] = batch * key_heads * keys * head_dim * 4 / ours / 1e6
    return row


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--keys", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    arguments = begin(parser, "{dtype}; microseconds")
    dtype = getattr(torch, arguments.dtype)
    rows = []
    for head_dim in arguments.head_dim:
        for batch, heads, key_heads in SHAPES:
            for keys in arguments.keys:
                if batch * key_heads * keys * head_dim * 4 > MOST_BYTES:
                    continue
                row = measure(batch, heads, key_heads, keys, head_dim, dtype)
                rows.append(row)
                times = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
                name = f"K={head_dim} B={batch} H={heads}/{key_heads} N={keys}"
                print(f"{name:30} {row['kernel']:20} {row['ratio']:.2f}  {row['tb_s']:.2f} TB/s  {times}", flush=True)
    print(f"ratio: smallest {min(row['ratio'] for row in rows):.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
