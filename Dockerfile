# The serving image: what `concord serve` and the data commands need. No torch, no transformers, no training code.
FROM python:3.11-slim-bookworm AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src

# The compiler of the stubs has a venv of its own, so that the serving one holds only what runs.
COPY constraints.txt ./
RUN python -m venv /opt/tools && /opt/tools/bin/pip install -c constraints.txt grpcio-tools
COPY protos ./protos
COPY client ./client
RUN /opt/tools/bin/python -m grpc_tools.protoc -I protos --python_out=client --pyi_out=client --grpc_python_out=client protos/concord/v1/*.proto

COPY LICENSE README.md pyproject.toml ./
COPY cli ./cli
COPY features ./features
COPY server ./server
RUN python -m venv /opt/concord && /opt/concord/bin/pip install -c constraints.txt ./client .


FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="Concord" \
      org.opencontainers.image.description="A gRPC feature store and model-serving backend that gives a customer the same answer in every channel." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# /data is the only place written to: fetched bundles, published models of a file: registry, rejected rows of imports.
RUN groupadd --gid 10001 concord \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin concord \
 && install -d -o 10001 -g 10001 -m 0750 /data
COPY --from=builder /opt/concord /opt/concord
ENV PATH=/opt/concord/bin:$PATH \
    HOME=/data \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    CONCORD_HOST=0.0.0.0 \
    CONCORD_DATA_DIR=/data \
    CONCORD_MODELS_URL=file:/data/models

WORKDIR /data
VOLUME ["/data"]
USER 10001:10001
EXPOSE 50051 50052 9464
STOPSIGNAL SIGTERM
# Asks the gRPC health service: SERVING only once model and index are loaded, NOT_SERVING from SIGTERM on.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["concord", "health"]
ENTRYPOINT ["concord"]
CMD ["serve"]
