"""Runs inside vLLM's Python: load an export in the engine and report what it holds and says.

    python -P probe.py JOB.json

Imports nothing of fp8pipe: the two environments share files only. The job (see `engine.ProbeJob` for its fields)
carries the arguments of vLLM's server, which its own parser reads, so that the engine is the one that would serve; and
the digest of every weight's expected value. The probe digests the engine's own and stores only those that differ, so
that any model size needs the memory of one tensor and next to no disk.

Where a weight is read. Fused layers are cut into their checkpoint parts again. What is there as `layer.weight` is
read as stored, and some of its columns are compared with what the GEMM computes. Where vLLM has given the weight
to a packed GEMM and dropped it, the GEMM itself is read: one-hot inputs return the weight's columns, exactly,
since every other term of each sum is zero. Only the sign of a zero is lost that way.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_CHUNK = 256  # one-hot rows per GEMM call
_SAMPLED_COLUMNS = 8  # columns of a stored weight that are compared with the GEMM
_TOP = 20  # most probable tokens told at each place; the most that vLLM's server tells
_PREFIXES = ("", "model.", "transformer.")  # what engines put before a checkpoint's names

Reader = Callable[[], tuple[Tensor, str]]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job: load, read weights, score sequences, answer prompts."""
    started = time.monotonic()
    llm = _load(job)
    result: dict[str, Any] = {"load_s": time.monotonic() - started, "versions": _versions()}
    result["weights"] = llm.apply_model(lambda model: read_weights(model, job))[0]
    result["logprobs"] = _logprobs(llm, job["sequences"])
    result["answers"] = _answers(llm, job)
    # Linux counts kilobytes.
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["total_s"] = time.monotonic() - started
    return result


def _load(job: dict[str, Any]) -> Any:
    """The engine that these arguments and this environment start, in this process: its modules can be looked into."""
    import vllm.entrypoints.llm as offline
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", job["model"], *job["arguments"]])
    # Sizes of batches depend on what the engine is for: here, on what the server would be for.
    offline.UsageContext = SimpleNamespace(LLM_CLASS=UsageContext.OPENAI_API_SERVER)
    return offline.LLM.from_engine_args(EngineArgs.from_cli_args(arguments))


def _versions() -> dict[str, str]:
    import transformers
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def read_weights(model: torch.nn.Module, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare every expected tensor with the engine's.

    Returns:
        By checkpoint name: `status` (match, differs, missing), `read` (stored, codes, gemm), and for a stored
        weight `gemm_differs`; `file` where a differing value (fp32, checkpoint orientation) was saved.
    """
    readers = dict(engine_tensors(model))
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    report: dict[str, dict[str, Any]] = {}
    for index, (name, expected) in enumerate(job["tensors"].items()):
        engine_name = _resolve(name, readers, mapper)
        if engine_name is None:
            report[name] = {"status": "missing"}
            continue
        value, how = readers[engine_name]()
        entry: dict[str, Any] = {"read": how.removesuffix("!"), "gemm_differs": how.endswith("!")}
        value = _as_checkpoint(value, expected)
        if list(value.shape) == expected["shape"] and _digest(value, how) == expected[_digest_key(how)]:
            entry["status"] = "match"
        else:
            entry["status"] = "differs"
            entry["file"] = _dump(value, Path(job["dump"]) / f"{index}.safetensors")
        report[name] = entry
    return report


def engine_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Reader]]:
    """Name and reader of every tensor in the engine, fused layers cut into their parts."""
    from vllm.model_executor.layers.linear import LinearBase

    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    for module_name, module in model.named_modules():
        if isinstance(module, LinearBase):
            whole = _OnceRead(module)
            for part_name, rows in _parts(module_name, module, packed):
                yield f"{part_name}.weight", whole.part(rows)
                if isinstance(getattr(module, "bias", None), Tensor):
                    yield f"{part_name}.bias", _stored(module.bias, rows)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{module_name}.{name}".lstrip("."), _stored(parameter, slice(None))


def _parts(name: str, module: Any, packed: dict[str, list[str]]) -> list[tuple[str, slice]]:
    """Checkpoint names of a layer's parts and their rows."""
    parent, _, leaf = name.rpartition(".")
    sizes = getattr(module, "output_partition_sizes", None) or []
    names = packed.get(leaf, [])
    if len(names) < 2 or len(names) != len(sizes):
        return [(name, slice(None))]
    parts, start = [], 0
    for part, size in zip(names, sizes, strict=True):
        parts.append((f"{parent}.{part}".lstrip("."), slice(start, start + size)))
        start += size
    return parts


class _OnceRead:
    """Reads a linear layer whole at its first part and keeps it until its last one."""

    kept: tuple[Any, Tensor, str] | None = None  # the layer read last, shared by all

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def part(self, rows: slice) -> Reader:
        def read() -> tuple[Tensor, str]:
            if _OnceRead.kept is None or _OnceRead.kept[0] is not self.layer:
                _OnceRead.kept = (self.layer, *_linear_weight(self.layer))
            return _OnceRead.kept[1][rows], _OnceRead.kept[2]

        return read


def _stored(parameter: Tensor, rows: slice) -> Reader:
    return lambda: (parameter.detach()[rows].float().cpu(), "stored")


def _linear_weight(layer: Any) -> tuple[Tensor, str]:
    """fp32 `(out, in)` and how it was read; `!` is appended when the GEMM disagrees with the stored weight."""
    rows, columns = sum(layer.output_partition_sizes), layer.input_size_per_partition
    weight = layer.weight.detach()
    if weight.dtype == torch.float8_e4m3fn:
        codes = weight if tuple(weight.shape) == (rows, columns) else weight.t()
        scale = layer.weight_scale.detach().float()
        return codes.float() * (scale.reshape(rows, 1) if scale.numel() == rows else scale.reshape(())), "codes"
    if tuple(weight.shape) != (rows, columns):
        return _through_gemm(layer, torch.arange(columns), rows), "gemm"
    sampled = torch.linspace(0, columns - 1, min(columns, _SAMPLED_COLUMNS)).long()
    agrees = torch.equal(_through_gemm(layer, sampled, rows), weight[:, sampled].float())
    return weight.float().cpu(), "stored" if agrees else "stored!"


def _through_gemm(layer: Any, columns: Tensor, rows: int) -> Tensor:
    """Columns of the weight, as the layer's own multiplication returns them: fp32 `(rows, len(columns))`."""
    out = torch.empty(rows, len(columns))
    for start in range(0, len(columns), _CHUNK):
        chosen = columns[start : start + _CHUNK]
        one_hot = torch.zeros(len(chosen), layer.input_size_per_partition, dtype=layer.params_dtype)
        one_hot[torch.arange(len(chosen)), chosen] = 1.0
        out[:, start : start + len(chosen)] = layer.quant_method.apply(layer, one_hot, None).float().t()
    return out


def _resolve(name: str, readers: dict[str, Reader], mapper: Any) -> str | None:
    """The engine's name for a checkpoint's."""
    names = [name]
    if mapper is not None:
        names += list(mapper.apply_list([name]))
    return next((p + n for n in names for p in _PREFIXES if p + n in readers), None)


def _as_checkpoint(value: Tensor, expected: dict[str, Any]) -> Tensor:
    """Drop vocabulary padding and restore the orientation."""
    value = value.t() if expected["transposed"] and value.ndim == 2 else value
    shape = expected["shape"]
    if value.ndim == len(shape) and value.ndim > 0 and value.shape[0] > shape[0]:
        value = value[: shape[0]]
    return value.contiguous()


def _digest_key(how: str) -> str:
    return "sha256_unsigned_zero" if how == "gemm" else "sha256"


def _digest(value: Tensor, how: str) -> str:
    value = value + 0.0 if how == "gemm" else value  # -0 + 0 is +0
    return hashlib.sha256(value.contiguous().numpy().data).hexdigest()


def _dump(value: Tensor, path: Path) -> str:
    from safetensors.torch import save_file

    save_file({"value": value.clone()}, str(path))
    return str(path)


def _logprobs(llm: Any, sequences: list[list[int]]) -> list[list[dict[str, float]]]:
    """Log-probabilities by token, of the token that comes and the likeliest, at each place but the first.

    NaN and infinities as they come.
    """
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in sequences]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=_TOP)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        [{str(token): found.logprob for token, found in place.items()} for place in out.prompt_logprobs[1:]]
        for out in outputs
    ]


def _answers(llm: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
    if job["chat"]:
        talks = [[{"role": "user", "content": prompt}] for prompt in job["prompts"]]
        outputs = llm.chat(talks, params, use_tqdm=False)
    else:
        outputs = llm.generate(job["prompts"], params, use_tqdm=False)
    answers = ((out.prompt_token_ids, out.outputs[0]) for out in outputs)
    return [{"prompt_ids": list(ids), "token_ids": list(new.token_ids), "text": new.text} for ids, new in answers]


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they travel as strings that `float` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def main(path: str) -> None:
    """Read the job, do it, write its result beside it."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    result = run(job)
    Path(job["result"]).write_text(json.dumps(_plain(result)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
