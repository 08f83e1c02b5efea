# SPDX-License-Identifier: Apache-2.0
"""Environment turns a second, by domain and number of environments, without any model.

    python examples/benchmarks/environments.py [--seconds 4] [--rounds 3]

A policy that takes a random legal action, or does nothing in a web page, plays in this process and in a process for
each environment. What is counted is what rollouts do beside the model: resets, steps, pictures, prompts. The settings
alternate, round by round.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.common import (
    PAGE,
    RESULTS,
    describe,
    machine,
    markdown_table,
    read_json,
    versions,
    write_json,
    write_section,
)
from vlmq_trl import PlainFormat
from vlmq_trl.rollout import Request, Response, Rollouts

RESULT = RESULTS / "environments.json"
DOMAINS = {
    "Gym Cards, EZPoints": "vlmq_trl/EZPoints-v0",
    "BabyAI, GoToObj": "vlmq_trl/BabyAI-GoToObj-v0",
    "ALFWorld, Pick": "vlmq_trl/ALFWorld-Pick-v0",
    "MiniWoB++, click-checkboxes": "vlmq_trl/MiniWoB-click-checkboxes-v0",
}
NUMBERS = (1, 2, 4, 16)
SEED = 0


class RandomLegal:
    """A policy that sees no environment, and counts the turns that it answers."""

    turns = 0

    def act(self, requests: list[Request]) -> list[Response]:
        self.turns += len(requests)
        return [Response(str(r.rng.choice(r.legal_actions)) if r.legal_actions else "noop(0)") for r in requests]


def settings() -> list[tuple[str, int, bool]]:
    """Domain, number of environments, whether in processes of their own. A browser is always in one, and takes half a
    gigabyte."""
    return [
        (domain, number, workers)
        for domain, number, workers in itertools.product(DOMAINS, NUMBERS, (False, True))
        if "MiniWoB" not in domain or (workers and number <= 4)
    ]


def turns_a_second(domain: str, number: int, workers: bool, seconds: float, seed: int) -> float:
    """Of episodes that follow one another, once each environment has ended one."""
    with Rollouts(
        DOMAINS[domain], agent_format=PlainFormat(), num_envs=number, seed=seed, workers=workers
    ) as rollouts:
        for _ in rollouts.play(RandomLegal(), range(number)):
            pass
        policy, start = RandomLegal(), time.perf_counter()
        for _ in rollouts.play(policy, itertools.count(number)):
            if time.perf_counter() - start >= seconds:
                break
        return policy.turns / (time.perf_counter() - start)


def name(domain: str, number: int, workers: bool) -> str:
    return f"{domain}/{number}/{'processes' if workers else 'in-process'}"


def report() -> None:
    found: Any = read_json(RESULT)
    rows = []
    for domain in DOMAINS:
        speeds = {
            (number, workers): found["speeds"][name(domain, number, workers)]
            for which, number, workers in settings()
            if which == domain
        }
        (_, first), *_ = speeds.items()
        for number in NUMBERS:
            cells = []
            for workers in (False, True):
                if (number, workers) in speeds:
                    own = speeds[number, workers]
                    ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
                    cells.append(f"{statistics.median(own):,.1f} (**{ratio:.2f}**)")
                else:
                    cells.append("–")
            if cells != ["–", "–"]:
                rows.append([domain, str(number), *cells])
    text = (
        f"Turns a second without a model: random legal actions, in web pages none; resets, pictures and prompts "
        f"included. Medians of {found['rounds']} rounds of {found['seconds']:g} s or a little more, from seed {SEED}; "
        f"in brackets the ratio to the domain's first line in the same round. Load average at the start: "
        f"{found['load']:.1f}.\n\n"
        + markdown_table(["domain", "environments", "in one process", "in processes of their own"], rows)
        + f"\n\nOn: {describe(found['machine'])}. "
        + ", ".join(f"{package} {number}" for package, number in found["versions"].items())
        + f".\n\n`{found['command']}`"
    )
    write_section(PAGE, "environments", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report-only", action="store_true", help="write the report of the last run and stop")
    options = parser.parse_args()
    if not options.report_only:
        load = os.getloadavg()[0]
        speeds: dict[str, list[float]] = {name(*setting): [] for setting in settings()}
        for turn in range(options.rounds):
            for setting in settings():
                speed = turns_a_second(*setting, options.seconds, SEED + 100_000 * turn)
                speeds[name(*setting)].append(speed)
                print(f"round {turn}, {name(*setting)}: {speed:.1f} turns a second", flush=True)
        result = {
            "command": f"python examples/benchmarks/environments.py --seconds {options.seconds:g} "
            f"--rounds {options.rounds}",
            "seconds": options.seconds,
            "rounds": options.rounds,
            "seed": SEED,
            "load": load,
            "machine": machine(),
            "versions": versions(),
            "speeds": speeds,
        }
        write_json(RESULT, result)
    report()
    print(f"Report: {PAGE}")


if __name__ == "__main__":
    main()
