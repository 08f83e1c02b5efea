# SPDX-License-Identifier: Apache-2.0
"""Trajectory datasets to Minari and back, and Minari's picture datasets as trajectory datasets.

A set that `trajectories_to_minari` wrote comes back as it was. It is an ordinary Minari dataset:

| Minari | holds |
| --- | --- |
| `observations["prompt"]` | the prompt's messages as JSON; after the last turn, those of `final_prompt`, or `[]` |
| `observations["image"]` | uint8 [H, W, 3], where every prompt shows exactly one RGB picture, all of one size |
| `observations["pictures"]` | otherwise: the prompt's pictures, a JSON list of PNGs in base64 |
| `actions` | the responses |
| `rewards`, `terminations`, `truncations` | the columns of these names |
| `infos["vlmq_trl"]` | the other columns of each turn as JSON, then one entry about the episode |

Contents: `trajectories_to_minari`, `trajectories_from_minari`.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import io
import json
import math
import os
import shutil
import string
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from gymnasium import spaces
from tqdm.auto import tqdm

from vlmq_trl.agent_format import AgentFormat, Exchange, PlainFormat, check_format
from vlmq_trl.envs.domain import install_line
from vlmq_trl.trajectory import (
    FEATURES,
    Episode,
    TrajectoryError,
    Turn,
    dataset_from_episodes,
    trajectory_features,
)
from vlmq_trl.trajectory.episodes import episodes_of, in_png_mode

KEY = "vlmq_trl"  # of `infos`
FORMAT = 1  # of its entries
LARGEST_ARRAY = 2**18  # pixels that "auto" writes as an array
SMALLEST_PICTURE = 32  # pixels a side; Minari too takes smaller arrays for symbols, not for pictures

Words = Mapping[int, str] | Sequence[str] | Callable[[Any], str]
ObservationOf = Callable[[Any], Mapping[str, Any]]


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError(f"Minari datasets need the package minari: {install_line('minari')}") from error
    return minari


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def trajectories_to_minari(
    ds: datasets.Dataset | datasets.IterableDataset,
    dataset_id: str,
    *,
    pictures: str = "auto",
    data_format: str = "parquet",
    author: str | None = None,
    author_email: str | None = None,
    algorithm_name: str | None = None,
    code_permalink: str | None = None,
    description: str | None = None,
    progress: bool = False,
) -> Any:
    """Write a trajectory dataset as a Minari dataset, without loss, where Minari keeps its datasets.

    The dataset is read twice, one episode in memory at a time.

    Args:
        ds: a trajectory dataset, or a stream of one that can be read twice.
        dataset_id: "name-v0" or "namespace/name-v0"; must be new.
        pictures: "array" writes them as uint8 [H, W, 3], as other users of Minari expect, which needs exactly one RGB
            picture of one size in every prompt; "png" takes any; "auto" is "array" where that fits and the pictures
            have at most 512 x 512 pixels: of larger ones files and bounds are very large.
        data_format: "parquet" (compressed) or "arrow" (faster, large with arrays).
        author, author_email, algorithm_name, code_permalink, description: go into the dataset's metadata.
        progress: show a bar over episodes.

    Returns:
        The `minari.MinariDataset`.

    Raises:
        ImportError: the package minari is missing.
        ValueError: a malformed id, or another bad argument.
        FileExistsError: there is a dataset of this id.
        TrajectoryError: `ds` is no trajectory dataset, or `pictures="array"` does not fit it. Nothing is left on disk.
    """
    minari = _minari()
    from minari.storage import get_dataset_path

    if pictures not in ("auto", "array", "png"):
        raise ValueError(f"pictures must be 'auto', 'array' or 'png', got {pictures!r}.")
    if data_format not in ("parquet", "arrow"):
        raise ValueError(
            f"data_format must be 'parquet' or 'arrow', got {data_format!r}. (Minari's HDF5 cannot hold every text.)"
        )
    _check_id(dataset_id)
    path = get_dataset_path(dataset_id)
    if path.exists():
        raise FileExistsError(
            f"There is a Minari dataset {dataset_id!r} already, at {path}; take another name or version, or remove it "
            f"first by minari.delete_dataset({dataset_id!r})."
        )
    survey = _survey(ds, pictures, progress)
    given = {
        "author": author,
        "author_email": author_email,
        "algorithm_name": algorithm_name,
        "code_permalink": code_permalink,
        "description": description,
    }
    try:
        with warnings.catch_warnings():  # about what of `given` is missing
            warnings.simplefilter("ignore", UserWarning)
            made = minari.create_dataset_from_buffers(
                dataset_id,
                [],
                observation_space=survey.observation_space(),
                action_space=survey.actions.space(),
                data_format=data_format,
                jpeg_encoding=False,
                **given,
            )
        with _metadata_written_once(made.storage):
            made.storage.update_episodes(_buffers(ds, survey, progress))
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return minari.MinariDataset(made.storage)


def _check_id(dataset_id: str) -> None:
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except (TypeError, ValueError):  # TypeError: it has no version
        raise ValueError(
            f"{dataset_id!r} is no id of a Minari dataset; write 'name-v0' or 'namespace/name-v0' (letters, digits, "
            "'-' and '_'; a namespace has at least two characters)."
        ) from None


@dataclass
class _Texts:
    """What a `spaces.Text` has to hold."""

    longest: int = 1
    characters: set[str] = field(default_factory=set)

    def add(self, text: str) -> None:
        self.longest = max(self.longest, len(text))
        self.characters.update(text)

    def space(self) -> spaces.Text:
        characters = "".join(sorted(self.characters)) or string.printable
        return spaces.Text(self.longest, min_length=0, charset=characters)


@dataclass
class _Survey:
    """What has to be known of a dataset before it is written."""

    columns: list[str]
    prompts: _Texts = field(default_factory=_Texts)
    actions: _Texts = field(default_factory=_Texts)
    pictures: _Texts = field(default_factory=_Texts)
    size: tuple[int, int] | None = None  # height and width, where pictures are written as arrays

    @property
    def with_images(self) -> bool:
        return "images" in self.columns

    def observation_space(self) -> spaces.Dict:
        parts: dict[str, spaces.Space] = {"prompt": self.prompts.space()}
        if self.size is not None:
            parts["image"] = spaces.Box(0, 255, (*self.size, 3), np.uint8)
        elif self.with_images:
            parts["pictures"] = self.pictures.space()
        return spaces.Dict(parts)

    def observations(self, episode: Episode) -> dict[str, Any]:
        """The T + 1 observations of an episode of T turns; the last is blank if the dataset has none."""
        prompts = [_json(turn.prompt) for turn in episode.turns] + [_json(episode.final_prompt or [])]
        values: dict[str, Any] = {"prompt": prompts}
        shown = [turn.images for turn in episode.turns] + [episode.final_images or []]
        if self.size is not None:
            blank = np.zeros((*self.size, 3), np.uint8)
            values["image"] = np.stack([np.asarray(_opened(images[0])) if images else blank for images in shown])
        elif self.with_images:
            values["pictures"] = [_pngs(images) for images in shown]
        return values


def _survey(ds: datasets.Dataset | datasets.IterableDataset, pictures: str, progress: bool) -> _Survey:
    """Reads the dataset once."""
    survey = _Survey(_columns(ds))
    survey.pictures.add('+/=[]", ' + string.ascii_letters + string.digits)
    sizes: set[tuple[int, int] | None] = set()  # None: not exactly one RGB picture
    for episode in _episodes(ds, "reading", progress):
        prompts = [(turn.prompt, turn.images) for turn in episode.turns]
        if episode.final_prompt is not None:
            prompts.append((episode.final_prompt, episode.final_images or []))
        for prompt, images in prompts:
            survey.prompts.add(_json(prompt))
            sizes.add(_size(images))
            if pictures != "array":
                survey.pictures.longest = max(survey.pictures.longest, len(_pngs(images)))
        for turn in episode.turns:
            survey.actions.add(turn.completion)
    if not sizes:
        raise TrajectoryError("the dataset has no rows; there is nothing to write.")
    uniform = survey.with_images and len(sizes) == 1 and None not in sizes
    if pictures == "array" and not uniform:
        raise TrajectoryError(
            "pictures='array' needs exactly one RGB picture of one size in every prompt, the final ones included; "
            "use 'png'.",
            column="images",
        )
    (size, *_) = sizes
    if uniform and (pictures == "array" or (pictures == "auto" and math.prod(size or ()) <= LARGEST_ARRAY)):
        survey.size = size
    return survey


def _undecoded(ds: datasets.Dataset | datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, pictures as the bytes that they are stored in."""
    if isinstance(ds, datasets.IterableDataset):
        plain = ds.with_format(None)
        yield from plain if plain.features is None else plain.decode(False)
        return
    for table in ds.with_format("arrow").iter(batch_size=64):
        yield from table.to_pylist()


def _episodes(ds: datasets.Dataset | datasets.IterableDataset, did: str, progress: bool) -> Iterator[Episode]:
    """The dataset's episodes; pictures are dictionaries of "bytes" and "path", or PIL images in an untyped stream."""
    return iter(tqdm(episodes_of(_undecoded(ds)), desc=did, unit="episode", disable=not progress))


def _columns(ds: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """The dataset's columns, each one of the schema's."""
    columns = list(ds.column_names or next(iter(ds), {}))
    unknown = [column for column in columns if column not in FEATURES]
    if unknown:
        raise TrajectoryError(
            f"the columns {unknown} are not of the trajectory schema and would be lost; remove them by "
            f"ds.remove_columns({unknown})."
        )
    schema = trajectory_features("images" in columns)
    other = [column for column in columns if ds.features is not None and ds.features[column] != schema[column]]
    if other:
        warnings.warn(
            f"The columns {other} have other types than the trajectory schema and will come back with the schema's.",
            stacklevel=4,
        )
    return columns


def _opened(image: Any) -> PIL.Image.Image:
    """The picture as `datasets` shows it: turned, if the file says so. Otherwise its pixels are not read yet."""
    if isinstance(image, PIL.Image.Image):
        return image
    picture = PIL.Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
    told = picture.format != "PNG" or "exif" in picture.info  # asking a PNG without reads all of it
    turned = told and picture.getexif().get(PIL.ExifTags.Base.Orientation) is not None
    return PIL.ImageOps.exif_transpose(picture) if turned else picture


def _size(images: list) -> tuple[int, int] | None:
    """Height and width of the one RGB picture; None if it is anything else."""
    if len(images) != 1:
        return None
    picture = _opened(images[0])
    return (picture.height, picture.width) if picture.mode == "RGB" else None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _pngs(images: list) -> str:
    """A JSON list of PNGs in base64; lossless in every mode that a PNG may hold."""
    texts = []
    for image in images:
        encoded, picture = image["bytes"] if isinstance(image, dict) else None, _opened(image)
        if encoded is None or picture.format != "PNG":
            buffer = io.BytesIO()
            in_png_mode(picture).save(buffer, format="PNG", compress_level=3)
            encoded = buffer.getvalue()
        texts.append(base64.b64encode(encoded).decode())
    return _json(texts)


def _buffers(ds: datasets.Dataset | datasets.IterableDataset, survey: _Survey, progress: bool) -> Iterator[Any]:
    """Minari's records of the episodes, one in memory at a time."""
    from minari.data_collector import EpisodeBuffer

    for episode in _episodes(ds, "writing", progress):
        turns = episode.turns
        ends = [False] * (len(turns) - 1)
        records = [
            {"action": turn.action, "valid": turn.valid, "behavior_logprobs": turn.behavior_logprobs} for turn in turns
        ]
        about = {
            "format": FORMAT,
            "columns": survey.columns,
            "episode_id": episode.episode_id,
            "env_id": episode.env_id,
            "seed": episode.seed,
            "final": episode.final_prompt is not None,
        }
        yield EpisodeBuffer(
            seed=episode.seed if episode.seed >= 0 else None,
            observations=survey.observations(episode),
            actions=[turn.completion for turn in turns],
            rewards=[turn.reward for turn in turns],
            terminations=[*ends, episode.terminated],
            truncations=[*ends, episode.truncated],
            infos={KEY: [_json(record) for record in [*records, about]]},
        )


@contextmanager
def _metadata_written_once(storage: Any) -> Iterator[None]:
    """While many episodes are written. For each of them Minari would measure the whole folder and rewrite the
    dataset's metadata, which holds every bound of a picture's space; so the time would grow with the square."""
    pending: dict[str, Any] = {}
    storage.get_size = lambda: 0.0
    storage.update_metadata = pending.update
    try:
        yield
    finally:
        del storage.get_size, storage.update_metadata
    storage.update_metadata({**pending, "dataset_size": storage.get_size()})


# ---------------------------------------------------------------------------------------------------------------------
# Import
# ---------------------------------------------------------------------------------------------------------------------


def trajectories_from_minari(
    dataset: Any,
    *,
    task: str | Callable[[Any], str] = "",
    words: Words | None = None,
    agent_format: AgentFormat | None = None,
    observation: ObservationOf | None = None,
    env_id: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> datasets.Dataset:
    """A trajectory dataset of a Minari dataset, one episode in memory at a time.

    A set of `trajectories_to_minari` comes back as it was, and takes none of the arguments about prompts. Of any
    other, prompts and responses are written here: each observation becomes `{"image": uint8 [H, W, 3], "text": str}`,
    each action a word, and `agent_format` writes them. An episode that is marked neither terminated nor truncated
    counts as truncated. A truncated one gets its `final_prompt` from Minari's last observation.

    Args:
        dataset: a `minari.MinariDataset`, or the id of one that is on this machine. Nothing is downloaded.
        task: the text that opens each prompt, or a function (`minari.EpisodeData`) -> that.
        words: what each action is called: a mapping (index -> word), a sequence (first word for the first action), or
            a function (action) -> word. Without it, discrete actions are called by their numbers and texts are
            themselves.
        agent_format: of prompts and responses; `PlainFormat()` by default.
        observation: (an observation of the dataset) -> a dictionary with "image", "text" or both. Without it, a
            picture is a Box of uint8 of at least 32 x 32, [H, W], [H, W, 1], [H, W, 3], [1, H, W] or [3, H, W]; of a
            Dict the one picture and all texts are taken.
        env_id: for the column of that name; the dataset's environment by default.
        cache_dir: where the data is written (`dataset_from_episodes`).
        progress: show a bar over episodes.

    Raises:
        ImportError: the package minari is missing.
        FileNotFoundError: no dataset of this id is on this machine.
        ValueError, TypeError: an argument does not fit the dataset; says which and what to do.
        TrajectoryError: observations without picture and text, an action without a word, an episode that ends twice,
            a damaged record.
    """
    check_format(agent_format)
    dataset = _load(dataset)
    if not dataset.total_episodes:
        raise TrajectoryError(f"the Minari dataset {dataset.id!r} has no episodes.")
    first = _episode(dataset, dataset.episode_indices[0])
    if dataset.storage.jpeg_encoding and _has_jpegs(dataset.observation_space):
        warnings.warn(
            f"The pictures of the Minari dataset {dataset.id!r} were stored as JPEG: they are not exactly those that "
            "the environment showed. (jpeg_encoding=False stores them as they are.)",
            stacklevel=2,
        )
    bar = tqdm(dataset.episode_indices, desc="reading", unit="episode", disable=not progress)
    episodes = (_episode(dataset, index) for index in bar)
    if KEY in (first.infos or {}):
        about = (task, words, agent_format, observation, env_id)
        if about != ("", None, None, None, None):
            raise ValueError(
                f"The Minari dataset {dataset.id!r} holds prompts and responses of vlmq_trl; leave out task, words, "
                "agent_format, observation and env_id."
            )
        columns = _read_record(first, len(first), dataset.id)["columns"]
        own = (_own_episode(data, dataset.id) for data in episodes)
        made = dataset_from_episodes(own, cache_dir=cache_dir, with_images="images" in columns)
        return made.remove_columns([column for column in made.column_names if column not in columns])
    see = _checked_observation(observation, dataset.id) if observation else _reader(dataset)
    fmt = agent_format if agent_format is not None else PlainFormat()
    foreign = _Foreign(dataset, task, see, _Words(dataset, words, fmt), fmt, env_id)
    return dataset_from_episodes((foreign.episode(data) for data in episodes), cache_dir=cache_dir)


def _load(dataset: Any) -> Any:
    minari = _minari()
    if isinstance(dataset, minari.MinariDataset):
        return dataset
    if not isinstance(dataset, str):
        raise TypeError(f"expected a minari.MinariDataset or the id of one, got {type(dataset).__name__}.")
    _check_id(dataset)
    from minari.storage import get_dataset_path

    if not (get_dataset_path(dataset) / "data").exists():
        with warnings.catch_warnings():  # of datasets that it cannot read
            warnings.simplefilter("ignore")
            known = list(minari.list_local_datasets())
        near = difflib.get_close_matches(dataset, known, n=3) or known[:3]
        raise FileNotFoundError(
            f"No Minari dataset {dataset!r} in {get_dataset_path()} (the variable MINARI_DATASETS_PATH sets that); "
            f"{'it has ' + ', '.join(near) if near else 'it is empty'}. A public one comes by "
            f"minari.download_dataset({dataset!r})."
        )
    return minari.load_dataset(dataset)


def _episode(dataset: Any, index: Any) -> Any:
    """One `minari.EpisodeData`; asked for several at once, Minari's Arrow storage reads ahead."""
    return next(iter(dataset.iterate_episodes([int(index)])))


def _has_jpegs(space: spaces.Space) -> bool:
    from minari.dataset.minari_storage import is_image_space

    if isinstance(space, spaces.Dict):
        return any(_has_jpegs(part) for part in space.values())
    if isinstance(space, spaces.Tuple):
        return any(_has_jpegs(part) for part in space)
    return bool(is_image_space(space))


def _at(values: Any, step: int) -> Any:
    """The observation or action of one step, out of those of an episode."""
    if isinstance(values, dict):
        return {key: _at(value, step) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_at(value, step) for value in values)
    return values[step]


def _steps(values: Any) -> int:
    while isinstance(values, dict | tuple):
        values = next(iter(values.values())) if isinstance(values, dict) else values[0]
    return len(values)


# A set of our own.


def _read_record(data: Any, step: int, name: str) -> dict[str, Any]:
    try:
        text = data.infos[KEY][step]
        record = json.loads(text if isinstance(text, str) else bytes(text).decode())
        if step == len(data) and record["format"] != FORMAT:
            raise ValueError(f"it has format {record['format']!r}, this version of vlmq_trl reads {FORMAT}")
        return record
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise TrajectoryError(
            f"infos[{KEY!r}] of episode {data.id} of the Minari dataset {name!r} does not read at step {step} "
            f"({type(error).__name__}: {error}); export the dataset again, or drop the episode by filter_episodes."
        ) from None


def _own_episode(data: Any, name: str) -> Episode:
    about = _read_record(data, len(data), name)
    records = [_read_record(data, step, name) for step in range(len(data))]
    try:
        prompts = [json.loads(text) for text in data.observations["prompt"]]
        images = _own_images(data.observations, len(prompts))
        turns = tuple(
            Turn(
                prompt=prompts[step],
                images=images[step],
                completion=data.actions[step],
                reward=float(data.rewards[step]),
                action=record["action"],
                valid=record["valid"],
                behavior_logprobs=record["behavior_logprobs"],
            )
            for step, record in enumerate(records)
        )
        return Episode(
            episode_id=about["episode_id"],
            turns=turns,
            terminated=bool(data.terminations[-1]),
            truncated=bool(data.truncations[-1]),
            final_prompt=prompts[-1] if about["final"] else None,
            final_images=images[-1] if about["final"] else None,
            env_id=about["env_id"],
            seed=about["seed"],
        )
    except TrajectoryError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, OSError, binascii.Error) as error:
        raise TrajectoryError(
            f"episode {data.id} of the Minari dataset {name!r} does not read ({type(error).__name__}: {error}); "
            "export the dataset again, or drop the episode by filter_episodes."
        ) from error


def _own_images(observations: Mapping[str, Any], steps: int) -> list[list[Any]]:
    """The pictures of each prompt."""
    if "image" in observations:
        return [[picture] for picture in observations["image"]]
    if "pictures" not in observations:
        return [[]] * steps
    return [
        [PIL.Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]) for png in json.loads(text)]
        for text in observations["pictures"]
    ]


# Any other set.


@dataclass(frozen=True)
class _Foreign:
    """Writes prompts and responses for the episodes of a dataset that has none."""

    dataset: Any
    task: str | Callable[[Any], str]
    see: ObservationOf
    words: _Words
    agent_format: AgentFormat
    env_id: str | None

    def episode(self, data: Any) -> Episode:
        steps = len(data)
        if not steps:
            raise TrajectoryError(
                f"{_where(self.dataset, data, 0)}: there is none; drop the episode by filter_episodes."
            )
        terminated, truncated = self._ends(data)
        task = self.task if isinstance(self.task, str) else self.task(data)
        history: deque[Exchange] = deque(maxlen=self.agent_format.history)
        turns = []
        for step in range(steps):
            seen = self.see(_at(data.observations, step))
            prompt, images = self._prompt(task, seen, history, data, step)
            word, response = self.words(_at(data.actions, step), data, step)
            turns.append(Turn(prompt, images, response, float(data.rewards[step]), word))
            history.append(Exchange(seen, response))
        final: tuple[list | None, list | None] = (None, None)
        if truncated and _steps(data.observations) > steps:
            final = self._prompt(task, self.see(_at(data.observations, steps)), history, data, steps)
        spec = self.dataset.env_spec
        return Episode(
            episode_id=f"{self.dataset.id}/{data.id}",
            turns=tuple(turns),
            terminated=terminated,
            truncated=truncated,
            final_prompt=final[0],
            final_images=final[1],
            env_id=self.env_id if self.env_id is not None else (spec.id if spec is not None else ""),
            seed=self._seed(data),
        )

    def _prompt(self, task: str, seen: Any, history: deque[Exchange], data: Any, step: int) -> tuple[list, list]:
        try:
            return self.agent_format.build_prompt(task, seen, tuple(history))
        except (TypeError, ValueError) as error:
            raise TrajectoryError(f"{_where(self.dataset, data, step)}: {error}") from error

    def _ends(self, data: Any) -> tuple[bool, bool]:
        """Whether the episode is terminated, and whether it is truncated."""
        ends = np.asarray(data.terminations, bool) | np.asarray(data.truncations, bool)
        if ends[:-1].any():
            step = int(ends.argmax())
            raise TrajectoryError(
                f"{_where(self.dataset, data, step)}: the episode ends here and goes on; drop it by filter_episodes, "
                "or split it."
            )
        return bool(data.terminations[-1]), bool(data.truncations[-1] or not data.terminations[-1])

    def _seed(self, data: Any) -> int:
        (metadata,) = self.dataset.storage.get_episode_metadata([data.id])
        seed = metadata.get("seed")
        return int(seed) if isinstance(seed, int | np.integer) and 0 <= seed < 2**63 else -1


def _where(dataset: Any, data: Any, step: int) -> str:
    return f"Minari dataset {dataset.id!r}, episode {data.id}, step {step}"


class _Words:
    """The word of an action, and the response that gives it."""

    def __init__(self, dataset: Any, words: Words | None, agent_format: AgentFormat):
        self.dataset, self.words, self.agent_format = dataset, words, agent_format
        self.space = dataset.action_space
        self.responses: dict[str, str] = {}
        if callable(words):
            return
        if words is None and not isinstance(self.space, spaces.Discrete | spaces.Text):
            raise ValueError(
                f"The actions of the Minari dataset {dataset.id!r} are {self.space}: give a function "
                "words=(action) -> text."
            )
        if words is not None and not isinstance(self.space, spaces.Discrete):
            raise ValueError(
                f"The actions of the Minari dataset {dataset.id!r} are {self.space}, which a list of words does not "
                "fit; give a function words=(action) -> text."
            )
        if isinstance(words, str):
            raise TypeError("words must be a mapping, a sequence of strings or a function, not one string.")

    def __call__(self, action: Any, data: Any, step: int) -> tuple[str, str]:
        word = self._word(action, data, step)
        if word not in self.responses:
            response = self.agent_format.render(word)
            parsed = self.agent_format.parse(response)
            if not parsed.valid or parsed.action != word:
                raise TrajectoryError(
                    f"{_where(self.dataset, data, step)}: the format {self.agent_format.name!r} writes the word "
                    f"{word!r} as {response!r} and reads it as {parsed.action!r}; take another word or another format."
                )
            self.responses[word] = response
        return word, self.responses[word]

    def _word(self, action: Any, data: Any, step: int) -> str:
        if callable(self.words):
            word = self.words(action)
        elif self.words is None:
            word = action if isinstance(self.space, spaces.Text) else str(int(action))
        else:
            index = int(action) - (0 if isinstance(self.words, Mapping) else int(self.space.start))
            known = self.words if isinstance(self.words, Mapping) else dict(enumerate(self.words))
            if index not in known:
                raise TrajectoryError(
                    f"{_where(self.dataset, data, step)}: no word for the action {int(action)}; `words` has "
                    f"{dict(known)}. The actions are {self.space}."
                )
            word = known[index]
        if not isinstance(word, str) or not word.strip():
            raise TrajectoryError(f"{_where(self.dataset, data, step)}: the word of {action!r} is {word!r}, no text.")
        return word.strip()


def _checked_observation(function: ObservationOf, name: str) -> ObservationOf:
    def see(value: Any) -> Mapping[str, Any]:
        seen = function(value)
        if not isinstance(seen, Mapping) or not seen or not set(seen) <= {"image", "text"}:
            raise TypeError(
                f"the function `observation` must give a dictionary with 'image', 'text' or both, got {seen!r:.100} "
                f"for an observation of {name!r}."
            )
        return seen

    return see


def _reader(dataset: Any) -> ObservationOf:
    """How to see an observation of the dataset.

    Raises:
        TrajectoryError: it has no picture and no text, or more than one picture.
    """
    space = dataset.observation_space
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
    pictures = {key: part for key, part in parts.items() if _is_array(part)}
    texts = [key for key, part in parts.items() if isinstance(part, spaces.Text)]
    hint = "give a function observation=(observation) -> {'image': uint8 [H, W, 3], 'text': str}, either key or both."

    def fail(problem: str) -> TrajectoryError:
        return TrajectoryError(f"the observations of the Minari dataset {dataset.id!r} {problem}; {hint}")

    if not pictures and not texts:
        raise fail(f"have no picture (a Box of uint8, [H, W, 3]) and no text: {space}")
    if len(pictures) > 1:
        raise fail(f"have several pictures, {', '.join(map(repr, pictures))}")
    key, layout = "", ""
    if pictures:
        ((key, part),) = pictures.items()
        shape = tuple(part.shape or ())
        layout = _layout(shape)
        if not layout:
            raise fail(
                f"have an array of shape {list(shape)} that is no picture of at least {SMALLEST_PICTURE} x "
                f"{SMALLEST_PICTURE} in grey or RGB (symbols, or stacked frames)"
            )

    def see(value: Any) -> dict[str, Any]:
        value = value if isinstance(space, spaces.Dict) else {"": value}
        seen: dict[str, Any] = {"image": _rgb(np.asarray(value[key]), layout)} if layout else {}
        if texts:
            lines = [value[text] if len(texts) == 1 else f"{text}: {value[text]}" for text in texts]
            seen["text"] = "\n".join(lines)
        return seen

    return see


def _is_array(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)


def _layout(shape: tuple[int, ...]) -> str:
    """ "HW", "HWC" or "CHW"; "" for what is no picture."""

    def large(*sides: int) -> bool:
        return min(sides) >= SMALLEST_PICTURE

    if len(shape) == 2:
        return "HW" if large(*shape) else ""
    if shape[2] in (1, 3) and large(*shape[:2]):
        return "HWC"
    return "CHW" if shape[0] in (1, 3) and large(*shape[1:]) else ""


def _rgb(array: np.ndarray, layout: str) -> np.ndarray:
    """[H, W, 3]."""
    if layout == "CHW":
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
