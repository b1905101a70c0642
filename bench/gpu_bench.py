"""What the GPU benchmarks share: the race, PyTorch's kernels as peers, and the file that --json writes."""

import json
import statistics

import torch
from torch.nn.attention import SDPBackend

TOKENS, WIDTH = 16384, 2048  # B * M and H * K
TURNS, CALLS = 11, 6
PEERS = {
    "FA2": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "xFormers": SDPBackend.EFFICIENT_ATTENTION,  # xFormers' own CUTLASS kernel, as PyTorch ships it
}


def milliseconds(call):
    """One turn: the mean of a few calls. One call goes before them, so that the GPU never waits for the host."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


def race(*calls):
    """Medians in milliseconds, turn by turn."""
    for call in calls:
        for _ in range(3):
            call()
    turns = [[milliseconds(call) for call in calls] for _ in range(TURNS)]
    return [statistics.median(side) for side in zip(*turns)]


def matmul_tflops(dtype=torch.bfloat16, size=8192):
    """The machine's ceiling: a product of random matrices by cuBLAS."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / (race(lambda: a @ b)[0] * 1e9)


def write(path, direction, rows):
    """What plot.py reads: the rows of a dense table with the machine and its ceiling."""
    report = {
        "direction": direction,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "matmul_tflops": matmul_tflops(),
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1))
