"""The text of an export of a language model: for calibration, and for comparing the export with its source.

No record is used for both. By default it is the data that the model was trained on, split as in training: scales are
calibrated on training records, and comparisons use held-out records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporters.tensorrt.language.target import CalibrationFacts
from fp8pipe.artifact import Artifact, sha256_file
from fp8pipe.artifact.kinds import TunedDetails
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.base import load_tokenizer
from fp8pipe.models.language.text import Encoded, encode, load_records, refuse_images, split

__all__ = ["LENGTH", "ExportText", "read_text"]

# The defaults of `finetune`, for sources that do not record these settings.
LENGTH: Final = 256
_FRACTION: Final = 0.1
_HELDOUT_LIMIT: Final = 256


@dataclass(frozen=True, slots=True)
class ExportText:
    """Tokenized text for calibration and evaluation."""

    source: str  # path or name of the data
    digest: str | None  # sha256 of the file; None if it is not a local file
    calibration: Sequence[Encoded]  # training records, for the calibration of scales
    heldout: Sequence[Encoded]  # records that were used neither for calibration nor for training; empty if not read

    @property
    def facts(self) -> CalibrationFacts:
        """The description of the calibration text in the manifest."""
        return CalibrationFacts(data=self.source, sha256=self.digest, records=len(self.calibration))


def read_text(
    root: Path, tuned: Artifact | None, data: str | None, records: int, *, heldout: bool = True, otherwise: str = ""
) -> ExportText:
    """Read, split and tokenize the text for calibration and evaluation.

    Tokenizer, chat template, split and sequence length are those with which the model was trained.

    Args:
        root: the source's directory.
        tuned: the artifact that the source is; None for a plain model.
        data: the text, in the same form as for `finetune`; None for the data that the model was trained on.
        records: maximum number of training records to use for calibration.
        heldout: whether held-out records are tokenized, too.
        otherwise: what else solves that there is no text, added to the message.

    Raises:
        ConfigurationError: there is no data, it cannot be used, or it no longer splits as it did in training.
    """
    config: Mapping[str, Any] = {} if tuned is None else tuned.manifest.config
    source = data or config.get("data")
    if not source:
        raise ConfigurationError(
            f"{root} records no text that it was trained on",
            why="scales of inputs are calibrated on text",
            fix=f"name a text with --calibration-data{otherwise}",
        )
    found = load_records(str(source))
    refuse_images(found, fix="name a text without images with --calibration-data")
    train, held = split(found, heldout_fraction=float(config.get("heldout_fraction", _FRACTION)), seed=0)
    held = held[: int(config.get("heldout_limit", _HELDOUT_LIMIT))]
    if tuned is not None and data is None:
        _check_split(tuned, len(train), len(held))
    tokenizer, length = load_tokenizer(root), int(config.get("sequence_length", LENGTH))
    last_only = config.get("answers") == "last"
    path = Path(str(source)).expanduser()
    return ExportText(
        source=str(source),
        digest=sha256_file(path) if path.is_file() else None,
        calibration=encode(train[:records], tokenizer, length, last_only=last_only).examples,
        heldout=encode(held, tokenizer, length, last_only=last_only).examples if heldout else (),
    )


def _check_split(tuned: Artifact, train: int, heldout: int) -> None:
    """Check that the data splits into as many training and held-out records as it did in training.

    Otherwise the model might be calibrated on other records than the manifest says, or evaluated on records that it was
    trained on.

    Raises:
        ConfigurationError: the numbers of records differ.
    """
    then = tuned.manifest.details_of(TunedDetails).data
    if then is not None and (then.train, then.heldout) != (train, heldout):
        raise ConfigurationError(
            f"the training text of {tuned.root} no longer splits as it did in training",
            why=f"then {then.train} records were trained on and {then.heldout} held out, now {train} and {heldout}: "
            "the text has changed, or the model was tuned by another version of fp8pipe",
            fix="with --calibration-data, name a text that the model was not trained on",
        )
