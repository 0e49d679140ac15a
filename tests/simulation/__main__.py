"""`python -m tests.simulation`: run many seeds, or one, and say what happened.

Owns the command line, the processes and the gates: a simulation in which nothing goes wrong proves
nothing. Does not know what is simulated.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from multiprocessing import Pool
from typing import NamedTuple

import structlog

from tests.simulation import planted

# What must have happened at least, for each seed on average: faults that do not hit find nothing.
AT_LEAST = {"accepted": 100, "siblings": 10, "worker losses": 10, "preemptions": 10}
# So many seeds have all of that, and every pair of kinds of faults.
ENOUGH_SEEDS = 100
MAX_FAILURES = 5
NOT_FOUND, FOUND = 0, 1


class Outcome(NamedTuple):
    """What a seed gave. failure: the traceback, if something was wrong."""

    seed: int
    failure: str = ""
    digest: str = ""
    totals: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()


def main() -> int:
    arguments = _parse()
    if arguments.plant:
        planted.plant(arguments.plant)
    # Errors of the router arrive as exceptions; what it logs of faults is no news here.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(50), cache_logger_on_first_use=True
    )
    if arguments.seed is not None:
        outcome = simulate(arguments.seed, verbose=arguments.verbose)
        print(outcome.failure or f"seed {outcome.seed}: digest {outcome.digest}")
        return 1 if outcome.failure else 0
    if arguments.plant:
        return hunt(arguments.plant, arguments.seeds)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    if arguments.jobs == 1:
        return report(map(simulate, seeds), len(seeds))
    with Pool(arguments.jobs) as pool:
        return report(pool.imap(simulate, seeds, chunksize=4), len(seeds))


def simulate(seed: int, *, verbose: bool = False) -> Outcome:
    """Run one seed, in whichever process."""
    from tests.simulation.simulation import Simulation  # only now: a bug may have been planted

    try:
        run = Simulation(seed, verbose=verbose).run()
    except Exception:
        return Outcome(seed, failure=traceback.format_exc())
    return Outcome(seed, "", run.digest, run.totals, run.pairs)


def print_failure(outcome: Outcome, options: str = "") -> None:
    """Say what was wrong, and how to see it again."""
    print(f"seed {outcome.seed} fails: {outcome.failure}")
    command = f"python -m tests.simulation {options}--seed {outcome.seed} -v"
    print(f"replay it: {command}", flush=True)


def hunt(name: str, num_seeds: int) -> int:
    """Look for a planted bug with the fewest seeds, alone; returns FOUND or NOT_FOUND."""
    for outcome in map(simulate, range(num_seeds)):
        if outcome.failure:
            print_failure(outcome, f"--plant '{name}' ")
            return FOUND
    print(f"{num_seeds} seeds show nothing")
    return NOT_FOUND


def report(outcomes: Iterable[Outcome], num_seeds: int) -> int:
    """Print what happened, as it happens; returns the exit code."""
    began, failures = time.monotonic(), 0
    totals: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    digest = blake2b(digest_size=16)
    for outcome in outcomes:
        totals += outcome.totals
        pairs += outcome.pairs
        digest.update(outcome.digest.encode())
        if outcome.failure:
            failures += 1
            print_failure(outcome)
            if failures >= MAX_FAILURES:
                return 1
    for name, count in sorted(totals.items()):
        print(f"{count:12,} {name}")
    print(f"{len(pairs):12,} pairs of kinds of faults met, the rarest {min(pairs.values())} times")
    print(f"{num_seeds} seeds in {time.monotonic() - began:.0f} s, digest {digest.hexdigest()}")
    missed = _missed(totals, pairs, num_seeds) if num_seeds >= ENOUGH_SEEDS else []
    for gate in missed:
        print(f"too little happened: {gate}")
    return 1 if failures or missed else 0


def _missed(totals: Counter[str], pairs: Counter[tuple[str, str]], num_seeds: int) -> list[str]:
    from tests.simulation.faults import KINDS

    missed = [
        f"{totals[name]} {name}, not {least * num_seeds}"
        for name, least in AT_LEAST.items()
        if totals[name] < least * num_seeds
    ]
    missing = len(KINDS) * (len(KINDS) + 1) // 2 - len(pairs)
    return missed + ([f"{missing} pairs of kinds of faults never met"] if missing else [])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes to run them in")
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("-v", "--verbose", action="store_true", help="with --seed: print its trace")
    parser.add_argument("--plant", choices=planted.PLANTED, help="with a bug in the router")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
