"""The text that an export calibrates on and is measured on: never the same records.

By default it is the data that the artifact was trained on, split as its training split it: scales come from training
records, perplexities from held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters.tensorrt.language.source import LanguageModel
from exporters.tensorrt.language.target import CalibrationFacts
from fp8pipe.artifact import sha256_file
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.text import Encoded, encode, load_records, split

__all__ = ["LENGTH", "ExportText", "read_text"]

# What `finetune` takes when nothing is said.
_FRACTION = 0.1
LENGTH = 256
_HELDOUT_LIMIT = 256


@dataclass(frozen=True, slots=True)
class ExportText:
    """Tokens.

    Attributes:
        source: what was read.
        digest: sha256 of the file; none where it is no local file.
        calibration: training records.
        heldout: records that no scale and no weight has seen.
    """

    source: str
    digest: str | None
    calibration: Sequence[Encoded]
    heldout: Sequence[Encoded]

    @property
    def facts(self) -> CalibrationFacts:
        """What a manifest says of it."""
        return CalibrationFacts(data=self.source, sha256=self.digest, records=len(self.calibration))


def read_text(model: LanguageModel, data: str | None, records: int) -> ExportText:
    """Read, split and tokenize.

    Args:
        model: whose tokenizer, chat template, split and sequence length are taken.
        data: a JSONL file, a sample or a dataset; the artifact's own when None.
        records: most training records to take.

    Raises:
        ConfigurationError: no data is named, or it cannot be used.
    """
    config = model.artifact.manifest.config
    source = data or config.get("data")
    if not source:
        raise ConfigurationError(
            f"{model.root} does not say on which text it was trained",
            why="static activation scales are measured on text",
            fix="name some with --calibration-data",
        )
    train, heldout = split(
        load_records(str(source)), heldout_fraction=float(config.get("heldout_fraction", _FRACTION)), seed=0
    )
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(model.root)
    length = int(config.get("sequence_length", LENGTH))
    limit = int(config.get("heldout_limit", _HELDOUT_LIMIT))
    path = Path(str(source)).expanduser()
    return ExportText(
        source=str(source),
        digest=sha256_file(path) if path.is_file() else None,
        calibration=encode(train[:records], tokenizer, length).examples,
        heldout=encode(heldout[:limit], tokenizer, length).examples,
    )
