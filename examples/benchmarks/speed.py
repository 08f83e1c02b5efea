# SPDX-License-Identifier: Apache-2.0
"""What VLMQ costs beside SFT: step time and peak memory of `VLMQTrainer` against stock `trl.SFTTrainer`.

    python examples/benchmarks/speed.py                # every model that this machine can run; finished ones are kept
    python examples/benchmarks/speed.py --only tiny --pairs 5 --steps 8 --force

Same turns, same weights, same batch size, segment length 8. For the time both trainers live in one process and take
turns, SFT, VLMQ, SFT, VLMQ ..., each time over the same few steps; the ratio is taken pair by pair. For the memory
each trains alone in a fresh process: its largest resident set on a CPU, the allocator's peak on a GPU. Weights are
random.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.common import (
    PAGE,
    RESULTS,
    ROOT,
    describe,
    machine,
    markdown_table,
    read_json,
    run_workers,
    versions,
    write_json,
    write_section,
)

SEED = 0
SEGMENT_LENGTH = 8
TARGETS = (1.25, 1.15)  # time, memory
CRITICS = ("scalar", "vocab")

# Size of the embedded architecture (`EmbeddedRecipe`), vocabulary, turns in a batch, and steps of a timed run.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"title": "the embedded model's size", "recipe": {}, "vocab_size": None, "batch": 32, "steps": 8},
    "100m": {
        "title": "about 100 M parameters, vocabulary 150,000",
        "recipe": {
            "hidden_size": 384,
            "layers": 12,
            "vision_hidden_size": 384,
            "vision_layers": 8,
        },
        "vocab_size": 150_000,
        "batch": 16,
        "steps": 4,
    },
    "2b": {
        "title": "about 2.5 B parameters in bf16 with LoRA, vocabulary 150,000",
        "recipe": {
            "hidden_size": 2304,
            "layers": 28,
            "vision_hidden_size": 1152,
            "vision_layers": 24,
            "image_size": 384,
            "scale_factor": 4,
        },
        "vocab_size": 150_000,
        "batch": 16,
        "steps": 8,
        "gpu": True,
        "targets": (1.15, 1.10),
    },
}
# The same where the vision tower and the projector are frozen, for both trainers, and where VLMQ remembers what they
# made of a picture: by the time of measuring it has seen all of them.
for _name, _title in (("tiny", "the embedded model's size"), ("100m", "about 100 M parameters")):
    _frozen = {**MODELS[_name], "frozen": True, "critics": ("scalar",)}
    MODELS[f"{_name}-frozen"] = {**_frozen, "title": f"{_title}, vision frozen"}
    MODELS[f"{_name}-cached"] = {**_frozen, "title": f"{_title}, vision frozen and remembered", "vision_cache_gb": 1}


def build(name: str) -> tuple[Any, Any]:
    """A model with random weights, and its processor; the vocabulary is padded with tokens that no text uses."""
    import torch
    from transformers import Idefics3ForConditionalGeneration

    from vlmq_trl import embedded

    spec = MODELS[name]
    torch.manual_seed(SEED)
    recipe = dataclasses.replace(embedded.EmbeddedRecipe(), **spec["recipe"])
    processor = embedded.build_processor(recipe)
    if spec["vocab_size"] is None:
        return embedded.build_model(recipe, processor), processor
    with torch.device("meta"):
        config = embedded.build_model(recipe, processor).config
    config.text_config.vocab_size = spec["vocab_size"]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    if spec.get("gpu"):  # made there: random numbers for billions of weights take minutes on a CPU
        with torch.device("cuda"):
            model = Idefics3ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    else:
        model = Idefics3ForConditionalGeneration(config)
    model.tie_weights()
    return model, processor


def turns(count: int) -> Any:
    """Exactly `count` turns of whole episodes of random Points24 play, many of them longer than a segment."""
    from vlmq_trl import collect_demonstrations, validate_trajectories

    data = collect_demonstrations("vlmq_trl/Points24-v0", policy="random", episodes=count, seed=SEED, progress=False)
    index = validate_trajectories(data, check_images="none")
    rows: list[int] = []
    for first, length in zip(index.first_row.tolist(), index.length.tolist(), strict=True):
        if len(rows) + length <= count:
            rows += range(first, first + length)
    if len(rows) != count:
        raise ValueError(f"No set of whole episodes has {count} turns; choose another number of steps.")
    return data.select(rows)


def make_trainer(name: str, method: str, steps: int, output_dir: str) -> Any:
    """A trainer for `steps` steps, which are one epoch. `method` is "sft" or a critic's type."""
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from vlmq_trl import VLMQConfig, VLMQTrainer

    gpu, large = torch.cuda.is_available(), bool(MODELS[name].get("gpu"))
    batch = MODELS[name]["batch"]
    model, processor = build(name)
    if MODELS[name].get("frozen"):
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("vision" not in parameter_name and "connector" not in parameter_name)
    common = {
        "output_dir": output_dir,
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "max_length": None,
        "use_cpu": not gpu,
        "bf16": large,
        "activation_checkpointing": False,
        "dataloader_pin_memory": gpu,
        "save_strategy": "no",
        "logging_steps": 10**6,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }
    kwargs = {"train_dataset": turns(batch * steps), "processing_class": processor}
    if large:
        kwargs["peft_config"] = LoraConfig(r=64, lora_alpha=128, target_modules=r".*text_model.*(q|k|v|o)_proj")
    if method == "sft":
        trainer = SFTTrainer(model, SFTConfig(**common), **kwargs)
    else:
        cache = MODELS[name].get("vision_cache_gb", 0)
        args = VLMQConfig(**common, segment_length=SEGMENT_LENGTH, critic_type=method, vision_cache_gb=cache)
        trainer = VLMQTrainer(model, args, **kwargs)
    trainer.remove_callback(PrinterCallback)

    class Stopwatch(TrainerCallback):
        """Times from the end of one step to the end of the next, reading and collating the batch included."""

        def __init__(self):
            self.ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            if gpu:
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    trainer.stopwatch = Stopwatch()
    trainer.add_callback(trainer.stopwatch)
    return trainer


def step_times(trainer: Any) -> list[float]:
    """Seconds of each step but the first of one more training run."""
    trainer.stopwatch.ends = []
    trainer.train()
    ends = trainer.stopwatch.ends
    return [b - a for a, b in pairwise(ends)]


def measure_time(name: str, critic: str, pairs: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        trainers = {method: make_trainer(name, method, steps, folder) for method in ("sft", critic)}
        # Allocators and lazily loaded code warm up, and what remembers pictures meets them for the first time.
        first = {method: statistics.median(step_times(trainer)) for method, trainer in trainers.items()}
        seconds: dict[str, list[float]] = {method: [] for method in trainers}
        for _ in range(pairs):
            for method, trainer in trainers.items():
                seconds[method].append(statistics.median(step_times(trainer)))
        ratios = [ours / theirs for ours, theirs in zip(seconds[critic], seconds["sft"], strict=True)]
        return {
            "parameters": trainers["sft"].model.num_parameters(),
            "sft_seconds": seconds["sft"],
            "vlmq_seconds": seconds[critic],
            "ratios": ratios,
            "ratio": statistics.median(ratios),
            "first_ratio": first[critic] / first["sft"],
        }


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").is_file() else 0
    import resource

    return pages * resource.getpagesize() / 1e6


def measure_memory(name: str, method: str, steps: int) -> dict[str, Any]:
    """Peak of a training run of its own, and what the process held before the first step."""
    import resource

    import torch

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, method, steps, folder)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 1e6
            step_times(trainer)
            return {"before_mb": before, "peak_mb": torch.cuda.max_memory_allocated() / 1e6}
        before = resident_mb()
        step_times(trainer)
        unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes here
        return {"before_mb": before, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def work(task: str, pairs: int, steps: int) -> None:
    """One measurement, in a process of its own."""
    kind, name, method = task.split("/")
    measured = measure_time(name, method, pairs, steps) if kind == "time" else measure_memory(name, method, steps)
    write_json(part(task), {**measured, "pairs": pairs, "steps": steps, "machine": machine(), "versions": versions()})


def part(task: str) -> Path:
    return ROOT / "runs" / "benchmarks" / "speed" / f"{task.replace('/', '-')}.json"


def is_done(task: str, pairs: int, steps: int, here: dict[str, Any]) -> bool:
    """Whether a measurement with these numbers, on this machine, is there."""
    found = read_json(part(task))
    wanted = {"pairs": pairs, "steps": steps, "machine": here, "versions": versions()}
    return found is not None and {key: found.get(key) for key in wanted} == wanted


def report() -> None:
    """Writes the generated part of docs/results.md."""
    found = [r for path in sorted((RESULTS / "speed").glob("*.json")) if (r := read_json(path)) is not None]
    if not found:
        return
    order = list(MODELS)
    found.sort(key=lambda r: (r["machine"]["gpu"] or "", order.index(r["model"]), CRITICS.index(r["critic"])))
    rows = []
    for r in found:
        memory = ["–", "not measured", "–"]
        most_time, most_memory = MODELS[r["model"]].get("targets", TARGETS)
        met = r["time"]["ratio"] <= most_time
        if r["memory"] is not None:
            base, peak = r["memory"]["sft"], r["memory"]["vlmq"]
            ratio = peak["peak_mb"] / base["peak_mb"]
            beyond = (peak["peak_mb"] - peak["before_mb"]) / (base["peak_mb"] - base["before_mb"])
            memory = [f"{base['peak_mb']:,.0f} MB", f"**{ratio:.2f}**", f"{beyond:.2f}"]
            met &= ratio <= most_memory
        ratios = r["time"]["ratios"]
        new = f", {r['time']['first_ratio']:.2f} at first" if "vision_cache_gb" in MODELS[r["model"]] else ""
        rows.append(
            [
                MODELS[r["model"]]["title"],
                r["machine"]["gpu"] or f"CPU, {r['machine']['threads']} threads",
                r["critic"],
                f"{statistics.median(r['time']['sft_seconds']):.3g} s",
                f"**{r['time']['ratio']:.2f}** ({min(ratios):.2f}–{max(ratios):.2f}){new}",
                *memory,
                ("reached" if met else "**missed**") + ("" if r["memory"] is not None else ", in time"),
            ]
        )
    header = ["model", "on", "critic", "SFT step", "time", "SFT peak", "memory", "beyond the start", "target"]
    commands = "\n".join(f"- `{command}`" for command in dict.fromkeys(r["command"] for r in found))
    machines = sorted({describe(r["machine"]) for r in found})
    used = "; ".join(dict.fromkeys(", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in found))
    text = (
        "`VLMQTrainer` against stock `SFTTrainer`: same turns (random Points24 play), weights, batch; segments of "
        f"{SEGMENT_LENGTH} turns, seed {SEED}. Time: ratio of median step times, the median over pairs of runs in "
        "turn and their range. Memory: ratio of the peaks, a process each; `beyond the start` is the same without "
        "what the process held before its first step, libraries and weights. Vision frozen: in both trainers, the "
        "projector too; remembered: VLMQ with `vision_cache_gb`, which has seen every picture (`at first`: has not). "
        f"Target: time at most {TARGETS[0]}, memory at most {TARGETS[1]}; at 2.5 B 1.15 and 1.10.\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"On: {'; '.join(machines)}. {used}.\n\n{commands}"
    )
    write_section(PAGE, "speed", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--critic", nargs="+", default=list(CRITICS), choices=CRITICS)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs in turn")
    parser.add_argument("--steps", type=int, help="optimiser steps of a run; the first is not counted")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--report-only", action="store_true", help="write the report and stop")
    parser.add_argument("--work", metavar="TASK", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pairs < 1 or (options.steps is not None and options.steps < 3):
        parser.error("--pairs must be at least 1, --steps at least 3")
    if options.work:
        work(options.work, options.pairs, options.steps)
        return 0
    if options.report_only:
        report()
        return 0
    here = machine()
    failed = []
    for name in options.only:
        if MODELS[name].get("gpu") and here["gpu"] is None:
            print(f"{name}: needs a GPU, left out.")
            continue
        for critic in (c for c in options.critic if c in MODELS[name].get("critics", CRITICS)):
            path = RESULTS / "speed" / f"{name}-{critic}-{'gpu' if here['gpu'] else 'cpu'}.json"
            if path.is_file() and not options.force:
                print(f"{name}, {critic}: done before.")
                continue
            tasks = [f"time/{name}/{critic}", f"memory/{name}/sft", f"memory/{name}/{critic}"]
            steps = options.steps or MODELS[name]["steps"]
            flags = ["--pairs", str(options.pairs), "--steps", str(steps)]
            # Parts that an interrupted run has finished are kept.
            missing = [task for task in tasks if options.force or not is_done(task, options.pairs, steps, here)]
            commands = [(task, [str(Path(__file__).resolve()), "--work", task, *flags]) for task in missing]
            logs = ROOT / "runs" / "benchmarks" / "logs"
            ended = run_workers(commands, jobs=1, threads=here["threads"], logs=logs)  # alone, to be timed
            broken = [log for _, succeeded, _, log in ended if not succeeded]
            if broken:
                print(f"{name}, {critic}: FAILED, see {broken[0].relative_to(ROOT)}")
                failed.append(name)
                continue
            timed, sft, ours = (read_json(part(task)) for task in tasks)
            result = {
                "model": name,
                "critic": critic,
                "command": f"python examples/benchmarks/speed.py --only {name} --critic {critic} {' '.join(flags)}",
                "seed": SEED,
                "machine": timed.pop("machine"),
                "versions": timed.pop("versions"),
                "time": timed,
                "memory": {k: {m: r[m] for m in ("before_mb", "peak_mb")} for k, r in (("sft", sft), ("vlmq", ours))},
            }
            write_json(path, result)
            ratio = ours["peak_mb"] / sft["peak_mb"]
            print(f"{name}, {critic}: time x {timed['ratio']:.2f}, peak memory x {ratio:.2f}", flush=True)
            report()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
