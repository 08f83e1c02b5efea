# SPDX-License-Identifier: Apache-2.0
"""What a replay buffer costs: writing, opening, sampling, memory and disk, up to a million turns.

    python examples/benchmarks/replay.py                      # both cases at full size: half an hour
    python examples/benchmarks/replay.py --repeating 20000 --distinct 5000 --sizes 10000 --minari 0
    python examples/benchmarks/replay.py --minari-python /elsewhere/bin/python    # where `minari[arrow]` is installed

Two cases. "repeating": real random episodes of Points24 and Blackjack, played once and then repeated with ids and
rewards of their own, so that a picture stands in many turns; the first 10,000 turns are appended, the larger sizes are
these turns again and again as the offline part of another buffer. "distinct": the same, with a number of its own
written into every picture; all are appended. Appended turns are committed every 1,000. Each size is measured in a
fresh process: opening for reading, batches of 32 turns in segments of up to 8, sampled and read with their pictures,
and opening for writing.

Beside it stand Minari's datasets of a sample of the same turns, written with the interpreter of `--minari-python`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.benchmarks.common import (
    PAGE,
    RESULTS,
    ROOT,
    clock,
    describe,
    machine,
    markdown_table,
    read_json,
    versions,
    write_json,
    write_section,
)

SEED = 0
GAMES = ("Points24", "Blackjack")
POOL = 1_500  # turns that are played of each game
COMMIT = 1_000  # turns
APPENDED = 10_000  # turns of the case "repeating"
BATCHES, TURNS, SEGMENT_LENGTH = 1_000, 32, 8
CASES = {"repeating": "pictures repeat", "distinct": "every picture is its own"}
MINARI = {"minari": {"jpeg_encoding": False}, "minari_jpeg": {"jpeg_encoding": True}}


# ---------------------------------------------------------------------------------------------------------------------
# The turns
# ---------------------------------------------------------------------------------------------------------------------


def played() -> list[Any]:
    """Real random episodes, `POOL` turns of each game."""
    from vlmq_trl import make_demonstrator, play_episodes
    from vlmq_trl.agent_format import default_format
    from vlmq_trl.rollout import DemonstratorPolicy, make_env

    pool = []
    for game in GAMES:
        name, turns = f"vlmq_trl/{game}-v0", 0
        policy = DemonstratorPolicy(make_demonstrator(name, "random"), default_format(make_env(name)))
        for episode in play_episodes(name, policy, episodes=POOL, seed=SEED):
            pool.append(episode)
            turns += len(episode.turns)
            if turns >= POOL:
                break
    return pool


def numbered(image: np.ndarray, number: int) -> np.ndarray:
    """The picture with a number in its corner, white on black whatever the game's background."""
    import PIL.Image
    import PIL.ImageDraw

    picture = PIL.Image.fromarray(image)
    draw = PIL.ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 60, 18), fill=(0, 0, 0))
    draw.text((4, 4), str(number), fill=(255, 255, 255))
    return np.asarray(picture)


def episodes(case: str) -> Iterator[Any]:
    """Without end: the played ones again and again, in random order, with ids and rewards of their own."""
    pool, rng, pictures = played(), np.random.default_rng(SEED), count()

    def own(images: list | None) -> list | None:
        return images and [numbered(image, next(pictures)) if case == "distinct" else image for image in images]

    for number in count():
        episode = pool[rng.integers(len(pool))]
        turns = tuple(
            replace(turn, images=own(turn.images), reward=turn.reward + float(rng.normal())) for turn in episode.turns
        )
        final_images = own(episode.final_images)
        yield replace(episode, episode_id=f"{case}/{number}", turns=turns, final_images=final_images)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


def memory() -> dict[str, float]:
    """MB resident: all of it, and the part that is not mapped from files (which the system takes back at need)."""
    values = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon"):
            values["resident" if name == "VmRSS" else "own"] = int(value.split()[0]) / 1024
    return values


def measure(folder: Path) -> dict[str, Any]:
    """Opening and sampling, in this fresh process."""
    from vlmq_trl.replay import ReplayBuffer

    before = memory()
    start = time.perf_counter()
    buffer = ReplayBuffer(folder, read_only=True)
    opening = time.perf_counter() - start
    opened = memory()
    rng, sampling, both = np.random.default_rng(SEED), [], []
    for _ in range(BATCHES):
        start = time.perf_counter()
        rows = buffer.sample(rng, TURNS, SEGMENT_LENGTH, 1.0)
        sampling.append(1e3 * (time.perf_counter() - start))
        buffer.read(rows)
        both.append(1e3 * (time.perf_counter() - start))
    quantiles = {"p50": float(np.quantile(both, 0.5)), "p99": float(np.quantile(both, 0.99))}
    after, turns = memory(), len(buffer)
    start = time.perf_counter()
    ReplayBuffer(folder).close()
    writing = time.perf_counter() - start
    return {
        "turns": turns,
        "opening_seconds": opening,
        "opening_for_writing_seconds": writing,
        "before_mb": before,
        "opened_mb": opened,
        "after_batches_mb": after,
        "sample_ms": float(np.quantile(sampling, 0.5)),
        "batch_ms": quantiles,
    }


def disk(folder: Path) -> dict[str, int]:
    """Bytes in files, and in the blocks that they take."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return {"apparent": sum(s.st_size for s in stats), "allocated": sum(s.st_blocks * 512 for s in stats)}


def measured(folder: Path) -> dict[str, Any]:
    """`measure`, in a fresh process."""
    command = [sys.executable, __file__, "--measure", str(folder)]
    m = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(
        f"{m['turns']:,} turns: opened in {m['opening_seconds']:.2f} s, a batch in {m['batch_ms']['p50']:.1f} ms "
        f"(p99 {m['batch_ms']['p99']:.1f})",
        flush=True,
    )
    return m


def repeated(dataset: Any, turns: int) -> Any:
    """A dataset again and again, at least `turns` turns, with ids and rewards of their own."""
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    table, rng, parts = dataset.data.table, np.random.default_rng(SEED), []
    at = {name: table.schema.get_field_index(name) for name in ("episode_id", "reward")}
    for k in range(-(-turns // len(table))):
        ids = pc.binary_join_element_wise(table["episode_id"], str(k), "/")
        rewards = pa.array(table["reward"].to_numpy() + rng.normal(size=len(table)), pa.float32())
        part = table.set_column(at["episode_id"], "episode_id", ids).set_column(at["reward"], "reward", rewards)
        parts.append(part)
    return datasets.Dataset(pa.concat_tables(parts), fingerprint=f"repeated{turns}")


def fill(case: str, turns: int, sizes: list[int], folder: Path) -> dict[str, Any]:
    """Writes buffers of a case and has them measured."""
    from vlmq_trl import validate_trajectories
    from vlmq_trl.replay import ReplayBuffer, load_replay

    source, found, commits, seconds = episodes(case), [], [], 0.0
    written = text = 0
    sizes = sorted({size for size in sizes if size < turns} | {turns})
    appended = [size for size in sizes if case == "distinct" or size <= APPENDED] or [min(APPENDED, turns)]
    first = folder / "appended"
    for target in appended:
        with ReplayBuffer(first) as buffer:
            while written < target:
                episode = next(source)
                start = time.perf_counter()
                buffer.append(episode, round=0)
                seconds += time.perf_counter() - start
                written += len(episode.turns)
                text += sum(len(json.dumps(turn.prompt)) + len(turn.completion) for turn in episode.turns)
                if buffer.pending_turns >= COMMIT or written >= target:
                    start = time.perf_counter()
                    buffer.commit({"turns": written})
                    commits.append(time.perf_counter() - start)
                    seconds += commits[-1]
        found.append(measured(first))
    last, copied = first, None
    for target in sizes[len(appended) :] if case == "repeating" else ():
        last = folder / str(target)
        data = repeated(load_replay(first), target)
        index = validate_trajectories(data, check_images="none")
        start = time.perf_counter()
        with ReplayBuffer(last) as buffer:
            buffer.add_offline(data, index)
        copied = len(data) / (time.perf_counter() - start)
        found.append(measured(last))
    pictures = [path.stat() for path in (last / "images").rglob("*.png")]
    return {
        "turns": found[-1]["turns"],
        "pictures": len(pictures),
        "appended": written,
        "append_turns_per_second": written / seconds,
        "copy_turns_per_second": copied,
        "commit_seconds": {"median": statistics.median(commits), "max": max(commits)},
        "shards": len(list((first / "shards").iterdir())),
        "measured": found,
        "bytes": {
            "raw_per_turn": 300 * 300 * 3 + text / written,
            "text_per_turn": text / written,
            **disk(last),
            "pictures": sum(s.st_size for s in pictures),
            "pictures_allocated": sum(s.st_blocks * 512 for s in pictures),
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# Minari, in an environment of its own
# ---------------------------------------------------------------------------------------------------------------------


def minari_datasets(turns: int, python: str, folder: Path) -> dict[str, Any]:
    """Bytes a turn of Minari's Arrow datasets of the first turns of the case "repeating", written by `python`."""
    import PIL.Image

    if shutil.which(python) is None:
        return {"error": f"no interpreter at {python}"}
    chosen, written = [], 0
    folder.mkdir()
    for episode in episodes("repeating"):
        images = [turn.images[0] for turn in episode.turns]
        images.append(episode.final_images[0] if episode.final_images else images[-1])
        names = []
        for image in images:
            names.append(f"{written}-{len(names)}.png")
            PIL.Image.fromarray(image).save(folder / names[-1], compress_level=1)
        chosen.append(
            {
                "images": names,
                "prompts": [json.dumps(turn.prompt) for turn in episode.turns],
                "responses": [turn.completion for turn in episode.turns],
                "rewards": [turn.reward for turn in episode.turns],
                "truncated": episode.truncated,
            }
        )
        written += len(episode.turns)
        if written >= turns:
            break
    (folder / "episodes.json").write_text(json.dumps(chosen))
    ran = subprocess.run([python, __file__, "--write-minari", str(folder)], capture_output=True, text=True)
    if ran.returncode:
        return {"error": ran.stderr.strip().splitlines()[-1]}
    return {"turns": written, **json.loads(ran.stdout.splitlines()[-1])}


def write_minari(folder: Path) -> dict[str, Any]:
    """Runs where Minari is installed, and knows nothing of this package."""
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    import minari
    import PIL.Image
    from gymnasium import spaces
    from minari.data_collector.episode_buffer import EpisodeBuffer

    buffers = []
    for episode in json.loads((folder / "episodes.json").read_text()):
        last = len(episode["rewards"]) - 1
        prompts = [*episode["prompts"], episode["prompts"][-1]]
        buffers.append(
            EpisodeBuffer(
                observations={
                    "image": [np.asarray(PIL.Image.open(folder / name)) for name in episode["images"]],
                    "prompt": prompts,
                },
                actions=episode["responses"],
                rewards=episode["rewards"],
                terminations=[k == last and not episode["truncated"] for k in range(last + 1)],
                truncations=[k == last and episode["truncated"] for k in range(last + 1)],
            )
        )
    text = spaces.Text(100_000)
    result: dict[str, Any] = {"version": minari.__version__}
    for name, options in MINARI.items():
        start = time.perf_counter()
        minari.create_dataset_from_buffers(
            dataset_id=f"{name}/turns-v0",
            buffer=buffers,
            observation_space=spaces.Dict(
                {"image": spaces.Box(0, 255, buffers[0].observations["image"][0].shape, np.uint8), "prompt": text}
            ),
            action_space=text,
            data_format="arrow",
            **options,
        )
        result[name] = {"seconds": time.perf_counter() - start, **disk(folder / "minari" / name)}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def section(results: dict[str, dict[str, Any]]) -> str:
    """The page's text, of the parts that have been run."""
    rows, sizes = [], []
    for case, title in CASES.items():
        if case not in results:
            continue
        r = results[case]
        for m in r["measured"]:
            grown = {key: m[key]["own"] - m["before_mb"]["own"] for key in ("opened_mb", "after_batches_mb")}
            rows.append(
                [
                    title,
                    f"{m['turns']:,}",
                    f"{m['opening_seconds']:.2f} s",
                    f"{m['opening_for_writing_seconds']:.2f} s",
                    f"**{m['batch_ms']['p50']:.1f} ms**",
                    f"{m['batch_ms']['p99']:.1f} ms",
                    f"{m['sample_ms']:.2f} ms",
                    f"{m['after_batches_mb']['resident']:,.0f} MB",
                    f"{grown['opened_mb']:,.0f} MB, then {grown['after_batches_mb']:,.0f} MB",
                ]
            )
        size, turns, raw = r["bytes"], r["turns"], r["bytes"]["raw_per_turn"]
        copied = r["copy_turns_per_second"]
        sizes.append(
            [
                title,
                f"{turns:,}",
                f"{r['pictures']:,}",
                f"{raw:,.0f}",
                f"**{size['apparent'] / turns:,.0f}**",
                f"{size['allocated'] / turns:,.0f}",
                f"1/{raw * turns / size['allocated']:,.0f}",
                f"{r['append_turns_per_second']:,.0f}",
                f"{1e3 * r['commit_seconds']['median']:,.0f} ms",
                f"{copied:,.0f}" if copied else "–",
            ]
        )
    text = (
        "Buffers of 300×300 pictures: real random episodes of Points24 and Blackjack, "
        f"{POOL:,} turns of each, repeated with ids and rewards of their own (in play, Points24's pictures hardly "
        "repeat: the first case is what repeating saves), and the same with a number of its own written into each "
        f"picture. Turns are appended and committed every {COMMIT:,}; the repeating case's buffers of more than "
        f"{APPENDED:,} are those turns again and again, copied in as the offline part. Each size is measured in a "
        f"fresh process: opening, {BATCHES:,} batches of {TURNS} turns in segments of up to {SEGMENT_LENGTH}, sampled "
        "and read with decoded pictures, and opening for writing. Resident memory includes the libraries; `own` is "
        f"what is not mapped from files, above what the process held before opening. Seed {SEED}.\n\n"
    )
    header = ["case", "turns", "opening", "for writing", "batch, median", "p99", "sampling alone", "resident", "own"]
    text += markdown_table(header, rows) + "\n\nBytes a turn, and writing:\n\n"
    header = [
        "case",
        "turns",
        "pictures",
        "raw",
        "in files",
        "in blocks",
        "of raw",
        "appended/s",
        "commit",
        "copied/s",
    ]
    text += markdown_table(header, sizes) + "\n\n"
    minari = results.get("minari")
    if minari is None or "error" in minari:
        text += f"Minari was not measured: {minari['error'] if minari else 'left out'}."
    else:
        per_turn = {name: f"{minari[name]['allocated'] / minari['turns']:,.0f}" for name in MINARI}
        text += (
            f"Minari {minari['version']}, Arrow, {minari['turns']:,} turns as in the first case: {per_turn['minari']} "
            f"bytes a turn in blocks, lossless; {per_turn['minari_jpeg']} with its default, JPEG."
        )
    machines = sorted({describe(r["machine"]) for r in results.values()})
    used = next(iter(results.values()), {}).get("versions", {}).items()
    packages = ", ".join(f"{name} {number}" for name, number in used if name in ("vlmq_trl", "datasets"))
    commands = "\n".join(f"- `{r['command']}`" for r in results.values())
    return f"{text}\n\nOn: {'; '.join(machines)}. {packages}.\n\n{commands}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeating", type=int, default=1_000_000, help="turns of that case; 0 leaves it out")
    parser.add_argument("--distinct", type=int, default=100_000, help="turns of that case; 0 leaves it out")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000], help="measured on the way, too")
    parser.add_argument("--minari", type=int, default=5_000, help="turns of its datasets; 0 leaves them out")
    parser.add_argument("--minari-python", default=sys.executable, help="an interpreter with `minari[arrow]`")
    parser.add_argument("--folder", type=Path, help="where the buffers are written; a temporary folder by default")
    parser.add_argument("--report-only", action="store_true", help="write the report of the last run and stop")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write-minari", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure or options.write_minari:
        print(json.dumps(measure(options.measure) if options.measure else write_minari(options.write_minari)))
        return 0
    if not options.report_only:
        print(f"seed {SEED}; {describe(machine())}; {versions()}", flush=True)
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            parts: dict[str, Any] = {
                "minari": lambda turns: minari_datasets(turns, options.minari_python, folder / "minari"),
                **{case: partial(fill, case, sizes=options.sizes, folder=folder / case) for case in CASES},
            }
            for part, run in parts.items():
                turns, start = getattr(options, part), time.perf_counter()
                if not turns:
                    continue
                result = {
                    "command": f"python examples/benchmarks/replay.py --{part} {turns}",
                    **run(turns),
                    "seed": SEED,
                    "machine": machine(),
                    "versions": versions(),
                    "wall_seconds": time.perf_counter() - start,
                }
                shutil.rmtree(folder / part, ignore_errors=True)
                write_json(RESULTS / "replay" / f"{part}.json", result)
                print(f"{part}: {clock(result['wall_seconds'])}", flush=True)
    found = {part: read_json(RESULTS / "replay" / f"{part}.json") for part in ("minari", *CASES)}
    write_section(PAGE, "replay", section({part: result for part, result in found.items() if result}))
    print(f"Report: {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
