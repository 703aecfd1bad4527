"""Tiny real models and data for tests of several packages: untrained, but built and saved like any other."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fp8pipe.artifact.kinds import ArtifactKind, Details, register_kind, unregister_kind
from fp8pipe.models.compat import declare_torchvision_operators, import_transformers
from fp8pipe.numerics.bf16 import widen_bf16_products

# Some tests import compressed-tensors, hence transformers, before any module of this project would declare them.
declare_torchvision_operators()
# As the stages do. Without it, processors without bf16 arithmetic take an hour more.
widen_bf16_products()

# Test modules are imported one by one (importlib mode): what tests of several packages share (vit_families) is found
# through the path. Not this folder itself, whose fp8pipe/ would hide the package.
_SUPPORT = str(Path(__file__).parent / "support")
if _SUPPORT not in sys.path:
    sys.path.insert(0, _SUPPORT)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fixtures of a module draw the same numbers, whatever ran before them in their process."""
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers, whichever tests ran before it: what fails by chance, nobody can reproduce."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Threads would fight over the cores of a shared machine, and tests run in parallel processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Worker processes share what they have traced; see `support/traced_once.py`."""
    from traced_once import traced_once

    base = tmp_path_factory.getbasetemp()
    with traced_once((base.parent if base.name.startswith("popen-") else base) / "traced"):
        yield


def _save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers = import_transformers()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
        additional_special_tokens=specials[2:], chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    fast.save_pretrained(path)


def _config(family: str, **changes: object) -> object:
    transformers = import_transformers()
    if family == "gpt2":
        return transformers.GPT2Config(**({"vocab_size": 272, "n_embd": 32, "n_layer": 2, "n_head": 2} | changes))
    cls = getattr(transformers, f"{family.capitalize()}Config")
    common = {
        "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    return cls(**(common | changes))


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """`make_base("llama", **config)` saves a tiny random model with tokenizer; returns its directory."""

    def build(family: str = "llama", seed: int = 0, **changes: object) -> Path:
        transformers = import_transformers()
        torch.manual_seed(seed)
        path = tmp_path / f"{family}-{seed}"
        model = transformers.AutoModelForCausalLM.from_config(_config(family, **changes)).to(torch.bfloat16)
        model.save_pretrained(path)
        _save_tokenizer(path)
        return path

    return build


@pytest.fixture
def plain_kind() -> Iterator[str]:
    """The name of a kind of artifact without facts of its own, whose contents nothing checks."""
    register_kind(ArtifactKind("plain", Details))
    yield "plain"
    unregister_kind("plain")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A JSONL file of 40 small question-answer pairs with a learnable rule."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"double {n}", "completion": f"{2 * n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
