# syntax=docker/dockerfile:1
# The service. From the repository's root:
#   docker build -f docker/service.Dockerfile -t ironclip .                             CPU
#   docker build -f docker/service.Dockerfile -t ironclip:cuda --build-arg VARIANT=cuda .  NVIDIA GPUs, and CPU
# docker/README.md has the arguments, and how to build behind a proxy or a mirror.

# By tag: pin it by digest where a build has to come out the same (docker/README.md).
ARG BASE_IMAGE=python:3.12-slim-bookworm

# ---- builder: all packages in a virtual environment; pip itself stays behind -------------------------------------
FROM ${BASE_IMAGE} AS builder
# cpu: torch without CUDA, from an index of CPU builds. cuda: torch as the package index has it.
ARG VARIANT=cpu
ARG PIP_INDEX_URL
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    SITE="import sysconfig; print(sysconfig.get_path('purelib'))"
WORKDIR /build
RUN python3 -m venv /build/tools \
 && python3 -m venv --without-pip /opt/venv \
 && python3 -m venv --without-pip /opt/torch
COPY docker/locks/torch-${VARIANT}.txt torch.txt
# torch has a tree of its own: it is nearly all of the image, and changes far less often than the rest. pip checks hashes
# by itself where the lock has any; that of the CPU builds may have none (docker/README.md).
RUN --mount=type=secret,id=pip.conf,target=/run/secrets/pip.conf \
    --mount=type=secret,id=ca.crt,target=/run/secrets/ca.crt \
    [ ! -s /run/secrets/ca.crt ] || export PIP_CERT=/run/secrets/ca.crt; \
    [ -n "$PIP_INDEX_URL" ] || unset PIP_INDEX_URL; \
    if [ "$VARIANT" = cpu ]; then export PIP_INDEX_URL="$TORCH_INDEX_URL"; else export PIP_REQUIRE_HASHES=1; fi; \
    tools/bin/pip --python /opt/torch/bin/python install --no-deps --requirement torch.txt
# A file written for a newer Python does not compile, and is not imported either.
RUN python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/torch/lib || true
COPY docker/locks/service.txt service.txt
RUN --mount=type=secret,id=pip.conf,target=/run/secrets/pip.conf \
    --mount=type=secret,id=ca.crt,target=/run/secrets/ca.crt \
    [ ! -s /run/secrets/ca.crt ] || export PIP_CERT=/run/secrets/ca.crt; \
    [ -n "$PIP_INDEX_URL" ] || unset PIP_INDEX_URL; \
    tools/bin/pip --python /opt/venv/bin/python install --no-deps --require-hashes --only-binary :all: \
        --requirement service.txt \
 && /opt/torch/bin/python -c "$SITE" > "$(/opt/venv/bin/python -c "$SITE")/torch.pth" \
 && tools/bin/pip --python /opt/venv/bin/python check
# What wheels carry for debuggers, of POT's 174 MiB all but 8. Empty: nothing is taken from Debian's package index.
ARG STRIP=yes
# hadolint ignore=DL3008
RUN [ -z "$STRIP" ] || { \
        apt-get update -qq && apt-get install -qq -y --no-install-recommends binutils > /dev/null \
     && find /opt/venv -name '*.so' -exec sh -c \
            'for so; do ! readelf -SW "$so" | grep -q debug_info || strip --strip-debug "$so" || exit 1; done' sh {} +; \
    }
RUN python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv/lib || true

# ---- source: what changes with every commit, compiled --------------------------------------------------------------
FROM ${BASE_IMAGE} AS source
WORKDIR /app
COPY LICENSE NOTICE docker/healthcheck.py ./
COPY ironclip ironclip
COPY service service
RUN python3 -m compileall -q --invalidation-mode unchecked-hash . && chmod -R a+rX .

# ---- the image ------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE}
# First, and the same in both Dockerfiles: one layer for service and training, whatever changes after it.
COPY --from=builder /opt/torch /opt/torch
# State, hub downloads and artifacts belong on volumes; these folders give a new volume its owner.
RUN groupadd --gid 10001 ironclip \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ironclip \
 && install -d -o 10001 -g 10001 /var/lib/ironclip /var/cache/ironclip /artifacts
COPY --from=builder /opt/venv /opt/venv
COPY --from=source /app /app
WORKDIR /app
# Everything is compiled already, and the root may be read-only.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HOME=/var/cache/ironclip \
    IRONCLIP_HOST=0.0.0.0 \
    IRONCLIP_STATE_DIR=/var/lib/ironclip
USER 10001:10001
EXPOSE 8000
VOLUME ["/var/lib/ironclip", "/var/cache/ironclip"]
STOPSIGNAL SIGTERM
# As long as the chart allows for a start: an encoder from a hub has to come first. It delays no yes. Not with
# --start-interval, which older engines refuse.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=3 \
    CMD ["/opt/venv/bin/python", "-I", "/app/healthcheck.py"]
ENTRYPOINT ["/opt/venv/bin/python", "-m", "service"]
# Last: the revision is another with every commit.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Ironclip service" \
      org.opencontainers.image.description="CLIP that is hard to fool, served fast, and honest about how hard." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/ironclip/ironclip" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
