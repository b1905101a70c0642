"""attune bench: what candidates take, and the choice that later processes follow."""

import json

from harness import CommandTest, main, needs_cpu, needs_gpu

PROBLEM = "dtype=f32 head_dim=8 lse=write"
SMALL = ("--device", "cpu", "--batch", 1, "--heads", 1, "--queries", 16)


@needs_cpu
class Bench(CommandTest):

    def test_a_measurement(self):
        told = self.attune_json("bench", "--problem", PROBLEM, *SMALL)
        self.assertFalse(told["kept"])
        (measured,) = told["problems"]
        self.assertEqual(measured["problem"], PROBLEM)
        self.assertEqual(measured["measured_on"], "batch 1, heads 1, 16 queries, 16 keys")
        self.assertEqual(measured["disqualified"], [])
        timings = {timing["candidate"]: timing["microseconds"] for timing in measured["timings"]}
        self.assertGreaterEqual(len(timings), 2)
        self.assertTrue(all(time > 0 for time in timings.values()))
        self.assertEqual(list(timings)[0], measured["chosen"])  # the usual choice
        self.assertIn(measured["candidate"], timings)
        kinds = [entry.get("kind") for entry in self.attune_json("cache", "list")["entries"]]
        self.assertEqual(kinds, [None] * len(timings))  # kernels, and no choice
        text = self.attune("bench", "--problem", PROBLEM, *SMALL).out
        self.assertRegex(text, r"(?m)^candidate +us +of the fastest")
        self.assertRegex(text, rf"(?m)^{measured['chosen']} .*chosen so far")
        self.assertNotIn("kept", text)

    def test_every_trait(self):
        """Tensors are made for whatever a forward problem can have."""
        problems = ["dtype=bf16 head_dim=16 head_dim_v=8 window_left=bounded window_right=bounded bias=boolean",
                    "dtype=f16 output_dtype=f32 head_dim=8 window_right=bounded blocks=varlen dropout=on",
                    "dtype=f32 head_dim=8 blocks=varlen keys=paged align_bytes=4"]
        path = self.folder / "problems.txt"
        path.write_text("\n".join(problems))
        told = self.attune_json("bench", path, "--device", "cpu", "--batch", 3, "--heads", 2, "--key-heads", 1, "--queries",
                                16, "--keys", 100)
        self.assertEqual([measured["problem"] for measured in told["problems"]], problems)
        self.assertEqual([measured["disqualified"] for measured in told["problems"]], [[], [], []])
        self.assertEqual(told["problems"][2]["measured_on"], "sequences 3, heads 2 and 1, 16 queries, 64 keys")

    def test_what_is_refused(self):
        self.assert_fails(2, "no problem to measure", "bench")
        self.assert_fails(2, "only forward problems are measured", "bench", "--problem", PROBLEM + " operation=delta",
                          *SMALL)
        self.assert_fails(2, "head_dim 9999", "bench", "--problem", "dtype=f32 head_dim=9999", *SMALL)
        self.assert_fails(2, "--device", "bench", "--problem", PROBLEM, "--device", "tpu")
        for mode in ("ro", "off"):
            self.assert_fails(3, "no later process would find the choice", "bench", "--tune", "--problem", PROBLEM,
                              *SMALL, ATTUNE_CACHE_MODE=mode)


@needs_cpu
class Tune(CommandTest):

    def setUp(self):
        super().setUp()
        told = self.attune_json("bench", "--tune", "--problem", PROBLEM, *SMALL)
        self.assertTrue(told["kept"])
        (self.measured,) = told["problems"]

    def choice(self):
        (entry,) = [e for e in self.attune_json("cache", "list")["entries"] if e.get("kind") == "tuned choice"]
        return entry

    def explained(self, **variables):
        return self.attune_json("explain", "--problem", PROBLEM, **variables)

    def test_explain_names_it(self):
        told = self.explained()
        self.assertEqual(told["candidate"], self.measured["candidate"])
        self.assertEqual(told["tuned"]["timings"], self.measured["timings"])
        self.assertEqual(told["state"], "cached")
        self.assertIn("tuned      by `attune bench --tune` on batch 1, heads 1, 16 queries, 16 keys: ",
                      self.attune("explain", "--problem", PROBLEM).out)
        self.assertNotIn("tuned", self.attune_json("explain", "--problem", "dtype=f32 head_dim=16"))
        self.assertNotIn("tuned", self.explained(ATTUNE_TUNED="ignore"))
        self.assertNotIn("tuned", self.explained(ATTUNE_THREADS="1"))  # another device
        self.assert_fails(2, "ATTUNE_TUNED=maybe: expected one of follow, ignore", "explain", "--problem", PROBLEM,
                          ATTUNE_TUNED="maybe")

    def test_the_cache_shows_it(self):
        entry = self.choice()
        self.assertEqual((entry["candidate"], entry["problem"]), (self.measured["candidate"], PROBLEM))
        self.assertEqual((entry["spec"]["dtype"], entry["spec"]["head_dim"]), ("f32", 8))
        self.assertRegex(self.attune("cache", "list").out, rf"(?m)^{entry['key'][:8]} .* attune bench --tune$")
        shown = self.attune_json("cache", "show", entry["key"])
        self.assertEqual((shown["payload_bytes"], shown["metadata"]["timings"]), (0, self.measured["timings"]))
        self.assert_fails(2, "is a choice of `attune bench --tune`, not a kernel", "cache", "disasm", entry["key"])
        self.assertIn(" 0 defective", self.attune("cache", "verify").out)

    def test_a_pack_carries_it(self):
        pack = self.folder / "kernels.pack"
        self.attune("cache", "pack", pack)
        other = {"ATTUNE_CACHE_DIR": str(self.folder / "other"), "ATTUNE_CACHE_PATH": str(pack)}
        self.assertIn("tuned", self.explained(**other))
        self.assertNotIn("tuned", self.explained(ATTUNE_CACHE_DIR=other["ATTUNE_CACHE_DIR"]))

    def test_it_can_be_removed(self):
        self.attune("cache", "prune", "--max-size", 0)
        self.assertNotIn("tuned", self.explained())

    def test_a_damaged_one_is_ignored(self):
        path = self.cache / "v1/objects" / self.choice()["key"][:2] / self.choice()["key"][2:]
        damaged = bytearray(path.read_bytes())
        damaged[200] ^= 1  # in the metadata
        path.write_bytes(damaged)
        told = self.attune("explain", "--problem", PROBLEM, "--json")
        self.assertNotIn("tuned", json.loads(told.out))
        self.assertIn("cache entry refused", told.err)
        self.assertFalse(path.exists())  # in quarantine

    def test_measuring_again_replaces_it(self):
        before = self.choice()
        self.attune("bench", "--tune", "--problem", PROBLEM, *SMALL[:-1], 32)
        self.assertEqual(self.choice()["key"], before["key"])
        self.assertEqual(self.explained()["tuned"]["measured_on"], "batch 1, heads 1, 32 queries, 32 keys")


@needs_gpu
class OnTheGpu(CommandTest):

    def test_every_trait(self):
        problems = ["dtype=f16 head_dim=40 lse=write boxes=1 extent=few_tiles",
                    "dtype=bf16 head_dim=64 window_left=bounded window_right=bounded bias=bf16 boxes=1",
                    "dtype=bf16 head_dim=64 window_right=bounded blocks=varlen keys=paged dropout=on boxes=1",
                    "dtype=f32 head_dim=24 align_bytes=4"]
        given = [word for problem in problems for word in ("--problem", problem)]
        variables = {"ATTUNE_BACKEND": "cuda"}
        told = self.attune_json("bench", "--tune", *given, "--batch", 2, "--heads", 4, "--queries", 256, **variables)
        for problem, measured in zip(problems, told["problems"]):
            self.assertEqual(measured["disqualified"], [])
            followed = self.attune_json("explain", "--problem", measured["problem"], **variables)
            self.assertEqual((followed["candidate"], followed["state"]), (measured["candidate"], "cached"))


if __name__ == "__main__":
    main()
