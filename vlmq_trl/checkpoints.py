# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the disk: which one to go on from, what in it is not the model, and how its weights come back."""

import functools
import json
import os
import re
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .modeling import AutoModelForImageTextToTextWithValueHead, require_adapter_weights
from .sharding import assign, gathered, is_sharded

# What a checkpoint holds besides a model; it stays out of the Hub's main folder.
TRAINING_STATE = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "replay_*",
    "trainer_state.json",
    "global_step*",
    "pytorch_model_fsdp*",
)


def newest_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end; None if there is none.

    The trainer's state is the last file of a checkpoint, so that one without, or with half of it, was interrupted.
    """

    def whole(state: Path) -> bool:
        try:
            json.loads(state.read_text())
        except ValueError:
            return False
        return True

    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    numbered = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")  # and not a copy that somebody keeps beside them
    steps = {state.parent: numbered.fullmatch(state.parent.name) for state in found if whole(state)}
    folders = {folder: int(step[1]) for folder, step in steps.items() if step}
    return str(max(folders, key=lambda folder: folders[folder])) if folders else None


def load_weights(model: AutoModelForImageTextToTextWithValueHead, folder: str) -> None:
    """Puts a checkpoint's adapter or weights, and its critic, into the model, split over processes or not.

    Raises:
        ValueError: a key is missing or left over, or a tensor has another shape.
    """
    own = model.pretrained_model
    if isinstance(own, PeftModel):
        _load_adapter(own, folder)
    else:
        # Families save under remapped names; only `from_pretrained` knows the way back.
        # One type for all that it opens: the narrowest that holds every weight's own.
        dtypes = {p.dtype for p in own.parameters() if p.is_floating_point()}
        dtype = functools.reduce(torch.promote_types, dtypes)
        saved = type(own).from_pretrained(folder, dtype=dtype, use_safetensors=True)
        if is_sharded(own.parameters()):  # under ZeRO-3 the saved model then is, too
            parts = dict(saved.named_parameters())
            for name, p in own.named_parameters():
                with gathered([p, parts[name]], write=True):
                    assign(p, parts[name])
        else:
            own.load_state_dict(saved.state_dict(), strict=True)
    model.load_critic(folder)


def _load_adapter(model: PeftModel, folder: str) -> None:
    require_adapter_weights(folder)
    loaded = load_peft_weights(folder, device="cpu")
    with gathered([p for p in model.parameters() if p.requires_grad], write=True):
        parts = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
        known = parts.keys() & loaded.keys()
        misfits = (parts.keys() ^ loaded.keys()) | {k for k in known if parts[k].shape != loaded[k].shape}
        if misfits:
            raise ValueError(
                f"The adapter in {folder} does not fit: {sorted(misfits)[:3]} are missing, unexpected or of another "
                "shape."
            )
        for name, part in parts.items():
            assign(part, loaded[name])
