"""Reads the weights of an engine back, in the checkpoint's layout, and compares them with the expected values.

To find out where each weight is stored, marker tensors are loaded before the real weights (`layout`). With the
positions found in this way, the engine's tensors are rearranged into the checkpoint's layout (`rebuild`).

How a weight is read depends on the layer:

* A plain `layer.weight` is read as stored, and some of its columns are compared with the output of the GEMM.
* FP8 codes are read byte for byte, and their scales as they are; their kernel is tested with `products`.
* Dequantized weights are read as numbers; of weights in NVFP4, two of them come from one byte (`unpacked`).
* If vLLM has packed the weight for a GEMM and dropped the original, it is read through the GEMM: one-hot inputs return
  the columns of the weight exactly, since all other terms of each sum are zero. Only the sign of zeros is lost, and for
  packed codes whatever the output dtype cannot represent.
* Scales of inputs in NVFP4 are read as the number that the layer uses for all its parts.
* Scales of the key/value cache are read from where attention reads them, and once more as the number that is passed to
  kernels which take one.
* Layers that pack their own weights (experts) are read after loading and before packing; the computation of quantized
  experts is tested too (`experts`).
* Values that the loader computes elementwise from a tensor are compared with the loader's result for the expected
  tensor. Whether the function itself is correct is tested only by the comparison of log-probabilities.

Runs inside vLLM's Python: only torch and vLLM are imported.
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
from validation.vllm.kernels import Kernel, find_kernel, input_divisor, through_gemm
from validation.vllm.layout import Head, Layout, Origin, learn
from validation.vllm.products import examine
from validation.vllm.rebuild import Found, Rebuild
from validation.vllm.unpacked import unpacked, weight_of

__all__ = ["Reading", "loadable"]

_SAMPLED_COLUMNS = 8  # number of columns of a stored weight that are compared with the GEMM
_INPUTS = {"input_global_scale": True, "input_scale": False}  # whether the layer's divisor is stored, or its reciprocal
_SCALE = "_scale"  # suffix of the name of the scales, after the name of the FP8 codes


class Reading:
    """Compares every expected tensor with the engine's, and finds values in the engine that come from none of them.

    Args:
        tensors: `shape` and digests (`Expected.digests`) of each expected tensor, by checkpoint name.
        dump: an existing directory, in which tensors that differ are saved.
        products: whether to test the matrix multiplications of quantized layers.

    Attributes:
        report: by checkpoint name: `status` (match, differs, missing), `read` (stored, codes, gemm, loaded, tied,
            computed), `gemm_differs` for a stored weight; `why`, if the whole tensor is wrong and not just some
            values; and `file`, where a differing tensor (fp32, in checkpoint orientation) was saved.
        layers: for quantized layers, by name in the engine: `kernel`, `device`, `holds`, the checkpoint `tensors` in
            the layer, and, if it was tested, the results of `products.examine`.
        unexplained: sentences on values in the engine and tensors in the files that no expected tensor accounts for.
    """

    def __init__(self, tensors: Mapping[str, Mapping[str, Any]], dump: Path, *, products: bool = False) -> None:
        self.tensors, self.dump, self.products = tensors, dump, products
        self.layers: dict[str, dict[str, Any]] = {}
        self.report: dict[str, dict[str, Any]] = {}
        self.unexplained: list[str] = []
        self.layout = Layout({}, {})
        self.rebuild = Rebuild(self.layout)
        self.whole: set[str] = set()  # checkpoint tensors of which the engine has every element
        self.as_loaded: set[str] = set()  # engine tensors that were read before they were packed
        self.experts: dict[str, tuple[Foreseen | None, list[str]]] = {}  # expected outputs, checkpoint tensors
        self.computed: dict[str, tuple[str, Tensor]] = {}  # computed by the loader: source tensor, expected value

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within the `with` block, make vLLM's loader load marker tensors before it loads a model's weights.

        Raises:
            RuntimeError: no model was loaded with that loader.
        """
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        true_load = DefaultModelLoader.load_weights

        def load(loader: Any, model: Any, config: Any) -> None:
            weights = loader.get_all_weights(config, model)
            heads = [Head(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights]
            held = loadable(model)
            self.layout = unpacked(learn(held, heads, model.load_weights))
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
            raise RuntimeError("vLLM did not use its own loader for safetensors, so no weight can be read back")

    def _as_loaded(self, model: torch.nn.Module, name: str, held: Mapping[str, Tensor]) -> tuple[Tensor, str]:
        """The tensor of a layer that packs its weights later, as fp32, and how it was read.

        FP8 experts are returned as codes if codes are expected, else dequantized; their expected outputs are computed.
        """
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
        """Find tensors that the loader computes elementwise from a checkpoint tensor, such as -exp(`A_log`) in Mamba.

        They are recognized by loading the tensor in reverse order: the result must be reversed, too, and must have as
        many distinct values as the tensor.
        """
        origins = self.layout.origins
        placed = {piece.head.name for origin in origins.values() for piece in origin.pieces}
        made = {name for name, origin in origins.items() if not (origin.pieces or origin.filled or origin.unwritten)}
        for name, value in weights if made else ():
            if name in placed or _digest(value.float(), unsigned=False) != self.tensors.get(name, {}).get("sha256"):
                continue
            load([(name, value.reshape(-1).flip(0).reshape(value.shape))])
            reversed_values = {o: held[o].cpu().reshape(-1).flip(0) for o in made if held[o].numel() == value.numel()}
            load([(name, value)])
            for other, numbers in reversed_values.items():
                now = held[other].detach().cpu().reshape(-1)
                if torch.equal(now, numbers) and now.unique().numel() == value.unique().numel() > 1:
                    self.computed[other] = (name, now.clone())

    def read(self, model: torch.nn.Module) -> None:
        """Read and compare the tensors that were not read during loading, and report missing tensors."""
        for name, (foreseen, heads) in self.experts.items():
            if foreseen is not None:
                self.layers[name] = {**examine_experts(model.get_submodule(name), foreseen), "tensors": heads}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, origin in self.layout.origins.items():
            if name in parameters and origin.unwritten:
                self.unexplained.append(f"{name}: {origin.unwritten} elements are not loaded from the checkpoint")
            if name not in self.as_loaded and (origin.pieces or name in parameters):
                self._take(name, *self._held(model, name, origin))
        for name in sorted(self.layout.heads.keys() - self.whole - self.tensors.keys()):
            self.unexplained.append(f"{name}: the engine holds only a part of it")
        for name in sorted(self.whole - self.tensors.keys()):
            if weight_of(name) not in self.tensors:
                self.unexplained.append(f"{name}: the files hold it, but the source does not")
        for name in self.tensors.keys() - self.report.keys():
            self.report[name] = self._absent(name, parameters)

    def _held(self, model: torch.nn.Module, name: str, origin: Origin) -> tuple[Tensor | None, str]:
        """An engine tensor as fp32 in its shape during loading, and how it was read; None if it no longer exists."""
        from vllm.model_executor.layers.linear import LinearBase

        if origin.pieces and not any(piece.head.name in self.tensors for piece in origin.pieces):
            return torch.zeros(origin.shape), "scale"  # not compared itself: the weight is compared dequantized
        module, leaf = _module(model, name), name.rpartition(".")[2]
        if _is_attention(module):
            return _cache_scale(module, leaf)
        if leaf in _INPUTS and (divisor := input_divisor(module)) is not None:  # one for all parts of a fused layer
            return torch.full(origin.shape, divisor if _INPUTS[leaf] else 1.0 / divisor), "stored"
        if isinstance(module, LinearBase) and leaf == "weight":
            return self._linear(name, module, origin)
        if isinstance(module, LinearBase) and self._packed(name):
            return (_bias_through_gemm(module, *origin.shape), "gemm") if leaf == "bias" else (None, "")
        tensor = getattr(module, leaf, None)
        return (tensor.detach().cpu().float(), "stored") if isinstance(tensor, Tensor) else (None, "")

    def _linear(self, name: str, layer: Any, origin: Origin) -> tuple[Tensor, str]:
        """The weight of a linear layer as fp32 `(out, in)`, and how it was read: codes if it stores codes, else values.

        A quantized layer is also tested with `products.examine`, and added to `layers`.
        """
        rows, columns = origin.shape
        held = sorted({piece.head.name for piece in origin.pieces})
        kernel = find_kernel(layer, rows, columns)
        choices = [(codes.float(), "codes") for codes in kernel.codes] or [_numbers(layer, kernel, rows, columns)]
        if not any(self.tensors.get(head, {}).get("quantized") for head in held):
            return choices[0]
        scale = torch.ones(()) if kernel.scale is None else kernel.scale
        found = [examine(layer, kernel, value * scale) if self.products else {} for value, _ in choices]
        # The orientation of a square matrix of codes is ambiguous: the test products decide.
        best = min(range(len(found)), key=lambda i: min(found[i].get(f"error_{k}", 0.0) for k in ("rounded", "plain")))
        told = {"kernel": kernel.name, "device": kernel.device, "holds": kernel.holds, "tensors": held}
        self.layers[name.removesuffix(".weight")] = told | found[best]
        return choices[best]

    def _packed(self, name: str) -> bool:
        """Whether the layer of this tensor has packed its weight, and so perhaps its bias too."""
        return self.layers.get(name.rpartition(".")[0], {}).get("holds") == "packed"

    def _take(self, name: str, value: Tensor | None, how: str) -> None:
        """Process an engine tensor, and report each checkpoint tensor whose last part it contains.

        Args:
            name: name in the engine.
            value: fp32, in the tensor's shape during loading; ignored if None or of another shape.
            how: how it was read.
        """
        origin = self.layout.origins[name]
        if value is None or tuple(value.shape) != origin.shape:
            return
        if name in self.computed:
            source, numbers = self.computed[name]
            same = torch.equal(value.reshape(-1), numbers.float())
            entry = (
                {"status": "match"} if same else {"status": "differs", "why": f"{name} is not what its loader computed"}
            )
            self.report[source] = {**entry, "read": "computed", "gemm_differs": False}
            return
        if not origin.unwritten and not (origin.filled and bool((origin.rest(value) == 0).all())):
            self.unexplained.append(f"{name}: its loader computes its values, or pads it with values other than 0")
        for found in self.rebuild.add(name, value, how):
            self.whole |= set() if found.absent else {found.head.name}
            if found.head.name in self.tensors:
                self.report[found.head.name] = self._judged(found)

    def _judged(self, found: Found) -> dict[str, Any]:
        expected, unsigned = self.tensors[found.head.name], "gemm" in found.how
        wrong = any(how.endswith("!") for how in found.how)
        entry: dict[str, Any] = {"status": "differs", "read": min(found.how).removesuffix("!"), "gemm_differs": wrong}
        if found.changed:
            return {**entry, "why": "the engine's loader does not only rearrange it, but computes new values from it"}
        if found.absent:
            return {**entry, "status": "missing", "why": f"{found.absent} of its elements are missing in the engine"}
        if found.unequal:
            return {**entry, "why": f"{found.unequal} elements are in the engine twice, with different values"}
        codes, products = "codes" in found.how, expected.get("products")
        if codes != (products is not None) and not unsigned:
            held, other = ("FP8 codes", "numbers") if codes else ("numbers", "FP8 codes")
            return {**entry, "why": f"the engine stores it as {held}; expected {other}"}
        digest = _digest(found.value, unsigned=unsigned)
        right = products if unsigned and products else [expected["sha256_unsigned_zero" if unsigned else "sha256"]]
        if digest in right and list(found.head.shape) == expected["shape"]:
            return {**entry, "status": "match"}
        return {**entry, "file": _dump(found.value, self.dump / f"{len(self.report)}.safetensors")}

    def _absent(self, name: str, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        """The report entry of a tensor that could not be rebuilt completely from the engine."""
        weight = weight_of(name)
        found = self.report.get(weight, {})
        if weight != name and found.get("read") == "gemm":  # the scale is part of what was read through the GEMM
            why = {} if found["status"] == "match" else {"why": f"the products of {weight} differ"}
            return {"status": found["status"], "read": "gemm", "gemm_differs": False, **why}
        if name not in self.layout.heads:
            return {"status": "missing", "why": "the files hold no tensor of this name"}
        if name in self.rebuild.waiting:
            return {"status": "missing", "why": "the engine has packed it in a form that cannot be read"}
        times = Counter(id(parameter) for parameter in parameters.values())
        for other, origin in self.layout.origins.items():
            shared = other in parameters and times[id(parameters[other])] > 1
            for twin in (piece.head.name for piece in origin.pieces if shared):
                equal = self.tensors.get(twin) == self.tensors[name]  # shape, digests and all
                if equal and self.report.get(twin, {}).get("status") == "match":
                    return {"status": "match", "read": "tied", "gemm_differs": False}
        return {"status": "missing", "why": "the engine has no copy of it"}


def _module(model: torch.nn.Module, name: str) -> Any:
    """The module that owns a tensor; None if it no longer exists."""
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


def loadable(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a checkpoint may fill, by name.

    No checkpoint holds complex numbers: they are rotations that the engine computes, as in the vision tower of Llama 4.
    """
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {name: tensor for name, tensor in held.items() if tensor.numel() and tensor.is_contiguous()}
    return {name: tensor for name, tensor in held.items() if not (tensor.is_meta or tensor.is_complex())}


def _packs_itself(module: Any) -> bool:
    """Whether a layer packs its weights in its own format."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, LinearBase):
        weight = getattr(module, "weight", None)  # before it is dequantized, one in NVFP4 has another name
        return isinstance(weight, Tensor) and weight.ndim != 2  # a convolution
    if isinstance(module, VocabParallelEmbedding) or _is_attention(module):
        return False
    return getattr(module, "quant_method", None) is not None


def _is_attention(module: Any) -> bool:
    """Whether a layer owns a key/value cache; its scales are replaced by buffers once the weights are loaded."""
    return isinstance(getattr(module, "_k_scale", None), Tensor)


def _cache_scale(layer: Any, leaf: str) -> tuple[Tensor | None, str]:
    """A scale of the key/value cache, fp32 `(1,)`; None if attention and its kernels are given different numbers."""
    held, number = getattr(layer, f"_{leaf}", None), getattr(layer, f"_{leaf}_float", None)
    if not isinstance(held, Tensor) or held.numel() != 1 or float(held) != number:
        return None, ""
    return held.detach().cpu().float().reshape(1), "stored"


def _digest(value: Tensor, *, unsigned: bool) -> str:
    """sha256 of the bytes; with `unsigned`, -0 counts as +0."""
    value = value + 0.0 if unsigned else value  # -0 + 0 is +0
    return hashlib.sha256(value.contiguous().numpy().data).hexdigest()


def _dump(value: Tensor, path: Path) -> str:
    from safetensors.torch import save_file

    save_file({"value": value.contiguous()}, str(path))
    return str(path)


def _numbers(layer: Any, kernel: Kernel, rows: int, columns: int) -> tuple[Tensor, str]:
    """The weight as fp32 `(out, in)`, and how it was read: `gemm`, `stored`, or `stored!` if the GEMM uses another."""
    weight = layer.weight.detach()
    if tuple(weight.shape) != (rows, columns) or kernel.holds == "packed":
        return through_gemm(layer, torch.arange(columns), rows, columns), "gemm"
    sampled = torch.linspace(0, columns - 1, min(columns, _SAMPLED_COLUMNS)).long()
    agrees = torch.equal(through_gemm(layer, sampled, rows, columns), weight[:, sampled].cpu().float())
    return weight.cpu().float(), "stored" if agrees else "stored!"


def _bias_through_gemm(layer: Any, rows: int) -> Tensor:
    """The bias, fp32 `(rows,)`: the output for an input of zeros."""
    zeros = torch.zeros(1, layer.input_size_per_partition, dtype=layer.params_dtype, device=layer.weight.device)
    product: Tensor = layer.quant_method.apply(layer, zeros, layer.bias)
    return product.cpu().float().reshape(rows)
