"""What the command shows only where someone watches: colour and progress."""

import os
import pty
import subprocess

from harness import COMMAND, CommandTest, environment, main, needs_cpu


class Terminal(CommandTest):

    def on_terminal(self, *arguments, **variables):
        """Runs with stdout and stderr on a terminal; returns the exit code and what it showed."""
        ours, theirs = pty.openpty()
        env = environment(ATTUNE_CACHE_DIR=str(self.cache), **variables)
        with subprocess.Popen([COMMAND, *arguments], env=env, stdin=subprocess.DEVNULL, stdout=theirs,
                              stderr=theirs) as process:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    piece = os.read(ours, 65536)
                except OSError:  # Linux's end of a terminal
                    break
                shown += piece
            code = process.wait(timeout=300)
        os.close(ours)
        return code, shown.decode()

    def test_errors_are_red_unless_told_otherwise(self):
        self.assertEqual(self.on_terminal("attand")[0], 2)
        self.assertTrue(self.on_terminal("attand")[1].startswith("\x1b[31mattune:\x1b[0m "))
        self.assertTrue(self.on_terminal("attand", NO_COLOR="1")[1].startswith("attune: "))

    @needs_cpu
    def test_progress(self):
        problems = ("--problem", "dtype=f32 head_dim=8", "--problem", "dtype=f32 head_dim=9")
        code, shown = self.on_terminal("precompile", *problems, "--arch", "x86-64-v3", "--jobs", "1")
        self.assertEqual(code, 0)
        self.assertRegex(shown, r"\[1/2\] #{10}\.{10} x86-64-v3 dtype=f32 head_dim=9  \S+ m?s left")
        self.assertRegex(shown, r"\[2/2\] #{20} x86-64-v3 dtype=f32 head_dim=8  0 ms left")
        self.assertEqual(self.attune("precompile", *problems, "--arch", "x86-64-v3").err, "")


if __name__ == "__main__":
    main()
