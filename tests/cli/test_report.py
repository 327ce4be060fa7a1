"""A run's page: what it shows, that it needs nothing but itself, and that it never fails a run."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from launch_runs import make_inputs, read_json, small_run, train_ranks, write_ds_config
from report_runs import write_run

from hdpissa.launch import report as report_command
from hdpissa.launch.common import command_line
from hdpissa.launch.reporting import page as report


def pictures_of(page: str) -> list[bytes]:
    return [base64.b64decode(found) for found in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]


@pytest.mark.parametrize(("steps", "slices"), [(12, 2), (5000, 12)])
def test_a_page_needs_nothing_but_itself(steps, slices, tmp_path):
    """Of a short and of a long run; twice the same. Names are text and no part of the page."""
    folder = write_run(tmp_path / "run <script>", steps=steps, slices=slices)
    assert report.write_report(folder) == [report.PAGE, report.LOSS]
    page = (folder / report.PAGE).read_text()
    assert len(page) < 600_000
    assert len(re.findall(r'\b(?:src|href|srcset|action|data)="', page)) == len(pictures_of(page)) == 3
    assert page.count("<script") == 0 < page.count("&lt;script")
    assert all(ElementTree.fromstring(svg).tag.endswith("svg") for svg in pictures_of(page))
    assert len(re.findall("<tr><td>", page)) == 9  # weights
    assert command_line.exit_code(report_command.main, [str(folder)]) == 0
    assert (folder / report.PAGE).read_text() == page


def test_a_run_that_has_just_begun(tmp_path):
    """Half a line, no finite loss, no other file."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "applied": false, "refusal": ""}\n{"step": 2, "lo'
    )
    assert report.write_report(tmp_path) == [report.PAGE]
    assert pictures_of((tmp_path / report.PAGE).read_text()) == []


def test_a_moving_mean_leaves_out_what_is_not_finite():
    line = np.arange(200.0)
    line[50] = np.nan
    assert report.moving_mean(line)[100] == pytest.approx(100.0)
    assert report.moving_mean(line)[50] == pytest.approx(50.0)
    assert report.moving_mean(np.full(80, np.nan)).shape == (80,)


def test_the_rank_of_a_spectrum():
    """Squares 90, 9, 1: rank 1 holds 90 %, rank 2 holds 99 % of ‖ΔW‖² = 100."""
    weight = {"name": "layers.3.mlp.up", "rows": 9, "cols": 7, "r": 1, "slices": 2, "values": [90**0.5, 3.0, 1.0]}
    found = report.spectrum(weight)
    assert (found["held"], found["rank"], found["norm"], found["step_rank"]) == ("90.0%", 2, "10", 4)
    assert (found["kind"], found["layer"]) == ("up", "layer 3")


@pytest.mark.parametrize("argv", [[], ["{folder}"], ["{folder}/nowhere"]])
def test_mistakes_of_the_command(argv, tmp_path):
    assert command_line.exit_code(report_command.main, [word.format(folder=tmp_path) for word in argv]) == 2


def test_what_goes_wrong_ends_no_run(tmp_path, monkeypatch):
    from hdpissa.launch.trainers.pictures import RunPictures

    folder = write_run(tmp_path / "run", steps=3, slices=2)
    monkeypatch.setattr(report, "TEMPLATE", tmp_path / "gone")
    ended = RunPictures(SimpleNamespace(trainer=SimpleNamespace(preempted=True)))
    args = SimpleNamespace(process_index=0, output_dir=str(folder))
    ended.on_train_end(args, None, None)
    assert not (folder / report.PAGE).exists()
    ended.on_train_begin(args, None, None)
    assert not (folder / report.SPECTRA).exists()  # of an earlier run


# --- a real run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two ranks, four slices."""
    folder = tmp_path_factory.mktemp("run")
    inputs = make_inputs(folder / "inputs")
    ds = write_ds_config(folder / "ds.json", hd_pissa={"r": 2, "slices": 4})
    more = {"max_steps": 4, "eval_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}
    more |= {"slice_metrics_steps": 1, "save_strategy": "no", "export_format": "both", "export_dtype": "fp32"}
    train_ranks(2, small_run(inputs, folder / "out", ds_config=str(ds), **more), folder / "cache")
    return folder / "out"


def test_a_run_leaves_its_page(run):
    page = (run / report.PAGE).read_text()
    assert len(pictures_of(page)) == 3
    assert (run / report.LOSS).stat().st_size > 5000
    assert read_json(run / "run_state.json")["state"] == "finished"
    assert command_line.exit_code(report_command.main, [str(run)]) == 0
    assert (run / report.PAGE).read_text() == page


def test_spectra_of_the_run_are_those_of_what_it_exported(run):
    """The exact model's W_n − W_0, second-order terms included: what those are is the adapter's measured residual."""
    from safetensors.torch import load_file

    before = load_file(run.parent / "inputs" / "model" / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    worst = read_json(run / "adapter" / "hdpissa_export.json")["residual"]["worst"]
    weights = read_json(run / report.SPECTRA)["weights"]
    assert len(weights) == 14
    for weight in weights:
        change = (after[f"{weight['name']}.weight"] - before[f"{weight['name']}.weight"]).double()
        dense = torch.linalg.svdvals(change)[: len(weight["values"])]
        tolerance = (1.1 * worst + 1e-3) * change.norm()
        assert torch.allclose(torch.tensor(weight["values"], dtype=torch.float64), dense, rtol=0, atol=tolerance.item())


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
BROWSER += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1100,2200"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_in_a_browser(run, tmp_path):
    """From the file system: nothing in the console, and all three pictures are shown."""
    from PIL import Image

    command = [CHROMIUM, *BROWSER, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'shot.png'}"]
    done = subprocess.run([*command, (run / report.PAGE).as_uri()], capture_output=True, text=True, timeout=120)
    assert (done.returncode, "CONSOLE" in done.stderr) == (0, False), done.stderr
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    rows = np.flatnonzero((pixels == (0, 114, 178)).all(axis=2).any(axis=1))  # of the blue curves
    assert len(np.flatnonzero(np.diff(rows) > 40)) >= 2
