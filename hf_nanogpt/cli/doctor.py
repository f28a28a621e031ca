"""The verb `doctor`."""

import sys

from . import VERBS
from .parser import Parser, quiet_libraries


def run_doctor(argv: list[str]) -> None:
    parser = Parser(prog="hf-nanogpt doctor", description=VERBS["doctor"], allow_abbrev=False)
    parser.add_argument(
        "checkpoint", nargs="?", help="folder or Hub id to check (default: three tiny models)"
    )
    checkpoint = parser.parse(argv).checkpoint

    quiet_libraries()
    from ..analysis.doctor import check_installation, describe_environment

    facts = describe_environment()
    width = max(map(len, facts))
    print(*(f"{name:<{width}}  {value}" for name, value in facts.items()), sep="\n")
    count, faults, model = 0, 0, None
    for finding in check_installation(checkpoint):
        if finding.model != model:
            model = finding.model
            print(f"\n{model}")
        count, faults = count + 1, faults + (not finding.is_right)
        print(f"  {'ok  ' if finding.is_right else 'FAIL'}  {finding.check}: {finding.detail}")
    if faults:
        print(f"\n{faults} of {count} checks failed: results here may be wrong.")
        print("Please report all of the above.")
        sys.exit(1)
    print("\nAll checks passed.")
