#!/usr/bin/env python3
"""Attune's error on a GPU against cuDNN's: both against float64, on the same inputs, forward and backward.

gpu_error.py LIBRARY [--dtype D ...] [--head-dim K ...] [--length S] [--backward-alone] [--json FILE]

Needs torch and an NVIDIA GPU; LIBRARY is libattune.so. Of the output and of each gradient two ratios, ours over
cuDNN's: of the root of the mean squared error and of the largest error. Below 1 ours is closer to float64. "error" is
our root mean square relative to the reference's, of the output. With --backward-alone our backward pass is given cuDNN's
output and LSE, so that gradients differ by the backward pass and nothing else. The data:

  random   query, key, value and the output's gradient are normal
  rising   keys shrink from 4 times that to nothing, so that a row's maximum rises for a kernel that walks from the last
  large    queries are 8 times as large: nearly all the weight is on few keys
  alike    queries are nearly 0: all keys weigh the same
"""

import json
import math
import statistics

import torch
import torch.nn.functional as F

from gpu_bench import Peer, begin, new_parser, result_of  # isort: skip, finds attune

from attune.ops import LowerTriangularMask, fmha, memory_efficient_attention

HEADS = 16
NAMES = ["output", "dQ", "dK", "dV"]
DATA = {
    "random": lambda query, key: None,
    "rising": lambda query, key: key.mul_(torch.linspace(4, 0.02, key.shape[1], device="cuda")[:, None, None]),
    "large": lambda query, key: query.mul_(8),
    "alike": lambda query, key: query.mul_(0.01),
}


def eager(query, key, value, causal):
    """Plain attention of [batch, heads, length, head_dim]."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").triu(1), -math.inf)
    return scores.softmax(-1) @ value


def results(call, inputs, grad):
    """The output and the gradients of the inputs, all in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = call(*leaves)
    return [x.detach().double() for x in (output, *torch.autograd.grad(output, leaves, grad))]


def gradients_from_cudnn(inputs, grad, causal):
    """cuDNN's output, and what our backward pass makes of it and of cuDNN's LSE, all in float64."""
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(1, 2) for x in inputs), None, True, 0.0, causal
    )
    output, lse = output.transpose(1, 2), lse.reshape(*lse.shape[:3]).contiguous()
    bias = LowerTriangularMask() if causal else None
    return [x.double() for x in (output, *fmha.memory_efficient_attention_backward(grad, output, lse, *inputs, bias))]


def errors(found, expected):
    difference = (found - expected).abs()
    return difference.square().mean().sqrt().item(), difference.max().item()


def measure(dtype, head_dim, length, causal, data, backward_alone):
    inputs = [torch.randn(1, length, HEADS, head_dim, device="cuda") for _ in range(4)]
    DATA[data](*inputs[:2])
    *inputs, grad = (x.to(getattr(torch, dtype)) for x in inputs)
    bias = LowerTriangularMask() if causal else None

    def transposed(call):
        return lambda *tensors: call(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)

    def cudnn(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    expected = results(
        transposed(lambda *tensors: eager(*tensors, causal)), [x.double() for x in inputs], grad.double()
    )
    if backward_alone:
        ours = gradients_from_cudnn(inputs, grad, causal)
    else:
        ours = results(lambda *tensors: memory_efficient_attention(*tensors, bias), inputs, grad)
    theirs = result_of(Peer("cuDNN", lambda: results(transposed(cudnn), inputs, grad)))
    row = {"dtype": dtype, "head_dim": head_dim, "length": length, "causal": causal, "data": data, "tensors": {}}
    for name, found, peer, reference in zip(NAMES, ours, theirs, expected):
        (rms, largest), (peer_rms, peer_largest) = errors(found, reference), errors(peer, reference)
        row["tensors"][name] = {
            "error": rms / reference.square().mean().sqrt().item(),
            "rms": rms / peer_rms,
            "largest": largest / peer_largest,
        }
    return row


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16"], choices=["bfloat16", "float16"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--backward-alone", action="store_true", help="give our backward cuDNN's output and LSE")
    arguments = begin(parser, "S = {length}")
    torch.autograd.set_multithreading_enabled(False)  # its own thread has no CUDA context for float64 products
    print("ours / cuDNN: root mean square, largest")
    print(f"{'case':32} {'error':7}  " + "  ".join(f"{name:11}" for name in NAMES))
    rows = []
    for dtype in arguments.dtype:
        for head_dim in arguments.head_dim:
            for causal in (False, True):
                for data in DATA:
                    row = measure(dtype, head_dim, arguments.length, causal, data, arguments.backward_alone)
                    rows.append(row)
                    case = f"{dtype} K={head_dim}{' causal' if causal else ''} {data}"
                    ratios = (f"{x['rms']:5.2f} {x['largest']:5.2f}" for x in row["tensors"].values())
                    print(f"{case:32} {row['tensors']['output']['error']:.1e}  " + "  ".join(ratios), flush=True)
    for name in NAMES:
        of_all = [row["tensors"][name] for row in rows]
        mean = math.exp(statistics.fmean(math.log(x["rms"]) for x in of_all))
        print(
            f"{name:6} geometric mean of rms {mean:.2f}, worst {max(x['rms'] for x in of_all):.2f};"
            f" worst of largest {max(x['largest'] for x in of_all):.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
