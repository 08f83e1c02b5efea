# SPDX-License-Identifier: Apache-2.0
"""Weights that DeepSpeed ZeRO splits over processes: reading them whole, changing them in place, generating with them.

Without DeepSpeed everything here does nothing. Three facts make it necessary:

- under ZeRO-3 a parameter is empty but while its module's forward runs;
- under any stage the optimiser steps on float32 copies of its own, and writes them over the parameters: what else
  changes a trained parameter has to change its copy too;
- generating token by token under ZeRO-3 would gather every weight once a token.

All of these are collective: every process must enter.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models.utils import add_hooks, remove_hooks


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO-3 has split any of them."""
    return any(hasattr(p, "ds_id") for p in parameters)


def reads(module: nn.Module, parameters: Iterable[nn.Parameter | None]) -> None:
    """Says to ZeRO-3 that a module's forward reads parameters of other modules, without calling those.

    DeepSpeed finds out by itself, but late: where the first step happens to find a parameter whole, the second fails.
    """
    if is_deepspeed_zero3_enabled():
        import deepspeed

        for parameter in {id(p): p for p in parameters if p is not None}.values():
            deepspeed.zero.register_external_parameter(module, parameter)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter | None], write: bool = False) -> Iterator[None]:
    """The parameters are whole inside. With `write` what rank 0 makes of them is kept, else they are only read."""
    # Twice in the list, as a tied weight would be, is an error to DeepSpeed.
    split: dict[int, Any] = {id(p): p for p in parameters if hasattr(p, "ds_id")}
    if not write:  # one that is whole already would be split at the end, perhaps in the middle of its module's forward
        split = {key: p for key, p in split.items() if p.ds_status.name != "AVAILABLE"}
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(split.values()), modifier_rank=0 if write else None):
        yield


@torch.no_grad()
def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state dict on the CPU, one parameter gathered after the other; on rank 0, elsewhere it is empty."""
    named, state = dict(model.named_parameters(remove_duplicate=False)), {}
    for name, x in model.state_dict().items():
        with gathered([named[name]] if name in named else []):
            if PartialState().is_main_process:
                state[name] = named.get(name, x).detach().to("cpu", copy=True)
    return state


@contextmanager
def writable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Trained parameters, whole and float32, that may be changed in place, on every process alike. The optimiser goes
    on from the change."""
    parameters = list(parameters)
    if not any(hasattr(p, "_hp_mapping") or hasattr(p, "_z3_optimizer") for p in parameters):
        yield
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    masters = [p if p.dtype == torch.float32 else safe_get_full_fp32_param(p) for p in parameters]
    with gathered(parameters, write=True):
        own = [p.data for p in parameters]
        for p, master in zip(parameters, masters, strict=True):
            p.data = master.data
        yield
        masters = [p.detach().clone() for p in parameters]
        for p, data in zip(parameters, own, strict=True):
            p.data = data.copy_(p.data)  # of which DeepSpeed holds views
    for p, master in zip(parameters, masters, strict=True):
        safe_set_full_fp32_param(p, master)


@contextmanager
def ready_to_generate(model: nn.Module) -> Iterator[None]:
    """Gathers all of a model's weights once, and keeps ZeRO-3's hooks away meanwhile."""
    parameters = list(model.parameters())
    if not is_sharded(parameters):
        yield
        return
    # The optimiser that ZeRO-3 has put into every trained parameter holds the hooks.
    optimizer: Any = next((p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer")), None)
    with ExitStack() as stack:
        stack.enter_context(gathered(parameters))
        if optimizer is not None:
            engine: Any = SimpleNamespace(optimizer=optimizer)
            remove_hooks(engine)
            stack.callback(add_hooks, engine)
        yield
