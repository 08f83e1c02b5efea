# SPDX-License-Identifier: Apache-2.0
"""Features of pictures that a frozen vision tower has seen: each picture goes through the tower once.

An agent's turns are learned from many times, and their pictures repeat; while nothing before the language model is
trained, the features stay the same. Transformers' forward takes them in place of the pixels (`mm_encoder_outputs`).
What was left out: sharing between processes, keeping them on the disk.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Features = dict[str, Any]  # the fields of an encoder's output that the language model reads


class VisionFeatureCache:
    """Replaces the pixels of a batch by their features, which it computes or remembers.

    A picture is known by the bytes of what the processor made of it. It goes through the tower by itself, so that its
    features do not depend on the batch in which it came first. Copies of the model share the cache.

    Args:
        model: the model without wrappers; adapters may be injected in it.
        max_bytes: of main memory; the features that were longest out of use go first.

    Attributes:
        hits, misses: pictures (of Idefics3: rows of pictures) that were known, and that were not.

    Raises:
        ValueError: the model has no pictures, its forward takes no features, or something before its language model
            is trained, whose features would not stay the same; names it.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int):
        backbone: Any = model.base_model
        self._encode: Any = getattr(backbone, "get_image_features", None)
        if self._encode is None or "mm_encoder_outputs" not in inspect.signature(backbone.forward).parameters:
            raise ValueError(
                f"{type(model).__name__} cannot be given the features of its pictures, so there is nothing to "
                "remember: set `vision_cache_gb=0`."
            )
        language = [*model.get_decoder().parameters()]
        language += [head.weight for head in (model.get_input_embeddings(), model.get_output_embeddings())]
        allowed = {id(p) for p in language}
        trained = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in allowed]
        if trained:
            raise ValueError(
                f"`vision_cache_gb` remembers what comes before the language model, and {len(trained)} weights there "
                f"are trained, `{trained[0]}` among them. Freeze them (`requires_grad_(False)`; with LoRA, let "
                "`target_modules` match the language model only), or set `vision_cache_gb=0`."
            )
        self._names = [name for name in inspect.signature(self._encode).parameters if name != "kwargs"]
        self.max_bytes, self._bytes = max_bytes, 0
        self._known: OrderedDict[tuple, Features] = OrderedDict()
        self._weights, self._generator = torch.zeros(2, 0, dtype=torch.int64), torch.Generator().manual_seed(0)
        self.hits = self.misses = 0

    def hit_rate(self) -> float:
        """Share of the pictures that were known."""
        return self.hits / max(1, self.hits + self.misses)

    def __deepcopy__(self, memo: dict[int, Any]) -> "VisionFeatureCache":
        return self

    def __call__(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a forward, with `mm_encoder_outputs` in place of `pixel_values`; unchanged without pictures,
        and where the parts of a row's pictures depend on how many they are (LLaVA-OneVision)."""
        inputs = {name: model_inputs[name] for name in self._names if isinstance(model_inputs.get(name), Tensor)}
        if "pixel_values" not in inputs:
            return model_inputs
        pictures = inputs.pop("batch_num_images", None)
        if pictures is not None and any(int(count) != 1 for count in pictures):
            return model_inputs
        device = inputs["pixel_values"].device
        found = [self._features(one) for one in _one_by_one(inputs)]
        rest = {
            name: value for name, value in model_inputs.items() if name not in ("pixel_values", "mm_encoder_outputs")
        }
        return {**rest, "mm_encoder_outputs": {"image": _together(found, device)}}

    def _features(self, inputs: dict[str, Any]) -> Features:
        """Of one picture."""
        key = tuple((name, tuple(value.shape), *self._digest(value)) for name, value in inputs.items())
        features = self._known.get(key)
        if features is not None:
            self.hits += 1
            self._known.move_to_end(key)
            return features
        self.misses += 1
        with torch.no_grad(), _evaluating(self._encode.__self__):
            output = self._encode(**inputs, return_dict=True)
        features = {"type": type(output), "pooler_output": _to(output.pooler_output, "cpu")}
        if getattr(output, "deepstack_features", None) is not None:
            features["deepstack_features"] = [_to(layer, "cpu") for layer in output.deepstack_features]
        self._known[key] = features
        self._bytes += _size(features)
        while self._bytes > self.max_bytes and self._known:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _size(oldest)
        return features

    def _digest(self, value: Tensor) -> tuple[int, int]:
        """128 bits of a tensor's bytes: two random linear forms modulo 2^64, computed where the tensor lies."""
        flat = value.detach().contiguous().flatten()
        if not flat.numel():
            return (0, 0)
        numbers = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        lacking = len(numbers) - self._weights.shape[1]
        if lacking > 0:  # as many as the largest picture needs; those that were drawn stay, so that keys do too
            drawn = torch.randint(-(2**63), 2**63 - 1, (2, lacking), generator=self._generator)
            self._weights = torch.cat([self._weights.to(numbers.device), drawn.to(numbers.device)], dim=1)
        first, second = (self._weights[:, : len(numbers)] * numbers).sum(-1).tolist()
        return first, second


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, one draw of which would be remembered; each part goes back to its own mode."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _one_by_one(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The encoder's inputs for each picture: packed patches by their grid, anything else along its first axis.

    Idefics has rows of pictures there, filled up with empty ones (all 0), which its encoder drops: they are left out
    here, so that the same row in another batch is known, and a row of nothing else, which the encoder cannot take.
    """
    grid = inputs.get("image_grid_thw")
    if grid is not None:
        patches = inputs["pixel_values"].split(grid.prod(-1).tolist())
        for one, size in zip(patches, grid, strict=True):
            yield {"pixel_values": one, "image_grid_thw": size[None]}
        return
    if inputs["pixel_values"].ndim == 5 and "pixel_attention_mask" in inputs:
        for number, real in enumerate(inputs["pixel_values"].flatten(2).any(-1)):
            if real.any():
                yield {name: value[number, real][None] for name, value in inputs.items()}
        return
    for number in range(len(inputs["pixel_values"])):
        yield {name: value[number : number + 1] for name, value in inputs.items()}


def _together(found: list[Features], device: torch.device) -> Any:
    """One output of an encoder for all pictures."""
    fields = {"pooler_output": _joined([features["pooler_output"] for features in found], device)}
    if "deepstack_features" in found[0]:
        layers = zip(*(features["deepstack_features"] for features in found), strict=True)
        fields["deepstack_features"] = [_joined(list(layer), device) for layer in layers]
    return found[0]["type"](**fields)


def _joined(parts: list[Any], device: torch.device) -> Any:
    """Tensors along their first axis; sequences of tensors behind one another."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts).to(device, non_blocking=True)
    return [tensor.to(device, non_blocking=True) for part in parts for tensor in part]


def _to(value: Any, device: str) -> Any:
    # A view would keep the memory of all that it is a view of.
    return value.to(device).clone() if isinstance(value, Tensor) else [one.to(device).clone() for one in value]


def _size(features: Features) -> int:
    tensors = [features["pooler_output"], *features.get("deepstack_features", ())]
    return sum(
        tensor.numel() * tensor.element_size()
        for part in tensors
        for tensor in ([part] if isinstance(part, Tensor) else part)
    )
