"""`fp8pipe verify`: re-hash an artifact, so that a copied or stored one is known to be what was written."""

from __future__ import annotations

from pathlib import Path

import click

from fp8pipe.cli.common import Console, common_options, format_bytes


@click.command("verify")
@click.argument("artifact", type=click.Path(path_type=Path))
@common_options()
def command(artifact: Path, console: Console) -> None:
    """Re-hash every file of ARTIFACT against its manifest; exit 12 when one differs."""
    from fp8pipe.artifact import open_artifact
    from fp8pipe.progress import track

    listed = open_artifact(artifact, verify=False)
    with track(len(listed.manifest.files), "verify") as progress:
        opened = open_artifact(artifact, verify=True, on_file=lambda entry: progress.advance(1))
    unlisted = opened.unlisted()
    text = (
        f"{opened.root}: {len(opened.manifest.files)} files, {format_bytes(opened.size_bytes)}, "
        f"all as written (digest {opened.digest})"
    )
    text += "".join(f"\n  not listed in the manifest: {name}" for name in unlisted)
    document = {
        "path": str(opened.root),
        "kind": opened.kind,
        "digest": opened.digest,
        "files": len(opened.manifest.files),
        "size_bytes": opened.size_bytes,
        "verified": True,
        "unlisted_files": unlisted,
    }
    console.emit(document, text, quiet_text=str(opened.root))
