"""`fp8pipe push`: an artifact to a repository of the hub."""

from __future__ import annotations

from pathlib import Path

import click

from fp8pipe.cli.common import Console, common_options, format_bytes, table


@click.command("push")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="A private repository; refuse a public one.")
@click.option("--revision", help="An existing branch to commit to.")
@click.option("--create-pr", is_flag=True, help="Propose the upload as a pull request.")
@common_options(dry_run=True)
def command(
    directory: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool, dry_run: bool, console: Console
) -> None:
    """Hash DIRECTORY, and upload it to the hub's repository REPO_ID.

    An artifact is refused if a file differs (exit 12) or a gate failed (14). The token comes from HF_TOKEN or from
    `hf auth login`, never from the command line.
    """
    from fp8pipe.artifact.push import Target, plan_push, push

    plan = plan_push(directory)
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
