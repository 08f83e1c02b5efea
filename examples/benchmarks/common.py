# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the machine they ran on, results as JSON, worker processes, and generated Markdown."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = ROOT / "docs" / "results.md"
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


def clock(seconds: float) -> str:
    """5025 -> 1:23:45."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
