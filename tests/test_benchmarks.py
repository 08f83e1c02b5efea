# SPDX-License-Identifier: Apache-2.0
"""`examples/benchmarks/`: worker processes, resumption, pooled figures, generated pages; on made-up results."""

import json
import re
import time

import gymnasium
import pytest

from examples import train_agent
from examples.benchmarks import common, domains, environments, learning, online, speed, tabular
from tests import tiny_models
from vlmq_trl import collect_demonstrations, filter_top_returns
from vlmq_trl.rollout import Response

MARKED = "# Page\n\n<!-- {0}: generated, do not edit -->\n\nold\n\n<!-- {0}: end -->\n\nafter\n"


def test_section_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(MARKED.format("learning"))
    for text in ("first\n", "second"):
        common.write_section(page, "learning", text)
    assert page.read_text() == MARKED.format("learning").replace("old", "second")
    with pytest.raises(ValueError, match="must hold the lines '<!-- speed: generated, do not edit -->'"):
        common.write_section(page, "speed", "text")


def test_workers_run_side_by_side_and_a_crash_loses_one_only(tmp_path):
    def command(seconds, code):
        return [
            "-c",
            f"import os, sys, time; print(os.environ['OMP_NUM_THREADS']); time.sleep({seconds}); sys.exit({code})",
        ]

    commands = [("a/slow", command(4, 0)), ("a/crash", command(0, 3)), ("a/last", command(0, 0))]
    start = time.perf_counter()
    ended = list(common.run_workers(commands, jobs=2, threads=1, logs=tmp_path))
    assert [(name, succeeded) for name, succeeded, _, _ in ended] == [
        ("a/crash", False),
        ("a/last", True),
        ("a/slow", True),
    ]
    assert time.perf_counter() - start < 60
    assert ended[0][3].read_text().strip() == "1"


def test_clock_and_table():
    assert [common.clock(s) for s in (0, 59.6, 61, 5025)] == ["0:00", "1:00", "1:01", "1:23:45"]
    assert common.markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize("game", online.SETTINGS)
def test_the_online_configurations_are_what_was_measured(game):
    stem = {"NumberLine": "number_line", "EZPoints": "ez_points"}.get(game, game.lower())
    config = common.ROOT / "examples" / "configs" / f"online_{stem}.yaml"
    _, written, _ = train_agent.parse(["--config", str(config)])
    _, measured, _ = train_agent.parse(common.as_flags(online.OnlineRun(game, "online", 0).arguments))
    own = {"output_dir", "logging_dir", "eval_seed", "rollout_seed", "seed"}
    written, measured = (
        {name: value for name, value in args.to_dict().items() if name not in own} for args in (written, measured)
    )
    assert written == measured


def test_pooled_figures():
    results = [{"greedy": {"successes": s, "episodes": 10, "solvable": 8}} for s in (2, 4, 6)]
    level = learning.pooled(results, "greedy")
    assert level["rate"] == pytest.approx(12 / 30) and (level["worst"], level["best"]) == (0.2, 0.6)
    # Wilson, p = 0.4, n = 30, z = 1.96: centre 0.4114, half-width 0.1650.
    assert level["low"] == pytest.approx(0.2459, abs=1e-4) and level["high"] == pytest.approx(0.5768, abs=1e-4)
    assert learning.cells(level) == ["**40.0** (24.6–57.7)", "20.0–60.0"]
    assert learning.cells(learning.pooled(results[:1], "greedy"))[1] == "20.0–20.0 *"  # not all seeds
    assert learning.pooled(results, "greedy", solvable=True)["rate"] == pytest.approx(12 / 24)
    assert learning.pooled([], "greedy") is None


def made_up(run, successes):
    test = {"successes": successes, "episodes": 1000, "solvable": 750, "success_rate": successes / 1000}
    return {
        "run": run.name,
        "arguments": run.arguments,
        "machine": {"cpu": "abacus", "cores": 2, "memory_gb": 1, "gpu": None},
        "versions": {"torch": "2"},
        "wall_seconds": 60.0,
        "data": {"successes": 280, "episodes": 1000},
        "before": {"greedy": test, "sampled": test} if getattr(run, "variant", "") == "sft" else None,
        "history": [{"step": s, "success_rate": s / 100} for s in (0, 50)],
        "best_step": 50,
        "train_seconds": 61.0,
        "greedy": test,
        "sampled": test,
    }


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """The benchmark with its results and pages in a folder of the test's own."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(
        "".join(map(MARKED.format, ("learning", "domains", "online", "speed")))
    )
    (tmp_path / "README.md").write_text(MARKED.format("learning"))
    for module in (common, domains, learning, online, speed):
        monkeypatch.setattr(module, "ROOT", tmp_path, raising=False)
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(module, "PAGE", tmp_path / "docs" / "results.md")
    return tmp_path


def test_runs_are_distinct_and_seeds_keep_apart():
    runs = learning.all_runs()
    assert len({run.name for run in runs}) == len({run.path for run in runs}) == len(runs)
    first, second = (learning.LearningRun("NumberLine", "sft", seed).arguments for seed in (0, 1))
    assert first["collection_seed"] + first["episodes"] <= second["collection_seed"]
    for run in runs:
        script, args, _ = train_agent.parse(run.argv)
        assert script.game == run.setting and args.seed == run.seed
    named = {run.variant for run in runs}
    assert all(variant in named for _, lines in learning.ABLATION_TABLES for _, variant in lines)


def test_a_finished_run_is_kept_unless_its_arguments_changed(pages, monkeypatch):
    run = learning.LearningRun("NumberLine", "sft", 0)
    assert run.result() is None
    common.write_json(run.path, made_up(run, 500))
    assert run.result()["greedy"]["successes"] == 500
    monkeypatch.setitem(learning.COMMON, "learning_rate", 0.5)
    assert run.result() is None


def test_command_line(pages, monkeypatch, capsys, tmp_path):
    """A script that computes its own runs: one well, one badly. What is there is kept, and failure shows."""
    script = tmp_path / "bench.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\nname = sys.argv[-1]\nassert 'vlmq' not in name\n"
        "path = Path(__file__).with_name('results') / 'NumberLine' / (name.split('/')[1] + '-seed0.json')\n"
        "path.parent.mkdir(parents=True, exist_ok=True)\n"
        "path.write_text(Path(__file__).with_name('made_up.json').read_text())\n"
    )
    monkeypatch.setattr(learning.LearningRun, "arguments", {})
    runs = [learning.LearningRun("NumberLine", variant, 0) for variant in ("sft", "filtered_bc", "vlmq_scalar")]
    common.write_json(runs[0].path, made_up(runs[0], 500))
    common.write_json(tmp_path / "made_up.json", made_up(runs[1], 320))
    reports = []

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
        code = common.command_line(str(script), "", runs, print, lambda: reports.append(1))
        return code, capsys.readouterr().out

    code, shown = call("--list", "--only", "*/sft", "*/vlmq*")
    assert code == 0 and not reports and [line.split()[0][-5:] for line in shown.splitlines()] == ["sft/0", "lar/0"]
    assert "50.0 %" in shown and "missing" in shown
    code, shown = call("--only", "*/sft", "*/filtered_bc")
    assert code == 0 and "1 of 2 runs are done" in shown and "[1/1] NumberLine/filtered_bc/0: greedy  32.0 %" in shown
    code, shown = call("--jobs", "1")
    assert code == 1 and "2 of 3" in shown and "FAILED, see" in shown and len(reports) == 4
    with pytest.raises(SystemExit):
        call("--only", "nothing")
    call("--work", "NumberLine/sft/0")


def test_report(pages):
    wins = {"sft": 300, "filtered_bc": 320, "vlmq_scalar": 985, "vlmq_vocab": 700}
    for setting in ("NumberLine", "Points24"):
        for variant, successes in wins.items():
            for seed in learning.SEEDS:
                run = learning.LearningRun(setting, variant, seed)
                common.write_json(run.path, made_up(run, successes if setting == "NumberLine" else successes // 2))
    learning.report()
    page, readme = (pages / "docs" / "results.md").read_text(), (pages / "README.md").read_text()
    assert "NumberLine: VLMQ, scalar critic, at least 98 % | 98.5 | reached" in page
    assert (
        "Points24: 10 points over SFT and filtered cloning, intervals apart | +33.2, intervals apart | reached" in page
    )
    assert "| SFT | **30.0** (28.4–31.7) | 30.0–30.0 | **30.0**" in page and "abacus, 2 cores" in page
    assert "Of the hands that have a solution" in page and "| **65.6** (63.6–67.5) |" in page  # 492 of 750
    assert "| NumberLine, random play | 28.0 | 30.0 | 32.0 | 98.5 | 70.0 |" in readme
    assert "EZPoints" not in readme  # nothing there yet
    assert (pages / "docs" / "learning_curves.png").stat().st_size > 10_000
    missed = learning.LearningRun("NumberLine", "vlmq_scalar", 0)
    common.write_json(missed.path, made_up(missed, 900))
    learning.report()
    assert "at least 98 % | 95.7 | **missed**" in (pages / "docs" / "results.md").read_text()


def test_one_run_writes_its_file(pages, monkeypatch, tmp_path):
    model, processor = tiny_models.build("idefics3")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    small = {
        "model_name_or_path": str(tmp_path / "model"),
        "episodes": 6,
        "max_steps": 1,
        "eval_steps": 1,
        "eval_episodes": 2,
        "test_episodes": 3,
        "per_device_train_batch_size": 2,
        "max_completion_length": 2,
    }
    for name, value in small.items():
        monkeypatch.setitem(learning.SETTINGS["NumberLine"]["arguments"], name, value)
    run = learning.LearningRun("NumberLine", "filter_exp", 2)
    learning.work(run)
    result = run.result()
    assert result["greedy"]["episodes"] == result["sampled"]["episodes"] == 3
    assert [record["step"] for record in result["history"]] == [0, 1]
    assert result["machine"]["cores"] >= 1 and result["versions"]["torch"] and result["wall_seconds"] > 0
    assert result["command"] == "python examples/benchmarks/learning.py --only NumberLine/filter_exp --seeds 2"


def test_long_chain_of_thought_is_truthful_and_parses():
    fmt = learning.long_format()
    reading = {"current number": "2", "target number": "4"}
    response = fmt.render("+", reading, "target is higher than current")
    answer = json.loads(response)
    assert fmt.parse(response).action == answer["action"] == "+" and answer["current number"] == "2"
    assert "current number is 2, target number is 4" in answer["thoughts"]
    assert answer["thoughts"].endswith("target is higher than current")
    assert fmt.render("-", reading, "x").replace('"-"', '"+"') == fmt.render("+", reading, "x")  # gives nothing away


def test_speed_report(pages):
    for critic, time_ratio, peak in (("scalar", 1.1, 1100.0), ("vocab", 1.3, 1200.0)):
        common.write_json(
            pages / "results" / "speed" / f"tiny-{critic}-cpu.json",
            {
                "model": "tiny",
                "critic": critic,
                "command": f"python speed.py --critic {critic}",
                "machine": {"cpu": "abacus", "cores": 2, "threads": 2, "memory_gb": 1, "gpu": None},
                "versions": {"torch": "2"},
                "time": {
                    "sft_seconds": [1.0, 2.0],
                    "ratios": [time_ratio - 0.1, time_ratio + 0.1],
                    "ratio": time_ratio,
                },
                "memory": {
                    "sft": {"before_mb": 500.0, "peak_mb": 1000.0},
                    "vlmq": {"before_mb": 500.0, "peak_mb": peak},
                },
            },
        )
    speed.report()
    lines = [line for line in (pages / "docs" / "results.md").read_text().splitlines() if "CPU, 2 threads" in line]
    assert re.search(r"\*\*1\.10\*\* \(1\.00–1\.20\) \| 1,000 MB \| \*\*1\.10\*\* \| 1\.20 \| reached", lines[0])
    assert re.search(r"\*\*1\.30\*\* .* \*\*1\.20\*\* \| 1\.40 \| \*\*missed\*\*", lines[1])


def test_speed_measures_on_equal_turns(monkeypatch):
    assert len(speed.turns(24)) == 24
    monkeypatch.setitem(speed.MODELS["tiny"], "batch", 2)
    measured = speed.measure_time("tiny", "scalar", pairs=1, steps=3)
    assert len(measured["ratios"]) == 1 and measured["ratio"] > 0 and measured["parameters"] > 2e6


def test_speed_with_remembered_pictures(monkeypatch, tmp_path):
    monkeypatch.setitem(speed.MODELS["tiny-cached"], "batch", 2)
    trainers = [speed.make_trainer("tiny-cached", method, 3, str(tmp_path)) for method in ("sft", "scalar")]
    for trainer in trainers:
        frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
        assert frozen and all("vision" in name or "connector" in name for name in frozen)
    cache = trainers[1].model.vision_cache
    speed.step_times(trainers[1])
    new = cache.misses
    assert new
    speed.step_times(trainers[1])
    assert cache.misses == new and cache.hits >= new


def test_turns_a_second_of_environments(monkeypatch, tmp_path):
    page = tmp_path / "results.md"
    page.write_text("<!-- environments: generated, do not edit -->\n<!-- environments: end -->\n")
    monkeypatch.setattr(environments, "PAGE", page)
    monkeypatch.setattr(environments, "RESULT", tmp_path / "environments.json")
    monkeypatch.setattr(environments, "DOMAINS", {"Gym Cards": "vlmq_trl/EZPoints-v0"})
    monkeypatch.setattr(environments, "NUMBERS", (1, 2))
    monkeypatch.setattr("sys.argv", ["environments.py", "--seconds", "0.05", "--rounds", "1"])
    environments.main()
    assert page.read_text().count("| Gym Cards |") == 2 and "(**1.00**)" in page.read_text()
    assert all(
        speed > 0 for speeds in json.loads(environments.RESULT.read_text())["speeds"].values() for speed in speeds
    )


def test_padded_vocabulary(monkeypatch):
    monkeypatch.setitem(speed.MODELS, "padded", {"recipe": {"layers": 1}, "vocab_size": 5000, "batch": 2})
    model, processor = speed.build("padded")
    assert model.lm_head.weight.shape == (5000, 192) and model.lm_head.weight is model.get_input_embeddings().weight
    assert len(processor.tokenizer) < 600


def test_tables_learn_what_the_data_hold():
    """Two ways to the goal, each with one bad half, are stitched together by Q-learning only."""
    good = [("a", "left", 0.0), ("b", "wait", -1.0)]
    episodes = [good, good, [("a", "right", -1.0), ("b", "go", 1.0)], [("a", "right", -1.0), ("c", "go", 1.0)]]
    assert tabular.cloned(episodes) == {"a": "left", "b": "wait", "c": "go"}
    # Q(b, go) = 1, so Q(a, left) = gamma; Q(a, right) = -1 + gamma * (V(b) + V(c)) / 2 = -1 + gamma.
    assert tabular.q_learned(episodes, 0.9) == {"a": "left", "b": "go", "c": "go"}
    # One of the two with return 0 is half of four episodes' best, whatever their order.
    best = tabular.best_episodes(episodes, 0.5, seed=0)
    assert sorted(tabular.total(steps) for steps in best) == [0.0, 0.0]


@pytest.mark.parametrize("game", ["NumberLine", "Blackjack", "EZPoints", "Points24"])
def test_tables_see_the_data_of_the_models(game):
    env_id, policy = f"vlmq_trl/{game}-v0", "flawed:0.3"
    dataset = collect_demonstrations(env_id, policy=policy, episodes=12, seed=5, progress=False)
    demonstrate = tabular.make_demonstrator(env_id, policy)
    played = tabular.play(env_id, lambda game, here, rng: demonstrate(game, rng).action, 12, 5)
    steps = [(action, reward) for episode in played for _, action, reward in episode]
    assert steps == list(zip(dataset["action"], dataset["reward"], strict=True))
    best = [tabular.total(steps) for steps in tabular.best_episodes(played, 0.25, seed=3)]
    rewards = sum(filter_top_returns(dataset, 0.25, seed=3)["reward"])
    assert sum(best) == pytest.approx(rewards)


def test_a_table_improves_itself(monkeypatch):
    monkeypatch.setattr(tabular, "BUDGET", 3000)
    result = tabular.measure_online("EZPoints", 0)
    assert 3000 <= result["turns"] <= 3005 and result["test_episodes"] == 1000
    assert result["successes"]["start"] < result["successes"]["online"]
    row = tabular.online_section([result | {"setting": setting} for setting in online.SETTINGS]).splitlines()[2]
    assert row.startswith("| NumberLine, flawed:0.6 | **") and row.count("%") == 0


# ---- other domains ----


def test_domain_runs_are_understood_by_the_script():
    runs = domains.all_runs()
    assert len({run.path for run in runs}) == len(runs)
    for run in runs:
        script, args, _ = train_agent.parse(run.argv)
        assert script.env_id == run.arguments["env_id"] and args.seed == run.seed
        assert [f"{name}={value}" for name, value in script.env_kwargs.items()] == run.arguments["env_options"]


def test_the_domains_report(pages):
    domains.report()
    assert "Nothing has been measured yet" in (pages / "docs" / "results.md").read_text()
    for variant, successes in {"sft": 300, "filtered_bc": 320, "vlmq_scalar": 330}.items():
        run = domains.DomainRun("BabyAI-GoToObj", variant, 0)
        common.write_json(run.path, made_up(run, successes))
    domains.report()
    page = (pages / "docs" / "results.md").read_text()
    assert "| BabyAI, GoToObj | +1.0 | **missed**, 1 of 3 seeds | +1.0 | **missed**, 1 of 3 seeds |" in page
    assert "| the data | – | – | **28.0** (25.3–30.9) | 28.0–28.0 * |" in page and "| before training |" in page
    for run in (
        domains.DomainRun("BabyAI-GoToObj", variant, seed) for variant in domains.COMPARED for seed in common.SEEDS
    ):
        common.write_json(run.path, made_up(run, 800 if run.variant == "vlmq_scalar" else 320))
    domains.report()
    assert "| BabyAI, GoToObj | +48.0 | reached |" in (pages / "docs" / "results.md").read_text()


def test_the_domains_ablations_stand_beside_their_setting(pages):
    by_return, by_q = (domains.DomainRun("ALFWorld-Pick", variant, 0) for variant in ("vlmq_scalar", "learned_q"))
    differing = {name for name in by_q.arguments if by_q.arguments[name] != by_return.arguments[name]}
    assert differing == {"advantage_estimator"}
    common.write_json(by_return.path, made_up(by_return, 500))
    domains.report()
    assert "| Ablation |" not in (pages / "docs" / "results.md").read_text()
    common.write_json(by_q.path, made_up(by_q, 400))
    domains.report()
    rows = (pages / "docs" / "results.md").read_text().partition("| Ablation |")[2].splitlines()
    assert rows[2].startswith("| `advantage_estimator` return | **50.0**")
    assert rows[3].startswith("| `advantage_estimator` q | **40.0**")


# ---- online ----


def test_online_runs_are_understood_by_the_script():
    runs = online.all_runs()
    assert len({run.name for run in runs}) == len({run.path for run in runs}) == len(runs)
    for run in runs:
        if not run.variant.startswith("grpo"):
            script, args, _ = train_agent.parse(common.as_flags(run.arguments))
            assert script.online and args.max_env_turns == online.BUDGET and args.max_steps == -1
    spans = [range(r.arguments["rollout_seed"], r.arguments["rollout_seed"] + online.BUDGET) for r in runs[::8]]
    assert all(not set(one) & set(other) for one in spans for other in spans if one.start < other.start)


def test_a_run_that_was_done_begins_anew(tmp_path):
    """Where its JSON file was removed; what an interrupted one left stays."""
    for methods, stays in (({}, True), ({"vlmq": {}}, False)):
        common.make_room(tmp_path / "run", {"seed": 0})
        common.write_json(tmp_path / "run" / "results.json", {"methods": methods})
        common.make_room(tmp_path / "run", {"seed": 0})
        assert (tmp_path / "run" / "results.json").is_file() == stays


def test_the_online_report(pages):
    online.report()
    assert "Nothing has been measured yet" in (pages / "docs" / "results.md").read_text()
    for seed, turns, last in ((0, 4000, 0.4), (1, 6000, 0.95)):
        run = online.OnlineRun("NumberLine", "online", seed)
        history = [
            {"step": 0, "success_rate": 0.1},
            {"step": 50, "success_rate": 0.92, "env_turns": turns},
            {"step": 100, "success_rate": last, "env_turns": 15003},
        ]
        common.write_json(run.path, {**made_up(run, 985), "history": history})
    online.report()
    text = (pages / "docs" / "results.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| VLMQ, offline start, then online"))
    assert "**98.5**" in row and "98.5–98.5 *" in row and row.endswith("| 4,000, 6,000 | –, 6,000 | 15,003, 15,003 |")
    assert (
        "| NumberLine, VLMQ, offline start, then online: at least 99 % "
        "| 98.5 (2 of 3 seeds) | **missed** | 98.5 (2 of 3 seeds) | **missed** |" in text
    )
    assert (pages / "docs" / "online_curves.png").is_file()


def test_turns_that_the_peer_plays_are_counted_and_rewarded():
    """NumberLine from 1 to 4, set by its seed and the actions since: a turn, or the rest of the episode too."""
    env = gymnasium.make("vlmq_trl/NumberLine-v0").unwrapped
    seed = next(s for s in range(1000) if env.reset(seed=s) and (env.current, env.target) == (1, 4))

    class Up:
        def act(self, requests):
            return [Response('{"action": "+"}')] * len(requests)

    answers = ['{"action": "+"}', '{"action": "-"}', "no action"]
    counted = {"turns": 0}
    one = online.play_on("vlmq_trl/NumberLine-v0", [seed] * 3, [["+"]] * 3, answers, None, counted)
    # At 2 of 4: closer, farther, and a response that is not one.
    assert one == [0.0, -1.0, -1.0] and counted["turns"] == 3
    whole = online.play_on("vlmq_trl/NumberLine-v0", [seed] * 3, [["+"]] * 3, answers, Up(), counted)
    # Then up to the target: one, three and two more turns.
    assert whole == [1.0, 0.0, 0.0] and counted["turns"] == 3 + 3 + 1 + 3 + 2
