"""attune verify: masks and numerics."""

import json
import pathlib

from harness import CommandTest, main, needs_cpu, needs_gpu

GOLDENS = pathlib.Path(__file__).parents[1] / "golden" / "masks.json"


def goldens():
    return json.loads(GOLDENS.read_text())


class VerifyMasks(CommandTest):

    def write(self, value):
        path = self.folder / "masks.json"
        path.write_text(json.dumps(value))
        return path

    def check_all(self, backend):
        report = self.attune_json("verify", "masks", GOLDENS, "--backend", backend, ATTUNE_BACKEND="auto")
        self.assertTrue(report["ok"])
        self.assertEqual([report[name] for name in ("cases", "materialized", "attended")], [296] * 3)
        self.assertEqual((report["errors"], report["refused"], report["differences"]), (26, 26, []))
        self.assertEqual(len(report["classes"]), 19)
        return report["kernels"]

    @needs_cpu
    def test_kernels_of_the_cpu_attend_to_what_the_goldens_say(self):
        kernels = self.check_all("cpu")
        self.assertEqual(sum(kernels.values()), 296)
        for name in kernels:
            self.assertTrue(name.startswith("cpu_"), name)

    @needs_gpu
    def test_kernels_of_the_gpu_attend_to_what_the_goldens_say(self):
        kernels = self.check_all("cuda")
        for family in ("simt", "mma"):
            self.assertEqual(sum(count for name, count in kernels.items() if name.startswith(family)), 296)

    @needs_cpu
    def test_text(self):
        few = goldens()
        few["cases"], few["errors"] = few["cases"][:3], few["errors"][:1]
        text = self.attune("verify", "masks", self.write(few)).out
        self.assertRegex(text, r"(?m)^class +cases +materialize +kernels$")
        self.assertRegex(text, r"(?m)^all +3 +3 +3$")
        self.assertRegex(text, r"(?m)^1 of 1 errors equal; kernels \(masks\): cpu_\w+ \(3\)$")
        self.assertTrue(text.endswith("ok: 3 of 3 masks equal\n"))

    @needs_cpu
    def test_a_wrong_mask_fails_with_pictures(self):
        wrong = {"cases": [{"class": "LowerTriangularMask", "via": "constructor", "args": {}, "q_len": 2,
                            "k_len": 3, "mask": ["100", "111"]}]}
        path = self.write(wrong)
        text = self.attune("verify", "masks", path, code=1).out
        self.assertIn("wrong: 2 differences, the first of them:\n"
                      "LowerTriangularMask via constructor {}:\n"
                      "expected   materialize\n"
                      "#..        #..\n"
                      "###        ##.  <-\n", text)
        report = self.attune_json("verify", "masks", path, code=1)
        self.assertEqual([report[name] for name in ("cases", "materialized", "attended", "ok")], [1, 0, 0, False])
        self.assertEqual(len(report["differences"]), 2)  # materialize and the kernel

    @needs_cpu
    def test_a_refusal_that_does_not_come_fails(self):
        wrong = {"cases": [], "errors": [{"class": "BlockDiagonalMask", "via": "from_seqlens",
                                          "args": {"q_seqlen": [1]}, "q_len": 1, "k_len": 1,
                                          "error": "ValueError: no"}]}
        report = self.attune_json("verify", "masks", self.write(wrong), code=1)
        self.assertEqual(report["differences"], [
            "BlockDiagonalMask via from_seqlens {\"q_seqlen\":[1]}: expected the refusal \"no\", got a bias"])

    def test_mistakes(self):
        self.assert_fails(2, "No such file or directory", "verify", "masks", self.folder / "absent.json")
        text = self.folder / "text.json"
        text.write_text("masks")
        self.assert_fails(2, f"{text}: not JSON", "verify", "masks", text)
        self.assert_fails(2, "not a file of masks: ", "verify", "masks", self.write([]))
        self.assert_fails(2, "expected {\"cases\": [{class, via, args, q_len, k_len, mask}]", "verify", "masks",
                          self.write({"cases": [{"class": "LowerTriangularMask"}]}))
        self.assert_fails(2, "--backend", "verify", "masks", GOLDENS, "--backend", "tpu")
        self.assert_fails(2, "try `attune --help`", "verify")


class VerifyNumerics(CommandTest):

    @needs_cpu
    def test_one_case(self):
        arguments = ("verify", "numerics", "--seed", "7", "--cases", "40", "--only", "3", "--backend", "cpu")
        report = self.attune_json(*arguments)
        self.assertEqual((report["seed"], report["failures"]), (7, []))
        self.assertIn("0 wrong", self.attune(*arguments).out)

    @needs_cpu
    def test_one_backward_case(self):
        report = self.attune_json("verify", "numerics", "--backward", "--seed", "7", "--cases", "40", "--only", "3",
                                  "--backend", "cpu")
        self.assertEqual((report["cases"], report["failures"]), (1, []))
        self.assertIn("gradients", report["tallies"])
        self.assertGreaterEqual(report["launches"], 2)

    def test_mistakes(self):
        self.assert_fails(2, "--cases", "verify", "numerics", "--cases", "0")
        self.assert_fails(2, "--family", "verify", "numerics", "--family", "cutlass")
        self.assert_fails(2, "--only", "verify", "numerics", "--only", "-1")


if __name__ == "__main__":
    main()
