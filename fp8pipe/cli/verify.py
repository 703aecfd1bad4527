"""`fp8pipe verify`: is everything in a directory what was written, and what its parents say it must be?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import Console, common_options
from fp8pipe.core.errors import BadArtifactError

if TYPE_CHECKING:
    from fp8pipe.artifact.finding import Finding
    from fp8pipe.artifact.tree import Tree
    from fp8pipe.artifact.verify import Checked


class VerificationError(BadArtifactError):
    """Something is not what it should be.

    Attributes:
        findings: all of them.
    """

    def __init__(self, directory: Path, findings: list[Finding]) -> None:
        self.findings = tuple(findings)
        places = [found.artifact for found in findings]
        lines = [f"{place}: {found}" for place, found in zip(places, findings, strict=True)]
        super().__init__(
            f"{directory} is not what it should be: {len(findings)} finding(s)",
            why="\n       ".join(lines),
            fix="copy what is damaged again from its source, or write it again",
        )


@click.command("verify")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--parents",
    "parents",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Where parents may lie that are not in DIRECTORY: an artifact, a tree of them, or a model. May be repeated.",
)
@click.option("--quick", is_flag=True, help="Hashes, checksums and records only; contents are not looked at.")
@click.option("--strict", is_flag=True, help="Files that no record covers are findings too.")
@click.option("--public-key", type=click.Path(path_type=Path), help="Check the signature with this key, PEM.")
@click.option(
    "--certificate",
    "certificates",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Check the signature with this trusted root, PEM. May be repeated.",
)
@click.option("--signature", type=click.Path(path_type=Path), help="The signature.  [default: DIRECTORY.sig]")
@common_options()
def command(
    directory: Path,
    parents: tuple[Path, ...],
    quick: bool,
    strict: bool,
    public_key: Path | None,
    certificates: tuple[Path, ...],
    signature: Path | None,
    console: Console,
) -> None:
    """Hash everything in DIRECTORY again, and repeat the cheap gates; exit 12 when anything is found.

    DIRECTORY is an artifact, the directory of a run, or any tree that holds some. Every file is hashed, every checksum
    and record checked, every linter run. Where an artifact's parent is in the same tree, or given with --parents, all
    numbers and files are compared with it.
    """  # fmt: skip
    from exporters.verify.whole import verify_tree
    from fp8pipe.artifact.tree import find_tree
    from fp8pipe.core.progress import track

    tree = find_tree(directory)
    if not tree.artifacts and not tree.records:
        raise BadArtifactError(
            f"{directory} is not an artifact, and holds none",
            why="no manifest.json and no record was found in it",
            fix="give the directory that a finished command wrote",
        )
    with track(_count(tree), "verify") as progress:
        checked, compared = verify_tree(
            tree, parents, quick=quick, strict=strict, on_file=lambda entry: progress.advance(1)
        )
    if public_key is not None or certificates:
        checked.findings += _signature(directory, signature, public_key, certificates)
    elif signature is not None:
        raise click.UsageError("--signature needs --public-key or --certificate")
    console.emit(_document(tree, checked, compared, quick), _text(tree, checked, compared, quick),
                 quiet_text=str(directory))  # fmt: skip
    if checked.findings:
        raise VerificationError(directory, checked.findings)


def _signature(
    directory: Path, signature: Path | None, public_key: Path | None, certificates: tuple[Path, ...]
) -> list[Finding]:
    from fp8pipe.artifact.finding import Check, Finding
    from fp8pipe.artifact.signature import check_signature, signature_path

    place = signature_path(directory) if signature is None else signature
    wrong = check_signature(directory, place, public_key=public_key, certificates=certificates)
    return [Finding(Check.SIGNATURE, place.name, wrong, artifact=directory.name)] if wrong else []


def _count(tree: Tree) -> int:
    from fp8pipe.artifact import read_manifest

    total = 0
    for root in tree.artifacts:
        try:
            total += len(read_manifest(root).files)
        except (BadArtifactError, OSError):
            continue
    return total


def _document(tree: Tree, checked: Checked, compared: list[tuple[str, str]], quick: bool) -> dict[str, Any]:
    return {
        "path": str(tree.root),
        "verified": not checked.findings,
        "quick": quick,
        "files": checked.files,
        "artifacts": [
            {"path": tree.name_of(a.root), "kind": a.kind, "digest": a.digest, "unlisted_files": a.unlisted()}
            for a in checked.artifacts
        ],
        "records": [tree.name_of(path) for path in tree.records],
        "compared": [{"artifact": child, "parent": parent} for child, parent in compared],
        "findings": [
            {"artifact": f.artifact, "check": str(f.check), "where": f.where, "why": f.why} for f in checked.findings
        ],
        "notes": checked.notes,
    }


def _text(tree: Tree, checked: Checked, compared: list[tuple[str, str]], quick: bool) -> str:
    names = {child: parent for child, parent in compared}
    lines = [f"{tree.root}: {checked.files} files hashed, {len(tree.artifacts)} artifact(s), "
             f"{len(tree.records)} record(s)"]  # fmt: skip
    for artifact in checked.artifacts:
        shown = tree.name_of(artifact.root)
        against = f", compared with {names[shown]}" if shown in names else ""
        lines.append(f"  {shown}: {artifact.kind}, digest {artifact.digest}{against}")
    lines += [f"  note: {note}" for note in checked.notes]
    if not checked.findings:
        lines.append("all as written" + (" (contents not looked at)" if quick else ""))
    return "\n".join(lines)
