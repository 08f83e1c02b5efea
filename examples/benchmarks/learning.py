# SPDX-License-Identifier: Apache-2.0
"""The learning benchmark: Gym Cards settings x methods x seeds, and ablations on NumberLine.

    python examples/benchmarks/learning.py                       # all that is missing (hours), then the report
    python examples/benchmarks/learning.py --only 'EZPoints/*' --seeds 0
    python examples/benchmarks/learning.py --list                # what is done and what is not
    python examples/benchmarks/learning.py --report-only         # docs/results.md and README.md from what is there

A run is one method on one setting with one seed: `examples/train_agent.py` in a process of its own, then one JSON
file under `examples/benchmarks/results/`. A file whose arguments are the present ones is not computed again. The seed
decides the data, the training and the test episodes; the embedded model is the same throughout. Weights are selected
on validation episodes, the figures come from other, fresh ones.
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.common import (
    PAGE,
    RESULTS,
    ROOT,
    SEEDS,
    Run,
    arithmetic,
    as_flags,
    command_line,
    describe,
    machine,
    make_room,
    markdown_table,
    read_json,
    versions,
    write_json,
    write_section,
)
from vlmq_trl.metrics import wilson_interval

# A third less time where the processor multiplies bfloat16 by itself; elsewhere it would be slower. A GPU waits for
# the launches of a model of this size, so that there more environments at once cost nothing.
ON_GPU = torch.cuda.is_available()
FAST_BF16 = not ON_GPU and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
# The machine's choices, and no reason to compute a run again.
CHOICES: dict[str, Any] = {"bf16": FAST_BF16, **({"rollout_num_envs": 64, "eval_num_envs": 256} if ON_GPU else {})}

# Arguments of `train_agent.py`: of all runs, of each setting, of each method, of a method in a setting.
# The later wins.
COMMON: dict[str, Any] = {
    "learning_rate": 1e-3,
    "critic_learning_rate": 3e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "per_device_train_batch_size": 32,
    "token_lambda": 0.95,
    "value_expectile": 0.8,
    "filter": "binary",
    "conservative_coef": 0.1,
    "test_episodes": 1000,
    "before_episodes": 0,
}
# The points games pay at the end, for four and more right actions in a row: docs/algorithm.md, "Returns".
STEP_BY_STEP: dict[str, Any] = {
    "off_policy_trace": "tree_backup",
    "token_lambda": 1.0,
    "turn_lambda": 1.0,
    "gamma": 1.0,
    "filter": "exp",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "NumberLine": {
        "title": "NumberLine, random play",
        "known": "RL4VLM with a 7B model: 89.4; CoSo, 7B: 100; the limit: 100.",
        "arguments": {
            "game": "NumberLine",
            "policy": "random",
            "episodes": 1000,
            "max_steps": 400,
            "eval_steps": 50,
            "eval_episodes": 200,
            "max_completion_length": 48,
        },
        "methods": {},
    },
    "Blackjack": {
        "title": "Blackjack, random play",
        "known": "RL4VLM with a 7B model: 40.2; CoSo, 7B: 41.5; optimal play: about 43.",
        "arguments": {
            "game": "Blackjack",
            "policy": "random",
            "episodes": 20000,
            # Good play takes several good decisions in a row: docs/algorithm.md, "Returns".
            "off_policy_trace": "tree_backup",
            "turn_lambda": 0.95,
            "gamma": 1.0,
            "per_device_train_batch_size": 64,
            "max_steps": 750,
            "lr_scheduler_type": "cosine",
            "eval_steps": 100,
            "eval_episodes": 2000,
            "max_completion_length": 96,
            "test_episodes": 10000,
            "sampled_test_episodes": 2000,
        },
        "methods": {},
    },
    "EZPoints": {
        "title": "EZPoints, 60 % of the actions systematically wrong",
        "known": "RL4VLM with a 7B model: 50.0; the limit: 100.",
        "arguments": {
            "game": "EZPoints",
            "policy": "flawed:0.6",
            "episodes": 3000,
            **STEP_BY_STEP,
            "max_steps": 2400,
            "lr_scheduler_type": "cosine",
            "eval_steps": 200,
            "eval_episodes": 300,
            "max_completion_length": 64,
        },
        "methods": {},
    },
    "Points24": {
        "title": "Points24, 30 % of the actions systematically wrong",
        "known": "RL4VLM with a 7B model: 2.3; GTR-Turbo, 7B: 53.5; the limit: about 73, the solvable hands.",
        "arguments": {
            "game": "Points24",
            "policy": "flawed:0.3",
            "episodes": 6000,
            **STEP_BY_STEP,
            "max_steps": 1500,
            "lr_scheduler_type": "cosine",
            "eval_steps": 250,
            "eval_episodes": 300,
            "max_completion_length": 80,
        },
        "methods": {},
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft", "before_episodes": 300},
    "filtered_bc": {"method": "filtered_bc", "top_fraction": 0.1},
    "vlmq_scalar": {"method": "vlmq", "critic_type": "scalar"},
    "vlmq_vocab": {
        "method": "vlmq",
        "critic_type": "vocab",
        "critic_learning_rate": 5e-3,
        "off_policy_trace": "tree_backup",
    },
}
NAMES = {
    "sft": "SFT",
    "filtered_bc": "filtered cloning, best tenth",
    "vlmq_scalar": "VLMQ, scalar critic",
    "vlmq_vocab": "VLMQ, vocabulary-wide critic",
}
# On NumberLine. What is not said is as in its `vlmq_scalar`.
SCALAR, VOCAB = METHODS["vlmq_scalar"], METHODS["vlmq_vocab"]
LONG = {"max_completion_length": 128}
ABLATIONS: dict[str, dict[str, Any]] = {
    "long_sft": {**METHODS["sft"], **LONG, "before_episodes": 0},
    "long_token_lambda_0": {**SCALAR, **LONG, "token_lambda": 0.0},
    "long_token_lambda_0.95": {**SCALAR, **LONG, "token_lambda": 0.95},
    "filter_none": {**SCALAR, "filter": "none"},
    "filter_exp": {**SCALAR, "filter": "exp"},
    "value_expectile_0.5": {**SCALAR, "value_expectile": 0.5},
    "scalar_tree_backup": {**SCALAR, "off_policy_trace": "tree_backup"},
    "vocab_no_trace": {name: value for name, value in VOCAB.items() if name != "off_policy_trace"},
    "vocab_conservative_0": {**VOCAB, "conservative_coef": 0.0},
}
# Title, then lines: the name in the table, the run.
ABLATION_TABLES: list[tuple[str, list[tuple[str, str]]]] = [
    (
        "A chain of thought about 60 tokens longer",
        [
            ("SFT", "long_sft"),
            ("`token_lambda` 0", "long_token_lambda_0"),
            ("`token_lambda` 0.95", "long_token_lambda_0.95"),
        ],
    ),
    ("Filter", [("`none`", "filter_none"), ("`binary`", "vlmq_scalar"), ("`exp`", "filter_exp")]),
    ("Expectile of V", [("0.5", "value_expectile_0.5"), ("0.8", "vlmq_scalar")]),
    (
        "Trace",
        [
            ("scalar critic, `none`", "vlmq_scalar"),
            ("scalar critic, `tree_backup`", "scalar_tree_backup"),
            ("vocabulary-wide critic, `none`", "vocab_no_trace"),
            ("vocabulary-wide critic, `tree_backup`", "vlmq_vocab"),
        ],
    ),
    (
        "Conservative term of the vocabulary-wide critic",
        [("without (0)", "vocab_conservative_0"), ("with (0.1)", "vlmq_vocab")],
    ),
]


class LearningRun(Run):
    """Its variant is one of METHODS or, on NumberLine, of ABLATIONS."""

    script = "learning.py"

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `train_agent.py`."""
        setting = SETTINGS[self.setting]
        if self.variant in ABLATIONS:
            own = {**setting["methods"].get("vlmq_scalar", {}), **ABLATIONS[self.variant]}
        else:
            own = {**METHODS[self.variant], **setting["methods"].get(self.variant, {})}
        return {
            **COMMON,
            **setting["arguments"],
            **own,
            "seed": self.seed,
            "collection_seed": 100_000 * self.seed,
            "test_seed": 2_000_000 + 100_000 * self.seed,
        }

    @property
    def argv(self) -> list[str]:
        return as_flags({**self.arguments, **CHOICES})


def all_runs() -> list[LearningRun]:
    """Seed by seed, so that the first figures for everything come early."""
    variants = [(setting, method) for setting in SETTINGS for method in METHODS]
    variants += [("NumberLine", ablation) for ablation in ABLATIONS]
    return [LearningRun(setting, variant, seed) for seed in SEEDS for setting, variant in variants]


# ---- one run, in a process of its own ----


def long_format() -> Any:
    """NumberLine's own format, with a truthful and neutral text of about 60 tokens before the thought."""
    from vlmq_trl import CallableFormat, make_format
    from vlmq_trl.envs import NumberLine

    base = make_format("json_cot", reading_fields=NumberLine.reading_fields)

    def render(action: str, reading: dict[str, str], thoughts: str) -> str:
        text = (
            f"current number is {reading['current number']}, target number is {reading['target number']}. "
            "- moves the current number down by one, + moves it up by one. The game ends at the target number "
            f"{reading['target number']}."
        )
        return base.render(action, reading, f"{text} {thoughts}")

    return CallableFormat(render_fn=render, base=base)


def work(run: LearningRun) -> None:
    """Computes one run and writes its JSON."""
    from examples import train_agent

    start = time.perf_counter()
    output = ROOT / "runs" / "benchmarks" / run.name
    make_room(output, run.arguments)
    argv = [*run.argv, "--output_dir", str(output), "--disable_tqdm", "true", "--save_strategy", "no"]
    found = train_agent.main(argv, long_format() if run.variant.startswith("long_") else None)
    (measured,) = found["methods"].values()
    write_json(
        run.path,
        {
            "run": run.name,
            "command": run.command,
            "arguments": run.arguments,
            "choices": CHOICES,
            "machine": machine(),
            "versions": versions(),
            "wall_seconds": time.perf_counter() - start,
            "data": found["data"],
            "before": found["before"],
            **measured,
        },
    )


def prepare(runs: list[LearningRun]) -> list[LearningRun]:
    """Builds the embedded models that the runs need, one after the other and before they all want them at once.

    Returns:
        The runs that have their model: one that does not learn to read its setting does not stop the others.
    """
    from examples import train_agent
    from vlmq_trl.embedded import ReadingError

    unread = set()
    for run in {run.setting: run for run in runs}.values():
        script, _, _ = train_agent.parse(run.argv)
        try:
            train_agent.embedded_model(script)
        except ReadingError as error:
            unread.add(run.setting)
            print(f"{run.setting} is left out: {error}", flush=True)
    return [run for run in runs if run.setting not in unread]


# ---- the report ----


def pooled(results: list[dict[str, Any]], mode: str, solvable: bool = False) -> dict[str, float] | None:
    """Over seeds: the rate of all episodes together, Wilson's 95 % interval of it, the worst and the best seed."""
    tests = [result[mode] for result in results]
    if not tests:
        return None
    counts = [(test["successes"], test["solvable" if solvable else "episodes"]) for test in tests]
    successes, episodes = map(sum, zip(*counts, strict=True))
    low, high = wilson_interval(successes, episodes)
    rates = [s / n for s, n in counts]
    return {
        "rate": successes / episodes,
        "low": low,
        "high": high,
        "worst": min(rates),
        "best": max(rates),
        "episodes": episodes,
        "seeds": len(tests),
    }


def cells(level: dict[str, float] | None) -> list[str]:
    """Two cells: rate with its interval, and the range over seeds."""
    if level is None:
        return ["–", "–"]
    return [
        f"**{100 * level['rate']:.1f}** ({100 * level['low']:.1f}–{100 * level['high']:.1f})",
        f"{100 * level['worst']:.1f}–{100 * level['best']:.1f}" + ("" if level["seeds"] == len(SEEDS) else " *"),
    ]


def finished(setting: str, variant: str) -> list[dict[str, Any]]:
    return [r for seed in SEEDS if (r := LearningRun(setting, variant, seed).result()) is not None]


def data_level(setting: str, variants: Iterable[str]) -> dict[str, float] | None:
    """Of the data of all seeds that one of these variants has learned from."""
    runs = [[LearningRun(setting, variant, seed).result() for variant in variants] for seed in SEEDS]
    data = [found[0]["data"] for results in runs if (found := [r for r in results if r is not None])]
    return pooled([{"data": d} for d in data], "data")


def line(name: str, results: list[dict[str, Any]], solvable: bool = False) -> list[str]:
    """A row of a setting's table."""
    row = [name, *cells(pooled(results, "greedy", solvable)), *cells(pooled(results, "sampled", solvable))]
    return [*row, ", ".join(str(r["best_step"]) for r in results)]


# Arguments that a setting's table does not list: they are said elsewhere on the page, or decide nothing.
NOT_LEARNING = {"game", "policy", "episodes", "max_completion_length", "before_episodes"} | {
    f"{part}_{name}" for part in ("eval", "test", "sampled_test") for name in ("episodes", "steps")
}
HEADER = ["", "greedy, %", "seeds", "sampled, %", "seeds", "best step"]


def listed(arguments: dict[str, Any]) -> str:
    """Arguments that decide what is learned, as text."""
    return ", ".join(f"`{name}` {value}" for name, value in arguments.items() if name not in NOT_LEARNING)


def setting_section(setting: str) -> str:
    described, by_method = SETTINGS[setting], {method: finished(setting, method) for method in METHODS}
    data = data_level(setting, METHODS)
    if data is None:
        return ""
    arguments = described["arguments"]
    before = [r["before"] for r in by_method["sft"] if r["before"]]
    rows = [["the data", "–", "–", *cells(data), ""]]
    if before:
        rows.append(["before training", *cells(pooled(before, "greedy")), *cells(pooled(before, "sampled")), ""])
    rows += [line(NAMES[method], results) for method, results in by_method.items()]
    text = (
        f"### {described['title']}\n\n{arguments['episodes']:,} episodes of data. Known figures, greedy or nearly so: "
        f"{described['known']} Settings: {listed(arguments)}.\n\n{markdown_table(HEADER, rows)}\n"
    )
    if setting == "Points24":
        rows = [line(NAMES[method], results, solvable=True) for method, results in by_method.items()]
        text += f"\nOf the hands that have a solution:\n\n{markdown_table(HEADER, rows)}\n"
    return text


def ablation_section() -> str:
    parts = []
    for title, lines in ABLATION_TABLES:
        rows = [line(name, finished("NumberLine", run)) for name, run in lines]
        if any(finished("NumberLine", run) for _, run in lines):
            parts.append(markdown_table([title, *HEADER[1:]], rows))
    return "### Ablations on NumberLine\n\n" + "\n\n".join(parts) if parts else ""


def target_section() -> str:
    """What was to be reached, greedy, and whether it was."""
    rows = []

    def verdict(reached: bool) -> str:
        return "reached" if reached else "**missed**"

    missing = ["–", "not run"]
    for setting, target in (("NumberLine", 0.98), ("Blackjack", 0.415), ("EZPoints", 0.85)):
        level = pooled(finished(setting, "vlmq_scalar"), "greedy")
        wanted = f"{setting}: VLMQ, scalar critic, at least {100 * target:g} %"
        found = [f"{100 * level['rate']:.1f}", verdict(level["rate"] >= target)] if level else missing
        rows.append([wanted, *found])
    for setting in ("EZPoints", "Points24"):
        ours = pooled(finished(setting, "vlmq_scalar"), "greedy")
        others = [pooled(finished(setting, method), "greedy") for method in ("sft", "filtered_bc")]
        found = missing
        if ours is not None and None not in others:
            margin = ours["rate"] - max(other["rate"] for other in others)
            apart = all(ours["low"] > other["high"] for other in others)
            found = [
                f"{100 * margin:+.1f}, intervals {'apart' if apart else 'overlap'}",
                verdict(margin >= 0.10 and apart),
            ]
        rows.append([f"{setting}: 10 points over SFT and filtered cloning, intervals apart", *found])
    results = finished("NumberLine", "sft")
    if results:
        data, sft = data_level("NumberLine", ["sft"]), pooled(results, "sampled")
        rows.append(
            [
                "NumberLine: SFT stays at its data's level (sampled, within 5 points)",
                f"{100 * sft['rate']:.1f} against {100 * data['rate']:.1f}",
                verdict(abs(sft["rate"] - data["rate"]) <= 0.05),
            ]
        )
    return "### Targets\n\n" + markdown_table(["target", "measured", ""], rows)


def report() -> None:
    """Writes the generated parts of docs/results.md and README.md, and docs/learning_curves.png."""
    done = [result for run in all_runs() if (result := run.result()) is not None]
    sections = [target_section(), *map(setting_section, SETTINGS), ablation_section()]
    text = "Nothing has been measured yet: run `make bench`."
    if done:
        machines = sorted({describe(r["machine"]) for r in done})
        used = done[-1]["versions"]
        hours = sum(r["wall_seconds"] for r in done) / 3600
        text = (
            f"{len(done)} of {len(all_runs())} runs, {hours:.1f} hours of computing, on: {'; '.join(machines)}. "
            + ", ".join(f"{name} {number}" for name, number in used.items())
            + ".\n\nSuccess in %: all seeds' test episodes together, with Wilson's 95 % interval, and in the column "
            f"beside it the worst and the best of the {len(SEEDS)} seeds (*: not all are done). `best step` is where "
            "each seed's validation was best. What a step costs stands under Cost: these runs shared their machine. "
            f"{arithmetic(done)} Settings of all, unless said otherwise: {listed(COMMON)}; a method's own are in "
            "`learning.py`."
            "\n\n![Learning curves](learning_curves.png)\n\n" + "\n\n".join(filter(None, sections))
        )
        plot(ROOT / "docs" / "learning_curves.png")
    write_section(PAGE, "learning", text)
    write_section(ROOT / "README.md", "learning", summary())


def summary() -> str:
    """The README's table: greedy success of each method in each setting, and of `tabular.py`'s Q-learning."""
    variants = ["sft", "filtered_bc", "vlmq_scalar", "vlmq_vocab"]
    tables = (read_json(RESULTS / "tabular.json") or {"results": []})["results"]
    rows = []
    for setting, described in SETTINGS.items():
        levels = [pooled(finished(setting, variant), "greedy") for variant in variants]
        if not any(levels):
            continue
        told = [table for table in tables if table["setting"] == setting]
        data = data_level(setting, variants)
        shown = [
            f"{100 * level['rate']:.1f}" + ("" if level["seeds"] == len(SEEDS) else " *") if level else "–"
            for level in levels
        ]
        wins = sum(table["successes"]["q_learning"] for table in told)
        limit = f"{100 * wins / sum(table['test_episodes'] for table in told):.1f}" if told else "–"
        rows.append([described["title"], f"{100 * data['rate']:.1f}", *shown, limit])
    if not rows:
        return "The table appears here once `make bench` has run."
    header = [
        "success in %, greedy",
        "the data",
        "SFT",
        "filtered cloning",
        "VLMQ",
        "VLMQ, vocabulary-wide",
        "Q-table",
    ]
    return markdown_table(header, rows)


def plot(path: Path) -> None:
    """Validation success of every method in every setting that has been run: mean over seeds, with the range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    shown = {s: described for s, described in SETTINGS.items() if any(finished(s, method) for method in METHODS)}
    if not shown:
        return
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(5.5 * columns, 3.8 * rows), dpi=110, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    for axes, (setting, described) in zip(panels.flat, shown.items(), strict=False):
        for method in METHODS:
            results = finished(setting, method)
            if not results:
                continue
            steps = [record["step"] for record in results[0]["history"]]
            rates = 100 * np.array([[record["success_rate"] for record in r["history"]] for r in results])
            (curve,) = axes.plot(steps, rates.mean(0), label=NAMES[method])
            axes.fill_between(steps, rates.min(0), rates.max(0), color=curve.get_color(), alpha=0.2, linewidth=0)
        data = data_level(setting, METHODS)
        axes.axhline(100 * data["rate"], linestyle="--", color="0.4", label="the data")
        axes.legend(fontsize=8)
        axes.set(title=described["title"], xlabel="optimiser steps", ylabel="success in %")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(command_line(__file__, __doc__.splitlines()[0], all_runs(), work, report, prepare))
