"""Runs one module of these tests against one build: run.py LIBRARY MODULE. CTest calls it.

Every run gets an empty cache folder. Exit status 77, which CTest shows as skipped: nothing could run here.
"""

import os
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77


def main():
    library, module = sys.argv[1:]
    sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests" / "python")]
    try:
        import numpy
    except ImportError:
        print("skipped: NumPy is not installed; tools/setup.sh installs it into .venv")
        return SKIPPED
    print(f"Python {sys.version.split()[0]}, NumPy {numpy.__version__}")
    with tempfile.TemporaryDirectory(prefix="attune_python_test_") as cache:
        os.environ["ATTUNE_CACHE_DIR"] = cache
        os.environ["ATTUNE_TEST_LIBRARY"] = library  # for the processes that tests start
        from attune import _library

        _library.load(library)
        try:
            suite = unittest.defaultTestLoader.loadTestsFromName(module)
        except unittest.SkipTest as reason:
            print(f"skipped: {reason}")
            return SKIPPED
        if suite.countTestCases() == 0:
            print(f"{module} has no tests")
            return 1
        result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2).run(suite)
    if not result.wasSuccessful():
        return 1
    if len(result.skipped) >= result.testsRun:
        print("skipped:", "; ".join(sorted({reason for _, reason in result.skipped})))
        return SKIPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
