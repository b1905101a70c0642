"""The documents: the README's example is the one that is compiled, and every relative link leads somewhere."""

import re
import subprocess
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def documents():
    return sorted(
        path
        for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "bench/**/*.md", "tests/**/*.md")
        for path in ROOT.glob(pattern)
    )


class Documents(unittest.TestCase):
    def test_readme_shows_the_compiled_example(self):
        blocks = re.findall(r"```cpp\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        self.assertIn((ROOT / "examples" / "01_forward.cpp").read_text(), blocks)

    def test_readme_shows_python_that_runs(self):
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
        self.assertEqual(len(blocks), 1)
        exec(compile(blocks[0], "README.md", "exec"), {})  # raises when it does not

    def test_the_python_page_runs(self):
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
        self.assertEqual(len(blocks), 5)
        names = {}  # one program, read from top to bottom
        for block in blocks:
            exec(compile(block, "python.md", "exec"), names)

    def test_relative_links_resolve(self):
        links = 0
        for document in documents():
            for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
                if "://" in target:
                    continue
                links += 1
                with self.subTest(document=str(document.relative_to(ROOT)), target=target):
                    self.assertTrue((document.parent / target).exists())
        self.assertGreater(links, 10)

    def test_scripts_parse(self):
        for script in sorted(ROOT.glob("tools/*.sh")) + [ROOT / ".ci" / "run"]:
            with self.subTest(script.name):
                subprocess.run(["bash", "-n", str(script)], check=True)


if __name__ == "__main__":
    unittest.main()
