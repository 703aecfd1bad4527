"""What schema 2 wrote is read as today's, under its old digests; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fp8pipe.artifact import SCHEMA_VERSION, Manifest, read_manifest, write_checked
from fp8pipe.artifact.gate import Comparison, Verdict
from fp8pipe.artifact.kinds import kind_named
from fp8pipe.artifact.runs import read_run
from fp8pipe.artifact.verdict import read_verdict
from fp8pipe.artifact.verify import check_record
from fp8pipe.core.errors import BadArtifactError

OLD = Path(__file__).parents[2] / "data" / "manifests_v2"
# Kind -> digest and content digest, as the code of that schema computed them.
DIGESTS = {
    "falqon": (
        "e86a904266abd520ce5fae562723ca2711016b6202080a1f1f87f2321828dade",
        "49209c6ebb62a9703f9ece1ba98c9c5b6b190593c4ecd7dc0fb8c15b860d6f74",
    ),
    "vllm-export": (
        "04727decbb6975a47e8e1a2fbabcdea6748e8d30f6b330729b6d632f0ebbf8d1",
        "508e8ef24b613736c3ef5f1dba53144dd21a27f53dd0ef904d0da5abd892289f",
    ),
    "vit": (
        "03b537591818b84bba8204fb8794cf4fdcf10ebf549e6777a0de474f54310790",
        "c0fadd721b2b2606e55407b8b848979d9de1fee13eba1502a257dafa29235981",
    ),
    "onnx-export": (
        "54871d419ff4eb5903efaf4811ca2b441e23b25c0a5d271c169307a7d3c8dc7d",
        "d65478d551237b046d409c25221bff3bb510827a09831bdf7f44c31efa4f41f0",
    ),
    "trt-export": (
        "8db93e9f6452e93eba3258d3712480e1cba39edf7ce5f177d3a8a696ad693adb",
        "48d05ae74f60f9d7db6166167a78bbfde6730340eda1c60ca3d12464878d6460",
    ),
    "lora-merged": (
        "be044f44f9ac49a05299746e3f1325d3c801ea7fc4a87da4f318e35107bc65d8",
        "271f7f06fdad3334394d1994ae8260f454bdce746526cda68a4681168adac09f",
    ),
    "modelopt-export": (
        "1c7a64575be80f2726a2463b437087ceb57a549cb18c5fd09016942d8db216c3",
        "b76f796917f2d4a539f0a52f47393a2604b3143d8912ff4c5be95cdb0f3c550b",
    ),
    "trt-language-export": (
        "a8b936eeba1f758c2a4ccaea4ca09f3a87bd629bceeb3bd14a421673d483dcf9",
        "68f16d410d795f77fea3cbc5da58218127f0bb3ee0581a1279e6baa0b8b54822",
    ),
}  # fmt: skip
TOKEN = ("e4m3", 8, "per-token", "power-of-two", True)
SERVED = ("e4m3", 8, "per-token", "amax", True)
# Kind -> encodings of the weight and of the input of one layer: format, bits, granularity, scale rule, dynamic.
LAYERS = {
    "falqon": ("model.layers.0.self_attn.q_proj", ("e4m3", 8, "per-tensor", "power-of-two", False), TOKEN),
    "lora-merged": (None, None, None),
    "vit": ("blocks.0.attn.qkv", ("int", 4, "per-channel", None, False), None),
    "vllm-export": ("model.layers.0.mlp.down_proj", ("e4m3", 8, "per-channel", None, False), SERVED),
    "onnx-export": ("blocks.0.attn.qkv", ("int", 4, "per-channel", None, False), None),
    "trt-export": ("blocks.0.attn.qkv", ("int", None, "per-channel", None, False), None),
    "trt-language-export": ("model.layers.0.self_attn.q_proj", ("e4m3", 8, "per-tensor", None, False), None),
    "modelopt-export": ("model.layers.0.self_attn.q_proj", ("e4m3", 8, "per-tensor", None, False), None),
}  # fmt: skip
FAILED = {
    "falqon": {"held-out loss of the deployed weights": Verdict.REGRESSION},
    "lora-merged": {"held-out loss of the deployed weights": Verdict.ANOMALOUS},  # it was NaN
    "vit": {"top-1 agreement with the teacher": Verdict.REGRESSION},
}


def plain(encoding):
    return None if encoding is None else tuple(encoding.model_dump(mode="json").values())


@pytest.mark.parametrize("kind", DIGESTS)
def test_a_manifest_is_read_under_its_old_digests(kind):
    manifest = read_manifest(OLD / kind)
    assert (manifest.kind, manifest.schema_version, manifest.stored_version) == (kind, SCHEMA_VERSION, 2)
    assert (manifest.digest, manifest.content) == DIGESTS[kind]
    assert type(manifest.details) is kind_named(kind).details
    stored = json.loads((OLD / kind / "manifest.json").read_text())
    assert len(manifest.layers) == len(stored["layers"]) > 0
    assert [layer.converted for layer in manifest.layers] == [
        layer["converted"] and stored["number_format"] is not None for layer in stored["layers"]
    ]
    assert [entry.path for entry in manifest.files] == [entry["path"] for entry in stored["files"]]
    # A migrated manifest is one of the current schema.
    again = Manifest.from_json(manifest.to_json(), where="again")
    assert again.to_json() == manifest.to_json()


@pytest.mark.parametrize("kind", DIGESTS)
def test_layers_have_encodings_and_gates_pass_as_they_did(kind):
    manifest = read_manifest(OLD / kind)
    name, weight, activation = LAYERS[kind]
    for layer in manifest.layers:
        if layer.name == name:
            assert (plain(layer.weight), plain(layer.activation)) == (weight, activation)
    assert name is None or name in {layer.name for layer in manifest.layers}
    stored = json.loads((OLD / kind / "manifest.json").read_text())["gates"]
    assert [gate.passed for gate in manifest.gates] == [gate["passed"] for gate in stored]
    assert {gate.name: gate.verdict for gate in manifest.gates if not gate.passed} == FAILED.get(kind, {})
    comparisons = {gate.name: gate.comparison for gate in manifest.gates}
    expected = {
        "weight codes differing": Comparison.EQUAL, "payload-bytes": Comparison.EQUAL,
        "top-1 agreement with the teacher": Comparison.AT_LEAST, "float graph error": Comparison.AT_MOST,
        "held-out loss of the deployed weights": Comparison.BELOW,
    }  # fmt: skip
    assert {name: found for name, found in comparisons.items() if name in expected} == {
        name: found for name, found in expected.items() if name in comparisons
    }


def test_details_hold_what_was_recorded():
    tuned = read_manifest(OLD / "falqon").details
    assert (tuned.adapter, tuned.rule, tuned.rank, tuned.data.train) == ("flushed", "live", 64, 673)
    assert tuned.final_merge.cosine == 0.2285116836188071
    assert len(tuned.final_merge_layers) == 4
    vit = read_manifest(OLD / "vit").details
    assert (vit.precision, vit.images, len(vit.transforms.done)) == ("w4a4", 128, 3)
    served = read_manifest(OLD / "vllm-export").details
    assert (plain(served.activations), plain(served.trained_activations)) == (SERVED, TOKEN)
    engine = read_manifest(OLD / "trt-export").details.engines["8.9"]
    assert engine.precisions == {"int8": 38}
    assert engine.size.weights_over_ideal > 1
    decoder = read_manifest(OLD / "trt-language-export").details
    assert (decoder.base, decoder.cache.heads, decoder.calibration.records) == ("fp16", 2, 17)
    scales = read_manifest(OLD / "modelopt-export").details.activation_scales
    assert all(scale.scale > 0 for scale in scales.values())


@pytest.mark.parametrize("path", sorted(OLD.glob("*-export.*.json")), ids=lambda path: path.name)
def test_records_beside_exports_are_read(path, tmp_path):
    export = path.name.split(".")[0]
    shutil.copytree(OLD / export, tmp_path / export)
    for file in (path, path.with_suffix(".sha256")):
        shutil.copy(file, tmp_path)
    from fp8pipe.artifact import Artifact

    artifact = Artifact(tmp_path / export, read_manifest(tmp_path / export))
    assert check_record(tmp_path / path.name, {artifact.root: artifact}) == ([], [])


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("weights", "differing"), 1, "weights differing"),
        (("weights", "missing"), ["lm_head.weight"], "weights missing"),
        (("logprobs", "max_abs_diff"), 0.187, "log-probabilities"),
        (("logprobs", "max_abs_diff"), None, "log-probabilities"),
    ],
)
def test_an_old_record_is_believed_only_as_far_as_its_figures_go(tmp_path, place, value, named):
    shutil.copytree(OLD / "vllm-export", tmp_path / "vllm-export")
    data = json.loads((OLD / "vllm-export.validation.json").read_text())
    data[place[0]][place[1]] = value
    path = write_checked(tmp_path / "vllm-export.validation.json", json.dumps(data))
    with pytest.raises(BadArtifactError, match=f"its verdict is ACCEPT, but {named}"):
        read_verdict(path)


def test_a_run_is_read_with_its_gates():
    run = read_run(OLD)
    stored = json.loads((OLD / "run.json").read_text())
    assert run.verdict is Verdict.ACCEPT
    assert len(run.stages) == len(stored["stages"]) == 10
    for stage, old in zip(run.stages, stored["stages"], strict=True):
        assert (stage.verdict, stage.content) == (old["verdict"], old["content"])
        bounds = [
            (gate["name"], comparison, gate[bound])
            for gate in old["gates"]
            for bound, comparison in (("at_least", Comparison.AT_LEAST), ("at_most", Comparison.AT_MOST))
            if gate[bound] is not None
        ]
        assert [(gate.name, gate.comparison, gate.threshold) for gate in stage.gates] == bounds
        assert all(gate.passed for gate in stage.gates)


def changed(kind, change):
    data = json.loads((OLD / kind / "manifest.json").read_text())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize("kind", DIGESTS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(schema_version=SCHEMA_VERSION + 1), "its schema version is 4; this fp8pipe reads"),
        (lambda data: data.update(kind="hologram"), "unknown kind 'hologram'"),
        (lambda data: data.update(mood="good"), "mood: Extra inputs are not permitted"),
        (lambda data: data["extra"].update(mood="good"), "mood: Extra inputs are not permitted"),
        (lambda data: data.pop("stage"), "stage: Field required"),
        (lambda data: data["gates"].append({"name": "n", "value": 3.0, "threshold": 0.0, "passed": True}),
         "the gate 'n' claims passed=True, and 3 (equal 0) says otherwise"),
    ],
    ids=["newer", "unknown kind", "field too many", "detail too many", "field missing", "false gate"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(kind, change, said):
    with pytest.raises(BadArtifactError) as refused:
        Manifest.from_json(changed(kind, change), where="old/manifest.json")
    assert said in f"{refused.value.what}: {refused.value.why}"
    assert "old/manifest.json" in refused.value.what
    assert refused.value.exit_code == 12


@pytest.mark.parametrize(
    ("kind", "key", "said"),
    [("vit", "precision", "precision: Field required"),
     ("vllm-export", "payload_bytes", "payload_bytes: Field required"),
     ("onnx-export", "input", "input: Field required"), ("trt-export", "base", "base: Field required"),
     ("modelopt-export", "quant_algo", "quant_algo: Field required"),
     ("trt-language-export", "calibration", "calibration: Field required")],
)  # fmt: skip
def test_details_that_lack_a_field_are_refused_by_name(kind, key, said):
    with pytest.raises(BadArtifactError) as refused:
        Manifest.from_json(changed(kind, lambda data: data["extra"].pop(key)), where="old/manifest.json")
    assert said in refused.value.why
