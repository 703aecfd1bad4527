"""`fp8pipe doctor`: what is here, what is missing, and the command that adds it."""

import json

from click.testing import CliRunner

from fp8pipe.cli import main


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_doctor_reports_and_says_how_to_get_what_is_missing(tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    result = invoke("doctor", "--json", "--vllm-python", tmp_path / "none")
    assert result.exit_code == 0
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert torch.__version__ in checks["torch"]["value"]
    assert checks["vllm environment"]["status"] == "missing"
    assert str(tmp_path / "none") in checks["vllm environment"]["value"]
    assert checks["disk: cache"]["value"].endswith(str(tmp_path / "cache"))
    assert (checks["cuda device"]["status"] != "missing") == torch.cuda.is_available()
    assert all(check["fix"] for check in checks.values() if check["status"] != "ok")
    text = invoke("doctor", "--vllm-python", tmp_path / "none").stdout
    assert checks["vllm environment"]["fix"] in text
    able = {(one["verb"], one["what"]): one for one in json.loads(result.stdout)["can"]}
    assert {verb for verb, _ in able} == {"train", "quantize", "export", "build engines", "run", "serve"}
    language = able["serve", "language, in vLLM"]
    assert (language["able"], language["add"]) == (False, "make setup-vllm")
    assert "not serve" in text
    assert "to add it: make setup-vllm" in text
    assert able["train", "falqon: E4M3 weights, bf16 or fp32 beside"]["able"]
    # What is missing has a command, unless it is hardware.
    assert all(one["able"] or one["add"] or "GPU" in one["how"] for one in able.values())


def test_doctor_names_the_packages_that_a_verb_lacks(monkeypatch):
    from fp8pipe.core import machine

    real = machine.distribution_version
    gone = {"onnxscript", "peft", "tensorrt-rtx", "timm", "fastapi", "grpcio-reflection", "ray"}
    monkeypatch.setattr(machine, "distribution_version", lambda name: None if name in gone else real(name))
    found = json.loads(invoke("doctor", "--json").stdout)["can"]
    (ray_serve,) = (one for one in found if one["what"] == "vision, in Ray Serve")
    assert not ray_serve["able"]
    assert "grpcio-reflection" in ray_serve["how"]
    assert "fp8pipe[ray-serve]" in ray_serve["add"]
    able = {(one["verb"], one["what"].split(":")[0].split(",")[0]): one for one in found}
    for key, extra, package in (
        (("export", "onnx"), "onnx", "onnxscript"), (("train", "lora"), "train", "peft"),
        (("quantize", "vision transformers"), "vit", "timm"), (("run", "recipes on a Ray cluster"), "ray", "ray"),
        (("serve", "vision"), "", ""),
    ):  # fmt: skip
        assert not able[key]["able"]
        assert package in able[key]["how"]
        assert f"fp8pipe[{extra}" in able[key]["add"] or not extra


def test_doctor_says_what_a_gpu_cannot_do(monkeypatch, tmp_path):
    from fp8pipe.core import machine

    memory = 40 << 30
    cards = [machine.Gpu(name, (major, 0), memory) for name, major in (("H200", 9), ("A100", 8), ("V100", 7))]
    monkeypatch.setattr(machine, "gpus", lambda: cards)
    document = json.loads(invoke("doctor", "--json", "--vllm-python", tmp_path / "none").stdout)
    hopper, ampere, volta = (check for check in document["checks"] if check["name"] == "cuda device")
    assert [(card["status"], card["fix"]) for card in (hopper, ampere)] == [("ok", "")] * 2
    why = "compute capability 7.0; falqon needs 8.0 (bf16; FP8 products from 8.9 on)"
    assert volta["status"] == "warning"
    assert volta["fix"].startswith(why)
    assert volta["fix"].endswith("--device auto takes the CPU for falqon, lora and qlora, quantize-vit")
    able = {one["what"].split(":")[0]: one["how"] for one in document["can"] if one["verb"] in ("train", "quantize")}
    assert f"H200 (FP8 products); A100 (FP8 decoded, bf16 products); V100 (not on it: {why})" in able["falqon"]
    assert "H200 (bf16); A100 (bf16)" in able["lora, qlora"]
    assert "A100 (bf16)" in able["vision transformers"]
