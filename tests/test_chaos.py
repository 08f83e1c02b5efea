# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed: each goes on, nothing that was reported is lost, nothing is there twice, and it learns as well
as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.chaos_run import CAPACITY, TURNS
from vlmq_trl.replay import ReplayBuffer, load_replay
from vlmq_trl.trajectory import validate_trajectories

ROOT = Path(__file__).parents[1]
STEPS = 400


def start(folder: Path) -> subprocess.Popen:
    (folder / "training").unlink(missing_ok=True)
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.chaos_run", str(folder), str(STEPS)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def wait_for_training(process: subprocess.Popen, folder: Path) -> bool:
    """False if the run has ended first; its output is shown if it failed."""
    while not (folder / "training").exists():
        if process.poll() is not None:
            assert process.returncode == 0, (folder / "output.txt").read_text()[-3000:]
            return False
        time.sleep(0.02)
    return True


def check_buffer(folder: Path) -> None:
    """Every reported episode is there, unless newer ones have taken its place; none is there twice; all are sound."""
    reported = (folder / "reported.txt").read_text().split("\n")[:-1] if (folder / "reported.txt").exists() else []
    assert len(set(reported)) == len(reported)
    if not (folder / "run" / "replay" / "manifest.json").exists():
        assert not reported
        return
    with ReplayBuffer(folder / "run" / "replay", capacity=CAPACITY) as buffer:
        if not buffer.num_online:
            assert not reported
            return
        kept = load_replay(buffer.folder, "online").unique("episode_id")
        validate_trajectories(load_replay(buffer.folder))
        assert buffer.num_online <= CAPACITY
    lost = set(reported) - set(kept)
    if lost:  # the oldest, in order, are the ones that were evicted
        oldest_kept = next(i for i, name in enumerate(reported) if name in kept)
        assert lost == set(reported[:oldest_kept])
        assert (len(kept) + 1) * TURNS > CAPACITY, "evicted although there was room"


def finish(folder: Path) -> dict:
    assert start(folder).wait(timeout=600) == 0, (folder / "output.txt").read_text()[-3000:]
    check_buffer(folder)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    """At random instants of one run after another, since a fast machine gets to a run's end between the kills."""
    rng = np.random.default_rng(0)
    kills, results = 0, []
    while kills < 30:
        folder = tmp_path / str(len(results))
        folder.mkdir()
        while kills < 30:
            process = start(folder)
            if not wait_for_training(process, folder):
                break
            time.sleep(rng.uniform(0.0, 2.0))
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            check_buffer(folder)
        results.append(finish(folder))
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = finish(whole)
    rates = [result["eval_success_rate"] for result in results]
    print(f"{kills} kills of {len(results)} runs; success {rates}, undisturbed {expected['eval_success_rate']}")
    assert {result["step"] for result in [*results, expected]} == {STEPS}
    assert expected["eval_success_rate"] >= 0.9
    assert min(rates) >= 0.9
