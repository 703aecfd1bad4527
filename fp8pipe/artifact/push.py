"""Uploads an artifact to a repository on the Hugging Face Hub, after hashing its files and checking gates and verdict.

Only the manifest, its checksum and the files listed in the manifest are uploaded. The upload is done by huggingface_hub
and skips files that the hub already has, so that an interrupted upload can be repeated.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fp8pipe.artifact import MANIFEST_NAME, Artifact, checksum_path, open_artifact
from fp8pipe.artifact.gate import failures
from fp8pipe.artifact.kinds import kind_named
from fp8pipe.artifact.record import record_path
from fp8pipe.artifact.signature import Trust
from fp8pipe.artifact.verdict import REJECT, read_verdict, require_accept
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError, MissingCapabilityError, one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["PushPlan", "Target", "plan_push", "push"]


@dataclass(frozen=True, slots=True)
class Target:
    """The destination of an upload."""

    repo_id: str  # `organisation/name`, or `name` for a repository of the user's own
    private: bool = False  # the repository must be private; a new one is created as private
    revision: str | None = None  # an existing branch; None means the main branch
    create_pr: bool = False  # open a pull request instead of committing to the branch


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What would be uploaded."""

    artifact: Artifact  # the artifact, whose files have been hashed and match the manifest
    files: tuple[tuple[str, int], ...]  # path and size in bytes of each file, the manifest and its checksum first
    notes: tuple[str, ...]  # notes for the user before publishing, for instance that there is no validation

    @property
    def size_bytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(size for _, size in self.files)


def plan_push(directory: Path, *, unvalidated: bool = False, trust: Trust | None = None) -> PushPlan:
    """Hash an artifact, check its gates and its validation record, and list the files to upload.

    Args:
        directory: the artifact's directory.
        unvalidated: accept an export whose validation is missing or did not end with ACCEPT, and add a note. An export
            with the verdict REJECT is never accepted.
        trust: the key or certificates to check the signatures of the artifact and its record with; None to check no
            signatures.

    Raises:
        BadArtifactError: it is not an artifact, or a damaged one; its validation record is invalid; or a signature does
            not match.
        GateFailedError: one of its gates failed; or it is an export that can be validated, and it has no validation
            record with the verdict ACCEPT.
    """
    artifact = open_artifact(directory)
    (trust or Trust()).require(artifact.root, record_path(artifact.root))
    failed = failures(artifact.manifest.gates)
    notes = [] if artifact.manifest.gates else ["it carries no gates: nothing was checked when it was written"]
    if failed:
        raise GateFailedError(
            f"{artifact.root} is not pushed: {len(failed)} gate(s) failed", why="; ".join(failed),
            fix="find out why (fp8pipe report), and write it again",
        )  # fmt: skip
    if kind_named(artifact.kind).engines:
        notes += _unproved(artifact, unvalidated)
    own = (artifact.root / MANIFEST_NAME, checksum_path(artifact.root / MANIFEST_NAME))
    sizes = [(path.name, path.stat().st_size) for path in own if path.is_file()]
    sizes += [(entry.path, entry.size) for entry in artifact.manifest.files]
    return PushPlan(artifact, tuple(sizes), tuple(notes))


def push(plan: PushPlan, target: Target, api: HfApi | None = None) -> str:
    """Upload the files in a commit whose message contains the artifact's digest.

    huggingface_hub may split a large folder into several commits.

    Args:
        plan: the files to upload, from `plan_push`.
        target: the destination.
        api: the client; by default, one with the endpoint and the token of the environment or of the user's login.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        ConfigurationError: the hub refuses the upload (token, permissions, name, branch or conflict), or the repository
            is public although a private one was requested.
        MissingCapabilityError: there is no token, or the hub cannot be reached or fails.
    """
    from huggingface_hub import HfApi, get_token

    api = api or HfApi()
    if not (api.token or get_token()):
        raise MissingCapabilityError(
            "there is no token for the hub", why="HF_TOKEN is not set, and nobody is logged in",
            fix="set HF_TOKEN to a token with write access, or run `hf auth login`",
        )  # fmt: skip
    digest = plan.artifact.digest
    with _translated(target, str(api.endpoint)):
        if not target.create_pr:
            api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
        if target.private and not api.model_info(target.repo_id).private:
            raise ConfigurationError(
                f"{target.repo_id} is public", why="--private was given, but the repository exists already",
                fix="make it private on the hub, or name another",
            )  # fmt: skip
        done = api.upload_folder(
            repo_id=target.repo_id, folder_path=plan.artifact.root, revision=target.revision,
            create_pr=target.create_pr, allow_patterns=[glob.escape(name) for name, _ in plan.files],
            commit_message=f"{plan.artifact.kind} {digest[:12]}, by fp8pipe",
            commit_description=f"Digest of {MANIFEST_NAME}: {digest}",
        )  # fmt: skip
    return str(done.pr_url or done.commit_url)


def _unproved(artifact: Artifact, unvalidated: bool) -> list[str]:
    """Require the verdict ACCEPT, or allow its absence.

    Returns:
        A note if there is no verdict ACCEPT but `unvalidated` is set; otherwise empty.

    Raises:
        BadArtifactError, GateFailedError: as `require_accept`, if `unvalidated` is not set or the verdict is REJECT.
    """
    try:
        require_accept(artifact)
    except (BadArtifactError, GateFailedError) as error:
        rejected = isinstance(error, GateFailedError) and record_path(artifact.root).exists()
        if (rejected and read_verdict(record_path(artifact.root), artifact).verdict == REJECT) or not unvalidated:
            raise
        return [f"not validated: {error.why}"]
    return []


@contextmanager
def _translated(target: Target, endpoint: str) -> Iterator[None]:
    """A context in which errors of huggingface_hub and of the network become errors of fp8pipe."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ConfigurationError(
            f"{target.repo_id!r} is not a repository name", why=one_line(error),
            fix="give organisation/name",
        ) from error  # fmt: skip
    except errors.OfflineModeIsEnabled as error:
        raise MissingCapabilityError("the hub is switched off", why="HF_HUB_OFFLINE is set", fix="unset it") from error
    except errors.HfHubHTTPError as error:
        raise _refused(error, target, endpoint) from error
    except ConfigurationError:
        raise
    except Exception as error:
        cause = error.__cause__  # huggingface_hub wraps the errors of single files
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refused(cause, target, endpoint) from error
        if not (_of_network(error) or _of_network(cause)):
            raise
        raise MissingCapabilityError(
            f"the hub at {endpoint} cannot be reached", why=one_line(error),
            fix="check the network (HF_ENDPOINT, proxies) and push again; files already uploaded are not sent again",
        ) from error  # fmt: skip


def _of_network(error: BaseException | None) -> bool:
    """Whether an error is a network failure, for all HTTP libraries that versions of huggingface_hub have used."""
    names = {kind.__name__ for kind in type(error).__mro__}
    told = isinstance(error, RuntimeError) and "Network error" in str(error)  # the Xet client has no class for it
    return told or bool(names & {"TransportError", "ConnectionError", "TimeoutError"})


_REFUSALS = {
    401: ("the hub does not accept the token", "log in again (`hf auth login`), or set HF_TOKEN"),
    403: ("the token may not write to {repo}", "use a token with write access to it, or --create-pr"),
    404: ("{repo} or its branch is not on the hub, or not visible to this token", "check the name and --revision"),
    409: ("{repo} was changed at the same time, or exists in a form that conflicts with this upload", "push again"),
    412: ("{repo} was changed at the same time", "push again"),
    413: ("the hub refuses files of this size", "write the artifact in smaller files"),
    429: ("the hub asks to slow down", "push again later; files already uploaded are not sent again"),
}


def _refused(error: HfHubHTTPError, target: Target, endpoint: str) -> ConfigurationError | MissingCapabilityError:
    status = error.response.status_code if error.response is not None else 0
    why = f"{endpoint} answered {status}: " + (" ".join(str(error.server_message or error).split())[:300])
    if status >= 500 or status == 0:
        return MissingCapabilityError(
            "the hub failed", why=why, fix="push again later; files already uploaded are not sent again"
        )
    what, fix = _REFUSALS.get(status, ("the hub refuses the upload to {repo}", "see the reason above"))
    return ConfigurationError(what.format(repo=target.repo_id), why=why, fix=fix)
