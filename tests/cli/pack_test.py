"""attune cache pack and unpack."""

import os
import re
import subprocess

from harness import CommandTest, Problem, main, native_arch, needs_cpu, needs_nvrtc

PROBLEM = "dtype=f32 head_dim=8 lse=write"
OTHER = "dtype=f16 head_dim=16"


def openssl(*arguments):
    return subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True).stdout


class PackTest(CommandTest):

    def setUp(self):
        super().setUp()
        self.pack = self.folder / "the.pack"

    def key_pair(self, name):
        """Files of an Ed25519 key: private, public."""
        private, public = self.folder / f"{name}.pem", self.folder / f"{name}.pub.pem"
        openssl("genpkey", "-algorithm", "ed25519", "-out", private)
        openssl("pkey", "-in", private, "-pubout", "-out", public)
        return private, public

    def files_of(self, root):
        """The entries under a cache folder: name -> bytes."""
        objects = root / "v1" / "objects"
        return {str(path.relative_to(objects)): path.read_bytes() for path in objects.glob("*/*")}


class NothingToPack(PackTest):

    def test_empty_cache(self):
        self.assert_fails(2, f"no kernel to pack in {self.cache}; `attune cache list` shows them", "cache",
                          "pack", self.pack)
        self.assert_fails(2, "no kernel in", "cache", "pack", self.pack, "ab")
        self.assertFalse(self.pack.exists())

    def test_usage(self):
        self.assert_fails(2, "OUT", "cache", "pack")
        self.assert_fails(2, "PACK", "cache", "unpack")

    def test_what_is_no_pack(self):
        self.assert_fails(3, "No such file", "cache", "unpack", self.pack)
        self.pack.write_bytes(b"x" * 1000)
        self.assert_fails(3, f"{self.pack}: pack refused: not a pack (magic)", "cache", "unpack", self.pack)
        self.assertFalse(self.cache.exists())


@needs_cpu
class Pack(PackTest):

    def setUp(self):
        super().setUp()
        self.attune("precompile", "--problem", PROBLEM, "--problem", OTHER)
        self.keys = [path.parent.name + path.name for path in self.entries()]

    def test_there_and_back(self):
        text = self.attune("cache", "pack", self.pack).out
        self.assertRegex(text, rf"^{self.pack}: 2 kernels for {native_arch()}, [0-9.]+ kB\n$")
        self.assertEqual(self.pack.stat().st_mode & 0o7022, 0)  # nobody else may write to it
        into = self.folder / "copy"
        self.assertEqual(self.attune("cache", "unpack", self.pack, "--into", into).out,
                         f"2 kernels in {into}\n")
        self.assertEqual(self.files_of(into), self.files_of(self.cache))
        self.assertEqual(self.attune("cache", "verify", ATTUNE_CACHE_DIR=str(into)).out,
                         "2 entries read, 0 defective\n")
        # Without --into: the cache's own folder.
        own = self.folder / "own"
        report = self.attune_json("cache", "unpack", self.pack, ATTUNE_CACHE_DIR=str(own))
        self.assertEqual((report["root"], report["kernels"], report["signed"]), (str(own), 2, False))
        self.assertEqual(self.files_of(own), self.files_of(self.cache))

    def test_the_same_kernels_are_the_same_bytes(self):
        first = self.attune_json("cache", "pack", self.pack)
        again = self.folder / "again.pack"
        self.attune("cache", "pack", again, *reversed(self.keys))
        self.assertEqual(again.read_bytes(), self.pack.read_bytes())
        self.assertEqual(first["bytes"], self.pack.stat().st_size)
        # Neither a path nor a time of this machine.
        self.attune("cache", "unpack", self.pack, "--into", self.folder / "copy")
        self.attune("cache", "pack", again, ATTUNE_CACHE_DIR=str(self.folder / "copy"))
        self.assertEqual(again.read_bytes(), self.pack.read_bytes())

    def test_manifest_and_list(self):
        manifest = self.attune_json("cache", "pack", self.pack)["manifest"]
        self.assertEqual(set(manifest), {"attune", "zstd", "builds", "targets", "kernels"})
        self.assertEqual((manifest["kernels"], manifest["targets"]), (2, [native_arch()]))
        listed = self.attune_json("cache", "unpack", self.pack, "--list")
        self.assertEqual(listed["manifest"], manifest)
        self.assertEqual([entry["key"] for entry in listed["entries"]], self.keys)
        text = self.attune("cache", "unpack", self.pack, "--list").out
        self.assertIn("f32 K=8 lse", text)
        self.assertTrue(text.endswith(f"2 kernels in {self.pack}, not signed\n"), text)

    def test_choose_by_key_and_architecture(self):
        self.attune("cache", "pack", self.pack, self.keys[1][:10])
        listed = self.attune_json("cache", "unpack", self.pack, "--list")
        self.assertEqual([entry["key"] for entry in listed["entries"]], [self.keys[1]])
        self.attune("cache", "pack", self.pack, "--arch", f"sm_80,{native_arch()}")
        self.assertEqual(len(self.attune_json("cache", "unpack", self.pack, "--list")["entries"]), 2)
        self.assert_fails(2, "no kernel to pack in", "cache", "pack", self.pack, "--arch", "sm_80")
        self.assert_fails(2, "KEY: the value is empty", "cache", "pack", self.pack, "")

    def test_a_defect_stops_it(self):
        path = self.entries()[0]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        self.assert_fails(1, f"{path} is defective", "cache", "pack", self.pack)
        self.assertFalse(self.pack.exists())

    def test_a_damaged_pack(self):
        self.attune("cache", "pack", self.pack)
        good = self.pack.read_bytes()
        self.pack.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        self.assert_fails(3, f"pack entry {self.keys[1]} refused: checksum", "cache", "unpack", self.pack)
        self.pack.write_bytes(good[:-1])
        self.assert_fails(3, "pack refused: entry 1 has", "cache", "unpack", self.pack)
        os.chmod(self.pack, 0o666)
        self.assert_fails(3, "others may write to", "cache", "unpack", self.pack)

    def test_places_that_are_not_written(self):
        self.attune("cache", "pack", self.pack)
        for mode in ("ro", "off"):
            self.assert_fails(3, "the cache is not written", "cache", "unpack", self.pack,
                              ATTUNE_CACHE_MODE=mode)
        link = self.folder / "link"
        link.symlink_to(self.cache)
        self.assert_fails(3, "is a symbolic link", "cache", "unpack", self.pack, "--into", link)
        self.assert_fails(3, "cannot create a file in", "cache", "pack", self.folder / "none" / "the.pack")

    def test_signatures(self):
        private, public = self.key_pair("ours")
        _, other = self.key_pair("theirs")
        text = self.attune("cache", "pack", self.pack, "--sign", private).out
        self.assertTrue(text.endswith(", signed\n"), text)
        ours = {"ATTUNE_PACK_KEY": str(public)}
        self.assertIs(self.attune_json("cache", "unpack", self.pack, "--list", **ours)["signed"], True)
        self.assert_fails(3, "it is not signed with the key of ATTUNE_PACK_KEY", "cache", "unpack", self.pack,
                          ATTUNE_PACK_KEY=str(other))
        unsigned = self.folder / "unsigned.pack"
        self.attune("cache", "pack", unsigned)
        self.assert_fails(3, "it is not signed, and ATTUNE_PACK_KEY asks for a signature", "cache", "unpack",
                          unsigned, **ours)
        # Signing changes nothing but the header, and is the same each time.
        self.assertEqual(self.pack.read_bytes()[160:], unsigned.read_bytes()[160:])
        first = self.pack.read_bytes()
        self.attune("cache", "pack", self.pack, "--sign", private)
        self.assertEqual(self.pack.read_bytes(), first)

    def test_the_signature_is_openssls(self):
        private, public = self.key_pair("ours")
        self.attune("cache", "pack", self.pack, "--sign", private)
        data = self.pack.read_bytes()
        message, signature = self.folder / "message", self.folder / "signature"
        message.write_bytes(data[:64])
        signature.write_bytes(data[64:128])
        verdict = openssl("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", message,
                          "-sigfile", signature)
        self.assertTrue(re.search(b"Verified Successfully", verdict), verdict)

    def test_what_is_no_key(self):
        private, public = self.key_pair("ours")
        self.assert_fails(2, f"{public}: not an Ed25519 private key", "cache", "pack", self.pack, "--sign",
                          public)
        self.assert_fails(2, "cannot open", "cache", "pack", self.pack, "--sign", self.folder / "none")
        self.attune("cache", "pack", self.pack, "--sign", private)
        self.assert_fails(3, f"ATTUNE_PACK_KEY: {private}: not an Ed25519 public key", "cache", "unpack",
                          self.pack, ATTUNE_PACK_KEY=str(private))
        self.assert_fails(3, "ATTUNE_PACK_KEY: cannot open", "cache", "unpack", self.pack,
                          ATTUNE_PACK_KEY=str(self.folder / "none"))


@needs_cpu
class CallFromAPack(PackTest):

    def test_no_compiler_runs(self):
        """Precompiled and packed here; there, an empty cache and no leave to compile."""
        problem = Problem(len_q=3, len_k=5).write(self.folder / "in.safetensors")
        private, public = self.key_pair("ours")
        here = self.attune_json("attend", problem, "-o", self.folder / "here.safetensors")
        self.assertEqual(here["compiles"], 1)
        self.attune("cache", "pack", self.pack, "--sign", private)

        there = {"ATTUNE_CACHE_DIR": str(self.folder / "empty"), "ATTUNE_JIT": "never"}
        self.assert_fails(3, "is not in the cache and ATTUNE_JIT=never", "attend", problem, "-o",
                          self.folder / "none", **there)
        with_pack = there | {"ATTUNE_CACHE_PATH": str(self.pack), "ATTUNE_PACK_KEY": str(public)}
        call = self.attune_json("attend", problem, "-o", self.folder / "there.safetensors", **with_pack)
        self.assertEqual((call["source"], call["compiles"], call["cache_hits"]), ("disk", 0, 1))
        self.assertEqual((self.folder / "there.safetensors").read_bytes(),
                         (self.folder / "here.safetensors").read_bytes())
        self.assertFalse((self.folder / "empty").exists())  # a pack's kernel is not copied

        _, other = self.key_pair("theirs")
        self.assert_fails(3, "is not in the cache and ATTUNE_JIT=never", "attend", problem, "-o",
                          self.folder / "none", **with_pack | {"ATTUNE_PACK_KEY": str(other)})


@needs_nvrtc
class PackForGpus(PackTest):

    def test_without_a_gpu(self):
        """Two architectures on a machine that has neither: packed, carried, whole."""
        self.attune("precompile", "--problem", "dtype=f16 head_dim=64", "--arch", "sm_90a,sm_80")
        packed = self.attune_json("cache", "pack", self.pack)["manifest"]
        self.assertEqual((packed["kernels"], packed["targets"]), (2, ["sm_80", "sm_90a"]))
        into = self.folder / "copy"
        self.attune("cache", "unpack", self.pack, "--into", into)
        self.assertEqual(self.files_of(into), self.files_of(self.cache))
        self.assertEqual(len(self.files_of(into)), 2)
        self.assertEqual(self.attune("cache", "verify", ATTUNE_CACHE_DIR=str(into)).out,
                         "2 entries read, 0 defective\n")
        self.attune("cache", "pack", self.pack, "--arch", "sm_90a")
        listed = self.attune_json("cache", "unpack", self.pack, "--list")
        self.assertEqual([entry["target"] for entry in listed["entries"]], ["sm_90a"])

    def test_without_nvrtc(self):
        """Kernels that were compiled elsewhere are found by the names of the compilers that made them."""
        problem = "dtype=f16 head_dim=64"
        self.attune("precompile", "--problem", problem, "--arch", "sm_90a")
        self.attune("cache", "pack", self.pack)
        own, empty = {"ATTUNE_NVRTC": "/nowhere"}, {"ATTUNE_CACHE_DIR": str(self.folder / "empty")}
        check = ("precompile", "--check", "--problem", problem, "--arch")
        layers = [own, own | empty | {"ATTUNE_CACHE_PATH": str(self.pack)},
                  own | empty | {"ATTUNE_CACHE_PATH": str(self.cache)}]
        for there in layers:
            with self.subTest(there=there):
                self.assertIn("1 in the cache, 0 would be compiled", self.attune(*check, "sm_90a", **there).out)
                self.assertIn("no usable NVRTC for sm_80", self.attune(*check, "sm_80", code=3, **there).out)
                run = self.attune_json("precompile", "--problem", problem, "--arch", "sm_90a",
                                       **there | {"ATTUNE_JIT": "never"})
                self.assertEqual((run["hits"], run["compiled"]), (1, 0))
        self.assertIn("no usable NVRTC for sm_90", self.attune(*check, "sm_90a", code=3, **own | empty).out)


if __name__ == "__main__":
    main()
