"""Engines as caches, with the real builder: taken where they fit, built again with a notice where they do not."""

from __future__ import annotations

import json
import shutil

import pytest
from quantized_families import quantized_family, storable, write_vit_artifact

from exporters.tensorrt import engine_cache
from exporters.tensorrt.engine_cache import EngineSource, ready_engine
from exporters.tensorrt.export import export_tensorrt
from exporters.tensorrt.listing import read_precision
from exporters.tensorrt.program import read_program
from exporters.tensorrt.recipe import EngineRecipe, cache_folder
from exporters.tensorrt.target import TrtExportOptions
from fp8pipe.artifact import MANIFEST_NAME, open_artifact, sha256_file, write_checked
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
from fp8pipe.numerics.kinds import Kind

ENGINE = "engines/rtx-8.9.engine"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("tensorrt_rtx")
    place = tmp_path_factory.mktemp("exports")
    quantized = storable(quantized_family("timm-vit", bits=8, kind=Kind.E4M3))
    artifact = write_vit_artifact(place / "model", quantized, images=4)
    roots = {}
    for name, pack in (("plain", False), ("packed", True)):
        options = {"compute_capabilities": ["8.9"], "batch": [1, 2, 4], "pack": pack}
        roots[name] = export_tensorrt(artifact.root, place / name, build_config(TrtExportOptions, options)).root
    return roots


@pytest.fixture
def export(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(exported["plain"], tmp_path / "export")


@pytest.fixture
def notices():
    return []


def test_an_engine_that_fits_is_taken_as_it_is(export, notices):
    ready = ready_engine(export, "8.9", on_build=notices.append)
    assert (ready.path, ready.source, ready.reasons) == (export / ENGINE, EngineSource.EXPORT, ())
    assert not notices
    assert not cache_folder().exists()


def _missing(root):
    (root / ENGINE).unlink()


def _damaged(root):
    content = bytearray((root / ENGINE).read_bytes())
    content[len(content) // 2] ^= 1
    (root / ENGINE).write_bytes(content)


def _edited(root, change):
    """An export as another machine, or an earlier version, would have written it."""
    path = root / MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data["details"]["engines"]["8.9"]["recipe"])
    write_checked(path, json.dumps(data))


def _older(root):
    _edited(root, lambda recipe: recipe.update(version="1.0.0.1"))


def _other_graph(root):
    _edited(root, lambda recipe: recipe.update(graph_sha256="0" * 64))


def _other_settings(root):
    _edited(root, lambda recipe: recipe["settings"].update(profiling_verbosity="NONE"))


def _without_recipe(root):
    path = root / MANIFEST_NAME
    data = json.loads(path.read_text())
    del data["details"]["engines"]["8.9"]["recipe"]
    data["config"].pop("enterprise", None)
    write_checked(path, json.dumps(data))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing, "rtx-8.9.engine is missing"), (_damaged, "sha256"), (_older, "TensorRT for RTX 1.0.0.1, but"),
        (_other_graph, "its graph is another"), (_other_settings, "other settings"),
        (_without_recipe, "did not record what its engines were built from"),
    ],
)  # fmt: skip
def test_one_that_does_not_fit_is_built_again_beside_the_export(export, exported, notices, spoil, words):
    good = (export / ENGINE).read_bytes()
    spoil(export)
    before = {path: sha256_file(path) for path in export.rglob("*") if path.is_file()}
    ready = ready_engine(export, "8.9", on_build=notices.append)
    assert ready.source is EngineSource.BUILT
    assert len(notices) == 1
    assert words in notices[0]
    assert ready.path.read_bytes() == good  # the builder is deterministic
    assert ready.precisions == {"fp8": sum(ready.precisions.values())}
    assert {path: sha256_file(path) for path in export.rglob("*") if path.is_file()} == before
    again = ready_engine(export, "8.9", on_build=notices.append)
    assert (again.source, again.path, again.precisions) == (EngineSource.CACHE, ready.path, ready.precisions)
    assert len(notices) == 1


def test_another_gpu_gets_an_engine_of_its_own(export, notices):
    ready = ready_engine(export, "12.0", on_build=notices.append)
    assert ready.source is EngineSource.BUILT
    assert "has no engine for compute capability 12.0" in notices[0]
    assert ready.recipe.capability == "12.0"
    with pytest.raises(ConfigurationError, match=r"9\.0"):
        ready_engine(export, "9.0", on_build=notices.append)


def test_a_damaged_cache_is_not_believed(export, notices):
    _missing(export)
    path = ready_engine(export, "8.9", on_build=notices.append).path
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert ready_engine(export, "8.9", on_build=notices.append).path.read_bytes() == content
    path.with_suffix(".json").write_text("{}")
    assert ready_engine(export, "8.9", on_build=notices.append).source is EngineSource.BUILT
    assert len(notices) == 3
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".engine", ".json"]  # nothing half done is left


def test_packed_engines_are_unpacked_into_the_cache(exported, notices, tmp_path, monkeypatch):
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    entry = open_artifact(exported["packed"]).manifest.details.engines["8.9"]
    assert entry.engine.endswith(".engine.xz")
    assert entry.stored_bytes < entry.engine_bytes / 4
    ready = ready_engine(exported["packed"], "8.9", on_build=notices.append)
    assert ready.source is EngineSource.EXPORT
    assert ready.path.read_bytes() == (exported["plain"] / ENGINE).read_bytes()
    assert ready_engine(exported["packed"], "8.9").path == ready.path
    assert not notices


def test_another_engine_of_the_cache_is_never_taken_for_the_export_s_own(exported, notices, tmp_path, monkeypatch):
    """One of the same recipe and of other bytes, as another version of this project may have built it."""
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    own = ready_engine(exported["packed"], "8.9", on_build=notices.append)
    other = cache_folder() / f"{own.recipe.digest[:32]}.engine"
    other.write_bytes(b"another engine")
    record = json.loads(own.path.with_suffix(".json").read_text())
    other.with_suffix(".json").write_text(json.dumps({**record, "sha256": sha256_file(other)}))
    ready = ready_engine(exported["packed"], "8.9", on_build=notices.append)
    assert (ready.source, ready.path) == (EngineSource.EXPORT, own.path)
    assert ready.path.read_bytes() == (exported["plain"] / ENGINE).read_bytes()


def test_what_an_engine_multiplies_is_read_from_its_bytes(exported, tmp_path):
    entry = open_artifact(exported["plain"]).manifest.details.engines["8.9"]
    products = json.loads((exported["plain"] / "layers.json").read_text())["8.9"]["products"]
    report = read_precision([product["node"] for product in products], read_program(exported["plain"] / ENGINE))
    assert report.counts() == entry.precisions
    assert [product.operands for product in report.products] == [tuple(product["operands"]) for product in products]
    (tmp_path / "no.engine").write_bytes(b"no engine at all")
    with pytest.raises(BadArtifactError, match="no program"):
        read_program(tmp_path / "no.engine")


def test_a_changed_graph_is_no_stale_engine_but_a_damaged_export(export):
    graph = export / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(BadArtifactError, match=r"model\.onnx"):
        ready_engine(export, "8.9")


def test_without_a_builder_whole_engines_serve_and_others_say_what_is_missing(export, monkeypatch):
    from exporters.tensorrt import builder

    monkeypatch.setattr(engine_cache, "installed_builder", lambda builder: None)
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    assert ready_engine(export, "8.9").source is EngineSource.EXPORT
    _missing(export)
    with pytest.raises(MissingCapabilityError, match="trt-rtx"):
        ready_engine(export, "8.9")


def test_recipes_name_what_differs():
    one = EngineRecipe(
        builder="rtx", version="1", capability="8.9", graph_sha256="a" * 64,
        profiles={"x": ((1,), (2,), (3,))}, settings={},
    )  # fmt: skip
    assert one.differences(one) == ()
    changes = {
        "builder": "enterprise", "version": "2", "capability": "8.6", "graph_sha256": "b" * 64,
        "profiles": {"x": ((1,), (2,), (4,))}, "settings": {"flags": ["REFIT"]},
    }  # fmt: skip
    assert set(changes) == set(EngineRecipe.model_fields)  # a new field must count, too
    for key, value in changes.items():
        other = one.model_copy(update={key: value})
        assert len(one.differences(other)) == 1
        assert one.digest != other.digest
