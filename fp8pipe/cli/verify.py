"""`fp8pipe verify`, `sign` and `push`: check a directory's integrity and signatures, sign it, and upload it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.artifact.signature import Trust
from fp8pipe.cli.common import PATH, Console, common_options, format_bytes, table
from fp8pipe.cli.options import model_options, resolve
from fp8pipe.core.errors import BadArtifactError, ConfigurationError

if TYPE_CHECKING:
    from fp8pipe.artifact.finding import Finding
    from fp8pipe.artifact.verify import Checked, Tree


class VerificationError(BadArtifactError):
    """Verification found problems.

    Attributes:
        findings: all problems found.
    """

    def __init__(self, directory: Path, findings: list[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__(
            f"{directory} is not what it should be: {len(findings)} finding(s)",
            why="\n       ".join(f"{found.artifact}: {found}" for found in findings),
            fix="copy what is damaged again from its source, or write it again",
        )


@click.command("verify")
@click.argument("directory", type=PATH)
@click.option(
    "--parents", multiple=True, type=PATH,
    help="Where a parent is now, if it was moved: an artifact, a directory of artifacts, or a model. May be repeated.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Hashes, checksums and records only; contents are not looked at.")
@click.option("--strict", is_flag=True, help="Files that no record covers are findings too.")
@model_options(Trust)
@common_options()
def verify_command(
    directory: Path, parents: tuple[Path, ...], quick: bool, strict: bool, console: Console, **trusted: Any
) -> None:
    """Hash everything in DIRECTORY again, and repeat the cheap gates; exit 12 if there are findings.

    DIRECTORY is an artifact, the directory of a run, or any directory that contains artifacts. Every file is hashed,
    every checksum and record is checked, and every linter is run. If the parent of an export is in the same tree, at
    the path recorded in the manifest, beside the export or given with --parents, all values and files are compared with
    it; a note says which exports have no such parent.
    """
    from exporters.verify.whole import verify_tree
    from fp8pipe.artifact.verify import find_tree
    from fp8pipe.core.progress import track

    trust = resolve(Trust, None, trusted)
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
    checked.findings += trust.findings(directory, tree.beside)
    console.emit(_document(tree, checked, compared, quick), _text(tree, checked, compared, quick),
                 quiet_text=str(directory))  # fmt: skip
    if checked.findings:
        raise VerificationError(directory, checked.findings)


def _count(tree: Tree) -> int:
    """Number of files to hash, for the progress display."""
    from fp8pipe.artifact import read_manifest

    total = 0
    for root in tree.artifacts:
        with contextlib.suppress(BadArtifactError, OSError):
            total += len(read_manifest(root).files)
    return total


def _document(tree: Tree, checked: Checked, compared: list[tuple[str, str]], quick: bool) -> dict[str, Any]:
    return {
        "path": str(tree.root),
        "verified": not checked.findings,
        "quick": quick,
        "files": checked.files,
        "artifacts": [{"path": tree.name_of(a.root), "kind": a.kind, "digest": a.digest} for a in checked.artifacts],
        "records": [tree.name_of(path) for path in tree.records],
        "compared": [{"artifact": child, "parent": parent} for child, parent in compared],
        "findings": [
            {"artifact": f.artifact, "check": str(f.check), "where": f.where, "why": f.why} for f in checked.findings
        ],
        "notes": checked.notes,
    }


def _text(tree: Tree, checked: Checked, compared: list[tuple[str, str]], quick: bool) -> str:
    names = dict(compared)
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


@click.command("sign")
@click.argument("directory", type=PATH)
@click.option("--key", type=PATH, required=True, help="Private key of an elliptic curve, PEM.")
@click.option("--password-file", type=PATH, help="File that holds the key's password.")
@click.option("--certificate", type=PATH, help="Certificate of the key, PEM, to be checked by certificates.")
@click.option("--chain", type=PATH, multiple=True, help="Certificate between it and a root. May be repeated.")
@click.option("--output", type=PATH, help="Where the directory's signature is written.  [default: DIRECTORY.sig]")
@common_options()
def sign_command(
    directory: Path, key: Path, password_file: Path | None, certificate: Path | None, chain: tuple[Path, ...],
    output: Path | None, console: Console,
) -> None:  # fmt: skip
    """Sign every file in DIRECTORY, after verifying the directory; works offline.

    Records next to an artifact are signed, too: the signature of RECORD is written to RECORD.sig. To check the
    signatures, run: fp8pipe verify DIRECTORY --public-key KEY.pub
    """
    from fp8pipe.artifact.signature import sign, signature_path
    from fp8pipe.artifact.verify import check_bytes, find_tree

    try:
        password = None if password_file is None else password_file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{password_file} cannot be read", why=str(error), fix="give the path of a readable text file"
        ) from error
    tree = find_tree(directory)
    found = check_bytes(tree).findings
    if found:
        raise BadArtifactError(
            f"{directory} is damaged, and is not signed", why="; ".join(map(str, found)), fix="fp8pipe verify lists all"
        )
    places = {directory: output or signature_path(directory)} | {path: signature_path(path) for path in tree.beside}
    for path, place in places.items():
        sign(path, place, key=key, certificate=certificate, chain=chain, password=password)
    signed = list(map(str, places.values()))
    document = {"path": str(directory), "signature": signed[0], "records": signed[1:]}
    console.emit(document, "\n".join(f"signed: {place}" for place in signed), quiet_text=signed[0])


@click.command("push")
@click.argument("directory", type=PATH)
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="A private repository; refuse a public one.")
@click.option("--revision", help="An existing branch to commit to.")
@click.option("--create-pr", is_flag=True, help="Propose the upload as a pull request.")
@click.option("--unvalidated", is_flag=True, help="Push an export without an ACCEPT; a rejected one is still refused.")
@model_options(Trust)
@common_options(dry_run=True)
def push_command(
    directory: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool, unvalidated: bool,
    dry_run: bool, console: Console, **trusted: Any,
) -> None:  # fmt: skip
    """Hash DIRECTORY, and upload it to the repository REPO_ID of the Hugging Face hub.

    An artifact is refused with exit code 12 if a file differs from the manifest, its record is invalid, or, with a key,
    a signature of either does not match; and with exit code 14 if a gate failed or no validation accepted it. The token
    comes from HF_TOKEN or from `hf auth login`, never from the command line.
    """
    from fp8pipe.artifact.push import Target, plan_push, push

    plan = plan_push(directory, unvalidated=unvalidated, trust=resolve(Trust, None, trusted))
    document = {
        "dry_run": dry_run, "path": str(plan.artifact.root), "kind": plan.artifact.kind, "repo_id": repo_id,
        "digest": plan.artifact.digest, "size_bytes": plan.size_bytes, "notes": list(plan.notes),
        "files": [{"path": name, "size": size} for name, size in plan.files],
    }  # fmt: skip
    rows = [(name, format_bytes(size)) for name, size in plan.files]
    listed = "\n".join([table(rows), *(f"  note: {note}" for note in plan.notes)])
    if dry_run:
        text = f"would upload {len(rows)} files, {format_bytes(plan.size_bytes)}, to {repo_id}\n{listed}"
        console.emit(document, text, quiet_text=repo_id)
        return
    address = push(plan, Target(repo_id, private, revision, create_pr))
    text = f"{address}: {len(rows)} files, {format_bytes(plan.size_bytes)} (digest {plan.artifact.digest})\n{listed}"
    console.emit(document | {"url": address}, text, quiet_text=address)
