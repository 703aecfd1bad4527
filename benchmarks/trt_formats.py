"""Build every TensorRT format of vision models for every GPU that supports it, and describe the engines.

Models are quantized with white noise and without distillation (precision and size do not depend on that), exported, and
built with TensorRT for RTX. A row shows the number of matrix multiplications and convolutions by precision in the
built engine, the number of fused attentions, and the size of the engine: as stored, as the runtime reads it, and
without the kernels' source text. Sizes are relative to the ideal size, that of the graph's codes, scales and floats.

    python benchmarks/trt_formats.py --models sample:vit-digits runs/vit-s --work runs/formats
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from exporters.tensorrt.export import export_tensorrt
from exporters.tensorrt.target import TrtDetails, TrtExportOptions
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import Fp8PipeError, one_line
from fp8pipe.numerics.bf16 import widen_bf16_products
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.stage import quantize_vit

# Precision of the artifact, format of the export (None for the default of that precision), compute capabilities.
ROWS = (
    ("wfp8afp8", None, ("8.9", "12.0", "12.1")),
    ("w8a8", None, ("8.0", "8.6", "8.9", "12.0", "12.1")),
    ("w4a4", None, ("8.0", "8.6", "8.9", "12.0", "12.1")),
    ("w4a4", "int4-weight-only", ("8.0", "8.6", "8.9", "12.0", "12.1")),
    ("w8a8", "int8-weight-only", ("8.0", "8.6", "8.9", "12.0", "12.1")),
    ("wnvfp4anvfp4", None, ("12.0", "12.1")),
    ("wnvfp4anvfp4", "nvfp4-weight-only", ("12.0", "12.1")),
)


def artifact_of(model, bits, options):
    """The path of the model's quantized artifact, which is made if it does not exist yet."""
    place = options.work / f"{Path(model.replace(':', '-')).name}-{bits}"
    if not (place / "manifest.json").is_file():
        settings = {"model": model, "bits": bits, "calibration": "gaussian", "images": options.images}
        quantize_vit(build_config(QuantizeVitConfig, settings | {"distill": {"steps": 0}}), place)
    return place


def rows_of(model, options):
    """Yield one dict per format and compute capability; a format that cannot be exported gives a row with `failed`."""
    for bits, format, capabilities in ROWS:
        artifact = artifact_of(model, bits, options)
        name = f"{bits} {format or ''}".strip()
        settings = {"format": format, "compute_capabilities": list(capabilities), "force": True}
        try:
            target = options.work / f"{artifact.name}-{format or 'own'}"
            export = export_tensorrt(artifact, target, build_config(TrtExportOptions, settings))
        except Fp8PipeError as error:
            yield {"model": model, "format": name, "failed": one_line(error)}
            continue
        for capability, entry in export.manifest.details_of(TrtDetails).engines.items():
            size = entry.size
            yield {
                "model": model, "format": name, "for": capability, "precisions": entry.precisions,
                "fused_attentions": entry.fused_attentions, "ideal_mb": size.ideal_bytes / 1e6,
                "stored": entry.stored_bytes / size.ideal_bytes,
                "engine": entry.engine_bytes / size.ideal_bytes,
                "without_text": size.weights_over_ideal,
            }  # fmt: skip


def main():
    """Export and build everything, and print a line for each engine and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sample:vit-digits"])
    parser.add_argument("--images", type=int, default=8, help="white noise, for ranges alone")
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    widen_bf16_products()
    found = []
    for model in options.models:
        for row in rows_of(model, options):
            found.append(row)
            shown = {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}
            print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
