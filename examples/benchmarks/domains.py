# SPDX-License-Identifier: Apache-2.0
"""The learning benchmark beyond Gym Cards: SFT, filtered cloning and VLMQ on the same systematically flawed play.

    python examples/benchmarks/domains.py                       # all that is missing (hours), then the report
    python examples/benchmarks/domains.py --only 'BabyAI-*/*' --seeds 0
    python examples/benchmarks/domains.py --list                # what is done and what is not
    python examples/benchmarks/domains.py --report-only         # docs/results.md from what is there

Runs are those of `learning.py`, in other environments: each has an embedded model of its own, which was taught to read
the environment's pictures and nothing else.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks import learning
from examples.benchmarks.common import (
    PAGE,
    RESULTS,
    SEEDS,
    arithmetic,
    command_line,
    describe,
    markdown_table,
    write_section,
)
from examples.benchmarks.learning import COMMON, HEADER, METHODS, NAMES, cells, line, listed, pooled

# Where right and wrong actions are several tokens that differ by a name or a digit.
BY_RETURN: dict[str, Any] = {
    # The limit is how an episode fails.
    "bootstrap_truncated": False,
    "token_lambda": 1.0,
    # All turns of an episode share its outcome: the critic learns sooner from its own values.
    "turn_lambda": 0.3,
    # docs/algorithm.md, "Filter and policy".
    "advantage_estimator": "return",
    # The readings are right; the actions are what is flawed. A binary filter would drop most of their tokens.
    "filter": "exp",
    "filter_temperature": 0.1,
    "filter_scope": "action",
    # Four in five tokens are the reading's, from which the critic learns nothing.
    "critic_scope": "action",
    "critic_coef": 10.0,
    "lr_scheduler_type": "cosine",
}
MINIWOB: dict[str, Any] = {
    **BY_RETURN,
    "env_options": ["max_turns=5"],
    "policy": "flawed:0.5",
    "episodes": 300,
    "segment_length": 5,
    "gamma": 0.9,
    "critic_warmup_steps": 50,
    "max_steps": 500,
    "eval_steps": 125,
    "eval_episodes": 30,
    "eval_num_envs": 10,
    "max_completion_length": 128,
    "test_episodes": 100,
    "embedded_steps": 300,
}

# Arguments of `train_agent.py`; what is not said is as in `learning.py`. The later wins.
SETTINGS: dict[str, dict[str, Any]] = {
    "BabyAI-GoToObj": {
        "title": "BabyAI, GoToObj",
        "about": "Find the object that the mission names and go to it, within 12 turns.",
        "arguments": {
            "env_id": "vlmq_trl/BabyAI-GoToObj-v0",
            "env_options": ["max_turns=12"],
            "policy": "flawed:0.5",
            "episodes": 1000,
            "off_policy_trace": "tree_backup",
            "turn_lambda": 0.95,
            "filter": "exp",
            "max_steps": 600,
            "lr_scheduler_type": "cosine",
            "eval_steps": 100,
            "eval_episodes": 200,
            "max_completion_length": 96,
            "test_episodes": 500,
        },
        # A detour costs little of the return: 0.3 forgives it. The readings are right; the actions are what is flawed.
        "methods": {"vlmq_scalar": {"filter_temperature": 0.05, "filter_scope": "action"}},
    },
    "ALFWorld-Pick": {
        "title": "ALFWorld, Pick",
        "about": "Find an object in a small household and put it where the goal says, within 20 turns.",
        "arguments": {
            "env_id": "vlmq_trl/ALFWorld-Pick-v0",
            "env_options": ["max_turns=20", "data=own", "unseen=True"],
            "policy": "flawed:0.5",
            "episodes": 500,
            **BY_RETURN,
            "segment_length": 20,
            "critic_warmup_steps": 100,
            # Commands are several words; after one that is none, the household does not even say where one is.
            "legal_actions_only": True,
            "max_steps": 400,
            "eval_steps": 100,
            "eval_episodes": 50,
            "max_completion_length": 96,
            "test_episodes": 200,
        },
        "methods": {"sft": {"before_episodes": 50}},
    },
}
SETTINGS |= {
    f"MiniWoB-{task}": {
        "title": f"MiniWoB++, {task}",
        "about": f"{about}, within 5 turns.",
        "arguments": {"env_id": f"vlmq_trl/MiniWoB-{task}-v0", **MINIWOB},
        "methods": {"sft": {"before_episodes": 50}},
    }
    for task, about in (
        ("enter-date", "Enter the date that the goal names and submit"),
        ("enter-time", "Enter the time that the goal names, which the field wants in 24 hours, and submit"),
    )
}
COMPARED = ("sft", "filtered_bc", "vlmq_scalar")
# Of a setting: on top of its `vlmq_scalar`.
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {"ALFWorld-Pick": {"learned_q": {"advantage_estimator": "q"}}}


class DomainRun(learning.LearningRun):
    """Its variant is one of COMPARED or of its setting's ABLATIONS."""

    script = "domains.py"

    @property
    def path(self) -> Path:
        return RESULTS / "domains" / self.setting / f"{self.variant}-seed{self.seed}.json"

    @property
    def arguments(self) -> dict[str, Any]:
        ablation = ABLATIONS.get(self.setting, {}).get(self.variant)
        method = self.variant if ablation is None else "vlmq_scalar"
        return {
            **COMMON,
            **SETTINGS[self.setting]["arguments"],
            **METHODS[method],
            **SETTINGS[self.setting]["methods"].get(method, {}),
            **(ablation or {}),
            "seed": self.seed,
            "collection_seed": 100_000 * self.seed,
            "test_seed": 2_000_000 + 100_000 * self.seed,
        }


def all_runs() -> list[DomainRun]:
    """Seed by seed, so that the first figures for everything come early."""
    variants = [(setting, variant) for setting in SETTINGS for variant in (*COMPARED, *ABLATIONS.get(setting, ()))]
    return [DomainRun(setting, variant, seed) for seed in SEEDS for setting, variant in variants]


# ---- the report ----


def finished(setting: str, variant: str) -> list[dict[str, Any]]:
    return [r for seed in SEEDS if (r := DomainRun(setting, variant, seed).result()) is not None]


def verdict(setting: str, mode: str) -> list[str]:
    """Two cells: VLMQ's lead on the better of the others, and whether its interval lies above theirs."""
    others = [pooled(finished(setting, variant), mode) for variant in COMPARED[:-1]]
    ours = pooled(finished(setting, COMPARED[-1]), mode)
    if ours is None or None in others:
        return ["–", "not run"]
    margin = ours["rate"] - max(other["rate"] for other in others)
    apart = all(ours["low"] > other["high"] for other in others)
    fewest = min(level["seeds"] for level in (ours, *others))
    so_far = "" if fewest == len(SEEDS) else f", {fewest} of {len(SEEDS)} seeds"
    return [f"{100 * margin:+.1f}", ("reached" if apart else "**missed**") + so_far]


def setting_section(setting: str) -> str:
    described, by_method = SETTINGS[setting], {variant: finished(setting, variant) for variant in COMPARED}
    results = [result for found in by_method.values() for result in found]
    if not results:
        return ""
    # All methods of a seed have learned from the same data.
    data = list({result["arguments"]["seed"]: {"data": result["data"]} for result in results}.values())
    before = [result["before"] for result in by_method["sft"] if result["before"]]
    rows = [["the data", "–", "–", *cells(pooled(data, "data")), ""]]
    if before:
        rows.append(["before training", *cells(pooled(before, "greedy")), *cells(pooled(before, "sampled")), ""])
    rows += [line(NAMES[variant], found) for variant, found in by_method.items()]
    arguments = described["arguments"]
    own = "".join(f"; {NAMES[v]}: {told}" for v, values in described["methods"].items() if (told := listed(values)))
    text = (
        f"### {described['title']}\n\n{described['about']} {arguments['episodes']:,} episodes of "
        f"`{arguments['policy']}` play. Settings: {listed(arguments)}{own}.\n\n{markdown_table(HEADER, rows)}"
    )
    for variant, other in ABLATIONS.get(setting, {}).items():
        if ablated := finished(setting, variant):
            as_is = {name: arguments[name] for name in other}
            rows = [line(listed(as_is), by_method["vlmq_scalar"]), line(listed(other), ablated)]
            text += f"\n\n{markdown_table(['Ablation', *HEADER[1:]], rows)}"
    return text


def report() -> None:
    """Writes the generated part of docs/results.md."""
    done = [result for run in all_runs() if (result := run.result()) is not None]
    if not done:
        write_section(PAGE, "domains", "Nothing has been measured yet: run `python examples/benchmarks/domains.py`.")
        return
    hours = sum(r["wall_seconds"] for r in done) / 3600
    rows = [
        [SETTINGS[setting]["title"], *verdict(setting, "greedy"), *verdict(setting, "sampled")] for setting in SETTINGS
    ]
    target = "VLMQ above SFT and filtered cloning, intervals apart; in points"
    parts = [
        f"{len(done)} of {len(all_runs())} runs, {hours:.1f} hours of computing, "
        f"on: {'; '.join(sorted({describe(r['machine']) for r in done}))}. "
        + ", ".join(f"{name} {number}" for name, number in done[-1]["versions"].items())
        + f".\n\nTables, tests and settings as under Learning. {arithmetic(done)}",
        markdown_table([target, "greedy", "", "sampled", ""], rows),
        *map(setting_section, SETTINGS),
    ]
    write_section(PAGE, "domains", "\n\n".join(filter(None, parts)))


if __name__ == "__main__":
    sys.exit(command_line(__file__, __doc__.splitlines()[0], all_runs(), learning.work, report, learning.prepare))
