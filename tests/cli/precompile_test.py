"""attune precompile: lists, presets, summaries, failures and interrupts that lose nothing, and kernels that are
then there."""

import functools
import hashlib
import json
import pathlib
import re
import signal
import struct
import subprocess
import time

from harness import COMMAND, CommandTest, Problem, environment, finding, main, native_arch, needs_cpu, needs_nvrtc

PROBLEM = "dtype=f32 head_dim=8 lse=write"
OTHER = "dtype=f32 head_dim=16"


def key_of(fields):
    """The key that a kernel with these key_fields has."""
    stream = b""
    for tag in ("schema", "target", "spec", "source", "headers", "compiler", "options"):
        for text in (tag.encode(), fields[tag].encode()):
            stream += struct.pack("<Q", len(text)) + text
    return hashlib.sha256(stream).hexdigest()


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
            self.assert_fails(2, "no problems: name a LIST, or give --preset or --problem", "precompile", *arguments)
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
        tally = {"kernels", "hits", "compiled", "failed", "left", "compile_seconds", "bytes"}
        self.assertEqual(set(first), tally | {"seconds", "store_errors", "targets", "results"})
        self.assertEqual(set(first["targets"][native_arch()]), tally)
        self.assertGreater(first["compile_seconds"], 0)
        self.assertEqual((first["kernels"], first["compiled"], first["hits"], first["failed"]), (2, 2, 0, 0))
        self.assertEqual([result["problem"] for result in first["results"]], [PROBLEM, OTHER])
        self.assertEqual(len(self.entries()), 2)
        second = self.attune_json("precompile", path)
        self.assertEqual((second["compiled"], second["hits"]), (0, 2))
        self.assertEqual(second["bytes"], first["bytes"])
        self.assertEqual(second["compile_seconds"], 0)
        self.assertRegex(self.attune("precompile", path).out,
                         r"(?s)^target +kernels  hits  compiled  failed  compile time +size\n"
                         rf"{native_arch()} +2 +2 +0 +0 +0 ms +\S+ kB\n2 problems in \d+ ms\n$")

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
        self.assertEqual({target: tally["compiled"] for target, tally in report["targets"].items()},
                         {"x86-64-v3": 1, "x86-64-v4": 1})
        text = self.attune("precompile", "--problem", PROBLEM, "--arch", "x86-64-v3,x86-64-v4").out
        self.assertRegex(text, r"(?m)^together +2 +2 +0 +0 ")

    def test_problems_that_share_a_kernel_are_compiled_once(self):
        problems = ("--problem", PROBLEM, "--problem", PROBLEM + " families=cpu")
        report = self.attune_json("precompile", *problems)
        self.assertEqual((report["kernels"], report["compiled"], len(report["results"])), (1, 1, 2))
        self.assertEqual(report["results"][0]["key"], report["results"][1]["key"])
        self.assertEqual(len(self.entries()), 1)

    def test_one_failure_stops_nothing(self):
        report = self.attune_json("precompile", "--problem", "dtype=f32 head_dim=600", "--problem", PROBLEM,
                                  code=1)
        self.assertEqual((report["failed"], report["compiled"]), (1, 1))
        self.assertIn("head_dim 600 is outside 1 to 512", report["results"][0]["failure"])
        self.assertEqual(len(self.entries()), 1)
        text = self.attune("precompile", "--problem", "dtype=f32 head_dim=600", code=1).out
        self.assertIn("failed ", text)
        self.assertIn("head_dim 600", text)

    def test_the_same_reason_is_told_once(self):
        text = self.attune("precompile", "--problem", "dtype=f32 head_dim=600", "--problem",
                           "dtype=f16 head_dim=600", code=1).out
        self.assertEqual((text.count("failed x86"), text.count("no kernel for")), (2, 2))
        text = self.attune("precompile", "--problem", PROBLEM, "--problem", OTHER, "--arch", "sm_80", code=3,
                           ATTUNE_NVRTC="/nowhere/libnvrtc.so").out
        self.assertEqual((text.count("failed sm_80"), text.count("no usable NVRTC for sm_80")), (2, 1))

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


@needs_cpu
class RecordedProgram(CommandTest):
    """What ATTUNE_RECORD wrote of a program is exactly what the next run of it needs."""

    def run_program(self, **variables):
        """Forward and backward with and without a mask, in two types; returns the kernels loaded and compiled."""
        compiles, hits = 0, 0
        for dtype in ("F32", "BF16"):
            source = Problem(head_dim=8, len_q=6, len_k=6, dtype=dtype).write(self.folder / "in.safetensors")
            for options in (("--bias", "lower_triangular"), ("--backward",), ("--p", 0.25, "--backward")):
                report = self.attune_json("attend", source, "-o", self.folder / "out.safetensors", "--repeat", 1,
                                          *options, **variables)
                compiles, hits = compiles + report["compiles"], hits + report["cache_hits"]
        return compiles, hits

    def test_forward_and_backward(self):
        record = self.folder / "record"
        compiled, hits = self.run_program(ATTUNE_RECORD=str(record), ATTUNE_CACHE_MODE="off")
        self.assertGreater(compiled, 10)
        self.assertEqual((hits, self.entries()), (0, []))
        report = self.attune_json("precompile", record)
        self.assertEqual((report["compiled"], report["failed"]), (len(self.entries()), 0))
        keys = {path.parent.name + path.name for path in self.entries()}
        compiled, hits = self.run_program(ATTUNE_JIT="never")
        self.assertEqual(compiled, 0)
        self.assertGreater(hits, 10)

        # And nothing else: a fresh run of the program fills a cache with the same kernels.
        self.cache = self.folder / "fresh"
        self.run_program()
        self.assertEqual({path.parent.name + path.name for path in self.entries()}, keys)


class Presets(CommandTest):

    def test_their_names(self):
        listed = self.attune_json("precompile", "--list")["presets"]
        names = [preset["name"] for preset in listed]
        for name in ("llama", "mistral", "bert", "stable-diffusion", "whisper", "decoding"):
            self.assertIn(name, names)
        for preset in listed:
            self.assertLessEqual({"head_dims", "dtypes", "masks"}, set(preset["sources"]))
        text = self.attune("precompile", "--list").out
        self.assertRegex(text, r"(?m)^llama +64 128 +bf16 f16 +Llama")
        self.assertRegex(text, r"(?m)^deepseek +192/128 ")
        self.assertFalse(self.cache.exists())

    def test_one_of_them(self):
        text = self.attune("precompile", "--preset", "llama", "--list").out
        self.assertTrue(text.startswith("# preset llama\n# Llama"), text)
        self.assertIn("# head_dims: ", text)
        lines = self.attune_json("precompile", "--preset", "llama", "--list")["problems"]
        self.assertEqual(lines, [line for line in text.splitlines() if not line.startswith("#")])
        self.assertIn("dtype=bf16 head_dim=128 window_right=bounded blocks=varlen keys=paged boxes=1", lines)
        self.assertIn("operation=backward dtype=bf16 head_dim=64 window_right=bounded boxes=1", lines)
        self.assertFalse(self.cache.exists())

    def test_what_is_listed_is_a_list(self):
        path = self.folder / "problems"
        path.write_text(self.attune("precompile", "--preset", "mistral,t5", "--problem", PROBLEM, "--list").out)
        lines = self.attune_json("precompile", path, "--list")["problems"]
        self.assertEqual(lines, self.attune_json("precompile", "--preset", "mistral", "--preset", "t5", "--problem",
                                                 PROBLEM, "--list")["problems"])
        self.assertEqual(lines[-1], PROBLEM)

    def test_mistakes(self):
        self.assert_fails(2, "--preset lama: no such preset; `attune precompile --list` names them", "precompile",
                          "--preset", "llama,lama")
        self.assert_fails(2, "--list", "precompile", "--preset", "llama", "--list", "--check")

    @needs_cpu
    def test_a_model_finds_its_kernels(self):
        report = self.attune_json("precompile", "--preset", "whisper")
        self.assertEqual(report["failed"], 0)
        for dtype in ("F32", "F16", "BF16"):
            source = Problem(head_dim=64, dtype=dtype).write(self.folder / "in.safetensors")
            for options in ((), ("--bias", "lower_triangular"), ("--backward",)):
                report = self.attune_json("attend", source, "-o", self.folder / "out.safetensors", "--repeat", 1,
                                          *options, ATTUNE_JIT="never")
                self.assertEqual(report["compiles"], 0)


@needs_cpu
class Check(CommandTest):

    PROBLEMS = ("--problem", PROBLEM, "--problem", OTHER)

    def test_what_is_missing(self):
        text = self.attune("precompile", *self.PROBLEMS, "--check", code=1).out
        self.assertRegex(text, rf"(?m)^missing  {native_arch()}  cpu_\S+ +{PROBLEM}$")
        self.assertIn("2 kernels: 0 in the cache, 2 would be compiled at run time\n", text)
        self.assertFalse(self.cache.exists())

        self.attune("precompile", "--problem", PROBLEM)
        report = self.attune_json("precompile", *self.PROBLEMS, "--check", code=1)
        self.assertEqual((report["kernels"], report["cached"], report["failed"]), (2, 1, []))
        self.assertEqual([missing["problem"] for missing in report["missing"]], [OTHER])
        self.assertEqual(set(report["missing"][0]), {"problem", "target", "key", "candidate"})
        self.assertEqual(len(self.entries()), 1)

        self.attune("precompile", *self.PROBLEMS)
        self.assertEqual(self.attune("precompile", *self.PROBLEMS, "--check").out,
                         "2 kernels: 2 in the cache, 0 would be compiled at run time\n")

    def test_a_defective_entry_is_missing(self):
        self.attune("precompile", "--problem", PROBLEM)
        path, = self.entries()
        path.write_bytes(path.read_bytes()[:-1])
        self.attune("precompile", "--problem", PROBLEM, "--check", code=1)
        self.assertTrue(path.exists())

    def test_what_no_kernel_serves(self):
        text = self.attune("precompile", "--problem", "dtype=f32 head_dim=600", "--check", code=1).out
        self.assertIn("head_dim 600 is outside 1 to 512", text)
        self.assertIn("0 kernels: 0 in the cache", text)

    def test_a_cache_that_nobody_reads(self):
        self.attune("precompile", *self.PROBLEMS)
        for mode in ("off", "refresh"):
            self.assert_fails(3, "no program would read the cache", "precompile", *self.PROBLEMS, "--check",
                              ATTUNE_CACHE_MODE=mode)
        self.attune("precompile", *self.PROBLEMS, "--check", ATTUNE_CACHE_MODE="ro")


@needs_cpu
class Interrupted(CommandTest):
    """However it ends, what was compiled is there, and the same command compiles the rest."""

    TOTAL = 12

    def arguments(self):
        problems = [f"--problem=dtype=f32 head_dim={8 + i}" for i in range(self.TOTAL)]
        return ["precompile", *problems, "--jobs", "1", "--json"]

    def end_early(self, signal_number):
        """Sends the signal once two kernels are there; returns what it left."""
        with subprocess.Popen([COMMAND, *self.arguments()], env=environment(ATTUNE_CACHE_DIR=str(self.cache)),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while len(self.entries()) < 2 and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal_number)
            out, err = process.communicate(timeout=300)
        self.assertEqual(process.returncode, -signal_number)
        done = len(self.entries())
        self.assertGreaterEqual(done, 2)
        self.assertLess(done, self.TOTAL)
        return done, out, err

    def assert_resumes(self, done):
        report = self.attune(*self.arguments()).json()
        self.assertEqual((report["hits"], report["compiled"], report["failed"]), (done, self.TOTAL - done, 0))
        self.assertEqual(self.attune_json("cache", "verify")["defects"], [])

    def test_killed(self):
        done, out, _ = self.end_early(signal.SIGKILL)
        self.assertEqual(out, "")
        self.assert_resumes(done)

    def test_asked_to_end(self):
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(signal=signal_number):
                self.cache = self.folder / signal_number.name
                done, out, err = self.end_early(signal_number)
                report = json.loads(out)  # whole: the kernel in work was finished
                self.assertEqual((report["compiled"], report["left"]), (done, self.TOTAL - done))
                self.assertEqual(err, "attune: interrupted; the same command compiles what is left\n")
                self.assert_resumes(done)


class WithoutCompiler(CommandTest):

    def test_is_the_environments_fault(self):
        problems = ("--problem", PROBLEM, "--problem", OTHER, "--arch", "sm_80")
        text = self.attune("precompile", *problems, code=3, ATTUNE_NVRTC="/nowhere/libnvrtc.so").out
        self.assertIn("no usable NVRTC for sm_80", text)
        report = self.attune_json("precompile", *problems, "--check", code=3, ATTUNE_NVRTC="/nowhere/libnvrtc.so")
        self.assertEqual((report["kernels"], len(report["failed"])), (0, 2))


@needs_nvrtc
class PrecompileForGpus(CommandTest):

    def test_without_a_gpu(self):
        report = self.attune_json("precompile", "--problem", "dtype=bf16 head_dim=64 window_right=bounded",
                                  "--arch", "sm_80,sm_90a")
        self.assertEqual([(r["target"], r["candidate"].split("_")[0]) for r in report["results"]],
                         [("sm_80", "mma"), ("sm_90a", "mma")])
        self.assertEqual((report["compiled"], len(self.entries())), (2, 2))

    def test_hits_open_no_nvrtc(self):
        for cache in ("cold", "warm"):
            self.attune("precompile", "--problem", "dtype=f32 head_dim=40", "--arch", "sm_90a",
                        LD_DEBUG="files", LD_DEBUG_OUTPUT=self.folder / cache)  # the loader's log
            log = "".join(path.read_text() for path in self.folder.glob(f"{cache}.*"))
            self.assertEqual(re.findall(r"calling init: .*/(libnvrtc\.so)", log), ["libnvrtc.so"] * (cache == "cold"))

    def test_an_nvrtc_that_is_not_what_its_folder_says(self):
        """The look at its file then gives another key. Damage under that one is met, and costs no more than a compile."""
        nvrtc = pathlib.Path(finding("gpu compiler")["found"].rpartition(" ")[2])
        folder = self.folder / "nvrtc"
        folder.mkdir()
        (folder / nvrtc.name).symlink_to(nvrtc)
        (folder / nvrtc.name.replace("nvrtc.so", "nvrtc-builtins.so")).with_suffix(nvrtc.suffix + ".99").touch()
        run = functools.partial(self.attune_json, "precompile", "--problem", "dtype=f32 head_dim=40", "--arch", "sm_80",
                                LD_LIBRARY_PATH=f"{folder}:{nvrtc.parent}")
        self.assertEqual(run()["compiled"], 1)
        entry, = self.entries()
        fields = self.attune_json("cache", "show", entry.parent.name + entry.name)["metadata"]["key_fields"]
        self.assertEqual(key_of(fields), entry.parent.name + entry.name)

        fields["compiler"] = re.sub(r"\.\d+", ".99", fields["compiler"], count=1)
        name = key_of(fields)
        damaged = entry.parent.parent / name[:2] / name[2:]
        damaged.parent.mkdir(mode=0o700, exist_ok=True)
        damaged.write_bytes(entry.read_bytes())
        damaged.chmod(0o600)
        self.assertEqual(run()["compiled"], 1)
        self.assertEqual(self.quarantined(), [self.cache / "v1" / "quarantine" / name])
        self.assertEqual(self.entries(), [entry])
        self.assertEqual(run()["hits"], 1)

    def test_both_majors_of_nvrtc(self):
        problem = ("--problem", "dtype=f16 head_dim=32")
        if self.attune_json("explain", *problem, "--arch", "sm_60").get("compiler_problem"):
            self.skipTest("no NVRTC 12 here, which compiles for Pascal and Volta")
        report = self.attune_json("precompile", *problem, "--arch", "sm_60,sm_70,sm_90a")
        self.assertEqual((report["compiled"], report["failed"]), (3, 0))
        entries = self.attune_json("cache", "list")["entries"]
        majors = {entry["target"]: entry["compiler"].split()[1].split(".")[0] for entry in entries}
        self.assertEqual(majors, {"sm_60": "12", "sm_70": "12", "sm_90a": "13"})


if __name__ == "__main__":
    main()
