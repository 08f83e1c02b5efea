# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the machine they ran on, results as JSON, runs in processes, and generated Markdown."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = ROOT / "docs" / "results.md"
SEEDS = (0, 1, 2)
PACKAGES = ("vlmq_trl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "gymnasium")


def machine() -> dict[str, Any]:
    """The processor, its cores and threads in use, memory and GPU that this process runs on."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    described: dict[str, Any] = {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
    }
    return described


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def describe(machine: dict[str, Any]) -> str:
    """One line of Markdown about a machine."""
    gpu = f", {machine['gpu']}" if machine["gpu"] else ", no GPU"
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB{gpu}"


def read_json(path: Path) -> dict[str, Any] | None:
    """A result, or None if there is none yet."""
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes aside and renames, so that a run cut short leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def make_room(output: Path, arguments: dict[str, Any]) -> None:
    """Readies a run's folder: what an interrupted run with these arguments left there stays, so that it goes on; one
    that was done, whose JSON file was removed, begins anew."""
    done = (read_json(output / "results.json") or {}).get("methods")
    if done or read_json(output / "arguments.json") not in (None, arguments):
        shutil.rmtree(output)
    write_json(output / "arguments.json", arguments)


def write_section(page: Path, name: str, text: str) -> None:
    """Replaces what stands between a page's two markers of that name.

    Raises:
        ValueError: the page lacks them.
    """
    begin, end = f"<!-- {name}: generated, do not edit -->", f"<!-- {name}: end -->"
    content = page.read_text()
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{page} must hold the lines {begin!r} and {end!r} once, in this order.")
    head, _, rest = content.partition(begin)
    _, _, tail = rest.partition(end)
    page.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}")


def run_workers(
    commands: Sequence[tuple[str, list[str]]], jobs: int, threads: int, logs: Path
) -> Iterator[tuple[str, bool, float, Path]]:
    """Runs named commands of Python arguments, `jobs` at a time, each in a process of its own.

    Yields:
        (name, whether it succeeded, seconds, its log), as they end. Leaving the loop early ends those still running.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    waiting, running = list(commands), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, arguments = waiting.pop(0)
                log = logs / f"{name.replace('/', '-')}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("w") as sink:
                    process = subprocess.Popen(
                        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT
                    )
                running[name] = (process, time.perf_counter(), log)
            for name, (process, start, log) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    yield name, process.returncode == 0, time.perf_counter() - start, log
            time.sleep(0.5)
    finally:
        for process, _, _ in running.values():
            process.terminate()


def as_flags(arguments: dict[str, Any]) -> list[str]:
    """Arguments of `train_agent.py` as its command line has them."""
    flags = []
    for name, value in arguments.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


@dataclass(frozen=True)
class Run:
    """One line of a benchmark with one seed: a process of its own, then a JSON file."""

    script: ClassVar[str]  # of the benchmark, such as "learning.py"
    setting: str
    variant: str
    seed: int

    @property
    def line(self) -> str:
        return f"{self.setting}/{self.variant}"

    @property
    def name(self) -> str:
        return f"{self.line}/{self.seed}"

    @property
    def path(self) -> Path:
        return RESULTS / self.setting / f"{self.variant}-seed{self.seed}.json"

    @property
    def command(self) -> str:
        return f"python examples/benchmarks/{self.script} --only {self.line} --seeds {self.seed}"

    @property
    def arguments(self) -> dict[str, Any]:
        """All that decides the result."""
        raise NotImplementedError

    def result(self) -> dict[str, Any] | None:
        """What was measured; None if nothing was, or with other arguments than the present ones."""
        found = read_json(self.path)
        return found if found is not None and found["arguments"] == self.arguments else None


AnyRun = TypeVar("AnyRun", bound=Run)


def command_line(
    script: str,
    description: str,
    runs: Sequence[AnyRun],
    work: Callable[[AnyRun], None],
    report: Callable[[], None],
    prepare: Callable[[list[AnyRun]], list[AnyRun]] = lambda missing: missing,
) -> int:
    """Computes the runs that are chosen and missing, several at once, and writes the report after each.

    Args:
        script: the benchmark's `__file__`, which is started again for each run.
        work: computes one run and writes its JSON.
        prepare: called with the missing runs before the first starts; returns those that can be computed.

    Returns:
        The exit status: 1 if a run failed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="runs as SETTING/VARIANT, may use *"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--jobs", type=int, default=min(2, cores), help="runs at once, each in a process of its own")
    parser.add_argument("--list", action="store_true", help="show the runs and stop")
    parser.add_argument("--report-only", action="store_true", help="write the report and stop")
    parser.add_argument("--work", metavar="RUN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    by_name = {run.name: run for run in runs}
    if options.work:
        work(by_name[options.work])
        return 0
    if options.report_only:
        report()
        return 0
    chosen = [r for r in runs if r.seed in options.seeds and any(fnmatch(r.line, p) for p in options.only)]
    if not chosen:
        parser.error(f"no run matches {options.only}; see --list")
    if options.list:
        for run in chosen:
            print(f"{run.name:<40}{outcome(run)}")
        return 0
    missing = [run for run in chosen if run.result() is None]
    print(f"{len(chosen) - len(missing)} of {len(chosen)} runs are done.")
    ready = prepare(missing) if missing else []
    failed = len(missing) - len(ready)
    commands = [(run.name, [str(Path(script).resolve()), "--work", run.name]) for run in ready]
    logs = ROOT / "runs" / "benchmarks" / "logs" / Path(script).stem
    ended = run_workers(commands, options.jobs, max(1, cores // options.jobs), logs)
    for count, (name, succeeded, seconds, log) in enumerate(ended, 1):
        succeeded = succeeded and by_name[name].result() is not None
        failed += not succeeded
        shown = outcome(by_name[name]) if succeeded else f"FAILED, see {log.relative_to(ROOT)}"
        print(f"[{count}/{len(ready)}] {name}: {shown} ({clock(seconds)})", flush=True)
        report()
    report()
    print(f"Report: {PAGE.relative_to(ROOT)}")
    return 1 if failed else 0


def outcome(run: Run) -> str:
    """Of a run, in a few words."""
    result = run.result()
    if result is None:
        return "other arguments" if run.path.is_file() else "missing"
    return ", ".join(f"{mode} {100 * result[mode]['success_rate']:5.1f} %" for mode in ("greedy", "sampled"))


def clock(seconds: float) -> str:
    """5025 -> 1:23:45."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def arithmetic(results: list[dict[str, Any]]) -> str:
    """How many of the runs computed in bfloat16, a machine's choice."""
    known = [result["choices"]["bf16"] for result in results if "choices" in result]
    lost = len(results) - len(known)
    return (
        f"Arithmetic: bfloat16 autocast in {sum(known)} of {len(known)} runs"
        + (f" ({lost} earlier ones did not record it)" if lost else "")
        + ", float32 in the others; on a CPU the shipped configurations take float32."
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
