# SPDX-License-Identifier: Apache-2.0
"""Turns per second of rollouts: many environments answered in batches, against one environment at a time.

    python examples/benchmarks/rollout.py                       # about 10 minutes on 2 free cores
    python examples/benchmarks/rollout.py --repetitions 2 --turns 64 --force

NumberLine, played by the embedded model with the chain-of-thought format, sampled at temperature 1, at most 48 tokens
a turn. The one-at-a-time loop (the usual one of reinforcement learning for VLMs, as in RL4VLM) resets one environment,
generates for its one prompt, steps it. Both live in one process and take turns, loop, batch, loop, batch ...; the
ratio is taken pair by pair. Then the number of environments is varied, in this process and in processes of their own.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

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
from vlmq_trl.agent_format import default_format
from vlmq_trl.rollout import Policy, Request, Response, Rollouts, make_env

ENV_ID = "vlmq_trl/NumberLine-v0"
SEED = 0
NUM_ENVS = 16
GRID = (1, 4, 16, 32, 64)
TARGET = 6.0


class Counting:
    """A policy that counts the turns it answers and the time that it takes."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.turns, self.seconds = 0, 0.0

    def act(self, requests: list[Request]) -> list[Response]:
        start = time.perf_counter()
        responses = self.policy.act(requests)
        self.seconds += time.perf_counter() - start
        self.turns += len(requests)
        return responses


def one_at_a_time(policy: Policy) -> Iterator[None]:
    """Plays for ever; yields after each turn."""
    env = make_env(ENV_ID)
    agent_format = default_format(env)
    for seed in itertools.count(SEED):
        rng = np.random.default_rng((seed, 1))
        observation, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            prompt, images = agent_format.build_prompt(env.get_wrapper_attr("task"), observation)
            (response,) = policy.act([Request(env, prompt, images, rng)])
            observation, _, terminated, truncated, _ = env.step(agent_format.parse(response.text).action)
            ended = terminated or truncated
            yield


def measured(policy: Counting, playing: Iterator[Any], turns: int) -> dict[str, float]:
    """Plays `turns` turns or a little more, from the middle of the first episodes on."""
    next(playing)  # start-up, and what is loaded on first use
    policy.turns, policy.seconds = 0, 0.0
    start = time.perf_counter()
    while policy.turns < turns:
        next(playing)
    seconds = time.perf_counter() - start
    return {"turns_per_second": policy.turns / seconds, "outside_policy": 1 - policy.seconds / seconds}


def measure_loop(policy: Policy, turns: int) -> dict[str, float]:
    counting = Counting(policy)
    return measured(counting, one_at_a_time(counting), turns)


def measure_rollouts(policy: Policy, turns: int, num_envs: int, workers: bool) -> dict[str, float]:
    """Until the episode that ends next after so many turns: in the steady state, where all environments are busy."""
    counting = Counting(policy)
    with Rollouts(ENV_ID, num_envs=num_envs, workers=workers, seed=SEED) as rollouts:
        return measured(counting, rollouts.play(counting, itertools.count()), turns)


def measure(policy: Policy, repetitions: int, turns: int, grid_turns: int) -> dict[str, Any]:
    """Both ways in turn, then the grid."""
    pairs: list[dict[str, float]] = []
    for number in range(repetitions):
        loop = measure_loop(policy, turns // 4)["turns_per_second"]
        batch = measure_rollouts(policy, turns, NUM_ENVS, workers=False)["turns_per_second"]
        pairs.append({"loop": loop, "batch": batch, "ratio": batch / loop})
        print(f"pair {number}: {loop:.2f} and {batch:.2f} turns a second, ratio {batch / loop:.2f}", flush=True)
    grid = []
    for num_envs, workers in itertools.product(GRID, (False, True)):
        least = max(grid_turns, 4 * num_envs) if num_envs > 1 else grid_turns // 4
        found = measure_rollouts(policy, least, num_envs, workers)
        grid.append({"num_envs": num_envs, "workers": workers, **found})
        where = "processes" if workers else "this process"
        print(f"{num_envs} in {where}: {found['turns_per_second']:.2f} turns a second", flush=True)
    return {"pairs": pairs, "ratio": statistics.median(pair["ratio"] for pair in pairs), "grid": grid}


def embedded_policy() -> Policy:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmq_trl import EmbeddedRecipe, ModelPolicy, load_embedded_model

    path = load_embedded_model(EmbeddedRecipe(games=("NumberLine",)))
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    model.to("cuda" if machine()["gpu"] else "cpu")
    processor = AutoProcessor.from_pretrained(path)
    return ModelPolicy(model, processor, temperature=1.0, max_completion_length=48, batch_size=max(GRID))


def section(result: dict[str, Any]) -> str:
    """The page's text and tables."""
    ratios = [pair["ratio"] for pair in result["pairs"]]
    loop, batch = (statistics.median(pair[way] for pair in result["pairs"]) for way in ("loop", "batch"))
    load = result["load_average"]
    lines = [
        "NumberLine, played by the embedded model with the chain-of-thought format, sampled at temperature 1, at most "
        "48 tokens a turn. One environment at a time with one `generate` a turn, against "
        f"{NUM_ENVS} environments answered in batches, in turn in one process: the median over pairs and their range. "
        f"Target: at least {TARGET:g} times as many turns a second.",
        markdown_table(
            ["pairs", "one at a time", f"{NUM_ENVS} in batches", "ratio", "target"],
            [
                [
                    str(len(ratios)),
                    f"{loop:.2f} turns/s",
                    f"{batch:.2f} turns/s",
                    f"**{result['ratio']:.2f}** ({min(ratios):.2f}–{max(ratios):.2f})",
                    "reached" if result["ratio"] >= TARGET else "missed",
                ]
            ],
        ),
        "By the number of environments, in the trainer's process and in processes of their own, one measurement each; "
        "in brackets the share of the time that goes to environments and prompts, not to the model:",
    ]
    cells = {(row["num_envs"], row["workers"]): row for row in result["grid"]}
    rows = []
    for num_envs in sorted({num_envs for num_envs, _ in cells}):
        both = (cells[num_envs, workers] for workers in (False, True))
        rows.append(
            [str(num_envs), *(f"{c['turns_per_second']:.2f} ({100 * c['outside_policy']:.1f} %)" for c in both)]
        )
    lines.append(markdown_table(["environments", "turns/s, in-process", "turns/s, processes"], rows))
    lines.append(
        f"On: {describe(result['machine'])}, {result['machine']['threads']} threads; load average before the start "
        f"{load:.1f}{' (the machine was shared)' if load > 0.5 else ''}. Seed {SEED}. "
        f"{', '.join(f'{name} {number}' for name, number in result['versions'].items())}."
    )
    lines.append(f"`{result['command']}`")
    return "\n\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of measurements in turn")
    parser.add_argument("--turns", type=int, default=320, help="of a batched measurement; the loop plays a quarter")
    parser.add_argument("--grid-turns", type=int, default=192, help="of a measurement with another number")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--report-only", action="store_true", help="write the report and stop")
    options = parser.parse_args()
    if min(options.repetitions, options.turns // 4, options.grid_turns // 4) < 1:
        parser.error("--repetitions must be at least 1, --turns and --grid-turns at least 4")
    here = machine()
    path = RESULTS / "rollout" / f"{'gpu' if here['gpu'] else 'cpu'}.json"
    result = read_json(path)
    if result is None or (options.force and not options.report_only):
        if options.report_only:
            parser.error(f"there is no result yet: {path}")
        load = os.getloadavg()[0]
        command = (
            f"python examples/benchmarks/rollout.py --repetitions {options.repetitions} --turns {options.turns} "
            f"--grid-turns {options.grid_turns}"
        )
        print(f"{command}\nseed {SEED}; {describe(here)}, {here['threads']} threads, load {load:.1f}; {versions()}")
        start = time.perf_counter()
        result = {
            "command": command,
            "seed": SEED,
            "machine": here,
            "load_average": load,
            "versions": versions(),
            **measure(embedded_policy(), options.repetitions, options.turns, options.grid_turns),
        }
        result["wall_seconds"] = time.perf_counter() - start
        write_json(path, result)
    print(f"{NUM_ENVS} in batches: x {result['ratio']:.2f}; {path}")
    write_section(PAGE, "rollout", section(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
