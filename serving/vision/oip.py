"""The Open Inference Protocol v2 with Triton's binary tensor extension, for clients such as `tritonclient` and KServe.

A binary request is a JSON header of `Inference-Header-Content-Length` bytes, followed by the little-endian bytes of the
tensors. The input is a preprocessed tensor, so no image is decoded here; the response holds the engine's raw outputs.
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fp8pipe.core.version import __version__
from serving.http.problems import Problem, too_many_images
from serving.vision.bodies import INFER_BODY, accepted_encoding, compress, parse_json, read_body
from serving.vision.engine import ServedModel
from serving.vision.state import VisionState, while_connected

_HEADER_LENGTH = "Inference-Header-Content-Length"
_VERSION = "1"
_TYPE = "FP32"
_MAX_ID_LENGTH = 256
_MIN_COMPRESSED_BYTES = 500


@dataclass(frozen=True, slots=True)
class _InferRequest:
    """A parsed inference request."""

    pixels: np.ndarray  # (n, 3, H, W) float32, finite
    id: str | None  # request id from the client, if any
    binary: bool  # whether the output is requested in binary


def add_protocol(app: FastAPI, state: VisionState) -> None:
    """Add the routes of the protocol, under /v2."""
    model, described = state.model, _metadata(state.model, state.engine.width)
    server = {"name": "fp8pipe", "version": __version__, "extensions": ["binary_tensor_data"]}

    def known(name: str, version: str = _VERSION) -> None:
        if name != model.name or version != _VERSION:
            raise Problem(404, "unknown_model", "there is no such model or version", f"this server has {model.name}")

    async def meta(name: str, version: str = _VERSION) -> Response:
        """The model's inputs and outputs."""
        known(name, version)
        return JSONResponse(described)

    async def model_ready(name: str, version: str = _VERSION) -> Response:
        """Whether the model accepts requests."""
        known(name, version)
        state.require_ready()
        return JSONResponse({"name": model.name, "ready": True})

    async def infer(request: Request, name: str, version: str = _VERSION) -> Response:
        """Run the model on preprocessed tensors, sent as JSON or binary."""
        known(name, version)
        body = await read_body(request, state.config.max_body_bytes)
        asked = _parse_infer(body, request.headers.get(_HEADER_LENGTH), model, state.config.max_images)
        done = await while_connected(request, state.run(asked.pixels))
        answer, headers = _write_infer(asked, done.outputs, model)
        encoding = accepted_encoding(request.headers.get("accept-encoding"))
        if encoding is not None and len(answer) >= _MIN_COMPRESSED_BYTES:
            answer = await asyncio.get_running_loop().run_in_executor(None, compress, answer, encoding)
            headers |= {"Content-Encoding": encoding}
        return Response(answer, headers=headers | {"Vary": "Accept-Encoding"})

    async def about() -> Response:
        """The server and its extensions."""
        return JSONResponse(server)

    async def live() -> Response:
        """Liveness: the process responds."""
        return JSONResponse({"live": True})

    async def ready() -> Response:
        """Readiness: requests are accepted."""
        state.require_ready()
        return JSONResponse({"ready": True})

    for path, endpoint in (("/v2", about), ("/v2/health/live", live), ("/v2/health/ready", ready)):
        app.add_api_route(path, endpoint, methods=["GET"], tags=["v2"])
    for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        suffix = base.count("{")
        app.add_api_route(base, meta, methods=["GET"], tags=["v2"], name=f"meta{suffix}")
        app.add_api_route(f"{base}/ready", model_ready, methods=["GET"], tags=["v2"], name=f"model_ready{suffix}")
        app.add_api_route(
            f"{base}/infer", infer, methods=["POST"], tags=["v2"], name=f"infer{suffix}", openapi_extra=INFER_BODY
        )


def _metadata(model: ServedModel, width: int) -> dict[str, Any]:
    """The response of /v2/models/NAME."""
    return {
        "name": model.name,
        "versions": [_VERSION],
        "platform": "tensorrt_plan" if model.engine == "tensorrt" else "onnxruntime_onnx",
        "inputs": [{"name": model.input_name, "datatype": _TYPE, "shape": [-1, *model.shape]}],
        "outputs": [{"name": model.output_name, "datatype": _TYPE, "shape": [-1, width]}],
    }


def _parse_infer(body: bytes, header_length: str | None, model: ServedModel, max_images: int) -> _InferRequest:
    """Parse an inference request; `header_length` is the value of `Inference-Header-Content-Length`, if it was sent.

    Raises:
        Problem: 4xx; no other exception, whatever the bytes are.
    """
    end = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit()) or int(header_length[:18]) > end:
            raise _bad(f"{_HEADER_LENGTH} is not a valid length within the body")
        end = int(header_length[:18])
    document = parse_json(body[:end])
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise _bad(f"'inputs' must hold the one tensor {model.input_name}")
    identity = document.get("id")
    if identity is not None and (not isinstance(identity, str) or len(identity) > _MAX_ID_LENGTH):
        raise _bad(f"'id' must be a string of at most {_MAX_ID_LENGTH} characters")
    binary = _wants_binary(document, model)
    return _InferRequest(_tensor(inputs[0], memoryview(body)[end:], model, max_images), identity, binary)


def _write_infer(request: _InferRequest, outputs: np.ndarray, model: ServedModel) -> tuple[bytes, dict[str, str]]:
    """Make body and headers of the response, as JSON or, if the client asked for it, binary."""
    tensor: dict[str, Any] = {"name": model.output_name, "datatype": _TYPE, "shape": list(outputs.shape)}
    document: dict[str, Any] = {"model_name": model.name, "model_version": _VERSION, "outputs": [tensor]}
    if request.id is not None:
        document["id"] = request.id
    if not request.binary:
        tensor["data"] = outputs.ravel().tolist()  # exact: each decimal parses back to the same float
        return json.dumps(document).encode(), {"Content-Type": "application/json"}
    data = np.ascontiguousarray(outputs, "<f4").tobytes()
    tensor["parameters"] = {"binary_data_size": len(data)}
    header = json.dumps(document).encode()
    return header + data, {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(len(header))}


def _wants_binary(document: dict[str, Any], model: ServedModel) -> bool:
    # Whether the output is requested in binary; refuses requests for outputs that do not exist.
    binary = _flag(_parameters(document), "binary_data_output", False)
    outputs = document.get("outputs")
    if outputs is None:
        return binary
    if not isinstance(outputs, list) or len(outputs) > 1 or not all(isinstance(output, dict) for output in outputs):
        raise _bad(f"'outputs' must name {model.output_name}")
    for output in outputs:
        if output.get("name") != model.output_name:
            raise _bad(f"there is no such output; the model has {model.output_name}")
        parameters = _parameters(output)
        if parameters.get("classification"):
            raise _bad("the classification extension is not supported; use /v1/classify")
        binary = _flag(parameters, "binary_data", binary)
    return binary


def _tensor(tensor: dict[str, Any], binary: memoryview, model: ServedModel, max_images: int) -> np.ndarray:
    # Check the description of the input tensor, and read its values, (n, 3, H, W).
    if tensor.get("name") != model.input_name:
        raise _bad(f"there is no such input; the model has {model.input_name}")
    if tensor.get("datatype") != _TYPE:
        raise _bad(f"{model.input_name} must have the datatype {_TYPE}")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(n) is int for n in shape):
        raise _bad(f"the shape must be [n, {', '.join(map(str, model.shape))}]")
    if tuple(shape[1:]) != model.shape or shape[0] < 1:
        raise _bad(f"the shape must be [n, {', '.join(map(str, model.shape))}] with n from 1 to {max_images}")
    if shape[0] > max_images:
        raise too_many_images(max_images)
    values = _values(tensor, binary, math.prod(shape))
    if not np.isfinite(values).all():
        raise _bad("the tensor holds values that are not finite in float32")
    return values.reshape(shape)


def _values(tensor: dict[str, Any], binary: memoryview, count: int) -> np.ndarray:
    """Read the tensor's values, from the binary part or from JSON, as `(count,)` float32."""
    size = _parameters(tensor).get("binary_data_size")
    if size is not None:
        if size != 4 * count or size != len(binary) or type(size) is not int:
            raise _bad(f"a tensor of this shape must have {4 * count} bytes after the header, with no other bytes")
        return np.frombuffer(binary, "<f4")
    if len(binary):
        raise _bad("bytes follow the header, but no tensor has a 'binary_data_size'")
    try:
        raw = np.asarray(tensor.get("data"))
    except (ValueError, OverflowError, RecursionError) as error:
        raise _bad("'data' is not a list of numbers, flat or of the tensor's shape") from error
    if raw.dtype.kind not in "iuf" or raw.size != count or raw.shape not in ((count,), tuple(tensor["shape"])):
        raise _bad(f"'data' must hold {count} numbers, flat or of the tensor's shape")
    with np.errstate(over="ignore"):
        return raw.astype(np.float32).ravel()


def _parameters(document: dict[str, Any]) -> dict[str, Any]:
    parameters = document.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise _bad("'parameters' must be an object")
    return parameters


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise _bad(f"'{name}' must be true or false")
    return value


def _bad(message: str) -> Problem:
    return Problem(400, "invalid_request", message)
