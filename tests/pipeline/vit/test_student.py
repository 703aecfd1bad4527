"""The student: gradients of rounding, deployment bit for bit, ranges, and distillation that resumes."""

from __future__ import annotations

import pytest
import torch
from vit_families import NAMES, family, random_pixels, vision_family

from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.quantized import activation_sites
from fp8pipe.models.vision.structure import read_structure
from fp8pipe.numerics.kinds import Kind, Precision
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.vit.config import DistillConfig, QuantizeVitConfig
from pipeline.vit.distill import Distiller
from pipeline.vit.initialise import (
    activation_bits,
    choose_range,
    choose_step,
    choose_steps,
    range_quantizer,
    sample_sites,
    weight_formats,
)
from pipeline.vit.stage import begin_student
from pipeline.vit.student import Student, WeightFormat, fake_quantize


def make_student(name: str = "timm-vit", bits: str = "w4a4") -> tuple:
    vision = vision_family(family(name))
    structure = read_structure(vision.model, vision.architecture.image_size)
    pixels, precision = random_pixels(family(name), 8), Precision.parse(bits)
    sites = activation_bits(structure, precision, "8bit")
    samples = sample_sites(vision, structure, pixels.split(4), 0)
    activations = {site: choose_range(values, sites[site], precision.kind) for site, values in samples.items()}
    formats = weight_formats(structure, precision, "8bit")
    student = Student(vision, structure, formats, choose_steps(vision, formats), activations)
    return student, vision, structure, pixels


def test_gradients_pass_inside_and_stop_outside():
    # Units -18, -8.8, -8.4, -0.8, 0.4, 6.6, 7.4, 7.8, 80: what rounds to an outermost code from beyond it is inside.
    x = torch.tensor([-9.0, -4.4, -4.2, -0.4, 0.2, 3.3, 3.7, 3.9, 40.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, step, -8, 7).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    units = x.detach() / 0.5
    inside = x.grad
    expected = (torch.round(units).clamp(-8, 7) - units * inside).sum()  # LSQ, equation 3
    assert float(step.grad) == pytest.approx(float(expected))


def test_steps_of_channels_get_their_own_gradients():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([[0.1], [0.3], [0.7]], requires_grad=True)
    fake_quantize(x, steps, -7, 7).square().sum().backward()
    for row in range(3):
        alone = steps.detach()[row, 0].clone().requires_grad_()
        fake_quantize(x[row], alone, -7, 7).square().sum().backward()
        assert float(steps.grad[row]) == pytest.approx(float(alone.grad), rel=1e-5)


@pytest.mark.parametrize("bits", ["w4a4", "w8a8", "w2a3", "wfp8afp8"])
def test_what_is_deployed_is_what_was_trained(bits):
    student, vision, structure, pixels = make_student(bits=bits)
    Distiller(student, vision, structure, pixels, settings(steps=2), 0).run()
    with torch.no_grad():
        deployed = student.deploy()
        assert torch.equal(student(pixels), deployed(pixels))
    scales = [weight.scale for weight in deployed.weights.values()]
    scales += [torch.tensor([quantizer.scale]) for quantizer in deployed.activations.values()]
    assert all(torch.equal(scale.half().float(), scale) for scale in scales)  # engines in FP16 hold the same


@pytest.mark.parametrize("name", NAMES)
def test_every_family_can_be_a_student(name):
    student, vision, structure, pixels = make_student(name)
    history = Distiller(student, vision, structure, pixels, settings(steps=1, bf16=True), 0).run()
    assert len(history) == 1
    assert history[0]["block"] > 0
    with torch.no_grad():
        assert torch.equal(student(pixels[:2]), student.deploy()(pixels[:2]))


@pytest.mark.parametrize("bits", ["w4a4", "wnvfp4anvfp4"])
def test_every_parameter_has_one_learning_rate(bits):
    config = build_config(QuantizeVitConfig, {"model": "m", "bits": bits, "rounding": "nearest"})
    vision = vision_family(family("timm-vit"))
    structure = read_structure(vision.model, vision.architecture.image_size)
    student = begin_student(config, vision, structure, random_pixels(family("timm-vit"), 4))
    names = {parameter: name for name, parameter in student.named_parameters()}
    weights, vectors, steps = student.trained_weights(), student.trained_vectors(), student.trained_steps()
    assert len({*weights, *vectors, *steps}) == len(weights) + len(vectors) + len(steps) == len(names)
    assert len(weights) == len(structure.linears)
    assert all(parameter.dim() > 1 for parameter in weights)
    assert {names[parameter].rsplit(".", 1)[1] for parameter in vectors} == {"bias", "weight", "cls_token", "pos_embed"}
    assert all(names[p].endswith("norm.weight") or ".norm" in names[p] for p in vectors if "weight" in names[p])


def test_a_weight_of_zero_leaves_blocks_alone():
    student, vision, structure, pixels = make_student()
    history = Distiller(student, vision, structure, pixels, settings(steps=1, block_weight=0.0), 0).run()
    assert history[0]["block"] == 0
    assert history[0]["loss"] == pytest.approx(history[0]["answer"] + 10 * history[0]["structure"])


def settings(**changes: object) -> DistillConfig:
    return build_config(DistillConfig, {"batch_size": 4, "warmup_steps": 0, "bf16": False, "save_every": 2} | changes)


def test_distillation_lowers_its_loss_and_leaves_the_teacher_alone():
    student, vision, structure, pixels = make_student()
    before = {name: tensor.clone() for name, tensor in vision.model.state_dict().items()}
    history = Distiller(student, vision, structure, pixels, settings(steps=30, augment=False), 0).run()
    assert sum(h["loss"] for h in history[-4:]) < sum(h["loss"] for h in history[:4])
    assert all(torch.equal(before[name], tensor) for name, tensor in vision.model.state_dict().items())


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    student, vision, structure, pixels = make_student()
    whole = Distiller(student, vision, structure, pixels, settings(steps=6), 3)
    whole.run()
    store = CheckpointStore(tmp_path, keep=2)
    store.begin({})

    class StoppedError(Exception):
        pass

    def stop(figures):
        if figures["step"] == 5:  # after the checkpoint of step 4
            raise StoppedError

    first = Distiller(make_student()[0], vision, structure, pixels, settings(steps=6), 3, store)
    with pytest.raises(StoppedError):
        first.run(stop)
    again = make_student()[0]
    resumed = Distiller(again, vision, structure, pixels, settings(steps=6), 3, store)
    assert resumed.resume()
    assert resumed.step == 4
    assert resumed.run() == whole.history
    for (name, ours), (_, theirs) in zip(again.named_parameters(), student.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("read_every", [1, 10])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(read_every, tmp_path):
    student, vision, structure, pixels = make_student()
    pixels[0] = torch.nan
    store = CheckpointStore(tmp_path, keep=2)
    distiller = Distiller(student, vision, structure, pixels, settings(steps=20), 0, store)
    distiller.read_every = read_every
    with pytest.raises(ConfigurationError, match=r"diverged at step [12]"):
        distiller.run()
    assert store.steps() == []


def test_losses_that_are_read_later_are_the_same():
    whole, late = (Distiller(s, v, t, p, settings(steps=5), 3) for s, v, t, p in (make_student(), make_student()))
    late.read_every = 3
    told: list[float] = []
    assert late.run(lambda figures: told.append(figures["step"])) == whole.run()
    assert told == [1, 2, 3, 4, 5]


def test_ranges_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20000, generator=generator)
    both, positive = choose_range(normal, 4), choose_range(normal.abs(), 4)
    assert both.levels == positive.levels == 16
    assert both.low < 0 < both.high
    assert positive.low == 0
    # The best uniform 4-bit quantizer of a normal has a step of 0.335 (Max 1960, table I); a grid search comes near.
    assert both.scale == pytest.approx(0.335, rel=0.12)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-0.17, 4.0), (-3.0, 0.0), (0.0, 0.0)])
def test_a_range_has_no_more_codes_than_its_bits(bits, low, high):
    quantizer = range_quantizer(low, high, bits)
    assert 2 <= quantizer.levels <= 2**bits
    ends = quantizer.fake(torch.tensor([low, high]))
    assert (ends - torch.tensor([low, high])).abs().max() <= quantizer.scale * 1.01


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.17, 4.0), (-3.0, 0.0)])
def test_at_8_bits_values_of_both_signs_have_all_of_int8(low, high):
    quantizer = range_quantizer(low, high, 8)
    assert (quantizer.low, quantizer.high) == (-128, 127)


def test_weight_steps_are_no_worse_than_the_full_range():
    weight = torch.randn(8, 200, generator=torch.Generator().manual_seed(1))
    step = choose_step(weight, WeightFormat(4))
    full = weight.abs().amax(1) / 7

    def error(steps: torch.Tensor) -> torch.Tensor:
        s = steps[:, None]
        return ((weight / s).round().clamp(-8, 7) * s - weight).square().sum(1)

    assert (error(step) <= error(full)).all()
    assert (error(step) < 0.9 * error(full)).any()


def test_both_ends_keep_8_bits_unless_told_otherwise():
    vision = vision_family(family("timm-vit"))
    structure = read_structure(vision.model, vision.architecture.image_size)
    precision = Precision.parse("w4a4")
    kept, same = weight_formats(structure, precision, "8bit"), weight_formats(structure, precision, "same")
    ends = {structure.patch_embed, *structure.heads}
    assert {name for name, form in kept.items() if form.bits == 8} == ends
    assert {form.bits for form in same.values()} == {4}
    assert set(activation_bits(structure, precision, "8bit")) == set(activation_sites(structure))
    assert weight_formats(structure, Precision.parse("wfp8afp8"), "8bit")[structure.heads[0]].kind is Kind.E4M3


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": "w9a4"}, {"images": 0}, {"edges": "4bit"}, {"surprise": 1},
        *({"bits": bits, "allocation": "sensitivity"} for bits in ("w4a8", "wfp8afp8", "wnvfp4anvfp4")),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigurationError) as caught:
        build_config(QuantizeVitConfig, {"model": "m", "bits": "w4a4"} | changes)
    assert caught.value.exit_code == 10
