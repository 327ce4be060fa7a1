"""A run's pictures and its report: what they show, that they need nothing, and that they never fail a run."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_runs import train_tiny
from launch_runs import flags, make_inputs, read_json, train_here, write_ds_config
from ranks import run_ranks
from report_runs import Page, spectra_here, text_boxes, write_run
from tiny import ds_settings, tiny_llama

from hdpissa.engine import pictures, report, run_pictures, spectra
from hdpissa.engine.recorder import Recorder
from hdpissa.engine.run_record import RunRecord
from hdpissa.launch import command_line, train_report
from hdpissa.launch import report as report_command
from hdpissa.launch.options_reporting import ReportingOptions

ALL = ["training_loss.png", "learning_rate.png", "throughput.png", "slice_norms.png", "spectra.png"]


# --- from files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A short run without a GPU, and a long one on many, with their reports."""
    root = tmp_path_factory.mktemp("runs")
    folders = {
        "short": write_run(root / "short", steps=12, slices=2, gpu=False),
        "long": write_run(root / "long", steps=5000, slices=32),
    }
    for folder in folders.values():
        assert report.write_report(folder, defaults={"max_length": 512}) == [*ALL, "report.html"]
    return folders


@pytest.mark.parametrize("name", ["short", "long"])
def test_the_page_needs_nothing_but_itself(drawn, name):
    page = Page((drawn[name] / "report.html").read_text())
    assert page.unclosed == []
    assert page.tags.count("svg") == len(ALL)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    outside = [r for r in page.references if not r.startswith("#")]
    assert outside == []
    targets = {r.removeprefix("#") for r in page.references}
    targets |= {found for style in page.styles for found in re.findall(r"url\(#([^)]*)\)", style)}
    assert targets
    assert targets <= set(page.ids), "a picture refers to what is not there"
    assert not [s for s in page.styles if re.search(r"url\((?!#)|@import", s)]
    assert page.policy.startswith("default-src 'none'")


def test_pictures_on_one_page_do_not_share_ids(drawn):
    ids = Page((drawn["short"] / "report.html").read_text()).ids
    assert ids
    assert len(ids) == len(set(ids))


def test_dark_and_light(drawn):
    """Every colour of a picture is a variable that both schemes define; nothing is fixed to ink on white."""
    text = (drawn["short"] / "report.html").read_text()
    head, body = text.split("</style>", 1)
    assert "prefers-color-scheme: dark" in head
    assert re.findall(r"#[0-9a-fA-F]{6}", re.sub(r'(href|id)="[^"]*"|url\([^)]*\)', "", body)) == []
    used = set(re.findall(r"var\(--(\w+)\)", body))
    assert used >= {"blue", "red"}
    assert all(head.count(f"--{name}:") == 2 for name in used)
    assert set(report.DARK) == set(pictures.PALETTE)
    assert all(_contrast(colour, "#171b21") >= 3 for colour in report.DARK.values())
    light = {k: v for k, v in pictures.PALETTE.items() if k not in ("orange", "sky", "pink")}  # those come with dashes
    assert all(_contrast(colour, "#ffffff") >= 3 for colour in light.values())


def _contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_what_the_page_tells(drawn):
    page = Page((drawn["short"] / "report.html").read_text())
    for text in (
        "Llama-2-7b-hf · meta-math/MetaMathQA · HD-PiSSA, 2 slices of rank 16 · 2 × cpu",
        "2.9000 → 1.0547",  # validation loss
        "18.17 → 2.87",  # perplexity
        "12 of 12",
        "1 steps were skipped, the last is 6: rank 1: a loss is not finite",
        "checkpoint-2 could not be saved",
        "How many <apples> & pears?",
        "<script>alert(1)</script>",  # as text
        "14 + 18 - 5 = 27",
        "1 answers in between",
        "17.00 GiB",
        "123,456,789",
        "git revision",
        "stage",
    ):
        assert text in page.text, text
    assert "the middle one" not in page.text


def test_arguments_of_the_default_are_folded(drawn):
    page = Page((drawn["short"] / "report.html").read_text())
    before, after = page.text.split("The other 1 arguments")
    assert "meta-llama" in before
    assert "max_length" not in before
    assert "max_length" in after


def test_files_are_small(drawn):
    """A long run's curves are thinned: its report is hardly larger than a short one's."""
    sizes = {name: {p.name: p.stat().st_size for p in folder.iterdir()} for name, folder in drawn.items()}
    assert sizes["long"]["metrics.jsonl"] > 1e6
    assert sizes["long"]["report.html"] < 400_000
    assert all(sizes["long"][name] < 250_000 for name in ALL)


@pytest.mark.parametrize("name", ["short", "long"])
def test_no_text_overlaps_another(drawn, name):
    """Titles, legends, labels and ticks, by their boxes; and none of them leaves the picture."""
    for picture in run_pictures.pictures(RunRecord.read(drawn[name])):
        boxes = text_boxes(picture)
        assert len(boxes) > 5
        width, height = (100 * side for side in picture.size)
        for text, (x0, y0, x1, y1) in boxes:
            assert x0 > -1, f"{picture.name}: {text!r} leaves the picture"
            assert y0 > -1, f"{picture.name}: {text!r} leaves the picture"
            assert x1 < width + 1, f"{picture.name}: {text!r} leaves the picture"
            assert y1 < height + 1, f"{picture.name}: {text!r} leaves the picture"
        for i, (text, a) in enumerate(boxes):
            for other, b in boxes[i + 1 :]:
                apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1
                assert apart, f"{picture.name}: {text!r} and {other!r} overlap"


def test_colours_and_axes_of_the_loss(drawn):
    """Units on the axes, both curves with a name, the validation curve at its own steps."""
    import matplotlib as mpl

    with mpl.rc_context(pictures.RUN_STYLE):
        figure = pictures.make_figure(7, 3.6)
        run_pictures.draw_loss(RunRecord.read(drawn["long"]), figure)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss (nats per token)")
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"training (smoothed)", "validation", "skipped step"} <= lines.keys()
    assert list(lines["validation"].get_xdata()) == [0, 1250, 2500, 3750, 5000]
    raw = next(line for label, line in lines.items() if label.startswith("_"))
    assert raw.get_alpha() < 0.5
    assert len(raw.get_xdata()) <= pictures.MOST_POINTS


# --- curves ----------------------------------------------------------------------------------------


def test_thinning_keeps_every_peak():
    y = [math.sin(i / 500) for i in range(50_000)]
    y[12_345], y[40_000], y[7] = 9.0, -9.0, math.nan
    x, thinned = pictures.thin(list(range(len(y))), y, 1000)
    assert len(x) <= 1000
    assert (thinned[x.index(12_345)], thinned[x.index(40_000)]) == (9.0, -9.0)
    assert x == sorted(x)
    assert pictures.thin([1, 2], [3, 4]) == ([1, 2], [3, 4])


def test_smoothing_has_no_lag_and_passes_over_gaps():
    line = [2.0 * i for i in range(200)]
    smoothed = pictures.smooth(line, 5)
    assert smoothed[20:-20] == pytest.approx(line[20:-20])
    line[100] = math.nan
    assert pictures.smooth(line, 5)[100] == pytest.approx(200.0, abs=2)
    assert pictures.smooth([math.nan] * 9, 1)[4] != pictures.smooth([math.nan] * 9, 1)[4]  # nan
    assert pictures.half_window(10) == 0


# --- what is not there -----------------------------------------------------------------------------


def test_a_run_that_was_killed_early(tmp_path):
    """Half a line, no state, a loss that is not finite; and a picture of an earlier run, which goes."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null, "learning_rate": 0.0}\n{"step": 2, "lo')
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "spectra.png").touch()
    assert report.write_report(tmp_path) == ["learning_rate.png", "report.html"]
    assert not (tmp_path / "spectra.png").exists()
    assert Page((tmp_path / "report.html").read_text()).unclosed == []


def test_an_empty_folder(tmp_path):
    assert report.write_report(tmp_path) == ["report.html"]
    assert "nothing to draw yet" in (tmp_path / "report.html").read_text()


def test_odd_files(tmp_path):
    """Rows that are no objects, fields of another type, a slice field whose length changes."""
    lines = ["[]", "3", '{"step": "x"}', '{"loss": 1}', '{"step": 1, "loss": "much", "slice_grad_norms": [1, 2]}']
    lines += ['{"step": 2, "loss": 2.0, "learning_rate": 1e-3, "slice_grad_norms": [1]}', '{"step": 3, "loss": true}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    for name in ("run.json", "run_state.json", "report.json", "sample_before_training.json"):
        (tmp_path / name).write_text("[1, 2]")
    record = RunRecord.read(tmp_path)
    assert [row["step"] for row in record.rows] == [1, 2, 3]
    assert record.per_slice() == {"slice_grad_norms": ([1.0], [[1.0, 2.0]])}
    assert "report.html" in report.write_report(tmp_path)


# --- spectra ---------------------------------------------------------------------------------------


def test_spectrum_of_a_product_that_is_never_formed():
    """Against the dense product's, float64; shapes where 2·r·S is less and more than the matrix."""
    torch.manual_seed(0)
    for rows, cols, components in ((40, 30, 12), (20, 30, 48)):
        A, B = torch.randn(components, cols), torch.randn(rows, components)
        dense = torch.linalg.svdvals(2.0 * B.double() @ A.double())
        found = spectra.singular_values(A, B, -2.0)
        assert len(found) == min(rows, cols, components)
        assert torch.allclose(found, dense[: len(found)], rtol=1e-12)


def test_which_weights():
    names = [f"layers.{i}.{kind}" for i in range(5) for kind in ("q", "v")]
    assert spectra.choose(names, 3) == ["layers.2.q", "layers.2.v", "layers.4.q"]
    assert spectra.choose(names, 99) == [f"layers.{i}.{kind}" for i in (2, 4, 0) for kind in ("q", "v")]
    assert spectra.choose(["lm_head"], 9) == ["lm_head"]
    assert spectra.choose(names, 0) == []


@pytest.mark.parametrize("exchange", ["factor", pytest.param("dense", marks=pytest.mark.slow)])
def test_spectra_of_a_run_are_those_of_its_change(exchange):
    """Two ranks, four slices. Without the second-order term the factors' spectrum is that of W_n − W_0 up to fp32
    rounding of W: each step rounds by at most 2⁻²⁴ |w|, here 6e-8 · 8 · √(rows · cols) ≈ 1e-5 in all singular values.
    """
    delta = {"second_order": False, "exchange": exchange}
    settings = ds_settings(slices=4, accumulation=2, delta=delta)
    results = run_ranks(2, train_tiny, settings, steps=3, after=spectra_here)
    told, start = results[0]["after"], tiny_llama().state_dict()
    assert told["kinds"] == {exchange}
    assert len(told["found"]["weights"]) == 14  # two layers: the middle one is the last
    for weight in told["found"]["weights"]:
        name = f"{weight['name']}.weight"
        dense = torch.linalg.svdvals((results[0]["weights"][name] - start[name]).double())
        values = torch.tensor(weight["values"], dtype=torch.float64)
        assert (weight["r"], weight["slices"]) == (2, 4)
        assert len(values) == min(*start[name].shape, 16)
        assert torch.allclose(values, dense[: len(values)], rtol=1e-3, atol=2e-5), name
        assert (values > 1e-3 * values[0]).sum() > 4, "higher than LoRA's rank, 2"
    assert told["none"]["weights"] == []
    assert len(told["none"]["left_out"]) == 14
    assert results[1]["after"]["found"]["weights"] == []  # rank 0 has them


# --- in a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two ranks, four slices, all that a report can show; the model's own card has a licence."""
    folder = tmp_path_factory.mktemp("run")
    inputs = make_inputs(folder / "inputs")
    (folder / "inputs" / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    ds = write_ds_config(folder / "ds.json", hd_pissa={"r": 2, "slices": 4})
    chosen = {**inputs, "ds_config": str(ds), "output_dir": str(folder / "out"), "max_steps": 4, "eval_steps": 2}
    chosen |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}
    chosen |= {"integrity_steps": 1, "sample_prompt": "How many?", "max_new_tokens": 3, "export_format": "both"}
    chosen |= {
        "report": True,
        "report_spectra": 5,
        "save_strategy": "no",
        "prompt_template": "none",
        "export_dtype": "fp32",
    }
    results = run_ranks(2, train_here, flags(chosen), str(folder / "cache"))
    assert [(result["code"], result["error"]) for result in results] == [(0, None)] * 2, results
    return folder / "out"


def test_a_run_leaves_its_report(run):
    assert all((run / name).stat().st_size > 5000 for name in (*ALL, "report.html"))
    page = Page((run / "report.html").read_text())
    for text in ("finished", "4 of 4", "before training", "after step 4", "Export adapter/", "How many?"):
        assert text in page.text, text
    extra = read_json(run / "report.json")
    assert extra["warnings"] == []
    assert len(extra["spectra"]["weights"]) == 5  # --report_spectra
    assert all(w["values"][0] > 0 for w in extra["spectra"]["weights"])
    assert extra["spectra"]["step"] == 4


def test_a_run_leaves_its_cards(run):
    """Beside both exports, with the run's figures, its template (none) and the licence of the base."""
    from huggingface_hub import ModelCard

    losses = [row["eval_loss"] for row in RunRecord.read(run).evaluations]
    for name, library in (("model", "transformers"), ("adapter", "peft")):
        card = ModelCard.load(run / name / "README.md")
        assert (card.data.library_name, card.data.to_dict()["license"]) == (library, "apache-2.0")
        assert f"| validation loss after step 4 | {losses[-1]:.4f}" in card.text
        assert "inputs = tokenizer(instruction" in card.text


def test_spectra_of_the_run_are_those_of_what_it_exported(run):
    """The exact model's W_n − W_0, second-order terms included: what those are is the adapter's measured residual."""
    from safetensors.torch import load_file

    before = load_file(run.parent / "inputs" / "model" / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    worst = read_json(run / "adapter" / "hdpissa_export.json")["residual"]["worst"]
    for weight in read_json(run / "report.json")["spectra"]["weights"]:
        change = (after[f"{weight['name']}.weight"] - before[f"{weight['name']}.weight"]).double()
        dense = torch.linalg.svdvals(change)[: len(weight["values"])]
        tolerance = (1.1 * worst + 1e-3) * change.norm()
        assert torch.allclose(torch.tensor(weight["values"], dtype=torch.float64), dense, rtol=0, atol=tolerance.item())


def test_the_command_draws_it_again(run, tmp_path, capsys):
    """From the files alone: the same page and pictures."""
    copy = tmp_path / "out"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.png", "report.html"))
    assert command_line.exit_code(report_command.main, ["--output_dir", str(copy)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (copy / "report.html").read_text() == (run / "report.html").read_text()
    assert all((copy / name).read_bytes() == (run / name).read_bytes() for name in ALL)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--output_dir"),
        (["--output_dir", "nowhere"], "no such folder; give the output folder of a run"),
        (["--output_dir", "."], "no metrics.jsonl and no run.json there"),
        (["--output_dir", ".", "--dpi", "9"], "unrecognized arguments: --dpi"),
    ],
)
def test_bad_command_lines(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line.exit_code(report_command.main, argv) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_report_spectra_is_not_negative():
    from hdpissa.engine.errors import ConfigError
    from hdpissa.launch import options_reporting

    with pytest.raises(ConfigError, match="--report_spectra is -1: must not be negative"):
        options_reporting.check(ReportingOptions(report_spectra=-1))


# --- never able to fail a run ----------------------------------------------------------------------


def ended(folder: Path, **options) -> tuple[list[str], list[str]]:
    """What `train_report.write` returns for a run that ended in this folder, and what it says."""
    from hdpissa.launch.train_arguments import TrainArguments

    lines: list[str] = []
    recorder = Recorder(folder, total_steps=1, weights=1, device_name="cpu", devices=1, rank=0)
    recorder.say("warning: the disk was full")
    recorder.say("no warning")
    recorder.say = lines.append
    engine = SimpleNamespace(plan=SimpleNamespace(rank=0))
    args = TrainArguments(output_dir=str(folder), **options)
    return train_report.write(args, engine, recorder, spectra=False), lines


def test_the_report_is_an_option(tmp_path):
    assert ended(tmp_path, report=False) == ([], [])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert ReportingOptions().report


def test_warnings_are_kept_for_the_report(tmp_path):
    write_run(tmp_path, steps=3, slices=1)
    (tmp_path / "metrics.jsonl").unlink()  # what would only cost time
    names, told = ended(tmp_path)
    assert (names[-1], told) == ("report.html", [])
    assert read_json(tmp_path / "report.json")["warnings"] == ["checkpoint-2 could not be saved", "the disk was full"]
    assert "the disk was full" in (tmp_path / "report.html").read_text()
    assert len(read_json(tmp_path / "report.json")["spectra"]["weights"]) == 9  # an earlier part's are kept


def test_what_goes_wrong_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TEMPLATE", tmp_path / "gone")
    names, told = ended(tmp_path)
    assert names == []
    (line,) = told
    assert line.startswith("warning: no report: FileNotFoundError: ")
    assert line.endswith("; the run itself is complete")


def test_a_new_run_clears_the_old_report(tmp_path):
    write_run(tmp_path, steps=3, slices=2)
    for name in (*ALL, "report.html"):
        (tmp_path / name).touch()
    report.clear(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "run.json", "run_state.json"]


# --- in a real browser -----------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
BROWSER += [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
]
BROWSER += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # no network


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_in_a_browser(run, tmp_path):
    """From the file system: nothing in the console, and a picture with the page's colours, dark and light."""
    from PIL import Image

    seen = {}
    for scheme, more in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        shot = tmp_path / f"{scheme}.png"
        command = [CHROMIUM, *BROWSER, *more, f"--user-data-dir={tmp_path / scheme}", f"--screenshot={shot}"]
        command += ["--window-size=1200,2600", (run / "report.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        assert "load failed" not in done.stderr, done.stderr
        colours = Image.open(shot).convert("RGB").getcolors(2**24)
        seen[scheme] = max(colours)[1], {colour for _, colour in colours}
    assert seen["light"][0] in ((255, 255, 255), (246, 247, 249))
    assert (0, 114, 178) in seen["light"][1], "the blue of the training curve"
    assert json.dumps(seen["light"][0]) != json.dumps(seen["dark"][0]), "dark is not light"
