"""`fp8pipe verify` on a whole tree: nothing is found in what the commands wrote, and what is not checked is said."""

from __future__ import annotations

import json

from click.testing import CliRunner

from fp8pipe.cli import main


def verify(*arguments: object):
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_nothing_is_found_in_what_was_written(whole_tree):
    ended = verify(whole_tree, "--json", "--strict")
    assert ended.exit_code == 0, ended.output
    document = json.loads(ended.stdout)
    assert document["verified"]
    assert document["findings"] == []
    assert len(document["artifacts"]) == 8
    assert {pair["artifact"] for pair in document["compared"]} == {"vllm", "modelopt", "decoder", "onnx", "trt"}
