"""Images in a field beside the messages: each form gives the messages that have the same images as parts."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from picture_data import paint

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text import Record, load_records
from fp8pipe.models.language.text.images import image_bytes

PLACE = {"type": "image"}
ANSWER = {"role": "assistant", "content": "b"}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def named(name: str) -> dict[str, str]:
    return {"type": "image", "path": name}


def asked(*parts: Any, **fields: Any) -> dict[str, Any]:
    """A record with one question of these parts."""
    return {"messages": [{"role": "user", "content": [*parts]}, ANSWER], **fields}


def read(folder: Path, row: dict[str, Any], warn: Any = print) -> Record:
    (folder / "data.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (record,) = load_records(str(folder / "data.jsonl"), warn)
    return record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images, a.png and b.png."""
    for name, colour in (("a.png", (200, 0, 0)), ("b.png", (0, 0, 200))):
        paint(tmp_path / name, colour, (4, 4))
    return tmp_path


USUAL = asked(named("a.png"), text("or "), named("b.png"), text("?"))
FORMS: dict[str, dict[str, Any]] = {
    "places": asked(PLACE, text("or "), PLACE, text("?"), images=["a.png", "b.png"]),
    "places of a table": asked({**PLACE, "text": None}, text("or "), PLACE, text("?"), images='["a.png", "b.png"]'),
    "objects": asked(PLACE, text("or "), PLACE, text("?"), images=[{"path": "a.png", "bytes": None}, {"url": "b.png"}]),
    "marks": {"messages": [{"role": "user", "content": "<image>or <image>?"}, ANSWER], "images": ["a.png", "b.png"]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "<image>or <image>?"}, {"from": "gpt", "value": "b"}],
                 "images": ["a.png", "b.png"]},
    "instruction": {"instruction": "<image>or <image>?", "output": "b", "images": ["a.png", "b.png"]},
    "one is its part's": asked(named("a.png"), text("or "), PLACE, text("?"), images=["b.png"]),
    "one, not in a list": asked(named("a.png"), text("or <image>?"), image="b.png"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_the_messages_with_parts(form: str, folder: Path) -> None:
    said: list[str] = []
    assert read(folder, FORMS[form], said.append).messages == read(folder, USUAL).messages
    assert said == []
    assert all("line 1, " in part.place for part in read(folder, FORMS[form]).images)


def test_images_are_taken_message_by_message(folder: Path) -> None:
    first, second = ({"role": "user", "content": content} for content in ([PLACE, text("a?")], "<image>b?"))
    answers = [{"role": "assistant", "content": said} for said in ("an <image>", "y")]
    talk = [first, answers[0], second, answers[1]]
    record = read(folder, {"messages": talk, "images": ["a.png", "b.png"]})
    assert [[Path(part.source).name for part in m.images] for m in record.messages] == [["a.png"], [], ["b.png"], []]
    assert record.messages[1].content == "an <image>"  # an answer is text


def test_images_of_tables_are_read_as_their_bytes(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    wanted = [(folder / name).read_bytes() for name in ("a.png", "b.png")]
    talk = [*FORMS["places"]["messages"][:1], {**ANSWER, "content": [text("b")]}]  # a column has one kind of content
    data = datasets.Dataset.from_list(
        [{"messages": talk, "images": [{"bytes": each, "path": None} for each in wanted]}]
    )
    data = data.cast_column("images", datasets.List(datasets.Image()))
    data.to_parquet(folder / "data.parquet")
    data.save_to_disk(str(folder / "saved"))
    for source in ("data.parquet", "saved"):
        (record,) = load_records(str(folder / source))
        assert record.messages[0].content == read(folder, USUAL).messages[0].content
        assert [image_bytes(part) for part in record.images] == wanted


def test_what_an_image_part_says_besides_is_told(folder: Path) -> None:
    uri = f"data:image/png;base64,{base64.b64encode((folder / 'a.png').read_bytes()).decode()}"
    detailed = {"type": "image_url", "image_url": {"url": uri, "detail": "low"}}
    said: list[str] = []
    read(folder, asked(detailed, detailed, {**named("b.png"), "max_pixels": 9}, text("?")), said.append)
    (told,) = said
    assert told.startswith("fields of records that are not used: '")
    assert {"'detail' (in 1 of 1)", "'max_pixels' (in 1 of 1)"} == {*told.partition(": ")[2].split(", ")}
    said.clear()
    read(folder, {"prompt": "a mug", "completion": "9", "image": "https://x.org/mug.png"}, said.append)
    assert said == ["fields of records that are not used: 'image' (in 1 of 1)"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (asked(PLACE, text("?"), images=["a.png", "b.png"]), "holds 2 image(s), and its messages have 1 place(s)"),
        (asked(PLACE, PLACE, text("?"), images=["a.png"]), "holds 1 image(s), and its messages have 2 place(s)"),
        (asked(text("?"), images=["a.png"]), "have 0 place(s) for them: give each image a part"),
        (asked(PLACE, text("?"), images=[]), "messages[0], part 1: an image part must name one file"),
        (asked(PLACE, text("?"), images=["c.png"]), "images[0]: there is no image file /"),
        (asked(PLACE, text("?"), images=["http://x.org/a.png"]), "images[0]: the image 'http://x.org/a.png' is on a"),
        (asked(PLACE, text("?"), images=[7]), "images[0]: an image part must name one file"),
        (asked(PLACE, text("?"), images=[{}]), "images[0]: an image is the path of a file, a data: URI"),
        (asked(PLACE, text("?"), images="[1"), "'images' is text that is not valid JSON"),
        (asked(PLACE, text("\ufffc"), images=["a.png"]), "its text holds the character U+FFFC"),
    ],
)  # fmt: skip
def test_images_that_have_no_place_or_are_none_are_refused(row: dict[str, Any], words: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(folder, row)
    assert words in caught.value.why
