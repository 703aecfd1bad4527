"""A real vLLM on a tiny export behind the language server, through the official client: the API, a killed engine."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from services import Running, ready, running, wait_until

from exporters.vllm.environment import find_vllm_python
from fp8pipe.core.errors import MissingCapabilityError
from serving.http.admission import hash_key, new_key

SERVE = """
import sys
from pathlib import Path
from fp8pipe.core.progress import setup_logging
from serving.config import LanguageConfig, ServeConfig
from serving.language.server import serve_language
setup_logging(json=False, quiet=False, verbose=False)
language = LanguageConfig(enforce_eager=True, max_num_seqs=8)
service = ServeConfig(port=0, unvalidated=True, api_key_file=Path(sys.argv[2]))
sys.exit(serve_language(Path(sys.argv[1]), service, language))
"""
KEY = new_key()

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def service(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    try:
        find_vllm_python()
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(hash_key(KEY, "tests") + "\n", encoding="utf-8")
    with running("-c", SERVE, str(export), str(keys)) as found:
        wait_until(lambda: ready(found), 500)
        yield found


@pytest.fixture
def client(service: Running) -> openai.OpenAI:
    plain = httpx.Client(trust_env=False, timeout=120)
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0, http_client=plain)


def test_chat_completions_and_streaming(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    question = [{"role": "user", "content": "Hello"}]
    whole = client.chat.completions.create(model="tiny", messages=question, max_tokens=8, temperature=0)
    parts = client.chat.completions.create(model="tiny", messages=question, max_tokens=8, temperature=0, stream=True)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert streamed == whole.choices[0].message.content
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=5, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 5


def test_wrong_keys_and_bad_input_are_the_clients(service: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="Hello")
    with service.client(Authorization=f"Bearer {KEY}") as plain:
        for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"model": "tiny"}', b'{"model": "tiny", "messages": 3}'):
            reply = plain.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert 400 <= reply.status_code < 500, body
        for path in ("/v1/../../etc/passwd", "/v1/%00", "/nothing", "/v1/chat/completions"):
            assert 400 <= plain.get(path).status_code < 500, path


def test_metrics_hold_vllms_and_ours(service: Running) -> None:
    with service.client(Authorization=f"Bearer {KEY}") as plain:
        families = {family.name for family in text_string_to_metric_families(plain.get("/metrics").text)}
    assert {"fp8pipe_requests", "fp8pipe_artifact_info", "vllm:num_requests_running"} <= families


def _engine(service: Running) -> int:
    """The process id of vLLM's engine, a descendant of the service."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            continue
        parents[int(path.parent.name)] = (int(text.rsplit(")", 1)[1].split()[1]), text)
    for pid, (_, text) in parents.items():
        above = pid
        while above in parents and above != service.process.pid:
            above = parents[above][0]
        if above == service.process.pid and "EngineCor" in text:
            return pid
    raise AssertionError("no engine below the service")


def test_a_killed_engine_comes_back(service: Running, client: openai.OpenAI) -> None:
    os.kill(_engine(service), signal.SIGKILL)
    seen = set()

    def again() -> bool:
        try:
            client.completions.create(model="tiny", prompt="Hello", max_tokens=2)
        except openai.APIStatusError as error:
            seen.add((error.status_code, int(error.response.headers.get("retry-after", 0)) >= 1))
            return False
        return bool(seen)

    wait_until(again, 500)
    assert seen == {(503, True)}


def test_an_export_that_was_changed_is_refused(export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(export, copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with running("-m", "fp8pipe", "serve", str(copy), "--port", "0", "--unvalidated") as service:
        assert service.process.wait(60) == 12
    assert "sha256" in "".join(service.lines)
