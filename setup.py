"""Maps the top-level folders onto the import package `hdpissa`.

Everything else (metadata, dependencies, tool settings) is in pyproject.toml.

Why the folders are not importable under their own names: transformers imports a
PyPI package called `kernels` when one is installed. If `kernels/__init__.py`
existed here and the repository root were on sys.path, our folder would answer
instead and importing any Llama model would fail. So `kernels/` has no
`__init__.py`, scripts are launched by path (`deepspeed launch/train.py`, never
`python -m launch.train`), and the code is imported as `hdpissa.kernels`.
tests/test_packaging.py holds this.
"""

from setuptools import setup

FOLDERS = ("engine", "kernels", "launch", "launch/trainers", "benchmarks", "benchmarks/quality", "ds_configs")

setup(
    packages=[f"hdpissa.{folder.replace('/', '.')}" for folder in FOLDERS],
    package_dir={f"hdpissa.{folder.replace('/', '.')}": folder for folder in FOLDERS},
    package_data={"hdpissa.ds_configs": ["*.json"], "hdpissa.engine": ["*.jinja"], "hdpissa.launch": ["*.jinja"]},
)
