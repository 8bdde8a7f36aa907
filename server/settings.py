"""Every setting, declared once. A command-line flag beats an environment variable beats the default."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

import loaders
from loaders.base import Checkpoint, ModelSpec, default_device

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_FIRST_ON_CPU, _FIRST_ON_CUDA = ("fp32", "int8", "nf4", "dynamic-int8"), ("fp32", "int8", "nf4")
_BUSY_CHUNK_ON_CPU = 16  # doubles the time of a step of eight rows, about


def parse_bytes(value: Any) -> Any:
    """``"12GiB"``, ``"500 MB"`` or a plain number → bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{value!r} is not a size such as 2000000, 500MB or 12GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_names(value: Any) -> Any:
    """``"fp32, int8"`` → ``("fp32", "int8")``."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


def known_precision(value: Any) -> Any:
    """A canonical precision name for any of its aliases; an error that lists the choices otherwise."""
    try:
        return loaders.canonical(value)
    except loaders.LoaderError as error:
        raise ValueError(str(error)) from None


def parse_endpoint(value: Any) -> Any:
    """A collector's address; without a path it gets the one that OTLP prescribes for traces."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except (TypeError, ValueError, AttributeError):
        usable = False
    if not usable:
        raise ValueError("it must be an address such as http://collector:4318")
    return value if parts.path.strip("/") else parts._replace(path="/v1/traces").geturl()


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Precision = Annotated[str, BeforeValidator(known_precision)]
Precisions = Annotated[tuple[Precision, ...] | str, BeforeValidator(parse_names)]
Endpoint = Annotated[str, BeforeValidator(parse_endpoint)]


def option(
    default: Any, group: str, metavar: str | None, text: str, *, unset: str | None = None, **rules: Any
) -> Any:
    """A setting and what ``--help`` shows of it.

    Args:
        group: the heading it stands under.
        metavar: what its value is called; None for a switch.
        unset: what is done where the default is None.
        rules: further arguments of ``pydantic.Field``.
    """
    shown: dict[str, Any] = {"group": group, "metavar": metavar, "unset": unset}
    return Field(default, description=text, json_schema_extra=shown, **rules)


_MODEL, _QUANTIZATION, _LOADING = "model", "quantization", "loading"
_NETWORK, _REQUESTS, _OPERATION = "network", "requests", "operation"


class ModelSettings(BaseSettings):
    """Which model, and how it is loaded; each is an environment variable of the same name, in capitals."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        env_ignore_empty=True,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
    )

    model_id: str = option(
        "bundled",
        _MODEL,
        "NAME",
        "a hub id (openai-community/gpt2), a local folder, or the bundled model",
        validation_alias=AliasChoices("model_id", "model"),
    )
    revision: str | None = option(
        None, _MODEL, "NAME", "commit, branch or tag of a hub model", unset="the newest"
    )
    device: Literal["auto", "cuda", "cpu"] = option(
        "auto", _MODEL, "auto|cuda|cpu", "where to run; auto takes the GPU if there is one"
    )
    threads: int | None = option(None, _MODEL, "N", "CPU threads of a forward pass", unset="all cores", ge=1)
    max_total_tokens: int | None = option(
        None, _MODEL, "N", "most tokens of prompt and continuation", unset="the model's context", ge=2
    )
    quantize_lm_head: bool = option(True, _QUANTIZATION, None, "dynamic-int8: quantize the output head too")
    int8_threshold: float = option(
        0.0, _QUANTIZATION, "X", "int8: outlier threshold; above 0, batch-mates affect each other", ge=0
    )
    double_quantization: bool = option(
        False, _QUANTIZATION, None, "nf4, fp4: quantize the scales of the blocks too"
    )
    unquantized_dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        _QUANTIZATION,
        "TYPE",
        "int8, nf4, fp4: type of embeddings, head and norms: fp32, bf16, fp16 or what is fastest here",
    )
    kv_dtype: Literal["auto", "fp32", "fp16"] = option(
        "auto",
        _QUANTIZATION,
        "TYPE",
        "GPT-2 on a CPU: type of the KV cache: fp32, fp16, or fp32 for fp32 alone",
    )

    def resolved_device(self) -> Literal["cpu", "cuda"]:
        return default_device() if self.device == "auto" else self.device

    def spec(self, checkpoint: Checkpoint, slots: int) -> ModelSpec:
        """What the loaders are told."""
        return ModelSpec(
            checkpoint,
            self.resolved_device(),
            slots,
            self.max_total_tokens,
            self.threads,
            self.quantize_lm_head,
            self.int8_threshold,
            self.double_quantization,
            self.unquantized_dtype,
            self.kv_dtype,
        )


class PrecisionSettings(ModelSettings):
    """A model in one precision, or in that one first."""

    precision: Precision = option("fp32", _MODEL, "NAME", "the precision used where none is asked for")


class Settings(PrecisionSettings):
    """How to serve one model."""

    precisions: Precisions | None = option(
        None,
        _LOADING,
        "NAMES",
        "loaded at start, separated by commas, beside the default one; others at their first request",
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
    idle_unload_seconds: float | None = option(
        None,
        _LOADING,
        "SECONDS",
        "unload a precision, but not the default, that nobody used for so long",
        unset="never",
        gt=0,
    )

    host: str = option("127.0.0.1", _NETWORK, "ADDRESS", "address to listen on")
    port: int = option(8080, _NETWORK, "N", "port to listen on; 0 takes a free one", ge=0, le=65535)
    api_key: SecretStr | None = option(
        None, _NETWORK, "KEY", "clients must send it as a Bearer token", unset="open to all"
    )
    admin_api_key: SecretStr | None = option(
        None,
        _NETWORK,
        "KEY",
        "the Bearer token that may load and unload precisions",
        unset="open to all, or to nobody with --api-key",
    )
    cors_allow_origin: Annotated[tuple[str, ...] | str, BeforeValidator(parse_names)] = option(
        (), _NETWORK, "ORIGINS", "origins whose pages may call, separated by commas", unset="none"
    )
    payload_limit: Bytes = option(2_000_000, _NETWORK, "BYTES", "largest request body, such as 2MB", ge=1)
    receive_timeout: float = option(
        30,
        _NETWORK,
        "SECONDS",
        "how long a request may take to arrive, and a reader may leave its answer unread",
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
    max_stop_sequences: int = option(4, _REQUESTS, "N", "most stop strings of a request", ge=0, le=64)
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
    otlp_endpoint: Endpoint | None = option(
        None,
        _OPERATION,
        "URL",
        "OpenTelemetry collector, OTLP over HTTP, that gets traces",
        unset="no traces",
    )
    graceful_termination_timeout: float = option(
        90, _OPERATION, "SECONDS", "how long running requests may go on after SIGTERM or Ctrl-C", ge=0
    )
    hang_timeout: float = option(
        60, _OPERATION, "SECONDS", "a worker without progress for so long ends the process with code 70", gt=0
    )

    def first_precisions(self) -> tuple[str, ...]:
        """Loaded at start, the default first."""
        usual = _FIRST_ON_CPU if self.resolved_device() == "cpu" else _FIRST_ON_CUDA
        return tuple(
            dict.fromkeys((self.precision, *(usual if self.precisions is None else self.precisions)))
        )

    def required_precisions(self) -> tuple[str, ...]:
        """Those that must be there: the default, and what was asked for by name."""
        return tuple(dict.fromkeys((self.precision, *(self.precisions or ()))))

    def busy_chunk(self) -> int:
        """Prompt tokens of a step that decodes, too. On a GPU as many as ever: they hardly delay it."""
        if self.prefill_chunk_busy is not None:
            return self.prefill_chunk_busy
        return _BUSY_CHUNK_ON_CPU if self.resolved_device() == "cpu" else self.prefill_chunk
