"""README's figures are those of the committed results, and these are of the configurations that README names."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from argparse import Namespace
from dataclasses import asdict

import pytest

from hdpissa.benchmarks import (
    aot_table,
    figure_words,
    figures,
    throughput,
    throughput_table,
    throughput_work,
    timing,
    update_rank,
)
from hdpissa.engine.errors import ConfigError

# Committed results of an older form, which do not tell all of their configuration. Whoever measures one again takes it
# off this list.
NOT_TOLD = {
    "checkpoint",
    "cpu_layers_fp32",
    "export_memory",
    "load_memory",
    "slice_cache_start",
    "svd_methods",
}


def stored(figure):
    """The configuration of its result; None where there is no result."""
    file = figures.RESULTS / f"{figure.result}.json"
    return (json.loads(file.read_text()).get("configuration") or {}) if file.exists() else None


def test_readme_says_what_the_results_say():
    """`python benchmarks/figures.py --write` after a new result."""
    text = (figures.ROOT / "README.md").read_text()
    assert figures.replaced(text) == text


def test_every_figure_has_been_measured():
    text = (figures.ROOT / "README.md").read_text()
    assert "not measured yet" not in text[text.index(figures.BEGIN) : text.index(figures.END)]


def test_every_figure_names_a_script_that_is_there():
    for figure in figures.FIGURES:
        script = figure.command.split()[0]
        assert (figures.ROOT / "benchmarks" / script).is_file(), script


def test_no_other_table_of_readme_has_measured_numbers():
    """Seconds, megabytes and ratios stand in the generated table alone."""
    text = (figures.ROOT / "README.md").read_text()
    rest = text[: text.index(figures.BEGIN)] + text[text.index(figures.END) :]
    rows = [line for line in rest.splitlines() if line.startswith("|")]
    assert not [row for row in rows if re.search(r"\d+\.\d+ ?(?:s|MB|GB|x|×|%)(?:\W|$)", row)]


@pytest.mark.parametrize("figure", figures.FIGURES, ids=lambda figure: figure.result)
def test_results_are_of_the_configuration_that_readme_names(figure):
    if stored(figure) is None:
        pytest.skip("not measured yet")
    assert figure.others(stored(figure)) == {}


def test_results_that_do_not_tell_their_configuration_are_these():
    """The list shrinks as results are measured again, and never grows."""
    found = {f.result: f.not_told(stored(f)) for f in figures.FIGURES if stored(f) is not None}
    assert {name for name, missing in found.items() if missing} == NOT_TOLD & found.keys()


def test_a_result_of_another_configuration_is_seen():
    figure = figures.Figure("S = {slices}", "x", "x.py", str, {"slices": 8, "r": 16})
    assert figure.asked == "S = 8"
    assert figure.others({"slices": 2, "r": 16, "seed": 0}) == {"slices": 2}
    assert figure.not_told({"slices": 2}) == ["r"]


def started(figure, monkeypatch):
    """The full configuration that its command starts a run with, as the script itself reads it."""
    script, *words = shlex.split(figure.command)
    stem = script.removesuffix(".py")
    if stem == "update_rank":
        assert not words
        return json.loads(json.dumps(asdict(update_rank.Arguments())))
    if stem == "aot_table":
        return aot_table.configuration(aot_table.parse(words))
    monkeypatch.setattr(throughput, "check", lambda *_: None)  # the model is not there
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = timing.configuration_of(importlib.import_module(f"hdpissa.benchmarks.{stem}").parse(words))
    if stem == "export_memory":
        found |= {"r": 8, "slices": 8}  # constants of the script
    return found


@pytest.mark.parametrize("figure", [f for f in figures.FIGURES if f.configuration], ids=lambda figure: figure.result)
def test_the_named_command_gives_that_configuration(figure, monkeypatch):
    """Defaults of the script among them; a model that is not given is the demo's."""
    found = started(figure, monkeypatch)
    for key, value in figure.configuration.items():
        assert found[key] == value or (key.startswith("model") and not found[key] and value == figures.DEMO), key


# --- words ------------------------------------------------------------------------------------------------------------


def a_round(factor: float, tokens: tuple[int, ...] = (100, 20)) -> dict:
    """A run of two steps as the table takes it, its times multiplied."""
    phases = {"forward": factor, "backward": factor, "exchange": factor, "apply": factor}
    fixed = {"sent": 0, "received": 0, "collectives": 0, "loss": 1.0, "peak_bytes": [1], "padded_tokens": 1}
    fixed |= {"build_s": 1.0, "exchange_bytes": 0, "device": "cpu", "lengths": list(tokens), "phases": phases}
    return fixed | {name: [factor, factor] for name in ("step_s", "cpu_s", "update_s")}


def words_of(say, factors):
    """Of methods whose times are in these proportions in each round, on two ranks."""
    runs = {(2, method): [a_round(value) for value in values] for method, values in factors.items()}
    return say(throughput_table.table(runs, {}, throughput_work.model_work("tiny", None)))


def test_throughput_is_told_with_its_rounds_and_tokens():
    one = {"frozen": [1.0], "hd_pissa": [1.1], "reference": [3.3]}
    three = {"frozen": [1.0, 1.0, 1.0], "hd_pissa": [1.1, 1.0, 1.2], "reference": [3.3, 3.6, 2.4]}
    assert words_of(figure_words.tell_throughput, one) == (
        "HD-PiSSA 1.10, published 3.30; one run of each, 120 tokens a step in all"
    )
    assert words_of(figure_words.tell_throughput, three).startswith(
        "HD-PiSSA 1.10 (1.00 to 1.20), published 3.30 (2.40 to 3.60); median and range of 3 rounds"
    )
    assert words_of(figure_words.tell_published, three) == (
        "3.00 (2.00 to 3.60) by the clock, 3.00 (2.00 to 3.60) in CPU time; with nothing trained 3.30 (2.40 to 3.60) "
        "and 3.30 (2.40 to 3.60); median and range of 3 rounds, 120 tokens a step in all"
    )
    assert words_of(figure_words.tell_update, one) == "3.0: 3.30 s and 1.10 s; one run of each"
    assert words_of(figure_words.tell_update, three).startswith("3.0 (2.0 to 3.6): 3.30 s and 1.10 s; median and")
    assert "what they differ by is noise" in words_of(figure_words.tell_throughput, {**one, "lora": [1], "pissa": [2]})


def test_the_update_is_told_for_both_states_it_may_end_in():
    """The reference's leaves W on every rank: beside it stands the configuration in which HD-PiSSA's does so, too."""
    told = [figure for figure in figures.FIGURES if figure.say is figure_words.tell_update]
    assert [figure.configuration["zero"] for figure in told] == [{}, figures.GATHERED]
    assert "leaves shards" in told[0].asked
    assert "both leave the new W on every rank" in told[1].asked


def counted(what: str, planned: int, beside: int, found: int) -> dict:
    agrees = found == planned + beside
    return {"ranks": 1, "what": what, "counted": found, "planned": planned, "beside the plan": beside, "agrees": agrees}


def test_what_is_beside_the_plan_does_not_count_as_exact():
    exact, half, wrong = counted("bytes", 7, 0, 7), counted("attention", 5, 5, 10), counted("FLOP", 5, 0, 6)
    assert figure_words.tell_counted([exact, exact]) == "2 of 2 figures agree exactly, on 1 processes"
    assert figure_words.tell_counted([exact, {**half, "ranks": 4}]) == (
        "1 of 2 figures agree exactly, 1 after adding what the plan leaves out (attention), on 1 and 4 processes"
    )
    assert "1 do not agree (FLOP)" in figure_words.tell_counted([exact, half, wrong])


def test_rows_per_slice():
    asked = {figure.result: figure.asked for figure in figures.FIGURES if figure.say is figure_words.tell_published}
    assert "1 row per slice" in asked["throughput_smollm2_135m_instruct_fp32_gathered"]
    assert "2 rows per slice" in asked["throughput_smollm2_135m_instruct_bf16_long_rows"]
    assert figures.rows_per_slice({"micro_batch": 1}) == ""


# --- configurations ---------------------------------------------------------------------------------------------------


def test_configurations_have_no_path_of_this_machine(tmp_path):
    args = Namespace(model=str(tmp_path / "m"), data=tmp_path / "d", r=2, ranks=(1, 2), folder=tmp_path, label="x")
    assert timing.configuration_of(args) == {"model": "m", "data": "d", "r": 2, "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("there", "refused"),
    [
        ({"configuration": {"r": 4}}, "r 4 (now 2)"),
        ({"configuration": {"r": 2}}, None),
        ({"configuration": {}}, None),
        ({}, None),
        ({"environment": {"device": "A GPU"}, "configuration": {"r": 2}}, "device A GPU (now CPU)"),
    ],
)
def test_a_result_of_another_configuration_is_not_replaced(tmp_path, monkeypatch, there, refused):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    content = {"environment": {"device": "CPU (some), 2 threads"}, "rows": [], **there}
    (tmp_path / "x.json").write_text(json.dumps(content))
    ask = {"configuration": {"r": 2, "seed": 0}, "folder": tmp_path}
    timing.refuse_other("x", force=True, **ask)
    timing.refuse_other("y", force=False, **ask)
    if refused is None:
        return timing.refuse_other("x", force=False, **ask)
    with pytest.raises(ConfigError, match=re.escape(refused)) as error:
        timing.refuse_other("x", force=False, **ask)
    assert "--label" in str(error.value)
    return None


class Measured(Exception):  # noqa: N818
    """The script went on to measure."""


REFUSING = {
    "cpu_layers": ("cpu_layers_fp32", "cpu_layers.measure", ["--dtype", "fp32"], "rounds"),
    "checkpoint": ("checkpoint", "ranks.launch", ["--model", "m"], "slices"),
    "init": ("init", "init.matrices", ["--model_name_or_path", "m"], "layers"),
    "load_memory": ("load_memory", "load_memory.write_model", [], "gigabytes"),
    "slice_cache_start": ("slice_cache_start", "ranks.launch", ["--model", "m"], "slices"),
    "svd_methods": ("svd_methods", "svd_methods.imitated", [], "largest"),
    "export_memory": ("export_memory", "export_memory.write_model", [], "gigabytes"),
    "update_rank": ("update_rank", "task.make_task", ["--model", "m"], "lr"),
}


@pytest.mark.parametrize("stem", REFUSING)
def test_scripts_refuse_before_they_measure(stem, tmp_path, monkeypatch):
    """With --label (update_rank: --name) or --force they go on."""
    name, measuring, words, key = REFUSING[stem]
    main = importlib.import_module(f"hdpissa.benchmarks.{stem}").main

    def measured(*args, **kwargs):
        raise Measured

    monkeypatch.setattr(f"hdpissa.benchmarks.{measuring}", measured)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    timing.write(name, [], [], folder=tmp_path, configuration={key: -1})
    before = (tmp_path / f"{name}.json").read_text()

    def start(*more):
        monkeypatch.setattr("sys.argv", [stem, *words, "--folder", str(tmp_path), *more])
        main()

    with pytest.raises(ConfigError, match=rf"{name}\.json is of another configuration: .*{key} -1 \(now "):
        start()
    for more in (["--force"], ["--name" if stem == "update_rank" else "--label", "other"]):
        with pytest.raises(Measured):
            start(*more)
    assert (tmp_path / f"{name}.json").read_text() == before


def test_mistakes_are_one_line(capsys):
    def main():
        raise ConfigError("--x 1: must be 2")

    assert timing.run(main) == 2
    assert capsys.readouterr().err == "error: --x 1: must be 2\n"
    assert timing.run(lambda: None) == 0
