"""attune attend: right results, on each bias and dtype, and an honest report."""

import math
import operator
import os
import pathlib
import shutil

from harness import (CommandTest, Problem, main, needs_cpu, needs_gpu, read_safetensors, worst,
                     write_safetensors)

FIELDS = {"kernel", "family", "source", "device", "first_call_ms", "hot_call_ms", "compiles", "cache_hits",
          "cache_defects", "max_abs_error", "plain_max_abs_error", "lse_max_abs_error",
          "plain_lse_max_abs_error", "correct"}

BACKWARD_FIELDS = {"kernel", "kernels", "family", "source", "device", "first_call_ms", "hot_call_ms", "compiles",
                   "cache_hits", "cache_defects", "errors", "correct"}

# Bias, its options, and the documentation's words for "query i sees key j"; s is len_k - len_q.
BIASES = [
    ("none", [], lambda i, j, s: True),
    ("lower_triangular", [], lambda i, j, s: j <= i),
    ("lower_triangular_from_bottom_right", [], lambda i, j, s: j <= i + s),
    ("lower_triangular_from_bottom_right_local", ["--window-size", 2],
     lambda i, j, s: i + s - 2 < j <= i + s),
    ("local_from_bottom_right", ["--window-left", 1, "--window-right", 2],
     lambda i, j, s: i + s - 1 <= j <= i + s + 2),
]


@needs_cpu
class Attend(CommandTest):

    def attend(self, problem, *options, code=0, **variables):
        """Runs on the problem, or on tensors; returns the report, output and lse."""
        source = self.folder / "in.safetensors"
        write_safetensors(source, problem if isinstance(problem, dict) else problem.tensors())
        target = self.folder / "out.safetensors"
        report = self.attune_json("attend", source, "-o", target, "--repeat", 1, *options, code=code,
                                  **variables)
        tensors, _ = read_safetensors(target)
        return report, tensors["output"], tensors["lse"]

    def test_every_bias(self):
        for len_q, len_k in ((5, 7), (7, 5), (1, 9)):
            problem = Problem(batch=2, len_q=len_q, len_k=len_k, head_dim=8, head_dim_v=12)
            for bias, options, visible in BIASES:
                with self.subTest(bias=bias, len_q=len_q, len_k=len_k):
                    report, output, lse = self.attend(problem, "--bias", bias, *options, "--check")
                    expected, expected_lse = problem.reference(
                        lambda i, j, see=visible, s=len_k - len_q: see(i, j, s))
                    self.assertEqual(output[:2], ("F32", [2, len_q, 2, 12]))
                    self.assertEqual(lse[:2], ("F32", [2, 2, len_q]))
                    self.assertLess(worst(output[2], expected), 1e-5)
                    self.assertLess(worst(lse[2], expected_lse), 1e-5)
                    self.assertTrue(report["correct"])

    def test_every_dtype(self):
        for dtype, bound in (("F32", 1e-5), ("F16", 5e-3), ("BF16", 4e-2)):
            with self.subTest(dtype=dtype):
                problem = Problem(len_q=33, len_k=65, head_dim=64, dtype=dtype)
                report, output, lse = self.attend(problem, "--check")
                expected, expected_lse = problem.reference()
                self.assertEqual(output[0], dtype)
                self.assertEqual(lse[0], "F32")
                self.assertLess(worst(output[2], expected), bound)
                self.assertLess(worst(lse[2], expected_lse), bound)
                self.assertTrue(report["correct"])
                self.assertLessEqual(report["max_abs_error"], 2 * report["plain_max_abs_error"] + 1e-6)

    def test_scale(self):
        problem = Problem()
        _, output, lse = self.attend(problem, "--scale", "-0.125")
        expected, expected_lse = problem.reference(scale=-0.125)
        self.assertLess(worst(output[2], expected), 1e-5)
        self.assertLess(worst(lse[2], expected_lse), 1e-5)

    def test_three_axes(self):
        problem = Problem(batch=2, heads=1)
        tensors = {name: (dtype, (shape[0], shape[1], shape[3]), values)
                   for name, (dtype, shape, values) in problem.tensors().items()}
        source, target = self.folder / "bmk.safetensors", self.folder / "out.safetensors"
        write_safetensors(source, tensors)
        self.attune("attend", source, "-o", target)
        result, _ = read_safetensors(target)
        expected, expected_lse = problem.reference()
        self.assertEqual(result["output"][1], [2, 5, 8])
        self.assertEqual(result["lse"][1], [2, 1, 5])
        self.assertLess(worst(result["output"][2], expected), 1e-5)
        self.assertLess(worst(result["lse"][2], expected_lse), 1e-5)

    def test_bias_tensors(self):
        problem = Problem(batch=2, len_q=3, len_k=5, heads=2)
        numbers = [(i * 7 % 11) / 4 - 1 for i in range(2 * 3 * 5)]  # [1, H, Mq, Mkv]
        for dtype in ("F32", "F16", "BF16"):
            with self.subTest(dtype=dtype):
                tensors = problem.tensors() | {"attn_bias": (dtype, (1, 2, 3, 5), numbers)}
                report, output, lse = self.attend(tensors, "--bias", "lower_triangular", "--check")
                expected, expected_lse = problem.reference(
                    lambda i, j: j <= i, added=lambda b, h, i, j: numbers[(h * 3 + i) * 5 + j])
                self.assertTrue(report["correct"])
                self.assertLess(worst(output[2], expected), 1e-5)
                self.assertLess(worst(lse[2], expected_lse), 1e-5)
        seen = [j != 2 for j in range(5)]  # a key that is padding
        report, output, _ = self.attend(problem.tensors() | {"attn_bias": ("BOOL", (1, 5), seen)}, "--check")
        self.assertTrue(report["correct"])
        self.assertLess(worst(output[2], problem.reference(lambda i, j: j != 2)[0]), 1e-5)

    def test_fewer_key_heads(self):
        problem = Problem(heads=1, len_q=3, len_k=4)
        tensors = problem.tensors()
        dtype, shape, values = tensors["query"]
        tensors["query"] = (dtype, (1, 3, 4, 8), [x for i in range(3) for _ in range(4)
                                                  for x in values[i * 8:i * 8 + 8]])
        report, output, lse = self.attend(tensors, "--check")
        expected, expected_lse = problem.reference()
        self.assertTrue(report["correct"])
        self.assertEqual((output[1], lse[1]), ([1, 3, 4, 8], [1, 4, 3]))
        for head in range(4):
            self.assertLess(worst([output[2][(i * 4 + head) * 8 + d] for i in range(3) for d in range(8)],
                                  expected), 1e-5)
        self.assertLess(worst(lse[2], expected_lse * 4), 1e-5)

    def test_groups(self):
        tensors = {name: (dtype, (*shape[:2], 1, *shape[2:]), values)
                   for name, (dtype, shape, values) in Problem().tensors().items()}
        report, output, lse = self.attend(tensors, "--check")
        self.assertTrue(report["correct"])
        self.assertEqual((output[1], lse[1]), ([1, 5, 1, 2, 8], [1, 1, 2, 5]))
        self.assertLess(worst(output[2], Problem().reference()[0]), 1e-5)

    def test_dropout(self):
        problem = Problem(len_q=20, len_k=40)
        first, output, lse = self.attend(problem, "--p", 0.5, "--seed", 3, "--check")
        self.assertTrue(first["correct"])
        self.assertEqual(self.attend(problem, "--p", 0.5, "--seed", 3)[1], output)
        self.assertNotEqual(self.attend(problem, "--p", 0.5, "--seed", 4)[1], output)
        self.assertNotEqual(self.attend(problem, "--p", 0.5, "--seed", 3, "--offset", 1)[1], output)
        self.assertLess(worst(lse[2], problem.reference()[1]), 1e-5)
        self.assertEqual(set(self.attend(problem, "--p", 1)[1][2]), {0.0})

    def test_output_dtype(self):
        problem = Problem(dtype="F16")
        report, output, _ = self.attend(problem, "--output-dtype", "f32", "--check")
        self.assertTrue(report["correct"])
        self.assertEqual(output[0], "F32")
        self.assertLess(worst(output[2], problem.reference()[0]), 1e-3)

    def test_no_keys_and_no_queries(self):
        report, output, lse = self.attend(Problem(len_k=0), "--check")
        self.assertEqual(set(output[2]), {0.0})
        self.assertEqual(set(lse[2]), {-math.inf})
        self.assertTrue(report["correct"])
        report, output, lse = self.attend(Problem(len_q=0), "--check")
        self.assertEqual(output[1:], ([1, 0, 2, 8], []))
        self.assertEqual(lse[1:], ([1, 2, 0], []))
        self.assertEqual(report["kernel"], "")

    def test_report(self):
        problem = Problem()
        cold, _, _ = self.attend(problem)
        self.assertEqual(set(cold), FIELDS)
        self.assertEqual(cold["family"], "cpu")
        self.assertTrue(cold["kernel"].startswith("cpu_"))
        self.assertEqual((cold["source"], cold["compiles"], cold["cache_hits"]), ("compiler", 1, 0))
        self.assertEqual(cold["device"], "cpu")
        self.assertIsNone(cold["correct"])
        self.assertIsNone(cold["max_abs_error"])
        self.assertGreater(cold["first_call_ms"], cold["hot_call_ms"])
        warm, _, _ = self.attend(problem)
        self.assertEqual((warm["source"], warm["compiles"], warm["cache_hits"]), ("disk", 0, 1))
        self.assertLess(warm["first_call_ms"], cold["first_call_ms"])

    def test_text(self):
        source = Problem().write(self.folder / "in.safetensors")
        target = self.folder / "out.safetensors"
        text = self.attune("attend", source, "-o", target, "--check", "--repeat", 3).out
        for words in ("kernel      cpu_", "(from compiler)", "first call  ", "(median of 3)",
                      "check       ok", f"written     {target}"):
            self.assertIn(words, text)
        self.assertNotIn("\x1b", text)  # no colour into a pipe
        _, metadata = read_safetensors(target)
        self.assertEqual(metadata["bias"], "none")

    def test_the_file_is_written_as_a_new_file_of_the_user(self):
        old = os.umask(0o022)
        self.addCleanup(os.umask, old)
        self.attend(Problem())
        target = self.folder / "out.safetensors"
        self.assertEqual(target.stat().st_mode & 0o777, 0o644)

    def test_a_wrong_kernel_is_found(self):
        templates = self.folder / "templates"
        shutil.copytree(pathlib.Path(os.environ["ATTUNE_TEMPLATES"]), templates)
        header = templates / "attune" / "num.h"
        text = header.read_text()
        self.assertEqual(text.count("kLn2 = 0.69314"), 1)
        header.write_text(text.replace("kLn2 = 0.69314", "kLn2 = 0.69414"))
        problem = Problem(len_q=9, len_k=9)
        report, _, _ = self.attend(problem, "--check", code=1, ATTUNE_TEMPLATE_DIR=str(templates))
        self.assertIs(report["correct"], False)
        self.assertGreater(report["lse_max_abs_error"], 1e-4)
        good, _, _ = self.attend(problem, "--check")
        self.assertEqual((good["correct"], good["compiles"]), (True, 1))  # another text is another key

    def backward(self, tensors, *options, code=0, **variables):
        """Runs backward, too; returns the report and every tensor that was written."""
        source, target = self.folder / "in.safetensors", self.folder / "out.safetensors"
        write_safetensors(source, tensors)
        report = self.attune_json("attend", source, "-o", target, "--repeat", 1, "--backward", *options, code=code,
                                  **variables)
        return report, read_safetensors(target)[0]

    def test_gradients(self):
        problem = Problem(batch=2, len_q=5, len_k=7, head_dim=8, head_dim_v=12)
        for bias, options, _ in BIASES:
            with self.subTest(bias=bias):
                report, written = self.backward(problem.tensors(), "--bias", bias, *options, "--check")
                self.assertEqual(set(report), BACKWARD_FIELDS)
                self.assertEqual(set(written), {"output", "lse", "grad_query", "grad_key", "grad_value"})
                self.assertEqual({name: tensor[:2] for name, tensor in written.items() if "grad" in name},
                                 {"grad_query": ("F32", [2, 5, 2, 8]), "grad_key": ("F32", [2, 7, 2, 8]),
                                  "grad_value": ("F32", [2, 7, 2, 12])})
                self.assertTrue(report["correct"])
                self.assertEqual(set(report["errors"]), {"grad_query", "grad_key", "grad_value"})
                self.assertEqual(len(report["kernels"]), 3)
                self.assertIn(report["kernel"], report["kernels"])
                # Of a sum of all outputs: each query hands its whole weight out, 1 to each column of the values.
                rows = sum(lse != -math.inf for lse in written["lse"][2])
                self.assertAlmostEqual(sum(written["grad_value"][2]), rows * 12, places=3)

    def test_gradients_are_slopes(self):
        problem = Problem(len_q=3, len_k=4, heads=1, head_dim=4)
        seeds = [(i * 5 % 7 - 3) / 4 for i in range(3 * 4)]
        lse_seeds = [0.5, -1.0, 0.25]
        numbers = [(i * 7 % 11) / 8 - 0.5 for i in range(3 * 4)]
        tensors = problem.tensors() | {"grad_output": ("F32", (1, 3, 1, 4), seeds),
                                       "grad_lse": ("F32", (1, 1, 3), lse_seeds),
                                       "attn_bias": ("F32", (1, 1, 3, 4), numbers)}
        report, written = self.backward(tensors, "--check", "--deterministic")
        self.assertTrue(report["correct"])

        def loss():
            output, lse = problem.reference(added=lambda b, h, i, j: numbers[i * 4 + j])
            return sum(map(operator.mul, output, seeds)) + sum(map(operator.mul, lse, lse_seeds))

        for name, values in (("query", problem.query), ("key", problem.key), ("value", problem.value),
                             ("attn_bias", numbers)):
            for at, slope in enumerate(written[f"grad_{name}"][2]):
                before = values[at]
                values[at] = before + 1e-5
                above = loss()
                values[at] = before - 1e-5
                self.assertAlmostEqual((above - loss()) / 2e-5, slope, places=4, msg=f"{name} {at}")
                values[at] = before

    def test_gradients_of_every_dtype(self):
        for dtype in ("F32", "F16", "BF16"):
            with self.subTest(dtype=dtype):
                report, written = self.backward(Problem(len_q=33, len_k=65, head_dim=64, dtype=dtype).tensors(),
                                                "--check", "--p", 0.25, "--seed", 3)
                self.assertTrue(report["correct"])
                self.assertEqual(written["grad_key"][0], dtype)
        report, _ = self.backward(Problem(dtype="F16").tensors(), "--check", "--output-dtype", "f32")
        self.assertTrue(report["correct"])

    def test_gradients_of_nothing(self):
        report, written = self.backward(Problem(len_k=0).tensors(), "--check")
        self.assertEqual(set(written["grad_query"][2]), {0.0})
        self.assertTrue(report["correct"])
        report, written = self.backward(Problem(len_q=0).tensors(), "--check")
        self.assertEqual(set(written["grad_key"][2]), {0.0})
        self.assertTrue(report["correct"])

    def test_gradients_as_text(self):
        source, target = Problem().write(self.folder / "in.safetensors"), self.folder / "out.safetensors"
        text = self.attune("attend", source, "-o", target, "--backward", "--check").out
        for words in ("(from compiler)", "launches", "grad_query error", "grad_value error", "check             ok"):
            self.assertIn(words, text)

    def test_refused_gradients(self):
        source = self.folder / "in.safetensors"
        write_safetensors(source, Problem().tensors() | {"grad_output": ("F16", (1, 5, 2, 8), [1.0] * 80)})
        arguments = ("attend", source, "-o", self.folder / "out.safetensors")
        self.assert_fails(2, "grad_output: is f16, expected f32 as output", *arguments, "--backward")
        self.assert_fails(2, "--backward", *arguments, "--deterministic")

    @needs_gpu
    def test_gpu(self):
        for family, dtype in (("simt", "F32"), ("simt", "F16"), ("mma", "F16"), ("mma", "BF16")):
            with self.subTest(family=family, dtype=dtype):
                problem = Problem(len_q=70, len_k=130, head_dim=64, dtype=dtype)
                report, _, _ = self.attend(problem, "--device", "cuda", "--family", family, "--check",
                                           "--bias", "lower_triangular_from_bottom_right",
                                           ATTUNE_BACKEND="auto")
                self.assertEqual((report["family"], report["correct"]), (family, True))
                self.assertEqual(report["device"], "cuda:0")


if __name__ == "__main__":
    main()
