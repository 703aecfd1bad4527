"""The Python interface: each function does the same as the command of that name, and takes the same settings.

Settings are keyword arguments named as in the option models (`fp8pipe schema` lists them). If any are invalid, a
`ConfigurationError` lists all of them. Failures raise the exceptions of `fp8pipe.core.errors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.core.config import build_config

if TYPE_CHECKING:
    from fp8pipe.artifact.runs import RunRecord

__all__ = ["export", "finetune", "open_artifact", "quantize_vit", "run", "serve", "validate"]

Place = str | PathLike[str]


def finetune(
    model: str, data: str, output: Place, *, force: bool = False, resume: bool = False, **settings: Any
) -> Artifact:
    """Fine-tune a causal language model; see `fp8pipe finetune --help` for the settings.

    Args:
        model: directory, Hugging Face Hub id, .gguf file or sample:NAME.
        data: file, folder or glob (JSONL, JSON, CSV, parquet, arrow), Hugging Face Hub id or sample:NAME.
        output: directory of the artifact to create.
        force: replace an existing artifact.
        resume: continue the unfinished run of `output`.
        settings: fields of `FinetuneConfig`.

    Returns:
        The artifact that was written. Its gates may have failed: see `artifact.manifest.gates`.
    """
    from pipeline.finetune.config import FinetuneConfig
    from pipeline.finetune.stage import finetune as stage

    config = build_config(FinetuneConfig, {"model": model, "data": data, **settings})
    return stage(config, Path(output), force=force, resume=resume)


def quantize_vit(
    model: str, bits: str, output: Place, *, force: bool = False, resume: bool = False, **settings: Any
) -> Artifact:
    """Quantize a vision transformer; see `fp8pipe quantize-vit --help` for the settings.

    Args:
        model: directory, timm:NAME or sample:NAME.
        bits: precision: wXaY, wfp8afp8 or wnvfp4anvfp4.
        output: directory of the artifact to create.
        force: replace an existing artifact.
        resume: continue the unfinished run of `output`.
        settings: fields of `QuantizeVitConfig`.

    Returns:
        The artifact that was written. Its gates may have failed: see `artifact.manifest.gates`.
    """
    from pipeline.vit.config import QuantizeVitConfig
    from pipeline.vit.stage import quantize_vit as stage

    config = build_config(QuantizeVitConfig, {"model": model, "bits": bits, **settings})
    return stage(config, Path(output), force=force, resume=resume)


def export(artifact: Place, target: str, output: Place, **settings: Any) -> Artifact:
    """Export an artifact to the format of an inference engine; see `fp8pipe export --help` for the settings.

    Args:
        artifact: directory of an artifact; for vllm, also of an unquantized model.
        target: vllm, onnx, trt, or another registered target.
        output: directory to create.
        settings: fields of the target's option model; `force=True` replaces an existing output.

    Returns:
        The export. Its gates may have failed: see `artifact.manifest.gates`.
    """
    from exporters.target import call, choose, kind_of_source

    chosen = choose(target, kind_of_source(Path(artifact)), settings.get("format"))
    written: Artifact = call(chosen.export, Path(artifact), Path(output), build_config(chosen.options, settings))
    return written


def validate(export: Place, *, engine: str | None = None, **given: Any) -> Any:
    """Load an export in its engine and prove that it computes what the exported artifact does.

    Args:
        export: the export's directory.
        engine: the engine; None means the one that the export was made for.
        given: options of the engine (`against`, `images`, `vllm_python`), and `device` (auto, cpu or cuda).

    Returns:
        The record of the validation, which is also written next to the export.

    Raises:
        ExportRejectedError: the verdict is REJECT; the exception's `record` holds the details.
    """
    from exporters.target import call, choose_engine, engine_device, open_export

    artifact, target = open_export(Path(export), lambda known: known.engines)
    device = given.pop("device", None)
    chosen, understood = choose_engine(artifact, target, engine, given)
    engine_device(target, device, "validate", **understood)
    if device is not None and "device" in chosen.takes:
        understood["device"] = device
    return call(chosen.validate, Path(export), **understood)


def serve(export: Place, *extra: str, **settings: Any) -> int:
    """Serve an export over HTTP until SIGTERM, and return the exit code.

    Args:
        export: the export's directory.
        extra: command-line options for vLLM's own server (language models only).
        settings: settings of the service, and for language models also of vLLM.
    """
    from exporters.target import call, engine_device, open_served
    from serving.config import LanguageConfig, ServeConfig, VisionConfig

    _, target = open_served(Path(export))
    if target.service.domain == "vision":
        vision = build_config(VisionConfig, settings)
        engine_device(target, vision.asked, "serve")
        return int(call(target.service.serve or "", Path(export), vision, None))
    of_service = {name: value for name, value in settings.items() if name in ServeConfig.model_fields}
    of_vllm = {name: value for name, value in settings.items() if name not in of_service} | {"extra": extra}
    shared = {name: settings[name] for name in of_service if name in LanguageConfig.model_fields}
    language, service = build_config(LanguageConfig, of_vllm | shared), build_config(ServeConfig, of_service)
    engine_device(target, service.device, "serve", vllm_python=language.vllm_python)
    return int(call(target.service.serve or "", Path(export), service, language))


def run(
    recipe: Place, output: Place | None = None, *, overrides: Sequence[str] = (), first: str | None = None,
    last: str | None = None, force: Sequence[str] = (), jobs: int = 1,
) -> RunRecord:  # fmt: skip
    """Run the stages of a recipe that are not up to date, check the gates of all stages, and return the run's record.

    Args:
        recipe: a YAML file.
        output: directory of the run; `runs/NAME` if None.
        overrides: settings to change, as `STAGE.KEY=VALUE`.
        first: name of the first stage to run; earlier ones are used as they are.
        last: name of the last stage; only it and the stages that it needs are run.
        force: names of stages to run even if nothing has changed.
        jobs: largest number of stages that run in parallel.
    """
    from fp8pipe.cli.stages import stage_commands
    from pipeline.workflow import RunOptions, RunState, WorkflowRunner, load_recipe

    read = load_recipe(Path(recipe), list(overrides))
    options = RunOptions(first=first, last=last, force=tuple(force), jobs=jobs)
    state = RunState(read, stage_commands(), Path(output or Path("runs") / read.name), options)
    return WorkflowRunner(state, lambda stage, line: None).run()
