"""Random faults with right hashes: each is found by `verify` with the parent, or by `validate`, by name.

And the other way round: what exporters write of random models is never found fault with.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from artifact_tree import without_parents
from breadth import usual
from quantized_families import quantized_family, storable, write_vit_artifact
from random_faults import LANGUAGE_KINDS, VISION_KINDS, inject_random

from exporters.graph.formats import OnnxFormat
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from exporters.verify.whole import verify_tree
from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact.verify import find_tree
from fp8pipe.core.errors import Fp8PipeError
from validation.onnx.validate import validate_onnx

pytestmark = pytest.mark.usefixtures("graphs_made_once")

SEEDS = usual(2, long=6)
LANGUAGE = [(kind, seed, model) for kind in LANGUAGE_KINDS for seed in range(SEEDS) for model in ("trained", "plain")]
VISION = [(kind, seed) for kind in VISION_KINDS for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def language(language_artifact, make_model, tmp_path_factory):
    """Trees of a parent and its export: one of codes that were trained, one that the export itself quantized."""
    root = tmp_path_factory.mktemp("language")
    sources = {"trained": language_artifact("qwen2"), "plain": make_model("qwen2")}
    for name, source in sources.items():
        (root / name).mkdir()
        shutil.copytree(source, root / name / "model")
        export_vllm(root / name / "model", root / name / "vllm", VllmExportOptions(max_shard_bytes=60_000))
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("vision")
    quantized = storable(quantized_family("timm-vit", bits=8))
    moments = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    quantized.preprocessing = quantized.preprocessing.model_copy(update=moments)
    write_vit_artifact(root / "vit", quantized, images=4)
    export_onnx(root / "vit", root / "onnx", OnnxExportOptions())
    validate_onnx(root / "onnx", against=root / "vit")
    return root


def findings(root: Path, *parents: Path) -> list[str]:
    """What `verify` says; a refusal to read at all is a report, too."""
    try:
        checked, _ = verify_tree(find_tree(root), parents, strict=True)
    except Fp8PipeError as error:
        return [str(error)]
    return [f"{found.check} {found.where}: {found.why}" for found in checked.findings]


def assert_named(fault, found):
    assert found, f"{fault.how}: nothing was found"
    assert any(name in text for name in fault.named for text in found), f"{fault.how}: {found}"


@pytest.mark.parametrize(("kind", "seed", "model"), LANGUAGE)
def test_a_random_fault_in_a_language_export_is_named(language, tmp_path, kind, seed, model):
    root = shutil.copytree(language / model, tmp_path / "run")
    fault = inject_random(kind, seed, root / "vllm")
    found = findings(root) if model == "trained" else findings(root / "vllm", root / "model")
    assert_named(fault, found)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed"), VISION)
def test_a_random_fault_in_a_graph_is_named(pictures, tmp_path, kind, seed):
    root = shutil.copytree(pictures, tmp_path / "run")
    if kind != "record":  # it speaks of the export before the fault, which alone would give it away
        for path in root.glob("onnx.validation.*"):
            path.unlink()
    assert_named(inject_random(kind, seed, root / "onnx"), findings(root))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "seed"),
    [(kind, seed) for kind in VISION_KINDS if kind != "record" for seed in range(SEEDS)],
)
def test_a_random_fault_in_a_graph_is_rejected_by_a_validation(pictures, tmp_path, kind, seed):
    root = shutil.copytree(pictures, tmp_path / "run")
    fault = inject_random(kind, seed, root / "onnx")
    try:
        record = validate_onnx(root / "onnx", against=root / "vit")
    except Fp8PipeError:
        return
    pytest.fail(f"{fault.how}: {record.verdict}")


@pytest.mark.parametrize("seed", range(usual(8, long=30)))
def test_a_right_language_export_is_never_found_fault_with(language_artifact, make_model, tmp_path, seed):
    chance = random.Random(seed)
    family = chance.choice(("llama", "qwen2", "gpt2"))
    # Sides of 64 are no whole blocks, and GPT-2's weights are stored (in, out).
    form = chance.choice(
        [f for f in ExportFormat if f.block is None and not f.calibrated and not (f.packed and family == "gpt2")]
    )
    if chance.random() < 0.6:
        skip = chance.choice(((), ("down_proj", "mlp.c_proj"), ("o_proj",)))
        source = language_artifact(family, granularity=chance.choice(("per-tensor", "per-channel")), skip=skip)
    else:
        source = make_model(family, seed=seed)
    options = VllmExportOptions(format=form, max_shard_bytes=chance.choice((30_000, 10**9)))
    export = export_vllm(source, tmp_path / "export", options).root
    assert findings(without_parents(export)) == []
    assert findings(export, source) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(usual(2, long=30)))
def test_a_right_graph_is_never_found_fault_with_nor_rejected(tmp_path, seed):
    chance = random.Random(seed)
    family = chance.choice(("timm-vit", "timm-deit", "hf-vit"))
    form = chance.choice((OnnxFormat.QDQ, OnnxFormat.QDQ, OnnxFormat.QDQ_EXACT, OnnxFormat.INT4_WEIGHT_ONLY))
    bits = 4 if form is OnnxFormat.INT4_WEIGHT_ONLY else chance.choice((4, 8))  # the format holds no more
    vit = write_vit_artifact(tmp_path / "vit", quantized_family(family, bits=bits), images=4).root
    export = export_onnx(vit, tmp_path / "onnx", OnnxExportOptions(format=form)).root
    assert findings(tmp_path) == []
    for against in (vit, None):
        assert validate_onnx(export, against=against).verdict != "REJECT"
