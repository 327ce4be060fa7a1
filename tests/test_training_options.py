"""Options of the sections "method" and "training": each is seen to act, and what is wrong is told in one line."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from launch_runs import flags, make_inputs, read_json, read_metrics, train_here, write_ds_config
from ranks import run_ranks
from tiny import tiny_batch, tiny_llama

from hdpissa.engine import ConfigError, ds_config, overrides
from hdpissa.launch import options_method, train_arguments, train_callbacks, train_checks, train_model
from hdpissa.launch.train_schedule import check_schedule, make_scheduler

STEPS, LR = 8, 3e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def inputs(folder):
    return make_inputs(folder / "inputs")


def arguments(inputs, output, **changes):
    chosen = {**inputs, "output_dir": str(output), "max_steps": STEPS, "learning_rate": LR, "warmup_steps": 2}
    chosen |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 128}
    return chosen | {"prompt_template": "none"} | changes


# --- schedules -------------------------------------------------------------------------------------


def cosine_with_min_lr(t, span, *, floor=0.1):
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t / span))


def warmup_stable_decay(t, span, *, decay=3):
    left = span - t
    return 1.0 if left > decay else max(0.0, 0.5 * (1 + math.cos(math.pi * (decay - left) / decay)))


def inverse_sqrt(t, span, *, timescale=4):
    return math.sqrt(timescale / (t + timescale))


def polynomial(t, span, *, end=1e-4, power=2.0):
    return ((LR - end) * (1 - t / span) ** power + end) / LR


FORMULAS = [
    (cosine_with_min_lr, {"min_lr_rate": 0.1}),
    (warmup_stable_decay, {"num_decay_steps": 3}),
    (inverse_sqrt, {"timescale": 4}),
    (polynomial, {"lr_end": 1e-4, "power": 2.0}),
]


@pytest.mark.parametrize(("formula", "kwargs"), FORMULAS, ids=lambda value: getattr(value, "__name__", ""))
def test_schedules(formula, kwargs):
    """Step t has the rate of the formula written here; the keys reach it; from a checkpoint it goes on alike."""
    args = train_arguments.TrainArguments(
        lr_scheduler_type=formula.__name__, lr_scheduler_kwargs=json.dumps(kwargs), warmup_steps=2
    )
    check_schedule(args, LR, STEPS)
    expected = [LR * (t / 2 if t < 2 else formula(t - 2, STEPS - 2)) for t in range(STEPS)]
    for first in (0, 5):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
        scheduler, rates = make_scheduler(args, optimizer, STEPS, first), []
        for _ in range(first, STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx(expected[first:], rel=1e-9, abs=1e-15)


def test_every_group_has_its_own_peak():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 1.0, "peak_lr": 1.0})
    optimizer.param_groups[1]["lr"] = 0.3  # as a checkpoint leaves it
    make_scheduler(train_arguments.TrainArguments(lr_scheduler_type="linear", warmup_steps=0), optimizer, 10, start=5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([LR / 2, 0.5])


BAD_SCHEDULES = [
    ("cosine_with_min_lr", None, "One of min_lr or min_lr_rate should be set"),
    ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "Only one of min_lr or min_lr_rate"),
    ("cosine_with_min_lr", {"min_lr_rate": "small"}, r"min_lr_rate\": \"small\"}.*correct it"),
    ("polynomial", {"lr_end": -1.0}, "gives -.* times the learning rate in step"),
    ("cosine", {"min_lr": 1e-5}, "cosine has no min_lr; its keys: num_cycles"),
    ("linear", {"power": 2}, "linear has no power; it takes none"),
    ("constant", {"a": 1}, "constant takes none; leave it out"),
    ("constant_with_warmup", {"a": 1}, "constant_with_warmup takes none"),
    ("warmup_stable_decay", None, "needs num_decay_steps; its keys: num_decay_steps, num_stable_steps"),
    ("warmup_stable_decay", {"num_decay_steps": 7}, "are 9 together, more than the run's 8; make num_decay_steps"),
    ("warmup_stable_decay", {"num_decay_steps": 0.5}, "must be integers"),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "Unknown decay type: steep"),
    ("polynomial", {"lr_end": 1.0}, r"lr_end \(1.0\) must be smaller than initial lr"),
    ("cosine", [1], "must be a JSON object"),
    ("cosine", "{min_lr: 1}", "not valid JSON .* quote it as"),
]


@pytest.mark.parametrize(("name", "kwargs", "words"), BAD_SCHEDULES)
def test_bad_schedules(name, kwargs, words):
    text = kwargs if isinstance(kwargs, str) or kwargs is None else json.dumps(kwargs)
    required = {"ds_config": "a", "model_name_or_path": "b", "dataset_name": "c", "output_dir": "d"}
    given = {"lr_scheduler_type": name, "warmup_steps": 2, **({"lr_scheduler_kwargs": text} if text else {})}
    with pytest.raises(ConfigError, match=words) as error:
        check_schedule(train_arguments.parse(flags(required | given))[0], LR, STEPS)
    assert "\n" not in str(error.value)


# --- the section hd_pissa on the command line ------------------------------------------------------

WORDS = [
    (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    (["q_proj,v_proj"], ["q_proj", "v_proj"]),
    (["q_proj"], ["q_proj"]),
    (["all-linear"], "all-linear"),
    ([r".*\.[qv]_proj"], r".*\.[qv]_proj"),
    (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"]),
]


@pytest.mark.parametrize(("given", "meant"), WORDS)
def test_target_modules_as_peft_spells_them(given, meant):
    assert options_method.modules(given) == meant


def merged(section=None, *, adam=None, optimizer=None, **given):
    """(the section's model, what differs)."""
    ds = {"zero_optimization": {"stage": 3}} | ({} if section is None else {"hd_pissa": section})
    ds |= {} if optimizer is None else {"optimizer": {"params": optimizer}}
    out, differ = overrides.merge(ds, given, adam or {})
    return ds_config.split_section(out)[1], differ


GIVEN = {
    "r": 8,
    "lora_alpha": 4.0,
    "slices": 2,
    "target_modules": ["up_proj"],
    "exclude_modules": "model.layers.0.*",
    "rank_pattern": {"up_proj": 2},
    "modules_to_save": ["norm"],
    "modules_to_save_learning_rate": 1e-5,
}


@pytest.mark.parametrize("section", [None, {}, dict.fromkeys(GIVEN, "auto"), GIVEN])
def test_the_command_line_fills_what_the_json_leaves_open(section):
    """No section, nothing in it, all of it "auto", or the same values."""
    hd, differ = merged(section, **GIVEN)
    assert {name: getattr(hd, name) for name in GIVEN} == GIVEN
    assert not differ


def test_where_both_speak_they_must_agree():
    _, differ = merged({"r": 16, "target_modules": ["v_proj", "q_proj"]}, r=8, target_modules=["q_proj", "v_proj"])
    assert differ == ["hd_pissa.r is 16 but --r is 8"]
    values = ds_config.TrainValues(1, 1, 1, 1.0, 1e-4, False, given=frozenset({"max_grad_norm"}))
    with pytest.raises(ConfigError, match=r"hd_pissa.r is 16 but --r is 8, gradient_clipping .*; set these config val"):
        ds_config.fill_auto({"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5}, values, differ)


ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6}


def test_adam():
    for optimizer in (None, {"betas": "auto", "eps": "auto"}, {"betas": [0.8, 0.99], "eps": 1e-6}):
        hd, differ = merged({"adam": {"betas": [0.8, 0.99]}} if optimizer else {}, optimizer=optimizer, adam=ADAM)
        assert (hd.adam.betas, hd.adam.eps, differ) == ((0.8, 0.99), 1e-6, [])
    assert merged(adam={"adam_beta2": 0.95})[0].adam.betas == (0.9, 0.95)
    _, differ = merged({"adam": {"eps": 1e-8}}, optimizer={"betas": [0.9, 0.99]}, adam=ADAM)
    assert differ == [
        "optimizer.params.betas is [0.9, 0.99] but --adam_beta1 is 0.8",
        "hd_pissa.adam.eps is 1e-08 but --adam_epsilon is 1e-06",
    ]


def test_yaml_has_lists_and_objects(tmp_path):
    required = {"ds_config": "a", "model_name_or_path": "b", "dataset_name": "c", "output_dir": "d"}
    given = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": "lm_head", "rank_pattern": {"q_proj": 2}}
    given |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(required | given))
    args, _ = train_arguments.parse(["--config", str(tmp_path / "run.yaml")])
    section = options_method.section_options(args)
    assert section == {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["lm_head"],
        "rank_pattern": {"q_proj": 2},
    }
    assert args.lr_scheduler_kwargs == '{"min_lr_rate": 0.1}'


# --- mistakes that need the model, before any weight is read ---------------------------------------

BAD = {
    "rank of nothing": ({"r": 0}, "--r is 0: must be at least 1"),
    "alpha of 0": ({"lora_alpha": 0}, "--lora_alpha is 0.0: must be greater than 0"),
    "slices in words": ({"slices": "two"}, "--slices is two: must be a number of at least 1, or auto"),
    "a pattern that is no object": ({"rank_pattern": "[1]"}, r"--rank_pattern \[1\]: must be a JSON object"),
    "a rank in quotes": ({"rank_pattern": '{"q_proj": "2"}'}, 'rank_pattern.q_proj is "2": must be an integer'),
    "targets that are not there": ({"target_modules": "query"}, "matches no module of LlamaForCausalLM"),
    "a regular expression that is none": ({"target_modules": "(q_proj"}, "is not a valid regular expression"),
    "everything excluded": ({"exclude_modules": ".*_proj"}, "matches no module of LlamaForCausalLM"),
    "an exclusion of nothing": ({"exclude_modules": "w_proj"}, 'exclude_modules: "w_proj" matches no module'),
    "beta of 1": ({"adam_beta1": 1.0}, "hd_pissa.adam.betas.0 is 1.0: must be less than 1"),
    "beta of -1": ({"adam_beta2": -1.0}, "hd_pissa.adam.betas.1 is -1.0: must be at least 0"),
    "eps of 0": ({"adam_epsilon": 0}, "hd_pissa.adam.eps is 0.0: must be greater than 0"),
    "noise of 0": ({"neftune_noise_alpha": 0}, "--neftune_noise_alpha is 0.0: must be greater than 0"),
    "modules to save that are not there": ({"modules_to_save": "norn"}, '"norn" matches no parameter'),
    "modules to save that are targets": ({"modules_to_save": "q_proj"}, "which the slices of .*q_proj train"),
    "a rate for nothing": ({"modules_to_save_learning_rate": 1e-3}, "of which there are none"),
    "modules to save in an adapter": (
        {"modules_to_save": "norm", "export_format": "both"},
        r"an adapter cannot hold hd_pissa.modules_to_save \(norm\)",
    ),
    "Liger, which is not there": ({"use_liger_kernel": True}, "liger-kernel is not installed; pip install"),
    "torch.compile": ({"torch_compile": True}, "cut every layer into small pieces: the same numbers, slower"),
    "a callback without class": ({"callbacks": "os"}, "must be package.module:Class"),
    "a callback that is not there": ({"callbacks": "os:Missing"}, "cannot be imported .AttributeError"),
    "a module that is not there": ({"callbacks": "no_such_module:C"}, "cannot be imported .ModuleNotFoundError"),
    "a callback that is none": ({"callbacks": "pathlib:Path"}, "must be a subclass of transformers.TrainerCallback"),
    "a callback that needs arguments": (
        {"callbacks": "transformers.trainer_callback:CallbackHandler"},
        r"CallbackHandler\(\) fails .TypeError.*; give a class that needs no arguments",
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_mistakes_are_told_before_weights_are_read(mistake, inputs, folder):
    """`check` reads no weights. A value that HfArgumentParser refuses is told by it."""
    changes, words = BAD[mistake]
    ds = write_ds_config(folder / "open.json", hd_pissa={"r": "auto"})
    with pytest.raises(ConfigError, match=words) as error:
        train_checks.check(*train_arguments.parse(flags(arguments(inputs, folder / "out", ds_config=ds, **changes))))
    assert "\n" not in str(error.value)


# --- callbacks -------------------------------------------------------------------------------------

CALLBACK = """
import json, os, pathlib
from transformers import TrainerCallback

class Tell(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs): ...

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = state.global_step == 2
        control.should_evaluate = state.global_step == 3
        if int(os.environ["RANK"]) == 1 and state.global_step == 4:  # one rank wants it
            control.should_save = True
        self.note("on_step_end", state)

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4 and int(os.environ["RANK"]) == 1
        self.note("on_save", state)

    def on_train_end(self, args, state, control, **kwargs):
        self.note("on_train_end", state)
        path = pathlib.Path(args.output_dir) / f"seen_{os.environ['RANK']}.json"
        path.write_text(json.dumps({"seen": self.seen, "tokens": state.num_input_tokens_seen}))

    def on_log(self, args, state, control, logs, **kwargs):
        self.note("on_log", state, *sorted(logs.keys() & {"loss", "eval_loss"}))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        assert kwargs["model"] is kwargs["engine"].module and kwargs["processing_class"] is not None
        assert kwargs["optimizer"] is kwargs["engine"].optimizer and kwargs["lr_scheduler"] is not None
        self.note("on_evaluate", state, *sorted(metrics))

    def on_train_begin(self, args, state, control, **kwargs):
        assert (state.max_steps, args.max_steps, state.is_world_process_zero) == (8, 8, os.environ["RANK"] == "0")
        self.note("on_train_begin", state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.note("on_epoch_begin", state)

    def on_step_begin(self, args, state, control, **kwargs):
        self.note("on_step_begin", state)

    def note(self, event, state, *more):
        self.seen.append([event, state.global_step, *more])
"""


@pytest.fixture(scope="module")
def called(folder, inputs):
    """Two ranks with a callback of which one rank's differs."""
    (folder / "tell.py").write_text(CALLBACK)
    more = {"callbacks": f"{folder}/tell.py:Tell", "export_format": "none", "save_steps": 100}
    results = run_ranks(
        2, train_here, flags(arguments(inputs, folder / "called", **more)), str(folder / "cache"), timeout=120
    )
    assert [(result["code"], result["error"]) for result in results] == [(0, None)] * 2, results
    return folder / "called"


def test_what_one_rank_wants_all_do(called):
    """Rows, evaluation, a checkpoint and the end are where the callback wants them, and the run is a finished one."""
    steps, evaluations = read_metrics(called)
    assert [row["step"] for row in steps] == [2]
    assert [row["step"] for row in evaluations] == [0, 3, 4]
    assert [path.name for path in called.glob("checkpoint-*")] == ["checkpoint-4"]
    assert read_json(called / "run_state.json") == {"state": "finished", "step": 4, "message": ""}


def test_the_order_of_events(called):
    ours = [["on_train_begin", 0], ["on_epoch_begin", 0], ["on_step_begin", 0], ["on_step_end", 1]]
    ours += [["on_step_begin", 1], ["on_step_end", 2], ["on_log", 2, "loss"], ["on_step_begin", 2], ["on_step_end", 3]]
    ours += [["on_log", 3, "eval_loss"], ["on_evaluate", 3, "eval_loss", "eval_tokens", "perplexity", "step"]]
    ours += [["on_step_begin", 3], ["on_step_end", 4], ["on_save", 4], ["on_train_end", 4]]
    seen = [read_json(called / f"seen_{rank}.json") for rank in (0, 1)]
    assert seen[0]["seen"] == ours
    assert seen[0] == seen[1]
    assert seen[0]["tokens"] > 0


def test_events_that_do_not_exist_here(folder, called):
    del called
    callbacks = train_callbacks.load([f"{folder}/tell.py:Tell"])
    engine = SimpleNamespace(module=None, optimizer=None, global_steps=0)
    job = SimpleNamespace(
        data=SimpleNamespace(steps_per_epoch=4), tokenizer=None, total_steps=8, plan=SimpleNamespace(rank=0)
    )
    args = train_arguments.TrainArguments(max_steps=8)
    made = train_callbacks.Callbacks(callbacks, args, job, engine=engine, scheduler=None)
    assert made.never_called() == ["Tell.on_pre_optimizer_step"]


# --- one run with many options ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(folder, inputs):
    """One process with options of both sections; once more with activation offloading, and with noise."""
    ds = write_ds_config(folder / "few.json", hd_pissa={"target_modules": "auto"})
    section = {"ds_config": ds, "r": 2, "lora_alpha": 4, "slices": 2, "target_modules": "q_proj,up_proj"}
    section |= {"exclude_modules": "model.layers.0.self_attn.q_proj", "rank_pattern": '{"up_proj": 3}'}
    section |= {"modules_to_save": "norm,lm_head", "modules_to_save_learning_rate": 1e-3, "save_strategy": "no"}
    section |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.5}'}
    section |= {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "gradient_checkpointing": True}
    runs = {"plain": {}, "offloaded": {"activation_offload": True}, "noisy": {"neftune_noise_alpha": 5}}
    for name, more in runs.items():
        argv = flags(arguments(inputs, folder / name, **section, **more))
        (result,) = run_ranks(1, train_here, argv, str(folder / "cache"))
        assert (result["code"], result["error"]) == (0, None), result
    return {name: folder / name for name in runs}


def test_the_section_is_as_given(launched):
    run = read_json(launched["plain"] / "run.json")
    section = run["ds_config"]["hd_pissa"]
    assert (section["r"], section["lora_alpha"], section["slices"]) == (2, 4.0, 2)
    assert section["adam"] == {"betas": [0.8, 0.9], "eps": 1e-6}
    assert section["target_modules"] == ["q_proj", "up_proj"]
    assert section["exclude_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert (section["rank_pattern"], section["modules_to_save_learning_rate"]) == ({"up_proj": 3}, 1e-3)
    assert (run["targets"], run["slices"]) == (3, 2)  # two up_proj, one q_proj
    assert list(run["modules_to_save"]) == ["model.norm.weight", "lm_head.weight"]
    steps, (before, after) = read_metrics(launched["plain"])
    assert steps[-1]["learning_rate"] == pytest.approx(LR * (0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * 5 / 6))))
    assert after["eval_loss"] < before["eval_loss"] - 0.05


def test_offloading_activations_changes_no_bit(launched):
    plain, offloaded = (read_metrics(launched[name]) for name in ("plain", "offloaded"))
    for ours, theirs in zip(plain, offloaded, strict=True):
        assert [(r.get("loss"), r.get("eval_loss")) for r in ours] == [
            (r.get("loss"), r.get("eval_loss")) for r in theirs
        ]
    assert read_json(launched["offloaded"] / "run.json")["arguments"]["activation_offloading"] is True


def test_offloaded_activations_are_in_host_memory():
    """The hook sees what backward needs; with checkpointing it is little: the inputs of the layers."""
    packed = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    for checkpointing in (False, True):
        model, made = tiny_llama(), []
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        original = torch.autograd.graph.save_on_cpu
        torch.autograd.graph.save_on_cpu = lambda pin_memory, made=made: hooks(
            lambda t: (made.append(t.numel()), t)[1], lambda t: t
        )
        try:
            train_model.offload_activations(model)
            model(**tiny_batch(0, 0, 0)).loss.backward()
            made_training = len(made)
            model.eval()(**tiny_batch(0, 0, 0))
        finally:
            torch.autograd.graph.save_on_cpu = original
        assert len(made) == made_training > 0
        packed.append(sum(made))
    assert packed[1] < packed[0] / 2


def test_noise_is_added_in_training_only(launched):
    """Evaluation before the first step has none of it; what is learned differs."""
    (plain, plain_evals), (noisy, noisy_evals) = (read_metrics(launched[name]) for name in ("plain", "noisy"))
    assert noisy_evals[0]["eval_loss"] == plain_evals[0]["eval_loss"]
    assert noisy[0]["loss"] != plain[0]["loss"]
    assert noisy[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.2)


LATE = """
from transformers import EarlyStoppingCallback, TrainerCallback

class SaveWhenAsked(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        control.should_save = state.global_step == 2

class Stop(EarlyStoppingCallback):
    def __init__(self):
        super().__init__(early_stopping_patience=2)
"""


def test_what_is_wanted_after_an_evaluation(folder, inputs):
    """A checkpoint that nothing else asks for; the end by transformers' early stopping, which a larger loss pleases."""
    (folder / "late.py").write_text(LATE)
    more = {"callbacks": f"{folder}/late.py:SaveWhenAsked {folder}/late.py:Stop", "export_format": "none"}
    more |= {"save_steps": 100, "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": "True"}
    more |= {"learning_rate": 0.01, "warmup_ratio": 0, "load_best_model_at_end": True, "save_strategy": "best"}
    line = flags(arguments(inputs, folder / "late", **more))
    at = line.index("--callbacks") + 1
    (result,) = run_ranks(1, train_here, [*line[:at], *line[at].split(), *line[at + 1 :]], str(folder / "cache"))
    assert (result["code"], result["error"]) == (0, None), result["stderr"]
    _, evaluations = read_metrics(folder / "late")
    losses = [row["eval_loss"] for row in evaluations if row["step"]]
    assert losses[0] > max(losses[1:])
    assert len(losses) == 3  # the best one, and two without improvement
    assert {path.name for path in (folder / "late").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_liger_is_applied_where_it_is_installed(monkeypatch):
    """A stand-in for the package, which tests do not install: what counts is that transformers' function is called."""
    import sys

    import transformers.integrations.liger
    import transformers.utils
    from tiny import tiny_llama

    import hdpissa.engine
    from hdpissa.launch import train_model

    model, applied = tiny_llama(), []
    table = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", table)
    monkeypatch.setattr(transformers.utils, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(transformers.integrations.liger, "apply_liger_kernel", lambda net, how: applied.append(net))
    monkeypatch.setattr(hdpissa.engine, "load_pretrained", lambda name, ds, **options: model, raising=False)
    for wanted in (False, True):
        args = train_arguments.TrainArguments(use_liger_kernel=wanted)
        train_model.check_model(args, model)
        assert train_model.load_model(args, {}) is model
        assert applied == [model] * wanted
    table.MODEL_TYPE_TO_APPLY_LIGER_FN.clear()
    with pytest.raises(ConfigError, match="Liger has no kernels for model type llama"):
        train_model.check_model(args, model)
