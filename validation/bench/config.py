"""What may be set of `bench` and `serve-check`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from fp8pipe.core.config import Flag, FrozenConfig

__all__ = ["BenchConfig", "ServeCheckConfig"]


class BenchConfig(FrozenConfig):
    """How an export is measured."""

    batches: Annotated[tuple[int, ...], Flag("batch")] = Field(
        (1, 8), min_length=1, description="Vision: images at once; repeatable"
    )
    rounds: int = Field(20, ge=3, description="Vision: calls of every graph and batch size; language: requests alone")
    threads: Annotated[int | None, Flag(default="the runtime's choice")] = Field(
        None, ge=1, description="Vision: threads within an operator"
    )
    concurrency: int = Field(4, ge=1, description="Language: requests at once, in the second measurement")
    tokens: int = Field(32, ge=2, description="Language: tokens per answer")

    @field_validator("batches")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in value):
            raise ValueError("every batch size is at least 1")
        return tuple(dict.fromkeys(value))


class ServeCheckConfig(FrozenConfig):
    """How a service is asked."""

    images: int = Field(8, ge=1, description="Vision: pictures that are sent")
    prompts: Annotated[tuple[str, ...], Flag("prompt", default="two of ours")] = Field(
        ("What is the capital of France?", "Name a colour."), min_length=1,
        description="Language: a question that is asked; repeatable",
    )  # fmt: skip
    tokens: int = Field(24, ge=1, description="Language: longest answer, tokens")
    ready_s: float = Field(600.0, gt=0, description="Longest wait for the service to be ready, seconds")
