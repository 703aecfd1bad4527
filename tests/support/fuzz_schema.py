"""Requests that schemathesis makes of the OpenAPI document: those it allows, and those it does not."""

from __future__ import annotations

import contextlib
from collections import Counter

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode


def fuzz_schema(url: str, count: int, model: str) -> Counter[int]:
    """About `count` requests, spread over all operations of the model; how often which status came."""
    operations = [result.ok() for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]
    # Most requests go where there is something to break.
    weights = [6 if operation.method == "post" else 1 for operation in operations]
    statuses: Counter[int] = Counter()
    for operation, weight in zip(operations, weights, strict=True):
        for mode in GenerationMode:
            known = {"name": model, "version": "1"}
            given_path = {key: value for key, value in known.items() if f"{{{key}}}" in operation.path}
            examples = max(1, count * weight // (2 * sum(weights)))

            @seed(0)
            @settings(
                max_examples=examples,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
                phases=[Phase.generate],
            )
            @given(case=operation.as_strategy(mode, path_parameters=given_path or None))
            def call(case: schemathesis.Case) -> None:
                statuses[case.call(timeout=60).status_code] += 1

            # An operation without parameters has no wrong ones.
            with contextlib.suppress(Unsatisfiable):
                call()
    return statuses
