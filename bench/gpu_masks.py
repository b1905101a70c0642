#!/usr/bin/env python3
"""What a mask, a page table, a bias tensor or dropout costs on a GPU, against the plain kernel and against peers.

gpu_masks.py LIBRARY [--head-dim K ...] [--flex] [--json FILE]     needs torch and an NVIDIA GPU

One process, random data, the same tensors for both sides, CUDA-event medians of turns in random orders. FLOPs count
visible pairs alone: 4 * H * K * pairs. "speed" is the FLOP rate relative to Attune's own plain kernel of the same head
dim in this run; "ratio" is the peer's time over ours. Peers: cuDNN and FA2 are PyTorch's fused attention, Flex is
torch.compile of FlexAttention with a block mask (--flex: each costs seconds to compile). 16384 tokens, H * K = 2048, bf16.
"""

import json

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_bench import SEQUENCES, TOKENS, WIDTH, begin, flex, new_parser, race  # isort: skip, finds attune

import attune
from attune.ops import memory_efficient_attention
from attune.ops.fmha import attn_bias

WINDOW, LENGTH = 1024, 4096


def tensors(batch, length, head_dim):
    shape = (batch, length, WIDTH // head_dim, head_dim)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def sdpa(backend, query, key, value, **arguments):
    transposed = [x.transpose(1, 2) for x in (query, key, value)]

    def call():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*transposed, **arguments).transpose(1, 2)

    return call


def paged(tensor, page_size, order):
    """The rows of a [1, rows, H, K] tensor, scattered over pages in this order."""
    pages = tensor.reshape(-1, page_size, *tensor.shape[2:])
    scattered = torch.empty_like(pages)
    scattered[order] = pages
    return scattered.reshape(tensor.shape)


def cases(head_dim, with_flex):
    """(name, visible pairs, our call, {peer: call})"""
    heads, batch = WIDTH // head_dim, TOKENS // LENGTH
    square = batch * LENGTH * LENGTH
    query, key, value = tensors(batch, LENGTH, head_dim)

    def ours(bias=None, q=query, k=key, v=value, **arguments):
        return lambda: memory_efficient_attention(q, k, v, bias, **arguments)

    yield "plain", square, ours(), {"FA2": sdpa(SDPBackend.FLASH_ATTENTION, query, key, value)}
    causal = batch * LENGTH * (LENGTH + 1) // 2
    yield (
        "causal",
        causal,
        ours(attn_bias.LowerTriangularMask()),
        {"FA2": sdpa(SDPBackend.FLASH_ATTENTION, query, key, value, is_causal=True)},
    )

    bias = torch.randn(batch, heads, LENGTH, LENGTH, device="cuda", dtype=torch.bfloat16)
    yield (
        "bias [B, H, M, M]",
        square,
        ours(bias),
        {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, query, key, value, attn_mask=bias)},
    )
    shared = torch.randn(1, heads, LENGTH, LENGTH, device="cuda", dtype=torch.bfloat16)
    peers = {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, query, key, value, attn_mask=shared)}
    if with_flex:
        peers["Flex"] = flex(query, key, value, score_mod=lambda s, b, h, i, j: s + shared[0, h, i, j])
    yield "bias [1, H, M, M]", square, ours(shared), peers
    visible = torch.rand(batch, 1, LENGTH, LENGTH, device="cuda") < 0.9
    yield (
        "boolean [B, 1, M, M]",
        square,
        ours(visible),
        {"xFormers": sdpa(SDPBackend.EFFICIENT_ATTENTION, query, key, value, attn_mask=visible)},
    )
    yield (
        "dropout 0.1",
        square,
        ours(p=0.1),
        {
            "FA2": sdpa(SDPBackend.FLASH_ATTENTION, query, key, value, dropout_p=0.1),
            "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, query, key, value, dropout_p=0.1),
        },
    )
    del bias, shared, visible

    few = [x[:, :, ::4].contiguous() for x in (key, value)]
    yield (
        "a key head for 4",
        square,
        ours(None, query, *few),
        {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, query, *few, enable_gqa=True)},
    )
    one = torch.randn(16, 1, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    few = [torch.randn(16, TOKENS, heads // 4, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    yield (
        f"1 query of {TOKENS} keys, for 4",
        16 * TOKENS,
        ours(None, one, *few),
        {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, one, *few, enable_gqa=True)},
    )

    query, key, value = tensors(1, TOKENS, head_dim)
    packed = {"q": query, "k": key, "v": value}
    window = attn_bias.LowerTriangularFromBottomRightMask().make_local_attention(WINDOW)
    pairs = TOKENS * WINDOW - WINDOW * (WINDOW - 1) // 2
    peers = {}
    if with_flex:
        peers["Flex"] = flex(query, key, value, lambda b, h, i, j: (i >= j) & (i - j < WINDOW))
    yield f"window {WINDOW} of {TOKENS}", pairs, ours(window, **packed), peers

    blocks = attn_bias.BlockDiagonalMask.from_seqlens(SEQUENCES)
    squares = sum(length * length for length in SEQUENCES)
    document = torch.repeat_interleave(torch.arange(16, device="cuda"), torch.tensor(SEQUENCES, device="cuda"))
    peers = {}
    if with_flex:
        peers["Flex"] = flex(query, key, value, lambda b, h, i, j: document[i] == document[j])
    yield "varlen, 16 sequences", squares, ours(blocks, **packed), peers
    triangles = sum(length * (length + 1) // 2 for length in SEQUENCES)
    peers = {}
    if with_flex:
        peers["Flex"] = flex(query, key, value, lambda b, h, i, j: (document[i] == document[j]) & (i >= j))
    yield "varlen causal", triangles, ours(blocks.make_causal(), **packed), peers

    lengths = [LENGTH] * batch
    yield (
        "varlen, 4 equal",
        square,
        ours(attn_bias.BlockDiagonalMask.from_seqlens(lengths), **packed),
        {},
    )
    for page_size in (16, 64, 256):
        order = torch.randperm(TOKENS // page_size, device="cuda")
        tables = order.to(torch.int32).reshape(batch, -1)
        mask = attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(lengths, lengths, tables, page_size)
        pages = {"q": query, "k": paged(key, page_size, order), "v": paged(value, page_size, order)}
        yield f"paged {page_size}, 4 equal", square, ours(mask, **pages), {}


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--flex", action="store_true", help="race FlexAttention too")
    arguments = begin(parser, "bf16; TFLOP/s of visible pairs")
    print(f"{'case':28} {'kernel':24} {'ours':>6} {'speed':>6}  peers: TFLOP/s, ratio, largest difference")
    rows = []
    for head_dim in arguments.head_dim:
        plain = None
        for name, pairs, ours, peers in cases(head_dim, arguments.flex):
            flops = 4 * WIDTH * pairs
            output = ours()
            kernel = attune.last_kernel()
            row = {"head_dim": head_dim, "case": name, "kernel": kernel, "peers": {}}
            for peer, theirs in peers.items():
                difference = (output.float() - theirs().float()).abs().max().item()
                ours_ms, theirs_ms = race(ours, theirs)
                row["ms"] = min(ours_ms, row.get("ms", ours_ms))
                row["peers"][peer] = {
                    "tflops": flops / (theirs_ms * 1e9), "ratio": theirs_ms / ours_ms, "max_difference": difference
                }  # fmt: skip
            if not peers:
                row["ms"] = race(ours, ours)[0]
            row["tflops"] = flops / (row["ms"] * 1e9)
            plain = plain or row["tflops"]
            row["speed"] = row["tflops"] / plain
            rows.append(row)
            beside = ", ".join(
                f"{peer} {r['tflops']:.0f} {r['ratio']:.2f} {r['max_difference']:.0e}" for peer, r in row["peers"].items()
            )
            title = f"K={head_dim} {name}"
            print(f"{title:28} {kernel:24} {row['tflops']:6.0f} {row['speed']:6.2f}  {beside}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
