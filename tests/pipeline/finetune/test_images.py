"""Fine-tuning on records with images: the image is read, only the decoder is trained, and all else stays as it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from image_families import IMAGE_FAMILIES, write_image_family
from picture_data import about, paint, write_colours
from PIL import Image
from safetensors.torch import load_file
from tiny_pictures import PICTURED, write_pictured
from tuning_config import config

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.kinds import TunedDetails
from fp8pipe.cli import main
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.base import load_tokenizer
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.models.language.text import ImagePrompts, encode, load_image_prompts, load_records
from pipeline.finetune import needs, stage
from pipeline.finetune.batches import Batches
from pipeline.finetune.compiled import decoder_layers
from pipeline.finetune.image_check import check_images
from pipeline.finetune.loading import load_model
from pipeline.finetune.loss import answer_loss, model_inputs
from pipeline.finetune.plan import plan_finetune
from pipeline.finetune.processes import build_method
from pipeline.finetune.stage import finetune

ALL = [*PICTURED, *IMAGE_FAMILIES]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pictured")
    pictured = {name: write_pictured(root / name, name) for name in PICTURED}
    return pictured | {name: write_image_family(root / name, name) for name in IMAGE_FAMILIES}


def mixed(folder: Path) -> Path:
    """Records with two images, with one, and without, of different lengths and sizes."""
    red, blue = paint(folder / "red.png", (220, 10, 10)), paint(folder / "blue.png", (10, 10, 220), (112, 84))
    rows = [
        about(red, "What?", answer="red"), about("Compare ", blue, " with ", red, answer="bluer"),
        about("Hello", answer="hi"), about(blue, "Which colour is this image?", answer="b"),
    ]  # fmt: skip
    data = folder / "mixed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data


def batches_of(base: Path, data: Path) -> Batches:
    records = load_records(str(data))
    images = load_image_prompts(base, "the model", records)
    examples = encode(records, load_tokenizer(base), 256, images=images).examples
    return Batches(examples, 4, 256, seed=0, packing=False, pad_id=0, images=images)


@pytest.mark.parametrize("name", ALL)
def test_the_loss_of_a_batch_is_that_of_its_rows(bases: dict[str, Path], name: str, tmp_path: Path) -> None:
    """And that of each row is the one which transformers computes from the processor's own inputs.

    In fp32, so that only the order of sums differs, between shapes and between two ways to attend: 1e-5 of a loss.
    """
    data = mixed(tmp_path)
    model: Any = load_model(config(bases[name], data, dtype="float32", device="cpu"), resolve_model(str(bases[name])))
    batches = batches_of(bases[name], data)
    batch = batches.at(0)
    model.eval()
    with torch.no_grad():
        together = float(answer_loss(model, model_inputs(batch, "cpu"), batch.labels))
        alone = [batches.only(index) for index in batch.examples]
        rows = [float(answer_loss(model, model_inputs(row, "cpu"), row.labels)) for row in alone]
        assert together == pytest.approx(sum(rows), rel=1e-5)
        assert len({round(row, 3) for row in rows}) == len(rows) == 4
        plain = import_transformers().AutoModelForImageTextToText.from_pretrained(bases[name], dtype=torch.float32)
        processor = import_transformers().AutoProcessor.from_pretrained(bases[name])
        talks = [json.loads(line)["messages"] for line in (tmp_path / "mixed.jsonl").read_text().splitlines()]
        for number, loss in zip(batch.examples, rows, strict=True):
            for part in talks[number][0]["content"]:
                if part["type"] == "image_url":
                    part |= {"type": "image", "image": Image.open(tmp_path / part.pop("image_url")["url"])}
            inputs = processor.apply_chat_template(talks[number], tokenize=True, return_dict=True, return_tensors="pt")
            answer = len(talks[number][1]["content"])
            logits = plain(**inputs).logits[0, -1 - answer : -1].log_softmax(-1)
            targets = inputs["input_ids"][0, -answer:]
            assert loss == pytest.approx(-float(logits.gather(1, targets[:, None]).sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_mixes_rows_or_sees_later_tokens_is_refused(
    bases: dict[str, Path], tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kinds of tokens of Gemma 3 an answer is made to look like an image, which is attended both ways."""
    data = mixed(tmp_path)
    for name in (*IMAGE_FAMILIES, *PICTURED):
        how = config(bases[name], data, dtype=dtype, device="cpu")
        model, batches = load_model(how, resolve_model(str(bases[name]))), batches_of(bases[name], data)
        check_images(model, batches)
    read = ImagePrompts.inputs

    def two_ways(self: ImagePrompts, rows: Any, width: int) -> dict[str, torch.Tensor]:
        found = read(self, rows, width)
        return found | {"token_type_ids": torch.ones_like(found["token_type_ids"])}

    with monkeypatch.context() as patch:
        patch.setattr(ImagePrompts, "inputs", two_ways)
        with pytest.raises(ConfigurationError, match="Gemma3ForConditionalGeneration cannot be tuned on images"):
            check_images(model, batches)

    def first_row(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.5 * output[:1].mean(1, keepdim=True) if len(output) > 1 else output

    def lost_alone(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if len(output) > 1 else output * torch.nan

    for hook in (first_row, lost_alone):
        handle = model.get_input_embeddings().register_forward_hook(hook)
        with pytest.raises(ConfigurationError, match="with the other examples of the batch"):
            check_images(model, batches)
        handle.remove()


@pytest.mark.parametrize("name", PICTURED)
def test_gradients_reach_the_adapters_alone(bases: dict[str, Path], name: str, tmp_path: Path) -> None:
    """With gradient checkpointing, which the layers of the towers support, too."""
    data = mixed(tmp_path)
    how = config(
        bases[name], data, update_rule="live", initialisation="randomized-svd", gradient_checkpointing=True,
        device="cpu",
    )  # fmt: skip
    model, tuned = load_model(how, resolve_model(str(bases[name]))), build_method(how)
    assert len(decoder_layers(model)) == 2  # those of the tower are not compiled
    tuned.prepare(model)
    model.train()
    batch = batches_of(bases[name], data).at(0)
    with tuned.forward_context():
        answer_loss(model, model_inputs(batch, "cpu"), batch.labels, float(batch.answer_tokens)).backward()
    adapters = {id(parameter) for parameter in tuned.parameters().values()}
    assert len(tuned.names) == 14
    assert not any("visual" in name or "vision" in name or "projector" in name for name in tuned.names)
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in adapters), key


def test_a_run_learns_from_the_images_and_changes_only_the_decoder(bases: dict[str, Path], tmp_path: Path) -> None:
    """All questions are the same, and half of the answers are r, the others b: each answer is one token.

    A model that did not read the images would give the answers of all held-out records the same distribution, for
    which the mean loss is ln 2 at least.
    """
    data, output = write_colours(tmp_path, 40), tmp_path / "tuned"
    run = CliRunner().invoke(main, [
        "finetune", "--model", str(bases["qwen25vl"]), "--data", str(data), "--output", str(output), "--rank", "8",
        "--steps", "15", "--batch-size", "8", "--sequence-length", "96", "--learning-rate", "1e-2",
        "--heldout-fraction", "0.4", "--evaluate-every", "0", "--device", "cpu",
    ])  # fmt: skip
    assert run.exit_code == 0, run.output
    artifact = open_artifact(output)
    details: Any = artifact.manifest.details
    assert details.packing.how == "off"
    assert "the data has images" in details.packing.reason
    assert any(warning.startswith("packing is off") and "images" in warning for warning in artifact.manifest.warnings)
    assert details.kv_cache is not None
    assert details.heldout_loss.deployed < 0.2 * math.log(2)
    export_vllm(output, tmp_path / "export", VllmExportOptions())
    places = (bases["qwen25vl"], output, tmp_path / "export")
    base, tuned, export = (load_file(root / "model.safetensors") for root in places)
    changed = {key for key in base if base[key].dtype != tuned[key].dtype or not torch.equal(base[key], tuned[key])}
    assert len(changed) == 14
    assert not any("visual" in key for key in changed)
    assert all(torch.equal(tuned[key].view(torch.uint8), export[key].view(torch.uint8)) for key in base)
    for copied in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        there = bases["qwen25vl"] / copied
        assert not there.exists() or (output / copied).read_bytes() == there.read_bytes()


def test_a_run_is_not_resumed_with_a_changed_image(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = write_colours(tmp_path, 12), tmp_path / "tuned"
    how = config(bases["gemma3_mm"], data, sequence_length=96, steps=2, evaluate_every=0, device="cpu")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "deploy", stopped)
        with pytest.raises(KeyboardInterrupt):
            finetune(how, output)
    before = (tmp_path / "3.png").read_bytes()
    paint(tmp_path / "3.png", (0, 255, 0), Image.open(tmp_path / "3.png").size)  # the tokens stay the same
    with pytest.raises(ConfigurationError, match="the training text is encoded differently"):
        finetune(how, output, resume=True)
    (tmp_path / "3.png").write_bytes(before)
    assert finetune(how, output, resume=True).manifest.details_of(TunedDetails).kv_cache is not None


def test_a_plan_counts_images_and_the_tower(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_colours(tmp_path, 12)
    how = config(bases["qwen25vl"], data, sequence_length=96, device="cpu")
    plan = plan_finetune(how, tmp_path / "tuned")
    assert "off: the data has images" in str(plan.facts["packing"])
    assert any("the tokens of images and the memory of the vision tower are counted" in note for note in plan.notes)
    with monkeypatch.context() as patch:  # a tower that takes more than all else
        patch.setattr(needs, "tower_bytes", lambda *_: 1 << 40)
        assert plan_finetune(how, tmp_path / "tuned").peak_memory_bytes > max(1 << 40, plan.peak_memory_bytes)
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"the image of line 4, messages\[0\], part 1 cannot be used"):
        plan_finetune(how, tmp_path / "tuned")
