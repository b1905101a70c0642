"""Adds up a CTest JUnit report: a line `PASSED FAILED SKIPPED`, then a line `NAME: REASON` for each skipped test."""

import sys
import xml.etree.ElementTree as ElementTree


def is_skipped(case):
    """Did the test ask to be skipped? CTest also calls "not run" what has no executable, and that is a failure."""
    skipped = case.find("skipped")
    return skipped is not None and skipped.get("message", "").startswith("SKIP_")


def reason_of(case):
    """What the test printed about why it was skipped: what follows `skipped:`, else its last line."""
    output = [line.strip() for line in (case.findtext("system-out") or "").splitlines() if line.strip()]
    said = [line.partition("skipped:")[2].strip() for line in output if "skipped:" in line]
    return (said or output or ["no reason given"])[-1]


def main():
    cases = ElementTree.parse(sys.argv[1]).getroot().findall("testcase")
    skipped = [case for case in cases if is_skipped(case)]
    passed = sum(case.get("status") == "run" for case in cases)
    print(passed, len(cases) - passed - len(skipped), len(skipped))
    for case in skipped:
        print(f"{case.get('name')}: {reason_of(case)}")


if __name__ == "__main__":
    main()
