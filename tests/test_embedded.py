# SPDX-License-Identifier: Apache-2.0
"""`embedded.py`: the tiny model is built from its seed alone, taught to read and never to act, verified, cached."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmq_trl import EmbeddedRecipe, embedded, load_embedded_model
from vlmq_trl.agent_format import default_format
from vlmq_trl.envs import NumberLine
from vlmq_trl.envs.demonstrators import make_demonstrator

SMALL = EmbeddedRecipe(
    games=("NumberLine",),
    steps=2,
    batch_size=4,
    states=20,
    required_accuracy=0.0,
    vision_hidden_size=32,
    vision_layers=1,
    hidden_size=48,
    layers=1,
)
games = pytest.mark.parametrize("game", embedded.GAMES)


@pytest.fixture(scope="module")
def processor():
    return embedded.build_processor(SMALL)


def test_a_recipe_names_known_games():
    with pytest.raises(ValueError, match=r"`games` must name some of .*NumberLine.*got \('Chess',\)"):
        EmbeddedRecipe(games=("Chess",))
    with pytest.raises(ValueError, match="`games`"):
        EmbeddedRecipe(games=())


def test_points24_is_seen_in_more_image_tokens_and_states():
    assert [EmbeddedRecipe(games=(game,)).scale_factor for game in embedded.GAMES] == [2, 2, 1, 2]
    assert EmbeddedRecipe().scale_factor == 1  # all games
    babyai = EmbeddedRecipe(games=("vlmq_trl/BabyAI-GoToObj-v0",))
    assert (babyai.image_size, babyai.patch_size * babyai.scale_factor) == (7 * 16, 16)  # a token is a cell
    assert EmbeddedRecipe().image_size == 128
    assert [EmbeddedRecipe(games=(game,)).states for game in embedded.GAMES] == [6000, 6000, 12_000, 6000]
    assert EmbeddedRecipe(games=("Points24",), scale_factor=4).scale_factor == 4
    assert dataclasses.replace(SMALL, games=("Points24",)).scale_factor == 2  # as it was chosen


def test_one_alfworld_reader_serves_every_turn_limit():
    readers = [EmbeddedRecipe(games=("vlmq_trl/ALFWorld-Pick-v0",), env_kwargs=k) for k in ({}, {"max_turns": 30})]
    assert readers[0] == readers[1]  # and so is the model that the cache keeps
    unseen = EmbeddedRecipe(games=("vlmq_trl/ALFWorld-Pick-v0",), env_kwargs={"unseen": True})
    assert unseen != readers[0]  # what is read stays part of it


@pytest.fixture(scope="module")
def wordy_processor():
    recipe = EmbeddedRecipe(games=("vlmq_trl/ALFWorld-Look-v0",))
    assert (recipe.vocab_size, SMALL.vocab_size) == (2048, 512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "ALFWORLD_CORPUS_STATES", 512)  # enough here, and four times as fast
        return embedded.build_processor(recipe)


def test_where_states_are_text_words_are_tokens(wordy_processor):
    """So that what the text names is, in the reading and in the action, the same token again."""
    tokenizer = wordy_processor.tokenizer
    action = "take pencil 1 from desk 1"
    response = f'{{"visible": "pencil 1", "action": "{action}"}}'
    tokens = tokenizer.tokenize(response)
    assert tokens[-8:] == ["takeĠ", "pencilĠ", "1", "Ġ", "fromĠ", "deskĠ", "1", '"}']
    assert tokens.count("pencilĠ") == 2 and tokenizer.decode(tokenizer(response)["input_ids"]) == response
    before = tokenizer.tokenize('{"visible": "pencil 1", "action": "')
    assert tokens[: len(before)] == before, "whatever the action will be"
    told = tokenizer.tokenize(f"Commands: {action}.")
    taken = tokens[len(before) :]
    assert told[-1 - len(taken[:-1]) : -1] == taken[:-1], "as the text has them"


def test_names_are_exchanged_in_prompt_and_reading_alike(wordy_processor):
    lesson = embedded._Lesson.collect("vlmq_trl/ALFWorld-Look-v0", 60, 3, wordy_processor, progress=False)
    tokenizer = wordy_processor.tokenizer
    words = [[tokenizer.decode([t]) for t in form] for form in lesson.names]
    assert [word.rstrip(" ") for word in words[0]] == words[1] and len(words[1]) > 5
    assert {"desk", "nothing", "location"} & set(words[1]) == {"desk"}  # neither what is always there, nor what is not
    rng, exchanged = np.random.default_rng(0), 0
    for row in range(60):
        prompt, reading = lesson.prompt_ids[row], lesson.reading_ids[row]
        new = lesson.renamed(row, rng)
        assert len(new) == len(prompt) + len(reading)
        changes = dict(zip(prompt + reading, new, strict=True))
        assert [changes[t] for t in prompt + reading] == new, "each by one other"
        assert len(set(changes.values()) - set(lesson.names.ravel())) == len(set(changes) - set(lesson.names.ravel()))
        for before, after in changes.items():
            texts = tokenizer.decode([before]), tokenizer.decode([after])
            same_kind = [text.strip(" ").isdigit() for text in texts]
            assert before == after or (
                same_kind[0] == same_kind[1] and texts[0].endswith(" ") == texts[1].endswith(" ")
            )
        exchanged += sum(before != after for before, after in changes.items())
    assert exchanged > 100
    plain, renamed = (lesson.batch(np.arange(40), torch.device("cpu"), renaming) for renaming in (None, rng))
    assert plain["input_ids"].shape == renamed["input_ids"].shape
    same = (plain["input_ids"] == renamed["input_ids"]).all(1)
    assert 5 < same.sum() < 35, "about half of them"
    assert torch.equal(plain["labels"] == -100, renamed["labels"] == -100)


def test_commands_are_among_those_listed(wordy_processor):
    """What a model that is told to act at random would answer, to the end of its turn."""
    lesson = embedded._Lesson.collect("vlmq_trl/ALFWorld-Look-v0", 200, 3, wordy_processor, progress=False)
    tokenizer, rng, commands = wordy_processor.tokenizer, np.random.default_rng(0), set()
    for renaming in (None, rng):
        batch = lesson.batch(np.arange(200), torch.device("cpu"), renaming, commands=True)
        for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
            text, answer = tokenizer.decode(ids[mask == 1]), tokenizer.decode(labels[labels != -100])
            command = json.loads(answer.removesuffix(embedded.END_TOKEN))["action"]
            listed = text.partition("Commands: ")[2].partition(".")[0].split("; ")
            assert command in listed and answer.endswith(embedded.END_TOKEN)
            commands.add(command.partition(" ")[0])
    assert {"go", "take", "help", "examine"} <= commands
    reading = lesson.batch(np.arange(3), torch.device("cpu"))["labels"][0]
    assert tokenizer.decode(reading[reading != -100]).endswith('"action": "')


def test_drills_ask_for_what_follows_from_the_reading(wordy_processor):
    lesson = embedded._Lesson.collect("vlmq_trl/ALFWorld-Look-v0", 240, 3, wordy_processor, progress=False)
    tokenizer, rng = wordy_processor.tokenizer, np.random.default_rng(0)
    batch = lesson.drill(rng, 300, torch.device("cpu"))
    endings: dict[str, int] = {}
    for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        reading = json.loads(tokenizer.decode(ids[mask == 1]) + '"}')
        assert list(reading) == ["location", "carrying", "visible", "thoughts", "action"]
        goal, status = reading["thoughts"].split(", ")
        asked, wanted = tokenizer.decode(labels[labels != -100]), status.split(" ")[0]
        place, there = goal.split(" ")
        seen, held, location = (re.findall("[a-z]+", reading[k]) for k in ("visible", "carrying", "location"))
        assert (there == "here") == (place in seen)
        assert asked.startswith(f"{there}, "), "where it belongs is in the prompt alone"
        if status.endswith("here"):
            assert status.removesuffix(" here") in reading["visible"]
            assert asked.startswith(f"{there}, {status}"), "the name can be known"
        elif status.endswith("carried"):
            assert status.removesuffix(" carried") in reading["carrying"]
        elif wanted not in location:
            assert wanted not in seen + held
            assert asked.startswith(f"{there}, out of sight")
        assert asked.endswith('", "action": "') and "location" not in asked
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        ending = f"{there}, {status.split(' ')[-1]}"
        endings[ending] = endings.get(ending, 0) + 1
    assert len(endings) >= 5 and min(endings.values()) > 200 / len(endings), "each about as often"


def test_batches_of_text_have_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(1, 100, size=1000)
    none = np.zeros((2, 0), dtype=np.int64)
    texts = [[0] * n for n in lengths], [[0]] * 1000, [[]] * 1000, [0] * 1000, []
    lesson = embedded._Lesson("", *texts, torch.zeros(1000, 1), 0, none, none[0])
    drawn = [lesson.draw(np.random.default_rng(seed), 16, alike=True) for seed in range(200)]
    assert np.mean([np.ptp(lengths[rows]) for rows in drawn]) < 20
    assert abs(np.mean(lengths[np.concatenate(drawn)]) - lengths.mean()) < 5, "short and long alike"


def test_lessons_of_all_games_add_up():
    assert EmbeddedRecipe().num_steps == sum(embedded.LESSON_STEPS[game] for game in embedded.GAMES)
    assert EmbeddedRecipe(games=("vlmq_trl/ALFWorld-Look-v0",)).num_steps == embedded.LESSON_STEPS["vlmq_trl/ALFWorld"]
    assert SMALL.num_steps == 2


def test_built_once_and_from_the_seed_alone(tmp_path):
    state = torch.random.get_rng_state()
    path = load_embedded_model(SMALL, tmp_path / "a", progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert load_embedded_model(SMALL, tmp_path / "a", progress=False) == path
    assert len(list((tmp_path / "a").iterdir())) == 1  # no leftovers

    torch.manual_seed(99)  # the caller's seed does not matter
    again = load_embedded_model(SMALL, tmp_path / "b", progress=False)
    other = load_embedded_model(dataclasses.replace(SMALL, seed=1), tmp_path / "b", progress=False)
    first, second, third = (AutoModelForImageTextToText.from_pretrained(p).state_dict() for p in (path, again, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert (
        AutoProcessor.from_pretrained(path).tokenizer.get_vocab()
        == embedded.build_processor(SMALL).tokenizer.get_vocab()
    )
    told = json.loads(Path(path, "reading.json").read_text())
    assert told["recipe"]["games"] == ["NumberLine"] and 0 <= told["reading_accuracy"]["NumberLine"] <= 1


def test_the_cache_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMQ_TRL_CACHE", str(tmp_path))
    assert load_embedded_model(SMALL, progress=False).startswith(str(tmp_path))


def test_a_model_that_does_not_read_is_refused(tmp_path):
    strict = dataclasses.replace(SMALL, required_accuracy=0.95)
    with pytest.raises(
        embedded.ReadingError, match=r"'NumberLine'.*is required: raise `EmbeddedRecipe.steps`"
    ) as caught:
        load_embedded_model(strict, tmp_path, progress=False)
    (kept,) = tmp_path.iterdir()  # what took minutes is not lost
    assert caught.value.__notes__ == [f"It lies in {kept}: give that as the model if it reads well enough for you."]
    model, _, accuracy = caught.value.built
    assert json.loads((kept / "reading.json").read_text())["reading_accuracy"] == accuracy
    opened = AutoModelForImageTextToText.from_pretrained(kept).state_dict()
    assert all(torch.equal(x, opened[name]) for name, x in model.state_dict().items())


def test_an_environment_that_fails_in_a_lesson_costs_no_other_episode(monkeypatch):
    reset, resets = NumberLine.reset, itertools.count()

    def failing(env, seed):
        if next(resets) % often == 0:
            raise OSError("the simulator is gone")
        return reset(env, seed=seed)

    monkeypatch.setattr(NumberLine, "reset", failing)
    often = 3
    with pytest.warns(UserWarning, match="NumberLine failed in a reading lesson.*: the simulator is gone"):
        assert len(embedded._states("NumberLine", 40, seed=0)) == 40
    often = 1
    with pytest.warns(UserWarning), pytest.raises(OSError, match="is gone"):
        embedded._states("NumberLine", 40, seed=0)


def test_a_player_that_an_environment_lacks_ends_the_lesson(monkeypatch):
    def absent(env, rng):
        raise NotImplementedError("NumberLine has no scripted mistake")

    def players(env_id, policy):
        return absent if policy == "flawed" else make_demonstrator(env_id, policy)

    monkeypatch.setattr(embedded, "make_demonstrator", players)
    with pytest.raises(NotImplementedError, match="no scripted mistake"):
        embedded._states("NumberLine", 40, seed=0)


def test_what_was_learned_by_heart_takes_more_states(tmp_path, monkeypatch):
    marks = iter([0.34, 0.34, 0.34, 0.99])  # of the courses' exams, and of the lessons
    monkeypatch.setattr(embedded, "_reading_accuracy", lambda model, exam: next(marks))
    strict = dataclasses.replace(SMALL, required_accuracy=0.95)
    with pytest.raises(embedded.ReadingError, match=r"0.34.*0.99.*is required: raise `EmbeddedRecipe.states`"):
        load_embedded_model(strict, tmp_path, progress=False)


def test_a_model_that_reads_poorly_takes_another_course(tmp_path, monkeypatch):
    """Half as long, and only until it reads well enough."""
    marks, courses = iter([0.5, 0.96]), []
    teach = embedded._teach

    def watched(model, lessons, recipe, course, progress):
        courses.append(course)
        before = {name: p.clone() for name, p in model.named_parameters()}
        teach(model, lessons, recipe, course, progress)
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())

    monkeypatch.setattr(embedded, "_teach", watched)
    monkeypatch.setattr(embedded, "_reading_accuracy", lambda model, exam: next(marks))
    path = load_embedded_model(dataclasses.replace(SMALL, required_accuracy=0.95), tmp_path, progress=False)
    assert courses == [0, 1]
    assert json.loads(Path(path, "reading.json").read_text())["reading_accuracy"] == {"NumberLine": 0.96}


@games
def test_lessons_end_before_the_action(game, processor):
    """What is taught is everything up to the action: prompt masked, reading in the loss, action nowhere."""
    lesson = embedded._Lesson.collect(game, 12, 3, processor, progress=False)
    batch = lesson.batch(np.arange(12), torch.device("cpu"))
    assert batch["pixel_values"].shape[0] == 12
    rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"], lesson.prompt_ids, strict=True)
    for ids, labels, mask, prompt_ids in rows:
        text = processor.tokenizer.decode(labels[labels != -100])
        assert text.startswith('{"') and text.endswith('"action": "') and text.count('"action"') == 1
        prompt = len(prompt_ids)
        assert (labels[:prompt] == -100).all() and ids[:prompt].tolist() == prompt_ids
        assert ((labels == -100)[prompt:] == (mask == 0)[prompt:]).all()


@games
def test_the_tokenizer_keeps_responses_and_splits_off_actions(game, processor):
    """A response survives encoding and decoding, and the reading's tokens do not depend on the action after it."""
    tokenizer = processor.tokenizer
    env_id = f"vlmq_trl/{game}-v0"
    env = gymnasium.make(env_id).unwrapped
    agent_format = default_format(env)
    rng = np.random.default_rng(0)
    player = make_demonstrator(env_id, "random")
    for seed in range(5):
        env.reset(seed=seed)
        decision = player(env, rng)
        readings = set()
        for action in env.legal_actions:
            response = agent_format.render(action, decision.reading, decision.thoughts)
            ids = tokenizer(response, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == response
            reading, _, _ = response.rpartition(f'"{action}"')
            tokens = tokenizer(reading + '"', add_special_tokens=False)["input_ids"]
            assert ids[: len(tokens)] == tokens and tokenizer.decode(ids[len(tokens)]) == action
            readings.add(tuple(tokens))
        assert len(readings) == 1


def test_the_exam_counts_whole_readings(processor):
    """A model that always knows the next token reads everything; one that errs once in a row fails that row."""
    exam = embedded._Lesson.collect("NumberLine", 10, 3, processor, progress=False)

    class Oracle:
        device = torch.device("cpu")

        def __init__(self, spoilt):
            self.spoilt = spoilt

        def __call__(self, input_ids, **kwargs):
            following = input_ids.roll(-1, dims=1)
            following[list(self.spoilt), len(exam.prompt_ids[0]) + 1] += 1
            return type("Output", (), {"logits": torch.nn.functional.one_hot(following, 600).float()})

    assert embedded._reading_accuracy(Oracle(()), exam) == 1.0
    assert embedded._reading_accuracy(Oracle((2, 5, 6)), exam) == pytest.approx(0.7)
