"""Help, version, and how the command line itself fails."""

import subprocess

from harness import COMMAND, CommandTest, environment, main


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

    def test_json_may_stand_before_and_behind_the_subcommand(self):
        self.assertEqual(self.attune("--json", "devices").json(), self.attune("devices", "--json").json())

    def test_a_closed_stdout_is_a_failure(self):
        with open("/dev/full", "w") as full:
            process = subprocess.run([COMMAND, "devices"], stdout=full, stderr=subprocess.PIPE, text=True,
                                     env=environment(), timeout=60, check=False)
        self.assertEqual((process.returncode, process.stderr), (3, "attune: cannot write to stdout\n"))


if __name__ == "__main__":
    main()
