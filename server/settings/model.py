"""Settings of every command: which model is loaded, and how."""

from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from loaders.base import Checkpoint, ModelSpec, default_device
from server.host.threads import resolve
from server.settings.types import Bytes, Precision, TextFile, option

_MODEL, _QUANTIZATION, _GPU = "model", "quantization", "on a GPU"


def has_variable(options: type[BaseSettings], name: str) -> bool:
    """Whether an environment variable can set the field.

    A command's own options have no variable: SEED, PROMPT or TEXT may be set for other programs, and would
    silently change the command.
    """
    declared = next((base for base in options.__mro__ if name in get_annotations(base)), None)
    return declared is not None and declared.__module__ in (__name__, "server.settings.server")


class _Environment(EnvSettingsSource):
    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        if not has_variable(self.settings_cls, field_name):
            return None, field_name, False
        return super().get_field_value(field, field_name)


def _artifacts() -> Any:
    return option(
        None,
        _QUANTIZATION,
        "FOLDER",
        "where files are kept that a precision makes once: quantized weights, exported graphs",
        unset="the user's cache",
    )


def _artifacts_limit() -> Any:
    return option(
        None,
        _QUANTIZATION,
        "SIZE",
        "most that these files may take, such as 20GiB: beyond it the least recently used ones are removed, "
        "but none in use and none made by training",
        unset="no bound",
        ge=0,
    )


class Declared(BaseSettings):
    """Settings that are read from the command line, then from environment variables in capitals."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        env_ignore_empty=True,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        allow_inf_nan=False,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls)


class CacheSettings(Declared):
    """Where files are kept that precisions make, and how many."""

    artifacts: Path | None = _artifacts()
    artifacts_limit: Bytes | None = _artifacts_limit()


class ModelSettings(Declared):
    """Which model is loaded, and how. Each setting is also an environment variable in capitals."""

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
        "auto", _MODEL, "auto|cuda|cpu", "where to run; auto uses the GPU if there is one"
    )
    threads: int | None = option(None, _MODEL, "N", "CPU threads of a forward pass", unset="all cores", ge=1)
    max_total_tokens: int | None = option(
        None, _MODEL, "N", "most tokens of prompt and continuation", unset="the model's context", ge=2
    )
    quantize_lm_head: bool = option(True, _QUANTIZATION, None, "dynamic-int8: quantize the output head too")
    int8_threshold: float = option(
        0.0,
        _QUANTIZATION,
        "X",
        "int8: outlier threshold; above 0, batch-mates affect each other, and on a GPU every layer waits for "
        "the host, so that no step is captured",
        ge=0,
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
    lm_head_dtype: Literal["auto", "int8", "fp32", "bf16", "fp16"] = option(
        "auto",
        _QUANTIZATION,
        "TYPE",
        "nf4, fp4, static-int8 on a CPU: type of the output head: int8, fp32, bf16 or fp16; auto is int8 "
        "where the compiled kernels run it, else UNQUANTIZED_DTYPE (dynamic-int8 has QUANTIZE_LM_HEAD)",
    )
    kv_dtype: Literal["auto", "fp32", "fp16"] = option(
        "auto",
        _QUANTIZATION,
        "TYPE",
        "GPT-2 on a CPU: type of the KV cache: fp32, fp16, or fp32 for fp32 alone; fp16 becomes fp32 where "
        "it does not hold them",
    )
    calibration: TextFile | None = option(
        None,
        _QUANTIZATION,
        "FILE",
        "a text in UTF-8 that calibrated precisions are made with",
        unset="documentation that quality is not measured on",
    )
    artifacts: Path | None = _artifacts()
    artifacts_limit: Bytes | None = _artifacts_limit()

    cuda_graphs: bool = option(
        True,
        _GPU,
        None,
        "capture steps when a precision is loaded, and replay them; without, launch each kernel",
    )
    batch_invariant: bool = option(
        True,
        _GPU,
        None,
        "compute every step at its full size, so that a sequence gets the same tokens alone and among "
        "others; without, the smallest size that fits, which is faster where few run",
    )

    def resolved_device(self) -> Literal["cpu", "cuda"]:
        return default_device() if self.device == "auto" else self.device

    def resolved_threads(self) -> int:
        return resolve(self.threads)

    def spec(self, checkpoint: Checkpoint, slots: int) -> ModelSpec:
        """The ``ModelSpec`` for the loaders."""
        return ModelSpec(
            checkpoint,
            device=self.resolved_device(),
            slots=slots,
            context=self.max_total_tokens,
            threads=self.resolved_threads(),
            quantize_lm_head=self.quantize_lm_head,
            int8_threshold=self.int8_threshold,
            double_quantization=self.double_quantization,
            unquantized_dtype=self.unquantized_dtype,
            lm_head_dtype=self.lm_head_dtype,
            kv_dtype=self.kv_dtype,
            calibration=self.calibration,
            artifacts=self.artifacts,
            artifacts_limit=self.artifacts_limit,
            batch_invariant=self.batch_invariant,
            cuda_graphs=self.cuda_graphs,
        )


class PrecisionSettings(ModelSettings):
    """Settings of a model with a default precision."""

    precision: Precision = option("fp32", _MODEL, "NAME", "the precision of requests that name none")
