# SPDX-License-Identifier: Apache-2.0
"""The embedded default: a VLM of about 2.5 M parameters, built in-process and taught to read pictures, not to act.

`load_embedded_model()` gives the directory of a stock Idefics3 checkpoint. The first call builds it (minutes on two
cores, with a progress bar): own tokenizer, random weights from a seed, then supervised reading. A training text is a
full response up to its action (`... "action": "`): the state read aloud and the neutral thoughts that follow from it,
in states that scripted play visits, good and bad (`EVERYONE`). No action is in a loss, but in the lessons of ALFWorld,
which end with one of the admissible commands, drawn at random, and of MiniWoB++, which end with random play's action.
The reading is verified on fresh states before the model is used, and the result is cached.

The four games of Gym Cards have lessons that were tried; any other environment with pictures, `reading_fields` and a
script can be taught by its Gymnasium id. What was left out: any download, any other task than reading.

Axes: B rows, T tokens.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import gymnasium
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from .agent_format import default_format
from .envs.demonstrators import make_demonstrator

GAMES = ("NumberLine", "EZPoints", "Points24", "Blackjack")
# Optimiser steps that each game's reading takes, found by looking at the accuracy on fresh states.
ALFWORLD = "vlmq_trl/ALFWorld"
LESSON_STEPS = {"NumberLine": 120, "EZPoints": 450, "Points24": 800, "Blackjack": 800, ALFWORLD: 2000}
OTHER_LESSON_STEPS = 800
# Their states are mostly text: words are tokens, as a goal's words come back in the page, the reading and the action.
MINIWOB = "vlmq_trl/MiniWoB"
WORDY = (ALFWORLD, MINIWOB)
ALFWORLD_CORPUS_STATES = 2048  # for the tokenizer: rare words are in few states
ALFWORLD_LESSON_TURNS = 12  # of a household, whatever the run's own limit: so its lessons see many households
# Whose play shows each game its states. Random Points24 play piles up entries, most of them blanks, and a model of
# this size miscounts them; in ALFWorld it asks for help and inventories, whose texts hide where it is; in web pages it
# types the goal's words anywhere.
EVERYONE = ("expert", "flawed", "random")
PURPOSEFUL = ("expert", "flawed")
PURPOSEFUL_GAMES = ("Points24", ALFWORLD, MINIWOB)
# ALFWorld's thoughts follow from the reading alone, by looking up a name in it. A model learns that late from whole
# lessons, and soon from readings without prompt and picture: these drills come first, and go along with the lessons.
DRILL_STEPS, DRILL_ROWS, DRILL_WEIGHT = 1000, 96, 0.2
EXAM_STATES = 300
MAX_ENV_FAILURES = 5  # in a row; what a failed episode had shown is kept
EXTRA_COURSES = 2  # at most, for a model that does not read well enough after the first
IMAGE_TOKEN, END_TOKEN = "<image>", "<end_of_turn>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


BY_GAMES: Any = None  # a recipe's default that depends on its games


class ReadingError(RuntimeError):
    """The freshly built model does not read its pictures well enough to be used.

    Attributes:
        built: what `build_embedded_model` would have returned; None in another process.
    """

    def __init__(self, message: str, built: tuple[Any, Any, dict[str, float]] | None = None):
        super().__init__(message)
        self.built = built


@dataclass(frozen=True)
class EmbeddedRecipe:
    """Everything that decides the embedded model; its hash names the cache entry.

    Args:
        games: that it is taught to read, of `GAMES`, or ids of other environments.
        seed: of the weights, of the training states and of their order.
        steps: optimiser steps of the reading lessons; None takes the sum of the games' `LESSON_STEPS`, and for any
            other environment `OTHER_LESSON_STEPS`.
        batch_size: rows a step, of one game after the other; None takes 32 for ALFWorld and MiniWoB, whose rows are
            long, and 48 otherwise.
        learning_rate: peak of a one-cycle cosine schedule; None takes 1.5e-3 for ALFWorld and 2e-3 otherwise.
        states: training states of each game; None takes 12,000 for Points24 and BabyAI, 24,000 for ALFWorld, where
            states differ most, 1,500 for MiniWoB, whose browsers are slow, and 6,000 otherwise.
        required_accuracy: share of fresh states of each game whose whole reading must be right; None takes 0.75 for
            ALFWorld, where a sixth of the states show something in small print that nothing depends on, 0.94 for
            MiniWoB, where enter-date came to 0.943 after one extra course, and 0.95 otherwise.
        image_size: pixels of the picture's side as the model sees it; None takes 112 for BabyAI, where a patch then is
            one of the 7 x 7 cells, and 128 otherwise.
        patch_size: pixels of a patch's side.
        scale_factor: patches to an image token, along each side; None takes 1 for Points24, whose formula is written
            small, and for BabyAI's cells, and 2 otherwise.
        vision_hidden_size, vision_layers: of the vision tower.
        hidden_size: of the language model.
        layers: of the language model; None takes 4 for ALFWorld, where much is to be looked up, and 3 otherwise.
        vocab_size: of the tokenizer; None takes 2,048 for ALFWorld and MiniWoB, whose states are mostly text, and 512
            otherwise.
        version: of the lessons. Where it differs, so do they.
        env_kwargs: of the one environment in `games`, where they change what it shows or says. ALFWorld's `max_turns`
            is always 12 here.
    """

    games: tuple[str, ...] = GAMES
    seed: int = 0
    steps: int | None = None
    batch_size: int = BY_GAMES
    learning_rate: float = BY_GAMES
    states: int = BY_GAMES
    required_accuracy: float = BY_GAMES
    image_size: int = BY_GAMES
    patch_size: int = 16
    scale_factor: int = BY_GAMES
    vision_hidden_size: int = 128
    vision_layers: int = 4
    hidden_size: int = 192
    layers: int = BY_GAMES
    vocab_size: int = BY_GAMES
    version: int = BY_GAMES
    env_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.env_kwargs and len(self.games) > 1:
            raise ValueError(f"`env_kwargs={self.env_kwargs}` are of one environment, and `games` are {self.games}.")
        unknown = [game for game in self.games if game not in GAMES and game not in gymnasium.registry]
        if unknown or not self.games:
            raise ValueError(f"`games` must name some of {GAMES}, or registered environments, got {self.games}.")
        points24 = "Points24" in self.games
        babyai = all(game.startswith("vlmq_trl/BabyAI-") for game in self.games)
        alfworld = any(game.startswith(ALFWORLD) for game in self.games)
        miniwob = all(game.startswith(MINIWOB) for game in self.games)
        defaults: dict[str, Any] = {
            "image_size": 128,
            "scale_factor": 2,
            "states": 6_000,
            "required_accuracy": 0.95,
            "batch_size": 48,
            "learning_rate": 2e-3,
            "layers": 3,
            "vocab_size": 2048 if self.wordy else 512,
            "version": 2,
        }
        if points24 or babyai:
            defaults |= {"scale_factor": 1, "states": 12_000}
        if babyai:
            defaults |= {"image_size": 112}
        if miniwob:
            defaults |= {"states": 1_500, "required_accuracy": 0.94, "batch_size": 32, "version": 3}
        if alfworld:
            defaults |= {"states": 24_000, "required_accuracy": 0.75, "batch_size": 32, "version": 4}
            defaults |= {"learning_rate": 1.5e-3, "layers": 4}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if alfworld and len(self.games) == 1:
            object.__setattr__(self, "env_kwargs", {**self.env_kwargs, "max_turns": ALFWORLD_LESSON_TURNS})

    @property
    def wordy(self) -> bool:
        return all(game.startswith(WORDY) for game in self.games)

    @property
    def num_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        own = ((steps for start, steps in LESSON_STEPS.items() if game.startswith(start)) for game in self.games)
        return sum(next(steps, OTHER_LESSON_STEPS) for steps in own)


def load_embedded_model(
    recipe: EmbeddedRecipe | None = None, cache_dir: str | os.PathLike | None = None, progress: bool = True
) -> str:
    """Directory of the embedded model, built on first use.

    Args:
        recipe: how to build it.
        cache_dir: default `$VLMQ_TRL_CACHE`, else `~/.cache/vlmq_trl`.

    Raises:
        ReadingError: the reading did not reach `recipe.required_accuracy`. The model is kept aside then.
    """
    recipe = recipe or EmbeddedRecipe()
    root = Path(cache_dir or os.environ.get("VLMQ_TRL_CACHE") or Path.home() / ".cache" / "vlmq_trl")
    own = asdict(recipe)
    if not recipe.env_kwargs:  # the keys of before there were any
        del own["env_kwargs"]
    key = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]
    path = root / f"embedded-{key}"
    if (path / "model.safetensors").is_file():
        return str(path)
    root.mkdir(parents=True, exist_ok=True)
    try:
        built = build_embedded_model(recipe, progress)
    except ReadingError as error:
        assert error.built is not None
        poor = root / f"poor-{key}"
        _write(poor, recipe, *error.built)
        error.add_note(f"It lies in {poor}: give that as the model if it reads well enough for you.")
        raise
    _write(path, recipe, *built)
    return str(path)


def _write(
    path: Path,
    recipe: EmbeddedRecipe,
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    accuracy: dict[str, float],
) -> None:
    """Written aside and renamed, so that a build cut short leaves no half model behind."""
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        built = Path(work) / "model"
        model.save_pretrained(built)
        processor.save_pretrained(built)
        (built / "reading.json").write_text(
            json.dumps({"recipe": asdict(recipe), "reading_accuracy": accuracy}, indent=2) + "\n"
        )
        try:
            built.rename(path)
        except OSError:  # another process was faster
            if not (path / "model.safetensors").is_file():
                shutil.rmtree(path, ignore_errors=True)
                shutil.move(str(built), str(path))


def build_embedded_model(
    recipe: EmbeddedRecipe, progress: bool = True
) -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor, dict[str, float]]:
    """Builds, teaches and verifies; returns the model, its processor, and the reading accuracy by game."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(recipe.seed)
        processor = build_processor(recipe)
        model = build_model(recipe, processor)
        model.to("cuda" if devices else "cpu")
        taught = partial(_Lesson.collect, processor=processor, env_kwargs=recipe.env_kwargs)
        lessons = [taught(game, recipe.states, recipe.seed + 1, progress=progress) for game in recipe.games]
        # Seeds that the lessons never saw.
        exams = [taught(game, EXAM_STATES, recipe.seed + 1_000_003, progress=False) for game in recipe.games]
        # Roundings differ between processors, and with them a little of what a course teaches: it may take another.
        for course in range(1 + EXTRA_COURSES):
            _teach(model, lessons, recipe, course, progress)
            accuracy = {game: _reading_accuracy(model, exam) for game, exam in zip(recipe.games, exams, strict=True)}
            poor = {game: a for game, a in accuracy.items() if a < recipe.required_accuracy}
            if not poor:
                break
    if poor:
        known = {lesson.game: _reading_accuracy(model, lesson) for lesson in lessons if lesson.game in poor}
        by_heart = all(accuracy >= recipe.required_accuracy for accuracy in known.values())
        raise ReadingError(
            f"The embedded model reads {poor} of fresh states right, and {known} of its lessons' own; "
            f"{recipe.required_accuracy} of the fresh ones is required: raise "
            f"`EmbeddedRecipe.{'states' if by_heart else 'steps'}`, or choose another seed.",
            (model.cpu(), processor, accuracy),
        )
    return model.cpu(), processor, accuracy


def build_processor(recipe: EmbeddedRecipe) -> Idefics3Processor:
    """Image processor and own tokenizer: numbers, ranks and operators are tokens of their own, set phrases merge."""
    tokenizer = Tokenizer(models.BPE())
    values = r"\b[1-3][0-9]\b|[0-9]|\b[AJQK]\b|[-+*/=()_]|stand|hit|soft|hard|higher|lower|[\[\],]"
    others = [game for game in recipe.games if game not in GAMES]
    action = r'(?<="action": ")[^"]+'  # the tokens before an action do not depend on it
    if recipe.wordy:  # the blank after a word, not before it: so it is the same token where a quotation begins
        values = rf"{action}|[A-Za-z]+ ?|[0-9]|[^A-Za-z0-9 ]+ ?| +"
    elif others:
        values += f"|{action}"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(values), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    roles = ["<system>", "<user>", "<assistant>"]
    special = ["<pad>", END_TOKEN, "<begin>", IMAGE_TOKEN, "<fake_token_around_image>", "<global-img>", *roles]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = _corpus([*GAMES, *others], recipe.env_kwargs if others else {})
    if recipe.wordy:  # before a blank and without one, each word is a token
        corpus += 32 * sorted({word for text in corpus for word in re.findall("[A-Za-z]+", text)})
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=END_TOKEN,
        bos_token="<begin>",
        additional_special_tokens=special[3:],
    )
    size = {"longest_edge": recipe.image_size}
    image_processor = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    tokens = (recipe.image_size // recipe.patch_size // recipe.scale_factor) ** 2
    return Idefics3Processor(image_processor, fast, image_seq_len=tokens, chat_template=CHAT_TEMPLATE)


def build_model(recipe: EmbeddedRecipe, processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    """Idefics3 with fresh weights from torch's random state."""
    tokenizer = processor.tokenizer
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = {
        "hidden_size": recipe.vision_hidden_size,
        "intermediate_size": 4 * recipe.vision_hidden_size,
        "num_hidden_layers": recipe.vision_layers,
        "num_attention_heads": 4,
        "image_size": recipe.image_size,
        "patch_size": recipe.patch_size,
        "initializer_range": recipe.vision_hidden_size**-0.5,
    }
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "intermediate_size": 8 * recipe.hidden_size // 3,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "initializer_range": recipe.hidden_size**-0.5,
        **ids,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        scale_factor=recipe.scale_factor,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = Idefics3ForConditionalGeneration(config)
    # Reading never shows the action tokens; at the usual 0.02 their embeddings would drown in the residual stream, and
    # a critic could hardly tell one action from the other.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    return model


def _corpus(games: list[str], env_kwargs: dict[str, Any]) -> list[str]:
    """Prompts and responses of every game and format, for the tokenizer.

    Args:
        env_kwargs: of a game that is none of `GAMES`.
    """
    texts = []
    for game in games:
        count = 64 if game in GAMES else ALFWORLD_CORPUS_STATES if game.startswith(ALFWORLD) else 512
        for row in _states(game, count, seed=0, env_kwargs={} if game in GAMES else env_kwargs):
            texts += [row["prompt"], row["reading"], f'{row["reading"]}+"}}']
    return texts


def _states(
    game: str,
    count: int,
    seed: int,
    see: Callable[[np.ndarray], Any] = np.asarray,
    progress: bool = False,
    env_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """States that the game's players visit: `prompt`, `messages`, `image`, `reading` (up to the action), `command`:
    in ALFWorld one of the listed, drawn at random, in MiniWoB++ random play's, elsewhere None.

    Args:
        see: makes `image` of a picture.
    """
    env_id = f"vlmq_trl/{game}-v0" if game in GAMES else game
    env: Any = gymnasium.make(env_id, **(env_kwargs or {})).unwrapped
    agent_format = default_format(env)
    players = PURPOSEFUL if game.startswith(PURPOSEFUL_GAMES) else EVERYONE
    demonstrators = [make_demonstrator(env_id, policy) for policy in players]
    stream = (seed, GAMES.index(game) if game in GAMES else crc32(game.encode()))
    rng, commands = np.random.default_rng(stream), np.random.default_rng((*stream, 1))
    rows: list[dict[str, Any]] = []
    seen: dict[bytes, Any] = {}  # each picture once
    bar = tqdm(total=count, desc=f"Reading lessons: {game}", unit="state", disable=not progress, leave=False)
    episode = failures = 0
    while len(rows) < count:
        demonstrator = demonstrators[episode % len(demonstrators)]
        episode += 1
        try:
            observation, _ = env.reset(seed=int(rng.integers(2**31)))
            done = False
            while not done:
                decision = demonstrator(env, rng)
                messages, _ = agent_format.build_prompt(env.task, observation)
                response = agent_format.render("@", decision.reading, decision.thoughts)
                reading, _, _ = response.rpartition("@")
                prompt = "".join(part.get("text") or "" for message in messages for part in message["content"])
                key = hashlib.sha256(observation["image"]).digest()
                if key not in seen:
                    seen[key] = see(observation["image"])
                row = {"prompt": prompt, "messages": messages, "image": seen[key], "reading": reading}
                rows.append({**row, "command": _command(env, game, commands)})
                bar.update()
                observation, _, terminated, truncated, _ = env.step(decision.action)
                done = terminated or truncated
            failures = 0
        except NotImplementedError:  # the environment has no such player
            raise
        except Exception as error:
            failures += 1
            if failures > MAX_ENV_FAILURES:
                raise
            warnings.warn(
                f"{game} failed in a reading lesson, which goes on with another episode: {error}", stacklevel=2
            )
    env.close()
    bar.close()
    return [rows[i] for i in rng.permutation(len(rows))[:count]]


def _command(env: Any, game: str, rng: np.random.Generator) -> str | None:
    """What a lesson ends with."""
    if game.startswith(ALFWORLD):
        return str(rng.choice(env.legal_actions))
    return env.script.random(rng) if game.startswith(MINIWOB) else None


@dataclass
class _Lesson:
    """One game's states: `prompt_ids`, `reading_ids` and `command_ids`, B lists each; `pixels` [B, 3, H, W] uint8.

    Attributes:
        command_ids: what follows the reading, to the turn's end; empty where no command is taught.
        thoughts: where each reading's thoughts begin, as an index of its tokens.
        endings: the rows of the readings whose thoughts' clauses end with the same words, for each such words.
        names: [2, N] tokens of the N words that readings copy from their prompts (`_names`).
        digits: [9] tokens of 1 to 9.
    """

    game: str
    prompt_ids: list[list[int]]
    reading_ids: list[list[int]]
    command_ids: list[list[int]]
    thoughts: list[int]
    endings: list[np.ndarray]
    pixels: torch.Tensor
    pad_token_id: int
    names: np.ndarray
    digits: np.ndarray

    @classmethod
    def collect(
        cls,
        game: str,
        count: int,
        seed: int,
        processor: Idefics3Processor,
        progress: bool,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> "_Lesson":
        def pixels(image: np.ndarray) -> torch.Tensor:
            values = processor.image_processor([[image]], return_tensors="pt")["pixel_values"][0, 0]
            # Normalised with mean and standard deviation 0.5: back to bytes, exactly.
            return ((values + 1) * 127.5).round().to(torch.uint8)

        rows = _states(game, count, seed, pixels, progress, env_kwargs)
        blank = np.zeros((32, 32, 3), np.uint8)  # every picture has as many tokens
        prompts: dict[str, list[int]] = {}  # few, as a rule: one for each task text
        for row in rows:
            if row["prompt"] not in prompts:
                messages = prepare_multimodal_messages(row["messages"], images=[blank])
                text = apply_chat_template({"prompt": messages}, processor)["prompt"]
                prompts[row["prompt"]] = list(processor(text=[text], images=[[blank]])["input_ids"][0])
        prompt_ids = [prompts[row["prompt"]] for row in rows]
        tokenizer = processor.tokenizer

        def tokens(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        readings, answers, thoughts = [], [], []
        endings: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            before, mark, thought = row["reading"].rpartition('"thoughts": "')
            readings.append(tokens(row["reading"]))
            answers.append([] if row["command"] is None else tokens(f'{row["command"]}"}}{END_TOKEN}'))
            thoughts.append(len(tokens(before + mark)))
            clauses = thought.partition('"')[0].split(", ")
            endings.setdefault(", ".join(clause.rpartition(" ")[2] for clause in clauses), []).append(i)
        return cls(
            game,
            prompt_ids,
            readings,
            answers,
            thoughts,
            [np.array(found) for _, found in sorted(endings.items())],
            torch.stack([row["image"] for row in rows]),
            tokenizer.pad_token_id,
            _names(tokenizer, prompt_ids, readings),
            np.array(tokenizer.convert_tokens_to_ids([*"123456789"])),
        )

    def draw(self, rng: np.random.Generator, count: int, alike: bool) -> np.ndarray:
        """Random rows; `alike`: of similar length, so that little of the batch is padding."""
        rows = rng.integers(len(self.reading_ids), size=8 * count if alike else count)
        if not alike:
            return rows
        lengths = [len(self.prompt_ids[i]) + len(self.reading_ids[i]) for i in rows]
        first = count * int(rng.integers(8))
        return rows[np.argsort(lengths, kind="stable")][first : first + count]

    def renamed(self, row: int, rng: np.random.Generator, commands: bool = False) -> list[int]:
        """A row's tokens with the names of its prompt exchanged for others, and digits for digits, in prompt and
        reading alike: what is to be copied cannot be known by heart then."""
        return self._exchanged(self._tokens(row, commands), self.prompt_ids[row], rng)

    def _tokens(self, row: int, commands: bool) -> list[int]:
        return self.prompt_ids[row] + self.reading_ids[row] + (self.command_ids[row] if commands else [])

    def _exchanged(self, tokens: list[int], named: list[int], rng: np.random.Generator) -> list[int]:
        """`tokens` with the names that are in `named` exchanged for others, and digits for digits."""
        ids = np.array(tokens)
        new = np.arange(max(*tokens, *self.names.flat, *self.digits) + 1)
        known = np.isin(self.names, named).any(0)
        new[self.names[:, known]] = rng.permutation(self.names, axis=1)[:, known]
        new[self.digits] = rng.permutation(self.digits)
        return new[ids].tolist()

    def drill(self, rng: np.random.Generator, count: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Readings alone, all with exchanged names, each ending equally often; labels from behind the thoughts'
        first name on, but on no name that was not named before."""
        endings = rng.integers(len(self.endings), size=count)
        rows = [int(rng.choice(self.endings[ending])) for ending in endings]
        ids = [self._exchanged(self.reading_ids[row], self.reading_ids[row], rng) for row in rows]
        labels = [[-100] * len(row) for row in ids]
        names = {token: name for form in self.names.tolist() for name, token in enumerate(form)}
        for asked, tokens, start in zip(labels, ids, (self.thoughts[row] for row in rows), strict=True):
            known = {names[token] for token in tokens[:start] if token in names}
            for t in range(start + 1, len(tokens)):  # not on the first, which the prompt tells
                if tokens[t] not in names or names[tokens[t]] in known:
                    asked[t] = tokens[t]
        return {k: v.to(device) for k, v in self._padded(ids, labels).items()}

    def _padded(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, torch.Tensor]:
        """[B, T] right-padded ids, mask and labels (-100 on padding)."""
        width = max(map(len, ids))
        lengths = torch.tensor([len(row) for row in ids])
        return {
            "input_ids": torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in ids]),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
        }

    def batch(
        self,
        rows: np.ndarray,
        device: torch.device,
        renaming: np.random.Generator | None = None,
        commands: bool = False,
    ) -> dict[str, torch.Tensor]:
        """[B, T] right-padded ids, mask and labels (-100 on prompt and padding), and pixel values.

        Args:
            renaming: gives half of the rows other names.
            commands: go on after the readings, to the turns' ends.
        """
        ids = [self._tokens(i, commands) for i in rows]
        if renaming is not None and self.names.size:
            exchanged = renaming.random(len(rows)) < 0.5
            ids = [self.renamed(rows[k], renaming, commands) if exchanged[k] else own for k, own in enumerate(ids)]
        prompts = [len(self.prompt_ids[i]) for i in rows]
        labels = [[-100] * prompt + row[prompt:] for prompt, row in zip(prompts, ids, strict=True)]
        batch = self._padded(ids, labels)
        batch["pixel_values"] = self.pixels[torch.as_tensor(rows)].float().div(127.5).sub(1)[:, None]
        return {k: v.to(device) for k, v in batch.items()}


def _names(tokenizer: Any, prompts: list[list[int]], readings: list[list[int]]) -> np.ndarray:
    """[2, N] tokens of the words that readings copy, before a blank and without one.

    Where such a word stands in a reading it stands in the prompt too, but not in every prompt.
    """
    words = {t: tokenizer.decode([t]).rstrip(" ") for t in {t for row in prompts + readings for t in row}}
    in_prompts: Counter[str] = Counter()
    in_readings: Counter[str] = Counter()
    in_both: Counter[str] = Counter()
    for prompt, reading in zip(prompts, readings, strict=True):
        prompted, read = {words[t] for t in prompt}, {words[t] for t in reading}
        in_prompts.update(prompted)
        in_readings.update(read)
        in_both.update(prompted & read)
    names = [
        word
        for word, count in sorted(in_both.items())
        if re.fullmatch(r"[A-Za-z]{3,}", word)
        and count >= 0.7 * in_readings[word]
        and in_prompts[word] < 0.9 * len(prompts)
    ]
    forms = [[tokenizer(word + blank, add_special_tokens=False)["input_ids"] for word in names] for blank in (" ", "")]
    known = [k for k in range(len(names)) if len(forms[0][k]) == len(forms[1][k]) == 1]
    return np.array([[form[k][0] for k in known] for form in forms], dtype=np.int64)


def _optimizer(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))


def _drill(model: Any, lesson: _Lesson, recipe: EmbeddedRecipe, progress: bool) -> None:
    """`DRILL_STEPS` of AdamW on the lesson's drills, at a constant rate after a warm-up."""
    optimizer = _optimizer(model, recipe.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    rng = np.random.default_rng((recipe.seed, DRILL_STEPS))
    model.train()
    bar = tqdm(range(DRILL_STEPS), desc=f"Drills for the embedded model: {lesson.game}", disable=not progress)
    for step in bar:
        loss = model(**lesson.drill(rng, DRILL_ROWS, model.device)).loss
        _update(model, optimizer, scheduler, loss)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def _update(model: Any, optimizer: Any, scheduler: Any, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()


def _teach(model: Any, lessons: list[_Lesson], recipe: EmbeddedRecipe, course: int, progress: bool) -> None:
    """One-cycle AdamW on the readings; one game a step, in turn. Extra courses have half the steps, half the rate."""
    steps = recipe.num_steps if course == 0 else -(-recipe.num_steps // 2)
    peak = recipe.learning_rate if course == 0 else recipe.learning_rate / 2
    for lesson in lessons if course == 0 else []:
        if lesson.game.startswith(ALFWORLD):
            _drill(model, lesson, recipe, progress)
    optimizer = _optimizer(model, peak)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3,
    )
    rng = np.random.default_rng(recipe.seed if course == 0 else (recipe.seed, course))
    model.train()
    desc = "Teaching the embedded model to read" + (f", extra course {course}" if course else "")
    bar = tqdm(range(steps), desc=desc, unit="step", disable=not progress)
    for step in bar:
        lesson = lessons[step % len(lessons)]
        rows = lesson.draw(rng, recipe.batch_size, alike=recipe.wordy)
        loss = model(**lesson.batch(rows, model.device, rng if recipe.wordy else None, commands=True)).loss
        total = loss
        if lesson.game.startswith(ALFWORLD):
            total = loss + DRILL_WEIGHT * model(**lesson.drill(rng, recipe.batch_size, model.device)).loss
        _update(model, optimizer, scheduler, total)
        if step % 10 == 0:
            bar.set_postfix(game=lesson.game, loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def _reading_accuracy(model: Any, exam: _Lesson) -> float:
    """Share of states whose whole reading is the model's first choice, token after token (so greedy play reads so); of
    the first `EXAM_STATES`."""
    right, count = 0, min(len(exam.reading_ids), EXAM_STATES)
    for rows in np.array_split(np.arange(count), max(1, count // 100)):
        batch = exam.batch(rows, model.device)
        labels = batch.pop("labels")[:, 1:]
        choice = model(**batch).logits[:, :-1].argmax(-1)
        right += int(((choice == labels) | (labels == -100)).all(1).sum())
    return right / count
