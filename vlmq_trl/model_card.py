# SPDX-License-Identifier: Apache-2.0
"""The model card of a VLMQ run: how the agent plays, how it was taught, and the lines that open it.

Contents: `Evaluation`, `evaluations`, `model_card`, `plot_success`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

CURVE_NAME = "success.png"
PACKAGES = ("vlmq_trl", "trl", "transformers", "peft", "torch", "datasets")
# What decides the learning, in the order of the table; the others are in vlmq_config.json.
SETTINGS = (
    *("critic_type", "filter", "token_lambda", "turn_lambda", "gamma", "off_policy_trace", "value_expectile"),
    *("learning_rate", "critic_learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
)
# How `evaluate` plays, unless it is told otherwise; its log says how it did.
EVALUATION_SETTINGS = ("eval_episodes", "eval_temperature", "eval_seed")
BIBTEX = """@article{grigsby2025vlmq,
  title   = {{VLM Q-Learning: Aligning Vision-Language Models for Interactive Decision-Making}},
  author  = {Grigsby, Jake and Zhu, Yuke and Ryoo, Michael and Niebles, Juan Carlos},
  journal = {arXiv preprint arXiv:2505.03181},
  year    = {2025}
}
@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
             Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallou{\\'e}dec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


@dataclass(frozen=True)
class Evaluation:
    """Episodes played at one step of the training; rates in [0, 1]."""

    step: int
    success_rate: float
    low: float
    high: float
    mean_return: float
    episodes: int
    env_turns: float | None = None


def evaluations(log_history: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> list[Evaluation]:
    """What a trainer's log says of episodes that were played, by `evaluate` or by an `EnvEvaluationCallback`: at each
    step the first.

    Args:
        arguments: the trainer's. What `evaluate` was told to play otherwise is left out: a look at few episodes, or at
            sampled answers, does not compare with the run's own evaluations.
    """
    own = {name: float(arguments[name]) for name in EVALUATION_SETTINGS}
    names = {
        "eval_success_rate": ("eval_success_rate", "eval_success_rate_low", "eval_success_rate_high", "eval_"),
        "env_success_rate": ("env_success_rate", "env_low", "env_high", "env_"),
    }
    found: dict[tuple[str, int], Evaluation] = {}
    for entry in log_history:
        if any(entry.get(name, value) != value for name, value in own.items()):
            continue
        for kind, (rate, low, high, prefix) in names.items():
            if all(name in entry for name in (rate, low, high, f"{prefix}mean_return")):
                played = Evaluation(
                    step=entry["step"],
                    success_rate=entry[rate],
                    low=entry[low],
                    high=entry[high],
                    mean_return=entry[f"{prefix}mean_return"],
                    episodes=int(entry.get(f"{prefix}episodes", 0)),
                    env_turns=entry.get("env_turns", entry.get("env_env_turns")),
                )
                # A later one at this step, after training, may be of other weights: the best, say.
                found.setdefault((kind, entry["step"]), played)
    kinds = {kind for kind, _ in found}
    kind = "eval_success_rate" if "eval_success_rate" in kinds else "env_success_rate"
    return sorted((e for (k, _), e in found.items() if k == kind), key=lambda e: e.step)


def model_card(
    *,
    model_name: str,
    repo_id: str,
    base_model: str | None,
    dataset_name: str | None,
    tags: Sequence[str],
    is_adapter: bool,
    sees_images: bool,
    env_id: str | None,
    env_kwargs: Mapping[str, Any],
    arguments: Mapping[str, Any],
    played: Sequence[Evaluation],
    step: int,
    curve: str | None,
    links: Sequence[str] = (),
) -> ModelCard:
    """The card.

    Args:
        repo_id: what a reader opens.
        arguments: the trainer's.
        played: evaluations in order of their step; may be empty.
        step: of the weights. What is shown of them is the last evaluation up to there.
        curve: file name of the picture of success against steps.
        links: Markdown of experiment trackers.
    """
    shown = next((e for e in reversed(played) if e.step <= step), None)
    environment = env_id or "an environment of its own"
    data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text" if sees_images else "text-generation",
        model_name=model_name,
        tags=["generated_from_trainer", "reinforcement-learning", *tags],
        eval_results=_results(shown, env_id, step) if shown is not None else None,
    )
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a model of its own"
    parts = [
        f"# {model_name}",
        f"An agent: {'a LoRA adapter of ' if is_adapter else ''}{base}, trained by VLM Q-Learning "
        "([arXiv 2505.03181](https://huggingface.co/papers/2505.03181)) with "
        f"[TRL](https://github.com/huggingface/trl)'s trainer and `vlmq_trl`, to act in `{environment}`"
        + (f", on [{dataset_name}](https://huggingface.co/datasets/{dataset_name})." if dataset_name else "."),
        "## How it plays",
        _success_table(played, shown, step),
        f"![Success against steps, with its 95 % interval]({curve})" if curve else "",
        "## Play",
        _usage(repo_id, env_id, env_kwargs, is_adapter, sees_images),
        "## Training",
        "\n".join(
            ["| setting | value |", "| --- | --- |"]
            + [f"| `{name}` | {arguments[name]} |" for name in SETTINGS if arguments.get(name) is not None]
        ),
        "All settings are in `vlmq_config.json`.",
        *links,
        "Versions: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + ".",
        "## Citation",
        f"```bibtex\n{BIBTEX}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")


def _results(shown: Evaluation, env_id: str | None, step: int) -> list[EvalResult]:
    earlier = "" if shown.step == step else f", at step {shown.step} of {step}"
    return [
        EvalResult(
            task_type="reinforcement-learning",
            task_name="Reinforcement learning",
            dataset_type=env_id or "environment",
            dataset_name=env_id or "environment",
            metric_type=kind,
            metric_name=name + earlier,
            metric_value=round(value, 4),
        )
        for kind, name, value in (
            ("success_rate", f"success rate (95 % interval: {shown.low:.4f} to {shown.high:.4f})", shown.success_rate),
            ("mean_reward", "mean return", shown.mean_return),
        )
    ]


def _success_table(played: Sequence[Evaluation], shown: Evaluation | None, step: int) -> str:
    """At most ten evaluations, the shown one and the ends among them."""
    if shown is None:
        return "It has not been evaluated in an environment with the settings of its run."
    stride = max(1, math.ceil(len(played) / 8))
    rows = [e for k, e in enumerate(played) if k % stride == 0 or e in (shown, played[-1])]
    online = any(e.env_turns is not None for e in rows)
    header = ["step", *(["environment turns"] if online else []), "success, %", "mean return", "episodes"]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join(['---'] * len(header))} |"]
    for e in rows:
        rate = f"{100 * e.success_rate:.1f} ({100 * e.low:.1f} to {100 * e.high:.1f})"
        turns = [f"{e.env_turns:,.0f}" if e.env_turns is not None else "–"] if online else []
        cells = [str(e.step), *turns, f"**{rate}**" if e == shown else rate, f"{e.mean_return:.3f}", str(e.episodes)]
        lines.append(f"| {' | '.join(cells)} |")
    which = "that of the weights here" if shown.step == step else f"the last before the weights here, of step {step}"
    note = f"Success with its 95 % interval on validation episodes; in bold, {which}."
    return "\n".join([*lines, "", note])


def _usage(
    repo_id: str, env_id: str | None, env_kwargs: Mapping[str, Any], is_adapter: bool, sees_images: bool
) -> str:
    given = ", ".join([f'"{env_id}"', *(f"{name}={value!r}" for name, value in env_kwargs.items())])
    played, made = ("", f"gymnasium.make({given})") if env_id else ("my_env, ", "my_env()")
    auto_class = "AutoModelForImageTextToText" if sees_images else "AutoModelForCausalLM"
    stock = (
        f'model = PeftModel.from_pretrained(base_model, "{repo_id}")'
        if is_adapter
        else f'model = {auto_class}.from_pretrained("{repo_id}")'
    )
    return f"""```python
import gymnasium
from vlmq_trl import VLMAgent, episode_metrics

agent = VLMAgent.from_pretrained("{repo_id}")
print(episode_metrics(agent.play({played}episodes=10, seed=1)))

env = {made}.unwrapped
observation, _ = env.reset(seed=0)
answer = agent.act(observation, env.task)  # .response, .action
values = agent.token_values(observation, answer.response, env.task)  # Q, V and log-probability of each token
```

Without `vlmq_trl` the policy is a stock {"PEFT adapter" if is_adapter else "transformers model"}: `{stock}`. The
critic lies beside it, in `critic.safetensors`."""


def plot_success(played: Sequence[Evaluation], path: Path) -> None:
    """Success with its 95 % band against optimiser steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [e.step for e in played]
    axes.plot(steps, [100 * e.success_rate for e in played], marker="o", markersize=3)
    axes.fill_between(steps, [100 * e.low for e in played], [100 * e.high for e in played], alpha=0.2, linewidth=0)
    axes.set(xlabel="optimiser steps", ylabel="success in % (validation)", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
