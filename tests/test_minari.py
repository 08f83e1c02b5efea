# SPDX-License-Identifier: Apache-2.0
"""Minari: exact round trips, sets of others, and what cannot be read."""

import json
import os
import re
import runpy
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import datasets
import gymnasium
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from PIL import Image
from trl import SFTConfig, SFTTrainer

import vlmq_trl.minari
from tests import tiny_models
from vlmq_trl import (
    CallableFormat,
    Episode,
    JSONCoTFormat,
    JSONFormat,
    PlainFormat,
    TrajectoryError,
    Turn,
    collect_demonstrations,
    concatenate_trajectories,
    dataset_from_episodes,
    episodes_from_dataset,
    load_trajectories,
    save_trajectories,
    trajectories_from_minari,
    trajectories_to_minari,
    validate_trajectories,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def picture(value: int, size=(5, 7)) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 256, (*size, 3), dtype=np.uint8)


def prompt(text: str = "Play.", images: int = 1) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


def episode(name: str, turns: list[Turn], truncated: bool = False, terminated: bool | None = None, **rest) -> Episode:
    return Episode(name, tuple(turns), not truncated if terminated is None else terminated, truncated, **rest)


def one_picture() -> list[Episode]:
    """Exactly one picture of one size everywhere."""
    turns = [Turn(prompt(f"turn {k}"), [picture(k)], f'{{"action": "{k}"}}', k / 3, f"{k}") for k in range(3)]
    return [
        episode("won", turns, env_id="Some/Env-v0", seed=3),
        episode(
            "cut", turns[:2], truncated=True, final_prompt=prompt("end"), final_images=[picture(9)], seed=2**63 - 1
        ),
        episode("both", turns[:1], True, True, final_prompt=prompt("end"), final_images=[picture(8)]),
        episode("no final", turns[1:], truncated=True),
    ]


def anything() -> list[Episode]:
    """Several pictures, none, other sizes and modes, history, Unicode, NUL, log-probabilities."""
    history = [
        {"role": "system", "content": [{"type": "text", "text": "Sei brav — 手番\u0000"}]},
        *prompt("first", 1),
        {"role": "assistant", "content": [{"type": "text", "text": '👍\n\t"quoted" \\ é\u0000'}]},
        *prompt("second", 2),
    ]
    grey, palette = Image.fromarray(picture(1)).convert("L"), Image.fromarray(picture(2)).convert("P")
    return [
        episode("ünïcödé/1", [Turn(history, [picture(1), picture(2, (3, 4)), grey], "é👍\u0000", -0.1, "é👍", False)]),
        episode("none", [Turn(prompt("", 0), [], "", 1e-30, "", False, [-0.1, -1e-7, -33.3, 0.0])], seed=0),
        episode("palette", [Turn(prompt(), [palette], "a\u0000", 3e38)], True, final_prompt=prompt("x", 0)),
        episode("alpha", [Turn(prompt(), [Image.fromarray(picture(3)).convert("RGBA")], " a ", -1.0, "a")]),
    ]


def text_only() -> list[Episode]:
    turns = [Turn([{"role": "user", "content": f"¿{k}?"}], [], f"{k}", float(k), f"{k}") for k in range(2)]
    return [
        episode("t", turns),
        episode("cut", turns, True, final_prompt=[{"role": "user", "content": "end"}]),
    ]


def same(one: datasets.Dataset, other: datasets.Dataset) -> bool:
    """Every column, its type, every value, and every byte of every picture."""
    return one.features == other.features and one.data.table.equals(other.data.table)


# Our own sets, there and back.


@pytest.mark.parametrize("data_format", ["parquet", "arrow"])
@pytest.mark.parametrize("make", [one_picture, anything, text_only])
def test_round_trip_is_exact(make, data_format):
    ds = dataset_from_episodes(make())
    written = trajectories_to_minari(ds, "some/set-v0", data_format=data_format)
    assert written.total_episodes == len(make()) and written.total_steps == len(ds)
    assert same(trajectories_from_minari(written), ds)
    assert same(trajectories_from_minari("some/set-v0"), ds)


@pytest.mark.parametrize("pictures", ["array", "png"])
def test_both_ways_to_hold_pictures_are_exact(pictures):
    ds = dataset_from_episodes(one_picture())
    written = trajectories_to_minari(ds, "set-v0", pictures=pictures)
    assert ("image" in written.observation_space.spaces) == (pictures == "array")
    assert same(trajectories_from_minari(written), ds)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA"])
def test_other_modes_of_pictures_are_kept(mode):
    """One picture of one size in each prompt, but no RGB: an array cannot hold it."""
    turns = [Turn(prompt(), [Image.fromarray(picture(k)).convert(mode)], "a", 0.0) for k in range(2)]
    ds = dataset_from_episodes([episode("x", turns)])
    written = trajectories_to_minari(ds, "set-v0")
    assert "pictures" in written.observation_space.spaces and same(trajectories_from_minari(written), ds)


def test_other_picture_files_keep_their_pixels(tmp_path):
    """A set whose pictures are JPEGs, or files of their own, comes back with the same pixels, as PNGs."""
    Image.fromarray(picture(1, (40, 40))).save(tmp_path / "one.jpg")
    row = dataset_from_episodes([one_picture()[0]])[0]
    row |= {"images": [str(tmp_path / "one.jpg")], "terminated": True}
    ds = datasets.Dataset.from_list([row], features=dataset_from_episodes(one_picture()).features)
    for name, pictures in (("a-v0", "array"), ("b-v0", "png")):
        back = trajectories_from_minari(trajectories_to_minari(ds, name, pictures=pictures))
        shown = np.asarray(Image.open(tmp_path / "one.jpg"))
        assert back[0]["images"][0].format == "PNG" and np.array_equal(np.asarray(back[0]["images"][0]), shown)
        assert back.remove_columns("images")[0] == ds.remove_columns("images")[0]


def test_a_mode_that_png_has_not_becomes_rgb(tmp_path):
    Image.fromarray(picture(1, (40, 40))).convert("CMYK").save(tmp_path / "print.jpg")
    row = dataset_from_episodes([one_picture()[0]])[0] | {"images": [str(tmp_path / "print.jpg")], "terminated": True}
    ds = datasets.Dataset.from_list([row], features=dataset_from_episodes(one_picture()).features)
    assert ds[0]["images"][0].mode == "CMYK" and len(validate_trajectories(ds)) == 1
    back = trajectories_from_minari(trajectories_to_minari(ds, "set-v0"))
    shown = ds[0]["images"][0].convert("RGB")
    assert np.array_equal(np.asarray(back[0]["images"][0]), np.asarray(shown))


def test_pictures_are_turned_as_their_files_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(1, (32, 48))).save(tmp_path / "one.jpg", exif=exif)
    row = dataset_from_episodes([one_picture()[0]])[0] | {"images": [str(tmp_path / "one.jpg")], "terminated": True}
    ds = datasets.Dataset.from_list([row], features=dataset_from_episodes(one_picture()).features)
    shown = np.asarray(ds[0]["images"][0])
    assert shown.shape == (48, 32, 3)
    for name, pictures in (("a-v0", "array"), ("b-v0", "png")):
        back = trajectories_from_minari(trajectories_to_minari(ds, name, pictures=pictures))
        assert np.array_equal(np.asarray(back[0]["images"][0]), shown)


def test_large_pictures_are_no_arrays_of_themselves(monkeypatch):
    monkeypatch.setattr(vlmq_trl.minari, "LARGEST_ARRAY", 5 * 7 - 1)
    ds = dataset_from_episodes(one_picture())
    assert "pictures" in trajectories_to_minari(ds, "auto-v0").observation_space.spaces
    assert "image" in trajectories_to_minari(ds, "array-v0", pictures="array").observation_space.spaces


@pytest.mark.parametrize(
    "missing",
    [
        ["action", "valid", "behavior_logprobs", "env_id", "seed"],
        ["final_prompt", "final_images"],
        ["final_images"],
        ["behavior_logprobs"],
    ],
)
def test_missing_optional_columns_stay_missing(missing):
    episodes = one_picture() if missing[0] != "final_images" else [one_picture()[0]]
    ds = dataset_from_episodes(episodes).remove_columns(missing)
    back = trajectories_from_minari(trajectories_to_minari(ds, "set-v0"))
    assert back.column_names == ds.column_names and back.to_list() == ds.to_list()


def test_streams_and_selections(tmp_path):
    ds = dataset_from_episodes(anything())
    save_trajectories(ds, tmp_path / "ds", file_format="parquet")
    stream = load_trajectories(tmp_path / "ds", streaming=True)
    assert same(trajectories_from_minari(trajectories_to_minari(stream, "stream-v0")), ds)
    bare = datasets.IterableDataset.from_generator(lambda: iter(list(ds)))
    typed = datasets.IterableDataset.from_generator(lambda: iter(list(ds)), features=ds.features)
    for name, stream in (("bare-v0", bare), ("typed-v0", typed)):
        assert same(trajectories_from_minari(trajectories_to_minari(stream, name)), ds)
    chosen = ds.select([1, 3])
    back = trajectories_from_minari(trajectories_to_minari(chosen, "chosen-v0"))
    assert back.to_list() == chosen.to_list() and back["episode_id"][:] == ["none", "alpha"]


def test_what_others_see():
    """An ordinary Minari dataset: observations and actions lie in its spaces, T + 1 observations, flags, seeds."""
    written = trajectories_to_minari(
        dataset_from_episodes(one_picture()), "set-v0", author="A", description="D", data_format="arrow"
    )
    assert written.storage.metadata["author"] == {"A"} and written.storage.metadata["description"] == "D"
    assert written.storage.metadata["dataset_size"] == written.storage.get_size()
    assert written.storage.jpeg_encoding is False
    won, cut, both, _ = written.iterate_episodes()
    assert won.observations["image"].shape == (4, 5, 7, 3) and len(won.observations["prompt"]) == 4
    assert np.array_equal(won.observations["image"][1], picture(1)) and not won.observations["image"][3].any()
    assert np.array_equal(cut.observations["image"][2], picture(9))
    assert json.loads(cut.observations["prompt"][2]) == prompt("end") and won.observations["prompt"][3] == "[]"
    assert won.actions == ['{"action": "0"}', '{"action": "1"}', '{"action": "2"}']
    assert won.rewards.tolist() == [0.0, np.float32(1 / 3), np.float32(2 / 3)]
    assert (won.terminations.tolist(), won.truncations.tolist()) == ([False, False, True], [False] * 3)
    assert (both.terminations.tolist(), both.truncations.tolist()) == ([True], [True])
    assert [data.get("seed") for data in written.storage.get_episode_metadata(range(3))] == [3, 2**63 - 1, None]
    for data in (won, cut):
        for step in range(len(data)):
            seen = {key: values[step] for key, values in data.observations.items()}
            assert written.observation_space.contains(seen) and written.action_space.contains(data.actions[step])
    assert len(won.infos["vlmq_trl"]) == 4 and json.loads(won.infos["vlmq_trl"][0])["action"] == "0"


def test_parts_of_a_set():
    """Minari's own selections of episodes come back exactly."""
    turn = Turn(prompt(), [picture(4, (40, 40))], "a", 0.5, "a")
    ds = dataset_from_episodes([episode("x", [turn]), episode("y", [turn, turn])])
    written = trajectories_to_minari(ds, "set-v0")
    part = trajectories_from_minari(written.filter_episodes(lambda data: len(data) == 2))
    assert part.to_list() == ds.select([1, 2]).to_list()
    halves = [trajectories_from_minari(half) for half in minari.split_dataset(written, [1, 1], seed=0)]
    joined = concatenate_trajectories(sorted(halves, key=len))
    assert joined.to_list() == ds.to_list()


def test_memory_is_that_of_one_episode():
    """Sixteen times the episodes take about the same memory, there and back (of Python's own, arrays included)."""
    peaks = []
    for count in (4, 64):
        turns = [Turn(prompt(), [picture(k, (64, 64))], "a", 0.0) for k in range(8)]
        ds = dataset_from_episodes(episode(f"{k}", turns) for k in range(count))
        tracemalloc.start()
        written = trajectories_to_minari(ds, f"n{count}-v0", data_format="arrow")
        trajectories_from_minari(written)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    pixels = 64 * 8 * 64 * 64 * 3
    assert peaks[1] < peaks[0] + pixels / 6


def test_time_grows_with_the_number_of_episodes_only():
    """Minari's metadata is written once, not once per episode, each time with every bound of the picture's space."""
    turn = Turn(prompt(), [picture(1, (64, 64))], "a", 0.0)
    ds = dataset_from_episodes(episode(f"{k}", [turn]) for k in range(30))
    writes = []
    from minari.dataset.minari_storage import MinariStorage

    original = MinariStorage.update_metadata
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MinariStorage, "update_metadata", lambda *args: (writes.append(1), original(*args)))
        written = trajectories_to_minari(ds, "set-v0")
    assert len(writes) <= 5 and minari.load_dataset("set-v0").total_episodes == written.total_episodes == 30
    assert "update_metadata" not in vars(written.storage) and "get_size" not in vars(written.storage)


def test_export_errors(folder):
    ds = dataset_from_episodes(anything())
    trajectories_to_minari(ds, "name/set-v0")
    with pytest.raises(FileExistsError, match=r"'name/set-v0' already, at .*delete_dataset\('name/set-v0'\)"):
        trajectories_to_minari(ds, "name/set-v0")
    for bad in ("set", "a/set-v0", "../set-v0", "s p-v0", ""):
        with pytest.raises(ValueError, match="no id of a Minari dataset; write 'name-v0'"):
            trajectories_to_minari(ds, bad)
    with pytest.raises(ValueError, match="pictures must be"):
        trajectories_to_minari(ds, "set-v0", pictures="jpeg")
    with pytest.raises(ValueError, match="data_format must be"):
        trajectories_to_minari(ds, "set-v0", data_format="hdf5")
    with pytest.raises(TrajectoryError, match="column `images`: pictures='array' needs exactly one"):
        trajectories_to_minari(ds, "set-v0", pictures="array")
    with pytest.raises(TrajectoryError, match=r"columns \['note'\] .* would be lost; remove them"):
        trajectories_to_minari(ds.add_column("note", ["x"] * len(ds)), "set-v0")
    with pytest.raises(TrajectoryError, match="has no rows"):
        trajectories_to_minari(ds.select([]), "set-v0")
    with pytest.warns(UserWarning, match=r"columns \['reward'\] have other types"):
        trajectories_to_minari(ds.cast_column("reward", datasets.Value("float64")), "wide-v0")
    assert sorted(path.name for path in folder.iterdir()) == ["name", "wide-v0"]


def test_a_failed_export_leaves_nothing(folder):
    class Broken:
        """A dataset whose second reading fails."""

        def __init__(self, ds):
            self.ds, self.readings = ds, 0
            self.column_names, self.features = ds.column_names, ds.features

        def with_format(self, kind):
            self.readings += 1
            if self.readings == 2:
                raise OSError("the disk is gone")
            return self.ds.with_format(kind)

    with pytest.raises(OSError, match="the disk is gone"):
        trajectories_to_minari(Broken(dataset_from_episodes(one_picture())), "set-v0")
    assert not (folder / "set-v0").exists()
    trajectories_to_minari(dataset_from_episodes(one_picture()), "set-v0")


def test_damaged_records_are_named(folder):
    ds = dataset_from_episodes(one_picture())
    written = trajectories_to_minari(ds, "set-v0")
    data = written[1]
    for step, text, problem in (
        (0, "{", "episode 4 .* at step 0 .*JSONDecodeError"),
        (2, '{"format": 99}', "this version of vlmq_trl reads 1"),
        (1, "{}", "episode 4 .* does not read .*'action'"),
    ):
        infos = list(data.infos["vlmq_trl"])
        infos[step] = text
        bad = minari.load_dataset("set-v0")
        bad.storage.update_episodes(
            [
                EpisodeBuffer(
                    id=4,
                    observations=data.observations,
                    actions=data.actions,
                    rewards=data.rewards,
                    terminations=data.terminations,
                    truncations=data.truncations,
                    infos={"vlmq_trl": infos},
                )
            ]
        )
        with pytest.raises(TrajectoryError, match=problem):
            trajectories_from_minari(minari.load_dataset("set-v0"))


def test_own_sets_take_no_prompt_arguments():
    written = trajectories_to_minari(dataset_from_episodes(one_picture()), "set-v0")
    with pytest.raises(ValueError, match="'set-v0' holds prompts and responses of vlmq_trl; leave out task"):
        trajectories_from_minari(written, task="Play.")
    with pytest.raises(TypeError, match="agent_format must be"):
        trajectories_from_minari(written, agent_format="json")


# Sets of others.

SIZE = (32, 40)


def foreign(
    observation_space: spaces.Space,
    observations,
    action_space: spaces.Space | None = None,
    actions=(0, 2, 1),
    terminations=(False, False, True),
    truncations=(False, False, False),
    name: str = "foreign-v0",
    **kwargs,
):
    """A set of two equal episodes, made by Minari's own function."""
    buffers = [
        EpisodeBuffer(
            seed=11 + k,
            observations=observations,
            actions=list(actions),
            rewards=[0.0, 0.5, -1.0][: len(actions)],
            terminations=list(terminations),
            truncations=list(truncations),
        )
        for k in range(2)
    ]
    kwargs = {"jpeg_encoding": False, "data_format": "arrow", **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(
            name,
            buffers,
            observation_space=observation_space,
            action_space=action_space or spaces.Discrete(3),
            **kwargs,
        )


RGB = spaces.Box(0, 255, (*SIZE, 3), np.uint8)
FRAMES = np.stack([picture(k, SIZE) for k in range(4)])
TEXT = spaces.Text(50)
WORDS = {0: "left", 1: "right", 2: "up"}


@pytest.mark.parametrize("data_format", ["arrow", "parquet", "hdf5"])
def test_pictures_and_discrete_actions(data_format):
    made = foreign(RGB, FRAMES, data_format=data_format)
    fmt = JSONFormat(history=1)
    ds = trajectories_from_minari(made, task="Reach the goal.", words=WORDS, agent_format=fmt, env_id="Their/Env-v0")
    index = validate_trajectories(ds)
    assert len(index) == 2 and index.returns.tolist() == [-0.5, -0.5]
    first, _ = episodes_from_dataset(ds)
    assert (first.episode_id, first.env_id, first.seed) == ("foreign-v0/0", "Their/Env-v0", 11)
    assert first.terminated and not first.truncated and first.final_prompt is None
    assert [turn.action for turn in first.turns] == ["left", "up", "right"]
    assert [turn.completion for turn in first.turns] == [f'{{"action": "{word}"}}' for word in ("left", "up", "right")]
    for k, turn in enumerate(first.turns):
        shown = [np.asarray(image) for image in turn.images]
        assert all(np.array_equal(a, b) for a, b in zip(shown, FRAMES[max(0, k - 1) : k + 1], strict=True))
    assert first.turns[0].prompt[0]["content"][1]["text"] == ('Reach the goal.\nAnswer as JSON with the key "action".')
    assert first.turns[2].prompt[1]["content"][0]["text"] == first.turns[1].completion


def test_truncated_episodes_end_with_the_last_observation():
    for name, flags in (("cut-v0", (False, False, True)), ("open-v0", (False, False, False))):
        made = foreign(RGB, FRAMES, terminations=(False,) * 3, truncations=flags, name=name)
        ds = trajectories_from_minari(made, words=["left", "right", "up"], task="Go.")
        validate_trajectories(ds)
        for one in episodes_from_dataset(ds):
            assert one.truncated and not one.terminated and len(one.turns) == 3
            assert np.array_equal(np.asarray(one.final_images[0]), FRAMES[3])
            assert one.final_prompt == one.turns[0].prompt


def test_picture_text_and_more_in_a_dictionary():
    space = spaces.Dict({"pixels": RGB, "mission": TEXT, "direction": spaces.Discrete(4)})
    seen = {"pixels": FRAMES, "mission": ["go to the red ball"] * 4, "direction": [0, 1, 2, 3]}
    ds = trajectories_from_minari(
        foreign(space, seen), words=WORDS, task=lambda data: f"{len(data)} steps.", agent_format=JSONCoTFormat()
    )
    validate_trajectories(ds)
    content = ds[0]["prompt"][0]["content"]
    assert [part["type"] for part in content] == ["image", "text"]
    assert content[1]["text"].startswith("3 steps.\nAnswer as JSON") and content[1]["text"].endswith("red ball")
    assert ds[0]["completion"][0]["content"] == '{"thoughts": "", "action": "left"}'


def test_text_alone_and_texts():
    texts = [f"room {k}" for k in range(4)]
    ds = trajectories_from_minari(
        foreign(TEXT, texts, action_space=spaces.Text(20), actions=["open door", "look", " wait "])
    )
    validate_trajectories(ds)
    assert "images" not in ds.column_names and ds["action"][:3] == ["open door", "look", "wait"]
    assert ds[1]["prompt"] == [{"role": "user", "content": "room 1"}]
    both = spaces.Dict({"goal": TEXT, "room": TEXT})
    ds = trajectories_from_minari(foreign(both, {"goal": ["win"] * 4, "room": texts}, name="texts-v0"))
    assert ds[0]["prompt"][0]["content"] == "goal: win\nroom: room 0" and ds[1]["action"] == "2"


@pytest.mark.parametrize("shape", [SIZE, (*SIZE, 1), (1, *SIZE), (3, *SIZE)])
def test_grey_and_channels_first(shape):
    frames = np.stack([np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8) for k in range(4)])
    ds = trajectories_from_minari(foreign(spaces.Box(0, 255, shape, np.uint8), frames))
    shown = np.asarray(ds[1]["images"][0])
    if shape[0] == 3:
        assert np.array_equal(shown, frames[1].transpose(1, 2, 0))
    else:
        assert shown.shape == (*SIZE, 3) and all(
            np.array_equal(shown[..., c], frames[1].reshape(SIZE)) for c in (0, 2)
        )


def test_functions_of_the_user():
    space = spaces.Dict({"grid": spaces.Box(0, 255, (7, 7, 3), np.uint8), "mission": TEXT})
    grids = np.stack([picture(k, (7, 7)) for k in range(4)])
    made = foreign(
        space,
        {"grid": grids, "mission": ["go"] * 4},
        action_space=spaces.Box(-1, 1, (2,), np.float32),
        actions=[np.array([0.5, -1], np.float32)] * 3,
    )
    ds = trajectories_from_minari(
        made,
        observation=lambda o: {"image": o["grid"].repeat(8, 0).repeat(8, 1), "text": o["mission"]},
        words=lambda action: ",".join(f"{value:g}" for value in action),
    )
    validate_trajectories(ds)
    assert ds[0]["action"] == "0.5,-1" and np.asarray(ds[0]["images"][0]).shape == (56, 56, 3)
    with pytest.raises(TypeError, match="must give a dictionary with 'image', 'text' or both"):
        trajectories_from_minari(made, observation=lambda o: o["grid"], words=str)
    with pytest.raises(TrajectoryError, match=r"'foreign-v0', episode 0, step 0: .*must be uint8 of shape"):
        trajectories_from_minari(made, observation=lambda o: {"image": o["grid"] / 255}, words=str)


@pytest.mark.parametrize(
    ("space", "problem"),
    [
        (spaces.Box(-1, 1, (4,), np.float32), "have no picture .* and no text: Box"),
        (spaces.Dict({"a": spaces.Discrete(3)}), "have no picture"),
        (spaces.Box(0, 255, (4, 84, 84), np.uint8), r"shape \[4, 84, 84\] that is no picture"),
        (spaces.Dict({"image": spaces.Box(0, 255, (7, 7, 3), np.uint8), "mission": TEXT}), r"\[7, 7, 3\]"),
        (spaces.Dict({"left": RGB, "right": RGB}), "several pictures, 'left', 'right'"),
    ],
)
def test_what_cannot_be_seen(space, problem):
    samples = [space.sample() for _ in range(4)]
    values = {key: [s[key] for s in samples] for key in space} if isinstance(space, spaces.Dict) else samples
    with pytest.raises(TrajectoryError, match=f"'foreign-v0' .*{problem}.*; give a function observation="):
        trajectories_from_minari(foreign(space, values))


def test_actions_without_words():
    made = foreign(RGB, FRAMES)
    assert trajectories_from_minari(made)["action"][:3] == ["0", "2", "1"]
    with pytest.raises(TrajectoryError, match="episode 0, step 1: no word for the action 2; `words` has"):
        trajectories_from_minari(made, words={0: "left", 1: "right"})
    with pytest.raises(TrajectoryError, match="no word for the action 2"):
        trajectories_from_minari(made, words=["left", "right"])
    with pytest.raises(TrajectoryError, match=r"the word of .* is ' ', no text"):
        trajectories_from_minari(made, words=lambda action: " ")
    with pytest.raises(TypeError, match="not one string"):
        trajectories_from_minari(made, words="left")
    start = foreign(RGB, FRAMES, spaces.Discrete(3, start=5), actions=(5, 6, 7), name="start-v0")
    assert trajectories_from_minari(start, words=["a", "b", "c"])["action"][:3] == ["a", "b", "c"]
    box = foreign(RGB, FRAMES, spaces.Box(0, 1, (1,)), actions=[np.zeros(1, np.float32)] * 3, name="box-v0")
    for words in (None, {0: "left"}):
        with pytest.raises(ValueError, match=r"are Box.*words=\(action\) -> text"):
            trajectories_from_minari(box, words=words)
    with pytest.raises(TrajectoryError, match="writes the word 'left' as 'LEFT' and reads it as 'LEFT'"):
        shout = CallableFormat(render_fn=lambda action, reading, thoughts: action.upper(), base=PlainFormat())
        trajectories_from_minari(made, words=WORDS, agent_format=shout)


def test_an_episode_that_goes_on_after_its_end():
    made = foreign(RGB, FRAMES, terminations=(False, True, True))
    with pytest.raises(TrajectoryError, match="episode 0, step 1: the episode ends here and goes on"):
        trajectories_from_minari(made)


def test_jpeg_pictures_warn():
    made = foreign(RGB, FRAMES, jpeg_encoding=True)
    with pytest.warns(UserWarning, match="'foreign-v0' were stored as JPEG"):
        ds = trajectories_from_minari(made)
    assert not np.array_equal(np.asarray(ds[0]["images"][0]), FRAMES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trajectories_from_minari(foreign(RGB, FRAMES, name="exact-v0"))
        trajectories_from_minari(foreign(TEXT, ["a"] * 4, jpeg_encoding=True, name="text-v0"))


def test_ids_that_are_not_there():
    with pytest.raises(FileNotFoundError, match=r"No Minari dataset 'some/set-v0' in .*it is empty.*download_dataset"):
        trajectories_from_minari("some/set-v0")
    foreign(RGB, FRAMES, name="some/sets-v0")
    with pytest.raises(FileNotFoundError, match="it has some/sets-v0"):
        trajectories_from_minari("some/set-v0")
    with pytest.raises(ValueError, match="write 'name-v0'"):
        trajectories_from_minari("some set")
    with pytest.raises(TypeError, match="got dict"):
        trajectories_from_minari({})


def test_what_minaris_collector_records():
    """A set that a Gymnasium environment's play gave, by the buffers that Minari's collector fills."""
    env = gymnasium.make("vlmq_trl/NumberLine-v0")
    seen, _ = env.reset(seed=5)
    frames, actions, rewards, ends = [seen["image"]], [], [], []
    while not (ends and ends[-1]):
        seen, reward, terminated, truncated, _ = env.step("+")
        frames.append(seen["image"])
        actions.append("+")
        rewards.append(float(reward))
        ends.append(terminated or truncated)
    buffer = EpisodeBuffer(
        observations={"image": np.stack(frames)},
        actions=actions,
        rewards=rewards,
        terminations=[False] * len(ends),
        truncations=ends,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = minari.create_dataset_from_buffers(
            "numberline/play-v0", [buffer], env="vlmq_trl/NumberLine-v0", data_format="parquet", jpeg_encoding=False
        )
    (one,) = episodes_from_dataset(trajectories_from_minari(made, task="Move."))
    assert one.env_id == "vlmq_trl/NumberLine-v0" and one.seed == -1 and one.return_ == sum(rewards)
    assert np.array_equal(np.asarray(one.final_images[0]), frames[-1])


def test_stock_sft_trains_on_it(tmp_path):
    """Demonstrations through Minari, and a set of others."""
    own = collect_demonstrations("vlmq_trl/NumberLine-v0", policy="random", episodes=3, progress=False)
    back = trajectories_from_minari(trajectories_to_minari(own, "numberline/random-v0"))
    assert same(back, own)
    theirs = trajectories_from_minari(foreign(RGB, FRAMES), words=WORDS, task="Go.", agent_format=JSONFormat())
    for name, ds in (("own", back), ("theirs", theirs)):
        model, processor = tiny_models.build("idefics3")
        args = SFTConfig(
            str(tmp_path / name),
            per_device_train_batch_size=2,
            max_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            max_length=None,
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = SFTTrainer(model, args, train_dataset=ds, processing_class=processor)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 1 and np.isfinite(losses).all()


def test_the_page(tmp_path):
    """Its code, as it stands."""
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text().partition("## Minari")[2]
    there_and_back, others = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    foreign(RGB, FRAMES, name="some/dataset-v0")
    ds = dataset_from_episodes(one_picture())
    for name, code in (("own.py", there_and_back), ("others.py", others)):
        (tmp_path / name).write_text(code)
    assert same(runpy.run_path(str(tmp_path / "own.py"), {"ds": ds})["ds"], ds)
    assert runpy.run_path(str(tmp_path / "others.py"))["ds"]["action"][:3] == ["left", "up", "right"]


def test_without_the_package(tmp_path):
    """The package does not import minari; without it the error gives the line that installs it."""
    code = (
        "import sys, vlmq_trl, vlmq_trl.trajectory, vlmq_trl.minari\n"
        "assert 'minari' not in sys.modules\n"
        "sys.modules['minari'] = None\n"
        "try:\n"
        "    vlmq_trl.trajectories_from_minari('a-v0')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert done.stdout.strip().endswith('pip install "vlmq_trl[minari]"'), done.stderr
