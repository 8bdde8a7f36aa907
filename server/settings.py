"""Every setting, declared once. A command-line flag beats an environment variable beats the default."""

import re
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

import loaders
from loaders.base import Checkpoint, ModelSpec, default_device

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


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


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Precision = Annotated[str, BeforeValidator(known_precision)]
Precisions = Annotated[tuple[Precision, ...] | str, BeforeValidator(parse_names)]


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

    model_id: str = Field(
        "bundled",
        validation_alias=AliasChoices("model_id", "model"),
        description="a hub id (openai-community/gpt2), a local folder, or 'bundled'",
    )
    revision: str | None = Field(None, description="commit, branch or tag of a hub model")
    precision: Precision = Field("fp32", description="served where a request names none")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="where to run")
    threads: int | None = Field(None, ge=1, description="CPU threads of a forward pass [all cores]")
    max_total_tokens: int | None = Field(None, ge=2, description="prompt and continuation [context]")
    quantize_lm_head: bool = Field(True, description="dynamic-int8: quantize the output head too")
    int8_threshold: float = Field(0.0, ge=0, description="int8: outlier threshold; > 0 is batch-dependent")
    double_quantization: bool = Field(False, description="nf4, fp4: quantize the block scales too")

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
        )


class Settings(ModelSettings):
    """How to serve one model."""

    precisions: Precisions | None = Field(
        None, description="loaded at start, by comma [fp32,int8,nf4, and dynamic-int8 on a CPU host]"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on")
    api_key: SecretStr | None = Field(None, description="clients must send it as a Bearer token")
    admin_api_key: SecretStr | None = Field(None, description="needed to load and unload precisions")
    max_batch_size: int = Field(16, ge=1, le=1024, description="sequences decoded together per precision")
    max_concurrent_requests: int = Field(128, ge=1, description="running and waiting; more get a 429")
    max_input_tokens: int | None = Field(None, ge=1, description="longest prompt [context - 1]")
    max_best_of: int = Field(4, ge=1, le=64, description="largest best_of and n")
    max_stop_sequences: int = Field(4, ge=0, le=64, description="most stop strings of a request")
    payload_limit: Bytes = Field(2_000_000, ge=1, description="largest request body, bytes or '2MB'")
    request_timeout: float = Field(300, gt=0, description="seconds a request may take, waiting included")
    receive_timeout: float = Field(30, gt=0, description="seconds a request may take to arrive")
    memory_budget: Bytes | None = Field(None, ge=1, description="bytes ('12GiB') for all loaded precisions")
    idle_unload_seconds: float | None = Field(None, gt=0, description="unload a precision idle that long")
    prefill_chunk: int = Field(128, ge=1, description="prompt tokens computed between two decode steps")
    cors_allow_origin: Annotated[tuple[str, ...] | str, BeforeValidator(parse_names)] = Field(
        (), description="origins a browser may call from, by comma"
    )
    json_output: bool = Field(False, description="log one JSON object a line")
    graceful_termination_timeout: float = Field(
        90, ge=0, description="seconds running requests get at SIGTERM"
    )
    hang_timeout: float = Field(60, gt=0, description="seconds without progress before a worker is given up")
