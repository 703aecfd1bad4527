"""`fp8pipe serve-key`: a new API key, and the line that admits it."""

from __future__ import annotations

import click

from fp8pipe.cli.common import Console, common_options


@click.command("serve-key")
@click.argument("name", default="")
@common_options()
def command(name: str, console: Console) -> None:
    """Make an API key for NAME. The key is shown once; its line goes into the file of --api-key-file."""
    from fp8pipe.core.errors import ConfigurationError
    from serving.http.admission import hash_key, is_name, new_key

    if name and not is_name(name):
        raise ConfigurationError(
            f"{name!r} cannot name a key", why="letters, digits and _.@- only", fix="choose another"
        )
    key = new_key()
    line = hash_key(key, name)
    console.emit({"key": key, "line": line}, f"key:  {key}\nline: {line}", quiet_text=key)
