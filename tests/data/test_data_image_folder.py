"""Folders of images by class."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from surefoot.data import load
from surefoot.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, picture: Callable[..., np.ndarray]) -> Path:
    """Ten images of each of two classes, and what an operating system leaves behind."""
    for i in range(10):
        picture(tmp_path / "zoo" / "cat" / f"{i}.png")
        picture(tmp_path / "zoo" / "ant" / f"{i}.png")
    (tmp_path / "zoo" / "cat" / ".DS_Store").write_bytes(b"")
    (tmp_path / "zoo" / "ant" / "readme.md").write_text("ants")
    return tmp_path / "zoo"


def test_classes_split_and_values(folder: Path, network_calls: list[str]) -> None:
    data = load(str(folder), dtype=torch.float64)
    assert (data.name, data.task, data.kind, data.classes) == ("zoo", "classification", "image", ("ant", "cat"))
    assert data.input_shape == (1, 4, 6)
    assert torch.bincount(data.train_y).tolist() == [8, 8]
    assert torch.bincount(data.test_y).tolist() == [2, 2]
    assert "1 files that are not images skipped in zoo" in data.notes
    (mean,), (std,) = data.statistics["input_mean"], data.statistics["input_std"]
    shown = {tuple(np.round((row * std + mean) * 255).astype(int).flatten()) for row in data.train_x.numpy()}
    assert shown < {tuple(np.asarray(Image.open(f)).flatten().astype(int)) for f in folder.rglob("*.png")}
    assert not network_calls


def test_train_and_test_folders(tmp_path: Path, picture: Callable[..., np.ndarray]) -> None:
    train = [picture(tmp_path / "train" / c / f"{i}.png", mode="RGB") for c in ("a", "b") for i in range(4)]
    tests = [picture(tmp_path / part / "b" / f"{i}.png", mode="RGB") for part in ("test", "val") for i in range(3)]
    data = load(str(tmp_path), dtype=torch.float64)
    pixels = np.stack(train) / 255
    assert data.statistics["input_mean"] == pytest.approx(pixels.mean((0, 1, 2)))
    assert data.statistics["input_std"] == pytest.approx(pixels.std((0, 1, 2)))
    expected = (np.stack(tests[:3]) / 255 - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    np.testing.assert_allclose(data.test_x.numpy(), expected.transpose(0, 3, 1, 2))
    assert data.test_y.tolist() == [1, 1, 1]
    assert data.notes == ("tested on test; not used: val",)
    assert any("test_fraction=0.3 has no effect" in note for note in load(str(tmp_path), test_fraction=0.3).notes)


def test_changing_test_images_changes_no_statistic(tmp_path: Path, picture: Callable[..., np.ndarray]) -> None:
    for c in "ab":
        for part in ("train", "test"):
            for i in range(3):
                picture(tmp_path / part / c / f"{i}.png")
    before = load(str(tmp_path))
    picture(tmp_path / "test" / "a" / "0.png")
    after = load(str(tmp_path))
    assert not torch.equal(before.test_x, after.test_x)
    assert torch.equal(before.train_x, after.train_x)
    assert before.statistics == after.statistics


def test_sizes_that_differ(folder: Path, picture: Callable[..., np.ndarray]) -> None:
    picture(folder / "cat" / "9.png", size=(7, 9))
    with pytest.raises(InputError) as caught:
        load(str(folder), limit=16)
    for part in ("6x4", "7x9", "--image-size 4", "cat/9.png"):
        assert part in str(caught.value)
    data = load(str(folder), image_size=5)
    assert data.input_shape == (1, 5, 5)
    assert "images resized to 5x5" in data.notes


def test_grey_and_colour_mixed(folder: Path, picture: Callable[..., np.ndarray]) -> None:
    for i in range(3):
        picture(folder / "cat" / f"{i}.png", mode="RGB")
    picture(folder / "ant" / "0.png", mode="RGBA")
    data = load(str(folder))
    assert data.input_shape == (3, 4, 6)
    assert "16 grey and 4 colour images: all read as RGB" in data.notes
    assert "1 images have transparency: dropped" in data.notes


def test_grey_training_and_colour_test_images(tmp_path: Path, picture: Callable[..., np.ndarray]) -> None:
    for c in "ab":
        for i in range(2):
            picture(tmp_path / "train" / c / f"{i}.png")
        picture(tmp_path / "test" / c / "0.png", mode="RGB")
    data = load(str(tmp_path))
    assert data.train_x.shape == (4, 3, 4, 6)
    assert torch.equal(data.train_x[:, 0], data.train_x[:, 2])


def test_constant_images_are_left_at_zero(tmp_path: Path) -> None:
    for c in "ab":
        (tmp_path / c).mkdir()
        for i in range(3):
            Image.new("L", (4, 4), 77).save(tmp_path / c / f"{i}.png")
    data = load(str(tmp_path))
    assert (data.train_x == 0).all()
    assert any("constant" in note for note in data.notes)


def refused(folder: Path, **arguments) -> str:
    with pytest.raises(InputError) as caught:
        load(str(folder), **arguments)
    assert repr(str(folder)) in str(caught.value) or arguments
    return str(caught.value)


def test_bad_folders(folder: Path, tmp_path: Path, picture: Callable[..., np.ndarray]) -> None:
    (tmp_path / "bare").mkdir()
    assert "neither parquet files nor class subfolders" in refused(tmp_path / "bare")
    assert "target='cat' has no effect" in refused(folder, target="cat")
    assert "task='regression' has no effect" in refused(folder, task="regression")
    (folder / "dog").mkdir()
    assert "class folder dog holds no images" in refused(folder)
    (folder / "dog").rmdir()
    for i in range(5):
        picture(tmp_path / "single" / "cat" / f"{i}.png")
    assert "of one class" in refused(tmp_path / "single")
    picture(tmp_path / "few" / "a" / "0.png")
    picture(tmp_path / "few" / "b" / "0.png")
    assert "too few" in refused(tmp_path / "few")


def test_a_test_class_that_does_not_train(tmp_path: Path, picture: Callable[..., np.ndarray]) -> None:
    for name in ("train/a", "train/b", "test/c"):
        picture(tmp_path / name / "0.png")
    assert "test/c is a class that train does not have" in refused(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_a_corrupt_image_is_named(folder: Path, damage: str) -> None:
    file = folder / "cat" / "3.png"
    file.write_bytes({"cut": file.read_bytes()[:60], "noise": b"not an image", "empty": b""}[damage])
    said = refused(folder)
    assert "cat/3.png cannot be read" in said


def test_sixteen_bits_are_refused(folder: Path) -> None:
    Image.fromarray(np.full((4, 6), 40_000, dtype=np.uint16)).save(folder / "cat" / "3.png")
    assert "cat/3.png does not hold 8 bits" in refused(folder)
