"""The command: `python -m fuzz --minutes 1 --seed 0`, and `python -m fuzz --case SEED:NUMBER` for one case."""

import argparse
import sys

from fuzz import run
from fuzz.programs import drawn


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=run.__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to draw (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the whole run (default 0)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case (default 0)")
    parser.add_argument("--case", metavar="SEED:NUMBER", help="print this case as a Python program, and run it")
    parser.add_argument("--work", metavar="SEED:FIRST:END", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        seed, first, end = map(int, given.work.split(":"))
        run.work(seed, range(first, end))
        return 0
    if given.case:
        seed, number = map(int, given.case.split(":"))
        run.settings(number)
        print(drawn(seed, number).text)
        result = run.one(seed, number)
        print(f"# {result.status} in {result.seconds:.1f} s {result.reason}")
        return result.status in ("failed", "crashed")
    return bool(run.campaign(given.seed, given.minutes, given.first))


if __name__ == "__main__":
    sys.exit(main())
