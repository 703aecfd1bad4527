# syntax=docker/dockerfile:1
# fp8pipe serve, one target a kind of export and hardware:
#
#   docker build --target vision-cpu -t fp8pipe:vision-cpu .
#   docker run --rm --read-only --tmpfs /tmp -v "$PWD/out/digits-onnx:/model:ro" -p 8000:8000 fp8pipe:vision-cpu
#
# Compilers and pip stay in the stages that build. The final ones hold an interpreter, a virtual environment made from
# pinned requirements, and fp8pipe, and run as a user without rights. Nothing is written outside /tmp.
# `--build-arg PIP_EXTRA_INDEX_URL=...` names the index that has CPU builds of torch, which llm-cpu needs.
# `--build-arg FP8PIPE_COMMIT=$(git rev-parse HEAD)` is what `fp8pipe --version` then says.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
# CUDA 13, as the pinned onnxruntime-gpu is linked against.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY fp8pipe fp8pipe
COPY pipeline pipeline
COPY exporters exporters
COPY validation validation
COPY serving serving
COPY calibration calibration
ARG FP8PIPE_COMMIT=
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . ./serving/vllm_plugin

FROM ${PYTHON_IMAGE} AS vision-cpu-build
COPY serving/container/requirements-vision-cpu.txt /requirements.txt
RUN python -m venv /opt/fp8pipe && /opt/fp8pipe/bin/pip install --no-cache-dir --no-deps -r /requirements.txt
COPY --from=wheel /wheels /wheels
RUN /opt/fp8pipe/bin/pip install --no-cache-dir --no-deps /wheels/fp8pipe-*.whl \
    && /opt/fp8pipe/bin/pip uninstall --yes pip

FROM ${PYTHON_IMAGE} AS llm-front-build
COPY serving/container/requirements-llm-front.txt /requirements.txt
RUN python -m venv /opt/fp8pipe && /opt/fp8pipe/bin/pip install --no-cache-dir --no-deps -r /requirements.txt
COPY --from=wheel /wheels /wheels
RUN /opt/fp8pipe/bin/pip install --no-cache-dir --no-deps /wheels/fp8pipe-*.whl \
    && /opt/fp8pipe/bin/pip uninstall --yes pip

FROM ${PYTHON_IMAGE} AS llm-cpu-build
ARG PIP_EXTRA_INDEX_URL=
COPY serving/container/requirements-llm-cpu.txt /requirements.txt
RUN python -m venv /opt/vllm && /opt/vllm/bin/pip install --no-cache-dir --no-deps -r /requirements.txt
COPY --from=wheel /wheels /wheels
RUN /opt/vllm/bin/pip install --no-cache-dir --no-deps /wheels/fp8pipe_vllm_cpu-*.whl

# What every final stage of slim Python shares: a user, and no pip.
FROM ${PYTHON_IMAGE} AS base
RUN pip uninstall --yes setuptools wheel pip \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin serve
ENV PATH=/opt/fp8pipe/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    HOME=/tmp \
    HF_HUB_OFFLINE=1
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM

FROM base AS vision-cpu
COPY --from=vision-cpu-build /opt/fp8pipe /opt/fp8pipe
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-m", "serving.container.health"]
ENTRYPOINT ["fp8pipe", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS llm-cpu
COPY --from=llm-front-build /opt/fp8pipe /opt/fp8pipe
COPY --from=llm-cpu-build /opt/vllm /opt/vllm
ENV FP8PIPE_VLLM_PYTHON=/opt/vllm/bin/python
USER 10001:10001
# Healthy is alive: a model may load for minutes, and /readyz tells when it has.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-m", "serving.container.health"]
ENTRYPOINT ["fp8pipe", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]

FROM ${CUDA_IMAGE} AS vision-gpu-build
# The distribution's newest Python: its patch releases come with the pinned image's snapshot.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY serving/container/requirements-vision-gpu.txt /requirements.txt
RUN python3 -m venv /opt/fp8pipe && /opt/fp8pipe/bin/pip install --no-cache-dir --no-deps -r /requirements.txt
COPY --from=wheel /wheels /wheels
RUN /opt/fp8pipe/bin/pip install --no-cache-dir --no-deps /wheels/fp8pipe-*.whl \
    && /opt/fp8pipe/bin/pip uninstall --yes pip

FROM ${CUDA_IMAGE} AS vision-gpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin serve
COPY --from=vision-gpu-build /opt/fp8pipe /opt/fp8pipe
ENV PATH=/opt/fp8pipe/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    HOME=/tmp
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["/opt/fp8pipe/bin/python", "-m", "serving.container.health"]
ENTRYPOINT ["fp8pipe", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]

# vLLM's own image brings CUDA, torch and vLLM; only the front is added, in an environment of its own.
FROM ${VLLM_IMAGE} AS llm-gpu-build
COPY serving/container/requirements-llm-front.txt /requirements.txt
RUN python3 -m venv --without-pip /opt/fp8pipe \
    && python3 -m pip --python /opt/fp8pipe/bin/python install --no-cache-dir --no-deps -r /requirements.txt
COPY --from=wheel /wheels /wheels
RUN python3 -m pip --python /opt/fp8pipe/bin/python install --no-cache-dir --no-deps /wheels/fp8pipe-*.whl

FROM ${VLLM_IMAGE} AS llm-gpu
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin serve
COPY --from=llm-gpu-build /opt/fp8pipe /opt/fp8pipe
ENV PATH=/opt/fp8pipe/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    FP8PIPE_VLLM_PYTHON=/usr/bin/python3
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["/opt/fp8pipe/bin/python", "-m", "serving.container.health"]
ENTRYPOINT ["fp8pipe", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
