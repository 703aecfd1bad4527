"""Random faults with right hashes, in whole validations in a real vLLM: each is refused by name, no right export is.

The long run starts engines. Of its faults most come as far as that: hashes, `verify --quick` and the comparison of
files know nothing of them. And with those comparisons left out, the engine's own numbers are enough for weights.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import only_long, usual
from fault_outcomes import Case, Outcome, outcomes, validated
from lasting_engines import lasting_engines
from random_faults import LANGUAGE_KINDS
from tiny_checkpoints import write_plain
from trained_exports import write_trained

from exporters.vllm.environment import find_vllm_python
from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.models.compat import import_transformers

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EXPORTS = ("copied", "quantized")
WEIGHTS = ("tensor", "exchange")
# Of faults in words, which no engine has to be started for, the usual run tries a few.
WORDS = ("config", "settings", "token", "template")
SEEDS: dict[str, int] = {kind: usual(int(kind in WORDS), long=8 if kind in WEIGHTS else 4) for kind in LANGUAGE_KINDS}
CASES: list[Case] = [(kind, seed, name) for kind, count in SEEDS.items() for seed in range(count) for name in EXPORTS]
ALONE: list[Case] = [(kind, seed, name) for kind in WEIGHTS for seed in range(100, 105) for name in EXPORTS]
# Refused artifacts, refused exports, rejections; and a manifest that names another parent than the command does.
REFUSED = {12, 13, 14, 10}


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    try:
        find_vllm_python()
    except MissingCapabilityError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sharded(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's parents, and their exports in several files, as those of large models are."""
    root = tmp_path_factory.mktemp("sharded")
    for name, parent in zip(EXPORTS, ("trained", "plain"), strict=True):
        shutil.copytree(family / parent, root / parent)
        export_vllm(root / parent, root / name, VllmExportOptions(max_shard_bytes=600_000))
    return root


@pytest.fixture(scope="module")
def found(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    return outcomes(sharded, CASES, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def found_alone(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    return outcomes(sharded, ALONE, tmp_path_factory.mktemp("alone"), engine_alone=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_random_fault_is_refused_by_name(found: dict[Case, Outcome], case: Case) -> None:
    outcome = found[case]
    assert outcome.exit_code in REFUSED, f"{outcome.fault.how}: {outcome.told}"
    assert outcome.by_name, f"{outcome.fault.how}: {outcome.told}"


@only_long
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_an_engine_alone_finds_a_fault_in_weights(found_alone: dict[Case, Outcome], case: Case) -> None:
    outcome = found_alone[case]
    assert (outcome.caught, outcome.exit_code) in {("engine", 14), ("loading", 12)}, outcome.told
    # What vLLM refuses to load it calls by its own names: qkv_proj for v_proj, and without the leading `model`.
    block = ".".join(outcome.fault.named[0].removeprefix("model.").split(".")[:3])
    named = outcome.by_name or (outcome.caught == "loading" and block in outcome.told)
    assert named, f"{outcome.fault.how}: {outcome.told}"


@only_long
def test_most_faults_in_weights_come_as_far_as_an_engine(
    found: dict[Case, Outcome], found_alone: dict[Case, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    caught = Counter(outcome.caught for outcome in found.values())
    alone = Counter(outcome.caught for outcome in found_alone.values())
    unseen = sum(not outcome.quick for outcome in found.values())
    with capsys.disabled():
        print(f"\n{len(found)} faults: {dict(caught)}; {unseen} not seen by verify --quick")
        print(f"{len(found_alone)} faults in weights, engines alone: {dict(alone)}")
        print(f"by kind: {dict(Counter((case[0], outcome.caught) for case, outcome in found.items()))}")
    assert len(found) >= 60
    assert unseen >= len(found) * 3 // 4
    assert caught["engine"] + caught["loading"] >= len(found) // 4


_IDS = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256}
# vLLM's attention for CPUs takes no heads of fewer than 32.
_DECODER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192,
            "num_key_value_heads": 2, "max_position_embeddings": 256, **_IDS}  # fmt: skip
_GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, **_IDS}


def random_export(seed: int, root: Path) -> tuple[Path, Path]:
    """A right export and what it was made from: family, sizes, format, training and files drawn by the seed."""
    transformers, chance = import_transformers(), random.Random(seed)
    family = chance.choice(("Llama", "Qwen2", "GPT2"))
    changes: dict[str, Any] = {"tie_word_embeddings": chance.random() < 0.5}
    if family != "GPT2":
        changes |= {"num_key_value_heads": chance.choice((1, 2, 4)), "intermediate_size": chance.choice((96, 160, 272))}
    config = getattr(transformers, f"{family}Config")(**{**(_GPT2 if family == "GPT2" else _DECODER), **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * chance.choice((0.03, 0.1)))
    source = write_plain(root / "plain", model)
    if family != "GPT2" and chance.random() < 0.6:
        source = write_trained(root / "trained", source)
    # These sides are no whole blocks, and GPT-2's weights are stored (in, out).
    forms = [
        form
        for form in ExportFormat
        if form.block is None and not form.calibrated and not (form.packed and family == "GPT2")
    ]
    options = VllmExportOptions(format=chance.choice(forms), max_shard_bytes=chance.choice((200_000, 10**9)))
    return export_vllm(source, root / "export", options).root, source


@only_long
def test_a_right_export_is_never_rejected(tmp_path: Path) -> None:
    said = {}
    with lasting_engines():
        for seed in range(30):
            code, told, record = validated(*random_export(seed, tmp_path / str(seed)))
            if code != 0 or record is None or record["verdict"] != "ACCEPT":
                said[seed] = told
    assert not said, said
