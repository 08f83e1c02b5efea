# SPDX-License-Identifier: Apache-2.0
"""The online benchmark: success against environment turns, beside TRL's own `GRPOTrainer`.

    python examples/benchmarks/online.py                       # all that is missing (hours), then the report
    python examples/benchmarks/online.py --only 'NumberLine/*' --seeds 0
    python examples/benchmarks/online.py --list                # what is done and what is not
    python examples/benchmarks/online.py --report-only

Every run starts from the embedded model, which reads and cannot play, and has a budget of environment turns. `online`
is VLMQ after an offline start on 200 flawed episodes; `purely_online` is VLMQ from nothing. `grpo` starts from SFT on
the same 200 episodes and learns single turns in their states, a group of answers to each, rewarded by the turn's own
reward; `grpo_return` by the return of the episode, which the policy plays to its end for that. Every turn counts.
Runs share the seeds of validation and test with one another, and with `learning.py` how they are kept: one JSON file a
run, not computed again while its arguments are the present ones.
"""

import sys
import time
from pathlib import Path
from typing import Any

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
    versions,
    write_json,
    write_section,
)
from examples.benchmarks.learning import CHOICES, COMMON, FAST_BF16, STEP_BY_STEP, cells, pooled

BUDGET = 15_000  # environment turns, RL4VLM's
ENOUGH = 0.9  # of the validation, for "turns to"

# The start, the same for all: 200 flawed episodes; and what validates and tests. Arguments of `train_agent.py`.
START: dict[str, Any] = {"episodes": 200, "eval_episodes": 300, "test_episodes": 1000}
GAMES: dict[str, dict[str, Any]] = {
    "NumberLine": {"policy": "flawed:0.6", "max_completion_length": 48},
    "EZPoints": {"policy": "flawed:0.6", "max_completion_length": 64},
    "Blackjack": {
        "policy": "flawed:0.6",
        "max_completion_length": 96,
        "eval_episodes": 2000,
        "test_episodes": 10_000,
        "sampled_test_episodes": 2000,
    },
    "Points24": {"policy": "flawed:0.3", "max_completion_length": 80},
}
# How VLMQ learns. The later wins: of all, of each method, of each game.
ONLINE: dict[str, Any] = {
    "method": "vlmq",
    "online": True,
    "max_env_turns": BUDGET,
    "filter": "exp",
    "turns_per_round": 500,
    "updates_per_turn": 0.1,
    "online_fraction": 0.75,
    "eval_steps": 50,
}
METHODS: dict[str, dict[str, Any]] = {
    "online": {
        "offline_steps": 200,
        "updates_per_turn": 0.05,
        "lr_scheduler_type": "cosine",
        # What imitates samples keeps their errors: sharper ones, from the newest play, with little of the flawed data.
        "rollout_temperature": 0.7,
        "replay_capacity": 5000,
        "online_fraction": 0.9,
        "rollout_epsilon": 0.05,
    },
    "purely_online": {
        "episodes": 0,
        "offline_steps": 0,
        "lr_scheduler_type": "cosine",
        # First it must find out, then it must not imitate its own errors.
        "rollout_temperature_start": 1.0,
        "rollout_temperature": 0.7,
        "rollout_epsilon_start": 0.1,
        "rollout_epsilon": 0.05,
        "rollout_annealing_turns": 8000,
        "replay_capacity": 5000,
    },
    "grpo": {},
    "grpo_return": {},
}
# Success is rare in some hands: every one is kept, and drawn until it is understood. What explores is the action
# alone, among the legal ones, less and less: at temperature 1 the thoughts fall apart. A formula that is too long has
# failed.
RARE_SUCCESS: dict[str, Any] = {
    **STEP_BY_STEP,
    "bootstrap_truncated": False,
    "offline_steps": 600,
    "updates_per_turn": 0.1,
    "rollout_temperature": 0.5,
    "rollout_action_temperature_start": 1.5,
    "rollout_action_temperature": 0.7,
    "rollout_annealing_turns": 12_000,
    "filter_max_weight": 200.0,
    "rollout_epsilon": 0.02,
    "replay_capacity": 2 * BUDGET,
    "replay_prioritized_fraction": 0.5,
    "online_fraction": 0.75,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "NumberLine": {},
    # Some hands take two improbable choices in a row: three in four episodes search for them, and half begin as
    # earlier ones that went badly. A search needs readings that hold: the model reads well before training.
    "EZPoints": {
        **RARE_SUCCESS,
        "learning_rate": 3e-4,
        "filter_scope": "action",
        "online_thought_filter": "reference",
        "updates_per_turn": 0.2,
        "rollout_search_fraction": 0.75,
        "rollout_repeat_fraction": 0.5,
        "eval_steps": 300,
    },
    # The dealer's luck drowns what an action is worth: a first round of random actions, and many more later, then a
    # sharp filter on a critic that learns the actions alone; what is read stays what was read before training.
    "Blackjack": {
        "off_policy_trace": "tree_backup",
        "turn_lambda": 0.95,
        "gamma": 1.0,
        "per_device_train_batch_size": 64,
        "filter_scope": "action",
        "filter_temperature": 0.05,
        "value_expectile": 0.9,
        "online_thought_filter": "reference",
        "critic_scope": "action",
        "critic_coef": 5.0,
        "offline_steps": 100,
        "turns_per_round": 3000,
        "updates_per_turn": 0.1,
        "rollout_temperature": 0.3,
        "rollout_action_temperature": 1.0,
        "rollout_epsilon_start": 1.0,
        "rollout_epsilon": 0.4,
        "rollout_annealing_turns": 3000,
        "replay_capacity": 2 * BUDGET,
        "online_fraction": 1.0,
        "eval_steps": 400,
    },
    "Points24": {**RARE_SUCCESS, "eval_steps": 300},
}
NAMES = {
    "online": "VLMQ, offline start, then online",
    "purely_online": "VLMQ, purely online",
    "grpo": "GRPO, the turn's reward",
    "grpo_return": "GRPO, the episode's return",
}
# Of the peer. Of two learning rates tried on NumberLine: with 3e-4 its groups' answers were all alike after 20 steps.
GRPO: dict[str, Any] = {
    "sft_steps": 100,
    "learning_rate": 1e-4,
    "num_generations": 8,
    "per_device_train_batch_size": 64,
    "temperature": 1.0,
    "beta": 0.0,
    "max_env_turns": BUDGET,
    "eval_steps": 10,
}
TARGETS = {
    ("NumberLine", "online"): 0.99,
    ("EZPoints", "online"): 0.95,
    ("Blackjack", "online"): 0.425,
    ("NumberLine", "purely_online"): 0.95,
}


class OnlineRun(Run):
    """Its variant is one of METHODS."""

    script = "online.py"

    @property
    def path(self) -> Path:
        return RESULTS / "online" / self.setting / f"{self.variant}-seed{self.seed}.json"

    @property
    def arguments(self) -> dict[str, Any]:
        peer = self.variant.startswith("grpo")
        ours = {**ONLINE, **METHODS[self.variant], **SETTINGS[self.setting]}
        return {
            **({} if peer else COMMON),
            **START,
            **GAMES[self.setting],
            **(GRPO if peer else ours),
            "game": self.setting,
            "seed": self.seed,
            "collection_seed": 100_000 * self.seed,
            "rollout_seed": 10_000_000 + 1_000_000 * self.seed,
            "test_seed": 2_000_000 + 100_000 * self.seed,
        }


def all_runs() -> list[OnlineRun]:
    lines = [(setting, "online") for setting in SETTINGS]
    lines += [("NumberLine", "purely_online")]
    # Each game with the reward that suits the peer best: a turn of EZPoints mostly pays nothing until the last.
    lines += [("NumberLine", "grpo"), ("EZPoints", "grpo_return")]
    return [OnlineRun(*line, seed) for seed in SEEDS for line in lines]


# ---- one run, in a process of its own ----


def work(run: OnlineRun) -> None:
    """Computes one run and writes its JSON."""
    output = ROOT / "runs" / "benchmarks" / "online" / run.name
    start = time.perf_counter()
    make_room(output, run.arguments)
    measured = grpo(run, output) if run.variant.startswith("grpo") else vlmq(run, output)
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
            **measured,
        },
    )


def vlmq(run: OnlineRun, output: Path) -> dict[str, Any]:
    from examples import train_agent

    argv = as_flags({**run.arguments, **CHOICES, "before_episodes": 0, "output_dir": output})
    found = train_agent.main([*argv, "--disable_tqdm", "true", "--save_steps", "200"])
    return {"data": found["data"], **found["methods"]["vlmq"]}


def grpo(run: OnlineRun, output: Path) -> dict[str, Any]:
    """TRL's `GRPOTrainer` on single turns, after SFT on the same episodes."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from examples import train_agent
    from vlmq_trl import EnvEvaluationCallback, ModelPolicy
    from vlmq_trl.trajectory import validate_trajectories

    arguments = run.arguments
    own = {name: arguments[name] for name in ("game", "policy", "episodes", "seed", "collection_seed", "test_seed")}
    own |= {name: arguments[name] for name in ("max_completion_length", "eval_episodes", "test_episodes")}
    sft = {**own, "method": "sft", "max_steps": arguments["sft_steps"], "eval_steps": arguments["sft_steps"]}
    sft |= {"bf16": FAST_BF16, "before_episodes": 0, "disable_tqdm": True, "save_strategy": "no"}
    sft |= {"test_episodes": 1, "output_dir": output / "start"}
    train_agent.main(as_flags(sft))
    script, args, _ = train_agent.parse(as_flags({**own, "method": "sft", "disable_tqdm": True}))
    dataset = train_agent.load_data(script, args)
    index = validate_trajectories(dataset, check_images="none")
    # A state is a seed and the actions since.
    before = [
        dataset["action"][int(index.first_row[e]) : int(index.first_row[e]) + int(turn)]
        for e, turn in zip(index.row_episode, index.turn, strict=True)
    ]
    states = dataset.select_columns(["prompt", "images", "seed"]).add_column("actions", before)
    model = AutoModelForImageTextToText.from_pretrained(output / "start" / "sft")
    processor = AutoProcessor.from_pretrained(output / "start" / "sft")
    counted = {"turns": 0}
    to_the_end = run.variant == "grpo_return"

    def rewards(completions: list[list[dict[str, str]]], seed: list[int], actions: list[list[str]], **_: Any) -> list:
        policy = ModelPolicy(
            model, processor, temperature=arguments["temperature"], max_completion_length=args.max_completion_length
        )
        model.eval()
        texts = [completion[-1]["content"] for completion in completions]
        found = play_on(script.env_id, seed, actions, texts, policy if to_the_end else None, counted)
        model.train()
        trainer.state.log_history.append({"env_turns": counted["turns"], "step": trainer.state.global_step})
        return found

    class Budget(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= counted["turns"] >= arguments["max_env_turns"]

    evaluation = EnvEvaluationCallback(
        script.env_id,
        eval_steps=arguments["eval_steps"],
        episodes=arguments["eval_episodes"],
        seed=args.eval_seed,
        max_completion_length=args.max_completion_length,
    )
    names = ("learning_rate", "num_generations", "per_device_train_batch_size", "temperature", "beta", "seed")
    config = GRPOConfig(
        output_dir=str(output / "grpo"),
        **{name: arguments[name] for name in names},
        max_completion_length=args.max_completion_length,
        max_steps=100_000,  # the budget ends it
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10,
        bf16=FAST_BF16,
        activation_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model, rewards, config, train_dataset=states, processing_class=processor, callbacks=[evaluation, Budget()]
    )
    trainer.train()
    evaluation.restore_best(trainer.model)
    assert evaluation.best is not None
    return {
        "history": evaluation.history,
        "best_step": evaluation.best["step"],
        "train_seconds": evaluation.history[-1]["train_seconds"],
        **train_agent.test_model(trainer.model, processor, script, args),
    }


def play_on(
    env_id: str,
    seeds: list[int],
    actions: list[list[str]],
    responses: list[str],
    policy: Any,
    counted: dict[str, int],
) -> list[float]:
    """Undiscounted rewards of responses in states that are reached again by their seed and actions.

    Args:
        policy: plays each episode to its end; None stops after the turn.
        counted: `turns` is raised by each turn that a policy has decided on.
    """
    import gymnasium
    import numpy as np

    from vlmq_trl.agent_format import default_format
    from vlmq_trl.rollout import Request

    envs = [gymnasium.make(env_id) for _ in responses]
    fmt = default_format(envs[0])
    rewards, waiting = [0.0] * len(envs), []
    for k, (env, seed, done) in enumerate(zip(envs, seeds, actions, strict=True)):
        env.reset(seed=seed)
        for action in done:
            env.step(action)
        waiting.append((k, responses[k]))
    while waiting:
        running = []
        for k, response in waiting:
            parsed = fmt.parse(response)
            observation, reward, terminated, truncated, _ = envs[k].step(parsed.action if parsed.valid else "")
            rewards[k] += float(reward)
            counted["turns"] += 1
            if policy is not None and not (terminated or truncated):
                running.append((k, fmt.build_prompt(envs[k].get_wrapper_attr("task"), observation)))
        rng = np.random.default_rng(0)
        answers = policy.act([Request(envs[k], *prompt, rng) for k, prompt in running]) if running else []
        waiting = [(k, answer.text) for (k, _), answer in zip(running, answers, strict=True)]
    for env in envs:
        env.close()
    return rewards


# ---- the report ----


def finished(setting: str, method: str) -> list[dict[str, Any]]:
    return [r for seed in SEEDS if (r := OnlineRun(setting, method, seed).result()) is not None]


def turns_to(results: list[dict[str, Any]], for_good: bool) -> str:
    """Environment turns, run by run, at the first validation that reaches `ENOUGH`, or from which on all do."""
    cells = []
    for result in results:
        reached = [record["success_rate"] >= ENOUGH for record in result["history"]]
        at = next((k for k in range(len(reached)) if (all(reached[k:]) if for_good else reached[k])), None)
        cells.append("–" if at is None else f"{result['history'][at].get('env_turns', 0):,}")
    return ", ".join(cells)


def row(setting: str, method: str, results: list[dict[str, Any]], solvable: bool = False) -> list[str]:
    turns = [result["history"][-1].get("env_turns", 0) for result in results]
    return [
        NAMES[method],
        *cells(pooled(results, "greedy", solvable)),
        *cells(pooled(results, "sampled", solvable)),
        turns_to(results, for_good=False),
        turns_to(results, for_good=True),
        ", ".join(f"{t:,}" for t in turns),
    ]


HEADER = [
    "",
    "greedy, %",
    "seeds",
    "sampled, %",
    "seeds",
    f"turns to {100 * ENOUGH:.0f} %",
    "for good",
    "turns in all",
]


def target_rows() -> list[list[str]]:
    rows = []
    for (setting, method), target in TARGETS.items():
        row = [f"{setting}, {NAMES[method]}: at least {100 * target:g} %"]
        for mode in ("greedy", "sampled"):
            level = pooled(finished(setting, method), mode)
            if level is None:
                row += ["–", "not run"]
                continue
            seeds = "" if level["seeds"] == len(SEEDS) else f" ({level['seeds']} of {len(SEEDS)} seeds)"
            row += [f"{100 * level['rate']:.1f}{seeds}", "reached" if level["rate"] >= target else "**missed**"]
        rows.append(row)
    return rows


def report() -> None:
    """Writes the generated part of docs/results.md, and docs/online_curves.png."""
    done = [result for run in all_runs() if (result := run.result()) is not None]
    if not done:
        write_section(PAGE, "online", "Nothing has been measured yet: run `python examples/benchmarks/online.py`.")
        return
    hours = sum(r["wall_seconds"] for r in done) / 3600
    parts = [
        f"{len(done)} of {len(all_runs())} runs, {hours:.1f} hours of computing, "
        f"on: {'; '.join(sorted({describe(r['machine']) for r in done}))}. "
        + ", ".join(f"{name} {number}" for name, number in done[-1]["versions"].items())
        + f".\n\nA budget of {BUDGET:,} environment turns, after an offline start on 200 flawed episodes (60 % of "
        "the actions systematically wrong, in Points24 30 %). Tests as above. `turns to`: environment turns, seed by "
        f"seed, at the first greedy validation that reaches {100 * ENOUGH:.0f} %, and from which on all do (0: the "
        f"offline start). {arithmetic(done)} Settings: `online.py`, found with "
        "seed 0; Blackjack's by earlier runs on the episodes of seeds 0 and 1, those of EZPoints on all three.\n\n"
        "![Success against turns](online_curves.png)",
        "### Online targets\n\n" + markdown_table(["target", "greedy, %", "", "sampled, %", ""], target_rows()),
    ]
    for setting in SETTINGS:
        rows = [row(setting, method, found) for method in METHODS if (found := finished(setting, method))]
        if rows:
            parts.append(f"### {setting}, online\n\n" + markdown_table(HEADER, rows))
        if rows and setting == "Points24":
            rows = [row(setting, method, found, True) for method in METHODS if (found := finished(setting, method))]
            parts.append("Of the hands that have a solution:\n\n" + markdown_table(HEADER, rows))
    write_section(PAGE, "online", "\n\n".join(parts))
    plot(ROOT / "docs" / "online_curves.png")


def plot(path: Path) -> None:
    """Validation success against environment turns: each seed a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [setting for setting in SETTINGS if any(finished(setting, method) for method in METHODS)]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(5.5 * columns, 3.8 * rows), dpi=110, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    for axes, setting in zip(panels.flat, shown, strict=False):
        for number, method in enumerate(METHODS):
            for k, result in enumerate(finished(setting, method)):
                turns = [record.get("env_turns", 0) for record in result["history"]]
                rates = [100 * record["success_rate"] for record in result["history"]]
                axes.plot(turns, rates, color=f"C{number}", alpha=0.8, label=NAMES[method] if k == 0 else None)
        axes.set(title=setting, xlabel="environment turns", ylabel="success in %", ylim=(-3, 103))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(command_line(__file__, __doc__.splitlines()[0], all_runs(), work, report))
