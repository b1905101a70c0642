#!/usr/bin/env python3
"""Attune's GPU attention on small problems, where a call costs about as much as its kernel, against PyTorch's fused attention.

gpu_small.py LIBRARY [--backward] [--head-dim K ...] [--dtype D] [--json FILE]      needs torch and an NVIDIA GPU

Two times of each problem, in microseconds: of a call as a program makes it, host included, and of one of many in a CUDA
graph, which is the GPU's alone. Both are CUDA-event medians of turns in random orders; "ratio" is the best peer's time
over ours. The first line is what a call of one tiny problem costs the host. Peers: cuDNN and FA2, where they run.
--backward times the backward pass alone, else it is the forward pass.
"""

import json
import time

import torch
import torch.nn.functional as F

from gpu_bench import (  # isort: skip, finds attune
    GRAPH_CALLS, PEERS, Peer, begin, capture_stream, graphed, new_parser, race, within,
)

import attune
from attune.ops import LowerTriangularMask, memory_efficient_attention

from gpu_backward import Problem

SHAPES = [(1, 8, 128), (1, 32, 128), (4, 16, 128), (4, 8, 256), (1, 4, 512), (1, 16, 512), (4, 16, 512)]  # B, H, M


def sides(shape, dtype, causal):
    """Ours and the peers that run, by name: calls without arguments."""
    query, key, value = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    transposed = [x.transpose(1, 2) for x in (query, key, value)]
    bias = LowerTriangularMask() if causal else None

    def theirs():
        return F.scaled_dot_product_attention(*transposed, is_causal=causal)

    return {
        "Attune": lambda: memory_efficient_attention(query, key, value, bias),
        **{name: Peer(name, theirs) for name in ("cuDNN", "FA2")},
    }


def backward_sides(shape, dtype, causal):
    """Likewise, of the backward pass."""
    batch, length, heads, head_dim = shape
    problem = Problem(head_dim, length, dtype, heads=heads, batch=batch)
    peers = {name: problem.peer(PEERS[name], is_causal=causal) for name in ("cuDNN", "FA2")}
    return {
        "Attune": problem.ours(LowerTriangularMask() if causal else None),
        **{name: Peer(name, call) for name, call in peers.items() if call is not None},
    }


def host_microseconds(call, calls=300):
    with within(call):
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        elapsed = time.perf_counter() - begin
        torch.cuda.synchronize()
    return elapsed / calls * 1e6


def measure(make, batch, heads, length, head_dim, dtype, causal):
    row = {"batch": batch, "heads": heads, "length": length, "head_dim": head_dim, "causal": causal}
    ways = (
        ("call", torch.cuda.current_stream(), lambda call: call, 1),
        ("graph", capture_stream(), graphed, GRAPH_CALLS),
    )
    for way, stream, each, count in ways:
        with torch.cuda.stream(stream):
            calls = make((batch, length, heads, head_dim), dtype, causal)
            calls["Attune"]()
        row["kernel"] = attune.last_kernel()
        torch.cuda.synchronize()
        ms = race(*(each(call) for call in calls.values()))
        row[way] = {name: side / count * 1e3 for name, side in zip(calls, ms)}
        ours, *peers = row[way].values()
        row[f"{way}_ratio"] = min(peers) / ours
    return row


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--backward", action="store_true", help="the backward pass in place of the forward pass")
    arguments = begin(parser, "{dtype}; microseconds")
    make = backward_sides if arguments.backward else sides
    dtype = getattr(torch, arguments.dtype)
    host = {name: host_microseconds(call) for name, call in make((1, 128, 4, 64), dtype, False).items()}
    print("host, one call: " + ", ".join(f"{name} {us:.1f}" for name, us in host.items()))
    rows = []
    for head_dim in arguments.head_dim:
        for causal in (False, True):
            for batch, heads, length in SHAPES:
                row = measure(make, batch, heads, length, head_dim, dtype, causal)
                rows.append(row)
                times = "  ".join(
                    f"{way} {row[f'{way}_ratio']:.2f}: " + ", ".join(f"{name} {us:.1f}" for name, us in row[way].items())
                    for way in ("call", "graph")
                )
                name = f"K={head_dim} B={batch} H={heads} S={length}{' causal' if causal else ''}"
                print(f"{name:32} {row['kernel']:20} {times}", flush=True)
    for way in ("call_ratio", "graph_ratio"):
        print(f"{way}: smallest {min(row[way] for row in rows):.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
