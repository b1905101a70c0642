"""A pack that was compiled elsewhere, on a machine whose Attune reaches no NVRTC: carried_pack.py, in a bundle of
tools/gpu_bundle.sh, on a Hopper GPU.

First calls are made by fresh processes with an empty cache of their own, ATTUNE_JIT=never and ATTUNE_NVRTC naming no
file: by the command on real data, and by Python on tensors of PyTorch.
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data" / "minilm_layer3.safetensors"
PACK = ROOT / "hopper.pack"
ATTUNE = ROOT / "bin" / "attune"

PROGRAM = """
import attune, sys, torch
from attune import _library
from attune.ops import LowerTriangularMask, memory_efficient_attention

_library.load(sys.argv[1])

def compilers():
    return {line.split()[-1] for line in open("/proc/self/maps") if "nvrtc" in line}

query, key, value = (torch.randn(2, 300, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
of_torch = compilers()
output = memory_efficient_attention(query, key, value, LowerTriangularMask())
assert compilers() == of_torch, compilers()
counters = attune.counters()
assert (counters.compiles, counters.cache_hits) == (0, 1), counters
q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
torch.testing.assert_close(output.double(), exact, atol=2e-2, rtol=0)
print(attune.last_kernel(), "loaded by torch:", sorted(of_torch) or "no NVRTC")
"""


class CarriedPack(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="attune_carried_pack_")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.environment = {
            **os.environ,
            "ATTUNE_CACHE_DIR": str(self.folder / "cache"),
            "ATTUNE_CACHE_PATH": str(PACK),
            "ATTUNE_JIT": "never",
            "ATTUNE_NVRTC": str(self.folder / "no_nvrtc.so"),
            "PYTHONPATH": str(ROOT / "python"),
        }

    def run_it(self, *command, **environment):
        return subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )

    def attend(self, **environment):
        arguments = ["--bias", "lower_triangular", "--device", "cuda", "--check", "--json"]
        return self.run_it(ATTUNE, "attend", DATA, "-o", self.folder / "out.safetensors", *arguments, **environment)

    def test_no_compiler_is_reachable(self):
        doctor = self.run_it(ATTUNE, "doctor")
        self.assertRegex(doctor.stdout, r"gpu compiler.*no usable NVRTC")

    def test_command(self):
        done = self.attend(LD_DEBUG="files", LD_DEBUG_OUTPUT=str(self.folder / "loader"))
        self.assertEqual(done.returncode, 0, done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual((report["source"], report["compiles"], report["correct"]), ("disk", 0, True))
        loaded = "".join(log.read_text() for log in self.folder.glob("loader.*"))
        self.assertRegex(loaded, r"calling init: .*libcuda\.so")
        self.assertNotRegex(loaded, r"calling init: .*nvrtc")
        print(f"{report['kernel']}: first call {report['first_call_ms']:.2f} ms")

    def test_python(self):
        done = self.run_it(sys.executable, "-c", PROGRAM, ROOT / "lib" / "libattune.so")
        self.assertEqual(done.returncode, 0, done.stderr)
        print(done.stdout, end="")

    def test_nothing_but_the_pack_has_the_kernel(self):
        done = self.attend(ATTUNE_CACHE_PATH="")
        self.assertEqual(done.returncode, 3)
        self.assertIn("no usable NVRTC", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
