"""launch/recipes/: the plan that a recipe shows is that of the run which it starts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "recipes"
# What both commands know, with their common defaults.
SHARED = {
    "ds_config": "zero3",
    "max_length": "512",
    "per_device_train_batch_size": "1",
    "gradient_accumulation_steps": "1",
    "gradient_checkpointing": None,
}


def told(text: str) -> dict[str, str | None]:
    """The options of a command, those of its YAML file included; of a switch only that it is there."""
    words = shlex.split(text)
    options = {}
    for name in (word for word in words if word.endswith(".yaml")):
        options |= {key: str(value) for key, value in yaml.safe_load((ROOT / name).read_text()).items()}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            options[word.removeprefix("--")] = "yes" if after.startswith("--") else after
    return SHARED | options


@pytest.mark.parametrize("recipe", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.stem)
def test_the_plan_is_that_of_the_run(recipe):
    text = recipe.read_text().replace("\\\n", " ")
    shape = re.search(r"^shape=\((.*?)\)", text, re.M | re.S)
    text = text.replace('"${shape[@]}"', shape[1].replace("\n", " ") if shape else "")
    (plan,) = re.findall(r"^hdpissa plan (.*)", text, re.M)
    (run,) = re.findall(r"^exec hdpissa train (.*)", text, re.M)
    planned, started = told(plan), told(run)
    assert {name: planned[name] for name in SHARED} == {name: started[name] for name in SHARED}
    assert planned["gpus"] == started["num_accelerators"]
    assert planned["gpu"] == "${GPU:-H100}"


def test_one_gpu_is_as_in_the_documentation():
    texts = [path.read_text().replace("\\\n", " ") for path in (ROOT / "docs" / "migrating.md", FOLDER / "one_gpu.sh")]
    found = [re.findall(r"hdpissa train (.*--num_accelerators 1 .*)", text) for text in texts]
    page, recipe = (told(command) for (command,) in found)
    names = SHARED.keys() - {"max_length"} | {"learning_rate"}
    assert {name: page[name] for name in names} == {name: recipe[name] for name in names}
