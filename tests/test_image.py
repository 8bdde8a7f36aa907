"""The image's files match the code, as far as can be checked without building them."""

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
from tests.test_docs import EXTERNAL, VARIABLES

ROOT = Path(__file__).resolve().parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """(name, arguments) of every instruction of the Dockerfile, continued lines joined."""
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
    """The arguments of the final stage's instructions of that name."""
    return [rest for found, rest in stages()[-1] if found == name]


def pairs(name: str) -> dict[str, str]:
    """NAME=VALUE of the final stage's ENV or LABEL."""
    return dict(word.split("=", 1) for rest in last(name) for word in shlex.split(rest))


def copied() -> list[tuple[str, list[str]]]:
    """(``--from`` or an empty string, sources) of every COPY."""
    found = []
    for name, rest in instructions():
        if name == "COPY":
            words = rest.split()
            origin = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else ""
            found.append((origin, words[:-1]))
    return found


def test_every_stage_starts_from_the_configurable_base() -> None:
    assert [stage[0][1].split()[0] for stage in stages()] == ["${BASE_IMAGE}"] * len(stages())


def test_the_final_stage_has_packages_and_code_and_no_compiler() -> None:
    (user,) = last("RUN")
    assert "useradd" in user
    assert "apt-get" not in user
    origins = [rest.split()[0] for rest in last("COPY")]
    assert origins == ["--from=packages", "--from=code"]  # the large layer that seldom changes first


def test_the_image_runs_as_a_user_of_group_0() -> None:
    uid, gid = last("USER")[-1].split(":")
    assert int(uid) > 0, "a number: orchestrators that refuse root can't resolve a name"
    assert gid == "0"
    assert f"useradd --uid {uid} --gid {gid} " in last("RUN")[0]
    assert "--group=root --mode=0775 /data" in last("RUN")[0]


def test_the_entrypoint_is_the_server_without_a_shell() -> None:
    (entrypoint,), (health,) = last("ENTRYPOINT"), last("HEALTHCHECK")
    assert json.loads(entrypoint) == ["bitdial", "serve"]
    assert json.loads(health.split(" CMD ")[1])[-2:] == ["-m", "server.http.health_check"]
    assert not last("CMD")


def test_the_server_reads_the_images_variables(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Whether .dockerignore excludes a file: the last line that matches it, or a parent folder, decides."""
    excluded = False
    above = [str(one) for one in (PurePosixPath(path), *PurePosixPath(path).parents)][:-1]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        name = pattern.removeprefix("**/")
        # an asterisk matches no slash; patterns for any folder begin with **/ here
        names = [one.rsplit("/", 1)[-1] for one in above] if name != pattern else above
        if any(fnmatchcase(one, name) and one.count("/") <= name.count("/") for one in names):
            excluded = line == pattern
    return excluded


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".venv/bin/python", "tests/conftest.py", "docs/api.md", "scripts/install", ".env",
        "server/__pycache__/app.cpython-312.pyc", "loaders/kernels/kernels-avx2-0.so", "model.safetensors",
        "build/lib/server/app.py",
    ],
)  # fmt: skip
def test_the_build_context_excludes(path: str) -> None:
    assert ignored(path)


def test_the_build_context_has_every_copied_file_and_the_bundled_model() -> None:
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
    """The library's name is a hash of them: with one missing, the server would expect another name."""
    stage = next(stage for stage in stages() if stage[0][1].endswith(" AS kernels"))
    patterns = next(rest for name, rest in stage if name == "COPY").split()[:-1]
    for name in (*SOURCES, *HEADERS, "build.py"):
        assert any(fnmatchcase(f"loaders/kernels/{name}", pattern) for pattern in patterns), name


def test_the_documented_build_arguments_are_those_of_the_dockerfile() -> None:
    table = (ROOT / "docs" / "docker.md").read_text().split("| build argument |")[1].split("\n\n")[0]
    described = {
        name for row in table.splitlines()[2:] for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])
    }
    there = {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}
    assert described == there - {"VERSION"}  # which is not configurable


def test_the_server_reads_the_variables_in_the_document() -> None:
    text = (ROOT / "docs" / "docker.md").read_text()
    named = set(re.findall(r"-e ([A-Z_]+)=", text)) | set(re.findall(r"^\| `([A-Z_]+)=", text, re.M))
    assert {"PRECISIONS", "HF_HOME"} <= named <= VARIABLES | EXTERNAL


def test_compose_passes_variables_that_the_server_reads() -> None:
    for name in ("gpu", "cpu"):
        service = COMPOSE["services"][name]
        environment = service["environment"]
        assert set(environment) <= VARIABLES | EXTERNAL, name
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
def test_compose_waits_longer_than_the_graceful_timeout(name: str) -> None:
    seconds = int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s"))
    assert seconds > Settings.model_fields["graceful_termination_timeout"].default


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_compose_allows_writing_to_data_and_tmp_only(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert [volume.split(":")[1] for volume in service["volumes"]] == ["/data"]
