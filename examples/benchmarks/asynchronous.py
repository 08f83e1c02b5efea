# SPDX-License-Identifier: Apache-2.0
"""Collection while the model learns, against collection in turn with it: how long the learner waits, and a run takes.

    python examples/benchmarks/asynchronous.py [--updates 150] [--pairs 1]

NumberLine with the embedded model, as the online benchmark runs it, without evaluation. The two kinds of run
alternate, each in a fresh trainer. The learner always has to wait for the first round; its share is given with that
and without.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.common import (
    PAGE,
    RESULTS,
    describe,
    machine,
    markdown_table,
    read_json,
    versions,
    write_json,
    write_section,
)

RESULT = RESULTS / "online" / "asynchronous.json"


def run(updates: int, asynchronous: bool, seed: int) -> dict[str, float]:
    """One training: seconds in all, turns, seconds that the learner waited, for the first round and afterwards."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmq_trl import EmbeddedRecipe, VLMQConfig, VLMQTrainer, collect_demonstrations, load_embedded_model

    env = "vlmq_trl/NumberLine-v0"
    name = load_embedded_model(EmbeddedRecipe(games=("NumberLine",)))
    with tempfile.TemporaryDirectory() as folder:
        args = VLMQConfig(
            output_dir=folder,
            seed=seed,
            max_steps=updates,
            learning_rate=1e-3,
            critic_learning_rate=3e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=32,
            max_completion_length=48,
            filter="exp",
            turns_per_round=250,
            updates_per_turn=0.1,
            async_collection=asynchronous,
            max_staleness=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=25,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
        )
        trainer = VLMQTrainer(
            AutoModelForImageTextToText.from_pretrained(name),
            args,
            train_dataset=collect_demonstrations(env, policy="random", episodes=200, progress=False),
            env=env,
            processing_class=AutoProcessor.from_pretrained(name),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        logs = trainer.state.log_history
        if asynchronous:
            first, *later = trainer._online.waits
            waited = {"waited_first": first, "waited_later": sum(later)}
        else:  # all collection is waiting
            rounds = [log["rollout_seconds"] for log in logs if "rollout_seconds" in log]
            waited = {"waited_first": rounds[0], "waited_later": sum(rounds[1:])}
        stale = [log["staleness_max"] for log in logs if "staleness_max" in log]
        return {
            "seconds": seconds,
            "turns": max(log["env_turns"] for log in logs if "env_turns" in log),
            **waited,
            "staleness_max": max(stale, default=0.0),
        }


def report() -> None:
    found = read_json(RESULT)
    assert found is not None
    rows = []
    for kind in ("in turn", "while learning"):
        runs = found["runs"][kind]
        later = [r["waited_later"] / (r["seconds"] - r["waited_first"]) for r in runs]
        whole = [(r["waited_first"] + r["waited_later"]) / r["seconds"] for r in runs]
        rows.append(
            [
                kind,
                f"{statistics.median(r['seconds'] for r in runs):.0f} s",
                f"**{100 * statistics.median(later):.1f} %**",
                f"{100 * statistics.median(whole):.1f} %",
                f"{max(r['staleness_max'] for r in runs):.0f} updates",
                f"{statistics.median(r['turns'] for r in runs):,.0f}",
            ]
        )
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(*found["runs"].values(), strict=True)]
    header = ["collection", "run", "learner waits", "with the first round", "oldest policy", "turns"]
    text = (
        f"NumberLine for {found['updates']} updates, collecting in turn with learning, and in a thread beside it "
        f"(`async_collection`): medians of {len(ratios)} pairs. In turn a run takes "
        f"{statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f}): the two share the "
        "same cores here. Target: the learner waits at most 10 % of the time.\n\n"
        + markdown_table(header, rows)
        + f"\n\nOn: {describe(found['machine'])}, {found['machine']['threads']} threads. "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + f".\n\n`{found['command']}`"
    )
    write_section(PAGE, "asynchronous", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--report-only", action="store_true", help="write the report of the last run and stop")
    options = parser.parse_args()
    if not options.report_only:
        runs: dict[str, list[dict[str, Any]]] = {"in turn": [], "while learning": []}
        for pair in range(options.pairs):
            for kind, found in runs.items():
                found.append(run(options.updates, kind == "while learning", seed=pair))
                print(f"pair {pair}, {kind}: {found[-1]}", flush=True)
        script = "python examples/benchmarks/asynchronous.py"
        result = {
            "command": f"{script} --updates {options.updates} --pairs {options.pairs}",
            "updates": options.updates,
            "machine": machine(),
            "versions": versions(),
            "runs": runs,
        }
        write_json(RESULT, result)
    report()
    print(f"Report: {PAGE}")


if __name__ == "__main__":
    main()
