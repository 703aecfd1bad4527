"""Loads the vision model that the user named: from timm, from a directory, or a sample.

Accepted are ``timm:NAME`` (pretrained weights from the hub), a directory (written by fp8pipe, by transformers, or by
timm's `push_to_hf_hub`), ``sample:vit-digits`` and ``sample:vit-s``. The architecture of a loaded model is plain data,
from which the model can be built again on any machine. Loading already builds it in this way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fp8pipe.core.errors import BadArtifactError, ConfigurationError, one_line
from fp8pipe.models.samples import focus_onnx, sample_name
from fp8pipe.models.vision.architecture import ARCHITECTURE_FILE, Architecture, build, usual_activation
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, Preprocessing, read_model_file, write_model_file

if TYPE_CHECKING:
    from fp8pipe.models.vision.answers import Activation
    from fp8pipe.models.vision.libraries import Pretrained

WEIGHTS_FILE: Final = "model.safetensors"
VISION_SAMPLES: Final = ("vit-digits", "vit-s")
TIMM_PREFIX: Final = "timm:"


@dataclass(frozen=True, slots=True)
class VisionModel:
    """A vision model with everything needed to use and rebuild it.

    Attributes:
        model: the prepared model (see `prepare_model`) on the CPU: eval mode, float32, parameters without gradients.
        architecture: the data from which `build` creates the module without its weights.
        preprocessing: preprocessing of the images.
        origin: the model as the user named it; recorded in manifests.
        digest: "sha256:" and 64 hex digits, computed over architecture, preprocessing and weights.
        notes: notes for the user on how the model's files were interpreted.
    """

    model: nn.Module
    architecture: Architecture
    preprocessing: Preprocessing
    origin: str
    digest: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        weights: dict[str, Tensor],
        architecture: Architecture,
        preprocessing: Preprocessing,
        origin: str,
        notes: tuple[str, ...] = (),
    ) -> VisionModel:
        """Build the module and load its weights.

        Args:
            weights: tensors by their names in the prepared model.
            architecture: the model's architecture.
            preprocessing: preprocessing of the images.
            origin: the model as the user named it.
            notes: notes for the user.

        Raises:
            BadArtifactError: the weights do not match the architecture.
            ConfigurationError: a weight is not finite.
        """
        _check_finite(weights, origin)
        model = build(architecture)
        try:
            model.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise BadArtifactError(
                f"the weights of {origin} do not fit {architecture.name}",
                why=one_line(error, 600),
                fix="take weights and architecture from one place",
            ) from error
        return cls(model, architecture, preprocessing, origin, _digest(model, architecture, preprocessing), notes)


def load_vision_model(
    src: str, image_size: tuple[int, int] | None = None, *, activation: Activation | None = None
) -> VisionModel:
    """Load a vision model.

    Args:
        src: ``timm:NAME``, a directory, ``sample:vit-digits`` or ``sample:vit-s``.
        image_size: (height, width) in pixels; None for the model's own size (112 x 112 for ``sample:vit-s``).
        activation: how to interpret the outputs; None if the model's files state it correctly.

    Raises:
        ConfigurationError: there is no such model, it is not a vision model, or it does not support the image size or
            the activation.
        MissingCapabilityError: a package is not installed, or the weights could not be downloaded.
        BadArtifactError: a file is damaged.
    """
    found = _named(src, image_size)
    return found if activation is None else _with_activation(found, activation)


def _with_activation(vision: VisionModel, activation: Activation) -> VisionModel:
    built = vision.architecture
    if built.head == "features" or (activation == "softmax" and len(built.classes or ()) < 2):
        raise ConfigurationError(
            f"the outputs of {vision.origin} cannot be read with --head-activation {activation}",
            why="they are features" if built.head == "features" else "a softmax of one output is always 1",
            fix="leave it out" if built.head == "features" else "give sigmoid, or none",
        )
    architecture = built.model_copy(update={"activation": activation})
    digest = _digest(vision.model, architecture, vision.preprocessing)
    notes = tuple(note for note in vision.notes if "--head-activation" not in note)
    return replace(vision, architecture=architecture, digest=digest, notes=notes)


def _named(src: str, image_size: tuple[int, int] | None) -> VisionModel:
    sample = sample_name(src, VISION_SAMPLES, "vision model")
    if sample is not None:
        return _sample(sample, src, image_size)
    if src.startswith(TIMM_PREFIX):
        from fp8pipe.models.vision.libraries import load_from_timm

        return _given(src, load_from_timm(src.removeprefix(TIMM_PREFIX), image_size))
    path = Path(src).expanduser()
    if src.strip() and path.is_dir():
        return _directory(path, src, image_size)
    raise ConfigurationError(
        f"there is no vision model {src!r}",
        why="it is neither a directory, nor timm:NAME, nor a sample",
        fix="name timm:NAME, sample:vit-digits, sample:vit-s, or a directory (download a hub's model into one first)",
    )


def _given(src: str, found: Pretrained) -> VisionModel:
    weights, architecture, preprocessing, notes = found
    return VisionModel.of(weights, architecture, preprocessing, src, notes)


def save_vision_model(vision: VisionModel, folder: Path) -> None:
    """Write a model to a directory, which `load_vision_model` can read again."""
    write_model_folder(folder, vision.architecture, vision.preprocessing, vision.model.state_dict())


def write_model_folder(
    folder: Path, architecture: Architecture, preprocessing: Preprocessing, tensors: Mapping[str, Tensor]
) -> None:
    """Write architecture.json, preprocessing.json and model.safetensors to `folder`, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model_file(architecture, folder / ARCHITECTURE_FILE)
    write_model_file(preprocessing, folder / PREPROCESSING_FILE)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)


def _sample(name: str, src: str, image_size: tuple[int, int] | None) -> VisionModel:
    if name == "vit-digits":
        from fp8pipe.models.vision.samples import digits_weights_folder

        return _own_directory(digits_weights_folder(), src, image_size)
    from fp8pipe.models.vision.samples import FOCUS_IMAGE_SIZE, focus_architecture, focus_preprocessing, focus_weights

    size = image_size or FOCUS_IMAGE_SIZE
    architecture = focus_architecture(size)
    return VisionModel.of(focus_weights(focus_onnx(), size), architecture, focus_preprocessing(size), src)


def _directory(path: Path, src: str, image_size: tuple[int, int] | None) -> VisionModel:
    if (path / ARCHITECTURE_FILE).is_file():
        return _own_directory(path, src, image_size)
    if (path / "config.json").is_file():
        from fp8pipe.models.vision.libraries import load_from_folder

        return _given(src, load_from_folder(path, image_size))
    raise ConfigurationError(
        f"{path} is not a vision model",
        why=f"it has neither {ARCHITECTURE_FILE} nor config.json",
        fix="give the directory that holds one of them and model.safetensors",
    )


def _check_finite(weights: Mapping[str, Tensor], origin: str) -> None:
    """Reject NaN and infinite weights, which make all results useless.

    Raises:
        ConfigurationError: there are such weights; the message names the tensors.
    """
    wrong = {name: int((~tensor.isfinite()).sum()) for name, tensor in weights.items() if tensor.is_floating_point()}
    wrong = {name: count for name, count in wrong.items() if count}
    if wrong:
        shown = ", ".join(f"{name} ({count} of {weights[name].numel()})" for name, count in list(wrong.items())[:3])
        raise ConfigurationError(
            f"{origin} has weights that are not finite",
            why=f"NaN or infinity in {shown}{', ...' if len(wrong) > 3 else ''}",
            fix="train or save the model again; a checkpoint in float16 may have overflowed",
        )


def _own_directory(path: Path, src: str, image_size: tuple[int, int] | None) -> VisionModel:
    architecture = read_model_file(Architecture, path / ARCHITECTURE_FILE)
    preprocessing = read_model_file(Preprocessing, path / PREPROCESSING_FILE)
    if image_size is not None and image_size != architecture.image_size:
        raise ConfigurationError(
            f"{src} reads images of {architecture.image_size[0]}x{architecture.image_size[1]} pixels",
            why=f"{image_size[0]}x{image_size[1]} was requested, but its position embeddings fit only its own size",
            fix="omit the image size, or start from the model that this one was made from",
        )
    try:
        weights = load_file(path / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise BadArtifactError(
            f"{path / WEIGHTS_FILE} cannot be read",
            why=f"{type(error).__name__}: {error}",
            fix="write the directory again",
        ) from error
    return VisionModel.of(weights, architecture, preprocessing, src)


def _digest(model: nn.Module, architecture: Architecture, preprocessing: Preprocessing) -> str:
    """Digest of architecture, preprocessing and weights, which is the same wherever the model was loaded from."""
    # The default activation is omitted, so that digests are the same as before this field existed.
    usual = architecture.activation == usual_activation(architecture.head)
    built = architecture.model_dump_json(exclude={"activation"} if usual else None)
    total = hashlib.sha256(f"{built}\n{preprocessing.model_dump_json()}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{total.hexdigest()}"
