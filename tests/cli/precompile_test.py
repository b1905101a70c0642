"""attune precompile: lists, summaries, failures that stop nothing, and kernels that are then there."""

import json

from harness import CommandTest, Problem, main, native_arch, needs_cpu, needs_nvrtc

PROBLEM = "dtype=f32 head_dim=8 lse=write"
OTHER = "dtype=f32 head_dim=16"


class BadLists(CommandTest):

    def refuse_list(self, text, content):
        path = self.folder / "problems"
        path.write_text(content)
        self.assert_fails(2, text, "precompile", path, "--arch", "x86-64-v3")
        self.assert_fails(2, str(path), "precompile", path, "--arch", "x86-64-v3")

    def test_lines(self):
        self.refuse_list("problems:3: problem: unknown field 'colour'",
                         f"# a comment\n{PROBLEM}\ncolour=red\n")
        self.refuse_list("problems:1: problem: 'f64' is no value of dtype", "dtype=f64 head_dim=8\n")
        self.refuse_list("problems:1: problem: 'f32' is not name=value", "f32 head_dim=8\n")
        self.refuse_list("problems:1: problem: head_dim=N is missing", "dtype=f32\n")

    def test_json(self):
        self.refuse_list("not a valid JSON array", '["dtype=f32 head_dim=8"')
        self.refuse_list("element 1 is neither text nor an object", f'["{PROBLEM}", 7]')
        self.refuse_list("element 0: problem: 'many' is no value of head_dim", '[{"head_dim": "many"}]')

    def test_nothing_to_do(self):
        empty = self.folder / "empty"
        empty.write_text("# nothing\n\n")
        for arguments in ((), (empty,)):
            self.assert_fails(2, "no problems: name a LIST or give --problem", "precompile", *arguments)
        self.assert_fails(2, "cannot open", "precompile", self.folder / "absent")

    def test_unknown_architecture(self):
        self.assert_fails(2, "unknown architecture 'sm_42': known are sm_60", "precompile", "--problem",
                          PROBLEM, "--arch", "x86-64-v3,sm_42")

    def test_jobs(self):
        self.assert_fails(2, "--jobs", "precompile", "--problem", PROBLEM, "--jobs", 0)

    def test_a_cache_that_is_not_written(self):
        for mode in ("ro", "off"):
            self.assert_fails(3, "the cache is not written", "precompile", "--problem", PROBLEM, "--arch",
                              "x86-64-v3", ATTUNE_CACHE_MODE=mode)


@needs_cpu
class Precompile(CommandTest):

    def test_a_list_of_lines(self):
        path = self.folder / "problems.txt"
        path.write_text(f"# what the service needs\n\n{PROBLEM}  # {native_arch()}\n  {OTHER}\n{PROBLEM}\n")
        first = self.attune_json("precompile", path, "--jobs", 2)
        self.assertEqual(set(first), {"kernels", "hits", "compiled", "failed", "seconds", "bytes",
                                      "store_errors", "results"})
        self.assertEqual((first["kernels"], first["compiled"], first["hits"], first["failed"]), (2, 2, 0, 0))
        self.assertEqual([result["problem"] for result in first["results"]], [PROBLEM, OTHER])
        self.assertEqual(len(self.entries()), 2)
        second = self.attune_json("precompile", path)
        self.assertEqual((second["compiled"], second["hits"]), (0, 2))
        self.assertEqual(second["bytes"], first["bytes"])
        self.assertRegex(self.attune("precompile", path).out,
                         r"^2 kernels \(.* kB\): 0 compiled, 2 hits, 0 failed, in \d+ ms\n$")

    def test_a_json_list(self):
        path = self.folder / "problems.json"
        path.write_text(json.dumps([PROBLEM, {"dtype": "f32", "head_dim": 16}]))
        report = self.attune_json("precompile", path)
        self.assertEqual([result["problem"] for result in report["results"]], [PROBLEM, OTHER])

    def test_a_whole_backward_pass(self):
        path = self.folder / "problems"
        path.write_text("operation=backward dtype=f32 head_dim=8 align_bytes=16\n"
                        "operation=grad_query dtype=f32 head_dim=8\n"
                        "operation=grad_merge dtype=f32 head_dim_v=8\n")
        report = self.attune_json("precompile", path)
        self.assertEqual([result["problem"] for result in report["results"]],
                         ["operation=delta dtype=f32 head_dim=8", "operation=grad_key_value dtype=f32 head_dim=8",
                          "operation=grad_query dtype=f32 head_dim=8", "operation=grad_merge dtype=f32 head_dim_v=8"])
        self.assertEqual((report["compiled"], report["failed"]), (4, 0))
        path.write_text(json.dumps([{"operation": "backward", "dtype": "f32", "head_dim": 8}]))
        self.assertEqual(self.attune_json("precompile", path)["hits"], 3)

        source = Problem(head_dim=8).write(self.folder / "in.safetensors")
        self.attune("precompile", "--problem", PROBLEM)
        report = self.attune_json("attend", source, "-o", self.folder / "out.safetensors", "--backward",
                                  ATTUNE_JIT="never")
        self.assertEqual((report["compiles"], report["cache_hits"]), (0, 3))

    def test_recorded_gradients_are_precompiled(self):
        source = Problem(head_dim=8).write(self.folder / "in.safetensors")
        record = self.folder / "record"
        self.attune("attend", source, "-o", self.folder / "out.safetensors", "--backward", ATTUNE_RECORD=str(record))
        self.assertEqual([line.split("  #")[0] for line in record.read_text().splitlines()],
                         [PROBLEM, "operation=delta dtype=f32 head_dim=8",
                          "operation=grad_key_value dtype=f32 head_dim=8",
                          "operation=grad_query dtype=f32 head_dim=8"])
        self.assertEqual(self.attune_json("precompile", record)["hits"], 4)

    def test_other_architectures(self):
        report = self.attune_json("precompile", "--problem", PROBLEM, "--arch", "x86-64-v3,x86-64-v4")
        self.assertEqual([(r["target"], r["candidate"].split("_")[1]) for r in report["results"]],
                         [("x86-64-v3", "avx2"), ("x86-64-v4", "avx512")])
        self.assertEqual(len(self.entries()), 2)

    def test_one_failure_stops_nothing(self):
        report = self.attune_json("precompile", "--problem", "dtype=f32 head_dim=600", "--problem", PROBLEM,
                                  code=1)
        self.assertEqual((report["failed"], report["compiled"]), (1, 1))
        self.assertIn("head_dim 600 is outside 1 to 512", report["results"][0]["failure"])
        self.assertEqual(len(self.entries()), 1)
        text = self.attune("precompile", "--problem", "dtype=f32 head_dim=600", code=1).out
        self.assertIn("failed ", text)
        self.assertIn("head_dim 600", text)

    def test_a_disk_that_takes_nothing_is_a_failure(self):
        blocker = self.folder / "blocker"
        blocker.write_text("a file")
        outcome = self.attune("precompile", "--problem", PROBLEM, code=3,
                              ATTUNE_CACHE_DIR=str(blocker / "cache"))
        self.assertIn("could not be written; `attune doctor` says why", outcome.err)

    def test_what_was_precompiled_is_what_a_call_needs(self):
        source = Problem(head_dim=8).write(self.folder / "in.safetensors")
        self.attune("precompile", "--problem", PROBLEM)
        report = self.attune_json("attend", source, "-o", self.folder / "out.safetensors", ATTUNE_JIT="never")
        self.assertEqual((report["compiles"], report["cache_hits"]), (0, 1))


@needs_nvrtc
class PrecompileForGpus(CommandTest):

    def test_without_a_gpu(self):
        report = self.attune_json("precompile", "--problem", "dtype=bf16 head_dim=64 window_right=bounded",
                                  "--arch", "sm_80,sm_90a")
        self.assertEqual([(r["target"], r["candidate"].split("_")[0]) for r in report["results"]],
                         [("sm_80", "mma"), ("sm_90a", "mma")])
        self.assertEqual((report["compiled"], len(self.entries())), (2, 2))


if __name__ == "__main__":
    main()
