"""Options: defaults, contradictions, ranges, JSON round trip."""

import json
import math
from pathlib import Path

import pytest

from surefoot.errors import InputError
from surefoot.train.config import LETTERS, OPTIMIZERS, TrainConfig, read_config


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_defaults_are_filled_in_once(optimizer: str) -> None:
    config = TrainConfig(optimizer=optimizer).resolved()
    for letter, value in LETTERS[optimizer].items():
        assert getattr(config, letter) == value
    assert config.resolved() == config
    assert config.epochs == 10


def test_json_round_trip_keeps_infinity(tmp_path: Path) -> None:
    config = TrainConfig(gamma=math.inf, width=(3, 4), batch_size="full").resolved()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json(), allow_nan=False))
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"optimizer": "delta-clip"}, ["--optimizer 'delta-clip'", "did you mean delta-gclip"]),
        ({"lr": 0.0}, ["--lr 0", "(0, infinity)"]),
        ({"lr": -1.0}, ["--lr -1"]),
        ({"lr": math.nan}, ["--lr nan"]),
        ({"lr": math.inf}, ["--lr inf"]),
        ({"gamma": 0.0}, ["--gamma 0", "--gamma inf never clips"]),
        ({"gamma": math.nan}, ["--gamma nan"]),
        ({"delta": 1.5}, ["--delta 1.5", "[0, 1]"]),
        ({"delta": -0.1}, ["--delta -0.1"]),
        ({"momentum": 1.5}, ["--momentum 1.5"]),
        ({"weight_decay": -1.0}, ["--weight-decay -1"]),
        ({"beta": 1.0}, ["--beta 1 has no effect with --optimizer delta-gclip", "normalized-gd"]),
        ({"optimizer": "sgd", "delta": 0.1}, ["--delta 0.1 has no effect without --gamma"]),
        ({"optimizer": "adam", "momentum": 0.9}, ["--momentum 0.9 has no effect with --optimizer adam"]),
        ({"optimizer": "smooth-clip", "L0": 0.0}, ["--L0 0"]),
        ({"nesterov": True}, ["--nesterov has no effect without --momentum"]),
        ({"epochs": 1.0, "steps": 3}, ["--epochs 1 and --steps 3"]),
        ({"epochs": 0.0}, ["--epochs 0"]),
        ({"steps": 0}, ["--steps 0"]),
        ({"batch_size": 0}, ["--batch-size 0"]),
        ({"warmup": -1}, ["--warmup -1"]),
        ({"checkpoint_seconds": 0.0}, ["--checkpoint-seconds 0"]),
        ({"seed": -1}, ["--seed -1"]),
    ],
)
def test_bad_options_are_named_with_their_value(options: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(InputError) as error:
        TrainConfig(**options).resolved()  # type: ignore[arg-type]
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "not a JSON object"),
        ('{"learning_rate": 1}', "'learning_rate' is not known"),
        ('{"lr": "fast"}', "lr = 'fast'"),
        ('{"batch_size": "half"}', "batch_size = 'half'"),
        ('{"nesterov": 1}', "nesterov = 1"),
        ('{"steps": 1.5}', "steps = 1.5"),
        ('{"width": [1.5]}', "width = (1.5,)"),
    ],
)
def test_a_bad_config_file_is_an_input_error(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match="--config") as error:
        read_config(path)
    assert part in str(error.value)
