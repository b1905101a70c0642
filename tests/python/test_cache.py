"""A second process with the same cache folder compiles nothing."""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CALL = """
import json, os, sys
sys.path[:0] = sys.argv[1:]
import attune
from attune import _library
from support import random_inputs
_library.load(os.environ["ATTUNE_TEST_LIBRARY"])
output = attune.ops.memory_efficient_attention(*random_inputs(0), attune.ops.LowerTriangularMask())
print(json.dumps({**attune.counters()._asdict(), "kernel": attune.last_kernel(), "sum": float(output.sum())}))
"""


class Cache(unittest.TestCase):
    def call(self, cache):
        completed = subprocess.run(
            [sys.executable, "-c", CALL, str(ROOT / "python"), str(ROOT / "tests" / "python")],
            check=True,
            stdout=subprocess.PIPE,
            env={**os.environ, "ATTUNE_CACHE_DIR": cache},
        )
        return json.loads(completed.stdout)

    def test_second_process_compiles_nothing(self):
        with tempfile.TemporaryDirectory() as cache:
            first, second = self.call(cache), self.call(cache)
        self.assertEqual((first["compiles"], first["cache_hits"], first["cache_stores"]), (1, 0, 1))
        self.assertEqual((second["compiles"], second["cache_hits"], second["cache_stores"]), (0, 1, 0))
        self.assertEqual((first["kernel"], first["sum"]), (second["kernel"], second["sum"]))
