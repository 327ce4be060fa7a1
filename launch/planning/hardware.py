"""What a GPU and its links can do, for the plan: a table, or a JSON file with numbers of one's own.

Data sheets promise more than programs get. `bf16`, `hbm` and the links are what is reached by large matrix products
and copies: 790 TFLOP/s and 3.0 / 4.3 TB/s were seen on H100 / H200 (80 % and 90 % of the sheet); the same shares are
assumed of the other NVIDIA GPUs, published matrix-product measurements of the MI300X. The network is one
400 Gb/s port per GPU (200 for the A100, 25 Gb/s Ethernet per GPU where GPUs have no NVLink).
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hdpissa.engine.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One GPU of a cluster. Rates are per GPU and direction, reached rather than promised.

    Attributes:
        memory: bytes that a program sees. bf16: FLOP/s of large matrix products.
        peak: FLOP/s of the data sheet (dense bf16), the denominator of MFU.
        hbm, link, network, host: bytes/s of memory, between GPUs of a node, between nodes, to the host.
    """

    name: str
    memory: float
    bf16: float
    peak: float
    hbm: float
    link: float
    network: float
    host: float


def _gpu(name: str, gib: float, peak: float, bf16: float, hbm: float, link: float, network: float, host: float):
    return Hardware(name, gib * GIB, bf16 * 1e12, peak * 1e12, hbm * 1e12, link * 1e9, network * 1e9, host * 1e9)


# memory GiB, data-sheet and reached TFLOP/s, reached TB/s; GB/s: in the node, between nodes, to the host
_TABLE = [
    _gpu("A100-40", 39.4, 312, 250, 1.40, 300, 25, 25),
    _gpu("A100-80", 79.1, 312, 250, 1.83, 300, 25, 25),
    _gpu("H100", 79.1, 989, 790, 3.0, 450, 50, 50),
    _gpu("H200", 139.8, 989, 790, 4.3, 450, 50, 50),
    _gpu("B200", 178.3, 2250, 1800, 7.2, 900, 50, 50),
    _gpu("MI300X", 191.5, 1307, 620, 4.0, 350, 50, 50),
    _gpu("L40S", 44.4, 362, 290, 0.78, 25, 3.1, 25),
    _gpu("RTX-4090", 23.5, 165, 132, 0.91, 20, 3.1, 20),
    _gpu("RTX-3090", 23.5, 71, 57, 0.84, 20, 3.1, 20),
]
GPUS = {gpu.name: gpu for gpu in _TABLE}
# what people and data sheets write; the table's own names are added below
_ALIASES = {"a100": "A100-80", "h10080": "H100", "h200141": "H200", "4090": "RTX-4090", "3090": "RTX-3090"}


def _key(name: str) -> str:
    """h100-80gb, "NVIDIA H100 80GB HBM3" and H100_80GB are one GPU."""
    words = name.lower().replace("-", " ").replace("_", " ").replace("gb", " ").split()
    ignored = {"nvidia", "amd", "instinct", "geforce", "sxm", "sxm4", "sxm5", "hbm3", "hbm3e", "hbm2e"}
    return "".join(word for word in words if word not in ignored)


def _letters(key: str) -> str:
    return key.rstrip("0123456789")


def read_gpu(text: str) -> Hardware:
    """The GPU of a name, or of a JSON file.

    Raises:
        ConfigError: an unknown name, or a file that does not say what is needed.
    """
    if text.endswith(".json") or Path(text).is_file():
        return _from_file(Path(text))
    names = {_key(name): name for name in GPUS} | _ALIASES
    found = names.get(_key(text))
    if found is None:
        alike = [name for name in names if _letters(name) == _letters(_key(text))]  # V100 is no misspelt H100
        near = difflib.get_close_matches(_key(text), alike, n=1)
        hint = f"did you mean {names[near[0]]}? " if near else ""
        raise ConfigError(f"--gpu {text}: {hint}known are {', '.join(GPUS)}; or give a JSON file with your numbers")
    return GPUS[found]


# key of the file: attribute, unit
_KEYS = {
    "memory_gib": ("memory", GIB),
    "bf16_tflops": ("bf16", 1e12),
    "hbm_tb_s": ("hbm", 1e12),
    "link_gb_s": ("link", 1e9),
    "network_gb_s": ("network", 1e9),
    "host_gb_s": ("host", 1e9),
    "peak_tflops": ("peak", 1e12),
}
_OPTIONAL = {"host_gb_s", "peak_tflops"}


def _from_file(path: Path) -> Hardware:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"--gpu {path}: no such file; give a JSON file with {', '.join(_KEYS)}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"--gpu {path}, line {error.lineno}: not valid JSON ({error.msg}); mend it") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--gpu {path}: must be a JSON object with {', '.join(_KEYS)}")
    name = str(content.pop("name", path.stem))
    for key, value in content.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid keys: name, {', '.join(_KEYS)}"
            raise ConfigError(f"--gpu {path}: unknown key {key}; {hint}")
        if type(value) not in (int, float) or not 0 < value < math.inf:  # type(): a bool is an int to isinstance
            raise ConfigError(f"--gpu {path}: {key} is {json.dumps(value)}: must be a number greater than 0")
    missing = [key for key in _KEYS if key not in content and key not in _OPTIONAL]
    if missing:
        raise ConfigError(f"--gpu {path}: {', '.join(missing)} missing; add it")
    numbers = {"host_gb_s": 25.0, "peak_tflops": content["bf16_tflops"], **content}
    return Hardware(name, **{attribute: numbers[key] * unit for key, (attribute, unit) in _KEYS.items()})


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes; ranks are counted node by node."""

    gpu: Hardware
    gpus: int
    gpus_per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    def sized(self, gpus: int) -> Cluster:
        """The same kind of cluster with another number of GPUs."""
        return replace(self, gpus=gpus)

    def gather_rate(self, size: int, stride: int = 1) -> float:
        """Bytes/s at which each of `size` ranks, `stride` apart, receives the parts of the others.

        Between nodes everything enters a node once, over the ports of those GPUs that take part, and is
        passed on inside; so a gather among all GPUs runs at the node's whole ingress.
        """
        if not self.crosses(size, stride):
            return self.gpu.link
        return min(self.gpu.link, self.gpu.network * max(1, self.gpus_per_node // stride))

    def exchange_rate(self, size: int, stride: int = 1) -> float:
        """Bytes/s per rank of an all-to-all: nothing can be shared inside a node."""
        return min(self.gpu.link, self.gpu.network) if self.crosses(size, stride) else self.gpu.link

    def crosses(self, size: int, stride: int = 1) -> bool:
        """Whether such a group leaves a node."""
        return (size - 1) * stride >= self.gpus_per_node

    def link_name(self, size: int, stride: int = 1) -> str:
        """What limits such a group, in words."""
        if self.crosses(size, stride):
            return "network"
        return "NVLink" if self.gpu.link > 2 * self.gpu.host else "PCIe"


def figures(gpu: Hardware) -> dict[str, float | str]:
    """The numbers in use, in the units of the JSON file."""
    assert {attribute for attribute, _ in _KEYS.values()} == {f.name for f in fields(gpu)} - {"name"}
    return {"name": gpu.name} | {key: getattr(gpu, attribute) / unit for key, (attribute, unit) in _KEYS.items()}
