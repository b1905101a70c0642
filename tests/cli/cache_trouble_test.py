"""A hit in the cache saves the compiler, and no trouble of the disk costs a call more than a warning."""

import json
import signal
import subprocess
import time

from harness import COMMAND, CommandTest, Problem, environment, main, needs_cpu, read_safetensors, worst


@needs_cpu
class CacheTrouble(CommandTest):

    def setUp(self):
        super().setUp()
        self.problem = Problem(len_q=6, len_k=6)
        self.source = self.problem.write(self.folder / "in.safetensors")
        self.target = self.folder / "out.safetensors"

    def command(self):
        return ("attend", self.source, "-o", self.target, "--repeat", 1, "--json")

    def attend(self, **variables):
        """Runs, checks the result, and returns the report and the warnings."""
        self.target.unlink(missing_ok=True)
        outcome = self.attune(*self.command(), **variables)
        tensors, _ = read_safetensors(self.target)
        expected, expected_lse = self.problem.reference()
        self.assertLess(worst(tensors["output"][2], expected), 1e-5)
        self.assertLess(worst(tensors["lse"][2], expected_lse), 1e-5)
        return outcome.json(), outcome.err

    def assert_compiled(self, times, **variables):
        report, warnings = self.attend(**variables)
        self.assertEqual(report["compiles"], times)
        return warnings

    def test_the_second_process_compiles_nothing(self):
        self.assertEqual(self.assert_compiled(1), "")
        self.assertEqual(len(self.entries()), 1)
        report, warnings = self.attend()
        self.assertEqual((report["compiles"], report["cache_hits"], report["source"]), (0, 1, "disk"))
        self.assertEqual(warnings, "")

    def test_defective_entries_are_quarantined_and_compiled_again(self):
        self.assert_compiled(1)
        path, = self.entries()
        whole = path.read_bytes()
        middle = len(whole) // 2
        for what, data in (
            ("a flipped bit of the header", whole[:3] + bytes([whole[3] ^ 1]) + whole[4:]),
            ("a flipped bit of the metadata", whole[:200] + bytes([whole[200] ^ 0x40]) + whole[201:]),
            ("a flipped bit of the kernel", 
             whole[:middle] + bytes([whole[middle] ^ 0x80]) + whole[middle + 1:]),
            ("truncated", whole[:-1]),
            ("extended", whole + b"\0"),
            ("empty", b""),
            ("another file", b"#!/bin/sh\nexit 1\n" * 1000),
        ):
            with self.subTest(what=what):
                path.write_bytes(data)
                report, warnings = self.attend()
                self.assertEqual((report["compiles"], report["cache_defects"]), (1, 1))
                self.assertIn("attune: warn: ", warnings)
                self.assertIn(str(path), warnings)
                self.assertEqual(len(self.quarantined()), 1)
                self.assertEqual(self.quarantined()[0].read_bytes(), data)
                self.assertEqual(self.assert_compiled(0), "")  # the good entry is back

    def test_an_entry_under_a_wrong_key_is_refused(self):
        self.assert_compiled(1)
        path, = self.entries()
        other = Problem(len_q=6, len_k=6, head_dim=16).write(self.folder / "other.safetensors")
        self.attune("attend", other, "-o", self.folder / "other_out.safetensors")
        stranger = next(entry for entry in self.entries() if entry != path)
        path.write_bytes(stranger.read_bytes())
        self.assertIn("warn", self.assert_compiled(1))

    def test_unwritable_folders_cost_a_warning(self):
        blocker = self.folder / "blocker"
        blocker.write_text("a file")
        for what, folder in (("under a file", blocker / "cache"), ("a file", blocker)):
            with self.subTest(what=what):
                warnings = self.assert_compiled(1, ATTUNE_CACHE_DIR=str(folder))
                self.assertEqual(warnings.count("attune: warn: "), 1, warnings)
                self.assertIn(str(blocker), warnings)
        self.assertEqual(blocker.read_text(), "a file")

    def test_unsafe_folders_are_not_used(self):
        self.assert_compiled(1)
        self.cache.chmod(0o777)
        self.assertIn("others may write", self.assert_compiled(1))
        self.cache.chmod(0o700)
        self.assertEqual(self.assert_compiled(0), "")
        link = self.folder / "link"
        link.symlink_to(self.cache)
        self.assertIn("symbolic link", self.assert_compiled(1, ATTUNE_CACHE_DIR=str(link)))

    def test_no_folder_at_all(self):
        self.assertEqual(self.assert_compiled(1, ATTUNE_CACHE_DIR="", HOME="", XDG_CACHE_HOME=""), "")

    def test_modes(self):
        self.assert_compiled(1, ATTUNE_CACHE_MODE="off")
        self.assert_compiled(1, ATTUNE_CACHE_MODE="ro")
        self.assertFalse(self.cache.exists())
        self.assert_compiled(1, ATTUNE_CACHE_MODE="rw")
        self.assert_compiled(0, ATTUNE_CACHE_MODE="ro")
        self.assert_compiled(1, ATTUNE_CACHE_MODE="off")
        self.assert_compiled(1, ATTUNE_CACHE_MODE="refresh")
        self.assertEqual(len(self.entries()), 1)
        self.target.unlink()
        self.assert_fails(2, "ATTUNE_CACHE_MODE=sometimes: expected one of rw, ro, off, refresh",
                          *self.command(), ATTUNE_CACHE_MODE="sometimes")

    def test_bound(self):
        self.assert_compiled(1, ATTUNE_CACHE_MAX_SIZE="0")
        self.assertEqual(len(self.entries()), 1)
        other = Problem(len_q=6, len_k=6, head_dim=16).write(self.folder / "other.safetensors")
        self.attune("attend", other, "-o", self.target, ATTUNE_CACHE_MAX_SIZE="1K")
        self.assertEqual(self.entries(), [])
        self.assert_compiled(1)
        self.target.unlink()
        self.assert_fails(2, "ATTUNE_CACHE_MAX_SIZE=lots: expected a size such as 500M or 2G", *self.command(),
                          ATTUNE_CACHE_MAX_SIZE="lots")

    def test_jit(self):
        self.assert_fails(3, "`attune precompile --arch ", *self.command(), ATTUNE_JIT="never")
        self.assert_fails(3, "ATTUNE_JIT=never forbids compiling", *self.command(), ATTUNE_JIT="never")
        self.assert_compiled(1)
        self.assert_compiled(0, ATTUNE_JIT="never")
        self.assert_compiled(1, ATTUNE_JIT="always")
        self.assert_fails(2, "ATTUNE_JIT=maybe: expected one of auto, never, always", *self.command(),
                          ATTUNE_JIT="maybe")

    def test_recorded_problems_are_what_precompile_needs(self):
        record = self.folder / "problems.txt"
        self.assert_compiled(1, ATTUNE_RECORD=str(record), ATTUNE_CACHE_MODE="off")
        self.attune("precompile", record)
        self.assert_compiled(0, ATTUNE_JIT="never")

    def test_an_interrupted_precompile_leaves_a_whole_cache(self):
        problems = self.folder / "problems.txt"
        problems.write_text("".join(f"dtype=f32 head_dim={dim}\n" for dim in range(1, 65)))
        process = subprocess.Popen([COMMAND, "precompile", problems, "--jobs", "1"],
                                   env=environment(ATTUNE_CACHE_DIR=str(self.cache)),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(self.entries()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(timeout=60), -signal.SIGINT)
        kept = len(self.entries())
        self.assertGreaterEqual(kept, 2)
        self.assertLess(kept, 64)
        self.assertEqual(self.attune_json("cache", "verify")["defects"], [])
        self.assertEqual(self.attune_json("precompile", problems, "--check", code=1)["cached"], kept)

    def test_a_shared_cache_serves_and_stays_as_it_is(self):
        self.assert_compiled(1)
        shared = self.folder / "shared"
        self.cache.rename(shared)
        before = sorted((path, path.stat().st_ctime_ns) for path in shared.rglob("*"))
        report, warnings = self.attend(ATTUNE_CACHE_PATH=f"{self.folder}/none:{shared}", ATTUNE_JIT="never",
                                       ATTUNE_LOG="debug")
        self.assertEqual((report["compiles"], report["cache_hits"], report["source"]), (0, 1, "disk"))
        self.assertIn(f"is from {shared}", warnings)
        self.assertIn(f"ATTUNE_CACHE_PATH: cannot open the folder {self.folder}/none", warnings)
        self.assertFalse(self.cache.exists())  # nothing is copied
        self.assertEqual(before, sorted((path, path.stat().st_ctime_ns) for path in shared.rglob("*")))
        told = self.attune_json("explain", "--problem", "dtype=f32 head_dim=8 lse=write",
                                ATTUNE_CACHE_PATH=str(shared))
        self.assertEqual((told["state"], told["layer"]), ("cached", str(shared)))
        self.assertIn(f"cached, in {shared}", self.attune("explain", "--problem", "dtype=f32 head_dim=8 lse=write",
                                                         ATTUNE_CACHE_PATH=str(shared)).out)
        self.assert_compiled(1, ATTUNE_CACHE_PATH=str(shared), ATTUNE_CACHE_MODE="off")

    def attend_at_once(self, count, **variables):
        """Starts that many processes and checks what each computes. Their reports."""
        env = environment(ATTUNE_CACHE_DIR=str(self.cache), **variables)
        targets = [self.folder / f"out{i}.safetensors" for i in range(count)]
        processes = [subprocess.Popen([COMMAND, "attend", self.source, "-o", target, "--json"], env=env,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                     for target in targets]
        reports = []
        for process in processes:
            out, err = process.communicate(timeout=300)
            self.assertEqual((process.returncode, err), (0, b""))
            reports.append(json.loads(out))
        expected, _ = self.problem.reference()
        for target in targets:
            self.assertLess(worst(read_safetensors(target)[0]["output"][2], expected), 1e-5)
        return reports

    def test_many_processes_at_once_compile_once(self):
        reports = self.attend_at_once(64)
        self.assertEqual(sum(report["compiles"] for report in reports), 1)
        self.assertEqual(len(self.entries()), 1)
        self.attune("cache", "verify")

    def test_many_processes_at_once_where_locks_do_not_work(self):
        folder = self.cache / "v1"
        folder.mkdir(mode=0o700, parents=True)
        self.cache.chmod(0o700)
        (folder / "locks").touch()
        (folder / "locks").chmod(0o666)  # a lock file that others may write to is not used
        reports = self.attend_at_once(16)
        self.assertGreaterEqual(sum(report["compiles"] for report in reports), 1)
        self.assertEqual(len(self.entries()), 1)
        self.attune("cache", "verify")

    def test_many_processes_at_once_without_a_cache(self):
        reports = self.attend_at_once(4, ATTUNE_CACHE_MODE="off")
        self.assertEqual(sum(report["compiles"] for report in reports), 4)
        self.assertFalse(self.cache.exists())


if __name__ == "__main__":
    main()
