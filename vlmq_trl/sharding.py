# SPDX-License-Identifier: Apache-2.0
"""Weights that DeepSpeed ZeRO or FSDP2 split over processes: reading them whole, changing them in place, generating.

Without either everything here does nothing. These facts make it necessary:

- under ZeRO-3 a parameter is empty but while its module's forward runs; under FSDP2 it is a `DTensor`, of which each
  process holds a slice, and which does not mix with ordinary tensors;
- under any stage of ZeRO the optimiser steps on float32 copies of its own, and writes them over the parameters: what
  else changes a trained parameter has to change its copy too;
- generating token by token would gather every weight once a token.

All of these are collective: every process must enter.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models.utils import add_hooks, remove_hooks


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO-3 or FSDP2 has split any of them."""
    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in parameters)


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


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor, or all of one that FSDP2 has split."""
    if isinstance(x, DTensor):
        return x.full_tensor().detach().clone()  # the copy waits for what comes asynchronously
    return x.detach()


@torch.no_grad()
def assign(x: torch.Tensor, value: torch.Tensor | None, source: int | None = None) -> None:
    """Copies a whole value into a tensor, split by FSDP2 or not; None, where this rank does not know it.

    Args:
        source: the rank that knows it; None where all have the same.
    """
    if isinstance(x, DTensor):
        value = torch.empty(x.shape) if value is None else value.detach()
        value = value.to(x.device, x.dtype)
        value = distribute_tensor(value, x.device_mesh, x.placements, src_data_rank=source)
    if value is not None:
        x.copy_(value)


def split_like(state: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """A whole state dict, as `module.load_state_dict` wants it: what FSDP2 has split there is split here too."""
    own = module.state_dict()
    return {
        name: distribute_tensor(x.to(to.device), to.device_mesh, to.placements, src_data_rank=None)
        if isinstance(to := own.get(name), DTensor)
        else x
        for name, x in state.items()
    }


def unshard(module: nn.Module) -> None:
    """FSDP2 gathers a module's weights before its forward. This one's are read without it: gathered here, until the
    end of the backward pass."""
    if isinstance(module, FSDPModule):
        module.unshard()


@torch.no_grad()
def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state dict on the CPU, one parameter gathered after the other; on rank 0, elsewhere it is empty."""
    named, state = dict(model.named_parameters(remove_duplicate=False)), {}
    for name, x in model.state_dict().items():  # which reshards what FSDP2 has left whole
        with gathered([named[name]] if name in named else []):
            x = whole(x if isinstance(x, DTensor) else named.get(name, x))
            if PartialState().is_main_process:
                state[name] = x.to("cpu", copy=True)
    return state


@contextmanager
def writable(module: nn.Module) -> Iterator[None]:
    """Trained parameters, whole and float32, that may be changed in place, on every process alike. The optimiser goes
    on from the change."""
    parameters = list(module.parameters())
    if not any(hasattr(p, "_hp_mapping") or hasattr(p, "_z3_optimizer") for p in parameters):
        with _ordinary(module):
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
def _ordinary(module: nn.Module) -> Iterator[None]:
    """Ordinary parameters stand in the place of FSDP2's, which take over what all ranks do to them alike."""
    places = [
        (part, name, p)
        for part in module.modules()
        for name, p in part.named_parameters(recurse=False)
        if isinstance(p, DTensor)
    ]
    for part, name, p in places:
        part._parameters[name] = nn.Parameter(whole(p))
    changed = [part._parameters[name] for part, name, _ in places]
    try:
        yield
    finally:
        for part, name, p in places:
            part._parameters[name] = p
    for (_, _, p), value in zip(places, changed, strict=True):
        assign(p, value)


@contextmanager
def ready_to_generate(model: nn.Module) -> Iterator[None]:
    """Gathers all of a model's weights once, and keeps ZeRO-3's or FSDP2's hooks from doing it again meanwhile."""
    parameters = list(model.parameters())
    if not is_sharded(parameters):
        yield
        return
    with ExitStack() as stack:
        if isinstance(model, FSDPModule):
            stack.enter_context(_unsharded(model))
        else:
            # The optimiser that ZeRO-3 has put into every trained parameter holds the hooks.
            optimizer: Any = next((p._z3_optimizer for p in parameters if hasattr(p, "_z3_optimizer")), None)
            stack.enter_context(gathered(parameters))
            if optimizer is not None:
                engine: Any = SimpleNamespace(optimizer=optimizer)
                remove_hooks(engine)
                stack.callback(add_hooks, engine)
        yield


@contextmanager
def _unsharded(model: Any) -> Iterator[None]:
    """All groups of FSDP2's root stay whole between forward passes."""
    model._get_fsdp_state()._lazy_init()  # else the first part that is called becomes the root
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    # accelerate leaves the root and the head's group whole after a forward in any case.
    head = model.get_output_embeddings()
    states = [part._get_fsdp_state() for part in (model, head) if isinstance(part, FSDPModule)]
    split = [part for part in parts if part._get_fsdp_state() not in states]
    reshard = bool(AcceleratorState().fsdp_plugin.reshard_after_forward)
    for part in split:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        for part in parts:
            part.unshard()
        yield
    finally:
        for part in split:
            part.set_reshard_after_forward(reshard, recurse=False)
        for part in parts:
            part.reshard()
