# SPDX-License-Identifier: Apache-2.0
"""Test surroundings: no network, one thread a process, caches in a folder that goes away, fixed seeds.

The environment variables must stand before torch and the Hugging Face libraries are imported, so they are set on
import. pytest-xdist's workers inherit them, and so share one folder; the process that made it removes it.
"""

import atexit
import errno
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
)
if "PYTEST_XDIST_WORKER" not in os.environ:
    _caches = tempfile.mkdtemp(prefix="vlmq_trl_tests_")
    atexit.register(shutil.rmtree, _caches, ignore_errors=True)
    for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE"):
        os.environ.pop(_name, None)  # each would override HF_HOME
    os.environ.update(
        HF_HOME=os.path.join(_caches, "huggingface"),
        XDG_CACHE_HOME=os.path.join(_caches, "xdg"),
        MPLCONFIGDIR=os.path.join(_caches, "matplotlib"),
    )

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seeds the global generators before each test, so that a test's result does not depend on its neighbours."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def disk_full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Called with a beginning: there is no more room for files whose names begin so (`Path.write_bytes`)."""

    def fill(beginning: str) -> None:
        original = Path.write_bytes

        def write_bytes(self: Path, data: bytes) -> int:
            if self.name.startswith(beginning):
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(self, data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    return fill


# The files of a few long tests, begun first so that no worker is left with one at the end while the others wait.
LONG_FILES = ("test_hub_round_trip.py", "test_distributed.py", "test_examples.py", "test_critic_is_right.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG_FILES)))
