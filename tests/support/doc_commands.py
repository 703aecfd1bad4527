"""The shell commands that a Markdown document shows, and their running: a line that does not work must fail a test."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```\s*$", re.M | re.S)
_SHELLS = {"sh", "bash", "shell", "console"}


@dataclass(frozen=True)
class ShellCommand:
    """One command.

    Attributes:
        text: as it would be typed; continued lines are kept as they are, prompts and comments at its end are not.
        line: where it begins in the document, from 1.
        block: the number of its fence, from 0: commands of one fence belong together.
    """

    text: str
    line: int
    block: int


def shell_commands(document: Path, beginning: str = "") -> list[ShellCommand]:
    """Commands in fences of sh, bash, shell or console, in their order.

    Args:
        document: Markdown.
        beginning: only those that begin with this word.

    In a console fence, lines without a `$ ` prompt are output, but for the continuations of a command.
    """
    text = document.read_text(encoding="utf-8")
    found = []
    for block, fence in enumerate(match for match in _FENCE.finditer(text) if match["language"] in _SHELLS):
        first = text.count("\n", 0, fence.start("body")) + 1
        found += _commands(fence["body"], len(fence["indent"]), first, block, fence["language"] == "console")
    return [command for command in found if not beginning or command.text.split()[0] == beginning]


def run_command(
    command: ShellCommand, cwd: Path, replacing: Mapping[str, str], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run one command in bash, as a reader would.

    Args:
        command: from `shell_commands`.
        cwd: where; holds the files that the command names.
        replacing: texts of the command and what stands for them here, such as the address of the server.
        variables: of the environment, such as KEY.

    Proxies of the environment are left out: the server is on this machine.
    """
    text = command.text
    for old, new in replacing.items():
        text = text.replace(old, new)
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=cwd, env=environment | variables, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def _commands(body: str, indent: int, first: int, block: int, console: bool) -> list[ShellCommand]:
    found: list[ShellCommand] = []
    lines = [line[indent:] for line in body.split("\n")]
    number = 0
    while number < len(lines):
        begin, line = number, lines[number]
        number += 1
        if console and not line.startswith("$ "):
            continue
        parts = [line.removeprefix("$ ") if console else line]
        while parts[-1].endswith("\\") and number < len(lines):
            parts.append(lines[number])
            number += 1
        text = re.sub(r"\s{2,}#.*$", "", "\n".join(parts)).strip()
        if text and not text.startswith("#"):
            found.append(ShellCommand(text, first + begin, block))
    return found
