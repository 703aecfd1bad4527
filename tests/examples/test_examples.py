"""The examples run as they are written, and what they write is what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from script_modules import load_script

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe import falqon, open_artifact
from fp8pipe.artifact.kinds import TunedDetails
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_every_example_is_run_here():
    named = {path.stem for path in EXAMPLES.glob("*.py")}
    assert named == {"own_training_loop", "hugging_face_trainer", "python_interface"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log. " * 20)
    return path


@pytest.mark.parametrize("name", ["own_training_loop", "hugging_face_trainer"])
def test_a_loop_of_ones_own_leaves_an_artifact_that_exports(
    name: str, make_base: Callable[..., Path], text: Path, tmp_path: Path
):
    base = make_base("llama")
    load_script(EXAMPLES / f"{name}.py").main(str(base), str(text), str(tmp_path / "tuned"))
    artifact = open_artifact(tmp_path / "tuned", kind="falqon")
    details = artifact.manifest.details_of(TunedDetails)
    assert details.rank == 8
    assert details.final_merge is not None
    assert details.final_merge.changed > 0  # something was learned, and it is in the codes
    assert all(gate.passed for gate in artifact.manifest.gates)
    exported = export_vllm(artifact.root, tmp_path / "export", VllmExportOptions())
    assert [gate for gate in exported.manifest.gates if not gate.passed] == []


def test_a_quantized_vit_is_exported_and_proved_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    load_script(EXAMPLES / "python_interface.py").main(str(tmp_path))
    assert capsys.readouterr().out.startswith("ACCEPT")


def test_what_is_saved_is_what_the_converted_model_computes(make_base: Callable[..., Path], tmp_path: Path):
    """The merged model's logits, and those of the saved codes dequantized into the model's own class: equal bits."""
    from exporters.vllm.reopen import load_torch_model

    base = make_base("llama")
    model = import_transformers().AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = falqon.convert(model, rank=4, update_rule_name="live-nearest")
    for parameter in tuned.parameters():
        parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    tuned.final_merge()
    tuned.save(base, tmp_path / "tuned")
    exported = export_vllm(tmp_path / "tuned", tmp_path / "export", VllmExportOptions())
    codes = {name: weight.dequantize() for name, weight in _codes(tuned).items()}
    loaded = dict(load_torch_model(exported.root, torch.float32).named_parameters())
    assert codes
    for name, weight in codes.items():
        assert torch.equal(loaded[f"{name}.weight"], weight), name


def _codes(tuned: falqon.Falqon) -> dict[str, _Dequantized]:
    return {name: _Dequantized(*value[:2]) for name, value in tuned.method.deployed_weights().items()}


class _Dequantized:
    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> torch.Tensor:
        return self.codes.float() * self.scale


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"update_rule_name": "none"}, "unknown update rule"),
        ({"initialisation": "none"}, "unknown initialisation"),
        ({"initialisation": "gradient"}, "needs losses"),
        ({"rank": 4096}, "rank 4096 does not fit"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict, said: str, make_base: Callable[..., Path]):
    model = import_transformers().AutoModelForCausalLM.from_pretrained(make_base("llama"), dtype=torch.float32)
    with pytest.raises(ConfigurationError, match=said):
        falqon.convert(model, **arguments)


def test_saving_before_merging_is_refused(make_base: Callable[..., Path], tmp_path: Path):
    base = make_base("llama")
    model = import_transformers().AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = falqon.convert(model, rank=4)
    with pytest.raises(ConfigurationError, match="nothing to save yet"):
        tuned.save(base, tmp_path / "tuned")
    with pytest.raises(ConfigurationError, match="needs batches"):
        tuned.final_merge()
