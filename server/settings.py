"""Settings of the server, on top of the shared ones: addresses, limits, inference and policy."""

from typing import Literal

from pydantic import Field, SecretStr, field_validator

from server.security.settings import SecuritySettings


class ServerSettings(SecuritySettings):
    """Everything ``concord serve`` can be told."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all interfaces.")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 picks a free one and prints it.")
    metrics_port: int = Field(9464, ge=-1, le=65535, description="Prometheus port; 0 picks a free one, -1 switches it off.")
    workers: int = Field(1, ge=1, le=64, description="Server processes that share the ports, each a replica of its own.")
    otlp_endpoint: str = Field(
        "", description="OTLP/gRPC collector that traces are sent to, http://host:4317 or https://...; empty switches tracing off."
    )
    trace_ratio: float = Field(
        0.01, ge=0, le=1, description="Share of calls traced, 0 to 1, where the caller's traceparent does not decide."
    )
    health_seconds: float = Field(1.0, gt=0, description="Pause between looks at the dependencies, in seconds; two failures count.")
    reflection: bool | None = Field(
        None, description="Serve gRPC reflection (for grpcurl); unset: only on addresses that no other machine can reach."
    )
    default_deadline_seconds: float = Field(5.0, gt=0, description="Deadline imposed on a call whose client set none, in seconds.")
    stream_idle_seconds: float = Field(
        300.0,
        gt=0,
        description="How long the client of a StreamEvents call may send nothing, or take no answer, in seconds; then it is ended.",
    )
    drain_seconds: float = Field(10.0, ge=0, description="How long calls in flight may finish after SIGTERM, in seconds.")
    max_message_bytes: int = Field(4 * 1024 * 1024, gt=0, description="Largest message accepted, in bytes.")
    max_in_flight: int = Field(
        128, gt=0, description="Calls of one service worked on at a time, streams apart; more wait a moment and are then refused."
    )
    max_streams_per_connection: int = Field(
        128, gt=0, description="Calls and streams one client connection may have open; more wait in the client."
    )
    redis_timeout_seconds: float = Field(0.5, gt=0, description="Timeout of one Redis round trip, in seconds; no retries inside.")
    postgres_timeout_seconds: float = Field(
        3.0, gt=0, description="Timeout of a PostgreSQL statement and of waiting for a connection, in seconds."
    )
    postgres_pool_size: int = Field(8, ge=2, description="PostgreSQL connections per server process.")
    postgres_waiting: int = Field(
        256, ge=1, description="Calls waiting for a PostgreSQL connection; beyond it they are answered RESOURCE_EXHAUSTED."
    )
    breaker_failures: int = Field(5, ge=1, description="Calls to a store that fail in a row before further ones are refused at once.")
    breaker_pause_seconds: float = Field(0.5, gt=0, description="Pause between probes of a store that is away, in seconds.")
    redis_slow_seconds: float = Field(
        0.15, gt=0, description="A Redis round trip longer than this, in seconds, counts as failed for the circuit breaker."
    )
    onnx_provider: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto uses CUDA where it works; cuda refuses to start without it."
    )
    onnx_precision: Literal["fp32", "fp16"] = Field(
        "fp32", description="fp16 runs the bundle's half-precision encoder, on CUDA only, and refuses bundles without one."
    )
    onnx_threads: int = Field(2, ge=1, le=64, description="Threads of one inference; equal on all replicas, since bits may depend on it.")
    slate_ttl_seconds: float = Field(900.0, gt=0, description="How long a committed slate stands, in seconds.")
    slate_size: int = Field(200, ge=1, le=256, description="Items in a slate; filters and paging act within it.")
    compute_threads: int = Field(2, ge=1, le=64, description="Slates computed at a time in one server process.")
    compute_waiting: int = Field(
        64, ge=0, description="Slates waiting to be computed; beyond it the last known slate is answered, or RESOURCE_EXHAUSTED."
    )
    encode_waiting: int = Field(512, ge=128, description="Texts of EmbedText waiting to be encoded; beyond it RESOURCE_EXHAUSTED.")
    degraded_reads: int = Field(4, ge=1, description="Calls answered from PostgreSQL at a time while Redis is away.")
    degraded_waiting: int = Field(64, ge=0, description="Calls waiting for that; beyond it as for compute_waiting.")
    known_slates: int = Field(
        10_000, ge=0, description="Slates remembered in each server process, to be answered flagged stale when nothing else is left."
    )
    assistant_min_confidence: float = Field(
        0.5, ge=0, le=1, description="An article answers a question from this probability on, 0 to 1; below it a person takes over."
    )
    assistant_scope_confidence: float = Field(
        0.1, ge=0, le=1, description="Below this probability, 0 to 1, a question that names nothing of the shop's is not about the shop."
    )
    assistant_remembered: int = Field(6, ge=0, le=50, description="Earlier messages of a customer that a question may go on from.")
    assistant_remembered_seconds: float = Field(86_400.0, ge=0, description="Age up to which they count, in seconds.")
    generator_url: str = Field(
        "", description="Base address of an OpenAI-compatible endpoint that phrases answers, http://host:port/v1; empty: templates only."
    )
    generator_model: str = Field("", description="Name of the model that the generator's endpoint is asked for.")
    generator_key: SecretStr = Field(SecretStr(""), description="Bearer key of the generator's endpoint.", repr=False)
    generator_timeout_seconds: float = Field(
        1.5, gt=0, description="How long the generator may take, in seconds, before the template is used; well below callers' deadlines."
    )
    exclude_purchased: bool = Field(True, description="Leave items the customer already bought out of slates.")
    max_per_category: int = Field(4, ge=1, description="At most this many items of one category among any 10 consecutive places.")
    search_personal_weight: float = Field(
        0.2,
        ge=0,
        le=2,
        description="Weight of what suits the customer in a search, where the words of the query weigh 1; 0: the same for everybody.",
    )
    search_least_similarity: float = Field(
        0.45,
        ge=-1,
        le=1,
        description="Cosine of query and item from which on a search finds it by its meaning; encoders differ in what near means.",
    )
    hide_out_of_stock: bool = Field(True, description="Leave items out of stock out of answers; otherwise they are flagged.")
    ingest_queue_events: int = Field(20_000, gt=0, description="Events waiting for commit before RecordEvents answers RESOURCE_EXHAUSTED.")
    ingest_batch_events: int = Field(2_000, gt=0, description="Events committed in one transaction at the most.")
    journal_queue: int = Field(10_000, gt=0, description="Exposures waiting to be written; beyond it they are dropped and counted.")
    journal_seconds: float = Field(0.25, gt=0, description="Pause between writes of exposures, in seconds: the most that a kill -9 loses.")
    judge_seconds: float = Field(
        1.0, gt=0, description="Pause between looks for reviews and messages whose sentiment is not judged yet, in seconds."
    )
    refresh_seconds: float = Field(0.5, gt=0, description="Pause between looks at the versions in PostgreSQL, in seconds.")
    registry_seconds: float = Field(60.0, gt=0, description="Pause between looks at the Feast registry, in seconds.")
    recovery_seconds: float = Field(2.0, gt=0, description="Age at which a customer whose online state lags is recomputed, in seconds.")
    epoch_seconds: float = Field(1.0, gt=0, description="Shortest time between index epochs while items change, in seconds.")
    epoch_wait_seconds: float = Field(
        2.0, ge=0, description="How long a new index epoch waits for replicas that have not built it before it answers, in seconds."
    )

    @field_validator("generator_url")
    @classmethod
    def _address(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value
