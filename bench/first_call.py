#!/usr/bin/env python3
"""What a process's first call costs: cold (compile, store, load, run), on a cache hit, and once it is hot.

first_call.py ATTUNE [--device cuda|cpu] [--runs N] [--json FILE]

ATTUNE is the attune command. Every first call is that of a fresh `attune attend` with random tensors, which times the call
until its result is there; its device and memory are open by then, so the time has no creation of a context in it. "own"
is a hit less a hot call: what is left is Attune's own work and the driver's loading. Medians, in milliseconds, and of hits
the middle 80 per cent.
"""

import argparse
import json
import os
import random
import statistics
import struct
import subprocess
import tempfile
from pathlib import Path

CASES = {  # dtype, head dim, options of `attune attend`
    "forward f32": ("F32", 64, []),
    "forward bf16 causal": ("BF16", 128, ["--bias", "lower_triangular"]),
    "forward and backward f16": ("F16", 64, ["--backward"]),
}
SHAPE = (1, 256, 4)  # batch, length, heads
HOT_CALLS = 101


def element(dtype, number):
    if dtype == "F16":
        return struct.pack("<e", number)
    single = struct.pack("<f", number)
    return single if dtype == "F32" else single[2:]


def write_tensors(path, dtype, head_dim):
    """A safetensors file with the tensors that attend takes."""
    shape = [*SHAPE, head_dim]
    count = SHAPE[0] * SHAPE[1] * SHAPE[2] * head_dim
    header, data = {}, b""
    for name in ("query", "key", "value", "grad_output"):
        tensor = b"".join(element(dtype, random.gauss(0, 1)) for _ in range(count))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(tensor)]}
        data += tensor
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def attend(arguments, tensors, options, cache):
    """The report of a fresh process."""
    command = [arguments.attune, "attend", str(tensors), "-o", str(tensors) + ".out", "--device", arguments.device]
    completed = subprocess.run(
        command + ["--repeat", str(HOT_CALLS), "--json", *options],
        env={**os.environ, "ATTUNE_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(completed.stdout)


def measure(arguments, name, folder):
    dtype, head_dim, options = CASES[name]
    tensors = folder / "tensors.safetensors"
    write_tensors(tensors, dtype, head_dim)
    caches = [folder / name / str(run) for run in range(3)]
    cold = [attend(arguments, tensors, options, cache) for cache in caches]
    hits = [attend(arguments, tensors, options, caches[0]) for _ in range(arguments.runs)]
    if any(report["source"] != "compiler" for report in cold) or any(report["source"] != "disk" for report in hits):
        raise SystemExit(f"{name}: the kernels did not come from where they should")
    first = sorted(report["first_call_ms"] for report in hits)
    hot = statistics.median(report["hot_call_ms"] for report in hits)
    return {
        "case": name,
        "kernel": hits[0]["kernel"],
        "device": hits[0]["device"],
        "cold_ms": statistics.median(report["first_call_ms"] for report in cold),
        "hit_ms": statistics.median(first),
        "hit_middle_ms": [first[len(first) // 10], first[-1 - len(first) // 10]],
        "hot_ms": hot,
        "own_ms": statistics.median(first) - hot,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attune")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    random.seed(0)
    rows = []
    print(f"{'case':26} {'kernel':30} {'cold':>8} {'hit':>7} {'(middle 80 %)':>15} {'hot':>7} {'own':>7}")
    with tempfile.TemporaryDirectory(prefix="attune_first_call_") as name:
        for case in CASES:
            row = measure(arguments, case, Path(name))
            rows.append(row)
            low, high = row["hit_middle_ms"]
            print(
                f"{case:26} {row['kernel']:30} {row['cold_ms']:8.1f} {row['hit_ms']:7.2f} "
                f"{f'({low:.2f} - {high:.2f})':>15} {row['hot_ms']:7.3f} {row['own_ms']:7.2f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
