"""Compares the files beside the weights of a written export with those of its source; each comparison is a gate."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from exporters.vllm.modelopt import QUANT_FILE
from exporters.vllm.plan import ExportPlan
from exporters.vllm.resume import PROGRESS_NAME
from exporters.vllm.writer import CONFIG_NAME, export_config, modelopt_settings
from fp8pipe.artifact import CHECKSUM_NAME, MANIFEST_NAME, Gate
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_files
from fp8pipe.models.checkpoint.tensors import INDEX_NAME, shard_names
from fp8pipe.models.language.ending import EOS, GENERATION_FILE
from fp8pipe.report.card import CARD_FILE

__all__ = ["changed_on_purpose", "none_differing", "other_files", "quant_file_differences"]

# Files of the artifact itself (`.lock`, and the progress during writing), and files that hubs add.
_PASSED_OVER: Final = frozenset((MANIFEST_NAME, CHECKSUM_NAME, ".lock", PROGRESS_NAME, ".gitattributes", ".cache"))


def other_files(plan: ExportPlan, root: Path) -> list[Gate]:
    """Gates on all files besides the weights: none is missing, changed or unexpected."""
    source = plan.source.root
    names = {str(path) for path in sidecar_files(source, SERVED_FILES)}
    changed = set() if plan.ending.settings is None else {GENERATION_FILE}
    names -= changed
    wrong = sorted(
        name for name in names if not (root / name).is_file() or not filecmp.cmp(source / name, root / name, False)
    )
    shards = shard_names(len(plan.shards))
    known = names | changed | {CONFIG_NAME, CARD_FILE, *shards} | ({INDEX_NAME} if len(shards) > 1 else set())
    known |= {QUANT_FILE} if plan.options.layout == "modelopt" else set()
    there = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    unexpected = sorted(name for name in there - known if name.split("/")[0] not in _PASSED_OVER)
    detail = f"{len(names)} file(s), byte for byte, and no other that an engine might read"
    gates = [none_differing("auxiliary-files-identical", [*wrong, *unexpected], detail), _config(plan, root)]
    return gates if plan.ending.settings is None else [*gates, _generation(plan.ending.settings, root)]


def _generation(expected: dict[str, Any], root: Path) -> Gate:
    """Gate: generation_config.json equals the source's, except for an end-of-turn token added to `eos_token_id`."""
    path = root / GENERATION_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    wrong = [f"{GENERATION_FILE}: {key}" for key in _differing(found, expected)]
    detail = f"{GENERATION_FILE}, except {EOS}, which is {expected[EOS]}"
    return none_differing("generation-config-preserved", wrong, detail)


def _config(plan: ExportPlan, root: Path) -> Gate:
    """Gate: config.json equals the source's, except for the keys in `changed_on_purpose`.

    In ModelOpt's layout hf_quant_config.json must be what follows from the plan, too.
    """
    config = json.loads((root / CONFIG_NAME).read_text(encoding="utf-8"))
    wrong = list(_differing(config, export_config(plan)))
    detail = f"config.json, except {', '.join(_changed_keys(plan)) or 'nothing'}"
    if plan.options.layout == "modelopt":
        wrong += quant_file_differences(plan, root)
        detail += f", and {QUANT_FILE}"
    return none_differing("config-preserved", wrong, detail)


def quant_file_differences(plan: ExportPlan, root: Path) -> list[str]:
    """Places in hf_quant_config.json of an export in ModelOpt's layout that do not follow from its plan."""
    path = root / QUANT_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return [f"{QUANT_FILE}: {key}" for key in _differing(found, modelopt_settings(plan)[0])]


def changed_on_purpose(plan: ExportPlan) -> list[str]:
    """Keys of config.json and of generation_config.json whose values intentionally differ from the source's."""
    return [*_changed_keys(plan), *([] if plan.ending.settings is None else [f"{GENERATION_FILE}: {EOS}"])]


def _changed_keys(plan: ExportPlan) -> list[str]:
    config, before = export_config(plan), plan.source.config
    return sorted(key for key in config.keys() | before.keys() if config.get(key) != before.get(key))


def _differing(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Paths at which two JSON values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            missing = object()
            yield from _differing(found.get(key, missing), expected.get(key, missing), f"{path}.{key}".lstrip("."))
    elif found != expected or isinstance(found, bool) is not isinstance(expected, bool):
        yield path


def none_differing(name: str, wrong: list[str], detail: str) -> Gate:
    """Gate: nothing differs; the detail names the first of those that do."""
    if wrong:
        detail = f"{detail}; differing: {', '.join(wrong[:5])}" + (" ..." if len(wrong) > 5 else "")
    return Gate(name=name, value=float(len(wrong)), detail=detail)
