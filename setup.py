"""Maps the top-level folders onto the import package `hdpissa`.

Everything else (metadata, dependencies, tool settings) is in pyproject.toml.

Why the folders are not importable under their own names: transformers imports a
PyPI package called `kernels` when one is installed. If `kernels/__init__.py`
existed here and the repository root were on sys.path, our folder would answer
instead and importing any Llama model would fail. So `kernels/` has no
`__init__.py`, scripts are launched by path (`deepspeed launch/train.py`, never
`python -m launch.train`), and the code is imported as `hdpissa.kernels`.
tests/unit/test_packaging.py holds this.
"""

from setuptools import setup

ROOMS = {
    "engine": "config distributed files sharding method comm optim directions algorithms checkpoint export health",
    "launch": "common planning reporting exporting trainers training evaluation",
    "benchmarks": "common gpu kernel_timing memory quality startup step",
}
FOLDERS = ["engine", "kernels", "launch", "benchmarks", "ds_configs"]
FOLDERS += [f"{top}/{room}" for top, rooms in ROOMS.items() for room in rooms.split()]

setup(
    packages=[f"hdpissa.{folder.replace('/', '.')}" for folder in FOLDERS],
    package_dir={f"hdpissa.{folder.replace('/', '.')}": folder for folder in FOLDERS},
    package_data={
        "hdpissa.ds_configs": ["*.json"],
        "hdpissa.launch.reporting": ["*.jinja"],
        "hdpissa.launch.exporting": ["*.jinja"],
    },
)
