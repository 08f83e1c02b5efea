# SPDX-License-Identifier: Apache-2.0
"""The value-head model class: any Hugging Face image-text-to-text (or text-only causal) model, with a critic.

`AutoModelForImageTextToTextWithValueHead` runs backbone, policy head and critic in **one** forward, and projects only
the action positions through the language-model head. What it saves is a stock model or PEFT adapter, and beside it the
critic in files of its own (`critic.safetensors`, `critic_config.json`).

Axes: B rows, T tokens, D hidden size, A action tokens of the batch (row by row, in order), N critics, V vocabulary.
"""

import json
import os
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub import _CACHED_NO_EXIST, CommitInfo, HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, ModelOutput, cached_file
from trl.kernels import ChunkedLogProbFunction

from .critic import Critic, CriticConfig
from .sharding import reads, split_like, unshard
from .vision_cache import VisionFeatureCache

CRITIC_WEIGHTS_NAME = "critic.safetensors"
CRITIC_CONFIG_NAME = "critic_config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
UPLOAD_ARGUMENTS = ("repo_id", "token", "private", "revision", "commit_message", "commit_description", "create_pr")

# Largest [rows, vocabulary] tile, in elements, that the vocabulary-wide critic makes: 32 MB of float32.
MAX_TILE_ELEMENTS = 2**23


@dataclass
class ValueHeadOutput(ModelOutput):
    """What the action positions of a batch give, packed row by row in token order.

    Args:
        log_probs: [A] log pi(a_t|s_t), with gradient.
        entropy: [A] entropy of pi(.|s_t), no gradient.
        is_top1: [A] bool, whether a_t is the policy's first choice.
        q_values: [A, N] Q(s_t, a_t) of the online heads, normalised.
        q_log_probs: [A, N] log softmax(Q(s_t, .))[a_t]; vocabulary-wide critic only.
        state_values: [A, N] V(s_t) of the online heads, normalised; scalar critic only.
        target_q_values, target_state_values: [A, N] the same of the target heads, no gradient.
        bootstrap_values: [number of True in `bootstrap_mask`, N] V_target of the bootstrap states, no gradient.
    """

    log_probs: Any = None
    entropy: Any = None
    is_top1: Any = None
    q_values: Any = None
    q_log_probs: Any = None
    state_values: Any = None
    target_q_values: Any = None
    target_state_values: Any = None
    bootstrap_values: Any = None


class _OnlyHidden(tuple):
    """A backbone's output: its last hidden states; all else is None."""

    last_hidden_state = property(lambda self: self[0])

    def __getattr__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to the head's output: logits = softcap * tanh(scale * x / softcap), or scale * x."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> "LogitTransform":
        """Reads the families' several names for it, as TRL's fused head does."""
        softcap = getattr(config, "final_logit_softcapping", None)
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            if getattr(config, name, None) is not None:
                return cls(getattr(config, name), softcap)
        scaling = getattr(config, "logits_scaling", None)
        if scaling is not None:
            return cls(scaling if config.model_type == "hyperclovax" else 1 / scaling, softcap)
        return cls(1.0, softcap)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LogitTransform":
        """What a model's own forward does: what its configuration says or, as in classes around a text model, nothing.

        The forward runs once with numbers in place of what its backbone and its head give. No weight of these is read,
        so that they may be in any precision, split or not there yet. Of a forward that does not run so the
        configuration is believed, with a warning.

        Raises:
            ValueError: the forward does something else before the head or after it.
        """
        configured = cls.from_config(model.config.get_text_config())
        head, decoder = model.get_output_embeddings(), model.get_decoder()
        vocab_size, hidden_size = _shape(head.weight)
        device = "cpu" if head.weight.is_meta else head.weight.device
        hidden = torch.linspace(-1, 1, hidden_size, dtype=head.weight.dtype, device=device).square()
        raw = torch.linspace(-100, 100, vocab_size, device=device)  # wide enough for a cap to show
        projected: list[Tensor] = []

        def project(x: Tensor) -> Tensor:
            projected.append(x.float().flatten())
            return raw.expand(*x.shape[:-1], -1)

        with ExitStack() as stack, torch.no_grad():
            given = _OnlyHidden([hidden.reshape(1, 1, -1)])
            backbones = [
                stack.enter_context(patch.object(part, "forward", return_value=given))
                for part in {model.base_model, decoder} - {model, None}  # some classes pass the former by
            ]
            stack.enter_context(patch.object(head, "forward", project))
            tokens, logits, told = torch.zeros(1, 1, dtype=torch.long, device=device), None, True
            try:
                logits = type(model).forward(model, input_ids=tokens).logits.float().flatten()
            except Exception as error:  # it wants pictures, say; or layers before the head want another size
                told = isinstance(error, RuntimeError) and not projected
        if not told or not any(backbone.called for backbone in backbones):
            warnings.warn(
                f"Could not find out what {type(model).__name__} does to its logits; going on as its configuration "
                f"says: {configured}. Compare a few log-probabilities with its own.",
                stacklevel=3,
            )
            return configured
        if logits is not None and projected and _near(projected[0], hidden.float()) and logits.shape == raw.shape:
            nearest = min((configured, cls()), key=lambda transform: float((transform(raw) - logits).abs().max()))
            if _near(logits, nearest(raw)):
                return nearest
        raise ValueError(
            f"{type(model).__name__} has more than a head, a factor and a softcap between its last hidden states and "
            "its logits, which is not supported: the policy that is trained would not be the model's own."
        )

    def __call__(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


class AutoModelForImageTextToTextWithValueHead(nn.Module):
    """A pretrained model with a critic on its last hidden states.

    Calling it with `labels` (-100 everywhere but on action tokens) scores the action tokens and returns a
    `ValueHeadOutput`; without, it is the pretrained model's own forward. Attributes that it does not define itself
    (`generate`, `config`, `device`, ...) are the pretrained model's.

    Args:
        pretrained_model: a `PreTrainedModel` with a language-model head, or a `peft.PeftModel` around one.
        critic_config: shape of a fresh critic; its `hidden_size` and `vocab_size` are read off the model. Seed torch
            before, if several processes must agree on the fresh weights.

    Raises:
        ValueError: if the model has no language-model head, a quantised one or an adapter on it, or does more to its
            hidden states than project, scale and cap them, or its adapter adds virtual tokens or would be saved
            without other weights that are trained, or several adapters act at once.
    """

    def __init__(self, pretrained_model: nn.Module, critic_config: CriticConfig | None = None):
        super().__init__()
        if not isinstance(pretrained_model, nn.Module):
            raise TypeError(
                f"A critic goes on a model of transformers or PEFT, got {type(pretrained_model).__name__}. (TRL's "
                "`BEMACallback` makes a model of the configuration: it does not know one with a critic.)"
            )
        base = _base_model(pretrained_model)
        head = language_model_head(pretrained_model)
        if getattr(base, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"The {type(base).__name__} holds an adapter that transformers put in (`add_adapter`, or "
                "`from_pretrained` of a model class given an adapter), which is not saved and opened as PEFT's are. "
                "Give the adapter's folder or repository as the model, or `PeftModel.from_pretrained(base, adapter, "
                "is_trainable=True)`; or the model without it and a `peft_config`."
            )
        peft_config = getattr(pretrained_model, "peft_config", None)
        if isinstance(peft_config, dict) and any(c.is_prompt_learning for c in peft_config.values()):
            raise ValueError(
                "Prompt-learning PEFT methods shift the token positions that the critic reads; use LoRA or another "
                "adapter that changes weights only."
            )
        if isinstance(peft_config, dict) and any(
            getattr(c, "alora_invocation_tokens", None) for c in peft_config.values()
        ):
            raise ValueError(
                "An activated LoRA (`alora_invocation_tokens`) acts on a part of the tokens, which only the whole "
                "model's forward knows; use LoRA without it."
            )
        if isinstance(pretrained_model, PeftModel) and len(pretrained_model.active_adapters) > 1:
            raise ValueError(
                f"The adapters {pretrained_model.active_adapters} act together, and what is saved is one adapter: "
                "activate one (`set_adapter`), or make one of them (`add_weighted_adapter`)."
            )
        if isinstance(head, BaseTunerLayer):
            raise ValueError(
                "There is an adapter on the language-model head, whose weight is read directly: the adapter would be "
                "left out of the policy. Remove the head from `target_modules`."
            )
        if not head.weight.is_floating_point():
            name = next(name for name, module in base.named_modules() if module is head)
            raise ValueError(
                f"The language-model head `{name}` is quantised, and its weight is read directly. Leave it out: add "
                f'"{name}" to `llm_int8_skip_modules` of the quantisation.'
            )
        lost = _trained_but_not_saved(pretrained_model) if isinstance(pretrained_model, PeftModel) else []
        if lost:
            raise ValueError(
                f"{len(lost)} weights beside the adapter are trained, `{lost[0]}` among them, and an adapter is saved "
                "without them. Freeze them (`requires_grad_(False)`), or name their modules in `modules_to_save` of "
                "the adapter's configuration."
            )
        logit_transform = LogitTransform.of(base)
        config = critic_config or CriticConfig()
        # The head's own input: some families project their hidden states to another size.
        vocab_size, hidden_size = _shape(head.weight)
        expected = {"hidden_size": hidden_size, "vocab_size": vocab_size if config.critic_type == "vocab" else None}
        for name, value in expected.items():
            if value is not None and getattr(config, name) not in (None, value):
                raise ValueError(
                    f"The critic was made for {name}={getattr(config, name)}, but {type(base).__name__} has {value}: "
                    "it belongs to another model."
                )
        self.pretrained_model = pretrained_model
        self.critic = Critic(CriticConfig(**{**config.to_dict(), **expected}))
        self.critic.to(head.weight.device)
        reads(self, [*_head_weights(base), *self.critic.online.read_directly()])
        self.logit_transform = logit_transform
        # Vocabulary entries that are projected at a time; bounds memory, never the result.
        self.vocab_chunk_size = 32768
        self.vision_cache: VisionFeatureCache | None = None

    def remember_pictures(self, max_bytes: int) -> None:
        """Lets each picture of scored batches go through the vision tower once (`VisionFeatureCache`).

        Raises:
            ValueError: the pictures' features would not stay the same, or the family does not take any.
        """
        self.vision_cache = VisionFeatureCache(_base_model(self.pretrained_model), max_bytes)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "pretrained_model":
                raise
            return getattr(self.pretrained_model, name)

    # ---- forward ----

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        bootstrap_mask: Tensor | None = None,
        with_critic: bool = True,
        **model_inputs: Any,
    ) -> Any:
        """Scores the action tokens of a batch.

        Args:
            input_ids: [B, T].
            labels: [B, T] token ids on action tokens, -100 elsewhere; None calls the pretrained model itself. An
                action token is never at position 0.
            bootstrap_mask: [B, T] True at the last prompt token of rows that only serve as bootstrap state.
            with_critic: False leaves all critic fields None (plain SFT).
            **model_inputs: `attention_mask`, `pixel_values` and whatever else the family takes.
        """
        if labels is None:
            return self.pretrained_model(input_ids=input_ids, **model_inputs)
        base = _base_model(self.pretrained_model)
        unshard(base.get_output_embeddings())  # read here, and not called
        if self.vision_cache is not None:
            model_inputs = self.vision_cache(model_inputs)
        model_inputs["use_cache"] = False
        hidden = base.base_model(input_ids=input_ids, **model_inputs).last_hidden_state
        rows, positions = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        before = hidden[rows, positions]  # [A, D] state s_t
        tokens = labels[rows, positions + 1]
        output = ValueHeadOutput()
        output.log_probs, output.entropy, output.is_top1 = self._policy(base, before, tokens)
        if not with_critic:
            return output
        after = hidden[rows, positions + 1]  # [A, D] state after a_t
        bootstrap = hidden[bootstrap_mask] if bootstrap_mask is not None else hidden[:0, 0]
        with torch.autocast(hidden.device.type, enabled=False):
            if self.critic.config.critic_type == "scalar":
                self._score_scalar(output, before.float(), after.float(), bootstrap.float())
            else:
                self._score_vocab(output, base, before, bootstrap, tokens)
        return output

    def _policy(self, base: PreTrainedModel, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[A, D], [A] -> log-probabilities, entropies, is_top1, each [A], without an [A, V] tensor."""
        weight, bias = _head_weights(base)
        log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
            hidden,
            weight,
            bias,
            tokens,
            1.0,
            self.vocab_chunk_size,
            self.logit_transform.softcap,
            self.logit_transform.scale,
            ("log_probs", "entropy", "is_top1"),
        )
        return log_probs, entropy.detach(), is_top1

    def _score_scalar(self, output: ValueHeadOutput, before: Tensor, after: Tensor, bootstrap: Tensor) -> None:
        online, target = self.critic.online, self.critic.target
        output.q_values = online.q(after)
        output.state_values = online.v(before)
        with torch.no_grad():
            output.target_q_values = target.q(after)
            output.target_state_values = target.v(before)
            output.bootstrap_values = target.v(bootstrap)

    def _score_vocab(
        self, output: ValueHeadOutput, base: PreTrainedModel, before: Tensor, bootstrap: Tensor, tokens: Tensor
    ) -> None:
        online, target = self.critic.online, self.critic.target
        features = online.features(before.float())
        output.q_values = online.taken(features, tokens)
        # The Q row read as logits: the policy's kernel gives its log-softmax at the taken token, chunk by chunk.
        output.q_log_probs = torch.stack(
            [
                ChunkedLogProbFunction.apply(
                    features[:, n], online.up[n], None, tokens, 1.0, self.vocab_chunk_size, None, 1.0, ("log_probs",)
                )[0]
                for n in range(features.shape[1])
            ],
            dim=-1,
        )
        with torch.no_grad():
            target_features = target.features(before.float())
            output.target_q_values = target.taken(target_features, tokens)
            states = torch.cat([before, bootstrap])
            features = torch.cat([target_features, target.features(bootstrap.float())])
            values = self._expected_q(base, states, features)
            output.target_state_values, output.bootstrap_values = values.split([len(before), len(bootstrap)])

    def _expected_q(self, base: PreTrainedModel, hidden: Tensor, features: Tensor) -> Tensor:
        """sum_a pi(a|s) Q_target(s, a): hidden [A, D], features [A, N, R] -> [A, N], a tile of rows at a time."""
        weight, bias = _head_weights(base)
        rows = max(1, MAX_TILE_ELEMENTS // weight.shape[0])
        values = [
            self.critic.target.expected(
                f, self.logit_transform(nn.functional.linear(h.to(weight.dtype), weight, bias).float()).softmax(-1)
            )
            for h, f in zip(hidden.split(rows), features.split(rows), strict=True)
        ]
        return torch.cat(values) if values else features.new_zeros(0, features.shape[1])

    # ---- saving and loading ----

    def save_pretrained(
        self, save_directory: str | os.PathLike, state_dict: dict | None = None, **kwargs: Any
    ) -> None:
        """Writes a stock model (or PEFT adapter: the active one, by any name), and the critic in its own two files.

        Args:
            state_dict: this module's whole state dict, where the weights are sharded and were gathered before.
            **kwargs: passed to the pretrained model's `save_pretrained`; with `push_to_hub=True` all of it is
                uploaded then, and `repo_id` and the other arguments of `push_to_hub` count.

        A whole model takes the place of an adapter there, which would be opened in its stead.

        Raises:
            ValueError: the folder holds the base model of the adapter, which could not be opened there any more.
        """
        push = kwargs.pop("push_to_hub", False)
        hub_kwargs = {k: kwargs.pop(k) for k in UPLOAD_ARGUMENTS if k in kwargs} if push else {}
        own, critic_state = None, self.critic.state_dict()
        if state_dict is not None:
            prefix = "pretrained_model."
            own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            critic_state = {k.removeprefix("critic."): v for k, v in state_dict.items() if k.startswith("critic.")}
        if isinstance(self.pretrained_model, PeftModel):
            name = self.pretrained_model.active_adapter
            refuse_folder_of_base(self.pretrained_model, save_directory)
            self.pretrained_model.save_pretrained(save_directory, state_dict=own, selected_adapters=[name], **kwargs)
            if name != "default" and kwargs.get("is_main_process", True):
                _move_up(Path(save_directory) / name)
        else:
            self.pretrained_model.save_pretrained(save_directory, state_dict=own, **kwargs)
            if kwargs.get("is_main_process", True):
                for file in (ADAPTER_CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                    (Path(save_directory) / file).unlink(missing_ok=True)
        if kwargs.get("is_main_process", True):
            self.save_critic(save_directory, critic_state)
        if push and kwargs.get("is_main_process", True):  # of a copy: the folder may hold other files
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub_kwargs}, state_dict=state_dict, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Uploads what `save_pretrained` writes: a stock model (or PEFT adapter), and its critic.

        Args:
            repo_id: made if it does not exist.
            **kwargs: `private`, `revision` (a branch, made if need be), `commit_message`, `commit_description`,
                `create_pr`, `token`; others go to `save_pretrained`.

        Raises:
            ValueError: a whole model for a repository that holds an adapter.
        """
        hub_kwargs = {k: kwargs.pop(k) for k in UPLOAD_ARGUMENTS if k in kwargs}
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, **kwargs)
            return _upload(directory, **{**hub_kwargs, "repo_id": repo_id})

    def save_critic(self, save_directory: str | os.PathLike, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes `critic.safetensors` and `critic_config.json` only."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        state = self.critic.state_dict() if state_dict is None else state_dict
        whole = {k: v.detach().float().contiguous().cpu() for k, v in state.items()}
        save_file(whole, directory / CRITIC_WEIGHTS_NAME)
        (directory / CRITIC_CONFIG_NAME).write_text(json.dumps(self.critic.config.to_dict(), indent=2) + "\n")

    def load_critic(self, directory: str | os.PathLike, **hub_kwargs: Any) -> None:
        """Restores the critic saved beside a model.

        Raises:
            OSError: if the critic's files are missing.
            ValueError: if they do not fit this model; nothing is dropped or left fresh silently.
        """
        config = load_critic_config(directory, **hub_kwargs)
        if config != self.critic.config:
            changed = {
                k: (v, getattr(self.critic.config, k))
                for k, v in config.to_dict().items()
                if v != getattr(self.critic.config, k)
            }
            raise ValueError(f"The critic in {directory} does not fit: (saved, wanted) are {changed}.")
        path = cached_file(str(directory), CRITIC_WEIGHTS_NAME, **hub_kwargs)
        try:
            self.critic.load_state_dict(split_like(load_file(path), self.critic), strict=True)
        except SafetensorError as error:
            raise ValueError(
                f"{CRITIC_WEIGHTS_NAME} in {directory} is damaged: {error}. Save or copy it again."
            ) from None
        except RuntimeError as error:
            raise ValueError(f"The critic in {directory} does not fit its own {CRITIC_CONFIG_NAME}: {error}") from None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        critic_config: CriticConfig | None = None,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> "AutoModelForImageTextToTextWithValueHead":
        """Loads a model (or adapter on its base model) and its critic.

        Args:
            pretrained_model_name_or_path: a directory or Hub id, of a whole model or of a PEFT adapter.
            critic_config: give it to start a **fresh** critic on a model that has none. Left out, the critic must be
                there.
            is_trainable: whether a loaded adapter is to be trained further.
            **kwargs: passed to the model class' `from_pretrained` (`dtype`, `revision`, `token`, ...).

        Raises:
            TypeError: if the name is none.
            OSError: if there is no model, only half a critic, or no critic and no `critic_config` was given.
            ValueError: if the critic does not fit the model.
        """
        name = existing(pretrained_model_name_or_path)
        hub_kwargs = hub_arguments(kwargs)
        saved = has_critic(name, **hub_kwargs)
        if not saved and critic_config is None:
            raise OSError(
                f"{name} holds no critic ({CRITIC_CONFIG_NAME}). Pass `critic_config=CriticConfig()` to start a fresh "
                "one."
            )
        if saved and critic_config is not None:
            raise ValueError(f"{name} has a critic of its own; leave `critic_config` out to restore it.")
        model = load_pretrained(name, is_trainable=is_trainable, **kwargs)
        wrapped = cls(model, load_critic_config(name, **hub_kwargs) if saved else critic_config)
        if saved:
            wrapped.load_critic(name, **hub_kwargs)
        return wrapped.train(model.training)


def existing(name: str | os.PathLike) -> str:
    """`name` as a string, if it may be a repository on the Hub or is a folder that holds a model or an adapter.

    Raises:
        TypeError: it is no name at all.
        OSError: it is the path of something else, or of nothing.
    """
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        raise TypeError(f"A model's name is that of a folder, or of a repository on the Hub; got {name!r}.")
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
            raise OSError(f"The folder {name} holds no model, neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME}.")
    elif path.exists():
        raise OSError(f"{name} is a file; give the folder of a model or an adapter.")
    elif str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:  # which no repository's name does
        raise OSError(f"There is no folder {name}.")
    return str(name)


def load_pretrained(name: str | os.PathLike, is_trainable: bool = False, **kwargs: Any) -> nn.Module:
    """A whole model, or a PEFT adapter on its base model, by what `name` holds. Weights are safetensors only.

    Raises:
        TypeError: `name` is no name.
        OSError: there are no such files, of an adapter or of its base model; a pickle (`.bin`) does not count.
        ValueError: the adapter does not name its base model.
    """
    name = existing(name)
    hub_kwargs = hub_arguments(kwargs)
    kwargs["use_safetensors"] = True
    if has_adapter(name, **hub_kwargs):
        peft_config = PeftConfig.from_pretrained(name, **hub_kwargs)
        if not peft_config.base_model_name_or_path:
            raise ValueError(
                f"{ADAPTER_CONFIG_NAME} of {name} does not say which model the adapter belongs to: set its "
                "`base_model_name_or_path`."
            )
        if Path(name).is_dir() and Path(name).resolve() == Path(peft_config.base_model_name_or_path).resolve():
            raise ValueError(
                f"The adapter in {name} names its own folder as its base model. Move its {ADAPTER_CONFIG_NAME} and "
                f"{SAFETENSORS_WEIGHTS_NAME} into another folder, to open either."
            )
        require_adapter_weights(name, **hub_kwargs)
        try:
            base_name = existing(peft_config.base_model_name_or_path)
        except OSError as error:
            raise OSError(
                f"The adapter {name} cannot be opened without its base model. {error} Put it back, or write where it "
                f"is into the adapter's {ADAPTER_CONFIG_NAME} (`base_model_name_or_path`)."
            ) from None
        base = load_pretrained(base_name, **_of_base(peft_config, kwargs))
        _resize_vocabulary(base, name, **hub_kwargs)
        return PeftModel.from_pretrained(base, name, is_trainable=is_trainable, **hub_kwargs)
    trust = kwargs.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust, **hub_kwargs)
    multimodal = type(config) in AutoModelForImageTextToText._model_mapping or (
        AutoModelForImageTextToText.__name__ in (getattr(config, "auto_map", None) or {})
    )
    auto_class = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    return auto_class.from_pretrained(name, **kwargs)


def keep_trainable(model: nn.Module) -> None:
    """Keeps a 4-bit base model on the CPU as it is through evaluations.

    Where the processor multiplies bfloat16 by itself, bitsandbytes packs a layer's weights anew at the first forward
    in evaluation mode, into a form that no gradient passes through afterwards, in training mode neither.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_processor(name: str | os.PathLike, config: Any, **kwargs: Any) -> Any:
    """The processor or tokenizer saved beside a model or adapter, or else that of an adapter's base model.

    Args:
        config: the opened model's.
        **kwargs: `trust_remote_code`, and `hub_arguments`.
    """
    hub_kwargs = hub_arguments(kwargs)
    if any(find_file(name, f"{kind}_config.json", **hub_kwargs) for kind in ("processor", "preprocessor")):
        return AutoProcessor.from_pretrained(name, **kwargs)
    if find_file(name, "tokenizer_config.json", **hub_kwargs) is not None:
        return AutoTokenizer.from_pretrained(name, config=config, **kwargs)
    if has_adapter(name, **hub_kwargs):
        kwargs = _of_base(PeftConfig.from_pretrained(name, **hub_kwargs), kwargs)
    return AutoProcessor.from_pretrained(config._name_or_path, **kwargs)


def _of_base(peft_config: PeftConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an adapter's `from_pretrained`, for that of its base model, which has revisions of its own."""
    revision = {"revision": peft_config.revision} if peft_config.revision else {}
    return {k: v for k, v in kwargs.items() if k != "revision"} | revision


def has_critic(name: str | os.PathLike, **hub_kwargs: Any) -> bool:
    """Whether a directory or Hub repository holds a critic beside its model.

    Raises:
        OSError: a directory holds its weights without its configuration.
    """
    if find_file(name, CRITIC_CONFIG_NAME, **hub_kwargs) is not None:
        return True  # without the weights, loading it says so
    if (Path(name) / CRITIC_WEIGHTS_NAME).is_file():
        raise OSError(
            f"{name} holds half a critic: {CRITIC_WEIGHTS_NAME} without {CRITIC_CONFIG_NAME}. Copy that file too, or "
            "remove the other to do without a critic."
        )
    return False


def has_adapter(name: str | os.PathLike, **hub_kwargs: Any) -> bool:
    """Whether a directory or Hub repository holds a PEFT adapter."""
    return find_file(name, ADAPTER_CONFIG_NAME, **hub_kwargs) is not None


def refuse_adapter_repository(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> None:
    """Raises ValueError if a Hub repository holds an adapter: a whole model beside it would never be opened."""
    if HfApi(token=token).file_exists(repo_id, ADAPTER_CONFIG_NAME, revision=revision):
        raise ValueError(
            f"The repository {repo_id} holds an adapter, and whoever opens it would get that, not a whole model "
            f"pushed beside it. Push to another one, or delete {ADAPTER_CONFIG_NAME} there first."
        )


def refuse_folder_of_base(model: PeftModel, folder: str | os.PathLike) -> None:
    """Raises ValueError if the folder holds the base model of the adapter, which is to be saved there."""
    base_name = model.peft_config[model.active_adapter].base_model_name_or_path
    if base_name and Path(base_name).resolve() == Path(folder).resolve():
        raise ValueError(
            f"{folder} holds the base model of the adapter, which could not be opened there any more: save the "
            "adapter in another folder."
        )


def require_adapter_weights(name: str | os.PathLike, **hub_kwargs: Any) -> None:
    """Raises OSError unless the adapter's weights are safetensors; PEFT would open a pickle, which may run code."""
    if find_file(name, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs) is None:
        raise OSError(
            f"{name} has no {SAFETENSORS_WEIGHTS_NAME}. An adapter in a pickle is not opened: if you trust it, load "
            "it with PEFT and save it again."
        )


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of `from_pretrained`, those that say where files come from.

    Raises:
        ValueError: a `subfolder`, since an adapter's base model and a critic are looked for beside.
    """
    if kwargs.get("subfolder"):
        raise ValueError(
            f"`subfolder={kwargs['subfolder']!r}`: model and critic are opened from a folder or a repository's root. "
            "Download the repository (`huggingface_hub.snapshot_download`) and give the folder in it."
        )
    return {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}


def load_critic_config(name: str | os.PathLike, **hub_kwargs: Any) -> CriticConfig:
    """Reads `critic_config.json`; raises OSError if it is missing, ValueError if it is not one of ours."""
    path = cached_file(str(name), CRITIC_CONFIG_NAME, **hub_kwargs)
    try:
        return CriticConfig(**json.loads(Path(path).read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{CRITIC_CONFIG_NAME} of {name} is not a critic's configuration: {error}") from None


def find_file(name: str | os.PathLike, filename: str, **hub_kwargs: Any) -> str | None:
    """The file's local path; None if there is none, or, with a warning, if neither cache nor Hub could tell."""
    if Path(name).is_dir():
        return str(Path(name) / filename) if (Path(name) / filename).is_file() else None
    cache = {k: hub_kwargs[k] for k in ("revision", "cache_dir") if k in hub_kwargs}
    try:
        return hf_hub_download(str(name), filename, **hub_kwargs)
    except (HFValidationError, RepositoryNotFoundError):
        return None  # loading the model itself will say so
    except (HfHubHTTPError, EntryNotFoundError) as error:
        known_missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if not known_missing and try_to_load_from_cache(str(name), filename, **cache) is not _CACHED_NO_EXIST:
            warnings.warn(
                f"Could not find out whether {name} has a {filename} ({type(error).__name__}); going on as if it had "
                "none. If it has one, download the repository first and pass its directory.",
                stacklevel=2,
            )
        return None


def _resize_vocabulary(base: Any, name: str, **hub_kwargs: Any) -> None:
    """Gives a base model as many embeddings as there are in an adapter that was trained with tokens added."""
    names = {id(module): key for key, module in base.named_modules()}
    with safe_open(find_file(name, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs), "pt") as file:
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            own = f"base_model.model.{names.get(id(layer))}"
            for key in {f"{own}.weight", f"{own}.base_layer.weight"} & set(file.keys()):
                rows = file.get_slice(key).get_shape()[0]
                if rows != _shape(layer.weight)[0]:
                    base.resize_token_embeddings(rows, mean_resizing=False)  # all are in the file, or not read
                    return


def _trained_but_not_saved(model: PeftModel) -> list[str]:
    """Weights that are trained beside those of an adapter, which alone are saved."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = {name for name in trained if model.peft_config.keys().isdisjoint(name.split("."))}
    if not others:
        return []
    state = {**model.state_dict(), **trained}
    saved = get_peft_model_state_dict(model, state, model.active_adapter, save_embedding_layers=False).values()
    return sorted(others - {name for name in others if any(trained[name] is x for x in saved)})


def _move_up(folder: Path) -> None:
    """Puts an adapter beside its folder, which PEFT makes for any name but "default" and does not look for."""
    for name in (SAFETENSORS_WEIGHTS_NAME, ADAPTER_CONFIG_NAME):
        os.replace(folder / name, folder.parent / name)
    if not any(folder.iterdir()):
        folder.rmdir()


def _upload(
    directory: str | os.PathLike,
    repo_id: str,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model and critic",
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if not (Path(directory) / ADAPTER_CONFIG_NAME).is_file():
        refuse_adapter_repository(repo_id, revision, token)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        revision=revision,
        commit_message=commit_message,
        commit_description=commit_description,
        create_pr=create_pr,
    )


def language_model_head(model: nn.Module) -> Any:
    """The output embedding of a model, or of the one inside a PEFT wrapper.

    Raises:
        ValueError: it has none, or nothing below it.
    """
    base = _base_model(model)
    head = base.get_output_embeddings()
    if head is None or base.base_model is base:
        raise ValueError(
            f"{type(base).__name__} has no language-model head on a backbone, so there is no policy to train. "
            "Pass a model of `AutoModelForImageTextToText` or `AutoModelForCausalLM`."
        )
    return head


def _base_model(model: nn.Module) -> Any:
    """The `PreTrainedModel` inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _near(x: Tensor, expected: Tensor) -> bool:
    """Equal, but for a rounding to half precision."""
    return x.shape == expected.shape and torch.allclose(x, expected, rtol=1e-2, atol=1e-3)


def _shape(weight: Tensor) -> tuple[int, ...]:
    """Also of a weight that ZeRO-3 has split, which reports an empty one."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _head_weights(base: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    head = base.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)
