"""The settings of a replica, the application's deployments, and its examples of files."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from server.ray.configuration import Resources, replica_settings

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'bitdial[ray]'")
EXAMPLES = Path(__file__).resolve().parent.parent.parent / "docs" / "deploy" / "ray"


def test_a_replica_loads_its_own_precision() -> None:
    given = {"precision": "fp32", "precisions": ("fp32", "int8"), "cors_allow_origin": ("https://a",)}
    settings = replica_settings(given, {}, "int8", Resources())
    assert settings.first_precisions() == ("int8",)
    assert settings.cors_allow_origin == ()


def test_a_user_config_goes_before_the_application_and_that_before_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAX_BATCH_SIZE", "2")
    monkeypatch.setenv("MAX_BEST_OF", "2")
    settings = replica_settings(
        {"max_batch_size": 3, "max_best_of": 3}, {"max_best_of": 4}, "fp32", Resources()
    )
    assert (settings.max_batch_size, settings.max_best_of) == (3, 4)
    assert replica_settings({}, {}, "fp32", Resources()).max_batch_size == 2


@pytest.mark.parametrize(
    "wrong", [{"max_batch": 3}, {"max_batch_size": 0}, {"precisons": "fp32"}, {"precision": "int8"}]
)
def test_a_wrong_user_config_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replica_settings({}, wrong, "fp32", Resources())


def test_threads_and_memory_are_those_assigned_unless_set() -> None:
    given = replica_settings({}, {}, "fp32", Resources(cpus=3.0, memory=2**30))
    assert (given.threads, given.memory_budget) == (3, 2**30)
    chosen = replica_settings(
        {"threads": 1, "memory_budget": 5}, {}, "fp32", Resources(cpus=3.0, memory=2**30)
    )
    assert (chosen.threads, chosen.memory_budget) == (1, 5)
    assert replica_settings({}, {}, "fp32", Resources(cpus=0.5)).threads is None


def test_a_share_of_a_card_is_a_share_of_its_memory() -> None:
    assert Resources(gpus=0.25, card_bytes=80, memory=7).memory_budget() == 20
    assert Resources(gpus=1.0, card_bytes=80).memory_budget() is None
    assert Resources(gpus=2.0, card_bytes=80).memory_budget() is None


@pytest.mark.parametrize("name", ["one-gpu.yaml", "four-gpus.yaml", "cpu-cluster.yaml"])
def test_the_examples_are_valid_and_name_deployments_that_exist(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve.schema import ServeDeploySchema

    from server.ray.arguments import Arguments
    from server.ray.deployments import ROUTER, build
    from server.settings.server import Settings

    document = yaml.safe_load((EXAMPLES / name).read_text())
    (application,) = ServeDeploySchema.model_validate(document).applications
    assert application.import_path == "server.ray_app:app"
    for variable, value in application.runtime_env["env_vars"].items():
        monkeypatch.setenv(variable, value)
    settings = Settings()
    built = build(Arguments(**application.args), settings)
    names = {ROUTER, *settings.first_precisions()}
    assert {deployment.name for deployment in application.deployments} <= names
    assert built._bound_deployment.name == ROUTER
    for deployment in document["applications"][0]["deployments"]:
        replica_settings({}, deployment.get("user_config", {}), "fp32", Resources())


def test_a_variable_that_is_not_valid_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.ray_app import app

    monkeypatch.setenv("PRECISIONS", "int3")
    with pytest.raises(ValueError, match=r"^--precisions \(or PRECISIONS\): unknown precision 'int3'.*$"):
        app({})


def test_more_replicas_at_most_is_autoscaling_by_load() -> None:
    from server.ray.arguments import Arguments
    from server.ray.deployments import _options
    from server.settings.server import Settings

    settings = Settings(max_batch_size=8, max_concurrent_requests=64)
    fixed = _options(Arguments(replicas=2, num_gpus=0.5), settings)
    assert (fixed["num_replicas"], fixed["ray_actor_options"]["num_gpus"]) == (2, 0.5)
    assert fixed["max_ongoing_requests"] > 64  # figures pass a replica whose places are taken
    scaled = _options(Arguments(replicas=1, max_replicas=3), settings)["autoscaling_config"]
    assert scaled == {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 8}
