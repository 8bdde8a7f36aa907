"""The image's files against the code: what can be said of them where nothing can build and run them."""

import json
import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from loaders.kernels.build import HEADERS, SOURCES
from server.settings.server import Settings
from tests.test_docs import NOT_OURS, VARIABLES

ROOT = Path(__file__).resolve().parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """(name, what follows it) of every line of the Dockerfile, continued lines joined."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> list[list[Instruction]]:
    """The instructions of every stage, each beginning with its FROM."""
    found: list[list[Instruction]] = []
    for instruction in instructions():
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def last(name: str) -> list[str]:
    """What the last stage says in its instructions of that name."""
    return [rest for found, rest in stages()[-1] if found == name]


def pairs(name: str) -> dict[str, str]:
    """NAME=VALUE of the last stage's ENV or LABEL."""
    return dict(word.split("=", 1) for rest in last(name) for word in shlex.split(rest))


def copied() -> list[tuple[str, list[str]]]:
    """(``--from`` or nothing, sources) of every COPY."""
    found = []
    for name, rest in instructions():
        if name == "COPY":
            words = rest.split()
            origin = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else ""
            found.append((origin, words[:-1]))
    return found


def test_every_stage_starts_from_the_base_that_can_be_chosen() -> None:
    assert [stage[0][1].split()[0] for stage in stages()] == ["${BASE_IMAGE}"] * len(stages())


def test_the_last_stage_gets_packages_and_code_and_no_compiler() -> None:
    (user,) = last("RUN")
    assert "useradd" in user
    assert "apt-get" not in user
    origins = [rest.split()[0] for rest in last("COPY")]
    assert origins == ["--from=packages", "--from=code"]  # the large and lasting one first


def test_it_runs_as_a_user_of_group_0() -> None:
    uid, gid = last("USER")[-1].split(":")
    assert int(uid) > 0, "a number: orchestrators that refuse root can't look up a name"
    assert gid == "0"
    assert f"useradd --uid {uid} --gid {gid} " in last("RUN")[0]
    assert "--group=root --mode=0775 /data" in last("RUN")[0]


def test_no_shell_stands_between_the_engine_and_the_server() -> None:
    (entrypoint,), (health,) = last("ENTRYPOINT"), last("HEALTHCHECK")
    assert json.loads(entrypoint) == ["bitdial", "serve"]
    assert json.loads(health.split(" CMD ")[1])[-2:] == ["-m", "server.http.health_check"]
    assert not last("CMD")


def test_what_it_sets_is_what_the_server_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = pairs("ENV")
    for name, value in variables.items():
        if name != "PATH":
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.host, settings.port) == ("0.0.0.0", 8080)
    assert settings.model_id == "openai-community/gpt2"
    assert last("EXPOSE") == [variables["PORT"]]
    assert json.loads(last("VOLUME")[0]) == [variables["HF_HOME"]]
    assert variables["PATH"].startswith(f"{variables['PYTHONPATH']}/bin:")


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file out: the last line that fits it, or a folder above it, decides."""
    kept_out = False
    above = [str(one) for one in (PurePosixPath(path), *PurePosixPath(path).parents)][:-1]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        name = pattern.removeprefix("**/")
        # an asterisk stops at a slash; one that may stand for folders, too, is written **/ here
        names = [one.rsplit("/", 1)[-1] for one in above] if name != pattern else above
        if any(fnmatchcase(one, name) and one.count("/") <= name.count("/") for one in names):
            kept_out = line == pattern
    return kept_out


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".venv/bin/python", "tests/conftest.py", "docs/api.md", "scripts/install", ".env",
        "server/__pycache__/app.cpython-312.pyc", "loaders/kernels/kernels-avx2-0.so", "model.safetensors",
        "build/lib/server/app.py",
    ],
)  # fmt: skip
def test_the_context_leaves_out(path: str) -> None:
    assert ignored(path)


def test_the_context_holds_all_that_is_copied_and_the_bundled_model() -> None:
    sources = [source for origin, sources in copied() if not origin for source in sources]
    assert sources
    for source in sources:
        files = [
            path for found in ROOT.glob(source) for path in (found.rglob("*") if found.is_dir() else [found])
        ]
        assert files, source
        wanted = [path for path in files if path.is_file() and path.suffix not in (".pyc", ".so")]
        assert not [path for path in wanted if ignored(str(path.relative_to(ROOT)))]
    assert (ROOT / "loaders/bundled/model.safetensors").is_file()
    assert not ignored("loaders/bundled/model.safetensors")


def test_the_kernels_are_built_from_all_of_their_files() -> None:
    """The library's name is made from them: were one missing, the server would look for another name."""
    stage = next(stage for stage in stages() if stage[0][1].endswith(" AS kernels"))
    patterns = next(rest for name, rest in stage if name == "COPY").split()[:-1]
    for name in (*SOURCES, *HEADERS, "build.py"):
        assert any(fnmatchcase(f"loaders/kernels/{name}", pattern) for pattern in patterns), name


def test_the_build_arguments_that_are_described_are_those_there_are() -> None:
    table = (ROOT / "docs" / "docker.md").read_text().split("| build argument |")[1].split("\n\n")[0]
    described = {
        name for row in table.splitlines()[2:] for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])
    }
    there = {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}
    assert described == there - {"VERSION"}  # which isn't to be chosen


def test_what_the_document_sets_the_server_reads() -> None:
    text = (ROOT / "docs" / "docker.md").read_text()
    named = set(re.findall(r"-e ([A-Z_]+)=", text)) | set(re.findall(r"^\| `([A-Z_]+)=", text, re.M))
    assert {"PRECISIONS", "HF_HOME"} <= named <= VARIABLES | NOT_OURS


def test_compose_passes_on_what_the_server_reads() -> None:
    for name, service in COMPOSE["services"].items():
        environment = service["environment"]
        assert set(environment) <= VARIABLES | NOT_OURS, name
        for variable, value in environment.items():
            assert re.fullmatch(rf"\$\{{{variable}:-.*\}}", value), (
                "taken from the caller's variable of that name"
            )


def test_compose_reserves_the_cards_for_one_service_and_builds_the_other_without() -> None:
    gpu, cpu = COMPOSE["services"]["gpu"], COMPOSE["services"]["cpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in cpu
    assert (gpu["build"]["args"]["VARIANT"], cpu["build"]["args"]["VARIANT"]) == ("cuda", "cpu")
    assert (gpu["profiles"], cpu["profiles"]) == (["gpu"], ["cpu"])


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_compose_gives_running_requests_their_time(name: str) -> None:
    seconds = int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s"))
    assert seconds > Settings.model_fields["graceful_termination_timeout"].default


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_compose_lets_it_write_to_its_data_and_tmp_alone(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert [volume.split(":")[1] for volume in service["volumes"]] == ["/data"]
