"""Runs the `attune` command as its users do. Standard library only."""

import functools
import json
import math
import os
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

COMMAND = os.environ["ATTUNE_COMMAND"]
SKIPPED = 77  # CTest's "cannot run here"


class Outcome:
    """What a process left: exit code, stdout, stderr."""

    def __init__(self, process):
        self.code = process.returncode
        self.out = process.stdout
        self.err = process.stderr

    def json(self):
        return json.loads(self.out)


def environment(**variables):
    """The caller's environment without its Attune settings, on the CPU unless told otherwise."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ATTUNE_")}
    env["ATTUNE_BACKEND"] = "cpu"
    env.update(variables)
    return env


def run(*arguments, **variables):
    return Outcome(subprocess.run([COMMAND, *map(str, arguments)], env=environment(**variables),
                                  capture_output=True, text=True, timeout=300, check=False))


@functools.lru_cache(maxsize=None)
def doctor():
    return run("doctor", "--json", ATTUNE_CACHE_MODE="off").json()


def finding(name):
    return next(entry for entry in doctor()["findings"] if entry["name"] == name)


def needs_cpu(test):
    return unittest.skipUnless(doctor()["cpu_works"], "no CPU backend here: see `attune doctor`")(test)


def needs_nvrtc(test):
    return unittest.skipUnless(finding("gpu compiler")["ok"], "no NVRTC here: see `attune doctor`")(test)


def needs_gpu(test):
    return unittest.skipUnless(doctor()["cuda_works"], "no GPU here: see `attune doctor`")(test)


def native_arch():
    return run("devices", "--json").json()["devices"][0]["target"]


class CommandTest(unittest.TestCase):
    """Gives each test a folder of its own, with a cache in it that starts absent."""

    maxDiff = None

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="attune-cli-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.cache = self.folder / "cache"

    def attune(self, *arguments, code=0, **variables):
        """Runs the command and checks its exit code."""
        variables.setdefault("ATTUNE_CACHE_DIR", str(self.cache))
        outcome = run(*arguments, **variables)
        self.assertEqual(outcome.code, code, f"{arguments}\nstdout: {outcome.out}\nstderr: {outcome.err}")
        return outcome

    def attune_json(self, *arguments, code=0, **variables):
        return self.attune(*arguments, "--json", code=code, **variables).json()

    def assert_fails(self, code, text, *arguments, **variables):
        """The command fails with this exit code and an error that holds this text, and prints no result."""
        outcome = self.attune(*arguments, code=code, **variables)
        self.assertEqual(outcome.out, "")
        self.assertTrue(outcome.err.startswith("attune: "), outcome.err)
        self.assertIn(text, outcome.err)

    def entries(self):
        """The cache's files."""
        return sorted(path for path in (self.cache / "v1" / "objects").glob("*/*") if path.is_file())

    def quarantined(self):
        return sorted((self.cache / "v1" / "quarantine").glob("*"))


def main():
    result = unittest.main(exit=False, verbosity=2).result
    if not result.wasSuccessful():
        sys.exit(1)
    if result.testsRun > len(result.skipped):
        sys.exit(0)
    print("skipped:", "; ".join(sorted({reason for _, reason in result.skipped})))
    sys.exit(SKIPPED)


# ---- .safetensors, written here a second time so that the command's code is not its own judge ----

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I32": 4, "BOOL": 1}


def encode(dtype, values):
    if dtype == "BF16":  # the upper half of a float32; the values of these tests are exact in it
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    letter = {"F32": "f", "F16": "e", "F64": "d", "I32": "i", "BOOL": "?"}[dtype]
    return struct.pack(f"<{len(values)}{letter}", *values)


def decode(dtype, data):
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i:i + 2])[0] for i in range(0, len(data), 2)]
    letter = {"F32": "f", "F16": "e"}[dtype]
    return list(struct.unpack(f"<{len(data) // ITEM_BYTES[dtype]}{letter}", data))


def write_safetensors(path, tensors):
    """tensors: name -> (dtype, shape, values)"""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        assert len(values) == math.prod(shape)
        begin = len(data)
        data += encode(dtype, values)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    """name -> (dtype, shape, values), and the metadata."""
    raw = path.read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + length])
    metadata = header.pop("__metadata__", {})
    data = raw[8 + length:]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], decode(entry["dtype"], data[begin:end]))
    return tensors, metadata


# ---- Problems ----


class Problem:
    """Random query, key and value with numbers that float16 and bfloat16 hold exactly."""

    def __init__(self, batch=1, len_q=5, len_k=7, heads=2, head_dim=8, head_dim_v=None, dtype="F32", seed=1):
        self.batch, self.len_q, self.len_k, self.heads = batch, len_q, len_k, heads
        self.head_dim, self.head_dim_v, self.dtype = head_dim, head_dim_v or head_dim, dtype
        numbers = random.Random(seed)
        self.query, self.key, self.value = (
            [numbers.randint(-32, 32) / 16 for _ in range(batch * length * heads * dim)]
            for length, dim in ((len_q, self.head_dim), (len_k, self.head_dim), (len_k, self.head_dim_v)))

    def tensors(self):
        return {name: (self.dtype, (self.batch, length, self.heads, dim), values)
                for name, length, dim, values in (("query", self.len_q, self.head_dim, self.query),
                                                  ("key", self.len_k, self.head_dim, self.key),
                                                  ("value", self.len_k, self.head_dim_v, self.value))}

    def write(self, path):
        write_safetensors(path, self.tensors())
        return path

    def reference(self, visible=lambda i, j: True, scale=None, added=lambda b, h, i, j: 0):
        """Output [B, Mq, H, Kv] and lse [B, H, Mq], flat, in Python's float64."""
        scale = self.head_dim ** -0.5 if scale is None else scale

        def row(values, b, i, h, length, dim):
            start = ((b * length + i) * self.heads + h) * dim
            return values[start:start + dim]

        output = [0.0] * (self.batch * self.len_q * self.heads * self.head_dim_v)
        lse = [-math.inf] * (self.batch * self.heads * self.len_q)
        for b in range(self.batch):
            for h in range(self.heads):
                for i in range(self.len_q):
                    query = row(self.query, b, i, h, self.len_q, self.head_dim)
                    scores = {j: added(b, h, i, j) + scale * sum(x * y for x, y in zip(
                        query, row(self.key, b, j, h, self.len_k, self.head_dim)))
                              for j in range(self.len_k) if visible(i, j)}
                    if not scores:
                        continue
                    top = max(scores.values())
                    total = sum(math.exp(score - top) for score in scores.values())
                    lse[(b * self.heads + h) * self.len_q + i] = top + math.log(total)
                    start = ((b * self.len_q + i) * self.heads + h) * self.head_dim_v
                    for j, score in scores.items():
                        weight = math.exp(score - top) / total
                        for d, x in enumerate(row(self.value, b, j, h, self.len_k, self.head_dim_v)):
                            output[start + d] += weight * x
        return output, lse


def worst(values, expected):
    """The largest difference; equal infinities differ by nothing."""
    assert len(values) == len(expected)
    return max((0.0 if x == y else abs(x - y) for x, y in zip(values, expected)), default=0.0)
