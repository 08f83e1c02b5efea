# SPDX-License-Identifier: Apache-2.0
"""What a trainer of a model with a critic writes: checkpoints, the saved agent, its card, and what goes to the Hub."""

import functools
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import PeftModel
from torch import nn
from transformers import ProcessorMixin
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress
from trl import SFTTrainer
from trl.trainer.utils import get_comet_experiment_url, get_config_model_id, get_trackio_space_url

from .agent import CARD_NAME, agent_card
from .agent_format import AgentFormat
from .callbacks import EnvEvaluationCallback
from .checkpoints import TRAINING_STATE, load_weights
from .model_card import CURVE_NAME, evaluations, model_card, plot_success
from .modeling import AutoModelForImageTextToTextWithValueHead, refuse_adapter_repository
from .online import OnlineData, replay_folder
from .rollout import EnvSpec
from .sharding import whole_state_dict
from .vlmq_config import VLMQConfig

CONFIG_NAME = "vlmq_config.json"
STOPPED = "stopped"  # checkpoint of weights that may be broken, with its step
EPISODES_FOLDER = "episodes"  # of the recorder, in `output_dir`
PRIORITIES_NAME = "replay_priorities-{}.npz"  # of each process


class SavingTrainer(SFTTrainer):
    """The part of `VLMQTrainer` that saves, resumes and pushes: a stock model or adapter with the critic beside it,
    and of an online run what its replay buffer held."""

    model: AutoModelForImageTextToTextWithValueHead
    args: VLMQConfig
    push_in_progress: Any
    eval_env: EnvSpec | None
    agent_format: AgentFormat | None
    _env_format: AgentFormat | None  # that of `eval_env`
    _online: OnlineData | None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; under DeepSpeed also where nothing has been trained yet in this process, and under
        FSDP always whole."""
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and getattr(self, "deepspeed", None) is None):
            self._save(output_dir, whole_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A stock model or adapter, the critic beside it, the processor, and the configuration as JSON."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if not self.args.should_save:
            return
        self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
        self.processing_class.save_pretrained(output_dir)
        # `to_dict` hides the tokens; what JSON cannot hold (a function, a device) is for reading only.
        (Path(output_dir) / CONFIG_NAME).write_text(json.dumps(self.args.to_dict(), indent=2, default=str))
        (Path(output_dir) / CARD_NAME).write_text(json.dumps(self._agent_card, indent=2) + "\n")

    @functools.cached_property
    def _agent_card(self) -> dict[str, Any]:
        args = self.args
        return agent_card(
            self.eval_env, self.agent_format or self._env_format, args.max_completion_length, args.legal_actions_only
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes `README.md` (`model_card`), and a picture of success against steps, to `output_dir`."""
        if not self.is_world_process_zero():
            return
        folder, own = Path(self.args.output_dir), self.accelerator.unwrap_model(self.model).pretrained_model
        folder.mkdir(parents=True, exist_ok=True)
        base_model = get_config_model_id(own.config)
        played = evaluations(self.state.log_history, self.args.to_dict())
        if len(played) > 1:
            plot_success(played, folder / CURVE_NAME)
        step = self.state.global_step  # of the weights
        if self.args.load_best_model_at_end and not self.is_in_train and self.state.best_global_step is not None:
            step = self.state.best_global_step
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EnvEvaluationCallback) and callback.restored_step is not None:
                step = callback.restored_step
        given = [tags] if isinstance(tags, str) else list(tags or [])
        trackers = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
        model_card(
            model_name=model_name or folder.name,
            repo_id=self.hub_model_id or str(folder),
            base_model=None if not base_model or Path(base_model).is_dir() else base_model,
            dataset_name=dataset_name,
            tags=[*dict.fromkeys([*self._tag_names, *given])],
            is_adapter=isinstance(own, PeftModel),
            sees_images=isinstance(self.processing_class, ProcessorMixin),
            env_id=self._agent_card["env_id"],
            env_kwargs=self._agent_card["env_kwargs"],
            arguments=self.args.to_dict(),
            played=played,
            step=step,
            curve=CURVE_NAME if len(played) > 1 else None,
            links=[f"Logs: [{name}]({url})." for name, url in trackers.items() if url],
        ).save(folder / "README.md")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As `Trainer` does, on every process; and what the replay buffer holds now, and its turns' priorities."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._online is not None:
            folder, process = Path(output_dir), self.args.process_index
            folder.mkdir(parents=True, exist_ok=True)
            (folder / replay_manifest_name(process)).write_text(json.dumps(self._online.buffer.manifest()) + "\n")
            if self._online.priorities is not None:
                self._online.priorities.save(folder / PRIORITIES_NAME.format(process))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As `Trainer` does; and the priorities, without which all turns are alike at first."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"The optimiser of {checkpoint} is not that of this run: {error}. Set `optim`, `critic_coef`, "
                "`critic_learning_rate` (or None) and what is trained as they were, or begin another run with its "
                "folder as the model."
            ) from error
        if checkpoint is not None and self._online is not None and self._online.priorities is not None:
            path = Path(checkpoint) / PRIORITIES_NAME.format(self.args.process_index)
            if path.is_file():
                self._online.priorities.load(path)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As `Trainer` does; refuses a repository that holds an adapter, if this is a whole model."""
        super().init_hf_repo(token, private)
        model = self.accelerator.unwrap_model(self.model)
        if self.is_world_process_zero() and not isinstance(getattr(model, "pretrained_model", model), PeftModel):
            token = self.args.hub_token if token is None else token
            refuse_adapter_repository(self.hub_model_id, self.args.hub_revision, token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`, but the replay buffer and the recorded episodes stay where they are: they hold the
        training data, which `push_trajectories` shares when asked to."""
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        token = args.hub_token if token is None else token
        if self.hub_model_id is None:  # `push_to_hub` is not set
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        self._finish_current_push()
        revision = args.hub_revision if revision is None else revision
        return self._upload_output(token, revision, commit_message=commit_message, run_as_future=not blocking)

    def _upload_output(self, token: str | None, revision: str | None, **kwargs: Any) -> Any:
        """Uploads `output_dir` without checkpoints and play."""
        folder = Path(self.args.output_dir)
        kept_here = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"{STOPPED}-*", f"{EPISODES_FOLDER}/*"]
        replay = Path(os.path.relpath(replay_folder(self.args), folder))
        if ".." not in replay.parts:
            kept_here.append(f"{replay.as_posix()}/*")
        api = HfApi(token=token)
        return api.upload_folder(
            repo_id=self.hub_model_id, folder_path=folder, ignore_patterns=kept_here, revision=revision, **kwargs
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As `Trainer` does after each save, with all that `_save` wrote: the critic goes along, and no pickle."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # A copy: the checkpoint may be deleted while it is uploaded. Its card is PEFT's; the run's is there already.
        ignore = shutil.ignore_patterns(*TRAINING_STATE, "README.md")
        shutil.copytree(checkpoint_folder, args.output_dir, dirs_exist_ok=True, ignore=ignore)
        message: dict[str, Any] = {"commit_message": f"Training in progress, step {self.state.global_step}"}
        message["run_as_future"] = True
        jobs = [self._upload_output(args.hub_token, args.hub_revision, **message)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            target = "last-checkpoint" if last else Path(checkpoint_folder).name
            jobs.append(
                HfApi(token=args.hub_token).upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=checkpoint_folder,
                    path_in_repo=target,
                    revision=args.hub_revision,
                    **message,
                )
            )
        if busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restores adapter or weights, and the critic, strictly: a key that is missing or left over is an error."""
        if not Path(resume_from_checkpoint).is_dir():
            raise ValueError(f"Can't find a valid checkpoint at {resume_from_checkpoint}")
        load_weights(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if not best.is_dir():  # the output's folder was moved?
            best = Path(self.args.output_dir) / best.name
        if not best.is_dir():
            warnings.warn(
                f"The best checkpoint, {self.state.best_model_checkpoint}, is gone: the weights stay those of the "
                "last step.",
                stacklevel=2,
            )
            return
        self.state.best_model_checkpoint = str(best)
        if self.is_deepspeed_enabled:  # as it resumes
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(best))

    def _save_before_stopping(self, aside: bool = False) -> Path | None:
        """A checkpoint of what was learned so far; an error is coming that matters more than one in saving.

        Args:
            aside: the weights may be broken: nothing resumes from it unless told to, no earlier checkpoint is removed
                for it, and it is not pushed.
        """
        args, state = self.args, self.state
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not state.global_step or (folder / TRAINER_STATE_NAME).is_file():
            return None
        usual = args.save_total_limit, args.push_to_hub
        try:
            if aside:
                args.save_total_limit, args.push_to_hub = None, False
            self._save_checkpoint(self.model, trial=None)
            if aside:
                self.accelerator.wait_for_everyone()
                put, folder = folder, folder.with_name(f"{STOPPED}-{state.global_step}")
                if self.is_world_process_zero():
                    shutil.rmtree(folder, ignore_errors=True)
                    put.rename(folder)
            return folder
        except Exception as failure:
            warnings.warn(f"No checkpoint could be saved: {failure}", stacklevel=2)
            return None
        finally:
            args.save_total_limit, args.push_to_hub = usual

    def _broke_the_weights(self, error: Exception) -> bool:
        """Logits that are not finite; of several processes each may have another error, and all save alike."""
        return isinstance(error, FloatingPointError) and self.args.world_size == 1


def replay_manifest_name(process: int) -> str:
    return f"replay_manifest{f'-{process}' if process else ''}.json"
