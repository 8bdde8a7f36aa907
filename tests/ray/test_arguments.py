"""Wrong arguments of the application end in one line, in Ray's command and in the status of a file."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'bitdial[ray]'")

NAMES = "replicas, max_replicas, num_cpus, num_gpus, affinity and user_config"
CARDS = "a share of a card from 0 to 1, with four decimals at most, or a whole number of cards"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"replicas": "0"}, "replicas: a whole number, 1 or more, not '0'"),
        ({"replicas": -1}, "replicas: a whole number, 1 or more, not -1"),
        ({"replicas": "two"}, "replicas: a whole number, 1 or more, not 'two'"),
        ({"replicas": "1.5"}, "replicas: a whole number, 1 or more, not '1.5'"),
        ({"replicas": "2", "max_replicas": "1"}, "max_replicas: 2 (replicas) or more, not 1"),
        ({"max_replicas": "0"}, "max_replicas: a whole number, no less than replicas, not '0'"),
        ({"num_gpus": "-1"}, f"num_gpus: {CARDS}, not '-1'"),
        ({"num_gpus": "1.5"}, f"num_gpus: {CARDS}, not '1.5'"),
        ({"num_gpus": "nan"}, f"num_gpus: {CARDS}, not 'nan'"),
        ({"num_cpus": "inf"}, "num_cpus: 0 or more, with four decimals at most, not 'inf'"),
        ({"num_cpus": 0.00001}, "num_cpus: 0 or more, with four decimals at most, not 1e-05"),
        ({"affinity": "maybe"}, "affinity: true or false, not 'maybe'"),
        ({"user_config": "x"},
         "user_config: settings of docs/settings.md and their values, in a file, not 'x'"),
        ({"replica": "2"}, f"unknown argument 'replica'; there are {NAMES}"),
        ({"precision": "int3"}, "precision is no argument but a setting: set the variable PRECISION"),
        ({"replicas": 0, "num_cpus": -1}, "replicas: a whole number, 1 or more, not 0; "
         "num_cpus: 0 or more, with four decimals at most, not -1"),
        ({"user_config": {"max_batch": 3}},
         "user_config has max_batch; it takes settings of docs/settings.md"),
        ({"user_config": {"max_batch_size": 0}},
         "max_batch_size: Input should be greater than or equal to 1"),
        ({"user_config": {"precision": "int8"}},
         "user_config can't set precision of a replica; set it for the application"),
    ],
)  # fmt: skip
def test_an_argument_that_is_not_valid_is_named_in_one_line(arguments: dict[str, Any], line: str) -> None:
    from server.ray.arguments import InvalidApplication
    from server.ray_app import app

    with pytest.raises(InvalidApplication) as refused:
        app(arguments)
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("name", "value", "start"),
    [
        ("PRECISIONS", "fp32,int3", "--precisions (or PRECISIONS): unknown precision 'int3'; choose from"),
        ("PRECISION", "int3", "--precision (or PRECISION): unknown precision 'int3'; choose from"),
        ("PRECISION", "auto", 'precision "auto" chooses by a report'),
    ],
)
def test_a_precision_that_can_not_be_served_is_named_in_one_line(
    name: str, value: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.ray.arguments import InvalidApplication
    from server.ray_app import app

    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidApplication) as refused:
        app({})
    assert str(refused.value).startswith(start)
    assert "\n" not in str(refused.value)


def test_arguments_are_read_from_words() -> None:
    from server.ray.arguments import Arguments, parse

    words = {"replicas": "2", "max_replicas": "4", "num_gpus": "0.25", "num_cpus": "2", "affinity": "true"}
    assert parse(words) == Arguments(replicas=2, max_replicas=4, num_gpus=0.25, num_cpus=2, affinity=True)
    assert parse({"num_gpus": "2"}).num_gpus == 2


def test_rays_command_shows_the_line_alone() -> None:
    serve = Path(sys.executable).with_name("serve")  # the environment's, which needn't be active
    done = subprocess.run(
        [serve, "run", "server.ray_app:app", "replicas=0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: replicas: a whole number, 1 or more, not '0'"
    assert "Traceback" not in done.stdout + done.stderr


def test_the_status_of_a_deployed_file_has_the_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private import application_state
    from ray.serve.schema import LoggingConfig

    # which only a process of a cluster can do
    monkeypatch.setattr(application_state, "configure_component_logger", lambda **options: None)
    built = application_state.build_serve_application._function(
        "server.ray_app:app", "1", "default", {"num_gpus": -1}, LoggingConfig(), None, {}, {}, {}
    )
    assert built == (None, None, f"num_gpus: {CARDS}, not -1")
