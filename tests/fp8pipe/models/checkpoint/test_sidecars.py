"""The files that travel with weights: the same ones at all three doors."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.sidecars import BASE_MODEL_FILES, HUB_FILES, SERVED_FILES, read_config, sidecar_files

CARRIED = (
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "qwen.tiktoken",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)
LEFT = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "tokenizer.bin",
    "manifest.json",
    "manifest.sha256",
    "plot.png",
    "notes/LICENSE",
)


@pytest.mark.parametrize("patterns", [SERVED_FILES, BASE_MODEL_FILES])
def test_files_found_in_a_directory(tmp_path: Path, patterns: tuple[str, ...]) -> None:
    for name in (*CARRIED, *LEFT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [str(path) for path in sidecar_files(tmp_path, patterns)] == sorted(CARRIED)


def test_a_download_brings_all_of_them() -> None:
    for name in CARRIED:  # huggingface_hub matches whole paths with fnmatch
        assert any(fnmatch(name, pattern) for pattern in HUB_FILES), name


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"text_config": {"a": 1, "a": 2}}'])
def test_a_configuration_that_gives_a_key_twice_is_refused(tmp_path: Path, text: str) -> None:
    """JSON does not say which of the two counts, and Python's parser keeps the last in silence."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match="occur twice, the first: a"):
        read_config(tmp_path / "config.json")
