"""How vLLM runs on a node, so that the nodes of one model can tell whether they run it in the same way.

Workers of one model that differ in their versions or options would compute parts of one answer by different rules, and
no error would tell. Node 0 tells the others digests instead of the text, because `/readyz` needs no API key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from exporters.vllm.form import ServingForm
from serving.http.service import Proof


def run_of(proof: Proof, form: ServingForm) -> dict[str, str]:
    """What has to be equal on all nodes: the version of each of vLLM's packages, and `settings`, as text."""
    return {**proof.versions, "settings": " ".join([f"{proof.form},", *form.arguments()])}


def digests(run: Mapping[str, str]) -> dict[str, str]:
    """The start of the SHA-256 of each entry, 16 hexadecimal digits."""
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in run.items()}


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """What differs between this node, as text, and node 0, as digests: one phrase for each entry."""
    own = digests(here)
    return [f"{name} {here.get(name, '(none)')}" for name in sorted(here.keys() | there.keys())
            if own.get(name) != there.get(name)]  # fmt: skip
