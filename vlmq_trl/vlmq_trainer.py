# SPDX-License-Identifier: Apache-2.0
"""`VLMQTrainer`: TRL's `SFTTrainer` with a critic that filters the SFT loss token by token (arXiv 2505.03181).

Reads top to bottom: construction, data, the loss, what happens after each update, evaluation, logs; checkpoints and
pushes are in `saving`.

Axes: A action tokens of a batch (row by row, in order).
"""

import copy
import itertools
import json
import math
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.integrations import TensorBoardCallback, is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType, TrainOutput
from trl.trainer.utils import get_config_model_id

from . import losses
from .agent_format import AgentFormat, check_format, warn_of_another_format
from .callbacks import EnvEvaluationCallback, take_evaluation_weights
from .chat import check_chat_template
from .checkpoints import newest_checkpoint
from .collator import SegmentDataset, SegmentSampler, VLMQDataCollator
from .critic import CriticConfig
from .env_pool import EnvPool
from .modeling import (
    AutoModelForImageTextToTextWithValueHead,
    ValueHeadOutput,
    existing,
    has_adapter,
    has_critic,
    hub_arguments,
    keep_trainable,
    language_model_head,
    load_critic_config,
    load_pretrained,
    load_processor,
    refuse_folder_of_base,
)
from .objective import CriticLosses, critic_losses
from .online import AsyncOnlineData, OnlineData, check_online, open_online
from .policy import evaluate_model, format_with_actions
from .recorder import EpisodeRecorder
from .rollout import EnvSpec, Policy
from .saving import EPISODES_FOLDER, SavingTrainer, replay_manifest_name
from .sharding import writable
from .trajectory import EpisodeIndex, validate_trajectories
from .vlmq_config import VLMQConfig, idle_offline

# Entropy, in nats, above which the policy is taken to be uncertain about a token.
UNCERTAIN_ENTROPY = 0.1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class VLMQTrainer(SavingTrainer):
    """
    Trainer for VLM Q-Learning: advantage-filtered SFT of a vision-language agent on trajectories, good or bad.

    ```python
    >>> from vlmq_trl import VLMQConfig, VLMQTrainer, collect_demonstrations

    >>> dataset = collect_demonstrations("vlmq_trl/NumberLine-v0", policy="random", episodes=1000)
    >>> trainer = VLMQTrainer(
    ...     model="HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    ...     args=VLMQConfig(output_dir="out"),
    ...     train_dataset=dataset,
    ...     eval_env="vlmq_trl/NumberLine-v0",
    ... )
    >>> trainer.train()
    >>> trainer.evaluate()
    ```

    Args:
        model: a name or directory (whole model or PEFT adapter; a critic saved beside it is restored), a
            `PreTrainedModel`, a `PeftModel`, or an `AutoModelForImageTextToTextWithValueHead`.
        args: a `VLMQConfig`; default `VLMQConfig(f"{model}-VLMQ")`. It is copied: to change it later, change
            `trainer.args`.
        train_dataset: a trajectory dataset (`vlmq_trl.trajectory`), validated here. May be left out with an `env`.
        eval_dataset: a trajectory dataset whose loss `evaluate` reports.
        env: a Gymnasium id or a factory. With it training goes online: rounds of collection, with the model as it
            then is, alternate with updates, as `args` say; what was collected stays in a `ReplayBuffer` on disk.
        eval_env: the same, played by `evaluate`; default `env`.
        agent_format: how observations become messages and responses actions; default the environment's.
        rollout_policy: collects in the model's place, such as a `ChatPolicy` that asks a server.
        optimizers: as in `SFTTrainer`; an optimiser that was made before there was a critic gets its heads added.
        processing_class, callbacks, optimizer_cls_and_kwargs, quantization_config, peft_config: as in `SFTTrainer`.

    Raises:
        TrajectoryError: the data does not follow the contract (names the row and the column).
        ValueError: the critic saved beside the model does not match `args`; neither data nor environment; no chat
            template.

    `train` raises, after it has saved a checkpoint: EnvFailureError, when environments fail too often in a row;
    FloatingPointError, when the loss is not finite.
    """

    _tag_names = ["trl", "vlmq"]
    _name = "VLMQ"
    _paper = {
        "title": "VLM Q-Learning: Aligning Vision-Language Models for Interactive Decision-Making",
        "id": "2505.03181",
    }

    model: AutoModelForImageTextToTextWithValueHead
    args: VLMQConfig
    control: TrainerControl
    _reference: dict[str, Tensor] | None  # the trained weights as they were before training

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | AutoModelForImageTextToTextWithValueHead,
        args: VLMQConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        env: EnvSpec | None = None,
        eval_env: EnvSpec | None = None,
        agent_format: AgentFormat | None = None,
        rollout_policy: Policy | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        if isinstance(model, str | os.PathLike):
            model = existing(model)
        elif not isinstance(model, PreTrainedModel | PeftModel | AutoModelForImageTextToTextWithValueHead):
            raise TypeError(
                f"`model` must be a name, a model of transformers or PEFT, or an "
                f"`AutoModelForImageTextToTextWithValueHead`, got {type(model).__name__}."
            )
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = VLMQConfig(f"{name.rstrip('/').split('/')[-1]}-VLMQ")
        elif not isinstance(args, VLMQConfig):
            raise TypeError(f"`args` must be a `VLMQConfig`, got `{type(args).__name__}`.")
        if not isinstance(model, str):
            language_model_head(getattr(model, "pretrained_model", model))
        args = copy.copy(args)  # some fields are set below; the user's may be those of another run, too
        check_format(agent_format)
        if train_dataset is None and env is None:
            raise ValueError(
                "Nothing to learn from: give a `train_dataset` (a trajectory dataset, see `collect_demonstrations`), "
                "an `env` to collect in, or both."
            )
        self.env, self.rollout_policy = env, rollout_policy
        self._online: OnlineData | None = None
        self._resumed_from: str | None = None
        self._split = ""  # of several evaluation datasets, the one whose loss is computed now
        eval_env = env if eval_env is None else eval_env
        # By the dataset's id; the dataset is kept beside its index, so that no other can take its id.
        self._indices: dict[int, tuple[Dataset, EpisodeIndex]] = {}
        self._has_data = train_dataset is not None
        self._needs_final_observation = args.needs_final_observation
        if train_dataset is not None:
            self._index_of(train_dataset)
        first_look = None if env is None else check_online(args, env, train_dataset, agent_format, rollout_policy)
        if eval_dataset is not None:
            for split in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
                self._index_of(split)
        if args.off_policy_trace == "retrace" and env is None and not _has_log_probs(train_dataset):
            raise ValueError(
                "`off_policy_trace='retrace'` needs the behaviour's log-probabilities, and no row of the training "
                "data has `behavior_logprobs`. Choose 'tree_backup', which needs none."
            )
        action_format = self._look_at_formats(args, env, eval_env, agent_format)
        if self._env_format is not None and train_dataset is not None:
            warn_of_another_format(agent_format or self._env_format, train_dataset)
        self.eval_env, self.agent_format = eval_env, agent_format
        _check_evaluation(args, eval_env, eval_dataset)
        _warn_of_idle(args, env, eval_env, callbacks)
        if args.use_liger_kernel:
            raise ValueError(
                "`use_liger_kernel=True` would do nothing: `Trainer` puts the kernels into models of its own kind, "
                "and not into one with a critic around it. Leave it out; logits are not all kept here either."
            )
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False  # the target heads are buffers, and every process computes the same
        init_kwargs = {**(args.model_init_kwargs or {}), "use_safetensors": True}
        init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        hub_kwargs = hub_arguments(init_kwargs)
        source, critic_config = model, self._known_critic(model, args, hub_kwargs)
        if isinstance(model, AutoModelForImageTextToTextWithValueHead):
            model = model.pretrained_model
        elif isinstance(model, str) and has_adapter(model, **hub_kwargs):
            if quantization_config is not None:
                init_kwargs["quantization_config"], quantization_config = quantization_config, None
            opened = load_pretrained(model, is_trainable=True, **{"dtype": "float32", **init_kwargs})
            own_kwargs = {"trust_remote_code": init_kwargs["trust_remote_code"], **hub_kwargs}
            processing_class = processing_class or load_processor(model, opened.config, **own_kwargs)
            model = opened
        if isinstance(model, str) and isinstance(peft_config, PeftConfig):
            # What is saved says on which base the adapter was trained; SFTTrainer leaves it at the newest.
            peft_config = copy.copy(peft_config)
            peft_config.revision = init_kwargs.get("revision")
        # For the time of the call: `Trainer` wants an `eval_dataset` wherever there is an evaluation, where an
        # environment will do; and `model_init_kwargs` are for a name that is still to be opened.
        own = {name: getattr(args, name) for name in ("eval_strategy", "dataset_kwargs", "model_init_kwargs")}
        args.eval_strategy, args.dataset_kwargs = "no", {"skip_prepare_dataset": True}
        args.model_init_kwargs = init_kwargs if isinstance(model, str) else None
        try:
            super().__init__(
                model=model,
                args=args,
                train_dataset=first_look if train_dataset is None else train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        finally:
            for name, value in own.items():
                setattr(args, name, value)
        check_chat_template(self.processing_class)
        if args.pad_to_multiple_of is not None and isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                f"`pad_to_multiple_of={args.pad_to_multiple_of}` is for text-only models: processors pad as they do."
            )
        self.data_collator = VLMQDataCollator(
            self.processing_class,
            args.max_length,
            args.pad_to_multiple_of,
            action_format=action_format,
        )

        # `compute_loss` divides by the number of tokens in all micro-batches, whatever the model's own loss would do.
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "FSDP 1 flattens the parameters, and the critic's heads could not be told from the rest. Set "
                "`fsdp_version: 2`, as examples/accelerate_configs/fsdp2.yaml does."
            )
        # SFTTrainer has seeded torch, so that every process makes the same fresh critic.
        self._wrap_with_critic(source, critic_config, hub_kwargs)
        if self.aux_loss_enabled:
            warnings.warn(
                f"{type(model).__name__} is a mixture of experts, whose router's auxiliary loss VLMQ leaves out. Set "
                "`router_aux_loss_coef=0` to say that you know.",
                stacklevel=2,
            )
        if self.optimizer is not None and self._with_critic:
            self._add_heads_to(self.optimizer, self.lr_scheduler)
        self._target_sums = torch.zeros(3, device=args.device)
        self._recorded: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._last_log = (time.perf_counter(), 0)
        self.add_callback(_Hooks(self))

    def _look_at_formats(
        self,
        args: VLMQConfig,
        env: EnvSpec | None,
        eval_env: EnvSpec | None,
        agent_format: AgentFormat | None,
    ) -> AgentFormat | None:
        """Makes an environment: an unknown id or a broken factory shows now, not at the first evaluation.

        Returns:
            The format of the responses that are learned from, if `args` treat their actions apart; else None.
        """
        own_format, self._env_format = agent_format, None
        if eval_env is not None:
            with closing(EnvPool(eval_env, num_envs=1, workers=args.rollout_workers)) as made:
                self._env_format = made.agent_format
            own_format = agent_format or self._env_format
            if args.legal_actions_only:
                format_with_actions(eval_env, own_format, workers=args.rollout_workers, env_timeout=args.env_timeout)
        whole: dict[str, Any] = {"filter_scope": "response", "critic_scope": "response"}
        whole |= {"online_thought_weight": 1.0, "online_thought_filter": "none"}
        split = [f"{name}={getattr(args, name)!r}" for name, value in whole.items() if getattr(args, name) != value]
        if not split:
            return None
        if agent_format is None and env is not None and env != eval_env:
            with closing(EnvPool(env, num_envs=1, workers=args.rollout_workers)) as made:
                own_format = made.agent_format
        if own_format is None:
            raise ValueError(
                f"`{split[0]}` needs to know where a response comes to its action: give `agent_format`, or "
                "an environment (`env` or `eval_env`), whose own format is taken."
            )
        return own_format

    @staticmethod
    def _known_critic(source: Any, args: VLMQConfig, hub_kwargs: dict[str, Any]) -> CriticConfig | None:
        """The shape of the critic that comes with what the user gave as the model, if one does and `args` agree."""
        if isinstance(source, AutoModelForImageTextToTextWithValueHead):
            found, where = source.critic.config, "The model"
        elif isinstance(source, str) and has_critic(source, **hub_kwargs):
            found, where = load_critic_config(source, **hub_kwargs), source
        else:
            return None
        wanted = args.critic_config()
        for name in ("critic_type", "num_critics", "critic_hidden_size", "critic_rank"):
            if getattr(found, name) != getattr(wanted, name):
                raise ValueError(
                    f"{where} holds a critic with {name}={getattr(found, name)!r}, `args` asks for "
                    f"{getattr(wanted, name)!r}. Set it to the former in `VLMQConfig`."
                )
        return found

    def _wrap_with_critic(self, source: Any, known: CriticConfig | None, hub_kwargs: dict[str, Any]) -> None:
        if not any(p.requires_grad for p in self.model.parameters()):  # the critic alone would learn, and nothing show
            raise ValueError(
                "No weight of the model is trainable. Open it with `is_trainable=True`, give a `peft_config`, or set "
                "`requires_grad_(True)` on what shall learn."
            )
        wrapped = AutoModelForImageTextToTextWithValueHead(self.model, known or self.args.critic_config())
        if isinstance(self.model, PeftModel):
            refuse_folder_of_base(self.model, self.args.output_dir)
        if isinstance(source, AutoModelForImageTextToTextWithValueHead):
            # The user's own, not a copy: an optimiser may hold its weights.
            wrapped.critic = source.critic.to(wrapped.critic.target_mean.device)
        elif known is not None:
            wrapped.load_critic(source, **hub_kwargs)
        if wrapped.critic.is_fresh and self._index is not None:
            returns = self._index.returns_to_go(self.args.gamma)
            wrapped.critic.initialize_moments(float(returns.mean()), float(returns.std()))
        if is_deepspeed_zero3_enabled():  # which wants one type for all that it splits
            for p in wrapped.critic.online.parameters():
                p.data = p.data.to(self.model.dtype)
        if self.args.vision_cache_gb:
            if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
                raise ValueError(
                    f"`vision_cache_gb={self.args.vision_cache_gb}`: where weights are split over processes (ZeRO-3, "
                    "FSDP) all of them must enter the vision tower together, known picture or not. Set it to 0, or "
                    "use DDP or ZeRO-1 or 2."
                )
            wrapped.remember_pictures(int(1e9 * self.args.vision_cache_gb))
        keep_trainable(wrapped)
        self._reference = self._copy_of_trained(wrapped)
        self.model = self.model_wrapped = self.callback_handler.model = wrapped

    def _copy_of_trained(self, wrapped: AutoModelForImageTextToTextWithValueHead) -> dict[str, Tensor] | None:
        """What is about to be trained of the model, for `online_thought_filter="reference"`; else None."""
        if self.env is None or self.args.online_thought_filter != "reference":
            return None
        if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
            raise ValueError(
                "`online_thought_filter='reference'` keeps a whole copy of the trained weights, which here are split "
                "over processes (ZeRO-3, FSDP). Set it to 'none', or use DDP or ZeRO-1 or 2."
            )
        weights = wrapped.pretrained_model.named_parameters(prefix="pretrained_model")
        return {name: p.detach().clone() for name, p in weights if p.requires_grad}

    def _add_heads_to(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Gives the critic's heads to a user's optimiser that does not have them."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in known for p in self.model.pretrained_model.parameters() if p.requires_grad):
            raise ValueError(
                "The optimiser has none of the model's trainable weights, those of an adapter that was added here for "
                "instance. Make the model as it shall train (`get_peft_model`) first and the optimiser of it, or "
                "choose one by `optimizer_cls_and_kwargs`."
            )
        heads = [p for p in self.model.critic.online.parameters() if id(p) not in known]
        if not heads:
            return
        if scheduler is not None:
            raise ValueError(
                "The optimiser lacks the critic's heads, and its scheduler could not follow if they were added. Make "
                "the critic first: `model = AutoModelForImageTextToTextWithValueHead(model, args.critic_config())`, "
                "the optimiser and the scheduler of its parameters, then the trainer of all three."
            )
        rate = self.args.critic_learning_rate
        optimizer.add_param_group({"params": heads, **({} if rate is None else {"lr": rate})})

    @property
    def _with_critic(self) -> bool:
        return self.args.critic_coef > 0

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `per_device_train_batch_size` turns; one epoch sees every turn once. Online, `get_batch_samples`
        draws them, without end."""
        self._forget_batches()
        if self.env is not None:
            self._open_online(self.env)
            return DataLoader(_DrawnOnline(), batch_size=None)
        assert self._index is not None
        return self._get_dataloader(
            dataset=self._segments(self.train_dataset, self._index),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda dataset: self._segment_sampler(dataset, shuffle=True),
            is_training=True,
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        index, key = self._index_of(dataset), str(id(dataset))
        known = getattr(self, "_eval_dataloaders", {})  # `Trainer`'s: with workers that stay
        if key in known:
            return known[key]
        return self._get_dataloader(
            dataset=self._segments(dataset, index),
            description="Evaluation",
            batch_size=self.args.eval_batch_size,
            sampler_fn=lambda dataset: self._segment_sampler(dataset, shuffle=False),
            dataloader_key=key,
        )

    def _index_of(self, dataset: Dataset) -> EpisodeIndex:
        """The index of a dataset, validated when it is first seen."""
        if id(dataset) not in self._indices:
            index = validate_trajectories(dataset, require_final_observation=self._needs_final_observation)
            self._indices[id(dataset)] = (dataset, index)
        return self._indices[id(dataset)][1]

    @property
    def _index(self) -> EpisodeIndex | None:
        """Of the training dataset, which may have been exchanged; None: all data is collected."""
        return self._index_of(self.train_dataset) if self._has_data else None

    def _segments(self, dataset: Dataset, index: EpisodeIndex) -> SegmentDataset:
        return SegmentDataset(dataset, index, self.args.gamma, self._with_critic, self.args.bootstrap_truncated)

    def _segment_sampler(self, dataset: SegmentDataset, shuffle: bool) -> SegmentSampler:
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        n = self.args.world_size
        multiple = n * self._train_batch_size if shuffle and n > 1 else 1
        dataset.sampler = SegmentSampler(dataset.index, self.args.segment_length, seed, shuffle, multiple)
        return dataset.sampler

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        # The collator takes what `SegmentDataset` gives; there is no unused column to remove.
        return data_collator

    # ---- online data ----

    def _open_online(self, env: EnvSpec) -> None:
        """For one call of `train`."""
        args = self.args
        if self._online is not None:  # `auto_find_batch_size` begins anew
            self._online.close()
        buffer, rollouts = open_online(args, env, self.agent_format, self.train_dataset, self._index)
        kind = AsyncOnlineData if args.async_collection else OnlineData
        self._online = kind(
            args,
            buffer,
            rollouts,
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            policy=self.rollout_policy,
            report=self._log_apart,
            process=(args.process_index, args.world_size),
            progress=not args.disable_tqdm and self.is_world_process_zero(),
        )
        if self._resumed_from is not None:
            path = Path(self._resumed_from) / replay_manifest_name(args.process_index)
            if path.is_file():
                self._online.check_resumed(json.loads(path.read_text()))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of the next update; online, after the collection that is due before it."""
        if self._online is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        online, update = self._online, self.state.global_step
        if update == 0:
            online.check_run()
        try:
            online.advance(update)
        except Exception as error:
            self._save_before_stopping(aside=self._broke_the_weights(error))
            raise
        if self._index is None and update == 0 and self._with_critic and self.model.critic.is_fresh:
            returns = np.concatenate(gather_object([online.buffer.return_to_go[online.rows()]]))
            self.model.critic.initialize_moments(float(returns.mean()), float(returns.std()))
        first = update * self.args.gradient_accumulation_steps
        batches = [
            self.data_collator(online.items(update, first + k, self._train_batch_size)) for k in range(num_batches)
        ]
        return batches, self._get_num_items_in_batch(batches, device)

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the newest checkpoint that is whole. From a
        checkpoint at the end of training it restores the model, where `Trainer` would go on by a step.

        Raises:
            ValueError: there is no whole checkpoint to resume from; or a run that starts anew finds the play of
                another run in its replay buffer.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no whole checkpoint in {self.args.output_dir} to resume from (one without a readable "
                    f"{TRAINER_STATE_NAME} was interrupted). Leave `resume_from_checkpoint` out to start anew."
                )
        if isinstance(resume_from_checkpoint, os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        if isinstance(resume_from_checkpoint, str) and self._restore_finished(resume_from_checkpoint):
            return TrainOutput(self.state.global_step, 0.0, {})
        self._resumed_from = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self._online is not None:
                self._online.close()

    def _restore_finished(self, checkpoint: str) -> bool:
        """Takes state and weights from a checkpoint after which there is nothing to do; False if there is."""
        path = Path(checkpoint) / TRAINER_STATE_NAME
        if not path.is_file():
            return False
        state, args = TrainerState.load_from_json(str(path)), self.args
        max_steps = args.max_steps
        if max_steps <= 0:  # by epochs of the data, which may have grown since
            max_steps = self.set_initial_training_values(args, self.get_train_dataloader())[-1]
        if state.global_step < max_steps:
            return False
        self.state = state
        self._load_from_checkpoint(checkpoint)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        # Those that keep something of a run take it from the checkpoint.
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        self.control = self.callback_handler.on_train_end(args, state, self.control)
        return True

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """sum_t f_t * (-log pi(a_t|s_t)) / action tokens + critic_coef * critic loss (design: `docs/algorithm.md`)."""
        args, mode = self.args, "train" if self.model.training else "eval"
        own = ("behavior_log_probs", "action_mask")
        turns = {k: inputs[k] for k in inputs if k.startswith(("turn_", "segment_")) or k in own}
        model_inputs = {k: v for k, v in inputs.items() if k not in turns}
        output: ValueHeadOutput = model(**model_inputs, with_critic=self._with_critic)

        num_tokens = output.log_probs.numel() if num_items_in_batch is None else num_items_in_batch
        num_tokens = torch.as_tensor(num_tokens, device=output.log_probs.device).clamp(min=1)
        parts: dict[str, Tensor] = {}
        weights = torch.ones_like(output.log_probs)
        if self._with_critic:
            judged = critic_losses(args, self.model.critic, output, inputs["labels"], turns)
            self._record_critic(judged, turns, mode)
            parts = judged.parts
            if self.state.global_step >= args.critic_warmup_steps or mode == "eval":
                weights = losses.filter_weights(
                    judged.advantage,
                    args.filter,
                    threshold=args.filter_threshold,
                    temperature=args.filter_temperature,
                    max_weight=args.filter_max_weight,
                )
                if args.filter_scope == "action":
                    weights = torch.where(turns["action_mask"], weights, torch.ones_like(weights))
        if self._weighs_thoughts and self._online is not None and mode == "train":
            thought = self._collected(inputs["labels"], turns) & ~turns["action_mask"]
            factor = torch.full_like(weights, args.online_thought_weight)
            if self._reference is not None:
                factor *= self._reference_probs(model_inputs)
            weights = torch.where(thought, factor * weights, weights)
        policy = losses.policy_loss(output.log_probs, weights, num_tokens)
        critic = sum(parts.values(), torch.zeros_like(policy)) / num_tokens
        loss = policy + args.critic_coef * critic if self._with_critic else policy
        # As in SFTTrainer: `num_items_in_batch` counts every rank's tokens, and DDP averages the gradients.
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        total = self._record_losses(mode, loss, output, weights, parts, inputs, turns)
        if mode == "train" and not math.isfinite(total):  # on every process alike, and before the weights change
            self.model.zero_grad()
            self._forget_batches()
            saved = self._save_before_stopping(aside=True)
            where = "" if saved is None else f" They lie in {saved}, which `resume_from_checkpoint=True` passes over."
            raise FloatingPointError(
                f"The loss of update {self.state.global_step} is {total}. The weights are those from before it, which "
                f"the update before may have broken.{where} Go on from an earlier checkpoint with a lower "
                "`learning_rate` or `max_grad_norm`, or look for extreme rewards."
            )
        return (loss, output) if return_outputs else loss

    @property
    def _weighs_thoughts(self) -> bool:
        return self.args.online_thought_weight != 1 or self.args.online_thought_filter != "none"

    @torch.no_grad()
    def _reference_probs(self, model_inputs: dict[str, Any]) -> Tensor:
        """[A] the probabilities that the model gave the tokens before training."""
        assert self._reference is not None
        now = dict(self.model.named_parameters())
        self._reference = {name: p.to(now[name]) for name, p in self._reference.items()}  # type and device
        training = self.model.training
        self.model.eval()
        output = functional_call(self.model, self._reference, kwargs={**model_inputs, "with_critic": False})
        self.model.train(training)
        return output.log_probs.exp()

    def _collected(self, labels: Tensor, turns: dict[str, Tensor]) -> Tensor:
        """[A] whether a token is of a turn that was collected online."""
        assert self._online is not None
        turn_of_token = (labels[:, 1:] != -100).nonzero()[:, 0]
        return (turns["turn_row"] >= self._online.buffer.num_offline)[turn_of_token]

    def _record_critic(self, judged: CriticLosses, turns: dict[str, Tensor], mode: str) -> None:
        """For the targets' moments, the log, and the replay's priorities."""
        mean, std = self.model.critic.target_mean, self.model.critic.target_std
        recorded, returns = self._recorded[mode], turns["turn_return_to_go"]
        learned = self.args.critic_scope == "response"
        recorded["advantage"].append(judged.advantage if learned else judged.advantage[turns["action_mask"]])
        recorded["value"].append(losses.denormalize(judged.turn_values, mean, std))
        recorded["return_to_go"].append(returns)
        if mode != "train":
            return
        deltas = judged.returns - mean
        self._target_sums += torch.stack([deltas.sum(), deltas.square().sum(), deltas.new_tensor(len(deltas))])
        if self._online is not None and self._online.priorities is not None:
            surprise = losses.normalize(returns, mean, std) - judged.turn_values
            self._online.learned(turns["turn_row"].cpu().numpy(), surprise.cpu().numpy())

    def _forget_batches(self) -> None:
        """Of updates that did not come about: after an error, or a batch that was too large for the memory."""
        self._target_sums.zero_()
        for recorded in self._recorded.values():
            recorded.clear()

    @torch.no_grad()
    def after_update(self) -> None:
        """Once an optimiser step: the target heads follow, then the targets' running moments."""
        if not self._with_critic:
            return
        critic = self.model.critic
        sums = self.accelerator.reduce(self._target_sums, reduction="sum")
        with writable(critic.online):
            critic.update_target(self.args.target_tau)
            critic.update_moments(sums[0], sums[1], sums[2], self.args.target_norm_rate)
        self._target_sums.zero_()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`SFTTrainer`'s optimiser, with the critic's heads at `critic_learning_rate` if that is set."""
        existing = self.optimizer
        if existing is not None and not isinstance(existing, AcceleratedOptimizer) and self._with_critic:
            self._add_heads_to(existing, self.lr_scheduler)  # one that was set after the trainer was made
        optimizer = super().create_optimizer(model)
        rate = self.args.critic_learning_rate
        if existing is None and rate is not None:
            heads = {id(p) for p in self.model.critic.online.parameters()}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in heads]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in heads]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        *,
        episodes: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> dict[str, float]:
        """Plays `eval_env`, and computes the loss on the evaluation dataset where there is one.

        Args:
            episodes, temperature, seed: default to `eval_episodes`, `eval_temperature`, `eval_seed`.

        Returns:
            With the prefix: `success_rate` and its 95 % Wilson interval `success_rate_low`, `success_rate_high`,
            `mean_return`, `mean_turns`, `valid_rate`, `episodes`, ...; the `temperature` and `seed` they were played
            with; and what `SFTTrainer.evaluate` returns.
        """
        if self.compute_metrics is not None:
            raise ValueError(
                "`compute_metrics` gets the logits of whole sequences, which VLMQ never makes. Leave it out: losses "
                "and success are computed, and a callback's `on_evaluate` gets them."
            )
        metrics: dict[str, float] = {}
        splits = self.eval_dataset if eval_dataset is None else eval_dataset
        named = splits.items() if isinstance(splits, dict) else [("", splits)] if splits is not None else []
        device = self.args.device
        for name, split in named:
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            # A data loader draws from torch's generator, which the training's dropout needs as it was.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), self._quiet_callbacks():
                self._split = f"{name}_" if name else ""
                try:
                    metrics.update(super().evaluate(split, ignore_keys, prefix))
                finally:
                    self._split = ""
        if self.eval_env is None:
            if not metrics:
                raise ValueError("Nothing to evaluate: give the trainer an `eval_env` or an `eval_dataset`.")
            return metrics
        start = time.perf_counter()
        temperature = self.args.eval_temperature if temperature is None else temperature
        seed = self.args.eval_seed if seed is None else seed
        take_evaluation_weights(self.optimizer)
        try:
            with nullcontext() if self._online is None else self._online.paused():
                played = evaluate_model(
                    self.accelerator.unwrap_model(self.model),
                    self.processing_class,
                    self.eval_env,
                    episodes=self.args.eval_episodes if episodes is None else episodes,
                    temperature=temperature,
                    seed=seed,
                    num_envs=self.args.eval_num_envs,
                    max_completion_length=self.args.max_completion_length,
                    legal_actions_only=self.args.legal_actions_only,
                    agent_format=self.agent_format,
                    workers=self.args.rollout_workers,
                    env_timeout=self.args.env_timeout,
                    max_env_failures=self.args.max_env_failures,
                    recorder=self._recorder(),
                    distributed=True,
                    progress=not self.args.disable_tqdm and self.is_world_process_zero(),
                )
        except Exception as error:
            if self.is_in_train:
                self._save_before_stopping(aside=self._broke_the_weights(error))
            raise
        played |= {"runtime": time.perf_counter() - start, "temperature": temperature, "seed": seed}
        played = {f"{metric_key_prefix}_{k}": float(v) for k, v in played.items()}
        self._log_apart(dict(played))
        metrics.update(played)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_in_train and self.args.stop_at_success is not None:
            rates = [entry["eval_success_rate"] for entry in self.state.log_history if "eval_success_rate" in entry]
            self.control.should_training_stop |= len(rates) > 1 and min(rates[-2:]) >= self.args.stop_at_success
        return metrics

    def _recorder(self) -> EpisodeRecorder | None:
        if not self.args.record_episodes or not self.is_in_train or not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir) / EPISODES_FOLDER / f"step-{self.state.global_step:06d}"
        return EpisodeRecorder(folder, self.args.record_episodes)

    @contextmanager
    def _quiet_callbacks(self) -> Iterator[None]:
        """With an `eval_env`, `on_evaluate` is called once, with all metrics: early stopping counts evaluations."""
        if self.eval_env is not None:
            self.callback_handler.on_evaluate = lambda args, state, control, metrics: control
        try:
            yield
        finally:
            self.callback_handler.__dict__.pop("on_evaluate", None)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "`predict` returns the logits of whole sequences, which VLMQ never makes. Use "
            "`evaluate(eval_dataset=...)` for losses, `evaluate()` for success, and `ModelPolicy` for answers."
        )

    # ---- logs ----

    def _record_losses(
        self,
        mode: str,
        loss: Tensor,
        output: ValueHeadOutput,
        weights: Tensor,
        parts: dict[str, Tensor],
        inputs: dict[str, Any],
        turns: dict[str, Tensor],
    ) -> float:
        """Scalars of one batch; `log` averages them over the batches between two logs.

        `behavior_kl` is KL(mu || pi) a token, by r - 1 - log r with r = pi / mu on the tokens whose log mu was
        recorded: unbiased, and never negative (Schulman, 2020).

        Returns:
            The summed loss of all processes' batches.
        """
        uncertain = output.entropy > UNCERTAIN_ENTROPY
        kept = weights > 0
        nll = -output.log_probs.detach()
        log_ratio = -nll - turns.get("behavior_log_probs", torch.full_like(nll, torch.nan))
        log_ratio = log_ratio[~log_ratio.isnan()]
        kl = log_ratio.exp() - 1 - log_ratio
        sums = {
            "tokens": torch.ones_like(nll).sum(),
            "entropy": output.entropy.sum(),
            "top1": output.is_top1.float().sum(),
            "nll": nll.sum(),
            "policy": (weights * nll).sum(),
            "kept": kept.float().sum(),
            "uncertain": uncertain.float().sum(),
            "kept_uncertain": (kept & uncertain).float().sum(),
            "input": inputs["attention_mask"].sum().float(),
            "kl": kl.sum(),
            "known": torch.ones_like(kl).sum(),
            "loss": loss.detach(),
            **{f"critic_{k}": v.detach() for k, v in parts.items()},
        }
        totals = self.accelerator.gather(torch.stack(list(sums.values()))[None]).sum(0).tolist()
        total = dict(zip(sums, totals, strict=True))
        metrics, n = self._metrics[mode], max(total["tokens"], 1)
        metrics["entropy"].append(total["entropy"] / n)
        metrics["mean_token_accuracy"].append(total["top1"] / n)
        metrics["nll"].append(total["nll"] / n)
        metrics["policy_loss"].append(total["policy"] / n)
        for name in parts:
            metrics[f"{name}_loss"].append(total[f"critic_{name}"] / n)
        metrics["kept_fraction"].append(total["kept"] / n)
        if total["uncertain"]:
            metrics["kept_fraction_uncertain"].append(total["kept_uncertain"] / total["uncertain"])
            metrics["uncertain_fraction"].append(total["uncertain"] / n)
        if total["known"]:
            metrics["behavior_kl"].append(total["kl"] / total["known"])
        if mode == "train":
            self._total_train_tokens += int(total["input"])
        metrics["num_tokens"] = [self._total_train_tokens]
        return total["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what happened since the last log: tokens per second, advantages, values and their calibration."""
        pending = self._recorded["train" if self.model.training else "eval"]
        own = {name: torch.cat(parts).float().cpu() for name, parts in pending.items()}
        ranks = gather_object([own]) if own else []  # no collective where a single rank logs something of its own
        recorded = {name: torch.cat([rank[name] for rank in ranks if name in rank]) for name in own}
        pending.clear()
        prefix = "" if self.model.training else f"eval_{self._split}"
        if self._split:  # TRL adds "eval_"
            own_metrics = {f"{self._split}{name}": values for name, values in self._metrics["eval"].items()}
            self._metrics["eval"] = defaultdict(list, own_metrics)
        if self.model.training and "loss" in logs:
            now, tokens = time.perf_counter(), self._total_train_tokens
            logs["tokens_per_second"] = (tokens - self._last_log[1]) / max(now - self._last_log[0], 1e-9)
            self._last_log = (now, tokens)
            if self.model.vision_cache is not None:
                logs["vision_cache_hit_rate"] = self.model.vision_cache.hit_rate()
        if self._online is not None:
            is_update = self.model.training and "loss" in logs
            logs |= self._online.logs() if is_update else {"env_turns": self._online.env_turns}
        if "advantage" in recorded:
            critic = self.model.critic
            logs[f"{prefix}target_mean"] = critic.target_mean.item()
            logs[f"{prefix}target_std"] = critic.target_std.item()
            for name in ("advantage", "value"):
                for q, x in zip(QUANTILES, _quantiles(recorded[name]), strict=True):
                    logs[f"{prefix}{name}_q{round(100 * q):02d}"] = x
            # In double precision the deviation of equal numbers is 0.
            value, returns = recorded["value"].double().numpy(), recorded["return_to_go"].double().numpy()
            logs[f"{prefix}value_bias"] = float((value - returns).mean())
            logs[f"{prefix}value_error"] = float(np.abs(value - returns).mean())
            if len(value) > 1 and value.std() > 0 and returns.std() > 0:
                logs[f"{prefix}value_return_correlation"] = float(np.corrcoef(value, returns)[0, 1])
            writer = self._tensorboard_writer()
            if writer is not None:
                for name in ("advantage", "value"):
                    writer.add_histogram(f"{prefix or 'train_'}{name}", recorded[name], self.state.global_step)
        super().log(logs, start_time)

    def _log_apart(self, logs: dict[str, float]) -> None:
        """Logs what was played: what training has recorded since its last log stays for its next."""
        was_training = self.model.training
        self.model.eval()
        self.log(logs)
        self.model.train(was_training)

    def _tensorboard_writer(self) -> SummaryWriter | None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                return callback.tb_writer
        return None


class _Hooks(TrainerCallback):
    """What `VLMQTrainer` does between `Trainer`'s own steps: after each update."""

    def __init__(self, trainer: VLMQTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.after_update()


class _DrawnOnline(IterableDataset):
    """Stands where `Trainer` wants a dataset without a length; `VLMQTrainer.get_batch_samples` draws the batches."""

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat({})


def _check_evaluation(args: VLMQConfig, eval_env: EnvSpec | None, eval_dataset: Any) -> None:
    """Sets the metric that best weights and the learning rate go by, if it is one of `eval_dataset`."""
    if args.eval_strategy != "no" and eval_env is None and eval_dataset is None:
        raise ValueError(f"`eval_strategy={args.eval_strategy!r}` needs an `eval_env` or an `eval_dataset`.")
    by_metric = args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    if eval_env is None and args.metric_for_best_model == "success_rate":
        if args.load_best_model_at_end or args.save_strategy == "best":
            raise ValueError(
                "`metric_for_best_model='success_rate'` needs an `eval_env`. Give one, or choose a metric of the "
                "`eval_dataset`, such as 'loss'."
            )
        args.metric_for_best_model, args.greater_is_better = ("loss", False) if by_metric else (None, None)
    if by_metric and args.greater_is_better:  # they would take success for a loss
        args.lr_scheduler_kwargs = {"mode": "max", **(args.lr_scheduler_kwargs or {})}


def _warn_of_idle(
    args: VLMQConfig, env: EnvSpec | None, eval_env: EnvSpec | None, callbacks: list[TrainerCallback] | None
) -> None:
    """Says which arguments were set in vain."""
    stops = any(isinstance(one, EnvEvaluationCallback) and one.stop_at_success is not None for one in callbacks or ())
    unseen = {"stop_at_success": None if stops else args.stop_at_success, "record_episodes": args.record_episodes}
    evaluates = args.eval_strategy != "no"
    unseen = {} if evaluates and eval_env is not None else unseen
    for idle, lacking in (
        (idle_offline(args) if env is None else [], "an `env` to collect in"),
        (
            [f"`{name}={value}`" for name, value in unseen.items() if value],
            "an `eval_env` to play" if evaluates else "evaluations (`eval_strategy`)",
        ),
    ):
        if idle:
            warnings.warn(f"Without {lacking}, {', '.join(idle)} will have no effect.", stacklevel=3)


def _has_log_probs(dataset: Dataset) -> bool:
    column = "behavior_logprobs"
    return column in dataset.column_names and any(row is not None for row in dataset.with_format(None)[column])


def _quantiles(x: Tensor) -> list[float]:
    return np.quantile(x.numpy(), QUANTILES).tolist()
