"""attune cache list, show, disasm, verify, prune and stats."""

import hashlib
import json
import os
import struct
import time

from harness import CommandTest, main, native_arch, needs_cpu, needs_nvrtc

PROBLEM = "dtype=f32 head_dim=8 lse=write"
OTHER = "dtype=f16 head_dim=16 head_dim_v=24 window_left=bounded window_right=bounded"


class EmptyCache(CommandTest):

    def test_nothing_to_list(self):
        self.assertEqual(self.attune("cache", "list").out, f"0 kernels, 0 B in {self.cache}\n")
        self.assertEqual(self.attune_json("cache", "list"),
                         {"root": str(self.cache), "bytes": 0, "entries": []})
        self.assertFalse(self.cache.exists())  # looking creates nothing

    def test_nothing_to_verify(self):
        self.assertEqual(self.attune("cache", "verify").out, "0 entries read, 0 defective\n")

    def test_no_such_key(self):
        self.assert_fails(2, "no kernel in", "cache", "show", "ab")
        self.assert_fails(2, "no kernel in", "cache", "disasm", "ab")

    def test_nothing_to_prune_or_to_count(self):
        self.assertEqual(self.attune("cache", "prune", "--max-size", 0).out, "removed 0 kernels, 0 B; 0 stay, 0 B\n")
        stats = self.attune_json("cache", "stats")
        self.assertEqual((stats["kernels"], stats["bytes"], stats["hits"], stats["compiles"]), (0, 0, 0, 0))
        self.assertRegex(self.attune("cache", "stats").out, r"(?m)^hits +0$")
        self.assertFalse(self.cache.exists())

    def test_no_folder(self):
        for command in (("list",), ("verify",), ("show", "ab"), ("disasm", "ab"), ("prune",), ("stats",)):
            with self.subTest(command=command):
                self.assert_fails(3, "there is no cache folder: set ATTUNE_CACHE_DIR or HOME", "cache",
                                  *command, ATTUNE_CACHE_DIR="", HOME="", XDG_CACHE_HOME="")

    def test_usage(self):
        self.assert_fails(2, "", "cache")
        self.assert_fails(2, "", "cache", "prune-everything")
        self.assert_fails(2, "KEY", "cache", "show")
        self.assert_fails(2, "--sort", "cache", "list", "--sort", "colour")
        self.assert_fails(2, "soon: expected a time such as 90s, 5min, 3h or 12d", "cache", "prune", "--older-than",
                          "soon")
        self.assert_fails(2, "-3h: expected a time", "cache", "list", "--unused-for=-3h")
        self.assert_fails(2, "big: expected a size such as 500M or 2G", "cache", "prune", "--max-size", "big")


@needs_cpu
class FullCache(CommandTest):

    def setUp(self):
        super().setUp()
        self.attune("precompile", "--problem", PROBLEM, "--problem", OTHER)

    def corrupt_first(self):
        path = self.entries()[0]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return path

    def test_list(self):
        listed = self.attune_json("cache", "list")
        self.assertEqual(listed["bytes"], sum(path.stat().st_size for path in self.entries()))
        self.assertEqual([entry["path"] for entry in listed["entries"]], [str(p) for p in self.entries()])
        for entry in listed["entries"]:
            self.assertEqual(set(entry), {"key", "path", "bytes", "hits", "modified_unix", "used_unix",
                                          "candidate", "target", "compiler", "spec"})
            self.assertEqual(entry["target"], native_arch())
            self.assertTrue(entry["compiler"].startswith("clang "), entry["compiler"])
        self.assertEqual({entry["spec"]["head_dim"] for entry in listed["entries"]}, {8, 16})
        text = self.attune("cache", "list").out
        self.assertIn("f32 K=8 lse", text)
        self.assertIn("f16 K=16 Kv=24 left right", text)
        self.assertIn(listed["entries"][0]["key"][:8], text)
        self.assertIn("2 kernels", text)

    def listed(self, *options):
        return [entry["spec"]["head_dim"] for entry in self.attune_json("cache", "list", *options)["entries"]]

    def test_filters(self):
        for options, head_dims in ((("--dtype", "f16"), [16]), (("--dtype", "f16,f32"), [8, 16]),
                                   (("--operation", "merge"), []), (("--family", "cpu"), [8, 16]),
                                   (("--target", "sm_90a"), []), (("--target", native_arch()), [8, 16]),
                                   (("--candidate", "cpu"), []), (("--unused-for", "1d"), []),
                                   (("--used-within", "1d"), [8, 16]), (("--at-least", "1G"), []),
                                   (("--at-most", "1G"), [8, 16]), (("--defective",), [])):
            with self.subTest(options=options):
                self.assertEqual(sorted(self.listed(*options)), head_dims)
        self.assertRegex(self.attune("cache", "list", "--dtype", "f16").out, r"(?m)^1 of 2 kernels, ")
        for option, wrong, text in (("--family", "mma,flash", "flash not in {cpu,simt,mma,sm90,merge,rows}"),
                                    ("--operation", "backward", "backward not in {forward,"),
                                    ("--dtype", "fp16", "fp16 not in {f32,f16,bf16}"),
                                    ("--target", "sm_10", "unknown architecture 'sm_10'")):
            self.assert_fails(2, f"{option}: {text}", "cache", "list", option, wrong)

        self.corrupt_first()
        entry, = self.attune_json("cache", "list", "--defective")["entries"]
        self.assertIn("defect", entry)

    def test_sorting(self):
        for head_dim, age in ((8, 3), (16, 7)):
            entry, = [e for e in self.attune_json("cache", "list")["entries"] if e["spec"]["head_dim"] == head_dim]
            past = time.time() - age * 86400
            os.utime(entry["path"], (past, past))
        sizes = [entry["bytes"] for entry in self.attune_json("cache", "list", "--sort", "size")["entries"]]
        self.assertEqual(sizes, sorted(sizes, reverse=True))
        self.assertEqual(self.listed("--sort", "used"), [16, 8])
        self.assertEqual(self.listed("--sort", "age", "--reverse"), [8, 16])
        self.assertEqual(self.listed("--unused-for", "5d"), [16])
        self.assertEqual(self.listed("--used-within", "5d"), [8])
        self.assertRegex(self.attune("cache", "list", "--dtype", "f16").out, r" 7 days +7 days +clang ")

    def test_hits(self):
        for _ in range(2):
            self.attune("precompile", "--problem", "dtype=f32 head_dim=8 lse=write")  # finds it
        self.assertEqual([(entry["spec"]["head_dim"], entry["hits"])
                          for entry in self.attune_json("cache", "list", "--sort", "hits")["entries"]], [(8, 2), (16, 0)])
        self.assertRegex(self.attune("cache", "list", "--dtype", "f32").out, r"B +2 +\d+ s")

    def test_show_regenerates_the_source(self):
        explained = self.attune_json("explain", "--problem", PROBLEM)
        self.assertEqual(self.attune_json("cache", "show", explained["key"], "--source")["source"],
                         explained["source"])
        self.assertIn(explained["source"], self.attune("cache", "show", explained["key"], "--source").out)

    def test_show_says_when_the_source_is_another_versions(self):
        path, = self.rewritten(lambda metadata: metadata["key_fields"].update(source="0" * 64))
        key = path.parent.name + path.name
        self.attune("cache", "show", key)
        self.assert_fails(3, "generates another one", "cache", "show", key, "--source")

    def test_show_knows_that_a_cpu_has_no_occupancy(self):
        key = self.attune_json("explain", "--problem", PROBLEM)["key"]
        self.assert_fails(2, "this is a kernel for a CPU", "cache", "show", key, "--gpu", "H100")

    def test_prune(self):
        dry = self.attune_json("cache", "prune", "--max-size", 0, "--dry-run")
        self.assertEqual((len(dry["removed"]), dry["kept"], len(self.entries())), (2, 0, 2))
        self.assertIn("would remove 2 kernels", self.attune("cache", "prune", "--max-size", 0, "--dry-run").out)
        self.assertEqual(self.attune_json("cache", "prune")["kept"], 2)  # far below the bound
        past = time.time() - 3 * 86400
        os.utime(self.entries()[0], (past, past))
        pruned = self.attune_json("cache", "prune", "--older-than", "2d")
        self.assertEqual((len(pruned["removed"]), pruned["kept"], len(self.entries())), (1, 1, 1))
        self.assertRegex(self.attune("cache", "prune", "--max-size", 0).out, r"^removed 1 kernels, .*; 0 stay, 0 B\n$")
        self.assertEqual(self.entries(), [])

    def test_prune_of_a_cache_that_is_not_written(self):
        outcome = self.attune("cache", "prune", "--max-size", 0, code=3, ATTUNE_CACHE_MODE="ro")
        self.assertTrue(outcome.err.startswith("attune: "))
        self.assertEqual(len(self.entries()), 2)

    def test_stats_over_processes(self):
        before = self.attune_json("cache", "stats")
        self.assertEqual((before["kernels"], before["compiles"], before["stores"]), (2, 2, 2))
        self.attune("precompile", "--problem", PROBLEM, "--problem", "dtype=f32 head_dim=24")
        after = self.attune_json("cache", "stats")
        self.assertEqual((after["kernels"], after["compiles"], after["hits"]), (3, 3, before["hits"] + 1))
        self.assertRegex(self.attune("cache", "stats").out, r"(?m)^compiles +3$")

    # ---- Disassembly ----

    def tool(self, name, text):
        path = self.folder / name
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)
        return path

    def test_disasm_hands_the_kernel_to_a_program(self):
        key = self.attune_json("explain", "--problem", PROBLEM)["key"]
        self.tool("llvm-objdump", 'echo "$#" "$1"; sha256sum < "$2"')
        told = self.attune_json("cache", "disasm", key, PATH=f"{self.folder}:{os.environ['PATH']}")
        digest = self.attune_json("cache", "show", key)["payload_sha256"]
        self.assertEqual((told["tool"], told["text"]), ("llvm-objdump", f"2 -d\n{digest}  -\n"))

    def test_disasm_reports_trouble(self):
        key = self.attune_json("explain", "--problem", PROBLEM)["key"]
        self.assert_fails(3, "no llvm-objdump and no objdump: install LLVM or binutils", "cache", "disasm", key,
                          PATH=str(self.folder))
        self.assert_fails(3, "--tool /nowhere/objdump: no such program", "cache", "disasm", key, "--tool",
                          "/nowhere/objdump")
        self.assert_fails(3, "failed with exit code 7", "cache", "disasm", key, "--tool",
                          self.tool("broken", "exit 7\n"))
        self.assert_fails(3, "failed with exit code 137", "cache", "disasm", key, "--tool",
                          self.tool("killed", "kill -9 $$\n"))

    def test_no_name_reaches_a_shell(self):
        key = self.attune_json("explain", "--problem", PROBLEM)["key"]
        self.assert_fails(3, "no such program", "cache", "disasm", key, "--tool", f"touch {self.folder}/owned;")
        self.assert_fails(2, "no kernel in", "cache", "disasm", f"$(touch {self.folder}/owned)")
        self.assertFalse((self.folder / "owned").exists())

    # ---- What is in an entry is data ----

    def rewritten(self, change):
        """Changes the metadata of the PROBLEM's entry, with digests that are right."""
        key = self.attune_json("explain", "--problem", PROBLEM)["key"]
        path = self.cache / "v1" / "objects" / key[:2] / key[2:]
        data = path.read_bytes()
        size, = struct.unpack("<Q", data[16:24])
        offset, = struct.unpack("<I", data[12:16])
        metadata = json.loads(data[128:128 + size])
        change(metadata)
        text = json.dumps(metadata, ensure_ascii=False).encode()
        self.assertLessEqual(128 + len(text), offset)
        header = data[:16] + struct.pack("<Q", len(text)) + data[24:96]
        digest = hashlib.sha256(header + text).digest()
        path.write_bytes(header + digest + text + bytes(offset - 128 - len(text)) + data[offset:])
        return [path]

    def test_control_characters_are_not_printed(self):
        def poison(metadata):
            metadata["candidate"] = "evil\x1b]0;title\x07\r\nmore"
            metadata["target"] = "x86\u009b31m"
            metadata["\x1b[2J"] = "\x7f"
            metadata["spec"]["dtype"] = "f32\x1b[8m"

        path, = self.rewritten(poison)
        key = path.parent.name + path.name
        for arguments in (("list",), ("show", key), ("list", "--json"), ("show", key, "--json"), ("verify",),
                          ("list", "--candidate", "\x1b[2J")):
            with self.subTest(arguments=arguments):
                out = self.attune("cache", *arguments).out
                for character in "\x1b\x07\r\x9b":
                    self.assertNotIn(character, out)
        self.assertIn(r"evil\x1b]0;title\x07\x0d\x0amore", self.attune("cache", "list").out)
        outcome = self.attune("cache", "show", "\x1b[2J", code=2)
        self.assertIn(r"begins with \x1b[2J", outcome.err)

    def test_metadata_that_is_not_ours(self):
        for change in (lambda m: m.clear(), lambda m: m.update(spec=[1], compile="x", candidate=7),
                       lambda m: m.update(spec={"dtype": {}}, key_fields=3)):
            path, = self.rewritten(change)
            key = path.parent.name + path.name
            self.attune("cache", "list", "--family", "cpu", "--sort", "candidate")
            self.attune("cache", "list")
            self.attune("cache", "show", key)
            self.assert_fails(3, "generated this kernel's source", "cache", "show", key, "--source")

    def test_show(self):
        key = self.attune_json("explain", "--problem", PROBLEM)["key"]
        shown = self.attune_json("cache", "show", key[:12])
        self.assertEqual(shown["key"], key)
        data = self.cache.joinpath("v1", "objects", key[:2], key[2:]).read_bytes()
        payload = data[-shown["payload_bytes"]:]
        self.assertEqual(payload[:4], b"\x7fELF")
        self.assertEqual(shown["payload_sha256"], hashlib.sha256(payload).hexdigest())
        self.assertEqual(shown["metadata"]["spec"]["head_dim"], 8)
        self.assertNotIn("cubin", shown)
        text = self.attune("cache", "show", key[:12]).out
        self.assertRegex(text, r"(?m)^spec.head_dim +8$")
        self.assertTrue(text.startswith("key "), text)
        entry = self.entries()[0]
        entry.with_name("0" * 62).write_bytes(entry.read_bytes())  # another key with the same first digits
        self.assert_fails(2, "is ambiguous", "cache", "show", entry.parent.name)

    def test_verify(self):
        self.assertEqual(self.attune("cache", "verify").out, "2 entries read, 0 defective\n")
        bad = self.corrupt_first()
        text = self.attune("cache", "verify", code=1).out
        self.assertIn(f"defective {bad}: ", text)
        self.assertIn("2 entries read, 1 defective", text)
        self.assertTrue(bad.exists())  # only told to, it moves anything
        self.assertIn("defective", self.attune("cache", "list").out)
        self.assert_fails(1, "is defective", "cache", "show", bad.parent.name + bad.name)

        report = self.attune_json("cache", "verify", "--quarantine", code=1)
        self.assertEqual((report["entries"], len(report["defects"])), (2, 1))
        self.assertIs(report["defects"][0]["quarantined"], True)
        self.assertFalse(bad.exists())
        self.assertEqual(len(self.quarantined()), 1)
        self.assertEqual(self.attune("cache", "verify").out, "1 entries read, 0 defective\n")


@needs_nvrtc
class CubinInTheCache(CommandTest):

    def test_show_reads_the_resources(self):
        self.attune("precompile", "--problem", "dtype=f16 head_dim=64", "--arch", "sm_80")
        key = self.attune_json("cache", "list")["entries"][0]["key"]
        cubin = self.attune_json("cache", "show", key)["cubin"]
        self.assertEqual(cubin["sm"], 80)
        self.assertGreater(cubin["kernels"]["attune_kernel"]["registers"], 16)
        self.assertGreater(cubin["kernels"]["attune_kernel"]["instructions"]["float32"], 0)
        text = self.attune("cache", "show", key).out
        self.assertIn("registers", text)
        self.assertRegex(text, r"(?m)^occupancy.gpu +sm_80$")

    def test_occupancy_on_a_gpu(self):
        self.attune("precompile", "--problem", "dtype=f16 head_dim=64", "--arch", "sm_80")
        key = self.attune_json("cache", "list")["entries"][0]["key"]
        own = self.attune_json("cache", "show", key)["occupancy"]
        self.assertEqual(set(own), {"gpu", "blocks_per_sm", "warps_per_sm", "max_warps_per_sm", "limited_by"})
        self.assertEqual(own["max_warps_per_sm"], 64)
        self.assertGreaterEqual(own["blocks_per_sm"], 1)
        other = self.attune_json("cache", "show", key, "--gpu", "rtx 4090")["occupancy"]
        self.assertEqual((other["gpu"], other["max_warps_per_sm"]), ("rtx 4090", 48))
        self.assertLessEqual(other["blocks_per_sm"], own["blocks_per_sm"])
        self.assert_fails(2, "a kernel for sm_80 does not run on compute capability 9.0", "cache", "show", key, "--gpu",
                          "H100")
        self.assert_fails(2, "unknown GPU 'Voodoo 2': known are sm_60 to sm_121 and P100", "cache", "show", key, "--gpu",
                          "Voodoo 2")

    def test_disasm_wants_cudas_tools(self):
        self.attune("precompile", "--problem", "dtype=f16 head_dim=64", "--arch", "sm_80")
        key = self.attune_json("cache", "list")["entries"][0]["key"]
        tool = self.folder / "nvdisasm"
        tool.write_text('#!/bin/sh\necho "$#"; head -c 4 "$1" | od -c\n')
        tool.chmod(0o755)
        told = self.attune_json("cache", "disasm", key, PATH=f"{self.folder}:{os.environ['PATH']}")
        self.assertEqual(told["tool"], "nvdisasm")
        self.assertRegex(told["text"], r"^1\n0000000 177   E   L   F\n")


if __name__ == "__main__":
    main()
