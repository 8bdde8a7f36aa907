"""Every setting, declared once. A command-line flag beats an environment variable beats the default."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from server.settings.model import ModelSettings, PrecisionSettings
from server.settings.models import several_models
from server.settings.types import (
    AUTO,
    Bytes,
    Endpoint,
    Key,
    Precision,
    PrecisionOrAuto,
    Precisions,
    listed,
    option,
    parse_names,
)

_FIRST_ON_CPU, _FIRST_ON_CUDA = ("fp32", "int8", "nf4", "dynamic-int8"), ("fp32", "int8", "nf4")
_BUSY_CHUNK_ON_CPU = 16  # doubles the time of a step of eight rows, about


__all__ = ["ChatSettings", "ModelSettings", "PrecisionSettings", "Settings"]
_MODEL, _LOADING, _SHADOW = "model", "loading", "shadow"
_CHOOSING, _NETWORK, _REQUESTS, _OPERATION = "precision auto", "network", "requests", "operation"


class ChatSettings(PrecisionSettings):
    """Settings of a model that chats."""

    chat_template: Path | None = option(
        None,
        _MODEL,
        "FILE",
        "a chat template in Jinja, for a model that has none or in place of its own",
        unset="the model's own",
    )


class Settings(ChatSettings):
    """Settings of a server."""

    models: Annotated[str | None, AfterValidator(several_models)] = option(
        None,
        _MODEL,
        "MODELS",
        "several models in place of MODEL_ID, by comma, the default one first; name=folder gives one a name, "
        "owner/name@revision names a revision",
        unset="MODEL_ID alone",
    )
    chat_template: Path | None = option(
        None,
        _MODEL,
        "FILE",
        "a chat template in Jinja, for a model that has none or in place of its own; with MODELS name=FILE, "
        "by comma",
        unset="the model's own",
    )

    precision: PrecisionOrAuto = option(
        "fp32", _MODEL, "NAME", "the precision of requests that name none; auto chooses by the report"
    )
    precisions: Precisions | None = option(
        None,
        _LOADING,
        "NAMES",
        "loaded at start, separated by commas, beside the default one; others at their first request; "
        "all: every one that this host can run without files made first",
        unset=f"{','.join(_FIRST_ON_CUDA)} and, on a CPU, dynamic-int8",
    )
    memory_budget: Bytes | None = option(
        None,
        _LOADING,
        "BYTES",
        "for all loaded precisions together, such as 12GiB",
        unset="what is free",
        ge=1,
    )
    kv_cache_memory: Bytes | None = option(
        None,
        _LOADING,
        "BYTES",
        "on a CPU: for keys and values of all precisions together, such as 2GiB; what finds no room waits",
        unset="half of what is free beside the weights",
        ge=1,
    )
    idle_unload_seconds: float | None = option(
        None,
        _LOADING,
        "SECONDS",
        "unload a precision, but not the default, after it was unused for so long",
        unset="never",
        gt=0,
    )

    auto_max_memory: Bytes | None = option(
        None, _CHOOSING, "BYTES", "most weights and KV cache, such as 500MB", unset="no bound", ge=1
    )
    auto_max_perplexity_increase: float | None = option(
        None,
        _CHOOSING,
        "SHARE",
        "most that perplexity may rise above fp32's: 0.02 is two per cent",
        unset="0.02 while no quality is bounded",
        ge=0,
    )
    auto_max_kl: float | None = option(
        None, _CHOOSING, "NATS", "largest mean divergence from fp32 a token", unset="no bound", ge=0
    )
    auto_min_tokens_per_second: float | None = option(
        None, _CHOOSING, "N", "slowest decoding of one stream", unset="no bound", gt=0
    )
    auto_prefer: Literal["quality", "speed", "memory"] | None = option(
        None,
        _CHOOSING,
        "quality|speed|memory",
        "by what to choose within the bounds",
        unset="the balance of size and speed",
    )

    shadow_precision: Precision | None = option(
        None,
        _SHADOW,
        "NAME",
        "replay some requests through this one while nothing else runs, and count how far they are from it",
        unset="none is replayed",
    )
    shadow_fraction: float = option(0.01, _SHADOW, "SHARE", "of finished requests, from 0 to 1", ge=0, le=1)

    host: str = option("127.0.0.1", _NETWORK, "ADDRESS", "address to listen on")
    port: int = option(8080, _NETWORK, "N", "port to listen on; 0 takes a free one", ge=0, le=65535)
    api_key: Key | None = option(
        None, _NETWORK, "KEY", "clients must send it as a Bearer token", unset="open to all"
    )
    admin_api_key: Key | None = option(
        None,
        _NETWORK,
        "KEY",
        "the Bearer token that may load and unload precisions",
        unset="open to all; closed if --api-key is set",
    )
    cors_allow_origin: Annotated[tuple[str, ...] | str, BeforeValidator(parse_names)] = option(
        (), _NETWORK, "ORIGINS", "origins whose pages may call, separated by commas", unset="none"
    )
    max_connections: int | None = option(
        None,
        _NETWORK,
        "N",
        "connections open at once; for more, the longest idle one is closed, or the new one gets a 503",
        unset="what the limit of open files leaves, up to 4096",
        ge=1,
    )
    payload_limit: Bytes = option(2_000_000, _NETWORK, "BYTES", "largest request body, such as 2MB", ge=1)
    receive_timeout: float = option(
        30,
        _NETWORK,
        "SECONDS",
        "how long a request may take to arrive, and a client may leave its response unread",
        gt=0,
    )

    max_batch_size: int = option(
        16, _REQUESTS, "N", "sequences decoded together, in each precision", ge=1, le=1024
    )
    max_concurrent_requests: int = option(
        128, _REQUESTS, "N", "requests running and waiting; more get a 429", ge=1
    )
    max_input_tokens: int | None = option(
        None, _REQUESTS, "N", "longest prompt", unset="one less than prompt and continuation", ge=1
    )
    max_best_of: int = option(4, _REQUESTS, "N", "largest best_of and n of a request", ge=1, le=64)
    max_stop_sequences: int = option(4, _REQUESTS, "N", "most stop strings of a request", ge=0, le=1024)
    request_timeout: float = option(
        300, _REQUESTS, "SECONDS", "how long a request may take, waiting included", gt=0
    )
    prefill_chunk: int = option(
        128, _REQUESTS, "N", "prompt tokens computed in a step while nothing else runs", ge=1
    )
    prefill_chunk_busy: int | None = option(
        None,
        _REQUESTS,
        "N",
        "prompt tokens computed in a step that decodes, too: fewer delay running streams less",
        unset="16 on a CPU, PREFILL_CHUNK on a GPU",
        ge=1,
    )

    json_output: bool = option(False, _OPERATION, None, "log one JSON object a line")
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info",
        _OPERATION,
        "LEVEL",
        "the least that is logged: debug (health checks and scrapes of /metrics too), info, warning or error",
    )
    otlp_endpoint: Endpoint | None = option(
        None,
        _OPERATION,
        "URL",
        "OpenTelemetry collector, OTLP over HTTP, that gets traces and metrics",
        unset="none",
    )
    graceful_termination_timeout: float = option(
        90, _OPERATION, "SECONDS", "how long running requests may go on after SIGTERM or Ctrl-C", ge=0
    )
    hang_timeout: float = option(
        60, _OPERATION, "SECONDS", "a worker without progress for so long ends the process with code 70", gt=0
    )

    def first_precisions(self) -> tuple[str, ...]:
        """Precisions loaded at start, the default first."""
        usual = _FIRST_ON_CPU if self.resolved_device() == "cpu" else _FIRST_ON_CUDA
        return self._named(usual if self.precisions is None else self._listed())

    def required_precisions(self) -> tuple[str, ...]:
        """Precisions that must be available: the default, and those named."""
        return self._named(() if self.precisions is None else self._listed())

    def _listed(self) -> tuple[str, ...]:
        return listed(self.precisions, self.resolved_device())

    def _named(self, names: Iterable[str]) -> tuple[str, ...]:
        """The default, ``names`` and the shadow's, each once; without ``auto``, not resolved yet."""
        shadow = () if self.shadow_precision is None else (self.shadow_precision,)
        return tuple(name for name in dict.fromkeys((self.precision, *names, *shadow)) if name != AUTO)

    def secrets(self) -> tuple[str, ...]:
        """The keys, the longest first, since one may be a substring of the other."""
        keys = (self.api_key, self.admin_api_key)
        return tuple(sorted({key.get_secret_value() for key in keys if key}, key=len, reverse=True))

    def busy_chunk(self) -> int:
        """Prompt tokens of a step that also decodes. On a GPU ``prefill_chunk``: they hardly delay it."""
        if self.prefill_chunk_busy is not None:
            return self.prefill_chunk_busy
        return _BUSY_CHUNK_ON_CPU if self.resolved_device() == "cpu" else self.prefill_chunk
