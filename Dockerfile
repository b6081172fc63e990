# Two images from one file: `--target operator` (no torch) and `--target trainer`.
# A dependency layer is keyed by its locked requirements alone, so that a change of code rebuilds only the last, thin layer.
# The requirements were resolved as a whole, with uv's overrides, so they are installed without being resolved anew.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS uv
# Set SSL_CERT_FILE (and mount the file) where the network has a certificate authority of its own.
ARG SSL_CERT_FILE
RUN python3 -m venv /opt/uv && \
    /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check ${SSL_CERT_FILE:+--cert "$SSL_CERT_FILE"} uv==0.13.9
ENV PATH=/opt/uv/bin:$PATH UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy
WORKDIR /src

FROM uv AS requirements
COPY pyproject.toml uv.lock ./
COPY api/pyproject.toml api/
COPY operator/pyproject.toml operator/
COPY trainer/pyproject.toml trainer/
RUN for package in operator trainer; do \
        uv export --quiet --frozen --no-dev --no-header --no-emit-workspace --package "finetune-$package" \
            --output-file "/requirements/$package.txt" || exit 1; \
    done

FROM uv AS code
# Hash-based bytecode stays valid whatever a copy does to the time stamps of the sources.
ENV UV_COMPILE_BYTECODE=1 PYC_INVALIDATION_MODE=UNCHECKED_HASH
COPY api api
FROM code AS operator-code
COPY operator operator
RUN uv pip install --no-deps --target /opt/app ./api ./operator && rm -f /opt/app/.lock
FROM code AS trainer-code
COPY trainer trainer
RUN uv pip install --no-deps --target /opt/app ./api ./trainer && rm -f /opt/app/.lock

FROM ${BASE_IMAGE} AS program
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
LABEL org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.vendor=finetune.dev

FROM program AS operator
ARG SSL_CERT_FILE
COPY --from=requirements /requirements/operator.txt /opt/requirements.txt
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    export UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never PYC_INVALIDATION_MODE=UNCHECKED_HASH && \
    /opt/uv/bin/uv venv --python python3 /opt/venv && \
    /opt/uv/bin/uv pip install --python /opt/venv --no-deps --require-hashes --compile-bytecode --requirements /opt/requirements.txt
LABEL org.opencontainers.image.title=finetune-operator \
      org.opencontainers.image.description="Kubernetes operator for FineTuneJob resources"
USER 65532:65532
WORKDIR /
ENTRYPOINT ["python", "-m", "finetune_operator"]
COPY --from=operator-code /opt/app /opt/app

FROM program AS trainer
ARG SSL_CERT_FILE
COPY --from=requirements /requirements/trainer.txt /opt/requirements.txt
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    export UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never PYC_INVALIDATION_MODE=UNCHECKED_HASH && \
    /opt/uv/bin/uv venv --python python3 /opt/venv && \
    /opt/uv/bin/uv pip install --python /opt/venv --no-deps --require-hashes --compile-bytecode --requirements /opt/requirements.txt
LABEL org.opencontainers.image.title=finetune-trainer \
      org.opencontainers.image.description="Transfer learning of pretrained PyTorch models"
USER 65532:65532
WORKDIR /
ENTRYPOINT ["python", "-m", "finetune_trainer"]
COPY --from=trainer-code /opt/app /opt/app
