"""Prometheus and Grafana in compose.yaml: hardened, and each file is where the other expects it."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.files import COMPOSE, DEPLOY, ROOT, SCRAPING

SERVICES: dict[str, Any] = COMPOSE["services"]
MONITORING = {name: one for name, one in SERVICES.items() if one["profiles"] == ["monitoring"]}
EACH = pytest.mark.parametrize("service", MONITORING.values(), ids=list(MONITORING))


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Path in the container → (file or volume, mode)."""
    found = {}
    for volume in service["volumes"]:
        source, target, *mode = volume.split(":")
        found[target] = (source, *mode) if mode else (source, "rw")
    return found


def test_the_profile_has_both() -> None:
    assert set(MONITORING) == {"prometheus", "grafana"}


@EACH
def test_a_service_is_read_only_and_without_root_or_capabilities(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert service["mem_limit"]
    assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])


@EACH
def test_only_this_host_reaches_a_service(service: dict[str, Any]) -> None:
    (port,) = service["ports"]
    assert port.startswith("127.0.0.1:")


@EACH
def test_mounted_files_exist_and_cannot_be_written(service: dict[str, Any]) -> None:
    writable = []
    for source, mode in mounts(service).values():
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert mode == "ro"
        else:
            assert source in COMPOSE["volumes"]
            writable.append(source)
    assert len(writable) == 1


def test_prometheus_reads_its_configuration_and_the_alerts_beside_it() -> None:
    (command,) = SERVICES["prometheus"]["command"]
    configuration = re.findall(r"--config\.file=(\S+)", command)[0]
    mounted = mounts(SERVICES["prometheus"])
    assert (ROOT / mounted[configuration][0]).samefile(DEPLOY / "prometheus.yml")
    for name in SCRAPING["rule_files"]:
        assert (ROOT / mounted[f"{Path(configuration).parent}/{name}"][0]).samefile(DEPLOY / name)
    assert re.findall(r"--storage\.tsdb\.path=(\S+)", command)[0] in mounted


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no shell here")
@pytest.mark.parametrize("key", ["", "a key with % and $HOME"])
def test_prometheus_starts_with_the_key_in_a_file_of_its_own(key: str, tmp_path: Path) -> None:
    service = SERVICES["prometheus"]
    (job,) = SCRAPING["scrape_configs"]
    path = job["authorization"]["credentials_file"]
    assert Path(path).parent == Path(service["tmpfs"][0])
    # as Compose passes it: $$ is a dollar sign
    command = service["command"][0].replace("$$", "$")
    command = command.replace(path, str(tmp_path / "key")).replace("/bin/prometheus", "echo")
    done = subprocess.run(
        ["/bin/sh", *service["entrypoint"][1:], command],
        env={"API_KEY": key, "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("--config.file=")
    assert (tmp_path / "key").read_text() == key
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    assert service["environment"]["API_KEY"] == SERVICES["cpu"]["environment"]["API_KEY"]


def test_prometheus_finds_both_servers_by_their_name() -> None:
    (job,) = SCRAPING["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    for name in ("gpu", "cpu"):
        assert SERVICES[name]["networks"]["default"]["aliases"] == discovery["names"]
        assert SERVICES[name]["ports"][0].endswith(f":{discovery['port']}")


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{SERVICES['prometheus']['ports'][0].rsplit(':', 1)[1]}"
    assert source["jsonData"]["timeInterval"] == SCRAPING["global"]["scrape_interval"]
    mounted = mounts(SERVICES["grafana"])
    (provider,) = yaml.safe_load((DEPLOY / "grafana/dashboards/bitdial.yml").read_text())["providers"]
    folder = mounted[provider["options"]["path"]][0]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (ROOT / folder / home.name).is_file()


def test_grafana_has_neither_a_login_nor_an_administrator() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
