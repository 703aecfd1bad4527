"""Nodes of one model tell by digests whether they run vLLM in the same way, and by how they do not."""

from __future__ import annotations

from serving.language.sameness import differences, digests


def test_what_only_one_node_has_is_a_difference_too() -> None:
    here = {"vllm": "1", "settings": "--dtype float32"}
    there = {"vllm": "6b86b273ff34fce1", "torch": "d4735e3a265e16ee"}  # of "1" and "2", by sha256sum
    assert differences(here, there) == ["settings --dtype float32", "torch (none)"]
    assert digests({"vllm": "1", "torch": "2"}) == there
    assert differences({"vllm": "1", "torch": "2"}, there) == []
    assert differences({"vllm": "2", "torch": "2"}, there) == ["vllm 2"]
