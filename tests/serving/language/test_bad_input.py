"""Hostile requests against the real front over the stub: nothing hangs, nothing breaks, nobody gets past the keys."""

from __future__ import annotations

from pathlib import Path

from script_modules import load_script
from services import ROOT, ready, running, wait_until

from serving.http.admission import hash_key, new_key

STUB = str(Path(__file__).with_name("serve_stub.py"))


def test_a_fuzzer_finds_nothing(export: Path, tmp_path: Path) -> None:
    fuzzer, key = load_script(ROOT / "benchmarks" / "fuzz_language.py"), new_key()
    (tmp_path / "keys").write_text(hash_key(key, "fuzz") + "\n", encoding="utf-8")
    with running(STUB, str(export), str(tmp_path), str(tmp_path / "keys")) as service:
        wait_until(lambda: ready(service))
        memory = lambda: fuzzer.resident_mb(service.process.pid)  # noqa: E731
        found = fuzzer.fuzz(service.url, 300, 1, key, "stub", memory)
        assert found["faults"] == []
        assert found["slow_loris_ended"] == 20
        assert {"200", "400", "401", "413"} <= set(found["statuses"])
        # The fuzzer can fail: with another key than the service's, what it takes for authorized is not.
        refused = fuzzer.fuzz(service.url, 50, 1, new_key(), "stub", memory)
        assert "200" not in {status for status in refused["statuses"] if refused["statuses"][status] > 10}
