"""Adds up a CTest JUnit report: a line `PASSED FAILED SKIPPED`, then a line `NAME: REASON` for each skipped test."""

import sys
import xml.etree.ElementTree as ElementTree


def reason_of(case):
    """What the test printed about why it was skipped, else what CTest knows."""
    output = (case.findtext("system-out") or "").splitlines()
    said = [line.strip() for line in output if "skipped:" in line]
    if said:
        return said[-1].partition("skipped:")[2].strip()
    skipped = case.find("skipped")
    return (skipped.get("message") if skipped is not None else None) or "no reason given"


def main():
    cases = ElementTree.parse(sys.argv[1]).getroot().findall("testcase")
    passed = [case for case in cases if case.get("status") == "run"]
    skipped = [case for case in cases if case.get("status") in ("notrun", "disabled")]
    print(len(passed), len(cases) - len(passed) - len(skipped), len(skipped))
    for case in skipped:
        print(f"{case.get('name')}: {reason_of(case)}")


if __name__ == "__main__":
    main()
