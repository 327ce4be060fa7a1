"""The report and cards that a real run leaves: with its own figures, drawn again the same, shown by a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from launch_runs import make_inputs, read_json, train_ranks, write_ds_config
from report_runs import PICTURES, Page

from hdpissa.engine.run_record import RunRecord
from hdpissa.launch import command_line
from hdpissa.launch import report as report_command


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
    chosen |= {"report": True, "report_spectra": 5, "save_strategy": "no", "prompt_template": "none"}
    chosen |= {"export_dtype": "fp32"}
    train_ranks(2, chosen, folder / "cache")
    return folder / "out"


def test_a_run_leaves_its_report(run):
    assert all((run / name).stat().st_size > 5000 for name in (*PICTURES, "report.html"))
    page = Page((run / "report.html").read_text())
    for text in ("finished", "4 of 4", "before training", "the weights of step 4", "Export adapter/", "How many?"):
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
    assert all((copy / name).read_bytes() == (run / name).read_bytes() for name in PICTURES)


# --- in a real browser -----------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
BROWSER += ["--enable-logging=stderr"]
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
