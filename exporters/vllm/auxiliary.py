"""Everything of a checkpoint that is not a weight: tokenizer, chat template, generation config, licences.

Copied byte for byte: one character of a chat template decides whether a fine-tuned model answers as trained.
config.json is the exception, and only its two keys that this exporter owns may change.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from exporters.vllm.options import ExportFormat
from exporters.vllm.plan import ExportPlan
from exporters.vllm.quantization_config import quantization_config
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, copy_sidecars, sidecar_files

CONFIG_NAME = "config.json"


def auxiliary_files(root: Path) -> Iterator[Path]:
    """Paths, relative to `root`, of the files copied byte for byte; sorted."""
    return sidecar_files(root, SERVED_FILES)


def auxiliary_warnings(root: Path) -> list[str]:
    """What serving will miss, in words for the manifest."""
    names = {path.name for path in auxiliary_files(root)}
    if not any(name.startswith(("tokenizer", "vocab")) for name in names):
        return ["the source holds no tokenizer: the engine must be given one (--tokenizer)"]
    path = root / "tokenizer_config.json"
    inside = path.is_file() and '"chat_template"' in path.read_text(encoding="utf-8")
    if inside or any(name.startswith("chat_template") for name in names):
        return []
    return ["the tokenizer has no chat template: the chat endpoint will refuse, completions work"]


def export_config(plan: ExportPlan) -> dict[str, object]:
    """The export's config.json: the source's, with `quantization_config` set and, for bf16, the dtype."""
    config: dict[str, object] = {k: v for k, v in plan.source.config.items() if k != "quantization_config"}
    block = quantization_config(plan.options.format, plan.ignore, plan.schema)
    if block is not None:
        config["quantization_config"] = block
    if plan.options.format is ExportFormat.BF16:
        for key in [k for k in ("dtype", "torch_dtype") if k in config] or ["dtype"]:
            config[key] = "bfloat16"
    return config


def write_auxiliary(plan: ExportPlan, root: Path) -> None:
    """Copy the auxiliary files and write config.json (byte for byte when nothing in it changes)."""
    source = plan.source.root
    copy_sidecars(source, root, SERVED_FILES)
    config = export_config(plan)
    if config == plan.source.config:
        shutil.copyfile(source / CONFIG_NAME, root / CONFIG_NAME)
    else:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (root / CONFIG_NAME).write_text(text, encoding="utf-8")
