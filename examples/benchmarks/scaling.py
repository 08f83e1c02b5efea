# SPDX-License-Identifier: Apache-2.0
"""Weak scaling on this machine: one process against several, each with the same work, offline and online.

    python examples/benchmarks/scaling.py [--processes 2] [--repeats 3]

NumberLine with the embedded model, whole. Offline, each process takes batches of 32 turns; online, each plays 16
environments and learns as much. A run of one process is DDP's peer and is taken again with each of the others; every
process has one thread. Rates are over the second half of a run's updates, and over its rounds but the first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
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

RESULT = RESULTS / "scaling" / "cpu.json"
PAGE = ROOT / "docs" / "scaling.md"
KINDS = {"multi_gpu": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
UPDATES = 40


def work(out: str, online: bool) -> None:
    """One process of a run; the first writes the trainer's log."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmq_trl import EmbeddedRecipe, VLMQConfig, VLMQTrainer, collect_demonstrations, load_embedded_model

    processes = int(os.environ.get("WORLD_SIZE", 1))
    turns = {"turns_per_round": 200 * processes, "updates_per_turn": 0.05 / processes} if online else {}
    args = VLMQConfig(
        output_dir=str(Path(out).parent / "run"),
        max_steps=UPDATES,
        learning_rate=1e-4,  # it is to stay as good as it is
        per_device_train_batch_size=32,
        max_completion_length=48,
        filter="exp",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=5,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        **turns,
    )
    env = "vlmq_trl/NumberLine-v0"
    with args.main_process_first():
        name = load_embedded_model(EmbeddedRecipe(games=("NumberLine",)))
        data = collect_demonstrations(env, policy="random", episodes=400, progress=False)
    model = AutoModelForImageTextToText.from_pretrained(name)
    processor = AutoProcessor.from_pretrained(name)
    trainer = VLMQTrainer(model, args, train_dataset=data, env=env if online else None, processing_class=processor)
    trainer.train()
    if trainer.is_world_process_zero():
        kind = trainer.accelerator.distributed_type.value
        Path(out).write_text(json.dumps({"processes": processes, "kind": kind, "log": trainer.state.log_history}))


def launch(kind: str, processes: int, online: bool) -> dict[str, float]:
    """One run: tokens learned from a second, and turns played a second."""
    configuration = ROOT / "examples" / "accelerate_configs" / f"{kind if processes > 1 else 'single'}.yaml"
    options = ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "log.json"
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration), *options]
            + [str(Path(__file__).resolve()), "--work", str(out), *(["--online"] if online else [])],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PATH": path},
            capture_output=True,
            text=True,
        )
        if not out.is_file():
            raise RuntimeError(f"{kind} with {processes} processes failed:\n{done.stderr[-3000:]}")
        found = json.loads(out.read_text())
    assert found["processes"] == processes, found
    rates = [entry["tokens_per_second"] for entry in found["log"] if "tokens_per_second" in entry]
    played = [e["rollout_turns_per_second"] for e in found["log"] if "rollout_turns_per_second" in e]
    measured = {"tokens_per_second": statistics.median(rates[len(rates) // 2 :])}
    return measured | ({"turns_per_second": statistics.median(played[1:])} if online else {})


def report() -> None:
    found: Any = read_json(RESULT)
    rows = []
    for name, runs in found["runs"].items():
        kind, phase = name.split("/")
        rate = "turns_per_second" if phase == "online" else "tokens_per_second"
        ratios = [many[rate] / one[rate] for one, many in runs]
        one, many = (statistics.median(pair[k][rate] for pair in runs) for k in (0, 1))
        what = "turns played" if phase == "online" else "tokens learned from"
        cells = [f"{one:,.0f}", f"{many:,.0f}", f"**{statistics.median(ratios):.2f}**"]
        rows.append([KINDS[kind], f"{what} a second", *cells, f"{min(ratios):.2f} to {max(ratios):.2f}"])
    n = found["processes"]
    header = ["", "", "1 process", f"{n} processes", "ratio", f"of {found['repeats']}"]
    text = (
        f"Weak scaling: every process the same work, one thread each; medians of {found['repeats']} pairs of runs, "
        f"taken one after the other. {n:.2f} would be perfect.\n\n{markdown_table(header, rows)}\n\n"
        f"On: {describe(found['machine'])}. `{found['command']}`"
    )
    write_section(PAGE, "weak", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--online", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.online)
        return
    if not options.report_only:
        runs: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {}
        for repeat in range(options.repeats):
            for kind in options.kinds:
                for online in (False, True):
                    pair = launch(kind, 1, online), launch(kind, options.processes, online)
                    name = f"{kind}/{'online' if online else 'offline'}"
                    runs.setdefault(name, []).append(pair)
                    print(f"{repeat + 1}/{options.repeats} {name}: {pair[0]} {pair[1]}", flush=True)
        command = f"python examples/benchmarks/scaling.py --processes {options.processes} --repeats {options.repeats}"
        command += f" --kinds {' '.join(options.kinds)}"
        write_json(
            RESULT,
            {
                "command": command,
                "machine": machine(),
                "versions": versions(),
                "processes": options.processes,
                "repeats": options.repeats,
                "runs": runs,
            },
        )
    report()
    print(f"Report: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
