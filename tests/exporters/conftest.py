"""Tiny models of real architectures, and falqon artifacts built from them through the public writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8pipe.artifact import Artifact, ArtifactWriter, LayerRecord, NumberFormat
from fp8pipe.artifact.kinds import KvCacheFacts, TunedDetails
from fp8pipe.artifact.manifest import Encoding, ScaleRule
from fp8pipe.models.compat import import_transformers

GPT2_TRANSPOSED = ("c_attn", "c_proj", "c_fc")
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def _config(family: str, **changes: object) -> object:
    transformers = import_transformers()
    common = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
    decoder = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if family == "llama":
        return transformers.LlamaConfig(**{**common, **decoder, "tie_word_embeddings": False, **changes})
    if family == "qwen2":
        return transformers.Qwen2Config(**{**common, **decoder, "tie_word_embeddings": True, **changes})
    if family == "smollm3":  # the second layer has no rotary embedding
        kinds = {"no_rope_layers": [1, 0], "pad_token_id": 0, "tie_word_embeddings": False}
        return transformers.SmolLM3Config(**{**common, **decoder, **kinds, **changes})
    return transformers.GPT2Config(**{**common, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **changes})


def _tokenizer_files(root: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"t{i}": i for i in range(95)} | {"<unk>": 95}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(root / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "t2"}
    (root / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (root / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}\r\n{% endfor %}",
        encoding="utf-8",
        newline="",
    )


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_model(family, dtype=..., **config)` -> a Hugging Face directory with random weights."""

    def build(family: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: object) -> Path:
        transformers = import_transformers()
        root = tmp_path_factory.mktemp(family)
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(_config(family, **changes)).to(dtype)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms are constants at the start: copying them proves little
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(root)
        _tokenizer_files(root)
        return root

    return build


@pytest.fixture(scope="session")
def llama(make_model: Callable[..., Path]) -> Path:
    return make_model("llama")


@pytest.fixture(scope="session")
def qwen2(make_model: Callable[..., Path]) -> Path:
    return make_model("qwen2")


@pytest.fixture(scope="session")
def gpt2(make_model: Callable[..., Path]) -> Path:
    return make_model("gpt2")


@dataclass
class FalqonBuilder:
    """Writes a falqon artifact from a plain model, as the trainer would, with room for defects.

    Attributes:
        base: the plain model's directory.
        granularity: of the scales.
        skip: layer name endings that stay in bf16.
        edit: changes the tensors before they are saved.
        adapter: the manifest's adapter state.
        lora_b: value of every element of the adapter's B.
        rule: the manifest's update rule.
        kv_cache: the manifest's ranges of keys and values.
    """

    base: Path
    granularity: Literal["per-tensor", "per-channel"] = "per-tensor"
    skip: tuple[str, ...] = ()
    edit: Callable[[dict[str, Tensor]], None] | None = None
    adapter: str = "flushed"
    lora_b: float = 0.0
    rule: str = "live"
    kv_cache: KvCacheFacts | None = None

    def write(self, output: Path) -> Artifact:
        """Write the artifact to `output`."""
        tensors, adapter, layers, transposed = self._tensors()
        if self.edit is not None:
            self.edit(tensors)
        with ArtifactWriter(output, kind="falqon", stage="finetune") as writer:
            for name in COPIED:
                (writer.root / name).write_bytes((self.base / name).read_bytes())
            save_file(tensors, writer.root / "model.safetensors", metadata={"format": "pt"})
            save_file(adapter, writer.root / "adapter.safetensors")
            (writer.root / "metrics.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
            (writer.root / "plot.png").write_bytes(b"\x89PNG")
            return writer.commit(
                number_format=NumberFormat(name="e4m3", granularity=self.granularity),
                layers=layers,
                details=TunedDetails(
                    adapter=self.adapter,
                    rule=self.rule,
                    rank=4,
                    base_dtype="bfloat16",
                    transposed=transposed,
                    kv_cache=self.kv_cache,
                ),
            )

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor], list[LayerRecord], list[str]]:
        tensors: dict[str, Tensor] = {}
        adapter: dict[str, Tensor] = {}
        layers, transposed = [], []
        for name, value in load_file(self.base / "model.safetensors").items():
            layer = name.removesuffix(".weight")
            flip = layer.endswith(GPT2_TRANSPOSED)
            linear = value.ndim == 2 and name.endswith(".weight") and (layer.endswith("_proj") or flip)
            if not linear or layer.endswith(self.skip or ("\0",)):
                tensors[name] = value
                continue
            rows, columns = reversed(value.shape) if flip else value.shape
            scale = _scale(value, self.granularity, flip)
            # A scalar or one value a row; the row axis is the second one of a transposed weight.
            tensors[name] = (value.float() / (scale.reshape(1, -1) if flip and scale.ndim else scale)).to(
                torch.float8_e4m3fn
            )
            tensors[name + "_scale"] = scale
            adapter[layer + ".lora_A"] = torch.randn(4, columns).to(torch.float8_e4m3fn)
            adapter[layer + ".lora_A_scale"] = torch.tensor(0.01)
            adapter[layer + ".lora_B"] = torch.full((rows, 4), self.lora_b)
            weight = Encoding(format="e4m3", bits=8, granularity=self.granularity, scale_rule=ScaleRule.AMAX)
            layers.append(LayerRecord(name=layer, shape=(rows, columns), weight=weight, activation=self._inputs()))
            transposed += [name] if flip else []
        return tensors, adapter, layers, transposed

    def _inputs(self) -> Encoding:
        """How inputs were quantized in training."""
        if self.rule == "released":
            of_rule: dict[str, Any] = {"granularity": "per-tensor", "scale_rule": ScaleRule.AMAX}
        else:
            of_rule = {"granularity": "per-token", "scale_rule": ScaleRule.POWER_OF_TWO}
        return Encoding(format="e4m3", bits=8, dynamic=True, **of_rule)


def _scale(value: Tensor, granularity: str, flip: bool) -> Tensor:
    if granularity == "per-tensor":
        return value.float().abs().amax() / 448.0
    return (value.float().abs().amax(dim=0 if flip else 1) / 448.0).reshape(-1, 1)


def powers_of_two(tensors: dict[str, Tensor]) -> None:
    """Scales as the default rule trains them."""
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        weight = name.removesuffix("_scale")
        scale, old = torch.exp2(torch.ceil(torch.log2(tensors[name]))), tensors[name]
        tensors[name] = scale
        if scale.ndim and weight.removesuffix(".weight").endswith(GPT2_TRANSPOSED):
            scale, old = scale.reshape(1, -1), old.reshape(1, -1)  # one a row, the second axis here
        tensors[weight] = (tensors[weight].float() * old / scale).to(torch.float8_e4m3fn)


@pytest.fixture(scope="session")
def language_artifact(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`language_artifact(family, **options)` -> a falqon artifact with scales that FP16 holds."""

    def build(family: str = "llama", **options: object) -> Path:
        place = tmp_path_factory.mktemp("language") / "artifact"
        return FalqonBuilder(make_model(family), **{"edit": powers_of_two, **options}).write(place).root  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def language_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 60 question-answer pairs in the words of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "pairs.jsonl"
    words = [f"t{i}" for i in torch.randint(0, 95, (60 * 10,), generator=torch.Generator().manual_seed(0)).tolist()]
    rows = [words[10 * i : 10 * i + 10] for i in range(60)]
    pairs = [{"prompt": f"t{i} " + " ".join(row[:4]), "completion": " ".join(row[4:])} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


@pytest.fixture
def falqon(tmp_path: Path) -> Callable[..., Path]:
    """`falqon(base, granularity=..., skip=..., edit=..., ...)` -> a falqon artifact's directory."""
    count = 0

    def build(base: Path, **options: object) -> Path:
        nonlocal count
        count += 1
        return FalqonBuilder(base, **options).write(tmp_path / f"falqon-{count}").root  # type: ignore[arg-type]

    return build
