"""attune attend on bad input: an exit code, a message that says what and where, and no output."""

import struct

from harness import CommandTest, Problem, main, needs_cpu, write_safetensors


class BadInput(CommandTest):

    def setUp(self):
        super().setUp()
        self.source = self.folder / "in.safetensors"
        self.target = self.folder / "out.safetensors"
        self.problem = Problem()
        self.problem.write(self.source)

    def tearDown(self):
        self.assertFalse(self.target.exists())

    def refuse(self, text, *options, code=2):
        self.assert_fails(code, text, "attend", self.source, "-o", self.target, *options)

    def refuse_tensors(self, text, **changes):
        write_safetensors(self.source, {**self.problem.tensors(), **changes})
        self.refuse(text)

    def test_missing_file(self):
        self.source.unlink()
        self.refuse(f"cannot open {self.source}: No such file or directory")

    def test_a_folder_and_an_endless_file(self):
        self.assert_fails(2, "is not a regular file", "attend", self.folder, "-o", self.target)
        self.assert_fails(2, "is not a regular file", "attend", "/dev/zero", "-o", self.target)

    def test_corrupt_files(self):
        whole = self.source.read_bytes()
        for data, text in (
            (b"", "0 bytes are too few for a .safetensors file"),
            (whole[:-1], "beyond the"),
            (whole + b"x", "1 bytes after the last tensor belong to none"),
            (struct.pack("<Q", len(whole)) + whole[8:], "goes beyond the file's"),
            (struct.pack("<Q", 1 << 60) + whole[8:], "above the format's limit"),
            (whole.replace(b'"query"', b'"value"'), 'the header has "value" twice'),
            (whole.replace(b"F32", b"F33", 1), 'tensor "query": unknown dtype "F33"'),
            (whole.replace(b'{"query"', b'["query"'), "the header is not valid JSON"),
            (b"\x80PNG" + whole, "is this a .safetensors file?"),
        ):
            with self.subTest(text=text):
                self.source.write_bytes(data)
                self.refuse(text)
                self.refuse(str(self.source))

    def test_absent_tensor(self):
        tensors = self.problem.tensors()
        tensors["keys"] = tensors.pop("key")
        write_safetensors(self.source, tensors)
        self.refuse('no tensor "key"; it should hold query, key and value, and has: "query" "value" "keys"')

    def test_wrong_dtypes(self):
        shape = (1, 5, 2, 8)
        self.refuse_tensors("query: dtype I32, expected F32, F16 or BF16", query=("I32", shape, [0] * 80))
        self.refuse_tensors("query: dtype F64, expected F32, F16 or BF16", query=("F64", shape, [0] * 80))
        self.refuse_tensors("query is f16 but key is f32", query=("F16", shape, [0] * 80))

    def test_wrong_ranks_and_shapes(self):
        self.refuse_tensors("query", query=("F32", (80,), [0] * 80))
        self.refuse_tensors("query", query=("F32", (), [0]))
        self.refuse_tensors("query and key differ in rank", query=("F32", (1, 5, 16), [0] * 80))
        self.refuse_tensors("query", query=("F32", (1, 1, 5, 2, 8), [0] * 80))
        self.refuse_tensors("query: rank 6, expected [B, M, H, K]", query=("F32", (1, 1, 1, 5, 2, 8), [0] * 80))
        self.refuse_tensors("query: rank 7, expected at most 6", query=("F32", (1, 1, 1, 1, 5, 2, 8), [0] * 80))
        self.refuse_tensors("incompatible shapes: query [1, 5, 2, 8], key [1, 7, 2, 4]",
                            key=("F32", (1, 7, 2, 4), [0] * 56))
        self.refuse_tensors("incompatible shapes", value=("F32", (1, 6, 2, 8), [0] * 96))
        self.refuse_tensors("head_dim", query=("F32", (1, 5, 2, 0), []), key=("F32", (1, 7, 2, 0), []))

    def test_head_dim_beyond_the_kernels(self):
        Problem(len_q=1, len_k=1, heads=1, head_dim=513).write(self.source)
        self.refuse("head_dim 513 is outside 1 to 512")

    def test_bias_tensors(self):
        self.refuse_tensors("attn_bias: dtype I32, expected F32, F16, BF16 or BOOL",
                            attn_bias=("I32", (5, 7), [0] * 35))
        self.refuse_tensors("attn_bias: shape [5, 6], expected [1 or 1, 2 or 1, 5 or 1, 7]",
                            attn_bias=("F32", (5, 6), [0] * 30))

    def test_dropout(self):
        for p in ("-0.5", "1.5", "nan"):
            with self.subTest(p=p):
                self.refuse("Invalid dropout probability: p=", "--p", p)
        self.refuse("--seed", "--seed", "-1")
        self.refuse("--output-dtype", "--output-dtype", "f64")

    def test_biases(self):
        self.refuse("--bias", "--bias", "upper_triangular")
        local = ("--bias", "lower_triangular_from_bottom_right_local")
        self.refuse("--bias lower_triangular_from_bottom_right_local needs --window-size N", *local)
        self.refuse("Expected `window_size > 0`, but window_size=0", *local, "--window-size", 0)
        self.refuse("--bias none takes no --window-size N", "--window-size", 3)
        both = ("--bias", "local_from_bottom_right")
        self.refuse("needs --window-left N and --window-right N", *both, "--window-left", 3)
        self.refuse("expected `window_left >= 0` and `window_right >= 0`", *both, "--window-left", 3, "--window-right", -1)
        self.refuse("--window-size", *local, "--window-size", "many")

    def test_scales(self):
        for scale in ("nan", "inf", "1e39"):
            with self.subTest(scale=scale):
                self.refuse("expected a finite float32", "--scale", scale)
        self.refuse("--scale", "--scale", "half")

    def test_devices_and_families(self):
        for device in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x"):
            with self.subTest(device=device):
                self.refuse(f"--device {device}: expected auto, cpu, cuda or cuda:N", "--device", device)
        self.refuse("--family", "--family", "flash")
        self.refuse("the call allows mma alone", "--device", "cpu", "--family", "mma")
        self.assert_fails(2, "ATTUNE_BACKEND=gpu: expected one of auto, cuda, cpu", "attend", self.source,
                          "-o", self.target, ATTUNE_BACKEND="gpu")
        self.assert_fails(3, "ATTUNE_BACKEND=cuda forbids CPU tensors", "attend", self.source, "-o",
                          self.target, "--device", "cpu", ATTUNE_BACKEND="cuda")
        self.assert_fails(3, "", "attend", self.source, "-o", self.target, "--device", "cuda:63",
                          ATTUNE_BACKEND="auto")
        self.refuse("--repeat", "--repeat", 0)

    @needs_cpu
    def test_threads(self):
        for threads in (0, -1, 4097, "many"):
            self.assert_fails(2, f"ATTUNE_THREADS={threads}: expected a count from 1 to 4096", "attend", self.source,
                              "-o", self.target, ATTUNE_THREADS=str(threads))

    @needs_cpu
    def test_outputs_that_cannot_be_written(self):
        def refuse_output(code, text, target):
            self.assert_fails(code, text, "attend", self.source, "-o", target)

        refuse_output(3, "No such file or directory", self.folder / "absent" / "out.safetensors")
        refuse_output(2, "exists and is not a regular file", self.folder)
        refuse_output(2, "/dev/null exists and is not a regular file", "/dev/null")


if __name__ == "__main__":
    main()
