"""attune explain and attune emit: the same answer on any machine, without a device."""

import hashlib
import os
import shutil

from harness import CommandTest, finding, main, needs_cpu

PROBLEM = "dtype=f16 head_dim=64 window_right=bounded lse=write"


class Explain(CommandTest):

    def test_json(self):
        told = self.attune_json("explain", "--problem", PROBLEM, "--arch", "x86-64-v4")
        self.assertEqual(told["problem"], PROBLEM)
        self.assertEqual((told["target"], told["family"]), ("x86-64-v4", "cpu"))
        self.assertTrue(told["candidate"].startswith("cpu_avx512"))
        self.assertEqual((told["spec"]["dtype"], told["spec"]["head_dim"], told["spec"]["lse"]),
                         ("f16", 64, "write"))
        self.assertEqual(told["verdicts"], [{"family": "cpu", "reasons": []}])
        self.assertEqual(told["state"], "absent")
        self.assertRegex(told["key"], "^[0-9a-f]{64}$")
        self.assertEqual(told["key_fields"]["source"], hashlib.sha256(told["source"].encode()).hexdigest())
        self.assertFalse(self.cache.exists())

    def test_the_gpu_families(self):
        told = self.attune_json("explain", "--problem", PROBLEM, "--arch", "sm_90a")
        self.assertEqual((told["family"], told["target"]), ("mma", "sm_90a"))
        told = self.attune_json("explain", "--problem", PROBLEM, "--arch", "sm_70")
        self.assertEqual(told["family"], "simt")
        reasons = {verdict["family"]: verdict["reasons"] for verdict in told["verdicts"]}
        self.assertIn("needs compute capability 8.0 or later", reasons["mma"][0])
        if not finding("gpu compiler")["ok"]:  # the choice needs no compiler, the key does
            self.assertIsNone(told["key"])
            self.assertTrue(told["compiler_problem"])

    def test_text(self):
        text = self.attune("explain", "--problem", PROBLEM, "--arch", "x86-64-v3", "--key", "--source").out
        for words in ("candidate  cpu_avx2", "  cpu      chosen", "state      absent", "key fields",
                      "x86-64-v3", "constexpr k::KernelSpec kSpec{"):
            self.assertIn(words, text)
        text = self.attune("explain", "--problem", "dtype=f32 head_dim=64", "--arch", "sm_90a").out
        self.assertIn("mma", text)
        self.assertIn("no: ", text)
        self.assertNotIn("kSpec", text)

    def test_every_field(self):
        problem = ("dtype=f16 output_dtype=f32 head_dim=64 head_dim_v=40 blocks=varlen keys=paged bias=boolean "
                   "dropout=on lse=write align_bytes=8 families=simt")
        told = self.attune_json("explain", "--problem", problem, "--arch", "sm_90a")
        self.assertEqual((told["problem"], told["family"]), (problem, "simt"))
        self.assertEqual({name: told["spec"][name] for name in ("output_dtype", "blocks", "keys", "bias", "dropout")},
                         {"output_dtype": "f32", "blocks": "varlen", "keys": "paged", "bias": "boolean",
                          "dropout": "on"})
        help_text = self.attune("explain", "--help").out
        for word in problem.split():
            self.assertIn(word.split("=")[0], help_text)

    def test_a_merge(self):
        problem = "operation=merge dtype=f16 head_dim_v=64 lse=write"
        for arch, family in (("x86-64-v4", "cpu"), ("sm_80", "merge")):
            told = self.attune_json("explain", "--problem", problem, "--arch", arch)
            self.assertEqual((told["problem"], told["family"]), (problem, family))

    def test_the_backward_of_a_merge(self):
        problem = "operation=grad_merge dtype=f16 output_dtype=f32 head_dim_v=64"
        for arch, family in (("x86-64-v4", "cpu"), ("sm_80", "merge")):
            told = self.attune_json("explain", "--problem", problem, "--arch", arch)
            self.assertEqual((told["problem"], told["family"]), (problem, family))

    def test_a_backward_pass(self):
        def pass_of(problem, arch):
            told = self.attune_json("explain", "--problem", problem, "--arch", arch)
            return [kernel["problem"] for kernel in told["kernels"]]

        for arch in ("x86-64-v3", "x86-64-v4"):
            self.assertEqual(pass_of("operation=backward dtype=f16 output_dtype=f32 head_dim=64 head_dim_v=40 "
                                     "window_right=bounded bias=f16 lse=write", arch),
                             ["operation=delta dtype=f16 output_dtype=f32 head_dim=64 head_dim_v=40",
                              "operation=grad_key_value dtype=f16 head_dim=64 head_dim_v=40 "
                              "window_right=bounded bias=f16",
                              "operation=grad_query dtype=f16 head_dim=64 head_dim_v=40 window_right=bounded bias=f16",
                              "operation=grad_bias dtype=f16 head_dim=64 head_dim_v=40 window_right=bounded bias=f16"])
        self.assertEqual(pass_of("operation=backward dtype=bf16 head_dim=128", "sm_90a"),
                         ["operation=delta dtype=bf16 head_dim=128",
                          "operation=grad_key_value dtype=bf16 head_dim=128 query_gradient=atomic",
                          "operation=round_query dtype=bf16 head_dim=128"])
        ordered = "operation=backward dtype=bf16 head_dim=128 query_gradient=ordered"
        self.assertEqual(pass_of(ordered, "sm_80"),
                         ["operation=delta dtype=bf16 head_dim=128",
                          "operation=grad_key_value dtype=bf16 head_dim=128",
                          "operation=grad_query dtype=bf16 head_dim=128"])
        self.assertEqual(pass_of(f"{ordered} boxes=1", "sm_90a"),
                         ["operation=delta dtype=bf16 head_dim=128",
                          "operation=grad_key_value dtype=bf16 head_dim=128 query_gradient=ordered boxes=1",
                          "operation=round_query dtype=bf16 head_dim=128"])
        text = self.attune("explain", "--problem", "operation=backward dtype=f32 head_dim=64 bias=boolean", "--arch",
                           "sm_80").out
        self.assertEqual(text.count("candidate "), 3)
        self.assertIn("problem    operation=delta dtype=f32 head_dim=64\n", text)

    @needs_cpu
    def test_state_of_a_cached_kernel(self):
        self.attune("precompile", "--problem", PROBLEM, "--arch", "x86-64-v3")
        told = self.attune_json("explain", "--problem", PROBLEM, "--arch", "x86-64-v3")
        self.assertEqual(told["state"], "cached")
        path, = self.entries()
        self.assertEqual(told["key"], path.parent.name + path.name)

    def test_refusals(self):
        def refuse(text, problem, arch="x86-64-v4"):
            self.assert_fails(2, text, "explain", "--problem", problem, "--arch", arch)

        refuse("head_dim 513 is outside 1 to 512", "dtype=f16 head_dim=513")
        refuse("the call allows simt alone", "dtype=f16 head_dim=64 families=simt")
        refuse("no f32 kernels", "dtype=f32 head_dim=64 families=mma", "sm_90a")
        refuse("problem: 'holes' is no value of keys", "head_dim=64 keys=holes")
        refuse("unknown architecture 'sm_91'", PROBLEM, "sm_91")
        refuse("head_dim=N is missing", "dtype=f16")
        refuse("head_dim=N is missing", "operation=backward dtype=f16")
        refuse("problem: 'sideways' is no value of operation", "operation=sideways head_dim=8")
        self.assert_fails(2, "--problem is required", "explain")


class Emit(CommandTest):

    def test_one(self):
        source = self.attune("emit", "--problem", PROBLEM, "--arch", "sm_90a").out
        self.assertIn('#include "attune/cuda/forward_mma.cuh"', source)
        self.assertIn(".head_dim = 64,", source)
        told = self.attune_json("explain", "--problem", PROBLEM, "--arch", "sm_90a")
        self.assertEqual(told["source"], source)
        path = self.folder / "kernel.cu"
        self.assertEqual(self.attune("emit", "--problem", PROBLEM, "--arch", "sm_90a", "-o", path).out, "")
        self.assertEqual(path.read_text(), source)
        emitted = self.attune_json("emit", "--problem", PROBLEM, "--arch", "sm_90a")
        self.assertEqual((emitted["source"], emitted["candidate"]), (source, told["candidate"]))

    def test_all(self):
        folder = self.folder / "kernels"
        report = self.attune_json("emit", "--all", "--out", folder)
        self.assertEqual(sorted(f["path"] for f in report["files"]), sorted(map(str, folder.iterdir())))
        self.assertLessEqual({"cpu", "simt", "mma", "sm90", "merge"},
                             {f["candidate"].split("_")[0] for f in report["files"]})
        self.assertEqual(len(report["files"]), len(set(f["path"] for f in report["files"])))
        for name in ("forward_cpu.h", "merge_cpu.h", "grad_merge_cpu.h", "forward_simt.cuh", "forward_mma.cuh",
                     "forward_sm90.cuh", "merge.cuh", "grad_merge.cuh", "delta.cuh", "round_query.cuh"):
            self.assertTrue(any(name in path.read_text() for path in folder.iterdir()), name)

    def test_refusals(self):
        self.assert_fails(2, "--problem P or --all --out DIR", "emit")
        self.assert_fails(2, "--out", "emit", "--all")
        self.assert_fails(2, "--problem", "emit", "--all", "--out", self.folder, "--problem", PROBLEM)
        self.assert_fails(3, "No such file", "emit", "--problem", PROBLEM, "--arch", "sm_90a", "-o",
                          self.folder / "absent" / "kernel.cu")
        blocker = self.folder / "blocker"
        blocker.write_text("a file")
        self.assert_fails(3, "cannot create", "emit", "--all", "--out", blocker / "kernels")


@needs_cpu
class Misses(CommandTest):
    """Why a kernel is not in the cache: what differs from the entry that is most like it."""

    CACHED = "dtype=f32 head_dim=8"

    def setUp(self):
        super().setUp()
        self.attune("precompile", "--problem", self.CACHED, "--problem", "operation=merge dtype=f16 head_dim_v=64")
        self.key = self.attune_json("explain", "--problem", self.CACHED)["key"]

    def nearest(self, *arguments, **variables):
        told = self.attune_json("explain", *arguments, **variables)
        self.assertEqual(told["state"], "absent")
        self.assertEqual(told["nearest"]["key"], self.key)
        return [(d["field"], d["cached"], d["wanted"]) for d in told["nearest"]["differences"]]

    def test_another_problem(self):
        self.assertEqual(self.nearest("--problem", self.CACHED + " lse=write"), [("spec.lse", "skip", "write")])
        text = self.attune("explain", "--problem", self.CACHED + " lse=write").out
        self.assertRegex(text, rf"(?m)^not in the cache; nearest there is {self.key[:8]} \(cpu_\S+\), which differs in$")
        self.assertRegex(text, r"(?m)^  spec.lse  skip  ->  write$")

    def test_another_target(self):
        other = {"x86-64-v3": "x86-64-v4", "x86-64-v4": "x86-64-v3"}
        native = self.attune_json("explain", "--problem", self.CACHED)["target"]
        found = self.nearest("--problem", self.CACHED, "--arch", other[native])
        self.assertIn(("target", native, other[native]), found)
        self.assertNotIn("source", [field for field, _, _ in found])

    def test_another_version_of_the_templates(self):
        templates = self.folder / "templates"
        shutil.copytree(os.environ["ATTUNE_TEMPLATES"], templates)
        with open(templates / "attune" / "semantics.h", "a") as file:
            file.write("// changed\n")
        found, = self.nearest("--problem", self.CACHED, ATTUNE_TEMPLATE_DIR=str(templates))
        self.assertEqual(found[0], "headers")

    def test_nothing_to_tell(self):
        self.assertNotIn("nearest", self.attune_json("explain", "--problem", self.CACHED))  # it is there
        self.cache = self.folder / "empty"
        self.assertNotIn("nearest", self.attune_json("explain", "--problem", self.CACHED))
        self.assertNotIn("nearest", self.attune("explain", "--problem", self.CACHED).out)
        told = self.attune_json("explain", "--problem", self.CACHED, ATTUNE_CACHE_DIR="", HOME="", XDG_CACHE_HOME="")
        self.assertNotIn("nearest", told)


if __name__ == "__main__":
    main()
