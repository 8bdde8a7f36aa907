#!/usr/bin/env python3
"""Runs the calls of third-party clients against this server and prints a table of the results.

    .venv/bin/python scripts/check_clients.py [--only openai,litellm] [--keep-versions]

The newest releases are installed into the user's cache (bitdial/clients), not into .venv. guidellm depends on
torch, some gigabytes (TORCH_INDEX_URL: an index for torch's wheel only, such as that of its CPU builds).
Without Node, its clients are skipped and listed as such. Exits with 1 if a call failed.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from server.bench.http.own_server import own_server  # noqa: E402
from server.host import cache  # noqa: E402
from server.settings.server import ModelSettings  # noqa: E402

HERE = ROOT / "scripts" / "clients"
IN_PYTHON = ("openai", "huggingface_hub", "litellm", "langchain-openai", "vllm bench serve")
IN_NODE = "@huggingface/inference"
GUIDELLM = "guidellm"
CLIENTS = (*IN_PYTHON, GUIDELLM, IN_NODE)
PACKAGES = ("openai", "huggingface_hub", "litellm", "langchain-openai", "httpx")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@dataclass(frozen=True)
class Result:
    """The result of one call of one client."""

    client: str
    call: str
    outcome: str
    """``ok``, ``failed`` or ``skipped``."""
    detail: str = ""


def main() -> int:
    options = _options()
    folder = cache.folder("clients")
    node = shutil.which("npm") is not None and shutil.which("node") is not None
    if not options.keep_versions:
        _install(folder, options.only, node)
    results = asyncio.run(_run(folder, options.only, node))
    _show(results)
    print(json.dumps([asdict(one) for one in results]))
    return int(any(one.outcome == "failed" for one in results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(CLIENTS), help=f"some of {', '.join(CLIENTS)}")
    parser.add_argument(
        "--keep-versions", action="store_true", help="install nothing; use the installed versions"
    )
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(CLIENTS):
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    return options


def _install(folder: Path, chosen: list[str], node: bool) -> None:
    python = folder / "venv" / "bin" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip: list[Path | str] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--upgrade",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, *PACKAGES], check=True)
    if GUIDELLM in chosen:
        index = os.environ.get("TORCH_INDEX_URL")
        subprocess.run([*pip, *(["--index-url", index] if index else []), "torch"], check=True)
        subprocess.run([*pip, GUIDELLM], check=True)
    if IN_NODE in chosen and node:
        npm: list[Path | str] = [
            "npm",
            "install",
            "--no-save",
            "--silent",
            "--no-fund",
            "--no-audit",
            "--prefix",
            folder / "node",
        ]
        (folder / "node").mkdir(exist_ok=True)
        subprocess.run([*npm, f"{IN_NODE}@latest"], check=True)


async def _run(folder: Path, chosen: list[str], node: bool) -> list[Result]:
    with tempfile.TemporaryDirectory() as made:
        model = _with_chat_template(Path(made) / "bundled")
        settings = ModelSettings(model_id=str(model), device="cpu")
        async with own_server(settings, "fp32", slots=8, threads=1) as server:
            return await asyncio.to_thread(lambda: list(_results(folder, chosen, node, server.url, model)))


def _with_chat_template(folder: Path) -> Path:
    """A copy of the bundled model with a chat template."""
    shutil.copytree(ROOT / "loaders" / "bundled", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _results(folder: Path, chosen: list[str], node: bool, address: str, model: Path) -> Iterator[Result]:
    venv = folder / "venv" / "bin"
    for name in chosen:
        if name in IN_PYTHON:
            yield from _call_results(name, [venv / "python", HERE / "calls.py", name, address])
        elif name == GUIDELLM:
            yield from _guidellm(venv / "guidellm", address, model)
        elif node:
            shutil.copy(HERE / "calls.mjs", folder / "node")  # next to its node_modules
            yield from _call_results(name, ["node", folder / "node" / "calls.mjs", address])
        else:
            yield Result(name, "all", "skipped", "node or npm is not installed")


def _call_results(name: str, command: list[Path | str]) -> Iterator[Result]:
    """The results of a script that prints one JSON object per call."""
    done = _run_client(command)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"call"')]
    for one in found:
        yield Result(name, one["call"], "failed" if one["error"] else "ok", one["error"] or "")
    if done.returncode or not found:
        yield Result(name, "to its end", "failed", _last_line(done.stderr))


def _guidellm(program: Path, address: str, model: Path) -> Iterator[Result]:
    for path in ("/v1/completions", "/v1/chat/completions"):
        with tempfile.TemporaryDirectory() as made:
            report = Path(made) / "report.json"
            done = _run_client([  # offline: its tokenizer is a folder
                "env", "HF_HUB_OFFLINE=1", program, "run", "--disable-progress",
                "--backend", f"kind=openai_http,target={address},request_format={path}",
                "--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3",
                "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
                "--tokenizer", f"kind=hf_auto,model={model}", "--output", f"kind=json,path={report}",
            ])  # fmt: skip
            problem = _last_line(done.stderr or done.stdout) if done.returncode else _unsuccessful(report)
        yield Result(GUIDELLM, path, "failed" if problem else "ok", problem)


def _unsuccessful(report: Path) -> str:
    """The failed requests in a benchmark's report; empty if there are none."""
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    return "" if totals["successful"] and not totals["errored"] else f"requests: {totals}"


def _run_client(command: list[Path | str]) -> "subprocess.CompletedProcess[str]":
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet}, timeout=600)


def _last_line(text: str) -> str:
    return next(iter(text.strip().splitlines()[-1:]), "no output")


def _show(results: list[Result]) -> None:
    widths = [max(len(getattr(one, name)) for one in results) for name in ("client", "call")]
    for one in results:
        print(
            f"{one.client:{widths[0]}}  {one.call:{widths[1]}}  {one.outcome:7}  {one.detail[:120]}".rstrip()
        )
    failed = sum(one.outcome == "failed" for one in results)
    print(f"{len(results)} calls, {failed} failed")


if __name__ == "__main__":
    sys.exit(main())
