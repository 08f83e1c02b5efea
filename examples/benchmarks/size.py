# SPDX-License-Identifier: Apache-2.0
"""Memory and speed at the size of real models: Qwen2.5-VL's shapes on one GPU, with random weights.

    python examples/benchmarks/size.py                        # about 5 minutes on an H100, and 30 GB of disk for QLoRA
    python examples/benchmarks/size.py --only 3b/* --steps 4
    python examples/benchmarks/size.py --report-only

Trains each variant for a few steps of 8 turns, LoRA of rank 16 on every linear layer of the language model, bf16, and
plays with one shape while the number of environments grows. For each: the allocator's peak, what of it were weights
before the first step, and the median step time. The weights are random, the pictures and prompts those of Points24,
enlarged to 729 tokens and a token a byte, so that a turn has about 1,000.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.common import (
    RESULTS,
    ROOT,
    describe,
    machine,
    markdown_table,
    read_json,
    versions,
    write_json,
    write_section,
)

SCALING_PAGE = ROOT / "docs" / "scaling.md"
SEED = 0
ENV_ID = "vlmq_trl/Points24-v0"
MICRO_BATCH = 8
PICTURE_SIDE = 756  # pixels, 27 x 27 tokens
PLAYED_TOKENS = 48
PLAYERS = (1, 4, 16, 64, 128)

# Language model of each, as published; the vision tower is the same but for its output.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}
    | {"num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": True},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False},
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
VOCAB = {"critic_type": "vocab", "off_policy_trace": "tree_backup"}
# `VLMQConfig`'s arguments; "sft" is the stock trainer. Pictures are remembered where the tower is frozen, as it is
# under LoRA on the language model.
VARIANTS: dict[str, dict[str, Any]] = {
    "sft": {},
    "scalar": {"critic_type": "scalar"},
    "vocab": VOCAB,
    "vocab, activations offloaded": {**VOCAB, "activation_offloading": True},
    "vocab, pictures remembered": {**VOCAB, "vision_cache_gb": 2},
    "vocab, 4-bit": {**VOCAB, "quantized": True},
    "vocab, all of these": {**VOCAB, "quantized": True, "activation_offloading": True, "vision_cache_gb": 2},
}
MEASURED = [
    *(f"3b/{name}" for name in ("sft", "vocab")),
    *(f"7b/{name}" for name in ("sft", "vocab")),
    *(f"3b/{name}" for name in list(VARIANTS)[3:]),
    "3b/scalar",
    "7b/vocab, 4-bit",
]


def build(shape: str) -> tuple[Any, Any]:
    """A random model in bf16, on the GPU where there is one, and a processor whose tokens are bytes."""
    import torch
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[0], additional_special_tokens=special[1:]
    )
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
        "{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    class ImageOnly(tf.Qwen2_5_VLProcessor):
        """Without its video part, which would need torchvision."""

        apply_chat_template = tf.ProcessorMixin.apply_chat_template

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    size = {"shortest_edge": PICTURE_SIDE**2, "longest_edge": PICTURE_SIDE**2}
    processor = ImageOnly(tf.Qwen2VLImageProcessorPil(size=size), fast, chat_template=template)
    text = dict(SHAPES[shape])
    tied = text.pop("tie_word_embeddings")
    heads = text["hidden_size"] // text["num_attention_heads"]
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [heads // 8, 3 * heads // 16, 3 * heads // 16],
    }
    config = tf.Qwen2_5_VLConfig(
        vision_config={**VISION, "out_hidden_size": text["hidden_size"]},
        text_config=text,
        tie_word_embeddings=tied,
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
    )
    torch.manual_seed(SEED)
    # Made where it is used: random numbers for billions of weights take minutes on a CPU.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = tf.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    return model, processor


def quantized(model: Any) -> Any:
    """The model through the usual way to four bits: saved, and loaded again."""
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        free()
        return AutoModelForImageTextToText.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": 0}
        )


def free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def train(shape: str, variant: str, steps: int) -> dict[str, Any]:
    """A few steps of one variant: memory in GB, seconds a step, tokens a step."""
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from examples.benchmarks.speed import turns
    from vlmq_trl import VLMQConfig, VLMQTrainer

    free()
    options = dict(VARIANTS[variant])
    model, processor = build(shape)
    if options.pop("quantized", False):
        holder = [model]
        del model
        model = quantized(holder.pop())
    model.requires_grad_(False)
    weights = torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "per_device_train_batch_size": MICRO_BATCH,
            "num_train_epochs": 2,
            "max_length": None,
            "bf16": gpu,
            "use_cpu": not gpu,
            "save_strategy": "no",
            "logging_steps": 10**6,
            "report_to": "none",
            "disable_tqdm": True,
            "learning_rate": 1e-4,
            "seed": SEED,
        }
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")
        kwargs = {"train_dataset": turns(MICRO_BATCH * steps), "processing_class": processor, "peft_config": lora}
        if variant == "sft":
            trainer = SFTTrainer(model, SFTConfig(**common), **kwargs)
        else:
            trainer = VLMQTrainer(model, VLMQConfig(**common, segment_length=4, **options), **kwargs)
        trainer.remove_callback(PrinterCallback)
        ends: list[float] = []

        class Stopwatch(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if gpu:
                    torch.cuda.synchronize()
                ends.append(time.perf_counter())

        trainer.add_callback(Stopwatch())
        trainer.train()
        seconds = [b - a for a, b in pairwise(ends)][steps - 1 :]  # the second epoch, where all pictures are known
        tokens = trainer.state.log_history[-1].get("num_tokens") or trainer._total_train_tokens
        return {
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "weights_gb": weights,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if gpu else 0.0,
            "step_seconds": seconds,
            "tokens_per_step": float(tokens) / (2 * steps),
        }


def play(shape: str, rounds: int) -> list[dict[str, Any]]:
    """Turns a second by the number of environments; a random model's answers all have the full length."""
    import gymnasium
    import numpy as np
    import torch

    from vlmq_trl import ModelPolicy
    from vlmq_trl.agent_format import default_format
    from vlmq_trl.rollout import Request

    free()
    model, processor = build(shape)
    model.eval()
    rows = []
    for number in PLAYERS:
        policy = ModelPolicy(model, processor, temperature=1.0, max_completion_length=PLAYED_TOKENS, batch_size=number)
        policy.generation_config.min_new_tokens = PLAYED_TOKENS
        envs = [gymnasium.make(ENV_ID) for _ in range(number)]
        agent_format = default_format(envs[0])
        observations = [env.reset(seed=SEED + k)[0] for k, env in enumerate(envs)]
        rng, seconds, outside = np.random.default_rng(SEED), 0.0, 0.0
        free()
        for count in range(rounds + 1):
            start = time.perf_counter()
            prompts = [
                agent_format.build_prompt(env.get_wrapper_attr("task"), observation)
                for env, observation in zip(envs, observations, strict=True)
            ]
            asked = time.perf_counter()
            answers = policy.act([Request(env, *prompt, rng) for env, prompt in zip(envs, prompts, strict=True)])
            answered = time.perf_counter()
            for k, (env, answer) in enumerate(zip(envs, answers, strict=True)):
                observations[k], _, terminated, truncated, _ = env.step(agent_format.parse(answer.text).action)
                if terminated or truncated:
                    observations[k] = env.reset()[0]
            if count:  # the first round warms up
                seconds += time.perf_counter() - start
                outside += time.perf_counter() - start - (answered - asked)
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        rate = rounds * number / seconds
        rows.append(
            {"num_envs": number, "turns_per_second": rate, "outside_policy": outside / seconds, "peak_gb": peak}
        )
        print(f"{shape}, {number} environments: {rate:.2f} turns a second", flush=True)
        for env in envs:
            env.close()
    return rows


def attempt(measure: Callable[[], Any]) -> Any:
    """What is measured, or the error in words: one variant that does not fit must not lose the others."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


# ---- the report ----


def section(result: dict[str, Any]) -> str:
    rows = []
    for name in (f"{shape}/{variant}" for shape in SHAPES for variant in VARIANTS):
        found = result["training"].get(name)
        if found is None:
            continue
        shape, _, variant = name.partition("/")
        if "error" in found:
            rows.append([shape, variant, f"failed: {found['error']}", "", "", "", ""])
            continue
        base = result["training"].get(f"{shape}/sft", {})
        ratio = f" ({found['peak_gb'] / base['peak_gb']:.2f})" if "peak_gb" in base else ""
        rows.append(
            [
                f"{shape}, {found['parameters'] / 1e9:.2f} B",
                "stock SFT" if variant == "sft" else f"VLMQ, {variant}",
                f"{found['weights_gb']:.1f}",
                f"**{found['peak_gb']:.1f}**{ratio}",
                f"{found['reserved_gb']:.1f}",
                f"{statistics.median(found['step_seconds']):.2f} s",
                f"{found['tokens_per_step']:,.0f}",
            ]
        )
    header = ["shape", "trainer", "weights, GB", "peak, GB (of SFT's)", "reserved", "a step", "tokens a step"]
    parts = [
        f"Qwen2.5-VL's shapes with random weights; LoRA of rank 16, bf16, activation checkpointing, {MICRO_BATCH} "
        "turns of Points24 a step (VLMQ's segments add the states they bootstrap from); one run each, timed in its "
        "second epoch. `peak` is what was allocated, `reserved` what the allocator held of the GPU for it.",
        markdown_table(header, rows),
    ]
    if result["rollouts"]:
        rows = [
            [
                str(r["num_envs"]),
                f"{r['turns_per_second']:.2f}",
                f"{100 * r['outside_policy']:.1f} %",
                f"{r['peak_gb']:.1f}",
            ]
            for r in result["rollouts"]
        ]
        parts += [
            f"Playing Points24 with the 3b shape, {PLAYED_TOKENS} sampled tokens a turn, all environments in the "
            "trainer's process:",
            markdown_table(["environments", "turns a second", "outside the model", "peak, GB"], rows),
        ]
    used = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    parts.append(f"On: {describe(result['machine'])}. Seed {SEED}. {used}. `{result['command']}`")
    return "\n\n".join(parts)


def report(path: Path) -> None:
    result = read_json(path)
    if result is not None:
        write_section(SCALING_PAGE, "size", section(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="SHAPE/VARIANT or SHAPE/play")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps of an epoch; the second of two is timed")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each environment in a measurement of play")
    parser.add_argument("--report-only", action="store_true", help="write the report and stop")
    options = parser.parse_args()
    if options.steps < 2 or options.rounds < 1:
        parser.error("--steps must be at least 2, --rounds at least 1")
    path = RESULTS / "size" / "gpu.json"
    if not options.report_only:
        here = machine()
        if here["gpu"] is None:
            print("A model of this size needs a GPU: nothing is measured.")
            return 0
        command = f"python examples/benchmarks/size.py --steps {options.steps} --rounds {options.rounds}"
        print(f"{command}\nseed {SEED}; {describe(here)}; {versions()}", flush=True)
        kept = read_json(path) or {"training": {}, "rollouts": []}
        result = {**kept, "command": command, "machine": here, "versions": versions()}
        for name in (m for m in MEASURED if any(fnmatch(m, pattern) for pattern in options.only)):
            shape, _, variant = name.partition("/")
            result["training"][name] = found = attempt(lambda s=shape, v=variant: train(s, v, options.steps))
            write_json(path, result)
            print(name, found, flush=True)
        if any(fnmatch("3b/play", pattern) for pattern in options.only):
            result["rollouts"] = play("3b", options.rounds)
            write_json(path, result)
    report(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
