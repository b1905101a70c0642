"""What the GPU benchmarks share: their beginning, the race, PyTorch's kernels as peers, and the file that --json writes.

To import it puts this tree's package on the path: before `import attune`.
"""

import argparse
import functools
import json
import random
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from attune import _library

TOKENS, WIDTH = 16384, 2048  # B * M and H * K
SEQUENCES = [4096, 2048, 2048, 1536, 1024, 1024, 1000, 777, 513, 512, 500, 400, 384, 300, 129, 93]
assert sum(SEQUENCES) == TOKENS
GRAPH_CALLS = 20
_turns, _calls = 11, 6  # of a race: --turns, --calls
MATMUL_SIZE = 8192  # as many FLOPs as attention of 8192 keys without a mask
PEERS = {
    "FA2": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "xFormers": SDPBackend.EFFICIENT_ATTENTION,  # xFormers' own CUTLASS kernel, as PyTorch ships it
}


def new_parser(about):
    """A parser of what every benchmark takes, which leads with the first line about it."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("library", help="libattune.so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--turns", type=int, default=_turns, metavar="N", help="turns of a race (default %(default)s)")
    parser.add_argument("--calls", type=int, default=_calls, metavar="N", help="calls of a turn (default %(default)s)")
    return parser


def add_peers(parser, names):
    """--peers, for tables that are raced against each of these."""
    names = list(names)
    parser.add_argument("--peers", nargs="+", default=names, choices=names, help="race these alone (default: all)")


def begin(parser, heading):
    """Reads the arguments, loads the library, seeds, and prints the machine and what is measured there."""
    global _turns, _calls
    arguments = parser.parse_args()
    _turns, _calls = arguments.turns, arguments.calls
    _library.load(arguments.library)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {heading.format(**vars(arguments))}")
    return arguments


class Peer:
    """A call of one of PyTorch's kernels. Choosing it takes the host as long as calling it: within() does it once."""

    def __init__(self, name, call):
        self.backend, self.call = PEERS[name], call

    def __call__(self):
        return self.call()


def within(call):
    """The context that a call, ours or a peer's, runs in."""
    return sdpa_kernel(call.backend) if isinstance(call, Peer) else nullcontext()


def result_of(call):
    with within(call):
        return call()


@functools.cache
def capture_stream():
    """Where calls are captured. PyTorch computes gradients in the stream of the forward pass: that has to run here, too."""
    return torch.cuda.Stream()


def graphed(call):
    """Replays many calls that were captured once. Whoever replays them keeps the call, and so its tensors."""
    side = capture_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result_of(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with within(call), torch.cuda.graph(graph, stream=side):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def milliseconds(call):
    """One turn: the mean of a few calls. One call goes before them, so that the GPU never waits for the host."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with within(call):
        call()
        begin.record()
        for _ in range(_calls):
            call()
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / _calls


def race(*sides):
    """Medians in milliseconds, turn by turn. Each turn has an order of its own: a call that follows one that left the GPU
    cool runs at a higher clock, up to a twentieth faster."""
    for call in sides:
        with within(call):
            for _ in range(3):
                call()
    orders = random.Random(0)
    times = [[] for _ in sides]
    for _ in range(_turns):
        for side in orders.sample(range(len(sides)), len(sides)):
            times[side].append(milliseconds(sides[side]))
    return [statistics.median(x) for x in times]


def flex(query, key, value, mask_mod=None, score_mod=None):
    """FlexAttention of [batch, length, heads, head_dim], compiled; the block mask is made once, outside the timing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    transposed = [x.transpose(1, 2) for x in (query, key, value)]
    block_mask = None
    if mask_mod is not None:
        block_mask = create_block_mask(mask_mod, None, None, query.shape[1], key.shape[1], device="cuda")
    return lambda: compiled(*transposed, score_mod=score_mod, block_mask=block_mask).transpose(1, 2)


def matmul(dtype=torch.bfloat16, size=MATMUL_SIZE):
    """A product of random matrices by cuBLAS: the machine's ceiling."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return lambda: a @ b


def matmul_tflops(ms, size=MATMUL_SIZE):
    return 2 * size**3 / (ms * 1e9)


def write(path, direction, rows):
    """What plot.py reads: the rows of a dense table with the machine and its ceiling."""
    report = {
        "direction": direction,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "matmul_tflops": matmul_tflops(*race(matmul())),
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1))
