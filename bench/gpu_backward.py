#!/usr/bin/env python3
"""Attune's GPU backward against PyTorch's fused attention, in one process, on the same random tensors.

gpu_backward.py LIBRARY [--dtype D ...] [--head-dim K ...] [--length S ...] [--family F] [--peers P ...]
                [--turns N] [--calls N] [--special [--flex]] [--json FILE]

Needs torch and an NVIDIA GPU; LIBRARY is libattune.so. Only the backward pass is timed: CUDA-event medians of runs taken
in turns. FLOPs are 2 * B * H * Mq * Mkv * (3 K + 2 Kv), half of it if causal; B * M = 16384 and H * K = 2048. "det" is our
deterministic mode over the default one; "ratio" ours over a peer's, FA2 first. --special adds what a bias tensor, its
gradient, dropout, fewer key heads, a window and packed sequences cost, as a ratio to our plain backward of the same FLOPs,
and peers that can do it; --flex adds FlexAttention, of which each case costs seconds to compile.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

from gpu_bench import (  # isort: skip, finds attune
    PEERS, SEQUENCES, TOKENS, WIDTH, add_peers, begin, flex, new_parser, race, write,
)

import attune
from attune.ops import LowerTriangularMask, fmha
from attune.ops.fmha import attn_bias


GROUPED = [(32, 8), (64, 8)]  # heads of queries and of keys


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


class Problem:
    """Random tensors, and calls that compute their gradients."""

    def __init__(
        self, head_dim, length, dtype=torch.bfloat16, heads=None, key_heads=None, batch=None, head_dim_v=None
    ):
        heads = heads or WIDTH // head_dim
        batch = TOKENS // length if batch is None else batch
        self.query = random(batch, length, heads, head_dim, dtype=dtype)
        self.key = random(batch, length, key_heads or heads, head_dim, dtype=dtype)
        self.value = random(batch, length, key_heads or heads, head_dim_v or head_dim, dtype=dtype)
        self.grad = random(batch, length, heads, head_dim_v or head_dim, dtype=dtype)
        self.inputs = (self.query, self.key, self.value)

    def ours(self, bias=None, p=0.0, **arguments):
        """A call of Attune's backward; what it gives is not looked at here."""
        op = arguments.pop("op", None)
        generator = attune.Generator(1) if p else None
        output, lse = fmha.memory_efficient_attention_forward_requires_grad(
            *self.inputs, bias, p, generator=generator
        )
        if p:
            arguments["generator"] = attune.Generator(1)
        return lambda: fmha.memory_efficient_attention_backward(
            self.grad, output, lse, *self.inputs, bias, p, op=op, **arguments
        )

    def peer(self, backend, **arguments):
        """The same of PyTorch's kernel; None where it does not run."""
        leaves = [x.transpose(1, 2).detach().requires_grad_() for x in self.inputs]
        try:
            with sdpa_kernel(backend):
                output = F.scaled_dot_product_attention(*leaves, **arguments)
            gradients = [x for x in leaves]
            if arguments.get("attn_mask") is not None and arguments["attn_mask"].requires_grad:
                gradients.append(arguments["attn_mask"])
            grad = self.grad.transpose(1, 2)

            def call():
                return torch.autograd.grad(output, gradients, grad, retain_graph=True)

            call()
        except RuntimeError:
            return None
        return call

    def flash(self, lengths=None, window=(None, None), causal=False):
        """FA2, whose operators in PyTorch have windows and packed sequences, too."""
        tensors, grad, sequences = self.inputs, self.grad, (None, None)
        longest = (self.query.shape[1], self.key.shape[1])
        if lengths is not None:
            tensors, grad = [x.flatten(0, 1) for x in tensors], grad.flatten(0, 1)
            sequences, longest = starts_of(lengths), (max(lengths), max(lengths))
        sides = {"window_size_left": window[0], "window_size_right": window[1]}
        made = torch.ops.aten._flash_attention_forward(
            *tensors, *sequences, *longest, 0.0, causal, False, **sides
        )
        output, lse, seed, offset, _ = made
        return lambda: torch.ops.aten._flash_attention_backward(
            grad, *tensors, output, lse, *sequences, *longest, 0.0, causal, seed, offset, **sides
        )

    def flex(self, mask_mod):
        """FlexAttention, compiled."""
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        output = flex(*leaves, mask_mod)()
        return lambda: torch.autograd.grad(output, leaves, self.grad, retain_graph=True)

    def flops(self, visible=1.0):
        batch, length, heads, head_dim = self.query.shape
        columns = 3 * head_dim + 2 * self.value.shape[-1]
        return 2 * batch * heads * length * self.key.shape[1] * columns * visible


def starts_of(lengths):
    """Where sequences start, and where the last ends; of queries and of keys."""
    starts = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)
    return starts, starts


def runs(make):
    """What make() makes, if that runs here; else None."""
    try:
        call = make()
        call()
    except (RuntimeError, TypeError, AttributeError) as error:
        print(f"  left out: {str(error).splitlines()[0][:140]}")
        return None
    return call


def tflops(problem, calls, visible=1.0):
    """TFLOP/s of each call, None for those that are None."""
    times = iter(race(*[call for call in calls if call is not None]))
    return [None if call is None else problem.flops(visible) / (next(times) * 1e9) for call in calls]


def measure(dtype, head_dim, length, causal, op, names):
    problem = Problem(head_dim, length, getattr(torch, dtype))
    bias = LowerTriangularMask() if causal else None
    ours = problem.ours(bias, op=op)
    ours()
    kernel = attune.last_kernel()
    peers = {name: problem.peer(backend, is_causal=causal) for name, backend in PEERS.items() if name in names}
    measured = tflops(
        problem, [ours, problem.ours(bias, deterministic=True, op=op), *peers.values()], 0.5 if causal else 1
    )
    return {
        "dtype": dtype, "head_dim": head_dim, "length": length, "causal": causal, "kernel": kernel,
        "tflops": measured[0], "deterministic": measured[1] / measured[0], "peers": dict(zip(peers, measured[2:])),
    }  # fmt: skip


def dense(arguments):
    op = getattr(fmha, arguments.family).BwOp if arguments.family else None
    print(f"{'case':34} {'kernel':30}  ours   det  ratio: {', '.join(arguments.peers)} (TFLOP/s)")
    for dtype in arguments.dtype:
        for head_dim in arguments.head_dim:
            for causal in (False, True):
                for length in arguments.length:
                    row = measure(dtype, head_dim, length, causal, op, arguments.peers)
                    peers = ", ".join(
                        "-" if speed is None else f"{row['tflops'] / speed:.2f} ({speed:.0f})"
                        for speed in row["peers"].values()
                    )
                    name = f"{dtype} K={head_dim} S={length}{' causal' if causal else ''}"
                    print(
                        f"{name:34} {row['kernel']:30} {row['tflops']:5.0f}  {row['deterministic']:4.2f}  {peers}",
                        flush=True,
                    )
                    yield row


def special_cases(head_dim, with_flex, length=4096):
    """(name, problem, visible part of the pairs, our call, {peer: call})"""
    problem = Problem(head_dim, length)
    heads = WIDTH // head_dim
    yield "plain", problem, 1, problem.ours(), {"FA2": problem.peer(PEERS["FA2"])}
    yield "dropout 0.1", problem, 1, problem.ours(p=0.1), {
        name: problem.peer(PEERS[name], dropout_p=0.1) for name in ("FA2", "cuDNN")
    }
    bias = random(1, heads, length, length)
    peers = {name: problem.peer(PEERS[name], attn_mask=bias.expand(problem.query.shape[0], -1, -1, -1))
             for name in ("cuDNN", "xFormers")}  # fmt: skip
    yield "bias", problem, 1, problem.ours(bias), peers
    full = random(problem.query.shape[0], heads, length, length).requires_grad_()
    yield "bias and its gradient", problem, 1, problem.ours(full.detach(), bias_gradient=True), {
        name: problem.peer(PEERS[name], attn_mask=full) for name in ("cuDNN", "xFormers")
    }
    yield "gradient of a broadcast bias", problem, 1, problem.ours(bias, bias_gradient=True), {}
    window = attn_bias.LocalAttentionFromBottomRightMask(window_left=512, window_right=511)
    peers = {"FA2": runs(lambda: problem.flash(window=(512, 511)))}
    if with_flex:
        peers["Flex"] = runs(lambda: problem.flex(lambda b, h, i, j: (j >= i - 512) & (j <= i + 511)))
    yield "window 1024", problem, 1024 / length, problem.ours(window), peers
    packed = Problem(head_dim, TOKENS, batch=1)
    blocks = attn_bias.BlockDiagonalMask.from_seqlens(SEQUENCES)
    visible = sum(n * n for n in SEQUENCES) / TOKENS**2
    document = torch.repeat_interleave(torch.arange(len(SEQUENCES)), torch.tensor(SEQUENCES)).cuda()
    for mask, causal in ((blocks, False), (blocks.make_causal(), True)):
        name = f"16 sequences{' causal' if causal else ''}"
        part = visible * (0.5 if causal else 1)
        peers = {"FA2": runs(lambda: packed.flash(SEQUENCES, causal=causal))}
        if with_flex:
            peers["Flex"] = runs(lambda: packed.flex(
                lambda b, h, i, j: (document[i] == document[j]) & ((i >= j) | (not causal))
            ))  # fmt: skip
        yield name, packed, part, packed.ours(mask), peers
        yield f"{name}, deterministic", packed, part, packed.ours(mask, deterministic=True), {}
    for heads, key_heads in GROUPED:
        grouped = Problem(head_dim, length, heads=heads, key_heads=key_heads)
        for bias in (None, LowerTriangularMask()):
            name = f"GQA {heads}/{key_heads}{' causal' if bias else ''}"
            part = 0.5 if bias else 1
            yield name, grouped, part, grouped.ours(bias), {
                peer: grouped.peer(PEERS[peer], is_causal=bias is not None, enable_gqa=True)
                for peer in ("FA2", "cuDNN")
            }
            yield f"{name}, deterministic", grouped, part, grouped.ours(bias, deterministic=True), {}
    unequal = Problem(head_dim, length, head_dim_v=head_dim * 2 // 3 // 8 * 8)
    yield f"values of {unequal.value.shape[-1]} columns", unequal, 1, unequal.ours(), {
        "cuDNN": unequal.peer(PEERS["cuDNN"])
    }


def special(arguments):
    print(f"\n{'case, bfloat16 S=4096':36} ours  speed  ratio to peers (TFLOP/s)")
    for head_dim in arguments.head_dim:
        plain = None
        for name, problem, visible, ours, peers in special_cases(head_dim, arguments.flex):
            measured = tflops(problem, [ours, *peers.values()], visible)
            plain = plain or measured[0]
            ratios = ", ".join(
                f"{peer} -" if speed is None else f"{peer} {measured[0] / speed:.2f} ({speed:.0f})"
                for peer, speed in zip(peers, measured[1:])
            )
            print(
                f"K={head_dim} {name:31} {measured[0]:4.0f}  {measured[0] / plain:5.2f}  {ratios}", flush=True
            )
            yield {"head_dim": head_dim, "case": name, "tflops": measured[0], "speed": measured[0] / plain,
                   "peers": dict(zip(peers, measured[1:]))}  # fmt: skip


def main():
    parser = new_parser(__doc__)
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--family", choices=["mma", "simt"], help="force a kernel family")
    parser.add_argument("--special", action="store_true")
    parser.add_argument("--flex", action="store_true", help="race FlexAttention, too")
    add_peers(parser, PEERS)
    arguments = begin(parser, "backward TFLOP/s")
    rows = list(dense(arguments))
    if arguments.special:
        rows += special(arguments)
    if arguments.json:
        write(arguments.json, "backward", rows)


if __name__ == "__main__":
    main()
