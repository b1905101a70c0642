"""The second half of tools/quickstart.sh: runs attention on the example data and prints what it cost.

quickstart.py ATTUNE, with the path of the built `attune` command. Exit status 1: a result was wrong, or the cache did
not do its work.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "examples" / "data" / "minilm_layer3.safetensors"
BIASES = ("none", "lower_triangular")
HOT_CALLS = 51


def attend(attune, bias, folder):
    """One process of `attune attend`; its report."""
    command = [
        attune,
        "attend",
        str(DATA),
        "--bias",
        bias,
        "-o",
        str(folder / f"{bias}.safetensors"),
        "--check",
    ]
    completed = subprocess.run(
        command + ["--repeat", str(HOT_CALLS), "--json"],
        env={**os.environ, "ATTUNE_CACHE_DIR": str(folder / "cache")},
        stdout=subprocess.PIPE,
        text=True,
    )
    if completed.returncode not in (0, 1):
        sys.exit(completed.returncode)  # it has said why
    return json.loads(completed.stdout)


def row(bias, first, second):
    return [
        bias,
        f"{first['kernel']} on {first['device']}",
        f"{first['first_call_ms']:.1f} ms",
        f"{second['first_call_ms']:.2f} ms",
        f"{second['hot_call_ms']:.3f} ms",
        f"{second['max_abs_error']:.1e}",
        f"{second['plain_max_abs_error']:.1e}",
    ]


def problems(bias, first, second):
    """What a working cache and a right kernel would not have reported."""
    if (first["source"], first["compiles"]) != ("compiler", 1):
        yield f"{bias}: the first process took its kernel from {first['source']}, expected the compiler"
    if (second["source"], second["compiles"]) != ("disk", 0):
        yield f"{bias}: the second process took its kernel from {second['source']}, expected the cache on disk"
    if not (first["correct"] and second["correct"]):
        yield f"{bias}: the error is larger than twice that of a plain implementation"


def print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for cells in rows:
        # The names stand left, the numbers right.
        aligned = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        print("  " + "  ".join(aligned).rstrip())


def main():
    attune = sys.argv[1]
    rows = [["bias", "kernel", "cold call", "2nd process", "hot call", "max error", "plain's error"]]
    found = []
    with tempfile.TemporaryDirectory(prefix="attune_quickstart_") as name:
        for bias in BIASES:
            first, second = (attend(attune, bias, Path(name)) for _ in range(2))
            rows.append(row(bias, first, second))
            found += problems(bias, first, second)
    print(f"\nAttention over {DATA.name}: 331 tokens, 12 heads of 32, captured from all-MiniLM-L6-v2\n")
    print_table(rows)
    print(
        "\n  cold call    first call with an empty cache folder: compile, store, load, run"
        "\n  2nd process  first call of a new process: the kernel comes from the cache on disk"
        f"\n  hot call     median of {HOT_CALLS} calls after it"
        "\n  max error    largest difference to a float64 reference; the last column is that of a plain"
        "\n               implementation in the same dtype, twice of which is allowed"
    )
    for problem in found:
        print(f"quickstart: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
