# SPDX-License-Identifier: Apache-2.0
"""`EnvEvaluationCallback`: plays an environment while any trainer trains, and keeps the best weights by success.

It works with every `transformers.Trainer`, stock `trl.SFTTrainer` included, so that methods are compared at the same
steps, on the same episodes, with the same choice of the best weights.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import default_logdir
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .agent_format import AgentFormat, check_format
from .modeling import keep_trainable
from .policy import evaluate_model
from .rollout import EnvSpec
from .sharding import assign, gathered, is_sharded, whole

RECORDS_NAME = "env_evaluation.json"
BEST_NAME = "env_best.safetensors"
COPIED = ("mean_return", "return_low", "return_high", "mean_turns", "valid_rate", "episodes", "reading_rate")


class EnvEvaluationCallback(TrainerCallback):
    """
    Plays `env` with the trainer's model before the first step, every `eval_steps` and after the last one.

    ```python
    >>> callback = EnvEvaluationCallback("vlmq_trl/NumberLine-v0", eval_steps=50)
    >>> trainer = SFTTrainer(model, args, train_dataset=dataset, callbacks=[callback])
    >>> trainer.train()
    >>> callback.restore_best(trainer.model)["success_rate"]
    ```

    Args:
        env, agent_format, workers, env_timeout, max_env_failures: as `rollout.play_episodes`.
        eval_steps: optimiser steps from one evaluation to the next.
        episodes: played in each evaluation, the same ones every time.
        seed: of the first episode; keep it away from the training data's and from the final test's.
        temperature: 0 is greedy.
        num_envs: environments played at once.
        max_completion_length: longest response in tokens.
        legal_actions_only: as `ModelPolicy`.
        keep_best: hold a copy of the trainable parameters (and of a whole critic) with the highest success rate (ties:
            the higher mean return, then the later step, whose policy is the surer one) in CPU memory, for
            `restore_best`.
        stop_at_success: end training once two evaluations in a row reach this success rate; None trains to the end.
        progress: show a bar over each evaluation's episodes.

    Attributes:
        history: one record an evaluation, in order: `step`, `success_rate` with its 95 % Wilson interval `low` to
            `high`, `mean_return`, `return_low`, `return_high`, `mean_turns`, `valid_rate`, `episodes`, `seconds` (of
            the evaluation) and `train_seconds` (since training began, evaluations left out); `reading_rate`, the share
            of answers that read the state aloud as it is, where format and environment make it known; of a trainer
            that collects play also `env_turns`, environment turns so far.
        best: the best record, None before the first evaluation.
        restored_step: the step whose weights `restore_best` has put back, None before.

    The records also go to the trainer's `state.log_history` (`env_success_rate`, ...) and, if the trainer reports to
    TensorBoard, there. The processes of a distributed run share the episodes. Checkpoints hold the records and the
    best weights (`env_evaluation.json`, `env_best.safetensors`); a run that resumes from one in its `output_dir` goes
    on with them.

    Raises:
        ValueError: a number below 1; or, when training begins, `keep_best` under FSDP 1.
    """

    def __init__(
        self,
        env: EnvSpec,
        eval_steps: int = 100,
        episodes: int = 200,
        seed: int = 1_000_000,
        temperature: float = 0.0,
        num_envs: int = 64,
        max_completion_length: int = 256,
        legal_actions_only: bool = False,
        agent_format: AgentFormat | None = None,
        keep_best: bool = True,
        stop_at_success: float | None = None,
        progress: bool = False,
        workers: bool = False,
        env_timeout: float | None = None,
        max_env_failures: int = 0,
    ):
        for name, value in (("eval_steps", eval_steps), ("episodes", episodes), ("num_envs", num_envs)):
            if value < 1:
                raise ValueError(f"`{name}={value}`: it must be at least 1.")
        check_format(agent_format)
        if stop_at_success is not None and not 0 < stop_at_success <= 1:
            raise ValueError(f"`stop_at_success={stop_at_success}`: it must lie in (0, 1], or be None.")
        self.env, self.eval_steps, self.keep_best = env, eval_steps, keep_best
        self.stop_at_success = stop_at_success
        self.play = {
            "episodes": episodes,
            "seed": seed,
            "temperature": temperature,
            "num_envs": num_envs,
            "max_completion_length": max_completion_length,
            "legal_actions_only": legal_actions_only,
            "agent_format": agent_format,
            "progress": progress,
            "workers": workers,
            "env_timeout": env_timeout,
            "max_env_failures": max_env_failures,
            "distributed": True,
        }
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self.restored_step: int | None = None
        self._best_weights: dict[str, Tensor] = {}
        self._writer: SummaryWriter | None = None
        self._began, self._evaluating = 0.0, 0.0

    def restore_best(self, model: nn.Module) -> dict[str, float]:
        """Copies the best weights into the model that was trained; returns their record.

        Raises:
            RuntimeError: nothing was kept.
            ValueError: the model has other trainable parameters than the one that was trained.
        """
        if self.best is None or not self.keep_best:
            raise RuntimeError("There are no best weights: train first, with `keep_best=True`.")
        kept_here = _keeps_parameters(model)
        with gathered(_trained(model), write=True):
            own, best = _trainable(model), self._best_weights
            lacking = any(name not in best for name in own if kept_here(name))
            if lacking or any(name not in own or own[name].shape != w.shape for name, w in best.items()):
                raise ValueError(
                    f"{type(model).__name__} has other trainable parameters than the model that was trained; pass "
                    "`trainer.model`."
                )
            for name, x in own.items():
                assign(x, best.get(name), source=0)
        self.restored_step = int(self.best["step"])
        return self.best

    @property
    def satisfied(self) -> bool:
        """Whether the last two evaluations reach `stop_at_success`."""
        last = [record["success_rate"] for record in self.history[-2:]]
        return self.stop_at_success is not None and bool(last) and min(last) >= self.stop_at_success

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        keep_trainable(model)
        if self.keep_best and isinstance(model, FullyShardedDataParallel):
            raise ValueError(
                "`keep_best` copies whole parameters, which FSDP 1 has flattened. Set `fsdp_version: 2`, or "
                "`keep_best=False` and keep checkpoints with `save_strategy` instead."
            )
        self.history, self.best, self._best_weights, self.restored_step = [], None, {}, None
        self._began, self._evaluating = time.perf_counter(), 0.0
        if "tensorboard" in args.report_to and state.is_world_process_zero:
            self._writer = SummaryWriter(str(_tensorboard_directory(args)))
        if not self.restore(_checkpoint(args, state)):
            self._evaluate(args, state, kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The last step's too: where training ends, `load_best_model_at_end` has put other weights in place already.
        if state.global_step % self.eval_steps == 0 or control.should_training_stop:
            self._evaluate(args, state, kwargs)
            control.should_training_stop |= self.satisfied

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.history[-1]["step"] != state.global_step and not args.load_best_model_at_end:
            self._evaluate(args, state, kwargs)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            if self.keep_best:
                save_file(self._best_weights, folder / BEST_NAME)
            # Last, and at once: where it is, the other is whole.
            text = json.dumps({"history": self.history, "best": self.best}) + "\n"
            (folder / f"{RECORDS_NAME}.part").write_text(text)
            os.replace(folder / f"{RECORDS_NAME}.part", folder / RECORDS_NAME)

    def restore(self, folder: str | os.PathLike) -> bool:
        """Takes records and best weights from a checkpoint; False if it has none."""
        folder = Path(folder)
        if not (folder / RECORDS_NAME).is_file() or (self.keep_best and not (folder / BEST_NAME).is_file()):
            return False
        records = json.loads((folder / RECORDS_NAME).read_text())
        self.history, self.best = records["history"], records["best"]
        if self.keep_best:
            self._best_weights = load_file(folder / BEST_NAME)
        self._began -= self.history[-1]["train_seconds"]
        return True

    def _evaluate(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any]) -> None:
        start = time.perf_counter()
        model = kwargs["model"]
        take_evaluation_weights(kwargs.get("optimizer"))
        played: Any = evaluate_model(model, kwargs["processing_class"], self.env, **self.play)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        record = {
            "step": state.global_step,
            "success_rate": played["success_rate"],
            "low": played["success_rate_low"],
            "high": played["success_rate_high"],
            **{name: played[name] for name in COPIED if name in played},
            "seconds": seconds,
            "train_seconds": start - self._began - self._evaluating,
        }
        collected = [log["env_turns"] for log in state.log_history if "env_turns" in log]
        if collected:
            record["env_turns"] = collected[-1]
        self._evaluating += seconds
        self.history.append(record)
        if self.best is None or _rank(record) >= _rank(self.best):
            self.best = record
            if self.keep_best:
                self._keep(model)
        scalars = {f"env_{name}": value for name, value in record.items() if name != "step"}
        state.log_history.append({**scalars, "step": state.global_step})
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name.replace("_", "/", 1), value, state.global_step)
            self._writer.flush()

    def _keep(self, model: nn.Module) -> None:
        """Copies the trainable parameters to CPU, into the memory of the copy before."""
        kept_here = _keeps_parameters(model)
        with gathered(_trained(model)):
            for name, x in _trainable(model).items():
                value = whole(x)
                if name in self._best_weights:
                    self._best_weights[name].copy_(value)
                elif kept_here(name):
                    self._best_weights[name] = value.to("cpu", copy=True)


def take_evaluation_weights(optimizer: Any) -> None:
    """Of an optimiser that trains other weights than it evaluates (`optim="schedule_free_adamw"`), before a model
    plays; `Trainer` does so before it computes a loss, and goes back at the next training step."""
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of a checkpoint at this step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _rank(record: dict[str, float]) -> tuple[float, float]:
    return record["success_rate"], record["mean_return"]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the trainable parameters, and all of a critic, whose target heads and running moments no
    optimiser moves."""
    changed = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return changed | {name: x for name, x in model.state_dict().items() if name.startswith("critic.")}


def _keeps_parameters(model: nn.Module) -> Callable[[str], bool]:
    """Whether this process keeps what has this name. Of weights that are split rank 0 alone does, and writes them back
    for all; buffers are never split."""
    here = not is_sharded(model.parameters()) or PartialState().is_main_process
    buffers = {name for name, _ in model.named_buffers()}
    return lambda name: here or name in buffers


def _tensorboard_directory(args: TrainingArguments) -> Path:
    """Where `TensorBoardCallback`, which runs earlier, has begun to write; callbacks cannot see one another."""
    if "TENSORBOARD_LOGGING_DIR" in os.environ:
        return Path(os.environ["TENSORBOARD_LOGGING_DIR"]).expanduser()
    fallback = Path(args.output_dir) / default_logdir()
    known = [path for path in fallback.parent.glob("*") if path.is_dir()]
    return max(known, key=lambda path: path.stat().st_mtime, default=fallback)
