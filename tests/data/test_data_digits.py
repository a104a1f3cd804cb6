"""The bundled digits, and what every data set promises, shown on them."""

import json

import pytest
import sklearn.datasets
import torch

from surefoot.data import load
from surefoot.errors import InputError


def test_shapes_split_and_summary() -> None:
    data = load("digits")
    assert (data.name, data.task, data.kind, data.outputs) == ("digits", "classification", "image", 10)
    assert data.input_shape == (1, 8, 8)
    assert (len(data.train_x), len(data.test_x)) == (1438, 359)
    assert data.train_y.dtype == torch.int64
    # stratified: every class gives a fifth of its rows, to the row
    for c in range(10):
        train, test = (data.train_y == c).sum().item(), (data.test_y == c).sum().item()
        assert test == round(0.2 * (train + test))
    summary = json.loads(json.dumps(data.summary()))
    assert summary["notes"] == ["no test split: 20% of the rows held out (seed 0)"]
    assert summary["train_rows"] == 1438
    json.dumps(data.statistics)


def test_values_are_the_images_standardised() -> None:
    data = load("digits", dtype=torch.float64)
    (mean,), (std,) = data.statistics["input_mean"], data.statistics["input_std"]
    raw = torch.cat([data.train_x, data.test_x]) * std + mean
    images = torch.from_numpy(sklearn.datasets.load_digits().images) / 16
    # the same images in another order: the multisets of their rows agree
    assert raw.reshape(1797, -1).sum(1).sort().values == pytest.approx(images.reshape(1797, -1).sum(1).sort().values)
    assert abs(data.train_x.mean().item()) < 1e-12
    assert data.train_x.std(unbiased=False).item() == pytest.approx(1, abs=1e-12)


def test_same_arguments_same_bytes_other_seed_other_rows() -> None:
    first, again, other = load("digits", limit=300), load("digits", limit=300), load("digits", limit=300, seed=1)
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.train_x, other.train_x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_a_cast_of_the_same_numbers(dtype: torch.dtype) -> None:
    exact, data = load("digits", dtype=torch.float64), load("digits", dtype=dtype)
    assert torch.equal(data.train_x, exact.train_x.to(dtype))
    assert data.statistics == exact.statistics


def test_limit_is_balanced_and_leaves_the_test_rows() -> None:
    data = load("digits", limit=25)
    counts = torch.bincount(data.train_y, minlength=10)
    assert len(data.train_x) == 25
    assert set(counts.tolist()) == {2, 3}
    assert torch.equal(data.test_y, load("digits").test_y)
    assert any("limit: 25 of 1438" in note for note in data.notes)
    assert any("limit=5000 has no effect" in note for note in load("digits", limit=5000).notes)


def test_resize_and_unused_context() -> None:
    data = load("digits", image_size=12, context=7)
    assert data.input_shape == (1, 12, 12)
    assert "images resized to 12x12" in data.notes
    assert "context=7 has no effect on images" in data.notes


def test_it_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    load("digits", limit=20)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"limit": 1}, "limit=1"),
        ({"image_size": 0}, "image_size=0"),
        ({"context": 0}, "context=0"),
        ({"context": 2.5}, "context=2.5"),
        ({"seed": -1}, "seed=-1"),
        ({"test_fraction": 0.0}, "test_fraction=0.0"),
        ({"test_fraction": 1.0}, "test_fraction=1.0"),
        ({"test_fraction": float("nan")}, "test_fraction=nan"),
        ({"task": "ranking"}, "task='ranking'"),
        ({"task": "regression"}, "task='regression' has no effect"),
        ({"target": "label"}, "target='label' has no effect"),
        ({"dtype": torch.int64}, "dtype=torch.int64"),
    ],
)
def test_options_that_make_no_sense(arguments: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load("digits", **arguments)
    assert str(caught.value).startswith(said)
