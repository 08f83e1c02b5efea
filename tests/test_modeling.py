# SPDX-License-Identifier: Apache-2.0
"""The value-head model on every family: scores against the model's own logits, gradients, saving and loading.

Everything that the wrapper computes in pieces is held against the dense computation: the model's own logits of all
positions, and sums over the whole vocabulary.
"""

import copy
import json
import re
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny_models
from vlmq_trl import modeling
from vlmq_trl.chat import pictures, turn_processor
from vlmq_trl.checkpoints import load_weights
from vlmq_trl.collator import VLMQDataCollator
from vlmq_trl.critic import CriticConfig
from vlmq_trl.losses import denormalize
from vlmq_trl.modeling import AutoModelForImageTextToTextWithValueHead as ValueHeadModel
from vlmq_trl.modeling import LogitTransform, has_critic, load_pretrained

FAMILIES = [*tiny_models.VLM_NAMES, *tiny_models.TEXT_NAMES]
SCALAR = CriticConfig("scalar", num_critics=2, critic_hidden_size=8)
VOCAB = CriticConfig("vocab", num_critics=3, critic_rank=4)
CRITICS = pytest.mark.parametrize("config", [SCALAR, VOCAB], ids=["scalar", "vocab"])
VLM_LORA_TARGETS = r".*(language_model|text_model).*(q|v)_proj"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".npy", ".npz")


def item(name, k, completion, *, segment=0, bootstrap=None):
    """A turn as `SegmentDataset` gives it; prompts and pictures depend on `k`, prompts differ in length."""
    observation = observe(name, k)
    return {
        **observation,
        "completion": [{"role": "assistant", "content": completion}],
        "row": k,
        "segment": segment,
        "reward": 0.0,
        "terminated": bootstrap is None,
        "return_to_go": 0.0,
        "bootstrap": bootstrap,
    }


def observe(name, k):
    parts = [{"type": "text", "text": "what colour is the square?" + " up down" * k}]
    images = []
    if name in tiny_models.VLM_NAMES:
        images = [np.random.default_rng(k).integers(0, 255, (64, 64, 3), dtype=np.uint8)]
        parts.insert(0, {"type": "image"})
    return {"prompt": [{"role": "user", "content": parts}], "images": images}


def batch_of(name, processor):
    """Two turns of unequal length, each with its bootstrap state: 4 rows, the model's own inputs only."""
    items = [
        item(name, 2, "red", segment=0, bootstrap=observe(name, 0)),
        item(name, 0, '{"thoughts": "up", "action": "+"}', segment=1, bootstrap=observe(name, 3)),
    ]
    return collate(processor, items)


def collate(processor, items):
    batch = VLMQDataCollator(processor)(items)
    return {k: v for k, v in batch.items() if not k.startswith(("turn_", "segment_"))}


def wrap(model, config):
    """Critic heads of visible size, target heads unlike the online ones, moments unlike a fresh critic's."""
    wrapped = ValueHeadModel(model, config).eval()
    with torch.no_grad():
        for p in wrapped.critic.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    wrapped.critic.initialize_moments(0.5, 2.0)
    return wrapped


def build(name, config):
    model, processor = tiny_models.build(name)
    return wrap(model, config), batch_of(name, processor), processor


def stock_inputs(batch):
    return {k: v for k, v in batch.items() if k not in ("labels", "bootstrap_mask")}


def dense(model, batch):
    """What the stock model says: at each action token its log-probabilities [A, V] and the states before and after it
    [A, D], the bootstrap states' log-probabilities [B', V] and states [B', D], and the tokens [A]."""
    out = model(**stock_inputs(batch), output_hidden_states=True)
    log_probs, hidden = out.logits.float().log_softmax(-1), out.hidden_states[-1].float()
    where = [(b, t) for b, row in enumerate(batch["labels"].tolist()) for t, label in enumerate(row) if label != -100]
    bootstrap = [
        (b, t) for b, row in enumerate(batch["bootstrap_mask"].tolist()) for t, flag in enumerate(row) if flag
    ]
    return {
        "tokens": torch.tensor([batch["labels"][b, t] for b, t in where]),
        "log_probs": torch.stack([log_probs[b, t - 1] for b, t in where]),
        "before": torch.stack([hidden[b, t - 1] for b, t in where]),
        "after": torch.stack([hidden[b, t] for b, t in where]),
        "bootstrap_log_probs": torch.stack([log_probs[b, t] for b, t in bootstrap]),
        "bootstrap": torch.stack([hidden[b, t] for b, t in bootstrap]),
    }


def q_rows(heads, states):
    """[A, D] -> [A, N, V], the whole of it."""
    return torch.einsum("anr,nvr->anv", heads.features(states), torch.stack(list(heads.up))) + heads.bias[:, None]


def assert_near(actual, expected):
    assert_close(actual, expected, atol=2e-5, rtol=1e-4)


# ---- scores ----


@pytest.mark.parametrize("name", FAMILIES)
@CRITICS
@torch.no_grad()
def test_scores_equal_the_dense_computation(name, config):
    wrapped, batch, _ = build(name, config)
    out, ref = wrapped(**batch), dense(wrapped.pretrained_model, batch)
    action_tokens, n = len(ref["tokens"]), config.num_critics
    assert action_tokens > 8

    rows = torch.arange(action_tokens)
    assert_near(out.log_probs, ref["log_probs"][rows, ref["tokens"]])
    assert_near(out.entropy, -(ref["log_probs"].exp() * ref["log_probs"]).sum(-1))
    assert torch.equal(out.is_top1, ref["log_probs"].argmax(-1) == ref["tokens"])

    online, target = wrapped.critic.online, wrapped.critic.target
    if config.critic_type == "scalar":
        assert_near(out.q_values, online.q(ref["after"]))
        assert_near(out.state_values, online.v(ref["before"]))
        assert_near(out.target_q_values, target.q(ref["after"]))
        assert_near(out.target_state_values, target.v(ref["before"]))
        assert_near(out.bootstrap_values, target.v(ref["bootstrap"]))
        assert out.q_log_probs is None
    else:
        q, target_q = q_rows(online, ref["before"]), q_rows(target, ref["before"])
        assert_near(out.q_values, q[rows, :, ref["tokens"]])
        assert_near(out.q_log_probs, q.log_softmax(-1)[rows, :, ref["tokens"]])
        assert_near(out.target_q_values, target_q[rows, :, ref["tokens"]])
        # V is the sum over the vocabulary, under the policy.
        assert_near(out.target_state_values, (ref["log_probs"].exp()[:, None] * target_q).sum(-1))
        bootstrap = ref["bootstrap_log_probs"].exp()[:, None] * q_rows(target, ref["bootstrap"])
        assert_near(out.bootstrap_values, bootstrap.sum(-1))
        assert out.state_values is None
    assert out.target_q_values.shape == out.target_state_values.shape == (action_tokens, n)
    assert out.bootstrap_values.shape == (2, n)
    # Online and target heads, and their states, are told apart by every assertion above.
    assert (out.q_values - out.target_q_values).abs().max() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
@CRITICS
@torch.no_grad()
def test_bootstrap_value_is_the_next_turns_first_value(name, config):
    # Cut after a turn, the bootstrap row is the state in which the next turn, elsewhere, chooses its first token.
    model, processor = tiny_models.build(name)
    wrapped = wrap(model, config)
    cut = wrapped(**collate(processor, [item(name, 1, "left", bootstrap=observe(name, 2))]))
    following = wrapped(**collate(processor, [item(name, 2, "red"), item(name, 4, "hit", segment=1)]))
    assert_near(cut.bootstrap_values[0], following.target_state_values[0])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_neighbours_in_the_batch_do_not_matter(name):
    model, processor = tiny_models.build(name)
    wrapped = wrap(model, SCALAR)
    alone = wrapped(**collate(processor, [item(name, 0, "red")]))
    padded = wrapped(**collate(processor, [item(name, 0, "red"), item(name, 3, "stand or hit", segment=1)]))
    for field in ("log_probs", "entropy", "q_values", "state_values", "target_q_values", "target_state_values"):
        assert_near(padded[field][: len(alone[field])], alone[field])


@pytest.mark.parametrize("name", tiny_models.VLM_NAMES)
@CRITICS
@torch.no_grad()
def test_pictures_matter(name, config):
    model, processor = tiny_models.build(name)
    wrapped = wrap(model, config)
    turns = [item(name, 0, "red", bootstrap=observe(name, 0)) for _ in range(2)]
    turns[1] |= {"segment": 1, "images": observe(name, 1)["images"]}
    turns[1]["bootstrap"] = {**turns[1]["bootstrap"], "images": turns[1]["images"]}
    out = wrapped(**collate(processor, turns))
    for field in ("log_probs", "q_values", "target_state_values", "bootstrap_values"):
        first, second = out[field].chunk(2)
        assert (first - second).abs().max() > 1e-5


@torch.no_grad()
def test_without_the_critic_only_the_policy_is_scored():
    wrapped, batch, _ = build("llama", SCALAR)
    out, full = wrapped(**batch, with_critic=False), wrapped(**batch)
    assert set(out.keys()) == {"log_probs", "entropy", "is_top1"}
    assert torch.equal(out.log_probs, full.log_probs)


@torch.no_grad()
def test_without_labels_it_is_the_model_itself():
    wrapped, batch, _ = build("idefics3", SCALAR)
    inputs = stock_inputs(batch)
    assert torch.equal(wrapped(**inputs).logits, wrapped.pretrained_model(**inputs).logits)
    assert wrapped.config is wrapped.pretrained_model.config
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapped.no_such_thing


@CRITICS
def test_a_batch_without_action_tokens(config):
    # A shard of a batch may hold none: its loss is a zero that gradients can still flow from.
    wrapped, batch, _ = build("llama", config)
    batch["labels"].fill_(-100)
    batch["bootstrap_mask"].zero_()
    out = wrapped(**batch)
    n = config.num_critics
    assert out.log_probs.shape == (0,) and out.q_values.shape == (0, n) == out.bootstrap_values.shape
    (out.log_probs.sum() + out.q_values.sum()).backward()
    assert not any(p.grad.any() for p in wrapped.parameters() if p.grad is not None)


@CRITICS
@torch.no_grad()
def test_a_half_precision_backbone_has_a_float32_critic(config):
    wrapped, batch, _ = build("llama", config)
    full = wrapped(**batch)
    wrapped.pretrained_model.bfloat16()
    half = wrapped(**batch)
    assert all(p.dtype == torch.float32 for p in wrapped.critic.parameters())
    for field in ("log_probs", "q_values", "target_q_values", "target_state_values", "bootstrap_values"):
        assert half[field].dtype == torch.float32
        assert_close(half[field], full[field], atol=0.1, rtol=0.1)


@CRITICS
@torch.no_grad()
def test_autocast_stops_at_the_critic(config):
    wrapped, batch, _ = build("llama", config)
    full = wrapped(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        out, ref = wrapped(**batch), dense(wrapped.pretrained_model, batch)
    assert (out.q_values - full.q_values).abs().max() > 1e-3  # The backbone did run in half precision.
    online = wrapped.critic.online
    if config is SCALAR:
        expected = online.q(ref["after"])
    else:
        expected = q_rows(online, ref["before"])[torch.arange(len(ref["tokens"])), :, ref["tokens"]]
    assert_close(out.q_values, expected, atol=1e-6, rtol=1e-5)


# ---- chunks ----


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@CRITICS
def test_chunk_sizes_do_not_matter(name, config, monkeypatch):
    wrapped, batch, _ = build(name, config)

    def run():
        wrapped.zero_grad()
        out = wrapped(**batch)
        loss = out.log_probs.sum() + out.q_values.square().sum()
        loss = loss + (out.state_values.square().sum() if config is SCALAR else out.q_log_probs.sum())
        loss.backward()
        grads = {k: p.grad for k, p in wrapped.named_parameters() if p.grad is not None}
        return {k: v.detach() for k, v in out.items()}, grads

    whole, whole_grads = run()
    tiles = []
    expected = type(wrapped.critic.target).expected if config is VOCAB else None
    if expected:
        monkeypatch.setattr(
            type(wrapped.critic.target),
            "expected",
            lambda self, f, probabilities: (tiles.append(probabilities.shape[0]), expected(self, f, probabilities))[1],
        )
    vocab = wrapped.get_output_embeddings().weight.shape[0]
    for chunk, elements in ((7, 3 * vocab), (vocab - 1, 1), (vocab + 1, 5 * vocab + 1)):
        wrapped.vocab_chunk_size = chunk
        monkeypatch.setattr(modeling, "MAX_TILE_ELEMENTS", elements)
        tiles.clear()
        pieces, grads = run()
        if expected:
            assert max(tiles) == max(1, elements // vocab) and sum(tiles) == len(whole["log_probs"]) + 2
        for field, value in whole.items():
            if value.dtype == torch.bool:
                assert torch.equal(pieces[field], value)
            else:
                assert_near(pieces[field], value)
        assert grads.keys() == whole_grads.keys()
        for k, grad in whole_grads.items():
            assert_close(grads[k], grad, atol=1e-4 * max(1.0, float(grad.abs().max())), rtol=1e-3)


class LargestRows(TorchDispatchMode):
    """The most rows of any new tensor whose last axis is the vocabulary; views of parameters do not count."""

    def __init__(self, module, vocab):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == self.vocab:
                if x.untyped_storage().data_ptr() not in self.known:
                    self.rows = max(self.rows, x.numel() // self.vocab)
        return out


@CRITICS
def test_no_tensor_of_all_tokens_and_the_vocabulary(config, monkeypatch):
    wrapped, batch, _ = build("llama", config)
    vocab = wrapped.get_output_embeddings().weight.shape[0]
    wrapped.vocab_chunk_size = 64
    monkeypatch.setattr(modeling, "MAX_TILE_ELEMENTS", 2 * vocab)
    with LargestRows(wrapped, vocab) as seen:
        out = wrapped(**batch)
        (out.log_probs.sum() + out.q_values.sum()).backward()
    assert seen.rows == (2 if config is VOCAB else 0)
    with LargestRows(wrapped, vocab) as seen:  # The measure itself: the stock forward makes B x T rows.
        wrapped(**stock_inputs(batch))
    assert seen.rows == batch["input_ids"].numel()


# ---- what families do to their logits ----


def tiny_text_model(name, **kwargs):
    sizes = {k: v for k, v in tiny_models.TEXT.items() if not k.endswith("_token_id")}
    config_class = tf.Gemma3TextConfig if name == "Gemma3" else getattr(tf, f"{name}Config")
    config = config_class(vocab_size=300, pad_token_id=0, **{**sizes, **kwargs})
    torch.manual_seed(0)
    return getattr(tf, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "kwargs", "transform"),
    [
        ("Gemma2", {"head_dim": 40, "final_logit_softcapping": 2.0}, LogitTransform(1.0, 2.0)),
        ("Gemma3", {"head_dim": 40, "final_logit_softcapping": 0.5}, LogitTransform(1.0, 0.5)),
        ("Cohere", {"logit_scale": 0.25}, LogitTransform(0.25)),
        ("Granite", {"logits_scaling": 4.0}, LogitTransform(0.25)),
        ("Phi", {}, LogitTransform()),  # Its head has a bias.
        ("Llama", {"tie_word_embeddings": True}, LogitTransform()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_softcaps_scales_and_biases_of_the_head(name, kwargs, transform):
    model = tiny_text_model(name, **kwargs)
    head = model.get_output_embeddings()
    head.weight.mul_(20)  # So that a cap bites.
    if getattr(head, "bias", None) is not None:
        head.bias.normal_()
    assert (name == "Phi") == (getattr(head, "bias", None) is not None)
    wrapped = wrap(model, VOCAB)
    assert wrapped.logit_transform == transform
    input_ids = torch.randint(3, 300, (2, 12))
    labels = input_ids.clone()
    labels[:, :7] = -100
    bootstrap_mask = torch.zeros_like(labels, dtype=torch.bool)
    bootstrap_mask[1, -1] = True
    batch = {"input_ids": input_ids, "labels": labels, "bootstrap_mask": bootstrap_mask}
    out, ref = wrapped(**batch), dense(model, batch)
    rows = torch.arange(10)
    assert_near(out.log_probs, ref["log_probs"][rows, ref["tokens"]])
    q = q_rows(wrapped.critic.target, ref["before"])
    assert_near(out.target_state_values, (ref["log_probs"].exp()[:, None] * q).sum(-1))
    if transform != LogitTransform():
        wrapped.logit_transform = LogitTransform()
        assert (wrapped(**batch).log_probs - out.log_probs).abs().max() > 0.01


def tiny_vlm(text=None, **kwargs):
    """A tiny Gemma3, or LLaVA around another family's text model."""
    if text is None:
        config = tiny_models.build("gemma3")[0].config
        config.text_config.update(kwargs)
        return tf.Gemma3ForConditionalGeneration(config).eval()
    model_class, config_class = tf.LlavaForConditionalGeneration, tf.LlavaConfig
    if text == "cohere2":
        model_class, config_class = tf.AyaVisionForConditionalGeneration, tf.AyaVisionConfig
    text_config = {"model_type": text, "vocab_size": 300, **tiny_models.TEXT, **kwargs}
    vision_config = {"model_type": "siglip_vision_model", "vision_use_head": False, **tiny_models.VISION}
    torch.manual_seed(0)
    return model_class(config_class(text_config=text_config, vision_config=vision_config)).eval()


@pytest.mark.parametrize(
    ("text", "kwargs"),
    [
        ("cohere2", {"logit_scale": 0.25}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"head_dim": 40, "final_logit_softcapping": 0.5}),
        (None, {"final_logit_softcapping": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_what_the_model_around_a_text_model_leaves_out(text, kwargs):
    """Its own forward counts, not what the text model's configuration says."""
    model = tiny_vlm(text, **kwargs)
    model.get_output_embeddings().weight.mul_(20)
    wrapped = wrap(model, VOCAB)
    assert LogitTransform.from_config(model.config.get_text_config()) != LogitTransform() == wrapped.logit_transform
    input_ids = torch.randint(3, 200, (2, 12))
    batch = {"input_ids": input_ids, "labels": input_ids.clone(), "bootstrap_mask": torch.zeros(2, 12, dtype=bool)}
    batch["labels"][:, :7] = -100
    batch["bootstrap_mask"][1, -1] = True
    out, ref = wrapped(**batch), dense(model, batch)
    assert_near(out.log_probs, ref["log_probs"][torch.arange(10), ref["tokens"]])
    q = q_rows(wrapped.critic.target, ref["before"])
    assert_near(out.target_state_values, (ref["log_probs"].exp()[:, None] * q).sum(-1))


@pytest.mark.parametrize(
    "config",
    [
        tf.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, is_decoder=True
        ),
        tf.ElectraConfig(
            hidden_size=32, embedding_size=16, num_hidden_layers=1, num_attention_heads=4, is_decoder=True
        ),
        tf.ModernBertDecoderConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_layers_between_the_backbone_and_the_head_are_refused(config):
    model = tf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"{type(model).__name__} has more than a head, a factor and a softcap"):
        ValueHeadModel(model)


def test_a_factor_of_another_name_is_refused():
    model, _ = tiny_models.build("llama")

    class Llama(type(model)):
        def forward(self, **kwargs):
            output = super().forward(**kwargs)
            output.logits = output.logits / 3
            return output

    model.__class__ = Llama
    with pytest.raises(ValueError, match="Llama has more than a head, a factor and a softcap"):
        ValueHeadModel(model)


def test_a_forward_that_wants_pictures_is_believed_to_be_as_configured():
    model = tiny_text_model("Cohere", logit_scale=0.25)

    class Cohere(type(model)):
        def forward(self, pixel_values, **kwargs):
            return super().forward(**kwargs)

    model.__class__ = Cohere
    with pytest.warns(UserWarning, match="Could not find out what Cohere does to its logits.*scale=0.25"):
        assert ValueHeadModel(model).logit_transform == LogitTransform(0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_of_the_logits_reads_and_changes_nothing(dtype):
    """Weights may be broken, or not there."""
    with torch.device("meta"):
        assert LogitTransform.of(tiny_vlm("granite", logits_scaling=4.0)) == LogitTransform()
    model = tiny_text_model("Granite", logits_scaling=4.0).train().to(dtype)
    for p in model.parameters():
        p.data.fill_(float("nan"))
    own, random = {name: dict(vars(module)) for name, module in model.named_modules()}, torch.get_rng_state()
    assert LogitTransform.of(model) == LogitTransform(0.25)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == own


@torch.no_grad()
def test_hidden_states_of_another_size_than_the_configurations():
    config = tf.OPTConfig(
        vocab_size=99, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = tf.OPTForCausalLM(config).eval()
    wrapped = wrap(model, SCALAR)
    assert wrapped.critic.config.hidden_size == 16
    input_ids = torch.randint(3, 99, (1, 6))
    labels = torch.cat([torch.full((1, 3), -100), input_ids[:, 3:]], dim=1)
    expected = model(input_ids=input_ids).logits[0, 2:-1].log_softmax(-1)[torch.arange(3), input_ids[0, 3:]]
    assert_near(wrapped(input_ids, labels=labels).log_probs, expected)


# ---- gradients ----


@pytest.mark.parametrize("name", FAMILIES)
@CRITICS
def test_gradients_reach_backbone_and_online_heads_only(name, config):
    wrapped, batch, _ = build(name, config)
    wrapped.train()
    out = wrapped(**batch)
    loss = -out.log_probs.sum() + out.q_values.square().sum()
    loss = loss + (out.state_values.square().sum() if config is SCALAR else -out.q_log_probs.sum())
    loss.backward()
    critic = wrapped.critic
    assert all(p.grad is not None and p.grad.any() for p in critic.online.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in critic.target.buffers())
    for field in ("entropy", "target_q_values", "target_state_values", "bootstrap_values"):
        assert not out[field].requires_grad
    base = wrapped.pretrained_model
    silent = [k for k, p in base.named_parameters() if (p.grad is None or not p.grad.any()) and "vis" not in k]
    assert not silent
    if name in tiny_models.VLM_NAMES:
        assert any(p.grad is not None and p.grad.any() for k, p in base.named_parameters() if "vis" in k)


@pytest.mark.parametrize("name", ["idefics3", "qwen3"])
@CRITICS
def test_each_part_has_its_own_gradients(name, config):
    wrapped, batch, _ = build(name, config)
    base, online = wrapped.pretrained_model, wrapped.critic.online

    def reached(field, module):
        wrapped.zero_grad()
        wrapped(**batch)[field].sum().backward()
        return any(p.grad is not None and p.grad.any() for p in module.parameters())

    # The policy's loss leaves the critic alone; the critic's reaches the backbone, but not the language-model head.
    assert reached("log_probs", base) and not reached("log_probs", wrapped.critic)
    assert reached("q_values", online) and reached("q_values", base.base_model)
    if config is SCALAR:
        assert not reached("q_values", online.v)
        assert reached("state_values", online.v) and not reached("state_values", online.q)
        assert reached("state_values", base.base_model)
    else:
        assert reached("q_log_probs", online) and reached("q_log_probs", base.base_model)
    if name == "idefics3":
        assert not reached("q_values", base.get_output_embeddings())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@CRITICS
def test_gradients_equal_the_dense_computation(name, config):
    wrapped, batch, _ = build(name, config)
    online = wrapped.critic.online

    def gradients(log_probs, q_values, other):
        wrapped.zero_grad()
        (log_probs.sum() + q_values.square().sum() + 2 * other.sum()).backward()
        return {k: p.grad.clone() for k, p in wrapped.named_parameters() if p.grad is not None}

    out = wrapped(**batch)
    own = gradients(out.log_probs, out.q_values, out.state_values if config is SCALAR else out.q_log_probs)
    ref = dense(wrapped.pretrained_model, batch)
    rows, tokens = torch.arange(len(ref["tokens"])), ref["tokens"]
    if config is SCALAR:
        q_values, other = online.q(ref["after"]), online.v(ref["before"])
    else:
        q = q_rows(online, ref["before"])
        q_values, other = q[rows, :, tokens], q.log_softmax(-1)[rows, :, tokens]
    expected = gradients(ref["log_probs"][rows, tokens], q_values, other)
    assert own.keys() == expected.keys()
    for k, grad in expected.items():
        assert_close(own[k], grad, atol=1e-4 * max(1.0, float(grad.abs().max())), rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_policy_gradient_equals_the_stock_loss(name):
    wrapped, batch, _ = build(name, SCALAR)
    base = wrapped.pretrained_model
    tokens = int((batch["labels"] != -100).sum())
    (-wrapped(**batch).log_probs.sum() / tokens).backward()
    own = {k: p.grad.clone() for k, p in base.named_parameters()}
    wrapped.zero_grad()
    base(**stock_inputs(batch), labels=batch["labels"]).loss.backward()
    for k, p in base.named_parameters():
        assert_close(own[k], p.grad, atol=1e-6, rtol=1e-3)


# ---- saving and loading ----


def files_of(directory):
    return {str(p.relative_to(directory)) for p in Path(directory).rglob("*") if p.is_file()}


def assert_same_state(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    different = [k for k, v in expected.items() if not torch.equal(actual[k], v) or actual[k].dtype != v.dtype]
    assert not different


def lora(model, **changes):
    targets = VLM_LORA_TARGETS if hasattr(model.config, "vision_config") else r".*self_attn\.(q|v)_proj"
    config = peft.LoraConfig(**{"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **changes})
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for k, p in adapted.named_parameters():
            if "lora_B" in k:
                p.normal_(std=0.3)
    return adapted


def auto_class(name):
    return tf.AutoModelForImageTextToText if name in tiny_models.VLM_NAMES else tf.AutoModelForCausalLM


@pytest.mark.parametrize("name", FAMILIES)
@CRITICS
@torch.no_grad()
def test_full_round_trip(name, config, tmp_path):
    wrapped, batch, _ = build(name, config)
    wrapped.save_pretrained(tmp_path)
    files = files_of(tmp_path)
    assert {"config.json", "model.safetensors", "critic.safetensors", "critic_config.json"} <= files
    assert not [f for f in files if f.endswith(PICKLES)]
    assert not [k for k in load_file(tmp_path / "model.safetensors") if "critic" in k or "pretrained_model" in k]

    loaded = ValueHeadModel.from_pretrained(tmp_path).eval()
    assert type(loaded.pretrained_model) is type(wrapped.pretrained_model)
    assert loaded.critic.config == wrapped.critic.config
    assert_same_state(loaded, wrapped)
    before, after = wrapped(**batch), loaded(**batch)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)

    stock = auto_class(name).from_pretrained(tmp_path).eval()
    inputs = stock_inputs(batch)
    assert torch.equal(stock(**inputs).logits, wrapped.pretrained_model(**inputs).logits)


@pytest.mark.parametrize("name", FAMILIES)
@CRITICS
@torch.no_grad()
def test_lora_round_trip(name, config, tmp_path):
    model, processor = tiny_models.build(name)
    model.save_pretrained(tmp_path / "base")
    base = auto_class(name).from_pretrained(tmp_path / "base").eval()
    batch = batch_of(name, processor)
    plain = base(**stock_inputs(batch)).logits
    wrapped = wrap(lora(base), config)
    adapted = wrapped.pretrained_model(**stock_inputs(batch)).logits
    assert (adapted - plain).abs().max() > 1e-3
    ref = dense(wrapped.pretrained_model, batch)
    assert_near(wrapped(**batch).log_probs, ref["log_probs"][torch.arange(len(ref["tokens"])), ref["tokens"]])

    wrapped.save_pretrained(tmp_path / "adapter")
    files = files_of(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "critic.safetensors", "critic_config.json"} <= files
    assert "model.safetensors" not in files and not [f for f in files if f.endswith(PICKLES)]
    keys = list(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert keys and all(re.search(r"(q|v)_proj\.lora_[AB]\.weight$", k) for k in keys)
    if name in tiny_models.VLM_NAMES:
        assert not [k for k in keys if "vision" in k or "visual" in k]

    loaded = ValueHeadModel.from_pretrained(tmp_path / "adapter").eval()
    assert isinstance(loaded.pretrained_model, peft.PeftModel)
    assert_same_state(loaded, wrapped)
    before, after = wrapped(**batch), loaded(**batch)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in loaded.pretrained_model.parameters())

    stock = auto_class(name).from_pretrained(tmp_path / "base")
    stock = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    assert torch.equal(stock(**stock_inputs(batch)).logits, adapted)


@torch.no_grad()
def test_an_adapter_of_any_name_is_saved_where_it_is_looked_for(tmp_path):
    model, processor = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "base")
    adapted = lora(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    adapted.add_adapter("agent", copy.deepcopy(adapted.peft_config["default"]))
    adapted.set_adapter("agent")
    for k, p in adapted.named_parameters():
        if "lora_B.agent" in k:
            p.normal_(std=0.3)
    wrapped, batch = wrap(adapted, SCALAR), batch_of("llama", processor)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert not [file for file in (tmp_path / "adapter").iterdir() if file.is_dir()]
    loaded = ValueHeadModel.from_pretrained(tmp_path / "adapter").eval()
    before, after = wrapped(**batch), loaded(**batch)
    assert all(torch.equal(before[k], after[k]) for k in before)
    stock = peft.PeftModel.from_pretrained(adapted.unload(), tmp_path / "adapter").eval()
    assert torch.equal(stock(**stock_inputs(batch)).logits, loaded.pretrained_model(**stock_inputs(batch)).logits)


def test_weights_of_several_precisions_come_back_exactly(tmp_path):
    """A frozen part in half precision comes first, beside trained weights in full."""
    wrapped, *_ = build("llama", SCALAR)
    wrapped.model.embed_tokens.bfloat16().requires_grad_(False)
    wrapped.save_pretrained(tmp_path)
    other = wrap(copy.deepcopy(wrapped.pretrained_model), SCALAR)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    load_weights(other, str(tmp_path))
    assert_same_state(other, wrapped)


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # with two matrices and with one
def test_an_adapter_with_tokens_added_opens_again(name, tmp_path):
    model, processor = tiny_models.build(name)
    model.save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    processor.add_tokens(["<act>", "<end>"])
    base.resize_token_embeddings(len(processor))
    wrapped = wrap(lora(base, modules_to_save=["embed_tokens", "lm_head"]), VOCAB)
    with torch.no_grad():
        for k, p in wrapped.pretrained_model.named_parameters():
            if "modules_to_save" in k:
                p.normal_()
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = ValueHeadModel.from_pretrained(tmp_path / "adapter").eval()
    batch = batch_of(name, processor)
    batch["labels"][:, -1] = batch["input_ids"][:, -1] = len(processor) - 1
    before, after = wrapped(**batch), loaded(**batch)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_what_was_saved_last_is_what_opens(tmp_path):
    model, _ = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "base")
    adapted = wrap(lora(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")), SCALAR)
    whole = wrap(model, SCALAR)
    for wrapped in (adapted, whole, adapted):
        wrapped.save_pretrained(tmp_path / "saved")
        assert_same_state(ValueHeadModel.from_pretrained(tmp_path / "saved"), wrapped)


def test_an_adapter_does_not_take_the_place_of_its_base_model(tmp_path):
    tiny_models.build("llama")[0].save_pretrained(tmp_path / "base")
    wrapped = wrap(lora(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")), SCALAR)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"base holds the base model of the adapter.*another folder"):
        wrapped.save_pretrained(f"{tmp_path}/elsewhere/../base")
    assert files_of(tmp_path) == before


def test_an_adapter_beside_its_base_model_is_not_opened(tmp_path):
    """Which would open itself without end."""
    model, _ = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "base")
    lora(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"names its own folder as its base model\. Move its adapter_config\.json"):
        load_pretrained(tmp_path / "base")


def test_an_adapter_that_transformers_put_in_is_refused(tmp_path):
    """Its weights would be saved under names that nothing opens."""
    base, _ = tiny_models.build("llama")
    base.save_pretrained(tmp_path / "base")
    lora(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    added, _ = tiny_models.build("llama")
    added.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    opened = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for model in (added, opened, peft.get_peft_model(opened, peft.LoraConfig(r=2, target_modules=["v_proj"]))):
        with pytest.raises(ValueError, match="holds an adapter that transformers put in"):
            wrap(model, SCALAR)


def test_a_loaded_adapter_can_be_trained_further(tmp_path):
    model, processor = tiny_models.build("idefics3")
    model.save_pretrained(tmp_path / "base")
    wrapped = wrap(lora(tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "base")), SCALAR)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = ValueHeadModel.from_pretrained(tmp_path / "adapter", is_trainable=True)
    trainable = [k for k, p in loaded.pretrained_model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in k for k in trainable)
    out = loaded(**batch_of("idefics3", processor))
    (out.log_probs.sum() + out.q_values.sum() + out.state_values.sum()).backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


def test_a_gathered_state_dict_is_what_gets_saved(tmp_path):
    # As under ZeRO-3, where the module's own weights are empty shards.
    wrapped, *_ = build("llama", SCALAR)
    gathered = {k: v + 1 for k, v in wrapped.state_dict().items()}
    wrapped.save_pretrained(tmp_path, state_dict=gathered)
    loaded = ValueHeadModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == gathered.keys() and all(torch.equal(loaded[k], v) for k, v in gathered.items())


def test_only_the_main_process_writes_the_critic(tmp_path):
    wrapped, *_ = build("llama", SCALAR)
    wrapped.save_pretrained(tmp_path, is_main_process=False)
    assert "critic.safetensors" not in files_of(tmp_path) and "critic_config.json" not in files_of(tmp_path)


def test_a_fresh_critic_on_a_stock_model(tmp_path):
    tiny_models.build("llama")[0].save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"holds no critic \(critic_config.json\).*critic_config=CriticConfig\(\)"):
        ValueHeadModel.from_pretrained(tmp_path)
    fresh = ValueHeadModel.from_pretrained(tmp_path, critic_config=VOCAB)
    assert fresh.critic.config.critic_type == "vocab" and fresh.critic.config.num_critics == 3
    assert fresh.critic.config.hidden_size == tiny_models.TEXT["hidden_size"]
    assert fresh.critic.config.vocab_size == fresh.config.vocab_size


def test_the_mode_is_the_models(tmp_path):
    """A model opens in evaluation mode, inside and out."""
    build("llama", SCALAR)[0].save_pretrained(tmp_path)
    assert not any(module.training for module in ValueHeadModel.from_pretrained(tmp_path).modules())


def test_a_scalar_critic_does_not_mind_another_vocabulary(tmp_path):
    wrapped, *_ = build("llama", SCALAR)
    wrapped.pretrained_model.resize_token_embeddings(wrapped.config.vocab_size + 7)
    wrapped.save_pretrained(tmp_path)
    again = ValueHeadModel.from_pretrained(tmp_path)
    for key, value in wrapped.critic.state_dict().items():
        assert torch.equal(again.critic.state_dict()[key], value)


@pytest.fixture
def saved(tmp_path):
    wrapped, *_ = build("llama", SCALAR)
    wrapped.save_pretrained(tmp_path)
    return tmp_path


def change_json(directory, **changes):
    path = directory / "critic_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory, change):
    weights = load_file(directory / "critic.safetensors")
    change(weights)
    save_file(weights, directory / "critic.safetensors")


def test_a_saved_critic_is_never_replaced_silently(saved):
    with pytest.raises(ValueError, match="has a critic of its own"):
        ValueHeadModel.from_pretrained(saved, critic_config=SCALAR)


def test_missing_critic_weights(saved):
    (saved / "critic.safetensors").unlink()
    with pytest.raises(OSError, match=r"critic\.safetensors"):
        ValueHeadModel.from_pretrained(saved)


def test_critic_weights_alone(saved):
    """Opened without a critic, the next save would leave it behind."""
    (saved / "critic_config.json").unlink()
    for call in (lambda: has_critic(saved), lambda: ValueHeadModel.from_pretrained(saved, critic_config=SCALAR)):
        with pytest.raises(OSError, match=r"half a critic: critic\.safetensors without critic_config\.json"):
            call()


def test_a_folder_in_a_repository(saved):
    """The weights would be those of the folder, the critic that of the root."""
    with pytest.raises(ValueError, match=r"`subfolder='checkpoint-1'`: model and critic are opened from a folder"):
        ValueHeadModel.from_pretrained(saved, subfolder="checkpoint-1")


def test_what_is_no_model_gets_no_critic(saved):
    with pytest.raises(TypeError, match="A critic goes on a model of transformers or PEFT, got LlamaConfig"):
        ValueHeadModel(tf.AutoConfig.from_pretrained(saved))  # as `trl.BEMACallback` does


def test_names_of_no_model(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, error, words in (
        (tmp_path / "nowhere", OSError, "There is no folder .*nowhere"),
        ("./nowhere", OSError, "There is no folder ./nowhere"),
        (tmp_path / "empty", OSError, "empty holds no model, neither config.json nor adapter_config.json"),
        (saved / "config.json", OSError, "is a file; give the folder"),
        (None, TypeError, "that of a folder, or of a repository on the Hub; got None"),
        ("", TypeError, "that of a folder, or of a repository on the Hub; got ''"),
    ):
        for call in (load_pretrained, ValueHeadModel.from_pretrained):
            with pytest.raises(error, match=words):
                call(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("target.v.bias"), "Missing key.*target.v.bias"),
        (lambda w: w.update(more=torch.ones(1)), "Unexpected key.*more"),
        (lambda w: w.update({"online.q.bias": torch.ones(3)}), "size mismatch for online.q.bias"),
    ],
    ids=["missing", "left over", "shape"],
)
def test_critic_weights_that_do_not_fit(saved, change, message):
    change_weights(saved, change)
    with pytest.raises(ValueError, match=rf"(?s)does not fit its own critic_config.json.*{message}"):
        ValueHeadModel.from_pretrained(saved)


def test_damaged_critic_weights(saved):
    path = saved / "critic.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"critic\.safetensors"):
        ValueHeadModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "made for hidden_size=64, but LlamaForCausalLM has 160: it belongs to another model"),
        (
            {"critic_type": "vocab", "vocab_size": 99},
            "made for vocab_size=99, but LlamaForCausalLM has .*: it belongs to another model",
        ),
        ({"num_critics": 3}, "(?s)does not fit its own critic_config.json.*size mismatch"),
        ({"critic_type": "vocab"}, "does not fit: .saved, wanted. are .'vocab_size'"),
        ({"critic_type": "token"}, "`critic_type` is 'token'"),
        ({"dropout": 0.1}, "critic_config.json of .* is not a critic's configuration.*dropout"),
        ({"num_critics": "two"}, "critic_config.json of .* is not a critic's configuration"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_critic_configurations_that_do_not_fit(saved, changes, message):
    change_json(saved, **changes)
    with pytest.raises(ValueError, match=message):
        ValueHeadModel.from_pretrained(saved)


@pytest.mark.parametrize("text", ["{", "", "[1]", "null"])
def test_critic_configurations_that_are_none(saved, text):
    (saved / "critic_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"critic_config.json of .* is not a critic's configuration"):
        ValueHeadModel.from_pretrained(saved)


def test_restoring_a_critic_of_another_shape(saved):
    other, *_ = build("llama", CriticConfig("scalar", num_critics=3, critic_hidden_size=8))
    before = {k: v.clone() for k, v in other.critic.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit: \(saved, wanted\) are \{'num_critics': \(2, 3\)\}"):
        other.load_critic(saved)
    assert all(torch.equal(v, before[k]) for k, v in other.critic.state_dict().items())
    with pytest.raises(OSError, match="nowhere"):
        other.load_critic(saved / "nowhere")


def test_the_critics_own_files(saved, tmp_path):
    wrapped, *_ = build("llama", SCALAR)
    torch.nn.init.zeros_(wrapped.critic.online.q.weight)
    wrapped.save_critic(tmp_path / "critic only")
    assert files_of(tmp_path / "critic only") == {"critic.safetensors", "critic_config.json"}
    other = ValueHeadModel.from_pretrained(saved)
    other.load_critic(tmp_path / "critic only")
    assert_same_state(other.critic, wrapped.critic)


def test_pickled_weights_are_not_read(tmp_path):
    model, _ = tiny_models.build("llama")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        ValueHeadModel.from_pretrained(tmp_path, critic_config=SCALAR)


# ---- what is refused ----


@pytest.mark.parametrize(
    "prompt_config",
    [peft.PromptTuningConfig, peft.PrefixTuningConfig],
)
def test_prompt_learning_is_refused(prompt_config):
    model, _ = tiny_models.build("llama")
    adapted = peft.get_peft_model(model, prompt_config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="Prompt-learning PEFT methods shift the token positions"):
        ValueHeadModel(adapted)


def test_several_adapters_at_once_are_refused():
    model = lora(tiny_models.build("llama")[0])
    model.add_adapter("agent", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "agent"])
    with pytest.raises(ValueError, match=r"\['default', 'agent'\] act together.*`set_adapter`"):
        ValueHeadModel(model)


def test_an_adapter_on_the_head_is_refused():
    # Its weight is read directly, so the adapter would silently be left out of the policy.
    model, _ = tiny_models.build("llama")
    with pytest.raises(ValueError, match=r"adapter on the language-model head.*target_modules"):
        ValueHeadModel(lora(model, target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_weights_trained_beside_an_adapter_are_refused(bias):
    """They would be lost when the adapter is saved."""
    model = lora(tiny_text_model("Phi"), bias=bias)
    assert ("norm.bias" in str([k for k, p in model.named_parameters() if p.requires_grad])) == (bias == "all")
    ValueHeadModel(model)
    model.get_base_model().model.final_layernorm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 weights beside the adapter .*final_layernorm\.weight.*modules_to_save"):
        ValueHeadModel(model)


@torch.no_grad()
def test_a_head_that_is_trained_whole_is_the_one_read():
    model, processor = tiny_models.build("llama")
    wrapped = wrap(lora(model, modules_to_save=["lm_head"]), SCALAR)
    for k, p in wrapped.pretrained_model.named_parameters():
        if "modules_to_save" in k:
            p.normal_()
    batch = batch_of("llama", processor)
    ref = dense(wrapped.pretrained_model, batch)
    assert_near(wrapped(**batch).log_probs, ref["log_probs"][torch.arange(len(ref["tokens"])), ref["tokens"]])


@pytest.mark.parametrize("part", ["backbone", "vision tower", "classifier"])
def test_a_model_without_a_language_model_head_is_refused(part):
    model, _ = tiny_models.build("llama" if part != "vision tower" else "llava")
    if part == "classifier":
        model = tf.LlamaForSequenceClassification(model.config)
    else:
        model = model.model if part == "backbone" else model.model.vision_tower
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no language-model head"):
        ValueHeadModel(model)


def test_a_critic_of_another_model_is_refused():
    model, _ = tiny_models.build("llama")
    with pytest.raises(ValueError, match="hidden_size=64, but LlamaForCausalLM has 160"):
        ValueHeadModel(model, CriticConfig(hidden_size=64))


# ---- generation ----


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@torch.no_grad()
def test_generates_through_the_wrapper(name, adapted):
    model, processor = tiny_models.build(name)
    wrapped = wrap(lora(model) if adapted else model, SCALAR)
    prompts = [observe(name, k) for k in range(2)]
    texts = [processor.apply_chat_template(p["prompt"], add_generation_prompt=True, tokenize=False) for p in prompts]
    kwargs = {"images": [pictures(p["images"]) for p in prompts]} if prompts[0]["images"] else {}
    inputs = turn_processor(processor)(
        text=texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False, **kwargs
    )
    generated = wrapped.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, wrapped.pretrained_model.generate(**inputs, max_new_tokens=4, do_sample=False))
    # Greedy: each first new token is the argmax of the stock logits at the prompt's end.
    first = wrapped.pretrained_model(**inputs).logits[:, -1].argmax(-1)
    assert torch.equal(generated[:, inputs["input_ids"].shape[1]], first)


def test_a_default_critic_and_its_prior():
    model, processor = tiny_models.build("llama")
    wrapped = ValueHeadModel(model)
    assert wrapped.critic.config.critic_type == CriticConfig().critic_type
    wrapped.critic.initialize_moments(3.0, 0.5)
    values = denormalize(
        wrapped(**batch_of("llama", processor)).state_values, wrapped.critic.target_mean, wrapped.critic.target_std
    )
    assert (values - 3.0).abs().max() < 0.25  # Fresh heads say the mean, to within half a deviation.


def test_a_critic_that_could_not_be_looked_up_is_not_dropped_silently(tmp_path):
    assert not has_critic(tmp_path)  # a directory tells for sure
    with pytest.warns(UserWarning, match=r"Could not find out whether some/model has a critic_config\.json"):
        assert not has_critic("some/model", cache_dir=tmp_path, local_files_only=True)
    # What the Hub has said once is remembered: there is no such file.
    marker = tmp_path / "models--some--model" / ".no_exist" / "0"
    refs = tmp_path / "models--some--model" / "refs"
    for folder in (marker, refs):
        folder.mkdir(parents=True)
    (marker / "critic_config.json").touch()
    (refs / "main").write_text("0")
    (tmp_path / "models--some--model" / "snapshots" / "0").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_critic("some/model", cache_dir=tmp_path, local_files_only=True)
