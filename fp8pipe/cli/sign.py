"""`fp8pipe sign`: a signature of a directory, by the user's own key."""

from __future__ import annotations

from pathlib import Path

import click

from fp8pipe.cli.common import Console, common_options

PathArgument = click.Path(path_type=Path)


@click.command("sign")
@click.argument("directory", type=PathArgument)
@click.option("--key", type=PathArgument, required=True, help="Private key of an elliptic curve, PEM.")
@click.option("--password-file", type=PathArgument, help="File that holds the key's password.")
@click.option("--certificate", type=PathArgument, help="Certificate of the key, PEM, to be checked by certificates.")
@click.option("--chain", type=PathArgument, multiple=True, help="Certificate between it and a root. May be repeated.")
@click.option("--output", type=PathArgument, help="Where the signature is written.  [default: DIRECTORY.sig]")
@common_options()
def command(
    directory: Path, key: Path, password_file: Path | None, certificate: Path | None, chain: tuple[Path, ...],
    output: Path | None, console: Console,
) -> None:  # fmt: skip
    """Sign every file in DIRECTORY, which is verified first; works offline.

    Check with: fp8pipe verify DIRECTORY --public-key KEY.pub
    """
    from fp8pipe.artifact.signature import sign_directory, signature_path
    from fp8pipe.artifact.tree import find_tree
    from fp8pipe.artifact.verify import check_bytes
    from fp8pipe.core.errors import BadArtifactError, ConfigurationError

    try:
        password = None if password_file is None else password_file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{password_file} cannot be read", why=str(error), fix="name the file") from error
    found = check_bytes(find_tree(directory)).findings
    if found:
        raise BadArtifactError(
            f"{directory} is damaged, and is not signed", why="; ".join(map(str, found)), fix="fp8pipe verify lists all"
        )
    place = signature_path(directory) if output is None else output
    sign_directory(directory, place, key=key, certificate=certificate, chain=chain, password=password)
    console.emit({"path": str(directory), "signature": str(place)}, f"signed: {place}", quiet_text=str(place))
