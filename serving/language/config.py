"""How vLLM runs below the service: vLLM's own names where an option is vLLM's, and what may be passed on besides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from exporters.vllm.form import ServingForm
from fp8pipe.core.config import Flag, FrozenConfig

if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact

__all__ = ["LanguageConfig", "SupervisorConfig"]


class SupervisorConfig(FrozenConfig):
    """Times of supervision."""

    start_timeout_s: float = Field(default=1800, gt=0, description="Longest start, seconds")
    probe_every_s: float = Field(default=0.5, gt=0, description="Between looks at its health, seconds")
    probe_timeout_s: float = Field(default=10, gt=0, description="A health probe must be answered by then, seconds")
    probe_failures: int = Field(default=3, ge=1, description="Unanswered probes in a row after which it is killed")
    engine_timeout_s: Annotated[float, Flag("engine-timeout-s")] = Field(
        default=120, gt=0, description="An engine asked for a token that makes none for so long is killed, seconds"
    )
    engine_probe_every_s: float = Field(default=10, gt=0, description="Between requests for one token, seconds")
    first_delay_s: float = Field(default=1, gt=0, description="Before the first restart, seconds; doubles each time")
    longest_delay_s: float = Field(default=60, gt=0, description="Between restarts at most, seconds")
    steady_s: float = Field(default=300, gt=0, description="After this long up, crashes are counted anew, seconds")
    stop_grace_s: float = Field(default=10, ge=0, description="From SIGTERM to SIGKILL, seconds")


class LanguageConfig(ServingForm):
    """How vLLM runs below the service: the form in which it computes, and what is around it."""

    vllm_python: Annotated[str | None, Flag(default="found")] = Field(
        default=None, description="Python of the environment with vLLM"
    )
    served_model_name: Annotated[str | None, Flag(default="the directory's")] = Field(
        default=None, min_length=1, description="Model name in the API"
    )
    request_timeout_s: Annotated[float | None, Flag(default="no limit")] = Field(
        default=None, gt=0, description="An answer, or a stream's begin, must come by then, seconds"
    )
    drain_seconds: float = Field(
        default=60, ge=0, description="After SIGTERM, what was accepted may take so long, seconds"
    )
    supervision: SupervisorConfig = Field(default_factory=SupervisorConfig, description="Starts, probes and restarts")

    def name_of(self, artifact: Artifact) -> str:
        """The model's name in the API."""
        return self.served_model_name or artifact.root.absolute().name

    @property
    def form(self) -> ServingForm:
        """What decides about numbers, alone: what a validation of it names."""
        return ServingForm.model_validate({name: getattr(self, name) for name in ServingForm.model_fields})
