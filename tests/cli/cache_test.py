"""attune cache list, show and verify."""

import hashlib

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

    def test_no_folder(self):
        for command in (("list",), ("verify",), ("show", "ab")):
            with self.subTest(command=command):
                self.assert_fails(3, "there is no cache folder: set ATTUNE_CACHE_DIR or HOME", "cache",
                                  *command, ATTUNE_CACHE_DIR="", HOME="", XDG_CACHE_HOME="")

    def test_usage(self):
        self.assert_fails(2, "", "cache")
        self.assert_fails(2, "", "cache", "prune-everything")
        self.assert_fails(2, "KEY", "cache", "show")


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
            self.assertEqual(set(entry), {"key", "path", "bytes", "modified_unix", "candidate", "target",
                                          "compiler", "spec"})
            self.assertEqual(entry["target"], native_arch())
            self.assertTrue(entry["compiler"].startswith("clang "), entry["compiler"])
        self.assertEqual({entry["spec"]["head_dim"] for entry in listed["entries"]}, {8, 16})
        text = self.attune("cache", "list").out
        self.assertIn("f32 K=8 lse", text)
        self.assertIn("f16 K=16 Kv=24 left right", text)
        self.assertIn(listed["entries"][0]["key"][:8], text)
        self.assertIn("2 kernels", text)

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
        self.assert_fails(2, "is ambiguous", "cache", "show", "")

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
        self.assertIn("registers", self.attune("cache", "show", key).out)


if __name__ == "__main__":
    main()
