"""`hdpissa train`: finds the launcher's options among train.py's, and becomes that launcher.

    hdpissa train --num_accelerators 8 --ds_config zero3 …    is    deepspeed --num_accelerators 8 launch/train.py …
    hdpissa train --nproc_per_node 8 --ds_config zero3 …      is    torchrun --nproc_per_node 8 launch/train.py …
    srun hdpissa train --ds_config zero3 …                    is    srun python launch/train.py …
    hdpissa dpo …                                             is    hdpissa train … --trainer dpo

The deepspeed launcher runs with --quiet, unless --log_level is given; it still prints which command ended with which
code. No launcher is imitated: this process is replaced by it. train.py is started by its path, because
with `-m` the repository's folders would stand on sys.path, where transformers takes `kernels/` for PyPI's package.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from hdpissa.engine.distributed.launcher import read_launch
from hdpissa.engine.errors import ConfigError

TRAIN = Path(__file__).resolve().with_name("train.py")
# Options with a value, and switches, of each launcher; for others call the launcher itself.
DEEPSPEED = (
    {"hostfile", "include", "exclude", "num_nodes", "num_gpus", "num_accelerators", "master_port", "master_addr"}
    | {"node_rank", "launcher", "launcher_args", "enable_each_rank_log", "bind_core_list", "ssh_port", "venv_script"}
    | {"log_level"},
    {"no_ssh", "no_ssh_check", "force_multi", "save_pid", "bind_cores_to_rank", "quiet"},
)
TORCHRUN = (
    {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "max_restarts", "log_dir"}
    | {"redirects", "tee", "local_addr", "node_rank", "master_addr", "master_port"},
    {"standalone"},
)
NUMBERS = {"num_gpus", "num_accelerators", "num_nodes", "master_port"}


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the launcher's words, train.py's), each in the order in which they stand."""
    values, switches = DEEPSPEED[0] | TORCHRUN[0], DEEPSPEED[1] | TORCHRUN[1]
    ours: list[str] = []
    theirs: list[str] = []
    words = iter(argv)
    for word in words:
        name = _name(word)
        if name in switches or (name in values and "=" in word):
            theirs.append(word)
        elif name in values:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"command line: {word} has no value; see --help")
            if name in NUMBERS and not value.isdecimal():
                raise ConfigError(f"{word} is {value}: must be a whole number")
            theirs += [word, value]
        else:
            ours.append(word)
    return theirs, ours


def _name(word: str) -> str:
    """--nproc-per-node=2 → nproc_per_node; nothing for what is no option."""
    return word[2:].split("=")[0].replace("-", "_") if word.startswith("--") else ""


def command(argv: list[str], environment: Mapping[str, str]) -> list[str]:
    """What is to be run.

    Raises:
        ConfigError: options of two launchers, or of one inside another's processes; a launcher that is not there.
    """
    theirs, ours = split(argv)
    names = {_name(word) for word in theirs if word.startswith("--")}
    deepspeed, torchrun = ({*first[0], *first[1]} - {*second[0], *second[1]} for first, second in _BOTH)
    if names & deepspeed and names & torchrun:
        mixed = " and ".join(f"--{min(names & of_one)}" for of_one in (deepspeed, torchrun))
        raise ConfigError(f"{mixed} are of two launchers, deepspeed and torchrun; keep one launcher's options")
    launch = read_launch(environment)
    if launch.launcher != "no launcher":
        if theirs:
            raise ConfigError(f"{theirs[0]}: this process has a launcher already ({launch.launcher}); leave it out")
        return [sys.executable, "-u", str(TRAIN), *ours]
    launcher = "torchrun" if names & torchrun else "deepspeed"
    if launcher == "deepspeed" and not names & {"quiet", "log_level"}:
        theirs = ["--quiet", *theirs]
    return [sys.executable, _script(launcher), *theirs, str(TRAIN), *ours]


_BOTH = ((DEEPSPEED, TORCHRUN), (TORCHRUN, DEEPSPEED))


def _script(launcher: str) -> str:
    """The launcher that belongs to this Python."""
    beside = Path(sys.executable).with_name(launcher)
    found = str(beside) if beside.exists() else shutil.which(launcher)
    if found is None:
        raise ConfigError(f"{launcher} is not beside {sys.executable}: must be installed there; install the package")
    return found


def main(argv: list[str] | None = None, trainer: str | None = None) -> int:
    """Says the command, and becomes it; --help is answered here."""
    words = list(sys.argv[1:] if argv is None else argv)
    words += ["--trainer", trainer] if trainer else []
    if {"-h", "--help"} & set(words):
        from hdpissa.launch.training import script_arguments

        print(script_arguments.help_text(words))
        return 0
    wanted = command(words, os.environ)
    if wanted[1] != "-u":  # check the options before a launcher starts
        from hdpissa.launch.training import script_arguments

        script_arguments.parse_options(split(words)[1])
    print("+", shlex.join(wanted), file=sys.stderr, flush=True)
    sys.stdout.flush()
    return os.execv(wanted[0], wanted)
