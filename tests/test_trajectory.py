# SPDX-License-Identifier: Apache-2.0
"""The trajectory dataset: round trips, files, streams, the episode index, and training with a stock SFTTrainer."""

import json
import os
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from trl import SFTConfig, SFTTrainer

from tests import tiny_models
from vlmq_trl.chat import as_messages
from vlmq_trl.rollout import collect_demonstrations, episode_metrics
from vlmq_trl.trajectory import (
    FEATURES,
    Episode,
    TrajectoryError,
    Turn,
    concatenate_trajectories,
    dataset_from_episodes,
    episodes,
    episodes_from_dataset,
    filter_top_returns,
    flatten_content,
    load_trajectories,
    save_trajectories,
    trajectory_features,
    validate_trajectories,
)


def picture(value: int) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 255, (5, 7, 3), dtype=np.uint8)


def prompt(text: str = "Play.", images: int = 1) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


def make_episode(name: str, rewards: list[float], truncated: bool = False, images: int = 1, **kwargs) -> Episode:
    turns = tuple(
        Turn(prompt(f"turn {k}", images), [picture(10 * k + i) for i in range(images)], f"answer {k}", reward, f"a{k}")
        for k, reward in enumerate(rewards)
    )
    final = {"final_prompt": prompt("end", images), "final_images": [picture(99)] * images} if truncated else {}
    return Episode(name, turns, not truncated, truncated, **final, **kwargs)


def assert_equal_episodes(one: Episode, other: Episode) -> None:
    def same_images(left, right):
        return (left is None) == (right is None) and all(
            np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(left or [], right or [], strict=True)
        )

    for name in ("episode_id", "terminated", "truncated", "final_prompt", "env_id", "seed"):
        assert getattr(one, name) == getattr(other, name), name
    assert same_images(one.final_images, other.final_images)
    assert len(one.turns) == len(other.turns)
    for a, b in zip(one.turns, other.turns, strict=True):
        assert (a.prompt, a.completion, a.reward, a.action, a.valid) == (
            b.prompt,
            b.completion,
            b.reward,
            b.action,
            b.valid,
        )
        assert same_images(a.images, b.images)
        assert (a.behavior_logprobs is None) == (b.behavior_logprobs is None)
        assert a.behavior_logprobs is None or a.behavior_logprobs == pytest.approx(b.behavior_logprobs)


EPISODES = [
    make_episode("won", [0.0, 0.5, 1.0], env_id="env", seed=3),
    make_episode("cut", [-1.0, 0.25], truncated=True),
    make_episode("short", [-0.5]),
    Episode(
        "logprobs",
        (Turn(prompt(images=2), [picture(1), picture(2)], "", 0.0, "", False, [-0.5, -0.25]),),
        terminated=True,
        truncated=True,
        final_prompt=prompt("no picture", 0),
        final_images=[],
    ),
]


@pytest.fixture(scope="module")
def ds() -> datasets.Dataset:
    return dataset_from_episodes(EPISODES)


def test_schema(ds):
    assert ds.features == FEATURES
    assert ds[0]["completion"] == [{"role": "assistant", "content": "answer 0"}]
    assert ds["turn"][:] == [0, 1, 2, 0, 1, 0, 0]
    assert ds["terminated"][:] == [False, False, True, False, False, True, True]
    assert ds["truncated"][:] == [False, False, False, False, True, False, True]


def test_episodes_come_back(ds):
    for one, other in zip(EPISODES, episodes_from_dataset(ds), strict=True):
        assert_equal_episodes(one, other)
    assert EPISODES[0].return_ == 1.5 and EPISODES[0].success
    assert EPISODES[3].valid_rate == 0.0 and not EPISODES[3].success


def test_episodes_of_pictures_that_are_not_decoded(ds, tmp_path):
    """A dataset may hold them as files, and in a stream of parquet from another tool nothing says that they are
    pictures."""
    files = datasets.List(datasets.Image(decode=False))
    raw = ds.cast_column("images", files).cast_column("final_images", files)
    pq.write_table(ds.data.table.replace_schema_metadata(None), tmp_path / "play.parquet")
    for other in (raw, raw.to_iterable_dataset(), load_trajectories(tmp_path, streaming=True)):
        for one, known in zip(episodes_from_dataset(other), episodes_from_dataset(ds), strict=True):
            assert_equal_episodes(one, known)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_images_are_lossless(mode):
    image = Image.fromarray(picture(5)).convert(mode)
    episode = Episode("e", (Turn(prompt(), [image], "a", 0.0),), True, False)
    stored = dataset_from_episodes([episode])[0]["images"][0]
    assert stored.mode == mode
    assert np.array_equal(np.asarray(stored.convert("RGBA")), np.asarray(image.convert("RGBA")))


def test_string_contents_show_their_images_first():
    turn = Turn([{"role": "user", "content": "hello"}], [picture(1), picture(2)], "a", 0.0)
    (back,) = episodes_from_dataset(dataset_from_episodes([Episode("e", (turn,), True, False)]))
    assert back.turns[0].prompt == prompt("hello", images=2)


def test_text_only_episodes_have_string_contents():
    text = dataset_from_episodes([make_episode("t", [1.0], truncated=True, images=0)])
    assert text.features == trajectory_features(with_images=False)
    assert text[0]["prompt"] == [{"role": "user", "content": "turn 0"}]
    assert text[0]["final_prompt"] == [{"role": "user", "content": "end"}]
    validate_trajectories(text)
    mixed = dataset_from_episodes([make_episode("t", [1.0], images=0)], with_images=True)
    assert mixed.features == FEATURES and mixed[0]["images"] == []
    with pytest.raises(TrajectoryError, match="row 1, column `prompt`: an image in a text-only dataset"):
        dataset_from_episodes([make_episode("t", [1.0], images=0), make_episode("i", [1.0])])


def test_flatten_content():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert flatten_content([{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]) == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
    ]
    with pytest.raises(TrajectoryError, match="text-only model"):
        flatten_content(prompt())


def test_building_is_disk_backed(tmp_path):
    on_disk = []

    def source():
        for k in range(60):
            yield make_episode(f"e{k}", [0.0] * 30, truncated=True)
            on_disk.append(sum(file.stat().st_size for file in tmp_path.iterdir()))

    ds = dataset_from_episodes(source(), cache_dir=tmp_path)
    assert 0 < on_disk[40] < on_disk[-1]  # rows are written while episodes come
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".arrow"
    assert ds.cache_files == [{"filename": str(file)}]
    assert len(validate_trajectories(ds)) == 60


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def source():
        yield make_episode("fine", [0.0])
        yield make_episode("bad", [float("nan")])

    with pytest.raises(TrajectoryError):
        dataset_from_episodes(source(), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


STACK = np.zeros((2, 4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "log_probs", "problem"),
    [
        (STACK[0], None, "column `images`: expected a list of images, got ndarray; put a single image into a list"),
        (STACK, None, r"column `images`: expected a list .*, and make one of a stack by `list\(stack\)`"),
        (Image.new("RGB", (4, 5)), None, "column `images`: expected a list of images, got Image"),
        ("red.png", None, "column `images`: expected a list of images, got str"),
        (["red.png"], None, "column `images`: expected a PIL image or a uint8 array"),
        ([STACK[0]], [None, -1.0], "column `behavior_logprobs`: expected a list of numbers, or None .*NoneType"),
        ([STACK[0]], -1.0, "column `behavior_logprobs`: expected a list of numbers, or None .*not iterable"),
        ([STACK[0]], ["likely"], "column `behavior_logprobs`: expected a list of numbers, or None .*'likely'"),
    ],
)
def test_turns_of_the_wrong_kind(images, log_probs, problem):
    """Named with their row, whether in the first episode, which decides on the columns, or later."""
    wrong = Episode("wrong", (Turn(prompt(), images, "a", 0.0, behavior_logprobs=log_probs),), True, False)
    for k, some in enumerate(([wrong], [make_episode("right", [0.0]), wrong])):
        with pytest.raises(TrajectoryError, match=f"row {k}, {problem}"):
            dataset_from_episodes(some)


def test_tuples_and_tensors_are_lists_too():
    one = Turn(prompt(images=2), tuple(STACK), "a", 0.0, behavior_logprobs=torch.tensor([-0.5, -0.25]))
    (row,) = dataset_from_episodes([Episode("e", (one,), True, False)])
    assert len(row["images"]) == 2 and row["behavior_logprobs"] == [-0.5, -0.25]


@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_save_and_load(ds, tmp_path, file_format, streaming):
    save_trajectories(ds, tmp_path / "data", file_format=file_format)
    loaded = load_trajectories(tmp_path / "data", streaming=streaming)
    assert isinstance(loaded, datasets.IterableDataset if streaming else datasets.Dataset)
    assert loaded.features == ds.features
    if not streaming:
        validate_trajectories(loaded, check_images="all")
    for one, other in zip(EPISODES, episodes_from_dataset(loaded), strict=True):
        assert_equal_episodes(one, other)


@pytest.mark.parametrize("first", ["arrow", "parquet"])
def test_saving_over_another_dataset(ds, tmp_path, first):
    second = "parquet" if first == "arrow" else "arrow"
    save_trajectories(ds, tmp_path, file_format=first)
    with pytest.raises(FileExistsError, match="save to a new folder"):
        save_trajectories(ds, tmp_path, file_format=second)
    fewer = ds.select(range(int(np.argmax(ds["terminated"])) + 1))
    save_trajectories(fewer, tmp_path, file_format=first)
    assert len(load_trajectories(tmp_path)) == len(fewer)


def test_saving_over_a_dataset_that_is_open(ds, tmp_path):
    """It can be read on, and may itself be what is saved; of the old files none is left."""
    save_trajectories(ds, tmp_path)
    (tmp_path / "note.txt").write_text("mine")
    opened = load_trajectories(tmp_path)
    save_trajectories(dataset_from_episodes([make_episode("other", [1.0] * 40)]), tmp_path)
    for one, other in zip(EPISODES, episodes_from_dataset(opened), strict=True):
        assert_equal_episodes(one, other)
    again = load_trajectories(tmp_path)
    save_trajectories(again.select(range(9, 40)), tmp_path)
    assert again["turn"][:] == list(range(40)) and load_trajectories(tmp_path)["turn"][:] == list(range(9, 40))
    assert len(list(tmp_path.iterdir())) == 4  # data, its description, the state, and the note


@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_a_save_that_is_cut_off_leaves_the_old_dataset(ds, tmp_path, file_format, monkeypatch):
    """Wherever it is cut off: in the writing, or at any of the renamings that follow."""
    save_trajectories(ds, tmp_path, file_format=file_format)
    other = dataset_from_episodes([make_episode("other", [1.0])])
    files = sorted(path.name for path in tmp_path.iterdir())

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    writer = "save_to_disk" if file_format == "arrow" else "to_parquet"
    replace = os.replace
    for kept in range(-1, 2 if file_format == "arrow" else 1):  # renamings that come about; -1: killed before
        left = iter([replace] * kept)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if kept < 0:
                patch.setattr(datasets.Dataset, writer, killed)
            patch.setattr(os, "replace", lambda *args, left=left: next(left, killed)(*args))
            save_trajectories(other, tmp_path, file_format=file_format)
        for one, back in zip(EPISODES, episodes_from_dataset(load_trajectories(tmp_path)), strict=True):
            assert_equal_episodes(one, back)
    assert set(files) <= {path.name for path in tmp_path.iterdir()}
    save_trajectories(other, tmp_path, file_format=file_format)
    assert load_trajectories(tmp_path)["episode_id"][:] == ["other"]


def test_what_a_killed_save_left_is_removed(ds, tmp_path):
    """But a dataset whose columns differ is not half replaced."""
    (tmp_path / ".unfinished-abc").mkdir()
    (tmp_path / ".unfinished-abc" / "data.arrow").write_bytes(b"half")
    save_trajectories(ds, tmp_path)
    assert not list(tmp_path.glob(".unfinished-*"))
    other = dataset_from_episodes(
        [Episode("text", (Turn([{"role": "user", "content": "q"}], [], "a", 1.0),), True, False)]
    )
    save_trajectories(other, tmp_path)
    assert load_trajectories(tmp_path).features == other.features


def test_a_dataset_that_is_replaced_while_it_is_read(ds, tmp_path, monkeypatch):
    save_trajectories(ds, tmp_path)
    load, calls = datasets.load_from_disk, []

    def replaced_meanwhile(path):
        calls.append(path)
        if len(calls) == 1:
            listed = json.loads((tmp_path / "state.json").read_text())["_data_files"]
            save_trajectories(dataset_from_episodes([make_episode("new", [1.0])]), tmp_path)
            raise FileNotFoundError(listed[0]["filename"])
        return load(path)

    monkeypatch.setattr(datasets, "load_from_disk", replaced_meanwhile)
    assert load_trajectories(tmp_path)["episode_id"][:] == ["new"] and len(calls) == 2
    (tmp_path / "state.json").write_text((tmp_path / "state.json").read_text().replace("data-", "lost-"))
    with pytest.raises(FileNotFoundError):
        load_trajectories(tmp_path)


def test_more_pictures_than_an_arrow_batch_holds(tmp_path, monkeypatch):
    """Written in pieces, within an episode too; an episode that breaks off in the midst is not kept by halves."""
    monkeypatch.setattr(episodes, "BYTES_AT_ONCE", 200)
    flushes = []
    monkeypatch.setattr(episodes, "_flush", lambda writer, flush=episodes._flush: flushes.append(1) or flush(writer))
    many = [make_episode(f"e{k}", [0.0] * 5) for k in range(3)]
    built = dataset_from_episodes(many, cache_dir=tmp_path)
    assert len(flushes) >= 6
    for one, back in zip(many, episodes_from_dataset(built), strict=True):
        assert_equal_episodes(one, back)
    write = episodes.ArrowWriter.write
    size = len(built.with_format("arrow")[0]["images"][0].as_py()[0]["bytes"])
    monkeypatch.setattr(episodes, "BYTES_AT_ONCE", 8 * size)  # a whole episode waits when the next one has to be cut
    many = [*many[:1], make_episode("long", [0.0] * 20)]
    left = iter(range(22))

    def full(self, row):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        write(self, row)

    monkeypatch.setattr(episodes.ArrowWriter, "write", full)
    kept, error = episodes.dataset_until_error(many, tmp_path)
    assert isinstance(error, OSError) and kept["episode_id"][:] == ["e0"] * 5


def test_pictures_are_added_where_no_message_shows_any():
    history = [
        {"role": "user", "content": "rules"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "go"}]},
    ]
    built = dataset_from_episodes([Episode("e", (Turn(history, [picture(1)], "a", 1.0),), True, False)])
    kinds = [[part["type"] for part in message["content"]] for message in built[0]["prompt"]]
    assert kinds == [["text"], ["text"], ["image", "text"]]
    _, processor = tiny_models.build("idefics3")
    played = as_messages(history, processor, [picture(1)])
    assert [[part["type"] for part in message["content"]] for message in played] == kinds


def test_what_is_no_dataset_is_not_saved(ds, tmp_path):
    for wrong in (list(ds), EPISODES, ds.to_iterable_dataset(), datasets.DatasetDict(train=ds)):
        with pytest.raises(TypeError, match=f"takes a datasets.Dataset, got {type(wrong).__name__}. Save each split"):
            save_trajectories(wrong, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-0.parquet", "test-0.parquet"], "test-0.parquet (test), train-0.parquet (train)"),
        (
            ["data/train/0.parquet", "data/validation/0.parquet", "data/train/1.parquet"],
            "data/train/1.parquet (train), data/validation/0.parquet (validation)",
        ),
        (["train.parquet", "eval2024.parquet"], "eval2024.parquet (test), train.parquet (train)"),
        (["train.parquet", "rest.parquet"], "rest.parquet (no split named), train.parquet (train)"),
        (["train-0.parquet", "train-1.parquet"], None),
        (["contest.parquet", "trained.parquet"], None),
    ],
)
def test_splits_are_not_merged(ds, tmp_path, names, splits):
    for k, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        ds.select([4 + k]).to_parquet(tmp_path / name)
    if splits:
        with pytest.raises(
            ValueError, match=f"holds files of several splits, {re.escape(splits)}, which would become one"
        ):
            load_trajectories(tmp_path)
        assert len(load_trajectories(tmp_path / names[0])) == 1
    else:
        assert len(load_trajectories(tmp_path)) == 2


def test_files_that_are_not_there(ds, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a dataset saved by save_trajectories nor parquet"):
        load_trajectories(tmp_path)
    datasets.DatasetDict(train=ds).save_to_disk(tmp_path / "splits")
    with pytest.raises(FileNotFoundError, match="holds a DatasetDict: give the folder of one of its splits"):
        load_trajectories(tmp_path / "splits")
    with pytest.raises(ValueError, match="'arrow' or 'parquet'"):
        save_trajectories(ds, tmp_path, file_format="csv")


def test_episode_index(ds):
    index = validate_trajectories(ds, check_images="all")
    assert len(index) == 4 and index.num_rows == 7
    assert index.episode_ids.tolist() == ["won", "cut", "short", "logprobs"]
    assert index.first_row.tolist() == [0, 3, 5, 6]
    assert index.length.tolist() == [3, 2, 1, 1]
    assert index.last_row.tolist() == [2, 4, 5, 6]
    assert index.returns.tolist() == [1.5, -0.75, -0.5, 0.0]
    assert index.success.tolist() == [True, False, False, False]
    assert index.row_episode.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert index.turn.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert index.reward.tolist() == [0.0, 0.5, 1.0, -1.0, 0.25, -0.5, 0.0]
    assert index.terminated.tolist() == ds["terminated"][:]
    assert index.truncated.tolist() == ds["truncated"][:]


def test_returns_to_go_by_hand(ds):
    index = validate_trajectories(ds)
    # 0 + 0.5 (0.5 + 0.5 * 1) = 0.5; 0.5 + 0.5 * 1 = 1; -1 + 0.5 * 0.25 = -0.875
    assert index.returns_to_go(0.5).tolist() == [0.5, 1.0, 1.0, -0.875, 0.25, -0.5, 0.0]
    assert index.returns_to_go(0.0).tolist() == index.reward.tolist()
    assert index.returns_to_go(1.0)[index.first_row].tolist() == index.returns.tolist()


def test_selections_validate_with_their_own_rows(ds):
    chosen = ds.select([5, 0, 1, 2])  # an indices mapping
    index = validate_trajectories(chosen, check_images="all")
    assert index.episode_ids.tolist() == ["short", "won"]
    assert index.reward.tolist() == [-0.5, 0.0, 0.5, 1.0]
    part = ds.select(range(3, 6))  # a slice of the table
    assert validate_trajectories(part, check_images="all").episode_ids.tolist() == ["cut", "short"]
    with pytest.raises(TrajectoryError, match=r"row 1, column `turn`: turn 2 .* where turn 1 belongs"):
        validate_trajectories(ds.select([0, 2, 1]))


def test_datasets_made_with_other_tools_validate():
    rows = [
        {
            "prompt": [{"role": "user", "content": "hello"}],
            "completion": [{"role": "assistant", "content": "hi"}],
            "episode_id": "e",
            "turn": k,
            "reward": k,
            "terminated": k == 1,
            "truncated": False,
        }
        for k in range(2)
    ]
    plain = datasets.Dataset.from_list(rows)
    assert validate_trajectories(plain).returns.tolist() == [1.0]
    assert [turn.completion for turn in next(episodes_from_dataset(plain)).turns] == ["hi", "hi"]
    assert next(episodes_from_dataset(plain.with_format("torch"))).turns[1].reward == 1.0
    large = pa.large_list(pa.struct({"role": pa.large_string(), "content": pa.large_string()}))
    table = plain.data.table
    for name in ("prompt", "completion"):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(large))
    assert validate_trajectories(datasets.Dataset(table)).returns.tolist() == [1.0]


def test_concatenate(ds):
    both = concatenate_trajectories([ds, ds])
    index = validate_trajectories(both, check_images="all")
    assert index.episode_ids.tolist()[3:5] == ["0/logprobs", "1/won"]
    other = dataset_from_episodes([make_episode("other", [1.0])])
    assert validate_trajectories(concatenate_trajectories([ds, other])).episode_ids.tolist()[-1] == "other"
    shown = concatenate_trajectories([ds.with_format("numpy", columns=["reward"])] * 2)
    assert shown.with_format(None)["episode_id"][:] == both["episode_id"][:]
    again = concatenate_trajectories([both, other, both])
    assert len(validate_trajectories(again)) == 17
    text = dataset_from_episodes([make_episode("t", [1.0], images=0)])
    with pytest.raises(
        TrajectoryError, match=r"dataset 1 has other features .*only there: \['final_images', 'images'"
    ):
        concatenate_trajectories([ds, text])


def test_filter_top_returns():
    returns = [0.0, 3.0, 1.0, 1.0, 1.0, -1.0]
    ds = dataset_from_episodes([make_episode(f"e{k}", [0.0, r]) for k, r in enumerate(returns)])
    top = validate_trajectories(filter_top_returns(ds, 0.5))
    assert len(top) == 3 and top.returns.tolist().count(3.0) == 1
    assert top.num_rows == 6  # whole episodes
    chosen = {tuple(validate_trajectories(filter_top_returns(ds, 0.5, seed=s)).episode_ids) for s in range(20)}
    assert chosen == {("e1", "e2", "e3"), ("e1", "e2", "e4"), ("e1", "e3", "e4")}  # ties at the cut are drawn
    assert len(validate_trajectories(filter_top_returns(ds, 0.01))) == 1
    assert len(filter_top_returns(ds, 1.0)) == len(ds)
    with pytest.raises(ValueError, match="fraction must lie in"):
        filter_top_returns(ds, 0.0)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([-0.1, -0.1, -0.1, 0.3], 0.0),  # -6e-17 in float64, 7e-9 in float32
        ([0.1, 0.2, -0.3], 0.0),  # 6e-17 in float64, -1e-8 in float32
        ([-100.1, -200.2, 300.3], 0.0),
        ([1e-9], 1e-9),
        ([-1.0, 1.0001], 1e-4),
        ([], 0.0),
    ],
)
def test_rounding_makes_no_success(rewards, expected):
    """A return of 0 is a failure before and after the rewards have become float32, in each place that tells."""
    episode = make_episode("e", rewards)
    assert episode.return_ == pytest.approx(expected) and episode.success == (expected > 0)
    if not rewards:
        return
    ds = dataset_from_episodes([episode])
    (back,), index = episodes_from_dataset(ds), validate_trajectories(ds)
    for played in (episode, back):
        assert played.return_ == pytest.approx(expected, rel=1e-2) and played.success == (expected > 0)
        assert episode_metrics([played])["success_rate"] == (expected > 0)
    assert index.success.tolist() == [expected > 0] and index.returns.tolist() == [back.return_]


def test_broken_returns_stay_broken():
    for reward in (np.nan, np.inf):
        assert not np.isfinite(make_episode("e", [reward, 1.0]).return_)


def test_returns_that_differ_by_rounding_tie():
    rewards = [[0.1, 0.1, 0.1, 0.7], [1.0], [0.7, 0.1, 0.1, 0.1], [0.9], [1e7, -1e7]]  # 0.99999999, 1, 1, ...
    ds = dataset_from_episodes([make_episode(f"e{k}", one) for k, one in enumerate(rewards)])
    assert len(set(validate_trajectories(ds).returns)) > 3
    chosen = {tuple(validate_trajectories(filter_top_returns(ds, 0.2, seed=s)).episode_ids) for s in range(30)}
    assert chosen == {("e0",), ("e1",), ("e2",)}
    assert set(filter_top_returns(ds, 0.8)["episode_id"]) == {"e0", "e1", "e2", "e3"}


def train(model, processor, ds, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = SFTTrainer(model, args, train_dataset=ds, processing_class=processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all()
    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)]
    assert any("embed_tokens" in name for name in moved) and any("layers.1" in name for name in moved)
    return trainer


def test_stock_sft_trains_on_pictures(tmp_path):
    ds = collect_demonstrations("vlmq_trl/NumberLine-v0", policy="random", episodes=3, progress=False)
    model, processor = tiny_models.build("idefics3")
    trainer = train(model, processor, ds, tmp_path)
    batch = trainer.data_collator([dict(ds[0]), dict(ds[1])])
    assert "pixel_values" in batch
    learned = batch["input_ids"][0][batch["labels"][0] != -100]
    completion = ds[0]["completion"][0]["content"]
    assert processor.tokenizer.decode(learned) == completion + tiny_models.END


def test_stock_sft_trains_on_text(tmp_path):
    ds = dataset_from_episodes([make_episode(f"e{k}", [0.0, 1.0], images=0) for k in range(4)])
    model, tokenizer = tiny_models.build("llama")
    trainer = train(model, tokenizer, ds, tmp_path)
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["input_ids"]).endswith("turn 0<|im_end|>\n<|im_start|>assistant\nanswer 0<|im_end|>")


def test_pictures_that_may_come_again_do_not_fill_the_memory():
    png, rng = episodes._PngCache(max_bytes=3000), np.random.default_rng(0)
    pictures = [rng.integers(256, size=(16, 16, 3), dtype=np.uint8) for _ in range(9)]  # 800 bytes each
    encoded = [png(picture, row=0, column="images") for picture in pictures]
    assert png(pictures[-1], row=0, column="images") is encoded[-1]
    assert png(pictures[0], row=0, column="images") is not encoded[0]
    assert png.bytes == sum(len(kept["bytes"]) for kept in png.store.values()) <= 3000
