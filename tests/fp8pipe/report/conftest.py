"""A run with everything in it, written by the real writers: a tuned model, a tiny ViT, exports, records, a failure."""

from __future__ import annotations

import json

import pytest
import torch
from quantized_families import quantized_family
from records import sound_record
from small_artifacts import INT8, details_of

from calibration.image_set import ImageSet
from fp8pipe.artifact import ArtifactWriter, LayerRecord, Parent, write_checked
from fp8pipe.artifact.gate import Gate, Verdict, none_of
from fp8pipe.artifact.runs import RunRecord, StageRecord, write_run
from fp8pipe.models.vision.quantized import save_quantized

LAYERS = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.down_proj")]


def write_tuned(place, **details):
    with ArtifactWriter(place, kind="falqon", stage="finetune") as writer:
        (writer.root / "model.safetensors").write_bytes(b"codes")
        lines = [{"step": 0, "heldout_loss": 2.25}]
        lines += [{"step": i, "loss": 2.0 - 0.125 * i, "pending_cosine": 0.1 * i, "pending_saturated": 0.0}
                  for i in range(1, 5)]  # fmt: skip
        lines.append({"step": 4, "heldout_loss": 1.5})
        (writer.root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        writer.gate(none_of("reopened bytes differing", 0))
        writer.warn("a fallback <script>alert(1)</script>")
        flushed = {
            name: {"changed": 0.01 * i, "saturated": 0.0, "norm_ratio": 1.0 + 0.05 * i, "cosine": 0.5 + 0.01 * i}
            for i, name in enumerate(LAYERS)
        }
        losses = {"untuned": 2.251234, "deployed": 1.512345}
        base = Parent(kind="model", digest="ab" * 32, path="/somewhere/base")
        return writer.commit(
            config={"method": "falqon", "steps": 4, "rows": None}, seed=3, parents=[base],
            details=details_of("falqon", heldout_loss=losses, final_merge_layers=flushed, **details),
        )  # fmt: skip


def write_vit(place):
    quantized = quantized_family("timm-vit", bits=8)
    with ArtifactWriter(place, kind="vit", stage="quantize-vit") as writer:
        save_quantized(writer.root, quantized)
        size = quantized.architecture.image_size
        images = torch.randint(0, 256, (9, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        ImageSet(images, None, "gaussian", 0).save(writer.root / "calibration")
        (writer.root / "metrics.jsonl").write_text("")
        scores = {"images": 599}
        scores |= {"teacher": {"top1": 0.98497, "top5": 1.0}, "quantized": {"top1": 0.9833, "top5": 0.99833}}
        return writer.commit(seed=0, details=details_of("vit", accuracy=scores, images=9))


def write_export(place, kind, parent, **files):
    with ArtifactWriter(place, kind=kind, stage="export") as writer:
        (writer.root / "model.onnx").write_bytes(bytes(12346))
        for name, document in files.items():
            (writer.root / f"{name}.json").write_text(json.dumps(document))
        error = {"name": "integer layer error", "value": 1.05e-7, "detail": "73 layers"}
        writer.gate(Gate(**error, comparison="at most", threshold=1e-6))
        layers = [LayerRecord(name=name, weight=INT8, shape=(4, 4)) for name in LAYERS]
        return writer.commit(parents=[parent.as_parent()], layers=layers, details=details_of(kind))


def validation(digest):
    layers = [{"layer": f"blocks.{i}.mlp.fc1", "codes": 1000 + i, "differing_codes": 0, "integer": True,
               "error": (1 + i) * 1.7e-8, "torch_error": 2e-7} for i in range(4)]  # fmt: skip
    kernels = {"operators": {layer["layer"]: "QGemm" for layer in layers}, "integer": 4, "float_layers": []}
    classes = {"images": 16, "source": "calibration images", "agreeing": 15}
    return {"manifest_digest": digest, "engine": "onnxruntime", "layers": layers,
            "kernels": kernels, "classes": classes,
            **sound_record(digest, versions={"onnxruntime": "1.32.0"})}  # fmt: skip


def bench(digest):
    rows = [
        {"what": "size of the graph", "name": "size_bytes", "value": 808593.0, "unit": "bytes", "detail": ""},
        {"what": "latency, 1 image", "name": "latency_ms", "value": 1.43117, "unit": "ms", "detail": "median"},
    ]
    return {**sound_record(digest), "date": "2026-01-02T03:04:05+00:00", "rows": rows,
            "machine": {"processor": "a CPU", "cores": 2}, "not_measured": ["a GPU: none is here"]}  # fmt: skip


def gate(name, source, value, comparison, threshold):
    return Gate(
        name=name, source=source, value=value, comparison=comparison, threshold=threshold,
        failure=Verdict.REGRESSION, detail="half a point is noise",
    )  # fmt: skip


def stage(name, command, output, gates=(), verdict=Verdict.ACCEPT, error=None):
    return StageRecord(
        name=name, command=command, key="0" * 64, output=output, reproduce=f"fp8pipe {command} ... --output {output}",
        seconds=12.34, peak_rss_bytes=123456789, gates=list(gates), verdict=verdict, error=error,
    )  # fmt: skip


def write_run_directory(root):
    root.mkdir()
    tuned, vit = write_tuned(root / "tuned"), write_vit(root / "vit")
    onnx = write_export(root / "onnx", "onnx-export", vit)
    products = [{"node": "a", "operands": ["int8", "int8"], "output": "fp16"}]
    engine = {"engine": "e", "engine_bytes": 6209999, "fused_attentions": 6, "products": products}
    engine["precisions"] = {"int8": 37, "fp16": 1}
    engines = write_export(root / "engines", "trt-export", vit, layers={"8.9": engine})
    write_export(root / "served", "vllm-export", tuned)
    write_checked(root / "onnx.validation.json", json.dumps(validation(onnx.digest)))
    write_checked(root / "onnx.bench.json", json.dumps(bench(onnx.digest)))
    stale = validation("00" * 32) | {"verdict": "REJECT"}
    write_checked(root / "engines.validation.json", json.dumps(stale))
    error = {"exit_code": 11, "what": "no vLLM here", "why": "not installed", "fix": "install it"}
    between = "vit/manifest.json#details.a - vit/manifest.json#details.b"
    regression = gate("accuracy lost", between, 0.031, "at most", 0.02)
    missing = gate("a figure", "onnx.bench.json#figures.none", None, "at least", 0.5)
    held = gate("reopened bytes differing", "tuned/manifest.json#gates.0.value", 0.0, "at most", 0.0)
    stages = [
        stage("tuned", "finetune", "tuned", [held]),
        stage("vit", "quantize-vit", "vit", [regression], Verdict.REGRESSION),
        stage("onnx", "export", "onnx"), stage("speed", "bench", "onnx.bench.json", [missing], Verdict.ANOMALOUS),
        stage("engines", "export", "engines"), stage("served", "export", "served"),
        stage("proof", "validate", "served.validation.json", (), Verdict.INFEASIBLE, error),
    ]  # fmt: skip
    machine = {"processor": "a CPU", "cores": 2, "features": [], "memory_bytes": 25276063744}
    record = RunRecord(
        recipe="both", resolved={}, tool_version="0.1.0", versions={"torch": "2.13.0"}, machine=machine,
        started="2026-01-02T03:04:05+00:00", stages=stages,
    )  # fmt: skip
    write_run(record, root)
    (root / "recipe.yaml").write_text("name: both\nstages: {}\n")
    return root, engines


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory):
    root, _ = write_run_directory(tmp_path_factory.mktemp("report") / "run")
    return root


@pytest.fixture(scope="session")
def page_of(run_directory):
    from fp8pipe.report.page import render
    from fp8pipe.report.subject import open_subject

    return render(open_subject(run_directory))
