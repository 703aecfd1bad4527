"""The stage end to end on tiny models: artifact, refusals, kill and resume, and the baselines."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import torch
from breadth import only_long, usual
from click.testing import CliRunner
from forked import forked
from safetensors.torch import load_file
from tuning_config import config

from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.kinds import MergeHealth
from fp8pipe.cli import main
from fp8pipe.core.errors import ConfigurationError
from pipeline.finetune.loop import Trainer
from pipeline.finetune.stage import finetune


def deployed(root):
    return load_file(root / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_artifact_holds_codes_scales_and_everything_else_untouched(make_base, pairs, tmp_path, family):
    base = make_base(family)
    artifact = finetune(config(base, pairs), tmp_path / "out")
    manifest = open_artifact(artifact.root, kind="falqon").manifest
    before, after = load_file(base / "model.safetensors"), deployed(artifact.root)
    converted = {layer.name for layer in manifest.layers if layer.converted}
    for name, tensor in after.items():
        layer = name.removesuffix(".weight").removesuffix(".weight_scale")
        if layer not in converted or name.endswith(".bias"):
            assert torch.equal(tensor, before[name])
        elif name.endswith(".weight_scale"):
            assert tensor.dtype == torch.float32
            assert tensor.shape == ()
        else:
            assert tensor.dtype == torch.float8_e4m3fn
            assert tensor.shape == before[name].shape
            # Codes times scale are the tuned weights: close to the base ones, off by FP8's 6 % and the update.
            error = (tensor.float() * after[f"{layer}.weight_scale"] - before[name].float()).norm()
            assert error < 0.5 * before[name].float().norm()
    assert {n for n in before if n not in after} == set()
    assert len(converted) == (14 if family != "gpt2" else 8)
    for name in ("tokenizer.json", "config.json", "chat_template.jinja"):
        assert (artifact.root / name).read_bytes() == (base / name).read_bytes()
    assert (artifact.root / "plot.png").stat().st_size > 1000
    adapter = load_file(artifact.root / "adapter.safetensors")
    assert not any(t.any() for n, t in adapter.items() if n.endswith("lora_B"))
    flushed = artifact.manifest.details.final_merge_layers
    assert set(flushed) == {name.removesuffix(".lora_B") for name in adapter if name.endswith(".lora_B")}
    assert all(isinstance(health, MergeHealth) for health in flushed.values())
    lines = [json.loads(line) for line in (artifact.root / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert all(
        {"pending_changed", "pending_cosine", "pending_norm_ratio", "pending_saturated"} <= set(m) for m in logged
    )
    assert not list(artifact.root.glob("checkpoint*"))


def test_learning_lowers_the_heldout_loss_of_the_deployed_codes(make_base, pairs, tmp_path):
    artifact = finetune(config(make_base(), pairs, steps=60, evaluate_every=0, save_every=0), tmp_path / "out")
    losses = artifact.manifest.details.heldout_loss
    assert losses.deployed < losses.untuned - 0.3  # random weights start at ln 272 = 5.6 nats; B alone, in 60 steps
    cache = artifact.manifest.details.kv_cache
    assert list(cache.amax) == [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
    assert cache.loss == pytest.approx(losses.deployed, rel=0.01)  # bf16, and examples unpacked
    assert all(gate.passed for gate in artifact.manifest.gates)


@pytest.mark.parametrize("rule", ["released", "accumulate-stochastic", "live-nearest"])
def test_other_rules_reach_an_artifact_and_flush_what_they_buffer(make_base, pairs, tmp_path, rule):
    rows = {"rows": 4} if rule == "accumulate-stochastic" else {}
    artifact = finetune(config(make_base(), pairs, update_rule=rule, **rows), tmp_path / "out")
    adapter = load_file(artifact.root / "adapter.safetensors")
    assert not any(t.any() for n, t in adapter.items() if n.endswith("lora_B"))
    lines = [json.loads(line) for line in (artifact.root / "metrics.jsonl").read_text().splitlines()]
    assert any(("flush_changed" if rule != "live-nearest" else "pending_changed") in line for line in lines)


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bfloat16"), ("lora", "float32"), ("qlora", "bfloat16")])
def test_baselines_run_through_the_same_loop_and_merge(make_base, pairs, tmp_path, method, dtype):
    pytest.importorskip("peft")
    base = make_base(intermediate_size=128)  # bitsandbytes quantizes blocks of 64 values
    artifact = finetune(config(base, pairs, method=method, dtype=dtype, steps=20, evaluate_every=0), tmp_path / "out")
    assert artifact.kind == "lora-merged"
    assert artifact.manifest.details.rule is None
    assert artifact.manifest.config["update_rule"] is None
    assert artifact.manifest.config["lora_alpha"] == 8  # the rank
    before, after = load_file(base / "model.safetensors"), deployed(artifact.root)
    assert set(before) == set(after)
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.bfloat16
    assert not torch.equal(after[name], before[name])
    losses = artifact.manifest.details.heldout_loss
    assert losses.deployed < losses.untuned


def test_two_runs_of_one_seed_are_the_same_bits_and_another_seed_is_not(make_base, pairs, tmp_path):
    base = make_base()
    one, two, other = (
        deployed(finetune(config(base, pairs, seed=seed), tmp_path / str(i)).root) for i, seed in enumerate((0, 0, 1))
    )
    raw = lambda t: t.reshape(-1).view(torch.uint8)  # noqa: E731
    assert all(torch.equal(raw(one[n]), raw(two[n])) for n in one)
    assert any(not torch.equal(raw(one[n]), raw(other[n])) for n in one)


def test_gradient_accumulation_counts_tokens_not_batches(make_base, pairs, tmp_path):
    base = make_base()
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        changes = {"batch_size": batch_size, "gradient_accumulation": accumulation, "packing": False, "steps": 1}
        artifact = finetune(config(base, pairs, **changes, log_every=1), tmp_path / f"{accumulation}")
        first = json.loads((artifact.root / "metrics.jsonl").read_text().splitlines()[1])
        losses.append((first["loss"], first["answer_tokens"]))
    # Epochs cut into two-row batches or four-row batches hold the same rows in the same order.
    assert losses[0][1] == losses[1][1]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-2)  # bf16 activations


def test_gradient_checkpointing_changes_no_bit(make_base, pairs, tmp_path):
    base = make_base()
    plain, recomputed = (
        deployed(finetune(config(base, pairs, gradient_checkpointing=on), tmp_path / str(on)).root)
        for on in (False, True)
    )
    assert all(torch.equal(plain[n].float(), recomputed[n].float()) for n in plain)


@pytest.mark.parametrize("rate", [1e37, 1e39], ids=["loss", "parameters"])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(make_base, pairs, tmp_path, rate):
    output = tmp_path / "out"
    with pytest.raises(ConfigurationError, match="diverged") as error:
        finetune(config(make_base(), pairs, learning_rate=rate, steps=40, save_every=1, warmup_steps=5), output)
    assert error.value.exit_code == 10
    assert "learning-rate" in error.value.fix
    assert not output.exists()
    kept = list((tmp_path / "out.partial" / "checkpoints").glob("step-*"))
    assert kept or rate == 1e39
    for folder in kept:
        state = load_file(folder / "state.safetensors")
        assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())


def test_a_resumed_run_refuses_another_configuration(make_base, pairs, tmp_path):
    base, output = make_base(), tmp_path / "out"
    with pytest.raises(ConfigurationError):
        finetune(config(base, pairs, learning_rate=1e38, steps=40, save_every=1, warmup_steps=0), output)
    with pytest.raises(ConfigurationError, match="another configuration"):
        finetune(config(base, pairs), output, resume=True)
    with pytest.raises(ConfigurationError):  # neither --resume nor --force: nothing is thrown away unasked
        finetune(config(base, pairs), output)
    assert (output.with_name("out.partial") / "checkpoints" / "run.json").exists()


def test_a_run_with_8_bit_moments_cut_and_resumed_ends_with_the_bits_of_one_left_alone(
    make_base, pairs, tmp_path, monkeypatch
):
    pytest.importorskip("bitsandbytes")
    # Rank 32 makes every B of 4096 values or more: those that bitsandbytes keeps in 8 bits.
    settings = config(make_base(), pairs, optimizer="adamw-8bit", rank=32, steps=4, save_every=2, evaluate_every=4)
    finetune(settings, tmp_path / "whole")
    save = Trainer.save

    def cut(trainer):
        save(trainer)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, tmp_path / "cut")
    finetune(settings, tmp_path / "cut", resume=True)
    for name in ("model.safetensors", "adapter.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_an_existing_output_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for force, message in ((False, "exists already"), (True, "is not an artifact")):
        with pytest.raises(ConfigurationError, match=message):  # neither the model nor the data exists
            finetune(config(tmp_path / "no-model", tmp_path / "no-data"), tmp_path / "out", force=force)


def test_resuming_with_edited_data_names_the_file(make_base, pairs, tmp_path):
    base, output = make_base(), tmp_path / "out"
    diverging = config(base, pairs, learning_rate=1e38, steps=40, save_every=1, warmup_steps=0)
    with pytest.raises(ConfigurationError, match="diverged"):
        finetune(diverging, output)
    pairs.write_text(pairs.read_text() + json.dumps({"prompt": "double 99", "completion": "198"}) + "\n")
    with pytest.raises(ConfigurationError, match=r"pairs\.jsonl changed since") as error:
        finetune(diverging, output, resume=True)
    assert error.value.exit_code == 10


def test_what_travels_with_a_model_travels_into_its_artifact(make_base, pairs, tmp_path):
    from exporters.vllm.export import export_vllm
    from exporters.vllm.options import VllmExportOptions

    base = make_base()
    (base / "additional_chat_templates").mkdir()
    carried = ("LICENSE", "NOTICE.txt", "words.tiktoken", "additional_chat_templates/tool.jinja")
    for name in carried:
        (base / name).write_text(name)
    (base / "optimizer.pt").write_text("not carried")
    previous = os.umask(0o027)
    try:
        artifact = finetune(config(base, pairs, steps=1), tmp_path / "out")
        export = export_vllm(artifact.root, tmp_path / "export", VllmExportOptions())
    finally:
        os.umask(previous)
    for root in (artifact.root, export.root):
        assert [(root / name).read_text() for name in carried] == list(carried)
        assert not (root / "optimizer.pt").exists()
        assert {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_file()} == {0o640}


def _start(arguments):
    return forked("-c", "from fp8pipe.cli import main; main()", "finetune", *arguments)


def _run(arguments):
    """The same to its end, in this process: a start costs seconds."""
    ended = CliRunner().invoke(main, ["finetune", *arguments])
    assert ended.exit_code == 0, ended.output


def _modified(path):
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["live", pytest.param("accumulate-stochastic", marks=only_long)])
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_left_alone(make_base, pairs, tmp_path, rule):
    base = make_base()
    common = [
        "--model", str(base), "--data", str(pairs), "--rank", "8", "--batch-size", "2",
        "--sequence-length", "64", "--steps", str(usual(120, long=240)),
        "--save-every", "3", "--evaluate-every", "10", "--learning-rate", "1e-2",
        "--update-rule", rule, "--seed", "5",
    ]  # fmt: skip
    _run([*common, "--output", str(tmp_path / "whole")])
    output = tmp_path / "killed"
    partial = tmp_path / "killed.partial"
    draw, kills = random.Random(rule), 0
    while kills < usual(4, long=10) and not output.exists():
        before = _modified(partial / "metrics.jsonl")
        process = _start([*common, "--output", str(output), "--resume"])
        # A run that goes on rewrites its metrics first: from there on it trains, saves, or merges.
        while _modified(partial / "metrics.jsonl") == before and process.is_alive():
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.8))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3
    if not output.exists():
        _run([*common, "--output", str(output), "--resume"])
    one, two = deployed(tmp_path / "whole"), deployed(output)
    assert all(torch.equal(one[n].reshape(-1).view(torch.uint8), two[n].reshape(-1).view(torch.uint8)) for n in one)
    assert (tmp_path / "whole" / "adapter.safetensors").read_bytes() == (output / "adapter.safetensors").read_bytes()


def test_resuming_where_the_template_renders_another_date_is_refused_with_the_reason(make_base, pairs, tmp_path):
    base, output = make_base(), tmp_path / "out"
    template = "{{ strftime_now('%H%M%S%f') }} {% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    diverging = config(base, pairs, learning_rate=1e38, steps=40, save_every=1, warmup_steps=0)
    with pytest.raises(ConfigurationError, match="diverged"):
        finetune(diverging, output)
    with pytest.raises(ConfigurationError, match="is encoded differently than when the run") as error:
        finetune(diverging, output, resume=True)
    assert error.value.exit_code == 10
    assert "strftime_now" in error.value.why
