"""An artifact to a repository of the Hugging Face hub: hashed first, refused where not accepted, only listed files.

What arrives are the bytes that the manifest names, and nothing that merely lies in the same directory. Uploading is the
hub client's business: it skips what the hub has already, so a cut upload is repeated without harm.
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
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError, MissingCapabilityError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["PushPlan", "Target", "plan_push", "push"]


@dataclass(frozen=True, slots=True)
class Target:
    """Where to."""

    repo_id: str  # `organisation/name`, or `name` for one's own
    private: bool = False  # the repository must be private; it is made so if it is new
    revision: str | None = None  # an existing branch; None is the main one
    create_pr: bool = False  # propose the upload instead of making it


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What would be uploaded."""

    artifact: Artifact  # every file hashed
    files: tuple[tuple[str, int], ...]  # path and size in bytes of each file, the manifest and its checksum first
    notes: tuple[str, ...]  # what is worth knowing before it is public

    @property
    def size_bytes(self) -> int:
        """Bytes in all."""
        return sum(size for _, size in self.files)


def plan_push(directory: Path, *, unvalidated: bool = False, trust: Trust | None = None) -> PushPlan:
    """Hash an artifact, look at its gates and its record, and list what an upload holds.

    Args:
        directory: the artifact.
        unvalidated: an export needs no ACCEPT; a note says so. One that is rejected is refused all the same.
        trust: whose signature it and its record must bear; nobody's when None.

    Raises:
        BadArtifactError: no artifact, or a damaged one, or the record of its validation is not sound, or not as signed.
        GateFailedError: a gate of it failed, or its kind can be validated, and no record beside it says ACCEPT.
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
    """Upload, in a commit whose message names the digest (the client splits large folders into several).

    Without `api`, the client has the endpoint and token of the environment or the login.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        ConfigurationError: the hub refuses: token, rights, name, branch, conflict; or a public repository where a
            private one was asked for.
        MissingCapabilityError: no token, or the hub cannot be reached or fails.
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
                f"{target.repo_id} is public", why="--private was given, and the repository exists already",
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
    """What no record proves, where that is allowed. Raises as `require_accept`, and always where the record rejects."""
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
    """Errors of the hub and of the network in this project's words."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ConfigurationError(
            f"{target.repo_id!r} is no name of a repository", why=" ".join(str(error).split())[:300],
            fix="give organisation/name",
        ) from error  # fmt: skip
    except errors.OfflineModeIsEnabled as error:
        raise MissingCapabilityError("the hub is switched off", why="HF_HUB_OFFLINE is set", fix="unset it") from error
    except errors.HfHubHTTPError as error:
        raise _refused(error, target, endpoint) from error
    except ConfigurationError:
        raise
    except Exception as error:
        cause = error.__cause__  # the client wraps what befalls a single file
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refused(cause, target, endpoint) from error
        if not (_of_network(error) or _of_network(cause)):
            raise
        raise MissingCapabilityError(
            f"the hub at {endpoint} cannot be reached", why=" ".join(str(error).split())[:300],
            fix="check the network (HF_ENDPOINT, proxies) and push again; what has arrived is not sent twice",
        ) from error  # fmt: skip


def _of_network(error: BaseException | None) -> bool:
    """Whether the network failed, for each library that versions of the client have used for it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    told = isinstance(error, RuntimeError) and "Network error" in str(error)  # Xet's client has no class for it
    return told or bool(names & {"TransportError", "ConnectionError", "TimeoutError"})


_REFUSALS = {
    401: ("the hub does not accept the token", "log in again (`hf auth login`), or set HF_TOKEN"),
    403: ("the token may not write to {repo}", "use a token with write access to it, or --create-pr"),
    404: ("{repo} or its branch is not on the hub, or not visible to this token", "check the name and --revision"),
    409: ("{repo} was changed at the same time, or exists in another form", "push again"),
    412: ("{repo} was changed at the same time", "push again"),
    413: ("the hub refuses files of this size", "write the artifact in smaller files"),
    429: ("the hub asks to slow down", "push again later; what has arrived is not sent twice"),
}


def _refused(error: HfHubHTTPError, target: Target, endpoint: str) -> ConfigurationError | MissingCapabilityError:
    status = error.response.status_code if error.response is not None else 0
    why = f"{endpoint} answered {status}: " + (" ".join(str(error.server_message or error).split())[:300])
    if status >= 500 or status == 0:
        return MissingCapabilityError(
            "the hub failed", why=why, fix="push again later; what has arrived is not sent twice"
        )
    what, fix = _REFUSALS.get(status, ("the hub refuses the upload to {repo}", "see the reason above"))
    return ConfigurationError(what.format(repo=target.repo_id), why=why, fix=fix)
