# SPDX-License-Identifier: Apache-2.0
"""The replay buffer: what goes in comes out, rows keep their ids, sampling is uniform, nothing reported is lost."""

import errno
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests import tiny_models
from tests.test_trajectory import EPISODES, assert_equal_episodes, make_episode, picture, prompt, train
from vlmq_trl.replay import Priorities, ReplayBuffer, SumTree, load_replay, process_folder
from vlmq_trl.replay import buffer as replay_buffer
from vlmq_trl.replay.contents import draw_segments
from vlmq_trl.replay.offline import PNG_SIGNATURE
from vlmq_trl.rollout import collect_demonstrations
from vlmq_trl.trajectory import (
    Episode,
    TrajectoryError,
    Turn,
    dataset_from_episodes,
    episodes_from_dataset,
    load_trajectories,
    save_trajectories,
    trajectory_features,
    validate_trajectories,
)


def episode(number: int, length: int = 2, pictures: bool = True, truncated: bool = False) -> Episode:
    """Episode "e<number>": its pictures are its own, its first reward is its number."""
    turns = tuple(
        Turn(
            prompt(f"e{number}", int(pictures)),
            [picture(1000 * number + k)] if pictures else [],
            f"e{number}/{k}",
            float(number if k == 0 else 1),
            behavior_logprobs=[-0.1 * k, -0.7],
        )
        for k in range(length)
    )
    final = [picture(1000 * number + 999)] if pictures else []
    return Episode(
        f"e{number}",
        turns,
        not truncated,
        truncated,
        final_prompt=prompt("end", int(pictures)) if truncated else None,
        final_images=final if truncated else None,
    )


def filled(folder: Path, numbers: range, commit_every: int = 1, **kwargs) -> ReplayBuffer:
    """An open buffer with these episodes, of 1, 2, 3, 1, 2, 3, ... turns."""
    buffer = ReplayBuffer(folder, **kwargs)
    for number in numbers:
        buffer.append(episode(number, 1 + number % 3, buffer.with_images), round=number // 10)
        if (number + 1) % commit_every == 0:
            buffer.commit()
    buffer.commit()
    return buffer


def offline_data(pictures: bool = True) -> tuple[datasets.Dataset, object]:
    episodes = EPISODES if pictures else [make_episode(f"t{k}", [0.0, 1.0], images=0) for k in range(3)]
    ds = dataset_from_episodes(episodes)
    return ds, validate_trajectories(ds)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def check_folder(folder: Path) -> None:
    """Exactly the files that the manifest and the live rows need are there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = load_replay(folder).with_format("arrow")[:].to_pylist()
    images = [image["path"] for row in rows for name in ("images", "final_images") for image in row.get(name) or []]
    expected = {"manifest.json", "lock"} | {f"shards/{name}" for name, _, _ in manifest["shards"]}
    assert files(folder) == expected | {os.path.relpath(path, folder) for path in images}


def ids(ds: datasets.Dataset) -> list[str]:
    return list(dict.fromkeys(ds["episode_id"]))


# ---------------------------------------------------------------------------------------------------------------------
# In and out
# ---------------------------------------------------------------------------------------------------------------------


def test_episodes_come_back(tmp_path):
    with ReplayBuffer(tmp_path, gamma=0.5) as buffer:
        for one in EPISODES:
            buffer.append(one, round=0)
        assert buffer.pending_turns == 7 and len(buffer) == buffer.end == 0
        buffer.commit()
        assert buffer.pending_turns == 0 and len(buffer) == buffer.end == buffer.num_online == 7
        assert buffer.num_episodes == 4
    for opened in (ReplayBuffer(tmp_path, gamma=0.5), ReplayBuffer(tmp_path, gamma=0.5, read_only=True)):
        ds = opened.dataset()
        index = validate_trajectories(ds, check_images="all")
        for one, other in zip(EPISODES, episodes_from_dataset(ds), strict=True):
            assert_equal_episodes(one, other)
        rows = np.arange(7)
        assert opened.turn[rows].tolist() == index.turn.tolist()
        assert opened.reward[rows].tolist() == index.reward.tolist()
        assert opened.terminated[rows].tolist() == index.terminated.tolist()
        assert opened.truncated[rows].tolist() == index.truncated.tolist()
        # 0 + 0.5 (0.5 + 0.5 * 1) = 0.5; 0.5 + 0.5 * 1 = 1; -1 + 0.5 * 0.25 = -0.875
        assert opened.return_to_go[rows].tolist() == [0.5, 1.0, 1.0, -0.875, 0.25, -0.5, 0.0]
        assert opened.return_to_go[rows].dtype == np.float64
        assert opened.turn[4] == 1 and opened.turn[np.array([[4], [0]])].tolist() == [[1], [0]]


@pytest.mark.parametrize("pictures", [True, False])
def test_read_gives_what_datasets_gives(tmp_path, pictures):
    buffer = ReplayBuffer(tmp_path, with_images=pictures)
    buffer.add_offline(*offline_data(pictures))
    for number in range(4):
        buffer.append(episode(number, 3, pictures, truncated=number == 2), round=0)
        buffer.commit()
    ds = buffer.dataset()
    rows = [3, 4, 17, 0, 0, 1, 12, 13, 14, 15, 6, 7] if pictures else [5, 6, 7, 0, 14]
    records = buffer.read(rows)
    assert len(records) == len(rows)
    for row, record in zip(rows, records, strict=True):
        expected = {name: ds[row][name] for name in replay_buffer.READ_COLUMNS if name in ds.column_names}
        for name in ("images", "final_images"):
            shown, wanted = record.pop(name, None), expected.pop(name, None)
            assert (shown is None) == (wanted is None)
            for one, other in zip(shown or [], wanted or [], strict=True):
                assert one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))
        assert record == expected
    assert buffer.read([]) == []


def test_read_hands_out_pictures_that_may_be_changed(tmp_path):
    with filled(tmp_path, range(1)) as buffer:
        buffer.read([0])[0]["images"][0].putpixel((0, 0), (1, 2, 3))
        assert np.array_equal(np.asarray(buffer.read([0])[0]["images"][0]), picture(0))


def test_a_picture_is_stored_once(tmp_path):
    buffer = ReplayBuffer(tmp_path)
    for k in range(10):  # offline and online, across commits: pictures 0, 10 and 99
        buffer.append(make_episode(f"e{k}", [0.0, 1.0], truncated=True), round=0)
        buffer.commit()
    assert len(list((tmp_path / "images").rglob("*.png"))) == 3
    check_folder(tmp_path)


def test_a_shard_is_a_trajectory_dataset(tmp_path, monkeypatch):
    with filled(tmp_path, range(6), commit_every=6):
        (shard,) = (tmp_path / "shards").iterdir()
    ds = datasets.Dataset.from_file(str(shard))
    assert ds.features == trajectory_features()
    monkeypatch.chdir(tmp_path)  # pictures are named by their paths below the folder
    assert validate_trajectories(ds, check_images="all").episode_ids.tolist() == [f"e{k}" for k in range(6)]


def test_a_moved_folder_opens(tmp_path):
    with filled(tmp_path / "here", range(5)) as buffer:
        rows = buffer.dataset().with_format("arrow")[:]
    assert all(path.startswith(str(tmp_path / "here")) for path in paths_of(rows))
    shutil.move(tmp_path / "here", tmp_path / "there")
    ds = load_replay(tmp_path / "there")
    assert all(path.startswith(str(tmp_path / "there")) for path in paths_of(ds.with_format("arrow")[:]))
    for number, one in enumerate(episodes_from_dataset(ds)):
        assert_equal_episodes(one, episode(number, 1 + number % 3))


def paths_of(table) -> list[str]:
    return [image["path"] for images in table["images"].to_pylist() for image in images]


@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_a_saved_dataset_needs_no_buffer(tmp_path, file_format):
    with filled(tmp_path / "buffer", range(9), capacity=9) as buffer:
        save_trajectories(buffer.dataset(), tmp_path / "saved", file_format=file_format)
        kept = [int(name[1:]) for name in ids(buffer.dataset())]
    shutil.rmtree(tmp_path / "buffer")
    back = load_trajectories(tmp_path / "saved")
    validate_trajectories(back, check_images="all")
    for number, one in zip(kept, episodes_from_dataset(back), strict=True):
        assert_equal_episodes(one, episode(number, 1 + number % 3))


def test_stock_sft_trains_on_a_replay_buffer(tmp_path):
    ds = collect_demonstrations("vlmq_trl/NumberLine-v0", policy="random", episodes=3, progress=False)
    with ReplayBuffer(tmp_path / "buffer") as buffer:
        buffer.add_offline(ds, validate_trajectories(ds))
    train(*tiny_models.build("idefics3"), load_replay(tmp_path / "buffer"), tmp_path / "out")


def test_the_parts_of_the_dataset(tmp_path):
    with ReplayBuffer(tmp_path) as buffer:
        assert len(buffer.dataset()) == 0
        buffer.add_offline(*offline_data())
        assert len(buffer.dataset("online")) == 0
        buffer.append(episode(1), round=0)
        buffer.commit()
        assert ids(buffer.dataset("offline")) == ["won", "cut", "short", "logprobs"]
        assert ids(buffer.dataset("online")) == ["e1"]
        assert ids(buffer.dataset()) == ["won", "cut", "short", "logprobs", "e1"]
        assert buffer.dataset()._fingerprint != buffer.dataset("online")._fingerprint
        with pytest.raises(ValueError, match="'all', 'online' or 'offline'"):
            buffer.dataset("both")


# ---------------------------------------------------------------------------------------------------------------------
# The offline part
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [True, False])
def test_offline_data_come_back(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(replay_buffer, "OFFLINE_BATCH", 2)
    ds, index = offline_data(pictures)
    for _ in range(2):  # the second time nothing is done
        with ReplayBuffer(tmp_path, with_images=pictures) as buffer:
            buffer.add_offline(ds, index)
            before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path) - {"lock"}}
            buffer.add_offline(ds, index)
            assert {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path) - {"lock"}} == before
            assert buffer.num_offline == buffer.end == len(ds) and buffer.num_online == 0
            assert buffer.num_episodes == len(index)
            for one, other in zip(episodes_from_dataset(ds), episodes_from_dataset(buffer.dataset()), strict=True):
                assert_equal_episodes(one, other)
    check_folder(tmp_path)


def test_offline_data_made_with_other_tools(tmp_path):
    images = [{"bytes": None, "path": str(tmp_path / "photo.jpg")}]
    Image.fromarray(picture(1)).save(tmp_path / "photo.jpg")
    rows = [
        {
            "prompt": [{"role": "user", "content": "look"}],  # TRL shows the images first
            "images": images,
            "completion": [{"role": "assistant", "content": "hi"}],
            "episode_id": "e",
            "turn": k,
            "reward": k,
            "terminated": k == 1,
            "truncated": False,
            "extra": 3,
        }
        for k in range(2)
    ]
    ds = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    chosen = ds.select([0, 1])
    with ReplayBuffer(tmp_path / "buffer") as buffer:
        buffer.add_offline(chosen, validate_trajectories(chosen))
        back = buffer.dataset()
        validate_trajectories(back, check_images="all")
        assert back.features == trajectory_features()
        (one,) = episodes_from_dataset(back)
        assert one.turns[1].prompt == prompt("look") and one.turns[1].reward == 1.0 and one.turns[1].valid
        assert (one.turns[1].action, one.env_id, one.seed) == ("", "", -1)
        decoded = datasets.Image().decode_example(images[0])
        assert np.array_equal(np.asarray(one.turns[0].images[0]), np.asarray(decoded))
        (file,) = (tmp_path / "buffer" / "images").rglob("*.png")
        assert file.read_bytes().startswith(PNG_SIGNATURE)


def test_offline_pictures_of_a_mode_that_png_has_not(tmp_path):
    """A JPEG in CMYK, as some are that were made for print, is valid and shown in RGB."""
    Image.fromarray(picture(1)).convert("CMYK").save(tmp_path / "print.jpg")
    ds, _ = offline_data()
    ds = ds.map(lambda row: {"images": [str(tmp_path / "print.jpg")] * len(row["images"])}, features=ds.features)
    shown = ds[0]["images"][0]
    assert shown.mode == "CMYK"
    with ReplayBuffer(tmp_path / "buffer") as buffer:
        buffer.add_offline(ds, validate_trajectories(ds))
        kept = buffer.read([0])[0]["images"][0]
    assert kept.mode == "RGB" and np.array_equal(np.asarray(kept), np.asarray(shown.convert("RGB")))


def test_offline_data_that_do_not_fit(tmp_path):
    ds, index = offline_data()
    with ReplayBuffer(tmp_path / "a") as buffer:
        buffer.add_offline(ds, index)
        other = dataset_from_episodes([*EPISODES[:3], make_episode("other", [0.0])])
        with pytest.raises(ValueError, match="already holds another offline dataset: use the same dataset"):
            buffer.add_offline(other, validate_trajectories(other))
        reworded = ds.map(lambda row: {"completion": [{"role": "assistant", "content": "changed"}]})
        with pytest.raises(ValueError, match="another offline dataset"):
            buffer.add_offline(reworded, validate_trajectories(reworded))
        with pytest.raises(ValueError, match="validate it"):
            buffer.add_offline(ds, validate_trajectories(ds.select(range(3))))
        with pytest.raises(TrajectoryError, match=r"'won'.*there already"):
            buffer.append(EPISODES[0], round=0)
    with ReplayBuffer(tmp_path / "b") as buffer:
        buffer.append(episode(0), round=0)
        with pytest.raises(ValueError, match="online episodes, and the offline part comes first"):
            buffer.add_offline(ds, index)
    with ReplayBuffer(tmp_path / "c", with_images=False) as buffer:
        with pytest.raises(ValueError, match="dataset has images"):
            buffer.add_offline(ds, index)


def test_text_only_data_in_a_buffer_with_images(tmp_path):
    ds, index = offline_data(pictures=False)
    with ReplayBuffer(tmp_path, with_images=True) as buffer:
        buffer.add_offline(ds, index)
        buffer.append(episode(0), round=0)
        buffer.commit()
        validate_trajectories(buffer.dataset())
        assert buffer.dataset()[0]["images"] == []


# ---------------------------------------------------------------------------------------------------------------------
# Commits, rows and eviction
# ---------------------------------------------------------------------------------------------------------------------


def test_counters_and_rounds(tmp_path):
    buffer = ReplayBuffer(tmp_path)
    assert buffer.round_end(0) is None and buffer.counters == {}
    buffer.append(episode(0), round=0)
    buffer.append(episode(1), round=1)
    buffer.append(episode(2), round=0)
    buffer.commit({"episodes": 3, "tokens": 10})
    assert buffer.round_end(0) == (6, False) and buffer.round_end(1) == (4, False)
    buffer.commit({"episodes": 4}, end_round=0)
    buffer.commit(end_round=2)  # a round without episodes
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    buffer.commit({"episodes": 4}, end_round=0)
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    buffer.append(episode(3), round=1)
    buffer.commit()
    buffer.close()
    with ReplayBuffer(tmp_path) as buffer:
        assert buffer.round_end(0) == (6, True) and buffer.round_end(1) == (8, False)
        assert buffer.round_end(2) == (6, True) and buffer.round_end(3) is None
        assert buffer.counters == {"episodes": 4, "tokens": 10}
        assert json.loads(json.dumps(buffer.manifest())) == json.loads((tmp_path / "manifest.json").read_text())


def test_what_is_pending_is_not_there(tmp_path):
    with filled(tmp_path, range(3)) as buffer:
        buffer.append(episode(7), round=0)
        assert len(load_replay(tmp_path)) == len(buffer) == 6
    with ReplayBuffer(tmp_path) as buffer:
        assert ids(buffer.dataset()) == ["e0", "e1", "e2"]


def test_eviction(tmp_path):
    """Episodes of 1, 2, 3, 1, 2, 3, ... turns; capacity 7.

    After e0..e5 (12 turns) the last 7 are one of e2's three turns, then 1 + 2 + 3: e2 goes as a whole, 6 turns stay.
    Two more turns, and 2 + 3 + 2 stay.
    """
    buffer = ReplayBuffer(tmp_path, capacity=7)
    buffer.add_offline(*offline_data())
    for number in range(6):
        buffer.append(episode(number, 1 + number % 3), round=0)
        buffer.commit()
    assert ids(buffer.dataset("online")) == ["e3", "e4", "e5"]
    assert len(buffer.dataset("offline")) == buffer.num_offline == 7
    assert (buffer.start(), buffer.end, buffer.num_online, buffer.num_episodes) == (13, 19, 6, 7)
    assert buffer.read([12])[0]["completion"][0]["content"] == "e2/2"  # until the next commit
    buffer.append(episode(0), round=0)  # its id is free again
    buffer.commit()
    with pytest.raises(LookupError, match=r"Row 12 .* 0..6 offline and 14..20 online.*sample again"):
        buffer.read([12])
    buffer.close()
    check_folder(tmp_path)
    with ReplayBuffer(tmp_path, capacity=7) as buffer:
        assert (buffer.start(), buffer.end) == (14, 21)
        records = buffer.read([16, 20, 0])
        assert [r["completion"][0]["content"] for r in records] == ["e5/0", "e0/1", "answer 0"]
        assert buffer.is_online([16, 6]).tolist() == [True, False]
        assert buffer.turn[np.array([6, 16, 17, 18, 19, 20])].tolist() == [0, 0, 1, 2, 0, 1]
        for row in (-1, 7, 13, 21):
            with pytest.raises(LookupError, match=f"Row {row} "):
                buffer.read([row])


def test_rows_that_are_gone_take_no_memory(tmp_path):
    """12 episodes of 300 turns beside an offline part, capacity 600: the columns grow anew, without evicted rows."""
    buffer = ReplayBuffer(tmp_path, capacity=600, with_images=False)
    buffer.add_offline(*offline_data(pictures=False))
    for number in range(12):
        buffer.append(episode(number, 300, pictures=False), round=0)
        buffer.commit()
        online = np.arange(buffer.start(), buffer.end)
        assert buffer.turn[online].tolist() == [*range(300)] * (len(online) // 300)
        assert buffer.reward[online[::300]].tolist() == list(range(number + 1))[-2:]
        assert buffer.turn[np.arange(6)].tolist() == [0, 1, 0, 1, 0, 1]
    assert len(buffer._state.columns["turn"]) < 3000 < buffer.end
    buffer.close()


def test_an_episode_over_capacity_stays(tmp_path):
    with ReplayBuffer(tmp_path, capacity=3) as buffer:
        buffer.append(episode(0, 2), round=0)
        buffer.append(episode(1, 9), round=0)
        buffer.commit()
        assert ids(buffer.dataset()) == ["e1"] and buffer.start() == 2


def test_a_picture_that_comes_back_is_kept(tmp_path):
    with ReplayBuffer(tmp_path, capacity=1) as buffer:
        for number in (1, 2, 1, 2, 2, 1):  # evicted by one commit, shown again by the next, which would delete it
            buffer.append(Episode(f"{buffer.end}", episode(number, 1).turns, True, False), round=0)
            buffer.commit()
            (read,) = episodes_from_dataset(buffer.dataset())
            assert np.array_equal(np.asarray(read.turns[0].images[0]), picture(1000 * number))
    check_folder(tmp_path)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=40),
    capacity=st.integers(1, 60),
    commits=st.lists(st.booleans(), min_size=40, max_size=40),
    reopen=st.integers(1, 40),
)
def test_rows_keep_their_ids(lengths, capacity, commits, reopen):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contents: list[str] = []
        buffer = ReplayBuffer(folder, capacity=capacity, with_images=False)
        for k, (length, commit) in enumerate(zip(lengths, commits, strict=False)):
            buffer.append(episode(k, length, pictures=False), round=0)
            contents += [f"e{k}/{turn}" for turn in range(length)]
            if commit or k == len(lengths) - 1:
                buffer.commit()
            if k == reopen and not buffer.pending_turns:
                buffer.close()
                buffer = ReplayBuffer(folder, capacity=capacity, with_images=False)
        rows = range(buffer.start(), buffer.end)
        assert buffer.end == len(contents)
        assert [record["completion"][0]["content"] for record in buffer.read(rows)] == contents[buffer.start() :]
        assert buffer.turn[np.array(rows)].tolist() == [int(contents[row].split("/")[1]) for row in rows]
        assert len(rows) <= max(capacity, lengths[-1])
        older = len(contents[: buffer.start()]) and lengths[len(lengths) - 1 - buffer.num_episodes]
        assert not older or len(rows) + older > capacity
        buffer.close()
        check_folder(folder)


def test_commits_make_few_shards(tmp_path):
    with filled(tmp_path, range(64), with_images=False) as buffer:
        assert len(list((tmp_path / "shards").iterdir())) <= 8
        assert ids(buffer.dataset()) == [f"e{k}" for k in range(64)]
        assert [r["completion"][0]["content"] for r in buffer.read([0, 126])] == ["e0/0", "e63/0"]


def test_bad_episodes(tmp_path):
    good, bad = episode(0), make_episode("bad", [0.0, float("nan")])
    with ReplayBuffer(tmp_path) as buffer:
        buffer.append(good, round=0)
        with pytest.raises(TrajectoryError, match=r"episode 'bad', row 1, column `reward`: the reward is nan") as info:
            buffer.append(bad, round=0)
        assert (info.value.row, info.value.column) == (1, "reward")
        with pytest.raises(TrajectoryError, match=r"episode 'e0'.* is there already"):
            buffer.append(good, round=0)
        with pytest.raises(TrajectoryError, match="'cut', row 0, column `final_prompt`: a truncated episode needs"):
            buffer.append(Episode("cut", episode(1, 1).turns, False, True), round=0)
        wrong = Turn(prompt(), [picture(0)], "a", 0.0, behavior_logprobs=[0.5])
        with pytest.raises(TrajectoryError, match="'wrong', row 0, column `behavior_logprobs`"):
            buffer.append(Episode("wrong", (wrong,), True, False), round=0)
        buffer.commit()
        buffer.append(make_episode("bad", [0.0]), round=0)  # the id was not taken
        buffer.commit()
        assert ids(buffer.dataset()) == ["e0", "bad"]
        validate_trajectories(buffer.dataset(), check_images="all")
    with ReplayBuffer(tmp_path / "text", with_images=False) as buffer:
        with pytest.raises(TrajectoryError, match=r"'e0'.*an image in a text-only dataset"):
            buffer.append(good, round=0)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("online_fraction", [0.0, 0.5, 1.0])
def test_every_turn_is_equally_likely(tmp_path, online_fraction):
    """Segments of up to 4 in episodes of 1, 2, 3, 9 and 12 turns, offline and online, 7 turns a batch."""
    lengths = [1, 2, 3, 9, 12]
    ds = dataset_from_episodes([make_episode(f"o{k}", [0.0] * n, images=0) for k, n in enumerate(lengths)])
    with ReplayBuffer(tmp_path, with_images=False) as buffer:
        buffer.add_offline(ds, validate_trajectories(ds))
        for k, n in enumerate(lengths):
            buffer.append(episode(k, n, pictures=False), round=0)
        buffer.commit()
        rng, batches = np.random.default_rng(0), 8_000
        drawn = np.concatenate([buffer.sample(rng, 7, 4, online_fraction) for _ in range(batches)])
    counts = np.bincount(drawn, minlength=54)
    for part, share in ((counts[:27], 1 - online_fraction), (counts[27:], online_fraction)):
        expected = batches * 7 * share / 27
        # A turn is drawn at most once a block: a count's variance is at most that of `expected` turns, four times for
        # those that come together. 27 counts within 4.5 deviations.
        assert np.abs(part - expected).max() <= 4.5 * np.sqrt(expected), part / max(expected, 1)
    assert abs(counts[27:].sum() / counts.sum() - online_fraction) < 0.01


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    segment_length=st.integers(1, 10),
    turns=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_segments_are_consecutive_turns_of_one_episode(lengths, segment_length, turns, seed):
    with tempfile.TemporaryDirectory() as folder, ReplayBuffer(folder, with_images=False) as buffer:
        for k, n in enumerate(lengths):
            buffer.append(episode(k, n, pictures=False), round=0)
        buffer.commit()
        rng = np.random.default_rng(seed)
        segments = draw_segments(buffer._state, rng, partial(rng.integers, 0, buffer.end), turns, segment_length)
        assert segments[:, 1].sum() == turns and segments[:, 1].min() >= 1
        assert segments[:, 1].max() <= segment_length
        episode_of = np.repeat(np.arange(len(lengths)), lengths)
        assert (episode_of[segments[:, 0]] == episode_of[segments.sum(1) - 1]).all()

        # A batch is such segments, in random order.
        rng = np.random.default_rng(seed)
        rng.random()  # for the fraction
        draw = partial(rng.integers, 0, buffer.end)
        segments = rng.permutation(draw_segments(buffer._state, rng, draw, turns, segment_length))
        rows = buffer.sample(np.random.default_rng(seed), turns, segment_length, 0.3)
        assert rows.tolist() == [row for first, size in segments for row in range(first, first + size)]


def test_cuts_fall_everywhere(tmp_path):
    """An episode of 3 turns, segments of up to 2: [0 1][2] or [0][1 2], four segments, each as likely."""
    with ReplayBuffer(tmp_path, with_images=False) as buffer:
        buffer.append(episode(0, 3, pictures=False), round=0)
        buffer.commit()
        rng = np.random.default_rng(0)
        segments = draw_segments(buffer._state, rng, partial(rng.integers, 0, 3), 6_001, 2)
        found, counts = np.unique(segments[:-1], axis=0, return_counts=True)  # the last one had to fit
        assert found.tolist() == [[0, 1], [0, 2], [1, 2], [2, 1]]
        # 6000 turns in segments of 1.5 on average: 1000 of each, with a deviation of about 27
        assert np.abs(counts - 1000).max() < 120, counts


def test_a_segment_spans_shards_of_its_row_ids_only(tmp_path):
    with filled(tmp_path, range(40), with_images=False) as buffer:
        drawn = buffer.sample(np.random.default_rng(1), 300, 3, 1.0)
        names = [record["completion"][0]["content"] for record in buffer.read(drawn)]
        for (row, name), (after, following) in pairwise(zip(drawn.tolist(), names, strict=True)):
            if after == row + 1 and buffer.turn[after] > 0:
                assert following.split("/") == [name.split("/")[0], str(int(name.split("/")[1]) + 1)]


def test_the_window_and_the_fraction(tmp_path):
    with filled(tmp_path, range(10), capacity=12, with_images=False) as buffer:  # e0..e9: 19 turns
        rng = np.random.default_rng(0)
        # e4..e9: 2 + 3 + 1 + 2 + 3 + 1 = 12 turns
        assert (buffer.start(), buffer.end) == (7, 19)
        assert set(buffer.sample(rng, 500, 4, 0.25)) == set(range(7, 19))
        # e4 and e5 end at row 12
        assert buffer.start(12) == 7 and set(buffer.sample(rng, 200, 4, 1.0, end=12)) == set(range(7, 12))
        assert buffer.start(7) == 7
        with pytest.raises(LookupError, match="Row 6 is not in the replay buffer"):
            buffer.sample(rng, 4, 4, 1.0, end=7)  # what was collected until then is gone
        with pytest.raises(ValueError, match="empty"):
            buffer.sample(rng, 4, 4, 1.0, end=0)  # nothing was collected until then
        for end in (11, 20, -1):
            with pytest.raises(ValueError, match=f"ends at row {end}: give an episode's end in 0..19"):
                buffer.start(end)
        for arguments in ((0, 4, 0.5), (4, 0, 0.5), (4, 4, 1.5)):
            with pytest.raises(ValueError, match="at least 1 and the fractions in"):
                buffer.sample(rng, *arguments)


class SlowTree:
    """What a `SumTree` should be: a number for each row."""

    def __init__(self):
        self.values: dict[int, float] = {}

    def cover(self, start, end):
        new = max(self.values.values(), default=0.0) or 1.0
        self.values = {row: self.values.get(row, new) for row in range(start, end)}

    def update(self, rows, values):
        self.values |= {row: value for row, value in zip(rows, values, strict=True) if row in self.values}


@given(data=st.data())
@settings(deadline=None)
def test_priorities_are_what_was_set_wherever_the_window_goes(data):
    fast, slow, start, end = SumTree(), SlowTree(), 0, 0
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            end += data.draw(st.integers(0, 20))
            start = data.draw(st.integers(start, end))
            fast.cover(start, end)
            slow.cover(start, end)
        else:
            rows = data.draw(st.lists(st.integers(0, 60), unique=True))
            values = [data.draw(st.sampled_from([0.0, 0.5, 3.0])) for _ in rows]
            fast.update(np.array(rows, dtype=np.int64), np.array(values))
            slow.update(rows, values)
    kept = list(slow.values)
    assert (fast.start, fast.end) == (start, end)
    assert fast[np.array(kept, dtype=np.int64)].tolist() == list(slow.values.values())
    assert fast.total == sum(slow.values.values())
    if fast.total:
        drawn = fast.draw(np.random.default_rng(0), 200)
        assert all(slow.values[row] > 0 for row in drawn.tolist())
    file, whole, again = io.BytesIO(), Priorities(), Priorities()
    whole.online = fast
    whole.save(file)
    file.seek(0)
    again.load(file)
    assert (again.offline.start, again.offline.end, again.offline.total) == (0, 0, 0)
    assert (again.online.start, again.online.end, again.online.total) == (start, end, fast.total)
    if fast.total:
        assert again.online.draw(np.random.default_rng(0), 200).tolist() == drawn.tolist()


def test_rows_are_drawn_in_proportion_to_their_priorities():
    priorities = SumTree()
    priorities.cover(10, 15)
    priorities.update(np.array([10, 11, 12, 13, 14]), np.array([0.0, 1.0, 2.0, 0.0, 5.0]))
    rows, counts = np.unique(priorities.draw(np.random.default_rng(0), 80_000), return_counts=True)
    assert rows.tolist() == [11, 12, 14]
    assert np.abs(counts / 10_000 - [1, 2, 5]).max() < 0.06  # of deviations below 0.014


def test_part_of_a_batch_goes_by_priority(tmp_path):
    with filled(tmp_path, range(10), with_images=False) as buffer:  # e0..e9: 1, 2, 3, 1, ... turns
        episode_of = np.cumsum(buffer.turn[np.arange(len(buffer))] == 0) - 1
        priorities, rng = Priorities(), np.random.default_rng(0)
        priorities.online.cover(0, len(buffer))
        priorities.update(np.arange(len(buffer)), np.where(np.arange(len(buffer)) == 4, 2.0, 0.0))

        def drawn(share: float) -> np.ndarray:
            arguments = {"priorities": priorities, "prioritized_fraction": share}
            return np.concatenate([buffer.sample(rng, 8, 4, 1.0, **arguments) for _ in range(100)])

        # All of the surprising turn's episode, and nothing else; cut short only where a batch is full.
        rows = drawn(1.0)
        assert set(episode_of[rows]) == {episode_of[4]}
        counts = np.bincount(episode_of[drawn(0.5)], minlength=10)
        assert counts.sum() == 800 and counts[episode_of[4]] > 400 and (counts > 0).all()
        # Where nothing surprises any more, every turn is as likely as any other.
        priorities.update(np.array([4]), np.array([0.0]))
        assert set(drawn(1.0)) == set(range(len(buffer)))
        with pytest.raises(ValueError, match="fractions in"):
            drawn(1.5)


def test_a_part_that_is_empty_gives_its_share(tmp_path):
    with ReplayBuffer(tmp_path, with_images=False) as buffer:
        rng = np.random.default_rng(0)
        with pytest.raises(ValueError, match="empty: add offline data, or append episodes and commit"):
            buffer.sample(rng, 4, 4, 0.5)
        buffer.add_offline(*offline_data(pictures=False))
        assert not buffer.is_online(buffer.sample(rng, 30, 4, 1.0)).any()
        buffer.append(episode(0, pictures=False), round=0)
        buffer.commit()
        # 3 turns, half of them online: one or two, equally often
        online = [int(buffer.is_online(buffer.sample(rng, 3, 4, 0.5)).sum()) for _ in range(400)]
        assert set(online) == {1, 2} and 150 < online.count(1) < 250


# ---------------------------------------------------------------------------------------------------------------------
# One writer, many readers, and what goes wrong
# ---------------------------------------------------------------------------------------------------------------------


def test_one_writer_at_a_time(tmp_path):
    with filled(tmp_path, range(2)):
        with pytest.raises(RuntimeError, match=rf"process {os.getpid()}\): one writer at a time.*read_only=True"):
            ReplayBuffer(tmp_path)
        assert len(load_replay(tmp_path)) == 3
    ReplayBuffer(tmp_path).close()


def test_read_only(tmp_path):
    with pytest.raises(FileNotFoundError, match="No replay buffer"):
        ReplayBuffer(tmp_path / "nothing", read_only=True)
    assert not (tmp_path / "nothing").exists()
    filled(tmp_path, range(3)).close()
    (tmp_path / "shards" / "left over.arrow").touch()
    before = files(tmp_path)
    reader = ReplayBuffer(tmp_path, read_only=True)
    for write in (lambda: reader.append(episode(9), round=0), reader.commit):
        with pytest.raises(RuntimeError, match="opened read-only"):
            write()
    reader.close()
    assert files(tmp_path) == before
    with ReplayBuffer(tmp_path) as writer:  # the reader sees what there was when it was opened
        assert "shards/left over.arrow" not in files(tmp_path)
        writer.append(episode(9), round=0)
        writer.commit()
        assert (reader.end, writer.end) == (6, 8)
    with pytest.raises(RuntimeError, match="was closed"):
        writer.commit()


def test_a_reader_that_opens_while_the_writer_goes_on(tmp_path, monkeypatch):
    """Between reading the manifest and opening its shards, the writer evicts them."""
    writer = filled(tmp_path, range(3), capacity=3)
    opened = []

    def slow(path: Path, first: int):
        opened.append(path)
        if len(opened) == 1:
            monkeypatch.setattr(replay_buffer, "open_shard", open_shard)
            writer.append(episode(5, 3), round=0)
            writer.commit()
            monkeypatch.setattr(replay_buffer, "open_shard", slow)
        return open_shard(path, first)

    open_shard = replay_buffer.open_shard
    monkeypatch.setattr(replay_buffer, "open_shard", slow)
    assert ids(load_replay(tmp_path)) == ["e5"] and len(opened) == 2
    writer.commit({"n": 1})
    (shard,) = (tmp_path / "shards").iterdir()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="arrow"):  # really gone
        load_replay(tmp_path)


def test_a_forked_child_holds_no_lock(tmp_path):
    buffer = filled(tmp_path, range(2))

    def child() -> None:
        assert len(buffer.read([0, 1])) == 2
        with pytest.raises(RuntimeError, match="opened by the parent"):
            buffer.commit({"n": 1})
        os.write(write, b"ready")
        time.sleep(60)

    read, write = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read(5) == b"ready"
    buffer.close()
    ReplayBuffer(tmp_path).close()
    process.kill()
    process.join()


def test_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        ReplayBuffer(tmp_path / "a", capacity=0)
    ReplayBuffer(tmp_path / "b", with_images=False).close()
    with pytest.raises(ValueError, match=r"without images, but with_images=True: use another folder"):
        ReplayBuffer(tmp_path / "b", with_images=True)
    assert not ReplayBuffer(tmp_path / "b").with_images  # and the lock was given back
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "images").mkdir()
    with pytest.raises(FileExistsError, match="holds images: give the replay buffer a folder of its own"):
        ReplayBuffer(tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="another version"):
        ReplayBuffer(tmp_path / "d")


@pytest.mark.parametrize("failing", range(5))  # a picture, a picture, the shard, its folder, the manifest
def test_a_full_disk(tmp_path, monkeypatch, failing):
    buffer = filled(tmp_path, range(4), capacity=8)
    before, rows = buffer.manifest(), buffer.end
    buffer.append(episode(7, 2), round=3)
    calls, fsync = [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(replay_buffer, "WRITERS", 1)
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"full.*needs [\d.]+ MB more and has.*2 pending turns.*make room") as info:
            buffer.commit({"n": 1})
        assert info.value.errno == errno.ENOSPC and str(tmp_path) in str(info.value)
        assert buffer.manifest() == json.loads((tmp_path / "manifest.json").read_text()) == before
        validate_trajectories(load_replay(tmp_path), check_images="all")
        assert buffer.pending_turns == 2 and buffer.end == rows
    buffer.append(episode(8, 1), round=3)
    buffer.commit({"n": 1})
    assert ids(buffer.dataset()) == ["e2", "e3", "e7", "e8"]  # 3 + 1 + 2 + 1 turns
    validate_trajectories(buffer.dataset(), check_images="all")
    buffer.close()
    ReplayBuffer(tmp_path, capacity=8).close()
    check_folder(tmp_path)


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    with filled(tmp_path, range(1)) as buffer:
        buffer.append(episode(1), round=0)

        def broken(descriptor: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            with pytest.raises(OSError, match="Input/output error"):
                buffer.commit()
        buffer.commit()
        assert ids(buffer.dataset()) == ["e0", "e1"]


def test_a_commit_that_is_interrupted_anywhere_can_be_gone_on_with(tmp_path, monkeypatch):
    """At each call that it makes, before and after its rows are part of the buffer: none is lost, none is there twice,
    and no picture goes that a row needs."""
    calls, interrupted_call = 0, None

    def interruptible(function):
        def called(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == interrupted_call:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return called

    for name in ("write_file", "flush", "pictures_of", "ids_of", "open_shard"):
        monkeypatch.setattr(replay_buffer, name, interruptible(getattr(replay_buffer, name)))
    monkeypatch.setattr(ReplayBuffer, "_delete", interruptible(ReplayBuffer._delete))
    for number in itertools.count(1):
        interrupted_call = None
        with filled(tmp_path / str(number), range(8), capacity=8) as buffer:
            for k in (8, 9):
                buffer.append(episode(k, 1 + k % 3), round=3)
            calls, interrupted_call = 0, number
            with suppress(KeyboardInterrupt):
                buffer.commit()
            done, interrupted_call = calls < number, None
            buffer.commit(end_round=3)
            assert buffer.pending_turns == 0 and buffer.end == 19 and buffer.round_end(3) == (19, True)
            assert ids(buffer.dataset()) == ["e6", "e7", "e8", "e9"]
            for k in (20, 21):
                buffer.append(episode(k, 3), round=4)
                buffer.commit()
                assert validate_trajectories(buffer.dataset(), "all").episode_ids.tolist()[-1] == f"e{k}"
        ReplayBuffer(tmp_path / str(number)).close()
        check_folder(tmp_path / str(number))
        if done:
            break
    assert number > 12


def test_what_cannot_be_deleted_does_not_stop_a_commit(tmp_path, monkeypatch):
    def refused(path, missing_ok=False):
        raise PermissionError(f"{path} is held open")

    with monkeypatch.context() as patch, filled(tmp_path, range(6), capacity=4) as buffer:
        patch.setattr(Path, "unlink", refused)
        buffer.append(episode(6, 3), round=1)
        buffer.commit()
        assert ids(buffer.dataset()) == ["e6"]
    ReplayBuffer(tmp_path).close()
    check_folder(tmp_path)


def test_numbers_of_numpy_are_numbers(tmp_path):
    with ReplayBuffer(tmp_path, capacity=np.int64(3), with_images=False) as buffer:
        for k in range(4):
            buffer.append(episode(k, 2, False), round=np.int64(k))
            buffer.commit({"next": np.int64(k)}, end_round=np.int64(k))
    with ReplayBuffer(tmp_path) as buffer:
        assert buffer.counters == {"next": 3} and buffer.round_end(3) == (8, True)


def test_a_foreign_file_among_the_pictures(tmp_path):
    filled(tmp_path, range(2)).close()
    (tmp_path / "images" / ".DS_Store").write_bytes(b"a file manager was here")
    with ReplayBuffer(tmp_path) as buffer:
        assert ids(buffer.dataset()) == ["e0", "e1"]


def test_a_changed_response_anywhere_is_seen(tmp_path):
    """Of more rows than are looked at whole."""
    whole = [episode(k, 1) for k in range(100)]
    one = dataset_from_episodes(whole)
    with ReplayBuffer(tmp_path) as buffer:
        buffer.add_offline(one, validate_trajectories(one))
        for k in (1, 35, 98):
            turns = (replace(whole[k].turns[0], completion="mended"),)
            two = dataset_from_episodes([*whole[:k], replace(whole[k], turns=turns), *whole[k + 1 :]])
            with pytest.raises(ValueError, match="already holds another offline dataset"):
                buffer.add_offline(two, validate_trajectories(two))


def test_a_lost_picture_is_not_told_as_evicted(tmp_path):
    with filled(tmp_path, range(3)) as buffer:
        for path in tmp_path.glob("images/*/*"):
            path.unlink()
        with pytest.raises(FileNotFoundError, match="images"):
            buffer.read([0])


@pytest.mark.parametrize("changed", ["behavior_logprobs", "images", "final_prompt"])
def test_changed_offline_data_are_not_taken_for_the_old(changed, tmp_path):
    """Though ids, rewards and texts are as before."""
    whole = [episode(k, 2, truncated=True) for k in range(3)]
    turn = whole[1].turns[1]
    other = {
        "behavior_logprobs": {"turns": (whole[1].turns[0], replace(turn, behavior_logprobs=None))},
        "images": {"turns": (whole[1].turns[0], replace(turn, images=[picture(7)]))},
        "final_prompt": {"final_prompt": prompt("another end", 1)},
    }[changed]
    one = dataset_from_episodes(whole)
    two = dataset_from_episodes([whole[0], replace(whole[1], **other), whole[2]])
    with ReplayBuffer(tmp_path) as buffer:
        buffer.add_offline(one, validate_trajectories(one))
        buffer.add_offline(dataset_from_episodes(whole), validate_trajectories(one))  # the same again
        with pytest.raises(ValueError, match="already holds another offline dataset"):
            buffer.add_offline(two, validate_trajectories(two))


def test_a_writer_and_a_reader_in_one_process(tmp_path):
    buffer = filled(tmp_path, range(30), capacity=60)
    failures: list[BaseException] = []
    done = threading.Event()

    def write() -> None:
        try:
            for number in range(30, 100):
                buffer.append(episode(number, 1 + number % 3), round=0)
                if number % 2:
                    buffer.commit({"episodes": number})
                    time.sleep(0.005)
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=write)
    thread.start()
    rng, batches, missed = np.random.default_rng(0), 0, 0
    first = np.cumsum([0] + [1 + number % 3 for number in range(100)])
    while not done.is_set():
        try:
            rows = buffer.sample(rng, 8, 3, 1.0)
            records = buffer.read(rows)
        except LookupError:  # two commits came between
            missed += 1
            continue
        batches += 1
        for row, record in zip(rows.tolist(), records, strict=True):
            number = int(np.searchsorted(first, row, side="right")) - 1
            assert record["completion"][0]["content"] == f"e{number}/{row - first[number]}"
            assert np.array_equal(np.asarray(record["images"][0]), picture(1000 * number + row - first[number]))
            assert buffer.turn[row] == row - first[number]
    thread.join()
    assert not failures and batches > 20 and missed < batches
    buffer.close()
    check_folder(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Killed at any instant
# ---------------------------------------------------------------------------------------------------------------------

CAPACITY = 24


def play_on(folder: Path, report: int, steps: int | None) -> None:
    """A collector's life: goes on where the buffer ends and reports what it has committed. Dies at its `steps`-th
    flush, renaming or deletion of a file, if it is not killed before."""
    if steps is not None:
        left = steps

        def counted(function):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        os.fsync, os.replace, Path.unlink = counted(os.fsync), counted(os.replace), counted(Path.unlink)
    buffer = ReplayBuffer(folder, capacity=CAPACITY)
    first = buffer.counters.get("next", 0)
    for number in range(first, first + 100_000):
        buffer.append(episode(number, 1 + number % 3), round=0)
        if number % 4 in (0, 1):
            buffer.commit({"next": number + 1})
            os.write(report, f"{number}\n".encode())


def die(folder: Path, *, steps: int | None = None, seconds: float = 60.0) -> int:
    """Lets a collector play on until it is killed; the last episode that it reported, or -1."""
    read, write = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=play_on, args=(folder, write, steps))
    process.start()
    os.close(write)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with os.fdopen(read) as pipe:
        return max(map(int, pipe.read().split()), default=-1)


def check_survivors(folder: Path, reported: int) -> None:
    """All that was reported and is not over capacity is there, once, readable; so much the opening leaves too."""
    for opened in (ReplayBuffer(folder, capacity=CAPACITY, read_only=True), ReplayBuffer(folder, capacity=CAPACITY)):
        newest = opened.counters.get("next", 0) - 1
        assert newest >= reported
        if newest >= 0:
            found = [int(name[1:]) for name in ids(opened.dataset())]
            assert found == list(range(found[0], newest + 1))
            older = 0 if found[0] == 0 else 1 + (found[0] - 1) % 3
            assert not older or opened.num_online + older > CAPACITY
            validate_trajectories(opened.dataset(), check_images="all")
            assert len(opened.read(range(opened.start(), opened.end))) == opened.num_online <= CAPACITY
        opened.close()
    check_folder(folder)


def test_killed_at_each_step_of_a_commit(tmp_path):
    """The steps between two reports are a dozen or two; after some commits with evictions, each is the last once."""
    with filled(tmp_path / "start", range(20), capacity=CAPACITY) as buffer:
        buffer.commit({"next": 20})
    for steps in range(0, 60, 3):
        folder = tmp_path / str(steps)
        shutil.copytree(tmp_path / "start", folder)
        check_survivors(folder, die(folder, steps=steps))


@pytest.mark.parametrize("kills", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_killed_at_random_instants(tmp_path, kills):
    rng, reported = np.random.default_rng(kills), -1
    for _ in range(kills):
        reported = max(reported, die(tmp_path, seconds=rng.uniform(0.0, 0.3)))
        if (tmp_path / "manifest.json").exists():
            check_survivors(tmp_path, reported)
    assert reported > CAPACITY


def test_several_processes_have_a_part_each(tmp_path):
    assert process_folder(tmp_path / "one", 0, 1) == tmp_path / "one"
    for k in range(2):
        with ReplayBuffer(process_folder(tmp_path / "two", k, 2), with_images=False) as buffer:
            buffer.append(episode(k, pictures=False), round=1)
            buffer.commit()
    assert load_replay(tmp_path / "two")["episode_id"] == ["e0", "e0", "e1", "e1"]
    for n in (1, 3):
        with pytest.raises(ValueError, match=rf"of a run with 2 process\(es\), and this one has {n}"):
            process_folder(tmp_path / "two", 0, n)
    with ReplayBuffer(tmp_path / "one", with_images=False):
        pass
    with pytest.raises(ValueError, match=r"of a run with 1 process\(es\), and this one has 2"):
        process_folder(tmp_path / "one", 0, 2)
