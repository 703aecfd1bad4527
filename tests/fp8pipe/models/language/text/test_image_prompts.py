"""Prompts with images. The oracle is the checkpoint's own processor, which is given the same messages at once."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_data import about, paint
from PIL import Image
from tiny_pictures import PICTURED, write_pictured

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.base import load_tokenizer
from fp8pipe.models.language.text import IGNORED, Encoding, ImagePrompts, encode, load_image_prompts, load_records
from fp8pipe.models.language.text.conversation import ImagePart
from fp8pipe.models.language.text.images import open_image

RED, BLUE = (220, 10, 10), (10, 10, 220)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pictured")
    return {name: write_pictured(root / name, name) for name in PICTURED}


def written(folder: Path, *rows: dict[str, Any]) -> str:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(data)


def encoded(base: Path, data: str, length: int = 512) -> tuple[Encoding, ImagePrompts]:
    records = load_records(data)
    images = load_image_prompts(base, "the model", records)
    assert images is not None
    return encode(records, load_tokenizer(base), length, images=images), images


def own(base: Path, folder: Path, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the processor itself makes of messages, with the images opened."""
    processor = import_transformers().AutoProcessor.from_pretrained(str(base))

    def opened(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        return {"type": "image", "image": Image.open(folder / part["image_url"]["url"])}

    talk = [
        {**m, "content": m["content"] if isinstance(m["content"], str) else [opened(part) for part in m["content"]]}
        for m in messages
    ]
    return dict(processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt"))


@pytest.mark.parametrize("name", PICTURED)
def test_tokens_and_inputs_are_those_of_the_processor(bases: dict[str, Path], name: str, tmp_path: Path) -> None:
    small, wide = paint(tmp_path / "small.png", RED), paint(tmp_path / "wide.jpg", BLUE, (140, 56))
    rows = [about(small, "What?", answer="red"), about("Compare ", wide, " with ", small, ".", answer="bluer")]
    result, images = encoded(bases[name], written(tmp_path, *rows))
    assert result.warnings == ()
    for example, row in zip(result.examples, rows, strict=True):
        theirs = own(bases[name], tmp_path, row["messages"])
        answer = row["messages"][1]["content"]
        assert theirs["input_ids"][0].tolist() == example.input_ids
        assert [label for label in example.labels if label != IGNORED] == example.input_ids[-len(answer) :]
        assert bool((theirs.pop("attention_mask") == 1).all())
        ours = images.inputs([example.images], theirs.pop("input_ids").shape[1])
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert value.dtype == ours[key].dtype, key
            assert torch.equal(value, ours[key]), key
    short, long = (example.images for example in result.examples)
    both, alone, other = (images.inputs(rows, 64) for rows in ([short, None, long], [short], [long]))
    for key, value in both.items():  # rows in order, nothing for the row without images
        blank = alone[key].new_zeros((1, 64)) if value.shape[1:] == (64,) else alone[key][:0]
        assert torch.equal(value, torch.cat([alone[key], blank, other[key]])), key


def test_an_image_after_an_answer_makes_one_example_per_answer(bases: dict[str, Path], tmp_path: Path) -> None:
    first, second = about(paint(tmp_path / "a.png", RED), "What?", answer="red"), about("And ", answer="blue")
    second["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": "b.png"}})
    paint(tmp_path / "b.png", BLUE, (84, 56))
    talk = [*first["messages"], *second["messages"]]
    result, _ = encoded(bases["qwen25vl"], written(tmp_path, {"messages": talk}))
    assert result.expanded == 1
    assert len(result.examples) == 2
    assert "1 conversations were cut into one example for each answer: images follow" in result.warnings[0]
    for example, end in zip(result.examples, (2, 4), strict=True):
        assert own(bases["qwen25vl"], tmp_path, talk[:end])["input_ids"][0].tolist() == example.input_ids
        assert example.images is not None
        assert len(example.images.parts) == end // 2
    later = [*first["messages"], {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}]
    (joined,) = encoded(bases["qwen25vl"], written(tmp_path, {"messages": later}))[0].examples
    assert joined.answer_tokens == len("red") + len("yes")
    assert own(bases["qwen25vl"], tmp_path, later)["input_ids"][0].tolist() == joined.input_ids


def test_the_limit_counts_the_tokens_of_images(bases: dict[str, Path], tmp_path: Path) -> None:
    data = written(tmp_path, about(paint(tmp_path / "a.png", RED), "What?"), about("What?"))
    whole = encoded(bases["qwen25vl"], data)[0].examples
    assert whole[1].images is None
    prompt = len(whole[0].input_ids) - whole[0].answer_tokens
    assert prompt > len(whole[1].input_ids)
    result, _ = encoded(bases["qwen25vl"], data, prompt)
    assert (len(result.examples), result.dropped) == (1, 1)
    assert f"no answer token within {prompt} tokens" in "".join(result.warnings)


def test_a_data_uri_is_the_image_of_its_file(bases: dict[str, Path], tmp_path: Path) -> None:
    image = paint(tmp_path / "a.png", RED)
    inline = about(image, "What?")
    uri = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    inline["messages"][0]["content"][0] = {"type": "image_url", "image_url": {"url": uri}}
    result, images = encoded(bases["gemma3_mm"], written(tmp_path, about(image, "What?"), inline))
    one, two = (example.images for example in result.examples)
    assert one is not None
    assert two is not None
    assert (one.tokens, one.digests) == (two.tokens, two.digests)
    made = [images.inputs([each], 64)["pixel_values"] for each in (one, two)]
    assert torch.equal(*made)


def opened(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return open_image(ImagePart("", "line 1"), file.getvalue())


def test_images_are_opened_as_they_are_served() -> None:
    """Upright, in RGB, on white where they are transparent; the picture of a camera's file is its first."""
    clear = Image.new("RGBA", (2, 1), (*RED, 255))
    clear.putpixel((1, 0), (*BLUE, 0))
    grey = Image.new("LA", (2, 1), (40, 255))
    grey.putpixel((1, 0), (40, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    white = (255, 255, 255)
    for image, left, options in ((clear, RED, {}), (grey, (40, 40, 40), {}), (palette, RED, {"transparency": 1})):
        found = opened(image, "PNG", **options)
        assert (found.mode, found.getpixel((0, 0)), found.getpixel((1, 0))) == ("RGB", left, white)
    lying, tags = Image.new("RGB", (16, 8), RED), Image.Exif()
    tags[0x0112] = 6  # to be turned by a quarter
    assert opened(lying, "JPEG", exif=tags).size == (8, 16)
    assert opened(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG").getpixel((4, 4)) == (0, 0, 0)
    with_preview = opened(Image.new("L", (16, 8), 200), "MPO", save_all=True, append_images=[Image.new("L", (4, 4), 0)])
    assert (with_preview.size, with_preview.getpixel((8, 4))) == ((16, 8), (200, 200, 200))


@pytest.mark.parametrize("kind", ["text", "animation", "cut", "uri"])
def test_an_image_that_cannot_be_read_is_named_with_its_place(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    image = paint(tmp_path / "a.png", RED, (112, 112))
    row = about("Look: ", image)
    if kind == "text":
        image.write_text("no image")
    elif kind == "cut":
        image.write_bytes(image.read_bytes()[:80])
    elif kind == "animation":
        frames = [Image.new("RGB", (56, 56), colour) for colour in (RED, BLUE)]
        frames[0].save(image, "GIF", save_all=True, append_images=frames[1:])
    else:
        row["messages"][0]["content"][1] = {"type": "image", "image": "data:image/png;base64,?"}
    with pytest.raises(ConfigurationError) as caught:
        encoded(bases["qwen25vl"], written(tmp_path, about("q"), row))
    assert "the image of line 2, messages[0], part 2 cannot be used: " in caught.value.what
    assert caught.value.exit_code == 10


def test_text_models_and_stages_of_text_refuse_images(bases: dict[str, Path], tmp_path: Path, make_base: Any) -> None:
    records = load_records(written(tmp_path, about("q"), about(paint(tmp_path / "a.png", RED), "What?")))
    with pytest.raises(
        ConfigurationError, match=r"tiny cannot read the image of line 2, messages\[0\], part 1"
    ) as caught:
        load_image_prompts(make_base(), "tiny", records)
    assert "it takes text alone" in caught.value.why
    assert "give text without image parts, or the checkpoint of a model that takes images" in caught.value.fix
    with pytest.raises(ConfigurationError, match=r"the image of line 2, messages\[0\], part 1 cannot be used"):
        encode(records, load_tokenizer(bases["qwen25vl"]), 512)
    assert load_image_prompts(bases["qwen25vl"], "tiny", records[:1]) is None


def test_text_that_stands_for_an_image_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    image = paint(tmp_path / "a.png", RED)
    for name, token in (("qwen25vl", "<|image|>"), ("gemma3_mm", "<|start|>"), ("gemma3_mm", "<|image|>")):
        for row in (about(f"{token}?"), about(image, token), about(image, "?", answer=token)):
            with pytest.raises(ConfigurationError, match="the text of the record at line 2 holds ") as caught:
                encoded(bases[name], written(tmp_path, about(image, "?"), row))
            assert token in caught.value.what


def test_a_template_without_a_place_for_images_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    records = load_records(written(tmp_path, about(paint(tmp_path / "a.png", RED), "What?")))
    images = load_image_prompts(bases["qwen25vl"], "the model", records)
    assert images is not None
    tokenizer, template = load_tokenizer(bases["qwen25vl"]), images.processor.chat_template
    images.processor.chat_template = template.replace("<|start|><|image|><|stop|>", "")
    with pytest.raises(ConfigurationError, match="does not place the images of the record at line 1") as caught:
        encode(records, tokenizer, 512, images=images)
    assert "1 images and 0 times" in caught.value.why
    images.processor.chat_template = tokenizer.chat_template = None
    with pytest.raises(ConfigurationError, match="no chat template, so images have no place"):
        encode(records, tokenizer, 512, images=images)


def test_an_image_that_changes_during_a_run_ends_it(bases: dict[str, Path], tmp_path: Path) -> None:
    image = paint(tmp_path / "a.png", RED)
    result, images = encoded(bases["qwen25vl"], written(tmp_path, about(image, "What?")))
    paint(image, BLUE)
    with pytest.raises(ConfigurationError, match=r"a\.png has changed since this run began"):
        images.inputs([result.examples[0].images], 64)
