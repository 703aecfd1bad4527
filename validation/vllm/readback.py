"""Read an engine's weights back, each in the checkpoint's order, and compare it with its expected value.

Which weight is where. Marks go through the loader before the true weights (`layout`), and what the engine holds is put
back in the checkpoint's order by what they tell (`rebuild`).

How it is read. What is there as `layer.weight` is read as stored, and some of its columns are compared with what the
GEMM computes. FP8 codes are read as codes, byte for byte, and their scales as they are; what their kernel multiplies is
examined (`products`). Where vLLM has given the weight to a packed GEMM and dropped it, the GEMM itself is read: one-hot
inputs return the weight's columns, exactly, since every other term of each sum is zero. Only the sign of a zero is lost
that way, and of packed codes what the output's dtype does not hold. What other layers pack for themselves (experts) is
read as loaded, before they do; what quantized experts then multiply by is examined, too (`experts`). And what the
loader computes from a tensor number by number is held against what it makes of the source's: whether it computes the
right thing, the log-probabilities tell.

Runs inside vLLM's Python: torch and vLLM alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from validation.vllm.experts import Foreseen, examine_experts, foresee, is_experts, stacked_numbers
from validation.vllm.kernels import Kernel, find_kernel, through_gemm
from validation.vllm.layout import Head, Layout, Origin, learn
from validation.vllm.products import examine
from validation.vllm.rebuild import Found, Rebuild

__all__ = ["Reading"]

_SAMPLED_COLUMNS = 8  # columns of a stored weight that are compared with the GEMM
_SCALE = "_scale"  # what follows the name of FP8 codes in the name of their scales


class Reading:
    """Compares every expected tensor with the engine's, and finds what the engine holds beside them.

    Args:
        tensors: of each, by checkpoint name, `shape` and the digests of `Expected.digests`.
        dump: an existing directory for values that differ.
        products: whether products of quantized layers are examined.

    Attributes:
        report: by checkpoint name: `status` (match, differs, missing), `read` (stored, codes, gemm, loaded, tied,
            computed), `gemm_differs` of a stored weight; `why`, where it is no matter of single numbers; and `file`,
            where a differing value (fp32, checkpoint orientation) was saved.
        layers: of quantized layers, by the engine's name: `kernel`, `device`, `holds`, the `tensors` of the checkpoint
            that are in it, and, where they are examined, what `products.examine` found.
        unexplained: what else is in the engine or in the files, in words.
    """

    def __init__(self, tensors: Mapping[str, Mapping[str, Any]], dump: Path, *, products: bool = False) -> None:
        self.tensors, self.dump, self.products = tensors, dump, products
        self.layers: dict[str, dict[str, Any]] = {}
        self.report: dict[str, dict[str, Any]] = {}
        self.unexplained: list[str] = []
        self.layout = Layout({}, {})
        self.rebuild = Rebuild(self.layout)
        self.whole: set[str] = set()  # tensors of the files of which the engine holds every element
        self.as_loaded: set[str] = set()  # the engine's tensors that were read before they were packed
        self.experts: dict[str, tuple[Foreseen | None, list[str]]] = {}  # quantized ones: what they must make, of what
        self.computed: dict[str, tuple[str, Tensor]] = {}  # those that the loader computes: from what, and what

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While this lasts, vLLM's loader loads marks before it loads a model's weights.

        Raises:
            RuntimeError: no model came through that loader.
        """
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        true_load = DefaultModelLoader.load_weights

        def load(loader: Any, model: Any, config: Any) -> None:
            weights = loader.get_all_weights(config, model)
            heads = [Head(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights]
            held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            held = {n: t for n, t in held.items() if t.numel() and t.is_contiguous() and not t.is_meta}
            self.layout = learn(held, heads, model.load_weights)
            self.rebuild = Rebuild(self.layout)
            self._find_computed(loader.get_all_weights(config, model), model.load_weights, held)
            true_load(loader, model, config)
            self.as_loaded = {name for name in held if _packs_itself(_module(model, name))}
            for name in self.as_loaded:
                self._take(name, *self._as_loaded(model, name, held))

        DefaultModelLoader.load_weights = load
        try:
            yield
        finally:
            DefaultModelLoader.load_weights = true_load
        if not self.layout.heads:
            raise RuntimeError("vLLM took another loader than its own for safetensors: no weight can be read back")

    def _as_loaded(self, model: torch.nn.Module, name: str, held: Mapping[str, Tensor]) -> tuple[Tensor, str]:
        """What was loaded into a layer that packs it afterwards: of experts in FP8 codes, or what those stand for."""
        tensor, module = held[name].detach(), _module(model, name)
        if tensor.dtype is not torch.float8_e4m3fn or not is_experts(module):
            return tensor.cpu().float(), "loaded"
        heads = sorted({piece.head.name for piece in self.layout.origins[name].pieces})
        foreseen = self.experts.setdefault(name.rpartition(".")[0], (foresee(module) if self.products else None, []))
        foreseen[1].extend(heads)
        if any("products" in self.tensors.get(head, {}) for head in heads):
            return tensor.cpu().float(), "codes"
        return stacked_numbers(tensor, held[name + _SCALE], module.moe_config.in_dtype), "loaded"

    def _find_computed(self, weights: Iterable[tuple[str, Tensor]], load: Any, held: Mapping[str, Tensor]) -> None:
        """Find what the loader computes number by number from a tensor: Mamba's -exp of `A_log`.

        Turned around, such a tensor gives the same numbers turned around; different numbers give different ones.
        """
        origins = self.layout.origins
        placed = {piece.head.name for origin in origins.values() for piece in origin.pieces}
        made = {name for name, origin in origins.items() if not (origin.pieces or origin.filled or origin.unwritten)}
        for name, value in weights if made else ():
            if name in placed or _digest(value.float(), unsigned=False) != self.tensors.get(name, {}).get("sha256"):
                continue
            load([(name, value.reshape(-1).flip(0).reshape(value.shape))])
            turned = {o: held[o].cpu().reshape(-1).flip(0) for o in made if held[o].numel() == value.numel()}
            load([(name, value)])
            for other, numbers in turned.items():
                now = held[other].detach().cpu().reshape(-1)
                if torch.equal(now, numbers) and now.unique().numel() == value.unique().numel() > 1:
                    self.computed[other] = (name, now.clone())

    def read(self, model: torch.nn.Module) -> None:
        """Read what was not read while it was loaded, and say what is missing."""
        for name, (foreseen, heads) in self.experts.items():
            if foreseen is not None:
                self.layers[name] = {**examine_experts(model.get_submodule(name), foreseen), "tensors": heads}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, origin in self.layout.origins.items():
            if name in parameters and origin.unwritten:
                self.unexplained.append(f"{name}: {origin.unwritten} elements are loaded from nowhere")
            if name not in self.as_loaded and (origin.pieces or name in parameters):
                self._take(name, *self._held(model, name, origin))
        for name in sorted(self.layout.heads.keys() - self.whole - self.tensors.keys()):
            self.unexplained.append(f"{name}: the engine does not hold all of it")
        for name in sorted(self.whole - self.tensors.keys()):
            if name.removesuffix(_SCALE) not in self.tensors:
                self.unexplained.append(f"{name}: the files hold it, and the source does not")
        for name in self.tensors.keys() - self.report.keys():
            self.report[name] = self._absent(name, parameters)

    def _held(self, model: torch.nn.Module, name: str, origin: Origin) -> tuple[Tensor | None, str]:
        """fp32, in the shape in which it was loaded, and how it was read; None where it is no longer there."""
        from vllm.model_executor.layers.linear import LinearBase

        if origin.pieces and not any(piece.head.name in self.tensors for piece in origin.pieces):
            return torch.zeros(origin.shape), "scale"  # what it stands for is in the weight that it scales
        module, leaf = _module(model, name), name.rpartition(".")[2]
        if isinstance(module, LinearBase) and leaf == "weight":
            return self._linear(name, module, origin)
        if isinstance(module, LinearBase) and self._packed(name):
            return (_bias_through_gemm(module, *origin.shape), "gemm") if leaf == "bias" else (None, "")
        tensor = getattr(module, leaf, None)
        return (tensor.detach().cpu().float(), "stored") if isinstance(tensor, Tensor) else (None, "")

    def _linear(self, name: str, layer: Any, origin: Origin) -> tuple[Tensor, str]:
        """The weight of a linear layer: codes as numbers where it holds codes, else what it multiplies by."""
        rows, columns = origin.shape
        held = sorted({piece.head.name for piece in origin.pieces})
        kernel = find_kernel(layer, rows, columns)
        choices = [(codes.float(), "codes") for codes in kernel.codes] or [_numbers(layer, kernel, rows, columns)]
        if not any(self.tensors.get(head, {}).get("quantized") for head in held):
            return choices[0]
        scale = torch.ones(()) if kernel.scale is None else kernel.scale
        found = [examine(layer, kernel, value * scale) if self.products else {} for value, _ in choices]
        # A square matrix of codes may lie there either way: its products tell.
        best = min(range(len(found)), key=lambda i: min(found[i].get(f"error_{k}", 0.0) for k in ("rounded", "plain")))
        told = {"kernel": kernel.name, "device": kernel.device, "holds": kernel.holds, "tensors": held}
        self.layers[name.removesuffix(".weight")] = told | found[best]
        return choices[best]

    def _packed(self, name: str) -> bool:
        """Whether the layer of a tensor has packed its weight, and so perhaps its bias."""
        return self.layers.get(name.rpartition(".")[0], {}).get("holds") == "packed"

    def _take(self, name: str, value: Tensor | None, how: str) -> None:
        """Take over one of the engine's tensors."""
        origin = self.layout.origins[name]
        if value is None or tuple(value.shape) != origin.shape:
            return
        if name in self.computed:
            source, numbers = self.computed[name]
            same = torch.equal(value.reshape(-1), numbers.float())
            entry = {"status": "match"} if same else {"status": "differs", "why": f"{name} is not what its loader made"}
            self.report[source] = {**entry, "read": "computed", "gemm_differs": False}
            return
        if not origin.unwritten and not (origin.filled and bool((origin.rest(value) == 0).all())):
            self.unexplained.append(f"{name}: its loader computes what it holds, or pads it with other numbers than 0")
        for found in self.rebuild.add(name, value, how):
            self.whole |= set() if found.absent else {found.head.name}
            if found.head.name in self.tensors:
                self.report[found.head.name] = self._judged(found)

    def _judged(self, found: Found) -> dict[str, Any]:
        expected, unsigned = self.tensors[found.head.name], "gemm" in found.how
        wrong = any(how.endswith("!") for how in found.how)
        entry: dict[str, Any] = {"status": "differs", "read": min(found.how).removesuffix("!"), "gemm_differs": wrong}
        if found.changed:
            return {**entry, "why": "the engine's loader computes something from it, and does not only rearrange it"}
        if found.absent:
            return {**entry, "status": "missing", "why": f"{found.absent} of its elements are nowhere in the engine"}
        if found.unequal:
            return {**entry, "why": f"{found.unequal} elements are there twice, with different numbers"}
        codes, products = "codes" in found.how, expected.get("products")
        if codes != (products is not None) and not unsigned:
            held, other = ("FP8 codes", "numbers") if codes else ("numbers", "FP8 codes")
            return {**entry, "why": f"the engine holds {held} of it, and was to hold {other}"}
        digest = _digest(found.value, unsigned=unsigned)
        right = products if unsigned and products else [expected["sha256_unsigned_zero" if unsigned else "sha256"]]
        if digest in right and list(found.head.shape) == expected["shape"]:
            return {**entry, "status": "match"}
        return {**entry, "file": _dump(found.value, self.dump / f"{len(self.report)}.safetensors")}

    def _absent(self, name: str, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        """Of a tensor that no part of the engine has given whole."""
        weight = name.removesuffix(_SCALE)
        found = self.report.get(weight, {})
        if weight != name and found.get("read") == "gemm":  # its products have the scale in them
            why = {} if found["status"] == "match" else {"why": f"the products of {weight} differ"}
            return {"status": found["status"], "read": "gemm", "gemm_differs": False, **why}
        if name not in self.layout.heads:
            return {"status": "missing", "why": "the files hold no tensor of this name"}
        if name in self.rebuild.waiting:
            return {"status": "missing", "why": "the engine has packed it to where it cannot be read"}
        times = Counter(id(parameter) for parameter in parameters.values())
        for other, origin in self.layout.origins.items():
            shared = other in parameters and times[id(parameters[other])] > 1
            for twin in (piece.head.name for piece in origin.pieces if shared):
                equal = self.tensors.get(twin) == self.tensors[name]  # shape, digests and all
                if equal and self.report.get(twin, {}).get("status") == "match":
                    return {"status": "match", "read": "tied", "gemm_differs": False}
        return {"status": "missing", "why": "nothing in the engine is a copy of it"}


def _module(model: torch.nn.Module, name: str) -> Any:
    """What owns a tensor; None where it is gone."""
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


def _packs_itself(module: Any) -> bool:
    """Whether a layer packs its weights in a way of its own."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, LinearBase):
        return isinstance(module.weight, Tensor) and module.weight.ndim != 2  # the kernel of a convolution
    return getattr(module, "quant_method", None) is not None and not isinstance(module, VocabParallelEmbedding)


def _digest(value: Tensor, *, unsigned: bool) -> str:
    """sha256 of its bytes, those of zeros of either sign the same where `unsigned`."""
    value = value + 0.0 if unsigned else value  # -0 + 0 is +0
    return hashlib.sha256(value.contiguous().numpy().data).hexdigest()


def _dump(value: Tensor, path: Path) -> str:
    from safetensors.torch import save_file

    save_file({"value": value.contiguous()}, str(path))
    return str(path)


def _numbers(layer: Any, kernel: Kernel, rows: int, columns: int) -> tuple[Tensor, str]:
    """fp32 `(out, in)` and how it was read; `!` is appended when the GEMM disagrees with the stored weight."""
    weight = layer.weight.detach()
    if tuple(weight.shape) != (rows, columns) or kernel.holds == "packed":
        return through_gemm(layer, torch.arange(columns), rows, columns), "gemm"
    sampled = torch.linspace(0, columns - 1, min(columns, _SAMPLED_COLUMNS)).long()
    agrees = torch.equal(through_gemm(layer, sampled, rows, columns), weight[:, sampled].cpu().float())
    return weight.cpu().float(), "stored" if agrees else "stored!"


def _bias_through_gemm(layer: Any, rows: int) -> Tensor:
    """fp32 `(rows,)`: what is added to a product of zeros."""
    zeros = torch.zeros(1, layer.input_size_per_partition, dtype=layer.params_dtype, device=layer.weight.device)
    product: Tensor = layer.quant_method.apply(layer, zeros, layer.bias)
    return product.cpu().float().reshape(rows)
