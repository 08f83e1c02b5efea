# SPDX-License-Identifier: Apache-2.0
"""MiniWoB++ turns a second: one, two and four browsers, each in a process of its own, and BrowserGym as it comes.

    python examples/benchmarks/browsers.py [--episodes 6] [--rounds 3]

Episodes of ten turns that do nothing, on click-checkboxes; resets count. BrowserGym as it comes (its delays, its chat
window, a new browser for each episode) plays in one process. The settings alternate, round by round.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.common import (
    RESULTS,
    ROOT,
    describe,
    machine,
    markdown_table,
    read_json,
    versions,
    write_json,
    write_section,
)

RESULT = RESULTS / "browsers.json"
PAGE = ROOT / "docs" / "miniwob.md"
TASK = "click-checkboxes"
TURNS = 10
BROWSERS = (1, 2, 4)


class Waiting:
    """A policy that does nothing."""

    def act(self, requests: list[Any]) -> list[Any]:
        from vlmq_trl.rollout import Response

        return [Response("noop(0)") for _ in requests]


def here(browsers: int, episodes: int, seed: int) -> float:
    """Turns a second of `browsers` environments of this package; their start does not count."""
    from vlmq_trl import PlainFormat
    from vlmq_trl.rollout import Rollouts

    rollouts = Rollouts(
        f"vlmq_trl/MiniWoB-{TASK}-v0", agent_format=PlainFormat(), num_envs=browsers, seed=seed, workers=True
    )
    with rollouts:
        list(rollouts.play(Waiting(), range(browsers)))
        start = time.perf_counter()
        played = list(rollouts.play(Waiting(), range(browsers, browsers + episodes * browsers)))
        return sum(len(episode.turns) for episode in played) / (time.perf_counter() - start)


def as_it_comes(episodes: int, seed: int, pipe: Any) -> None:
    """Sends the turns a second of BrowserGym's own environment, with this machine's Chromium in place of its own."""
    import miniwob

    os.environ["MINIWOB_URL"] = (Path(miniwob.__file__).parent / "html" / "miniwob").as_uri() + "/"
    import browsergym.miniwob  # noqa: F401, registers the tasks
    import gymnasium
    from browsergym.core import _get_global_playwright
    from playwright.sync_api import BrowserType

    from vlmq_trl.envs.miniwob import find_chromium

    launch = BrowserType.launch
    setattr(BrowserType, "launch", lambda *a, **k: launch(*a, **k, executable_path=find_chromium()))  # noqa: B010
    env = gymnasium.make(f"browsergym/miniwob.{TASK}", disable_env_checker=True)
    turns, start = 0, 0.0
    for episode in range(episodes + 1):
        if episode == 1:
            start = time.perf_counter()
        env.reset(seed=seed + episode)
        for _ in range(TURNS):
            env.step("noop(0)")
            turns += episode > 0
    pipe.send(turns / (time.perf_counter() - start))
    env.close()
    _get_global_playwright().stop()


def browsergym(episodes: int, seed: int) -> float:
    """`as_it_comes` in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=as_it_comes, args=(episodes, seed, theirs))
    process.start()
    theirs.close()
    speed = float(ours.recv())
    process.join()
    return speed


def report() -> None:
    found = read_json(RESULT)
    assert found is not None
    medians = {kind: statistics.median(speeds) for kind, speeds in found["speeds"].items()}
    rows = [
        [
            kind,
            f"{medians[kind]:.2f}",
            f"{min(speeds):.2f} to {max(speeds):.2f}",
            f"{medians[kind] / medians['1']:.2f}",
        ]
        for kind, speeds in found["speeds"].items()
    ]
    text = (
        f"Episodes of {TURNS} turns that do nothing on {TASK}, resets included: medians of {found['rounds']} rounds "
        f"of {found['episodes']} episodes a browser, from seed {found['seed']}. "
        f"Load average at the start: {found['load']:.1f}.\n\n"
        + markdown_table(["browsers", "turns a second", "range", "against one"], rows)
        + f"\n\nOn: {describe(found['machine'])}. "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + f".\n\n`{found['command']}`"
    )
    write_section(PAGE, "browsers", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=6, help="a browser in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-only", action="store_true", help="write the report of the last run and stop")
    options = parser.parse_args()
    if not options.report_only:
        load = os.getloadavg()[0]
        speeds: dict[str, list[float]] = {"BrowserGym as it comes": [], **{str(n): [] for n in BROWSERS}}
        for turn in range(options.rounds):
            seed = options.seed + 1000 * turn
            for kind, measured in speeds.items():
                alone = kind not in map(str, BROWSERS)
                measured.append(
                    browsergym(options.episodes, seed) if alone else here(int(kind), options.episodes, seed)
                )
                print(f"round {turn}, {kind}: {measured[-1]:.2f} turns a second", flush=True)
        script = "python examples/benchmarks/browsers.py"
        result = {
            "command": f"{script} --episodes {options.episodes} --rounds {options.rounds} --seed {options.seed}",
            "episodes": options.episodes,
            "rounds": options.rounds,
            "seed": options.seed,
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
