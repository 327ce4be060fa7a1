"""Where a chat's turn ends, there an answer of an exported model ends, by its generation_config."""

from __future__ import annotations

import json

import pytest

from hdpissa.launch.export_template import write_stops


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": 1, "top_p": 0.5}}, {"eos_token_id": [1, 7], "top_p": 0.5}),
        ({"generation_config.json": {"eos_token_id": [7, 1]}}, {"eos_token_id": [7, 1]}),
        ({"config.json": {"eos_token_id": 1, "bos_token_id": 0}}, {"eos_token_id": [1, 7], "bos_token_id": 0}),
        ({}, {"eos_token_id": [7]}),
    ],
)
def test_an_export_from_a_checkpoint_ends_there_too(tmp_path, base, expected):
    """Its generation_config.json, a copy of the base's, or one of the base's configuration where it has none."""
    for name, content in base.items():
        (tmp_path / name).write_text(json.dumps(content))
    write_stops({"stop_token_ids": [7]}, tmp_path, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == expected
    (tmp_path / "generation_config.json").unlink()
    write_stops({}, tmp_path, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
