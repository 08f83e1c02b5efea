# SPDX-License-Identifier: Apache-2.0
"""Turns a vision-language model into an agent, from play that may be bad: SFT, filtered cloning, VLMQ; and lets VLMQ
go on from there with its own play. `train_gym_cards.py` is this script under the name of its first domain.

    accelerate launch examples/train_agent.py --game NumberLine --method sft vlmq --policy random
    accelerate launch examples/train_agent.py --env_id vlmq_trl/BabyAI-GoToObj-v0 --env_options max_turns=16 \
        --policy flawed:0.5 --episodes 2000 --method sft filtered_bc vlmq
    accelerate launch examples/train_agent.py --game EZPoints --policy flawed:0.6 --use_peft \
        --lora_target_modules q_proj v_proj --learning_rate 1e-4 --max_steps 2000 \
        --model_name_or_path HuggingFaceTB/SmolVLM2-500M-Video-Instruct
    accelerate launch examples/train_agent.py --config examples/configs/online_number_line.yaml
    accelerate launch examples/train_agent.py --game EZPoints --method vlmq --online --episodes 0 --max_env_turns 15000

`--env_id` takes any environment that `python -m vlmq_trl.envs` lists, or one of your own that a module registers
(`--env_id my_module:MyGame-v0`); `--game` is short for those of Gym Cards.

Every argument can stand on the command line or in the YAML file. Without `--model_name_or_path` a tiny model is built
first, which reads the environment's pictures and cannot act. All methods train on the same data; each is evaluated on
the same validation episodes while it trains and keeps its best weights; the final test plays other episodes. It ends
with a before/after table, and writes `results.json`, `learning_curve.png`, the collected data and each method's model
to `output_dir`.

With `--online`, VLMQ collects play of its own after `offline_steps` updates, as `VLMQConfig` says, and keeps it in
`output_dir/vlmq/replay`; with `--episodes 0` it begins with nothing.

Interrupted? The same command goes on where it was, from the newest checkpoint.
"""

import copy
import gc
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Waiting threads sleep: spinning ones slow a step tenfold as soon as another process wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import datasets
import gymnasium
import matplotlib
import numpy as np
import torch
import transformers
import trl
import yaml
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

import vlmq_trl
from vlmq_trl import (
    AgentFormat,
    AutoModelForImageTextToTextWithValueHead,
    EmbeddedRecipe,
    EnvEvaluationCallback,
    VLMQConfig,
    VLMQTrainer,
    collect_demonstrations,
    evaluate_model,
    filter_top_returns,
    load_embedded_model,
    load_trajectories,
    make_demonstrator,
    save_trajectories,
    validate_trajectories,
    wilson_interval,
)
from vlmq_trl.agent_format import default_format, warn_of_another_format
from vlmq_trl.checkpoints import newest_checkpoint
from vlmq_trl.env_pool import EnvSpec, close_env, make_env, registered
from vlmq_trl.envs import DOMAINS, TextActionEnv
from vlmq_trl.modeling import existing, has_critic, hub_arguments, load_pretrained, load_processor
from vlmq_trl.show import env_option
from vlmq_trl.trajectory.files import trajectory_files
from vlmq_trl.vlmq_config import idle_offline

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GAMES = ("NumberLine", "EZPoints", "Points24", "Blackjack")
METHODS = ("sft", "filtered_bc", "vlmq")
LEAST = {
    "episodes": 0,
    "collection_num_envs": 1,
    "test_episodes": 1,
    "sampled_test_episodes": 1,
    "before_episodes": 0,
    "collection_seed": 0,
    "test_seed": 0,
    "embedded_steps": 1,
}

# Defaults of this script where they differ from TRL's; the command line and the YAML file override them.
DEFAULTS: dict[str, Any] = {
    "eval_steps": 50,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 1,
}
CPU_DEFAULTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
}
# For the embedded model, whose few weights are trained whole.
EMBEDDED_DEFAULTS: dict[str, Any] = {
    "bf16": False,
    "activation_checkpointing": False,
    "learning_rate": 1e-3,
    "critic_learning_rate": 3e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "per_device_train_batch_size": 32,
    "max_steps": 600,
    "max_completion_length": 96,
}
# For environments of which each is a browser, say.
HEAVY_DEFAULTS: dict[str, Any] = {
    "collection_num_envs": 4,
    "rollout_num_envs": 4,
    "eval_num_envs": 4,
    "rollout_workers": True,
}


@dataclass
class AgentArguments:
    """What this script adds to `VLMQConfig` (also used for the baselines' training) and TRL's `ModelConfig`."""

    env_id: str | None = field(
        default=None, metadata={"help": "Environment to act in, by its Gymnasium id; default: vlmq_trl/NumberLine-v0."}
    )
    env_options: list[str] = field(
        default_factory=list,
        metadata={"help": "Arguments of the environment, as key=value, such as max_turns=16 view=full."},
    )
    game: str | None = field(
        default=None, metadata={"help": "Short for the `env_id` of a Gym Cards game.", "choices": list(GAMES)}
    )
    method: list[str] = field(
        default_factory=lambda: ["sft", "vlmq"],
        metadata={
            "help": "One or several methods, trained one after the other on the same data.",
            "choices": list(METHODS),
        },
    )
    policy: str = field(
        default="random",
        metadata={
            "help": "Who plays the data: random, expert, flawed:0.6 (that share of the actions is systematically "
            "wrong), or a mixture such as expert=0.2,random=0.8."
        },
    )
    episodes: int = field(
        default=1000, metadata={"help": "Episodes of data to collect; 0: none, which only `online` can do with."}
    )
    online: bool = field(default=False, metadata={"help": "Let vlmq collect play of its own and learn from it."})
    collection_num_envs: int = field(
        default=16, metadata={"help": "Environments played at once to collect the data; 4 where each is a browser."}
    )
    collection_seed: int = field(default=0, metadata={"help": "Seed of the first collected episode."})
    dataset_path: str | None = field(
        default=None, metadata={"help": "Trajectory dataset (a folder or parquet file) to use instead of collecting."}
    )
    top_fraction: float = field(
        default=0.1, metadata={"help": "Share of the episodes, the best by return, that filtered_bc clones."}
    )
    test_episodes: int = field(default=500, metadata={"help": "Fresh episodes of the final test, greedy."})
    sampled_test_episodes: int | None = field(
        default=None, metadata={"help": "The same, sampled at temperature 1; as many as greedy by default."}
    )
    before_episodes: int = field(
        default=100, metadata={"help": "Test episodes played by the model before training; 0: it is not tested."}
    )
    test_seed: int = field(default=2_000_000, metadata={"help": "Seed of the test's first episode."})
    freeze_vision_tower: bool = field(
        default=True,
        metadata={"help": "Keep the vision tower's weights, whatever the method: it sees already, and it is cheaper."},
    )
    embedded_steps: int | None = field(
        default=None, metadata={"help": "Reading lessons of the embedded model, in optimiser steps; default: its own."}
    )

    def __post_init__(self):
        # What comes from a YAML file has not been checked against `choices`.
        if self.game is not None and self.game not in GAMES:
            raise ValueError(f"`game` is {self.game!r}; choose one of {', '.join(GAMES)}.")
        if self.game is not None and self.env_id is not None:
            raise ValueError(
                f"`game` {self.game} is short for an `env_id`, and {self.env_id} is given too; leave one."
            )
        self.env_id = self.env_id or f"vlmq_trl/{self.game or 'NumberLine'}-v0"
        for name in ("env_options", "method"):
            value = getattr(self, name)
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise ValueError(f"`{name}` is {value!r}; it must be a list of texts.")
            setattr(self, name, value)
        self.env_kwargs = dict(map(env_option, self.env_options))
        for method in self.method:
            if method not in METHODS:
                raise ValueError(f"`method` has {method!r}; choose among {', '.join(METHODS)}.")
        if not self.method or len(set(self.method)) != len(self.method):
            raise ValueError(f"`method` is {self.method}; name one or several different methods.")
        if not isinstance(self.policy, str):
            raise ValueError(f"`policy` is {self.policy!r}; it must be text, such as flawed:0.6.")
        make_demonstrator(self.env_id, self.policy)  # raises for a policy that it does not know
        if ":" in self.env_id:
            try:
                registered(self.env_id)  # imports its module
            except Exception as error:
                raise ValueError(f"`env_id` {self.env_id}: {error}") from error
        if self.env_kwargs:
            try:
                make_env(self.env).close()
            except Exception as error:
                raise ValueError(f"`env_options` {' '.join(self.env_options)}: {error}") from error
        if self.sampled_test_episodes is None:
            self.sampled_test_episodes = self.test_episodes
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None and name == "embedded_steps":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` is {value}; it must be a whole number, at least {least}.")
        if not isinstance(self.top_fraction, float | int) or not 0 < self.top_fraction <= 1:
            raise ValueError(f"`top_fraction` is {self.top_fraction}; it must lie in (0, 1].")
        if not self.with_data and (not self.online or self.method != ["vlmq"]):
            raise ValueError("`episodes` is 0: only `--online` and `--method vlmq` can do without data.")
        if self.dataset_path is not None:
            self.dataset_path = os.path.expanduser(self.dataset_path)
            try:
                trajectory_files(self.dataset_path)
            except (OSError, ValueError) as error:
                raise ValueError(f"`dataset_path`: {error}") from error

    @property
    def env(self) -> EnvSpec:
        """What makes the environment, with its options."""
        assert self.env_id is not None
        return partial(gymnasium.make, self.env_id, **self.env_kwargs) if self.env_kwargs else self.env_id

    @property
    def registered_id(self) -> str:
        """Its id without the module that registers it."""
        assert self.env_id is not None
        return self.env_id.rpartition(":")[2]

    @property
    def reading_lessons(self) -> str:
        """The environment's name among the embedded model's lessons: a game of Gym Cards, or an id."""
        return next((game for game in GAMES if self.registered_id == f"vlmq_trl/{game}-v0"), self.registered_id)

    @property
    def with_data(self) -> bool:
        return self.dataset_path is not None or self.episodes > 0


def parse(argv: Sequence[str] | None = None) -> tuple[AgentArguments, VLMQConfig, ModelConfig]:
    """Command line (default `sys.argv`) and YAML file to dataclasses; exits with a message if they make no sense."""
    defaults = {**DEFAULTS, **({} if torch.cuda.is_available() else CPU_DEFAULTS)}
    argv = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:  # for the module of an `env_id`, as `python -m` has it
        sys.path.append(os.getcwd())

    def once(defaults: dict[str, Any]) -> tuple[AgentArguments, VLMQConfig, ModelConfig]:
        # 200 arguments in a usage line would bury the message of an error.
        usage = "%(prog)s [--config FILE.yaml] [--argument value ...]; --help lists them all"
        parser = TrlParser([AgentArguments, VLMQConfig, ModelConfig], usage=usage, allow_abbrev=False)
        parser.set_defaults_with_config(**defaults)
        try:
            parsed = parser.parse_args_and_config(args=argv)
            if isinstance(parsed[2].model_name_or_path, str):
                parsed[2].model_name_or_path = os.path.expanduser(parsed[2].model_name_or_path)
            check_episodes(parsed[0], parsed[1])
            check_arguments(*parsed)
            return parsed
        except IndexError:
            parser.error("`--config` needs the name of a YAML file.")
        except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
            parser.error(str(error))

    script, args, model_config = once(defaults)
    # A folder for each environment: another one's results are not in the way.
    name = re.sub(r"-v\d+$", "", re.split("[/:]", script.env_id)[-1])
    special: dict[str, Any] = {"output_dir": f"runs/{name}"}
    if any(domain.heavy and script.registered_id in domain.envs for domain in DOMAINS):
        special |= HEAVY_DEFAULTS
    if model_config.model_name_or_path is None:
        # A budget of turns says itself how many updates there are.
        budget = {"max_steps": -1} if script.online and args.max_env_turns is not None else {}
        if args.num_train_epochs != VLMQConfig.num_train_epochs:
            budget = {"max_steps": -1}
        special |= EMBEDDED_DEFAULTS | budget
    script, args, model_config = once({**defaults, **special})
    if args.eval_strategy == "steps":
        args.eval_strategy = "no"  # the callback evaluates, for every method alike
    args.model_init_kwargs = {
        "revision": model_config.model_revision,
        "dtype": model_config.dtype,
        "attn_implementation": model_config.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    return script, args, model_config


def check_episodes(script: AgentArguments, args: VLMQConfig) -> None:
    """Raises ValueError unless the validation comes at whole steps, and no episode serves two purposes."""
    if not isinstance(args.eval_steps, float | int) or args.eval_steps != int(args.eval_steps) or args.eval_steps < 1:
        raise ValueError(f"`eval_steps` is {args.eval_steps}; it must be a whole number of optimiser steps.")
    spans = [
        (args.eval_seed, args.eval_episodes, "`eval_seed`"),
        (script.test_seed, max(script.test_episodes, script.sampled_test_episodes), "`test_seed`"),
    ]
    if script.dataset_path is None and script.episodes:
        spans.append((script.collection_seed, script.episodes, "`collection_seed`"))
    if script.online:
        spans.append((args.rollout_seed, math.inf, "`rollout_seed`"))
    spans.sort()
    for (start, count, name), (following, _, other) in pairwise(spans):
        if start + count > following:
            raise ValueError(
                f"{name} {start} and its {count} episodes run into {other} {following}: episodes are told apart by "
                "seed, and none may serve two purposes. Move the seeds apart."
            )


def check_arguments(script: AgentArguments, args: VLMQConfig, model_config: ModelConfig) -> None:
    """Raises ValueError for what TRL would take, and this script cannot do, or what would fail after an hour."""
    for config, name, least in (
        (args, "max_steps", -1),
        (args, "num_train_epochs", 0),
        (args, "learning_rate", 0),
        (args, "per_device_train_batch_size", 1),
        (args, "gradient_accumulation_steps", 1),
        (args, "seed", 0),
        (args, "save_steps", 0),
        (model_config, "lora_r", 1),
    ):
        value = getattr(config, name)
        if not isinstance(value, int | float) or value < least:
            raise ValueError(f"`{name}` is {value}; it must be a number, at least {least}.")
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise ValueError(f"`output_dir` {args.output_dir} is a file: name a folder.")
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            "`resume_from_checkpoint` is not needed: the same command with the same `output_dir` goes on by itself."
        )
    if args.eval_strategy != "no":
        raise ValueError("Validation comes every `eval_steps` steps: leave `eval_strategy` out.")
    if args.hub_model_id is not None and len(script.method) > 1:
        raise ValueError(
            f"`hub_model_id` {args.hub_model_id}: each of {len(script.method)} methods would replace the one before "
            "there. Give one `method`, and the others in runs of their own."
        )
    if args.use_liger_kernel and "vlmq" in script.method:
        raise ValueError("`use_liger_kernel` does nothing for vlmq, and is refused: leave it out.")
    if args.load_best_model_at_end or args.save_strategy == "best":
        raise ValueError(
            "The script keeps each method's best weights by success itself; leave `load_best_model_at_end` out, and "
            "`save_strategy` to 'steps', 'epoch' or 'no'."
        )
    # Flyte's package transformers does not look for, and Azure's not beside MLflow's.
    there = get_available_reporting_integrations()
    unknown = [name for name in args.report_to if name not in (*there, "azure_ml", "flyte")]
    if unknown:
        raise ValueError(
            f"`report_to` {' '.join(unknown)}: the package is not installed, or transformers does not know it. Here "
            f"are {', '.join(there)}."
        )
    if args.record_episodes:
        raise ValueError(
            "`record_episodes` would have no effect: the script's validation writes no episodes. Look at those of a "
            "finished method by `python -m vlmq_trl.show ID --model OUTPUT_DIR/METHOD`."
        )
    if script.online and "vlmq" not in script.method:
        raise ValueError(f"`online` is for the method vlmq; `method` is {script.method}.")
    if not script.online:
        idle = idle_offline(args)
        if idle:
            raise ValueError(f"{', '.join(idle)} would have no effect: set `online`, or leave them out.")
    if not model_config.use_peft:
        named = [one.name for one in fields(ModelConfig) if re.match("lora_|use_rslora|use_dora", one.name)]
        given = {name: getattr(model_config, name) for name in named}
        idle = [f"`{name}={value}`" for name, value in given.items() if value != getattr(ModelConfig, name)]
        if idle:
            raise ValueError(f"{', '.join(idle)} would have no effect: set `use_peft`, or leave them out.")
    if args.deepspeed_plugin is not None and len(script.method) > 1:
        raise ValueError(
            "DeepSpeed can be started once in a process: give one `method`, and the others in runs of their own with "
            "the same `output_dir`, whose table has them all."
        )
    offline_only = "vlmq" in script.method and not script.online
    if offline_only and args.off_policy_trace == "retrace" and script.dataset_path is None:
        raise ValueError(
            "`off_policy_trace` 'retrace' needs the behaviour's log-probabilities, which scripted players do not "
            "have. Choose 'tree_backup', or give a `dataset_path` with `behavior_logprobs`."
        )
    if model_config.model_name_or_path is None:
        if not can_be_read(script):
            raise ValueError(
                f"{script.env_id} has no reading lessons, by which the embedded model is made (a `TextActionEnv` with "
                "`reading_fields` and a script has): name a `model_name_or_path`."
            )
    else:
        try:
            existing(model_config.model_name_or_path)
        except (OSError, TypeError) as error:
            raise ValueError(f"`model_name_or_path`: {error}") from error


def can_be_read(script: AgentArguments) -> bool:
    """Whether there are lessons that teach a model to read this environment."""
    if any(script.registered_id in domain.envs for domain in DOMAINS):
        return True
    made: Any = make_env(script.env)
    try:
        return isinstance(made.unwrapped, TextActionEnv) and bool(made.unwrapped.reading_fields)
    finally:
        close_env(made)


def check_data(dataset: datasets.Dataset, script: AgentArguments, args: VLMQConfig) -> None:
    """Raises ValueError for data of another game, or of episodes that validation or test will play.

    Args:
        dataset: validated; its columns `env_id` and `seed` count where they are filled.
    """
    if "env_id" in dataset.column_names:
        played = {(env_id or "").rpartition(":")[2] for env_id in dataset.unique("env_id")}
        known = {env_id for domain in DOMAINS for env_id in domain.envs}
        other = sorted(played & known - {script.registered_id})
        if other:
            raise ValueError(f"{script.dataset_path} holds play of {other[0]}, not of {script.env_id}; see `env_id`.")
    if "seed" in dataset.column_names:
        seeds = np.array([seed for seed in dataset.unique("seed") if seed is not None])
        for name, start, count in (
            ("validation", args.eval_seed, args.eval_episodes),
            ("test", script.test_seed, max(script.test_episodes, script.sampled_test_episodes)),
        ):
            shared = int(((seeds >= start) & (seeds < start + count)).sum())
            if shared:
                raise ValueError(
                    f"{script.dataset_path} holds {shared} of the {name}'s episodes (seeds {start} to "
                    f"{start + count - 1}): move `{'eval' if name == 'validation' else 'test'}_seed`."
                )


def earlier_results(
    output: Path, script: AgentArguments, args: VLMQConfig, model_config: ModelConfig
) -> dict[str, Any]:
    """What `results.json` in `output` says, if it was made with these arguments (but for `method`), else {}.

    Raises:
        SystemExit: another run's results, models or checkpoints would be lost.
    """
    path = output / "results.json"
    found: dict[str, Any] = {"methods": {}, "arguments": {}}
    if path.is_file():
        try:
            found = json.loads(path.read_text())
            theirs = {k: v for kind, part in found.items() if kind.endswith("arguments") for k, v in part.items()}
            methods = ", ".join(found["methods"])
        except (ValueError, LookupError, AttributeError, TypeError):
            raise SystemExit(
                f"{path} was not written by this script, or is damaged: choose another `--output_dir`, or remove it."
            ) from None
    else:
        theirs, methods = {}, ""
    mine = {k: v for part in all_arguments(script, args, model_config).values() for k, v in part.items()}
    differing = sorted(
        k
        for k in (mine.keys() | theirs.keys()) - {"output_dir", "method"}
        if json.dumps(mine.get(k)) != json.dumps(theirs.get(k))
    )
    lost = [f"the results of {methods}"] if methods else []
    lost += ["checkpoints"] if any(output.glob(f"*/{PREFIX_CHECKPOINT_DIR}-*")) else []
    if differing and lost:
        names = ", ".join(f"`{name}`" for name in differing[:3])
        raise SystemExit(
            f"{output} holds {' and '.join(lost)} of a run with another {names}: give it the same arguments to go on "
            "with it, or to add a `--method`; choose another `--output_dir`, or remove it, to start over."
        )
    return {} if differing else found


def all_arguments(script: AgentArguments, args: VLMQConfig, model_config: ModelConfig) -> dict[str, dict[str, Any]]:
    """As `results.json` holds them, and by which a run knows itself again."""
    return {
        "arguments": asdict(script),
        "model_arguments": asdict(model_config),
        "training_arguments": json.loads(args.to_json_string()),
    }


def remove_checkpoints(folder: Path) -> None:
    for path in folder.glob(f"**/{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)


def main(argv: Sequence[str] | None = None, agent_format: AgentFormat | None = None) -> dict[str, Any]:
    """Runs the whole example and returns what `results.json` holds.

    Args:
        argv: the command line; default `sys.argv`.
        agent_format: how the agent sees and answers; default the game's own.
    """
    script, args, model_config = parse(argv)
    quiet_bars()
    say = print if args.process_index == 0 else lambda *_: None
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    earlier = earlier_results(output, script, args, model_config)
    done = [method for method in script.method if method in earlier.get("methods", {})]
    for method in done:
        remove_checkpoints(output / method)  # of a run that was killed at its very end
    if done == script.method:
        say(table(earlier))
        say(f"\n{output}/ holds this run, which is done. Choose another `--output_dir`, or remove it, to start over.")
        return earlier
    if earlier:
        say(f"Going on with the run in {output}/" + (f"; done: {', '.join(done)}" if done else ""))

    with args.main_process_first(desc="model and data"):
        model_name = model_config.model_name_or_path or embedded_model(script)
        dataset = load_data(script, args, agent_format) if script.with_data else None
    data = None if dataset is None else level_of(dataset, script, args)
    if data is not None:
        level = percent(data["success_rate"])
        say(f"Data: {data['episodes']:,} episodes, {data['turns']:,} turns, {level} of the episodes succeed.")

    if script.dataset_path is not None and script.method != ["vlmq"]:  # whose trainer warns itself
        made = make_env(script.env)
        warn_of_another_format(agent_format or default_format(made), dataset)
        close_env(made)

    if earlier.get("data", data) != data:
        raise SystemExit(
            f"{output} holds a run on other data from {script.dataset_path or script.env_id}: choose another "
            "`--output_dir`, or remove it."
        )
    before = earlier.get("before")
    if script.before_episodes and before is None:
        say("Testing the model before training ...")
        model = load_pretrained(model_name, **args.model_init_kwargs).to(args.device)
        processor = processor_of(model_name, model, args)
        before = test_model(model, processor, script, args, agent_format, at_most=script.before_episodes)
        del model

    results = {
        "env_id": script.env_id,
        "model": model_name,
        "data": data,
        "before": before,
        "methods": dict(earlier.get("methods", {})),
        **all_arguments(script, args, model_config),
        "versions": {m.__name__: m.__version__ for m in (vlmq_trl, torch, transformers, trl, datasets)},
    }
    write_results(results, output, args)
    for method in script.method:
        if method in done:
            continue
        say(f"Training {method} ...")
        results["methods"][method] = train(method, model_name, dataset, script, args, model_config, agent_format)
        write_results(results, output, args)  # after each method, so that a run cut short leaves what it has
        if args.process_index == 0:
            remove_checkpoints(output / method)  # the method is done: nothing goes on from here
    say("\n" + table(results))
    say(f"\nResults, learning curve and models: {output}/")
    return results


def processor_of(model_name: str, model: Any, args: VLMQConfig) -> Any:
    """The processor saved beside a model or adapter, or else that of an adapter's base model."""
    kwargs = args.model_init_kwargs
    trust_remote_code = kwargs["trust_remote_code"]
    return load_processor(model_name, model.config, trust_remote_code=trust_remote_code, **hub_arguments(kwargs))


def write_results(results: dict[str, Any], output: Path, args: VLMQConfig) -> None:
    if args.process_index == 0:
        (output / "results.json.part").write_text(json.dumps(results, indent=2) + "\n")
        os.replace(output / "results.json.part", output / "results.json")
        if results["methods"]:
            plot_learning_curve(results, output / "learning_curve.png")


def embedded_model(script: AgentArguments) -> str:
    """Directory of the embedded model that reads this environment, as its options have it."""
    steps = {} if script.embedded_steps is None else {"steps": script.embedded_steps}
    options = script.env_kwargs if script.env_kwargs and looks_other(script) else {}
    return load_embedded_model(EmbeddedRecipe(games=(script.reading_lessons,), env_kwargs=options, **steps))


def looks_other(script: AgentArguments) -> bool:
    """Whether the environment's options change what it shows or says at its start, or how it is read."""
    looks = []
    for env in (script.env, script.env_id):
        made: Any = make_env(env)
        observation, _ = made.reset(seed=0)
        looks.append((observation, made.unwrapped.task, made.unwrapped.reading_fields))
        close_env(made)
    (one, *own), (other, *others) = looks
    return own != others or one.keys() != other.keys() or any(not np.array_equal(one[k], other[k]) for k in one)


def load_data(script: AgentArguments, args: VLMQConfig, agent_format: AgentFormat | None = None) -> datasets.Dataset:
    """The trajectory dataset that all methods train on.

    Collected play is kept in the output folder, for a run that goes on and for the other processes of this one; play
    in an `agent_format` of one's own is not, since a folder's name cannot tell which that was.
    """
    if script.dataset_path is not None:
        return load_trajectories(script.dataset_path)
    asked = [script.env_id, script.env_options, script.policy, script.episodes, script.collection_seed]
    kept = Path(args.output_dir) / f"data-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}"
    if agent_format is None and (kept / "state.json").is_file():
        return load_trajectories(kept)
    dataset = collect_demonstrations(
        script.env_id,
        policy=script.policy,
        episodes=script.episodes,
        seed=script.collection_seed,
        agent_format=agent_format,
        env_kwargs=script.env_kwargs,
        num_envs=script.collection_num_envs,
        max_env_failures=args.max_env_failures,
    )
    if agent_format is None and args.process_index == 0:
        try:
            save_trajectories(dataset, kept)
        except OSError as error:  # a full disk: whether training finds room, `check_space` says
            message = f"The collected data is not kept in {kept} ({error}): to go on, it is collected again."
            warnings.warn(message, stacklevel=2)
    return dataset


def level_of(dataset: datasets.Dataset, script: AgentArguments, args: VLMQConfig) -> dict[str, Any]:
    """Validates the data and says how well it was played."""
    needs_final = "vlmq" in script.method and args.needs_final_observation
    index = validate_trajectories(dataset, check_images="none", require_final_observation=needs_final)
    check_data(dataset, script, args)
    successes = int(index.success.sum())
    low, high = wilson_interval(successes, len(index))
    return {
        "played_by": f"{script.policy} play" if script.dataset_path is None else Path(script.dataset_path).name,
        "episodes": len(index),
        "turns": len(dataset),
        "successes": successes,
        "success_rate": successes / len(index),
        "success_rate_low": low,
        "success_rate_high": high,
    }


def train(
    method: str,
    model_name: str,
    dataset: datasets.Dataset | None,
    script: AgentArguments,
    args: VLMQConfig,
    model_config: ModelConfig,
    agent_format: AgentFormat | None = None,
) -> dict[str, Any]:
    """Trains one method, from its newest checkpoint if it has any, puts its best weights back, saves and tests it.

    Returns:
        `history` (validation, see `EnvEvaluationCallback`), `best_step`, `train_seconds`, and the test's `greedy` and
        `sampled`.
    """
    args = copy.copy(args)
    args.output_dir = os.path.join(args.output_dir, method)
    evaluation = EnvEvaluationCallback(
        script.env,
        eval_steps=int(args.eval_steps),
        episodes=args.eval_episodes,
        seed=args.eval_seed,
        temperature=args.eval_temperature,
        num_envs=args.eval_num_envs,
        max_completion_length=args.max_completion_length,
        legal_actions_only=args.legal_actions_only,
        agent_format=agent_format,
        stop_at_success=args.stop_at_success,
        workers=args.rollout_workers,
        env_timeout=args.env_timeout,
        max_env_failures=args.max_env_failures,
    )
    if method == "filtered_bc":
        dataset = filter_top_returns(dataset, script.top_fraction, seed=args.seed)
    # An earlier run's critic comes along; an adapter is trained further.
    with_critic = method == "vlmq" and has_critic(model_name, **hub_arguments(args.model_init_kwargs))
    opened = AutoModelForImageTextToTextWithValueHead.from_pretrained if with_critic else load_pretrained
    quantization_config = get_quantization_config(model_config)
    model: Any = opened(
        model_name, is_trainable=True, quantization_config=quantization_config, **args.model_init_kwargs
    )
    processor = processor_of(model_name, model, args)
    args.model_init_kwargs = None  # applied above
    peft_config = get_peft_config(model_config)
    if peft_config is not None and peft_config.target_modules is None:
        peft_config.target_modules = "all-linear"  # but for the head; PEFT has no default for most of these families
    if script.freeze_vision_tower:
        frozen = "vision|visual" + ("|connector|projector|image_newline" if args.vision_cache_gb else "")
        if peft_config is not None:
            peft_config.exclude_modules = rf".*({frozen}).*"
        for name, parameter in model.named_parameters():
            if re.search(frozen, name):
                parameter.requires_grad_(False)
    trainer_class: Any = SFTTrainer
    if method == "vlmq":  # `eval_env` is for the agent's card: the callback evaluates
        env = script.env if script.online else None
        trainer_class = partial(VLMQTrainer, env=env, eval_env=script.env, agent_format=agent_format)
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=dataset,
        processing_class=processor,
        callbacks=[evaluation, TrainingBar(method, evaluation)],
        peft_config=peft_config,
    )
    check_space(args, trainer.model, adapter_only=hasattr(trainer.model, "peft_config"))
    # `TrainingBar` shows what a reader wants; the logs go to `report_to`.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    checkpoint = newest_checkpoint(args.output_dir)
    if checkpoint is not None and trainer.is_world_process_zero():
        print(f"Going on from {checkpoint}")
    if checkpoint is None or not trained_to_the_end(checkpoint, evaluation):
        trainer.train(resume_from_checkpoint=checkpoint)
    best = evaluation.restore_best(trainer.model)
    trainer.save_model(args.output_dir)
    if method == "vlmq":  # the checkpoints' cards told of other weights
        trainer.create_model_card()
    model = trainer.accelerator.unwrap_model(trainer.model)
    result = {
        "history": evaluation.history,
        "best_step": best["step"],
        "train_seconds": evaluation.history[-1]["train_seconds"],
        **test_model(model, trainer.processing_class, script, args, agent_format),
    }
    del trainer, model
    gc.collect()
    torch.cuda.empty_cache()
    return result


def trained_to_the_end(checkpoint: str, evaluation: EnvEvaluationCallback) -> bool:
    """Whether only the test is left; `evaluation` then has its records and best weights back. `Trainer` would go on
    by a step."""
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    if not evaluation.restore(checkpoint) or evaluation.history[-1]["step"] != state.global_step:
        return False
    return state.global_step >= state.max_steps or evaluation.satisfied


def check_space(args: VLMQConfig, model: torch.nn.Module, adapter_only: bool) -> None:
    """Stops before training if the trained model, and its checkpoints on the way, would not fit on the disk.

    A checkpoint holds the weights, Adam's two moments and the best weights; a new one is written before the old goes.

    Raises:
        OSError: says how much is free and how much is needed.
    """
    os.makedirs(args.output_dir, exist_ok=True)
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel()) * p.element_size()) for p in model.parameters()]
    trained = sum(size for is_trained, size in sizes if is_trained)
    needed = trained if adapter_only else sum(size for _, size in sizes)
    what = "the trained model takes"
    if args.save_strategy != "no":
        needed, what = needed + 2 * (needed + 3 * trained), "the trained model and its checkpoints take"
    free = shutil.disk_usage(args.output_dir).free
    if free < needed:
        raise OSError(
            f"{args.output_dir} has {free / 1e6:,.1f} MB free, and {what} {needed / 1e6:,.1f} MB: free some space, "
            "choose another `--output_dir`, or do without checkpoints (`--save_strategy no`)."
        )


def test_model(
    model: Any,
    processor: Any,
    script: AgentArguments,
    args: VLMQConfig,
    agent_format: AgentFormat | None = None,
    at_most: int | None = None,
) -> dict[str, dict[str, float]]:
    """Plays the test episodes: `greedy` and `sampled` results of `evaluate_model`, with `successes` and `seconds`.

    In Points24 also `solvable`, the number of solvable hands, and `solvable_success_rate` with its interval.
    """
    results = {}
    for name, temperature, episodes in (
        ("greedy", 0.0, script.test_episodes),
        ("sampled", 1.0, script.sampled_test_episodes),
    ):
        episodes = episodes if at_most is None else min(episodes, at_most)
        start = time.perf_counter()
        played = evaluate_model(
            model,
            processor,
            script.env,
            episodes=episodes,
            seed=script.test_seed,
            temperature=temperature,
            num_envs=args.eval_num_envs,
            max_completion_length=args.max_completion_length,
            legal_actions_only=args.legal_actions_only,
            agent_format=agent_format,
            workers=args.rollout_workers,
            env_timeout=args.env_timeout,
            max_env_failures=args.max_env_failures,
            distributed=True,
        )
        played["successes"] = round(played["success_rate"] * played["episodes"])
        played["seconds"] = time.perf_counter() - start
        if script.reading_lessons == "Points24":
            played["solvable"] = count_solvable(script.env, episodes, script.test_seed)
            low, high = wilson_interval(played["successes"], played["solvable"])
            played["solvable_success_rate"] = played["successes"] / max(1, played["solvable"])
            played["solvable_success_rate_low"], played["solvable_success_rate_high"] = low, high
        results[name] = played
    return results


def count_solvable(env: EnvSpec, episodes: int, seed: int) -> int:
    """Hands with a solution among the episodes that start with the seeds `seed`, `seed + 1`, ..."""
    game = make_env(env).unwrapped
    count = 0
    for episode in range(episodes):
        game.reset(seed=seed + episode)
        count += game.solvable
    return count


class TrainingBar(TrainerCallback):
    """One progress bar a method, with the latest and the best validation success; without bars, a line each time."""

    def __init__(self, method: str, evaluation: EnvEvaluationCallback):
        self.method, self.evaluation = method, evaluation

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = args.disable_tqdm or not state.is_world_process_zero
        kwargs = {"total": state.max_steps, "initial": state.global_step, "unit": "step"}
        self.bar = tqdm(desc=self.method, disable=hidden, dynamic_ncols=True, **kwargs)
        self.prints = args.disable_tqdm and state.is_world_process_zero

    def on_step_end(self, args, state, control, **kwargs):
        best, last = self.evaluation.best, self.evaluation.history[-1]
        text = f"success {percent(last['success_rate'])}, best {percent(best['success_rate'])} at {best['step']}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.prints and last["step"] == state.global_step:
            print(f"{self.method}, step {state.global_step} of {state.max_steps}: {text}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def title(results: dict[str, Any]) -> str:
    """The environment's short name: "Blackjack", "BabyAI-GoToObj"."""
    return results["env_id"].rpartition(":")[2].removeprefix("vlmq_trl/").removesuffix("-v0")


def percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def trained(run: dict[str, Any]) -> str:
    turns = f", {run['history'][-1]['env_turns']:,} turns" if "env_turns" in run["history"][-1] else ""
    return f"step {run['best_step']}{turns}, {run['train_seconds']:.0f} s"


def table(results: dict[str, Any]) -> str:
    """The before/after table: success with 95 % intervals, greedy and sampled, one line a method."""
    data, before = results["data"], results["before"]
    rows = [
        *([(f"the data ({data['played_by']})", None, data, "")] if data else []),
        *([("before training", before["greedy"], before["sampled"], "")] if before else []),
        *((name, run["greedy"], run["sampled"], trained(run)) for name, run in results["methods"].items()),
    ]
    blocks = [("", "success_rate")]
    if any("solvable" in run["greedy"] for run in results["methods"].values()):
        blocks.append((", of the hands that can be solved", "solvable_success_rate"))
    lines = []
    for what, key in blocks:
        lines += [
            *([""] if lines else []),
            f"{title(results)}: success with its 95 % interval{what}",
            f"{'':<30}{'greedy':<26}{'sampled':<26}trained",
        ]
        for name, *columns, note in rows:
            if all(c is None or key not in c for c in columns):
                continue
            cells = [
                f"{percent(c[key]):>7}  ({100 * c[key + '_low']:.1f} to {100 * c[key + '_high']:.1f})"
                if c is not None and key in c
                else f"{'-':>5}"
                for c in columns
            ]
            lines.append(f"{name:<30}{cells[0]:<26}{cells[1]:<26}{note}".rstrip())
    return "\n".join(lines)


def plot_learning_curve(results: dict[str, Any], path: Path) -> None:
    """Validation success with its 95 % band against optimiser steps, and of an online run against environment turns
    too; the data's own level dashed."""
    online = {name: run for name, run in results["methods"].items() if "env_turns" in run["history"][-1]}
    panels = [("optimiser steps", "step", results["methods"])]
    panels += [("environment turns", "env_turns", online)] if online else []
    figure, all_axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 4.2), dpi=130, squeeze=False)
    for axes, (label, key, runs) in zip(all_axes[0], panels, strict=True):
        for name, run in runs.items():
            at = [record.get(key, 0) for record in run["history"]]
            success = 100 * np.array([[r[k] for r in run["history"]] for k in ("success_rate", "low", "high")])
            (line,) = axes.plot(at, success[0], marker="o", markersize=3, label=name)
            axes.fill_between(at, success[1], success[2], color=line.get_color(), alpha=0.2, linewidth=0)
        if data := results["data"]:
            level = f"the data ({data['played_by']})"
            axes.axhline(100 * data["success_rate"], linestyle="--", color="0.4", label=level)
        axes.set(xlabel=label, ylabel="success in % (validation)", ylim=(-3, 103), title=title(results))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def quiet_bars() -> None:
    """Switches off the libraries' own progress bars (loading weights, writing shards, ...)."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from the newest checkpoint.")
