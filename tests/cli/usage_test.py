"""Help, version, and how the command line itself fails."""

import os
import subprocess

from harness import COMMAND, CommandTest, Problem, environment, main, needs_cpu


class Usage(CommandTest):

    def test_version(self):
        self.assertRegex(self.attune("--version").out, r"^attune \d+\.\d+\.\d+\n$")

    def test_help(self):
        text = self.attune("--help").out
        for command in ("attend", "explain", "emit", "precompile", "cache", "mask", "verify", "devices",
                        "doctor", "completion", "manual"):
            self.assertIn(command, text)
            self.assertIn("--help", self.attune(command, "--help").out)
        self.assertIn("Exit codes: 0 ok, 1 wrong result, 2 usage, 3 environment", text)

    def test_mistakes(self):
        for arguments in ((), ("attand",), ("devices", "--colour"), ("attend",), ("attend", "x"), ("cache",)):
            with self.subTest(arguments=arguments):
                self.assert_fails(2, "try `attune --help`", *arguments)

    def test_a_subcommand_that_is_none(self):
        for command in ("attand",), ("cache", "prune-everything"), ("verify", "everything"):
            self.assert_fails(2, f"{command[-1]} is no subcommand", *command)

    def test_empty_values(self):
        """As of a variable that a script has not set: never a 0 or the default."""
        for arguments in (("attend", "in", "-o", ""), ("attend", "in", "-o", "out", "--scale", ""),
                          ("explain", "--problem", ""),
                          ("cache", "show", ""), ("cache", "prune", "--older-than", ""),
                          ("cache", "unpack", "pack", "--into", ""), ("mask", "BlockDiagonalMask", "--via", "")):
            with self.subTest(arguments=arguments):
                self.assert_fails(2, "the value is empty", *arguments)
        self.assert_fails(2, "--seed", "verify", "numerics", "--seed", "")

    def test_integers(self):
        beyond = 2**64
        for arguments, limits in ((("attend", "in", "-o", "out", "--seed"), f"0 to {2**64 - 1}"),
                                  (("attend", "in", "-o", "out", "--window-left"), f"{-2**63} to {2**63 - 1}"),
                                  (("mask", "LowerTriangularMask", "--queries"), f"0 to {2**63 - 1}"),
                                  (("mask", "BlockDiagonalMask", "--q-seqlen"), f"{-2**63} to {2**63 - 1}"),
                                  (("verify", "numerics", "--seed"), f"0 to {2**64 - 1}"),
                                  (("verify", "numerics", "--cases"), f"1 to {2**31 - 1}")):
            for value in (beyond, "1.5", "many", "nan"):
                with self.subTest(arguments=arguments, value=value):
                    text = f"{arguments[-1]}: {value} is no integer from {limits}; try `attune --help`"
                    self.assert_fails(2, text, *arguments, value)
        self.assert_fails(2, "--cases: 0 is no integer from 1 to", "verify", "numerics", "--cases", 0)

    def test_json_may_stand_before_and_behind_the_subcommand(self):
        self.assertEqual(self.attune("--json", "devices").json(), self.attune("devices", "--json").json())

    def assert_cannot_print(self, *arguments, **process):
        with open("/dev/full", "w") as full:
            process = subprocess.run([COMMAND, *map(str, arguments)], stdout=full, stderr=subprocess.PIPE, text=True,
                                     env=environment(ATTUNE_CACHE_DIR=str(self.cache)), timeout=60, check=False,
                                     **process)
        self.assertEqual((process.returncode, process.stderr), (3, "attune: cannot write to stdout\n"))

    def test_a_full_stdout_is_a_failure(self):
        for arguments in ("devices",), ("manual",), ("--help",), ("cache", "list", "--help"), ("--version",):
            self.assert_cannot_print(*arguments)

    @needs_cpu
    def test_a_closed_stdout_is_a_failure(self):
        """Nor is what is printed written to a file that got the number of the closed stream."""
        source = Problem().write(self.folder / "in.safetensors")
        for _ in ("compiled", "from the cache"):
            self.assert_cannot_print("attend", source, "-o", self.folder / "out.safetensors",
                                     preexec_fn=lambda: os.close(1))
        self.assertEqual(self.attune("cache", "verify").out, "1 entries read, 0 defective\n")


if __name__ == "__main__":
    main()
