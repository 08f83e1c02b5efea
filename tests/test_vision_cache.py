# SPDX-License-Identifier: Apache-2.0
"""Remembered features of a frozen vision tower: every family scores as without them, and sees each picture once."""

import copy

import numpy as np
import peft
import pytest
import torch
from torch.testing import assert_close

from examples import train_agent
from tests import small_runs, tiny_models
from vlmq_trl import VLMQTrainer, vlmq_trainer
from vlmq_trl.collator import VLMQDataCollator
from vlmq_trl.modeling import AutoModelForImageTextToTextWithValueHead as ValueHeadModel

LORA_TARGETS = r".*(language_model|text_model).*(q|v)_proj"


def freeze(model):
    """All that comes before the language model."""
    language = {id(p) for p in model.get_decoder().parameters()}
    language |= {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for p in model.parameters():
        p.requires_grad_(id(p) in language)
    return model


def item(k, size=64, pictures=1):
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": "what?" + " up" * k}]
    rng = np.random.default_rng(k)
    return {
        "prompt": [{"role": "user", "content": content}],
        "images": [rng.integers(0, 255, (size, size, 3), dtype=np.uint8) for _ in range(pictures)],
        "completion": [{"role": "assistant", "content": "left"}],
        "row": k,
        "segment": k,
        "reward": 0.0,
        "terminated": True,
        "return_to_go": 0.0,
        "bootstrap": None,
    }


def inputs(processor, *pictures, size=64):
    return collate(processor, [{**item(k, size), "segment": i} for i, k in enumerate(pictures)])


def collate(processor, items):
    batch = VLMQDataCollator(processor)(items)
    return {name: value for name, value in batch.items() if not name.startswith(("turn_", "segment_"))}


def scores(model, batch):
    """Scores of a forward and the gradients that it leaves."""
    model.zero_grad()
    output = model(**batch)
    (output.log_probs.sum() + output.q_values.sum()).backward()
    return {
        "log_probs": output.log_probs.detach(),
        "q_values": output.q_values.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("family", tiny_models.VLM_NAMES)
def test_scores_and_gradients_are_those_without_it(family, lora):
    model, processor = tiny_models.build(family)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=LORA_TARGETS)) if lora else freeze(model)
    model = ValueHeadModel(model)
    batches = [inputs(processor, *pictures) for pictures in ((0, 1), (1, 2, 0), (2,))]
    plain = [scores(model, batch) for batch in batches]
    model.remember_pictures(10**9)
    for batch, expected in zip(batches, plain, strict=True):
        assert_close(scores(model, batch), expected, atol=1e-5, rtol=1e-4)
    assert (model.vision_cache.misses, model.vision_cache.hits) == (3, 3)


@pytest.mark.parametrize("family", [name for name in tiny_models.VLM_NAMES if name != "paligemma"])
def test_turns_of_a_batch_may_show_different_numbers_of_pictures(family):
    model, processor = tiny_models.build(family)
    model = ValueHeadModel(freeze(model))
    turns = [item(k, pictures=n) for k, n in enumerate((0, 1, 2, 0))]
    batches = [collate(processor, turns), collate(processor, turns[:2]), collate(processor, turns[1:3])]
    plain = [scores(model, batch) for batch in batches]
    model.remember_pictures(10**9)
    for batch, expected in zip(batches, plain, strict=True):
        assert_close(scores(model, batch), expected, atol=1e-5, rtol=1e-4)
    if family in ("idefics3", "smolvlm"):  # rows of pictures, known whatever they are filled up with
        assert (model.vision_cache.misses, model.vision_cache.hits) == (2, 3)


def test_another_size_or_a_single_pixel_is_another_picture():
    model, processor = tiny_models.build("qwen2_5_vl")
    model = ValueHeadModel(freeze(model))
    model.remember_pictures(10**9)
    one, large = inputs(processor, 0), inputs(processor, 0, size=112)
    changed = {**one, "pixel_values": one["pixel_values"].clone()}
    changed["pixel_values"][0, 0] += 1e-3
    for batch in (one, large, changed):
        model(**batch)
    assert (model.vision_cache.misses, model.vision_cache.hits) == (3, 0)
    for batch in (large, one):  # known by the same numbers after a larger one has come
        model(**batch)
    assert (model.vision_cache.misses, model.vision_cache.hits) == (3, 2)


def test_what_is_longest_out_of_use_goes_first():
    model, processor = tiny_models.build("llava")
    model = ValueHeadModel(freeze(model))
    bytes_of_one = 16 * 160 * 4  # tokens, width, float32
    model.remember_pictures(2 * bytes_of_one)
    cache = model.vision_cache
    for picture in (0, 1, 0, 2, 0, 1):  # 2 drives out 1
        model(**inputs(processor, picture))
    assert (cache.hits, cache.misses) == (2, 4) and cache.hit_rate() == pytest.approx(1 / 3)
    model.remember_pictures(bytes_of_one - 1)  # not even one
    batch = inputs(processor, 0, 1)
    found = model(**batch).log_probs
    model.vision_cache = None
    assert_close(found, model(**batch).log_probs, atol=1e-5, rtol=1e-4)


def test_no_dropout_is_remembered():
    """What is remembered is what the tower says in evaluation; what is trained keeps its dropout."""
    model, processor = tiny_models.build("llava")
    for layer in model.model.vision_tower.modules():
        if hasattr(layer, "dropout"):
            layer.dropout = 0.5
    model = ValueHeadModel(freeze(model)).train()
    model.model.multi_modal_projector.eval()
    batch, modes = inputs(processor, 0), [module.training for module in model.modules()]
    assert not torch.equal(model(**batch).log_probs, model(**batch).log_probs)
    model.remember_pictures(10**9)
    found = model(**batch).log_probs
    assert modes == [module.training for module in model.modules()]
    model.vision_cache = None
    assert_close(found, model.eval()(**batch).log_probs, atol=1e-5, rtol=1e-4)


def test_what_is_trained_or_has_no_pictures_is_refused():
    model, _ = tiny_models.build("idefics3")
    freeze(model).model.connector.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 weights there are trained, `model.connector.modality_projection"):
        ValueHeadModel(model).remember_pictures(1)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be given the features"):
        ValueHeadModel(tiny_models.build("llama")[0]).remember_pictures(1)


def test_a_batch_without_pictures_passes():
    model, processor = tiny_models.build("idefics3")
    model = ValueHeadModel(freeze(model))
    model.remember_pictures(10**9)
    batch = {name: value for name, value in inputs(processor, 0).items() if not name.startswith("pixel_")}
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, 5)
    assert model(**batch).log_probs.isfinite().all() and model.vision_cache.misses == 0


def train(folder, lora=False, **kwargs):
    model, processor = tiny_models.build("idefics3")
    trainer = VLMQTrainer(
        model if lora else freeze(model),
        small_runs.config(folder, max_steps=4, filter="exp", **kwargs),
        train_dataset=small_runs.number_line(),
        processing_class=processor,
        peft_config=peft.LoraConfig(target_modules=LORA_TARGETS) if lora else None,
    )
    trainer.train()
    return trainer


def test_a_trainer_learns_the_same_with_it(tmp_path):
    plain, cached = train(tmp_path / "plain"), train(tmp_path / "cached", vision_cache_gb=0.1)
    for (name, one), other in zip(plain.model.state_dict().items(), cached.model.state_dict().values(), strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-3, msg=name)
    rates = [record["vision_cache_hit_rate"] for record in cached.state.log_history if "loss" in record]
    assert rates == sorted(rates) and 0 < rates[-1] < 1
    assert not any("vision_cache_hit_rate" in record for record in plain.state.log_history)
    assert copy.deepcopy(cached.model).vision_cache is cached.model.vision_cache


def test_it_goes_with_checkpointed_activations_half_precision_and_lora(tmp_path):
    """And with the head in chunks, which is always so."""
    kwargs = {"lora": True, "activation_checkpointing": True, "bf16": True, "critic_type": "vocab"}
    plain, cached = (train(tmp_path / str(gb), vision_cache_gb=gb, **kwargs) for gb in (0.0, 0.1))
    assert cached.model.vision_cache.hits > 0
    one, other = ([r["loss"] for r in t.state.log_history if "loss" in r] for t in (plain, cached))
    assert len(one) == 4 and one == pytest.approx(other, rel=2e-2)


def test_split_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vlmq_trainer, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="all of them must enter the vision tower together"):
        train(tmp_path, vision_cache_gb=0.1)


@pytest.mark.parametrize("flags", ["", " --use_peft"], ids=["full", "LoRA"])
def test_the_script_freezes_what_comes_before_the_language_model(flags, tmp_path):
    for part in tiny_models.build("idefics3"):
        part.save_pretrained(tmp_path / "base")
    argv = f"--model_name_or_path {tmp_path / 'base'} --game NumberLine --method vlmq --episodes 8 --max_steps 2"
    argv += " --eval_steps 2 --eval_episodes 2 --test_episodes 2 --before_episodes 0 --max_completion_length 4"
    argv += f" --disable_tqdm true --logging_steps 1 --vision_cache_gb 0.1 --output_dir {tmp_path / 'run'}" + flags
    found = train_agent.main(argv.split())
    assert len(found["methods"]["vlmq"]["history"]) == 2


def test_half_precision_features():
    model, processor = tiny_models.build("idefics3")
    model = ValueHeadModel(freeze(model))
    batch = inputs(processor, 0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).log_probs
        model.remember_pictures(10**9)
        for _ in range(2):
            assert_close(model(**batch).log_probs, expected, atol=2e-2, rtol=2e-2)
