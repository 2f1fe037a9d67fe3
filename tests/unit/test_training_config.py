"""Every setting of a run is documented and survives the run folder."""

from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from training.config import TrainConfig


def test_every_field_is_documented() -> None:
    documented = TrainConfig.__doc__ or ""
    missing = [field.name for field in fields(TrainConfig) if f"\n        {field.name}: " not in documented]
    assert not missing


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = replace(TrainConfig.demo(), seed=5).with_cut(datetime(2026, 1, 1, tzinfo=UTC))
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config
    assert config.cut == "2026-01-01T00:00:00+00:00"


def test_an_unknown_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"sede": 1}')
    with pytest.raises(ValueError, match="sede"):
        TrainConfig.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("holdout_fraction", "1.5"),
        ("batch_size", "0"),
        ("cut", "yesterday"),
        ("target_actions", "purchase,steal"),
        ("seed", "x"),
        ("tower", "image"),
        ("sequence_length", "51"),
        ("sequence_width", "33"),
    ],
)
def test_an_impossible_value_is_refused_by_name(field: str, text: str) -> None:
    with pytest.raises(ValueError, match=field):
        TrainConfig.tiny().with_values({field: text})
