# The image serve-gpu. `make image NAME=serve-gpu` builds it; docs/images.md.
#
# CUDA's own image says to the container runtime which driver it needs, and that it wants the GPU. The libraries themselves,
# cuDNN and cuBLAS, are packages of the lock: those that onnxruntime-gpu was built for.
ARG BASE=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${BASE} AS python
RUN apt-get update && apt-get install --yes --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*

FROM python AS build
ARG NAME
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv
COPY deploy/docker/requirements-${NAME}.lock /build/requirements.lock
COPY dist/*.whl /build/
# No `pip check`: onnxruntime-gpu takes the place of the onnxruntime that weakseg names.
RUN python3 -m venv /build/pip && python3 -m venv --without-pip /opt/weakseg \
    && /build/pip/bin/python -m pip --python /opt/weakseg/bin/python install --no-cache-dir \
        --no-deps --only-binary :all: --require-hashes -r /build/requirements.lock \
    && /build/pip/bin/python -m pip --python /opt/weakseg/bin/python install --no-cache-dir \
        --no-deps --no-index /build/*.whl

FROM python AS serve
ARG BASE
ARG NAME
ARG VERSION
ARG REVISION
ARG SOURCE
LABEL org.opencontainers.image.title="weakseg/${NAME}" \
    org.opencontainers.image.description="Weakly supervised segmentation: image-level labels in, pixel masks out, served" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE}"
COPY dist/${NAME}.cdx.json /usr/share/sbom/weakseg.cdx.json
COPY --from=build /opt/weakseg /opt/weakseg
ENV PATH=/opt/weakseg/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    WEAKSEG_PROVIDER=cuda
WORKDIR /tmp
USER 10001:10001
EXPOSE 8500 9464
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD ["python3", "-m", "serve.healthcheck"]
ENTRYPOINT ["weakseg"]
CMD ["serve", "--models", "/models"]
