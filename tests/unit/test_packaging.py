"""The shape of the package: who may import whom, names that would shadow others, sizes, shipped files."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from tiny import tiny_llama

from hdpissa.engine.config import ds_config, leaf_modules

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "hdpissa"
FOLDERS = ("engine", "kernels", "launch", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# The rooms, from the ground up: which others each may use. `errors`, `precision` and `consensus` are everybody's,
# `kernels` is below all; what lies directly in `engine/` joins the rooms, `launch/` and `benchmarks/` are above.
ROOMS = {
    "distributed": "",
    "files": "distributed",
    "config": "",
    "sharding": "distributed config",
    "method": "distributed config sharding",
    "comm": "sharding method",
    "optim": "distributed sharding method comm",
    "directions": "distributed files sharding method comm optim",
    "algorithms": "config sharding method comm optim directions",
    "checkpoint": "distributed files sharding method comm optim directions",
    "export": "distributed files sharding method optim checkpoint",
    "health": "distributed files sharding method comm optim",
}
# The same of `launch/`: its commands put its rooms together; only the trainers know what is internal to TRL.
LAUNCH_ROOMS = {
    "common": "",
    "planning": "common",
    "reporting": "common",
    "exporting": "common",
    "trainers": "common planning reporting",
    "training": "common planning reporting exporting trainers",
    "evaluation": "common planning training",
}
EVERYBODYS = {"engine.errors", "engine.precision", "engine.consensus"}


def name_of(path: Path) -> str:
    """engine/sharding/slicing.py → engine.slicing; a package's own file has the package's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(name: str, top: str = "engine") -> str:
    """engine.sharding.slicing → sharding; "" for what is in no room of `top`."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == top and "." in rest else ""


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def running_nodes(node: ast.AST):
    """All nodes but those under `if TYPE_CHECKING:`, which never run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from running_nodes(child)


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, at its top or inside a function; ours without `hdpissa.`."""
    own = name_of(path).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    found = set()
    for node in running_nodes(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*start, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.add("torch.distributed")  # needs no import of its own once torch is there
    return {name.removeprefix(f"{PACKAGE}.") for name in found}


def is_from(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


MODULES = {name_of(path): path for path in FILES}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


@functools.cache
def our_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports."""
    return {m for m in MODULES if m not in PACKAGES for name in imports(path) if is_from(name, m)}


@pytest.mark.parametrize(("top", "table"), [("engine", ROOMS), ("launch", LAUNCH_ROOMS)])
def test_rooms_use_those_below_them(top, table):
    rooms = list(table)
    assert {room_of(name, top) for name in MODULES} == {"", *rooms}
    assert [(a, b) for a, uses in table.items() for b in uses.split() if rooms.index(b) >= rooms.index(a)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    name, used = name_of(path), our_imports(path)
    room = room_of(name)
    if name in PACKAGES:  # resolve public names late
        assert used <= {"launch.trainers.accelerate_cpu"}
    elif name.startswith("kernels."):
        assert [m for m in used if not m.startswith("kernels.")] == []
    elif room:
        allowed = {room, *ROOMS[room].split()}
        assert [m for m in used - EVERYBODYS if not m.startswith("kernels.") and room_of(m) not in allowed] == []
    elif room := room_of(name, "launch"):
        allowed = {room, *LAUNCH_ROOMS[room].split()}
        ours = [m for m in used if m.startswith("launch.")]
        assert [m for m in ours if room_of(m, "launch") not in allowed] == []
        assert [m for m in used if m.startswith("benchmarks.")] == []
    elif name.startswith("engine."):
        assert [m for m in used if m.startswith(("launch.", "benchmarks."))] == []


def test_no_cycles():
    graph = {name: our_imports(path) - {name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 30, "imports are not being seen"
    while graph:
        free = [name for name, needed in graph.items() if not needed & graph.keys()]
        assert free, f"a cycle is among {sorted(graph)}"
        for name in free:
            del graph[name]


LEAVES = {
    "engine.errors",
    "engine.precision",
    *(f"engine.distributed.{name}" for name in ("faults", "heartbeat", "diagnosis")),
    *(f"engine.directions.{name}" for name in ("eigen", "krylov", "svd")),
    "engine.files.checksum",
    "engine.sharding.slicing",
    "engine.method.delta",
    "engine.optim.overflow_guard",
}


def forbidden(path: Path, *modules: str) -> list[str]:
    return [name for name in imports(path) for module in modules if is_from(name, module)]


@pytest.mark.parametrize(
    "path", [p for p in FILES if name_of(p).startswith("kernels.") or name_of(p) in LEAVES], ids=name_of
)
def test_leaves_know_of_no_ranks(path):
    assert not forbidden(path, "torch.distributed", "deepspeed", "transformers")


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "kernels"], ids=name_of)
def test_kernels_stand_alone(path):
    assert not forbidden(path, "engine", "launch", "benchmarks", "torch.distributed")


def ds_names(path: Path) -> set[str]:
    """`ds_…` attributes that a file touches, also by name. `ds_config` is our own module and option."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in found if name.startswith("ds_")} - {"ds_config", "ds_configs"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_one_door_to_deepspeed(path):
    deepspeed, attributes = forbidden(path, "deepspeed"), ds_names(path)
    if name_of(path) == "engine.sharding.zero3":
        assert deepspeed, "the door is not where it is looked for"
        assert {"ds_tensor", "ds_id"} <= attributes
    else:
        assert not deepspeed
        assert not attributes


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_accelerate_and_trl_end_at_the_trainers(path):
    """accelerate, and what is not public of TRL and Trainer, are for launch/trainers alone; the engine knows no TRL."""
    if path.parent.name == "trainers":
        return
    assert not forbidden(path, "accelerate", "trl.trainer", "transformers.trainer")
    assert name_of(path).startswith(("launch.", "benchmarks.")) or not forbidden(path, "trl")


@pytest.mark.parametrize("folder", ["launch", "benchmarks"])
def test_scripts_shadow_no_module(folder):
    """A script's folder comes first on sys.path: `launch/queue.py` would be everybody's `import queue`."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) - set(FOLDERS)
    assert {"torch", "queue"} <= taken
    assert not {path.stem for path in (ROOT / folder).glob("*.py")} & taken


def test_folders_stay_unimportable():
    """With these files our folders would answer to `import kernels` and `import tests`."""
    present = [f for f in ("kernels/__init__.py", "tests/__init__.py", "conftest.py") if (ROOT / f).exists()]
    assert not present


# --- PyPI's `kernels` ----------------------------------------------------------------------------------------

# What transformers imports from it (transformers/integrations/hub_kernels.py), and as much life as Llama needs.
STAND_IN = """
    class _Named:
        def __init__(self, *args, **kwargs): pass
    class CUDAProperties(_Named): pass
    class Device(_Named): pass
    class KernelizeFallback(_Named): pass
    class LayerRepository(_Named): pass
    class LocalLayerRepository(_Named): pass
    class Mode(_Named): INFERENCE, TRAINING = 1, 2
    class ROCMProperties(_Named): pass
    def register_kernel_mapping(*args, **kwargs): pass
    replace_kernel_forward_from_hub = use_kernel_mapping = get_kernel = kernelize = register_kernel_mapping
    def use_kernel_forward_from_hub(name): return lambda layer: layer
    def use_kernelized_func(*functions): return lambda layer: layer
"""
# One process imports what all cases share and then forks one child per case: a third of the time of three
# fresh processes. Imports only, so there are no threads yet, and nobody has looked for `kernels` so far.
IMPORT_LLAMA = """
    import os, sys
    import torch, transformers.conversion_mapping
    from transformers.utils.import_utils import is_kernels_available
    assert is_kernels_available.cache_info().currsize == 0 and "kernels" not in sys.modules

    def llama(path):
        sys.path[:0] = path
        try:
            from transformers import LlamaForCausalLM
            import transformers.integrations.hub_kernels
            import transformers.models.llama.modeling_llama
            return f"{LlamaForCausalLM.__name__} {is_kernels_available()} {sys.modules.get('kernels')}"
        except Exception as error:  # transformers wraps the ImportError of a lazy import
            return f"failed: {error!r}"

    for path in sys.argv[1:]:
        child = os.fork()
        if not child:
            print(" ".join(llama(path.split(os.pathsep)).split()), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
"""


def stand_in(folder: Path) -> Path:
    """A folder like a site-packages with `kernels` installed in a version that transformers accepts."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    info = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return folder


def import_llama(cwd: Path, *paths: list[Path]) -> list[str]:
    """One line per case: what came of importing Llama with these folders first on sys.path."""
    joined = [os.pathsep.join(map(str, path)) for path in paths]
    quiet = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", textwrap.dedent(IMPORT_LLAMA), *joined]
    done = subprocess.run(command, cwd=cwd, env=quiet, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(("Llama", "failed"))]


@pytest.mark.slow
def test_pypi_kernels_is_not_shadowed(tmp_path):
    """Llama is importable with the repository's root on sys.path, whether PyPI's `kernels` is there or not.

    The control is a root whose `kernels/` has an `__init__.py`: it must fail, or this test sees nothing.
    """
    installed, shadowing = stand_in(tmp_path / "site"), tmp_path / "root"
    (shadowing / "kernels").mkdir(parents=True)
    (shadowing / "kernels" / "__init__.py").touch()
    with_it, without, control = import_llama(tmp_path, [ROOT, installed], [ROOT], [shadowing, installed])
    assert with_it.startswith("LlamaForCausalLM True ")
    assert str(installed) in with_it, "the one that answers is PyPI's"
    assert without.startswith("LlamaForCausalLM ")
    assert control.startswith("failed: ")
    assert "cannot import name" in control


# --- shipped configs, metadata, sizes ------------------------------------------------------------------------

CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def test_number_of_configs():
    """A config that is added or lost shows here; the tests below run over all there are. Each has its line in docs/."""
    assert len(CONFIGS) == 7
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert [path.name for path in CONFIGS if f"| `ds_configs/{path.name}` | " not in page] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config(path):
    """Each goes through the five steps, and leaves nothing "auto" to DeepSpeed, the model's layers included."""
    rest, section = ds_config.split_section(ds_config.read_ds_config(path))
    ds_config.check_ds_config(rest)
    values = ds_config.TrainValues(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        world_size=8,
        max_grad_norm=1.0,
        learning_rate=2e-5,
        bf16=True,
        hidden_size=64,
    )
    filled, agreed = ds_config.fill_auto(rest, values)
    final = leaf_modules.fill(ds_config.engine_ds_config(filled), tiny_llama())
    assert section.r == 16
    assert final["zero_optimization"]["stage"] == 3
    assert final["train_batch_size"] == 128
    assert agreed.gradient_accumulation_steps == 8
    assert '"auto"' not in str(final).replace("'", '"')


def test_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version(PACKAGE) == project["version"]
    assert importlib.metadata.metadata(PACKAGE)["Name"] == PACKAGE


def test_configs_are_package_data():
    """They are found where an installed package has them, not only in a checkout."""
    # importlib.resources.files() does not take namespace packages of an editable install in Python 3.11
    # (the finder's path hook stands among the folders); a real folder of the spec is what it would return.
    spec = importlib.util.find_spec(f"{PACKAGE}.ds_configs")
    folders = [Path(folder) for folder in spec.submodule_search_locations if Path(folder).is_dir()]
    found = {path.name: path.read_text() for folder in folders for path in folder.glob("*.json")}
    assert found == {path.name: path.read_text() for path in CONFIGS}
