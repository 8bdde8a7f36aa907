"""``GET /stats``, ``/metrics`` and ``/info``: what is loaded, its memory, latency and throughput."""

import math
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Request, Response
from pydantic import WithJsonSchema

import loaders
from loaders.base import LoadedModel
from loaders.footprint import quantization_warning
from loaders.runner import ReportingRunner
from server.errors import Invalid
from server.host import memory
from server.http.route_facts import RouteFacts
from server.observability.exposition import OPENMETRICS, PLAIN, expose
from server.observability.metrics import Metrics
from server.report.background import Reports
from server.report.certainty import Interval
from server.report.markdown import advice_of
from server.routes.precision_choice import choose_model
from server.routes.precisions import PrecisionName
from server.routes.shared import model_parameter
from server.served_model import ServedModel
from server.service.kv_memory import blocks_of
from server.service.pool import Pool
from server.service.precision_state import PrecisionState, known_precision
from server.state import state_of
from server.version import VERSION

router = APIRouter(tags=["looking"])
Switch = Annotated[str, WithJsonSchema({"type": "string", "enum": ["true", "false"]})]


@router.get("/stats", openapi_extra=model_parameter({}))
async def stats(
    request: Request, precision: PrecisionName | None = None, layers: Switch | None = None
) -> dict[str, Any]:
    """Memory counted from live tensors, and latencies of requests that ran; ``?precision=`` selects one.

    ``?layers=true`` adds a quantization report of every loaded precision, layer by layer.
    """
    if layers not in (None, "true", "false"):
        raise Invalid("layers is true or false", param="layers")
    state, model = state_of(request.app), choose_model(request)
    pool, metrics = model.pool, model.metrics
    names = loaders.PRECISIONS if precision is None else [known_precision(precision)]
    full = pool.state("fp32").engine
    parameters = next((e.model.footprint.parameters for e in pool.engines), None)
    reference = full.model.footprint.weights_bytes if full else parameters and 4 * parameters
    return {
        "model": _identity(model, parameters),
        "models": list(state.models),
        "host": _host(pool),
        "uptime_seconds": round(state.uptime(), 3),
        "queue": {
            "running": sum(engine.running for engine in pool.engines),
            "waiting": sum(engine.waiting for engine in pool.engines),
            "in_flight": state.in_flight,
            "capacity": state.settings.max_concurrent_requests,
        },
        "memory": {
            "limit_bytes": state.settings.memory_budget,
            "used_bytes": pool.host.used_bytes(),
            "free_bytes": max(0, pool.host.free_bytes()),
        },
        "kv_cache": pool.host.kv_memory.figures(),
        "report": _report(model.reports),
        "shadow": model.shadow and model.shadow.figures(),
        "precisions": {
            name: _precision(pool, pool.state(name), metrics, reference)
            | ({"proof": await model.quantization_reports.of(name)} if layers == "true" else {})
            for name in names
        },
    }


def _identity(model: ServedModel, parameters: int | None) -> dict[str, Any]:
    return {
        "id": model.name,
        "revision": model.checkpoint.revision,
        "architecture": model.checkpoint.architecture,
        "parameters": parameters,
        "context_length": model.checkpoint.context_length,
    }


def _host(pool: Pool) -> dict[str, Any]:
    return {
        "device": pool.device,
        "device_name": _device_name(pool.device),
        "cpu_threads": pool.threads,
        "memory": memory.process_memory(),
    }


def _report(reports: Reports) -> dict[str, Any]:
    """A summary of the saved report, or how to make one."""
    if (report := reports.latest()) is None:
        return {"finished": None, "note": reports.how_to_make_one(), "recommendation": None, "precisions": {}}
    advice = advice_of(report.document)
    return {
        "finished": report.document["finished"],
        "note": " ".join(advice.sentences),
        "recommendation": advice.precision,
        "precisions": {
            row.precision: {
                "weights_bytes": row.weights_bytes,
                "load_seconds": round(row.load_seconds, 3),
                "ttft_ms": row.ttft_ms,
                "tokens_per_second": dict(row.tokens_per_second),
                "speed_ratio_to_fp32": row.speed_ratio,
                "speed_ratio_range": _range(row.ratio_interval()),
                "perplexity_ratio": row.perplexity_ratio,
                "mean_kl": row.mean_kl,
                "top1_agreement": row.top1_agreement,
            }
            for row in report.rows
        },
    }


def _range(interval: Interval) -> list[float] | None:
    return None if math.isinf(interval.high) else [interval.low, interval.high]


@router.get("/metrics")
@RouteFacts(quiet=True, media_types=(PLAIN, OPENMETRICS))
async def prometheus(request: Request) -> Response:
    """Metrics in Prometheus's text format, or in OpenMetrics' if ``Accept`` asks for it."""
    accept = ",".join(request.headers.getlist("accept"))
    metrics = [model.metrics for model in state_of(request.app).models.values()]
    body, content_type = expose(metrics, accept)
    return Response(body, headers={"content-type": content_type, "vary": "Accept"})


@router.get("/info", openapi_extra=model_parameter({}))
@router.get("/models/{model:path}/info", openapi_extra=model_parameter({}, named=True))
async def info(request: Request) -> dict[str, Any]:
    """The fields of Text Generation Inference's ``/info``, and the precisions."""
    model = choose_model(request)
    settings, service, pool = model.settings, model.service, model.pool
    return {
        "model_id": model.name,
        "models": list(state_of(request.app).models),
        "model_sha": model.checkpoint.revision,
        "model_pipeline_tag": "text-generation",
        "max_input_tokens": service.max_input_tokens,
        "max_total_tokens": service.max_total_tokens,
        "max_best_of": settings.max_best_of,
        "max_stop_sequences": settings.max_stop_sequences,
        "max_concurrent_requests": settings.max_concurrent_requests,
        "max_client_batch_size": 1,
        "version": VERSION,
        "router": "bitdial",
        "precision": pool.default,
        "precisions": [known.name for known in pool.states() if known.state != "unavailable"],
        "chat_template": model.chat is not None,
    }


def _precision(pool: Pool, state: PrecisionState, metrics: Metrics, reference: int | None) -> dict[str, Any]:
    """The same keys in every state; those of a loaded model are null in the others."""
    ratio, interval, note = speed_of(metrics, state.name)
    model = state.engine.model if state.engine else None
    return {
        "state": state.state,
        "reason": state.reason,
        "memory": _memory(model, reference) if model else None,
        "layers": _layers(model) if model else None,
        "details": _details(model) if model else None,
        "kv_cache": blocks_of(model, state.engine.preemptions) if model and state.engine else None,
        "load_seconds": state.load_seconds if model else None,
        "latency": metrics.latency(state.name),
        "throughput": metrics.throughput(state.name),
        "speed_ratio_to_fp32": ratio,
        "speed_ratio_range": interval,
        "note": note,
        "warning": quantization_warning(model) if model else None,
    }


def _memory(model: LoadedModel, reference: int | None) -> dict[str, Any]:
    footprint, cache = model.footprint, model.runner.kv_cache_bytes
    return {
        "weights_bytes": footprint.weights_bytes,
        "by_dtype": dict(footprint.by_dtype),
        "quantization_state_bytes": footprint.quantization_state_bytes,
        "quantization_state": dict(footprint.quantization_state),
        "kv_cache_bytes": cache,
        "working_bytes": memory.working_bytes(model),
        "total_bytes": memory.used_bytes(model),
        "transformers_footprint_bytes": footprint.transformers_footprint_bytes,
        "bits_per_weight": round(footprint.bits_per_weight, 3),
        "ratio_to_fp32": reference and round(footprint.weights_bytes / reference, 4),
    }


def _details(model: LoadedModel) -> dict[str, Any]:
    """The loader's details, and the runner's current report."""
    runner = model.runner
    return {**model.details, **(runner.report() if isinstance(runner, ReportingRunner) else {})}


def _layers(model: LoadedModel) -> dict[str, Any]:
    footprint = model.footprint
    return {
        "quantized": len(footprint.quantized),
        "quantized_share": round(footprint.quantized_share, 4),
        "quantized_names": list(footprint.quantized),
        "kept": [{"name": layer.name, "reason": layer.reason} for layer in footprint.kept],
    }


def speed_of(metrics: Metrics, precision: str) -> tuple[float | None, list[float] | None, str | None]:
    """Speed relative to fp32, from steps that decoded a single row, which are comparable.

    The two ran at different times, so the ratio of their medians is not significant while the middle halves
    of their step times overlap.

    Returns: the ratio of the medians; its range, from the middle halves; a note if it is slower than fp32.
    """
    own, full = metrics.single_row_quartiles(precision), metrics.single_row_quartiles("fp32")
    if own is None or full is None:
        return None, None, None
    if precision == "fp32":
        return 1.0, [1.0, 1.0], None
    (fast, middle, slow), (full_fast, full_middle, full_slow) = own, full
    ratio, low, high = round(full_middle / middle, 3), full_fast / slow, full_slow / fast
    note = f"{precision} is slower than fp32 on this host: {ratio} × its speed" if high < 1 else None
    return ratio, [round(low, 3), round(high, 3)], note


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
