"""Image folders: their order, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.image_folder import (
    UNLABELLED,
    batches,
    check_pictures,
    list_pictures,
    read_image_folder,
    read_pixels,
)
from fp8pipe.models.vision.preprocessing import Preprocessing

RECIPE = Preprocessing(resize=(4, 6), crop=(4, 6), interpolation="nearest", mean=(0.5,) * 3, std=(0.5,) * 3)


def picture(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (colour, 0, 0)).save(path)


def test_classes_and_pictures_come_in_the_order_of_their_names(tmp_path: Path):
    for name in ("b/2.png", "b/1.JPG", "a/deeper/x.png", "a/y.bmp"):
        picture(tmp_path / name)
    for name in ("b/notes.txt", "b/.hidden.png", ".cache/z.png", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no picture")
    folder = read_image_folder(tmp_path)
    assert folder.classes == ("a", "b")
    assert [str(file.relative_to(tmp_path)) for file in folder.files] == [
        "a/deeper/x.png",
        "a/y.bmp",
        "b/1.JPG",
        "b/2.png",
    ]
    assert folder.labels == (0, 0, 1, 1)


def test_batches_hold_the_rows_in_order(tmp_path: Path):
    for index in range(5):
        picture(tmp_path / "a" / f"{index}.png", 10 * index)
    folder = read_image_folder(tmp_path)
    parts = list(batches(folder, [4, 0, 3], RECIPE, 2))
    assert [tuple(part.shape) for part in parts] == [(2, 3, 4, 6), (1, 3, 4, 6)]
    assert torch.cat(parts)[:, 0, 0, 0].tolist() == [40, 0, 30]


def test_pictures_without_labels_may_lie_in_one_place(tmp_path: Path):
    for name in ("b.png", "a.jpg", ".hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    folder = list_pictures(tmp_path)
    assert [file.name for file in folder.files] == ["a.jpg", "b.png"]
    assert folder.classes == UNLABELLED
    assert len(next(batches(folder, [0, 1], RECIPE, 2))) == 2
    picture(tmp_path / "ant" / "1.png")  # with folders it is one folder per class, as everywhere
    assert list_pictures(tmp_path) == read_image_folder(tmp_path)
    with pytest.raises(ConfigurationError, match="not an image folder"):
        list_pictures(tmp_path / "gone")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_broken_picture_is_found_without_its_pixels_being_used(suffix: str, tmp_path: Path):
    for index in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        noise = torch.randint(256, (200, 300, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / "a" / f"{index}.{suffix}")
    check_pictures(read_image_folder(tmp_path))
    broken = tmp_path / "a" / f"1.{suffix}"
    broken.write_bytes(broken.read_bytes()[:-9000])
    with pytest.raises(ConfigurationError, match=f"1.{suffix} cannot be read"):
        check_pictures(read_image_folder(tmp_path))


def test_folders_that_are_none(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="not an image folder"):
        read_image_folder(tmp_path / "gone")
    picture(tmp_path / "loose.png")
    with pytest.raises(ConfigurationError, match="not an image folder") as caught:
        read_image_folder(tmp_path)
    assert "no folders, and 1 pictures" in caught.value.why
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError) as caught:
        read_image_folder(tmp_path)
    assert "no pictures in empty" in caught.value.why


def test_a_corrupt_picture_is_named(tmp_path: Path):
    picture(tmp_path / "a" / "whole.png")
    content = (tmp_path / "a" / "whole.png").read_bytes()
    for name, damaged in {"cut.png": content[: len(content) // 2], "none.png": b"", "text.jpg": b"hello"}.items():
        (tmp_path / "a" / name).write_bytes(damaged)
        with pytest.raises(ConfigurationError, match=name):
            read_pixels(tmp_path / "a" / name, RECIPE)
