# SPDX-License-Identifier: Apache-2.0
"""The tiny models that other tests build on: size, template, a forward and backward pass, generation."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny_models
from vlmq_trl.chat import turn_processor


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_generates_and_trains(name):
    model, processor = tiny_models.build(name)
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2.5e6
    tokenizer = getattr(processor, "tokenizer", processor)
    rng = np.random.default_rng(0)
    batch, images = [], []
    for k in range(2):
        parts = [{"type": "text", "text": "what colour is the square?" * (k + 1)}]
        if name in tiny_models.VLM_NAMES:
            images.append([Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))])
            parts.insert(0, {"type": "image"})
        batch.append([{"role": "user", "content": parts}])
    prompts = [processor.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in batch]
    answered = processor.apply_chat_template(
        [*batch[0], {"role": "assistant", "content": "red"}], tokenize=False, add_generation_prompt=False
    )
    assert answered == prompts[0] + "red" + tiny_models.END
    kwargs = {"text": prompts, "return_tensors": "pt", "padding": True, "padding_side": "left"}
    if images:
        kwargs["images"] = images
    inputs = turn_processor(processor)(**kwargs, add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids(tiny_models.END) == tokenizer.eos_token_id == tiny_models.END_ID
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[0] == 2 and generated.shape[1] <= inputs["input_ids"].shape[1] + 3
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    missing = [n for n, p in model.named_parameters() if p.grad is None and "vision" not in n and "visual" not in n]
    assert not missing
