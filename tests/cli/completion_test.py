"""attune completion and attune manual: complete, and understood by those who read them."""

import re
import shutil
import subprocess
import unittest

from harness import CommandTest, main


def needs(program):
    return unittest.skipUnless(shutil.which(program), f"no {program} here")


class Printed(CommandTest):

    def script(self, shell):
        path = self.folder / shell
        path.write_text(self.attune("completion", shell).out)
        return path

    def commands(self, *path):
        """Every command's words with its help, as the parser prints it."""
        text = self.attune(*path, "--help").out
        yield path, text
        _, _, below = text.partition("Subcommands:\n")
        for name in re.findall(r"(?m)^  (\w+) ", below):
            yield from self.commands(*path, name)

    def test_no_option_is_left_out(self):
        manual = self.attune("manual").out
        scripts = {shell: self.attune("completion", shell).out for shell in ("bash", "zsh", "fish")}
        seen = 0
        for path, text in self.commands():
            title = " ".join(("attune", *path))
            for script in scripts.values():
                self.assertIn(title, script)
            section = manual.partition(f".SS {title}\n")[2].partition(".SS ")[0].replace("\\-", "-")
            for option in re.findall(r"(?m)^  (?:-\w,)?--([a-z-]+)", text):
                seen += 1
                if option != "help" and "Subcommands:" not in text:
                    self.assertIn(f"\\fB--{option}\\fR", section)
                for shell, script in scripts.items():
                    self.assertIn(f" -l {option} " if shell == "fish" else f"--{option}", script)
        self.assertGreater(seen, 60)

    def test_the_environment_is_in_the_manual(self):
        manual = self.attune("manual").out
        for name in ("ATTUNE_CACHE_DIR", "ATTUNE_JIT", "ATTUNE_RECORD"):
            self.assertIn(f"\\fB{name}\\fR", manual)
        self.assertIn("0 ok, 1 wrong result, 2 usage, 3 environment", manual)

    def test_json(self):
        self.assertEqual(self.attune_json("manual"), {"manual": self.attune("manual").out})
        for shell in ("bash", "zsh", "fish"):
            self.assertEqual(self.attune_json("completion", shell), {"script": self.attune("completion", shell).out})

    def test_unknown_shell(self):
        self.assert_fails(2, "{bash,zsh,fish}", "completion", "csh")

    @needs("bash")
    def test_bash_completes(self):
        script = self.script("bash")
        for line, expected in (("attune ca", ["cache"]), ("attune cache l", ["list"]),
                               ("attune cache list --so", ["--sort"]),
                               ("attune cache list --sort s", ["size"]),
                               ("attune --json cache list --sort a", ["age"]),
                               ("attune precompile --l", ["--list"]), ("attune completion f", ["fish"]),
                               ("attune cache list --target x", []), ("attune emit --out /", []),
                               ("attune cache verify --j", ["--json"])):
            with self.subTest(line=line):
                words = " ".join(line.split())
                done = subprocess.run(
                    ["bash", "-c", f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(line.split()) - 1}; _attune; "
                     'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True, timeout=60, check=True)
                self.assertEqual((done.stdout.split(), done.stderr), (expected, ""))

    @needs("zsh")
    def test_zsh_completes(self):
        script = self.script("zsh")
        for line, expected in (("attune cache list --sort s", ["key", "size", "hits", "age", "used", "target", "candidate"]),
                               ("attune completion x", ["-h", "--help", "bash", "zsh", "fish", "--json"]),
                               ("attune emit --out x", ["files"])):
            with self.subTest(line=line):
                done = subprocess.run(
                    ["zsh", "-f", "-c", f"compdef() {{ }}; source {script}; compadd() {{ shift; print -l -- $@ }}; "
                     "_files() { print files }; _describe() { print -l -- ${next%%:*} }; "
                     f"words=({line}); CURRENT={len(line.split())}; _attune_words"],
                    capture_output=True, text=True, timeout=60, check=True)
                self.assertEqual((done.stdout.split(), done.stderr), (expected, ""))

    @needs("fish")
    def test_fish_completes(self):
        script = self.script("fish")
        for line, expected in (("attune cache li", ["list"]), ("attune cache list --sort si", ["size"]),
                               ("attune completion z", ["zsh"])):
            done = subprocess.run(["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"],
                                  capture_output=True, text=True, timeout=60, check=True)
            self.assertEqual([row.split("\t")[0] for row in done.stdout.splitlines()], expected)

    @needs("man")
    def test_man_reads_it(self):
        path = self.folder / "attune.1"
        path.write_text(self.attune("manual").out)
        done = subprocess.run(["man", "--warnings", "-l", path], capture_output=True, text=True, timeout=60, check=False,
                              env={"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LC_ALL": "C", "MANPAGER": "cat"})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        text = re.sub(".\\x08", "", done.stdout)
        self.assertIn("attune cache list", text)
        self.assertIn("--sort VALUE", text)


if __name__ == "__main__":
    main()
