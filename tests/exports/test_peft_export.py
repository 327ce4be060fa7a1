"""The PEFT adapter: stock peft on the untouched base must give the trained model, as far as the report says."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft_runs import export_error, train_and_export
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import ds_settings, tiny_batch, tiny_llama
from transformers import AutoModelForCausalLM

from hdpissa.engine.export import lora_format, residual, writer
from hdpissa.engine.export.lora_format import LoraWeight
from hdpissa.engine.export.lora_pairs import FilePairs
from hdpissa.engine.export.report import Residual
from hdpissa.engine.sharding.slicing import ShardRange

FIRST_ORDER = {"second_order": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny fp32 base in several files, its embeddings tied as in small Llamas."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(tie=True).save_pretrained(folder, max_shard_size="8KB")
    return str(folder)


def with_peft(base, folder, dtype=torch.float32):
    """(the stock model, its logits); warnings about missing or unexpected adapter keys are errors."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return model, model(**tiny_batch(999, 0, 0)).logits.float()


def true_residual(run, folder, base):
    """The same quotient from whole matrices in float64: with stock peft merged, and the engine's exact weights."""
    model, _ = with_peft(base, folder, torch.float64)
    merged = model.merge_and_unload()
    left = whole = 0.0
    for name, W in run["weights"].items():
        left += (W.double() - merged.get_parameter(name)).square().sum().item()
        whole += (W.double() - run["before"][name].double()).square().sum().item()
    return (left / whole) ** 0.5


# --- the adapter is the trained model --------------------------------------------------------------


CASES = [*((*k, "factor") for k in [(1, 1), (1, 4), (2, 4), (4, 2)]), *((*k, "dense") for k in [(1, 4), (4, 2)])]
MORE = [*((*k, "factor") for k in [(2, 2), (4, 4), (4, 1)]), (2, 4, "dense")]


@pytest.mark.parametrize(
    ("world_size", "slices", "exchange"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_stock_peft_on_the_untouched_base_is_the_trained_model(tmp_path, base, world_size, slices, exchange):
    """Every K against every S, both ways of travelling. Without the second-order term only fp32 rounding is left:
    of W in each step, and of the pair's product; both are 1e-7 of W's change at this learning rate."""
    settings = ds_settings(
        slices=slices, accumulation=max(1, slices // world_size), delta={"exchange": exchange, **FIRST_ORDER}
    )
    runs = run_ranks(world_size, train_and_export, settings, base, str(tmp_path), lr=1e-2)
    assert runs[0]["kinds"] == {exchange}
    report = runs[0]["reports"][0]
    assert report == runs[-1]["reports"][0]
    assert runs[0]["sums"] == (report.residual, "")  # measured in memory, for small checkpoints: the same numbers
    assert report.r == 2 * 2 * slices
    assert report.residual.overall <= 1e-6
    assert report.residual.worst <= 2e-6
    assert true_residual(runs[0], tmp_path / "0", base) <= 1e-6
    _, logits = with_peft(base, tmp_path / "0")
    assert torch.allclose(logits, runs[0]["logits"], rtol=1e-5, atol=1e-5)
    untrained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        moved = (untrained(**tiny_batch(999, 0, 0)).logits - logits).abs().max()
    assert moved > 1e-2, "training must have changed something, or this test shows nothing"
    assert sorted(p.name for p in (tmp_path / "0").iterdir()) == [
        *sorted((lora_format.CONFIG, lora_format.WEIGHTS)),
        writer.REPORT,
    ]


def test_the_second_order_term_is_what_the_residual_shows(tmp_path, base):
    """As published, with ΔB ΔA: small against the first order at a small learning rate, and measured right."""
    found = []
    for lr in (1e-3, 1e-2):
        run = run_ranks(2, train_and_export, ds_settings(slices=2), base, str(tmp_path / str(lr)), lr=lr)[0]
        measured = run["reports"][0].residual.overall
        assert measured == pytest.approx(true_residual(run, tmp_path / str(lr) / "0", base), rel=1e-3)
        found.append(measured)
    assert 1e-5 < found[0] < 1e-2
    assert found[1] == pytest.approx(10 * found[0], rel=0.5)  # it grows with the learning rate, against ‖ΔW‖


def test_under_bf16_compute(tmp_path, base):
    """ΔW is the exact master's, and W_0 the file's fp32 values, not what ZeRO-3 rounded them to."""
    settings = ds_settings(bf16=True, slices=2, delta=FIRST_ORDER)
    run = run_ranks(2, train_and_export, settings, base, str(tmp_path), lr=1e-2)[0]
    assert run["reports"][0].residual.overall <= 1e-6
    assert true_residual(run, tmp_path / "0", base) <= 1e-6


def test_the_floor_is_the_rounding_of_the_weights(tmp_path, base):
    """At a tiny learning rate what is left is rounding, not second order; the estimate meets it."""
    settings = ds_settings(slices=2, delta=FIRST_ORDER)
    run = run_ranks(2, train_and_export, settings, base, str(tmp_path), lr=1e-6, steps=20)[0]
    found = run["reports"][0].residual
    assert found.overall > 1e-5
    assert found.floor / 2 <= found.overall <= 1.5 * found.floor


def test_scale_ranks_and_names_of_every_target(tmp_path, base):
    """lora_alpha and a rank pattern: PEFT's patterns carry what differs, and the product stays exact."""
    settings = ds_settings(
        slices=2, r=3, lora_alpha=4, rank_pattern={"k_proj|v_proj": 2, "layers.1.mlp.up_proj": 1}, delta=FIRST_ORDER
    )
    run = run_ranks(2, train_and_export, settings, base, str(tmp_path), lr=1e-2)[0]
    assert run["reports"][0].residual.overall <= 1e-6
    _, logits = with_peft(base, tmp_path / "0")
    assert torch.allclose(logits, run["logits"], rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "0" / lora_format.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (12, 16, {})
    assert config["rank_pattern"] == {"k_proj": 8, "v_proj": 8, "model.layers.1.mlp.up_proj": 4}
    assert set(config["target_modules"]) == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert config["base_model_name_or_path"] == base


def test_some_layers_only(tmp_path, base):
    """A suffix would reach the other layer too, so targets are named in full."""
    settings = ds_settings(slices=2, target_modules=r".*layers\.1\.mlp\.\w+_proj", delta=FIRST_ORDER)
    run = run_ranks(1, train_and_export, settings | {"gradient_accumulation_steps": 2}, base, str(tmp_path), lr=1e-2)[0]
    config = json.loads((tmp_path / "0" / lora_format.CONFIG).read_text())
    assert config["target_modules"] == [f"model.layers.1.mlp.{n}_proj" for n in ("down", "gate", "up")]
    _, logits = with_peft(base, tmp_path / "0")
    assert torch.allclose(logits, run["logits"], rtol=1e-5, atol=1e-5)


# --- options ---------------------------------------------------------------------------------------


def test_bf16_and_smaller_ranks(tmp_path, base):
    """Each export measures its own file: rounding to bf16, and what a cut leaves out."""
    exports = [{}, {"dtype": "bf16"}, {"rank": 6}, {"rank": 1000}, {"rank": 2, "dtype": "bf16"}]
    settings = ds_settings(slices=4, accumulation=2, delta=FIRST_ORDER)
    run = run_ranks(2, train_and_export, settings, base, str(tmp_path), lr=1e-2, exports=exports)[0]
    whole, bf16, cut, uncut, tiny = run["reports"]
    for index, report in enumerate(run["reports"]):
        exact = true_residual(run, tmp_path / str(index), base)
        assert report.residual.overall == pytest.approx(exact, rel=1e-2, abs=2e-7), report
        saved = json.loads((tmp_path / str(index) / writer.REPORT).read_text())
        assert saved["residual"]["overall"] == report.residual.overall
    assert 1e-4 < bf16.residual.overall < 1e-2
    assert {t.dtype for t in load_file(tmp_path / "1" / lora_format.WEIGHTS).values()} == {torch.bfloat16}
    # of first order alone, what the cut leaves out is all that is left
    assert cut.r == 6
    assert cut.truncation == pytest.approx(cut.residual.overall, rel=1e-3)
    assert cut.residual.overall < tiny.residual.overall < 1
    # no smaller than the stack, but no larger than the matrix: k_proj has 10 rows
    assert uncut.truncation < 1e-7
    assert uncut.residual.overall <= 1e-6
    assert whole.truncation is None
    shape = load_file(tmp_path / "3" / lora_format.WEIGHTS)[lora_format.key_A("model.layers.0.self_attn.k_proj")].shape
    assert shape == (10, 20)


def test_a_cut_is_the_best_of_its_rank():
    """Against the SVD of the matrix itself; a stack may have more rows than the matrix."""
    torch.manual_seed(0)
    for rows, cols, r in ((30, 20, 8), (5, 20, 8), (30, 6, 8)):
        A, B = torch.randn(r, cols), torch.randn(rows, r)
        U, sigma, Vt = torch.linalg.svd((B @ A).double(), full_matrices=False)
        tail = lora_format.Truncation()
        cut_A, cut_B = lora_format.truncate(A, B, 3, scale=2.0, tail=tail)
        best = U[:, :3] * sigma[:3] @ Vt[:3]
        assert torch.allclose(cut_B @ cut_A, best, atol=1e-5)
        assert tail.relative == pytest.approx((sigma[3:].norm() / sigma.norm()).item(), rel=1e-5)


def test_without_a_base_the_residual_is_unknown(tmp_path):
    """A model made in Python: the adapter is written, and says that nothing could be measured."""
    run = run_ranks(2, train_and_export, ds_settings(slices=2), None, str(tmp_path))[0]
    report = run["reports"][0]
    assert report.residual is None
    assert "not loaded from a folder" in str(report)
    assert run["sums"] == (None, report.unknown)
    saved = json.loads((tmp_path / "0" / writer.REPORT).read_text())
    assert saved["residual"] is None
    assert "cannot be read again" in saved["unknown"]
    assert (tmp_path / "0" / lora_format.WEIGHTS).exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "gguf"}, "must be 'hf' or 'peft'"),
        ({"format": "peft", "dtype": "fp16"}, "must be 'auto', 'bf16' or 'fp32'"),
        ({"format": "peft", "rank": 0}, "must be at least 1"),
        ({"format": "hf", "rank": 4}, "only an adapter has a rank"),
    ],
)
def test_refusals(tmp_path, options, words):
    message = run_ranks(1, export_error, ds_settings(slices=1), str(tmp_path / "x"), **options)[0]
    assert words in message
    assert not (tmp_path / "x").exists()


def test_pieces_of_any_size_give_the_same_bits(tmp_path, base):
    """Blocks of single rows and components, pieces that end within a row, ranks that have none of a piece."""
    settings = ds_settings(slices=2, delta=FIRST_ORDER)
    runs = []
    for name, pieces in (("whole", None), ("small", (100, 33))):
        runs.append(run_ranks(4, train_and_export, settings, base, str(tmp_path / name), lr=1e-2, pieces=pieces)[0])
    files = [load_file(tmp_path / name / "0" / lora_format.WEIGHTS) for name in ("whole", "small")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    found = [run["reports"][0].residual.overall for run in runs]
    assert found[1] == pytest.approx(found[0], rel=0.5)  # rounding, added up in another order
    assert max(found) <= 1e-6


# --- the parts -------------------------------------------------------------------------------------


def test_the_config_is_one_that_peft_writes():
    """Every field is known to LoraConfig, and what is left out has its default."""
    config = lora_format.adapter_config([LoraWeight(("a.q_proj",), 8, 8, 4, 1.5)], ["", "a", "a.q_proj"], "base")
    ours = LoraConfig.from_peft_type(**config)
    theirs = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path="base",
        inference_mode=True,
        target_modules=["q_proj"],
        r=4,
        lora_alpha=6,
    )
    assert ours.to_dict() == theirs.to_dict()


def test_small_pieces_measure_the_same(tmp_path, monkeypatch):
    """Pieces that begin and end within rows, blocks of single components."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    A, B, W, noise = torch.randn(5, 7), torch.randn(9, 5), torch.randn(9, 7), 1e-3 * torch.randn(9, 7)
    save_file({lora_format.key_A("x"): A, lora_format.key_B("x"): B}, tmp_path / "a")
    base, trained = W.flatten(), (W + 0.5 * B @ A + noise).flatten()
    whole = ShardRange.of(0, 1, 9, 7)
    change = residual.Change(
        LoraWeight(("x",), 9, 7, 5, 0.5), whole, 63, lambda a, b: trained[a:b], lambda at: base[at.start : at.stop]
    )
    found = []
    for elements in (10**6, 10):
        monkeypatch.setattr(residual, "PIECE_ELEMENTS", elements)
        found.append(residual.measure([change], FilePairs(tmp_path / "a", writer.World()), updates=1))
    assert found[0].overall == pytest.approx((noise.norm() / (0.5 * B @ A + noise).norm()).item(), rel=1e-3)
    assert found[1].overall == pytest.approx(found[0].overall, rel=1e-4)
    assert found[0].worst_target == "x"


def test_the_rounding_of_numbers_of_all_sizes():
    """Against torch.frexp; and Gaussian weights lose about 2e-8 of their norm when they are rounded once."""
    torch.manual_seed(0)
    W = torch.randn(10_000) * torch.logspace(-30, 3, 10_000)
    exact = torch.ldexp(torch.ones(10_000).double(), torch.frexp(W).exponent - 24).square().sum() / 12
    assert residual.rounding_error(W).item() == pytest.approx(exact.item(), rel=1e-9)
    assert residual.rounding_error(torch.tensor([1.0, -1.5, 0.0, 1e-45])).item() == pytest.approx(2 * 4.0**-23 / 12)
    W = 0.02 * torch.randn(100_000)
    assert 1.5e-8 < residual.rounding_error(W).sqrt() / W.norm() < 3e-8
    assert residual.sum_squares(W).item() == pytest.approx(W.double().square().sum().item(), rel=1e-6)


def test_reports_stay_json():
    """A weight that never changed, but whose adapter did, has no quotient."""
    report = adapter_report(Residual(float("inf"), float("inf"), "x", 0.1))
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["residual"]["overall"] is None


def adapter_report(found):
    from hdpissa.engine.export.report import ExportReport

    return ExportReport("peft", "folder", "fp32", 1, r=4, residual=found)
