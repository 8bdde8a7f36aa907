"""The API against /openapi.json: allowed and forbidden requests, and promised responses."""

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from server.app import ROUTES
from server.http.openapi import TAGS
from server.http.route_facts import declared
from tests.conftest import Loads, serving
from tests.fakes import fake_checkpoint
from tests.routes.test_report_route import keep_report

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
MADE_AT_ONCE = [sys.executable, "-c", 'print(\'{"kept": ""}\')']
"""Replaces the process that measures a report."""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from server.app import create_app
    from server.settings.server import Settings

    folder = tmp_path_factory.mktemp("fake")
    app = create_app(
        Settings(precisions="fp32", device="cpu"),
        open_checkpoint=lambda *_: fake_checkpoint(folder),
        load=Loads(),
    )
    with pytest.MonkeyPatch.context() as patch, serving(app) as address:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr("server.report.background.start_command", lambda *_: MADE_AT_ONCE)
        keep_report(app.state.default.reports)
        report = app.state.default.reports.latest()
        patch.setattr(app.state.default.reports, "latest", lambda: report)  # every test has its own cache
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


def name_the_model(case: Any) -> None:
    """OpenAPI can't express which names are valid."""
    for parameters in (case.path_parameters, case.query):
        if parameters and "model" in parameters:
            parameters["model"] = "fake"
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "fake"


def exchange(operation: Any, mode: GenerationMode) -> set[int]:
    """The received statuses."""
    statuses: set[int] = set()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            name_the_model(case)
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    call()
    return statuses


@pytest.mark.parametrize("tag", sorted(TAGS))
def test_valid_requests_get_documented_responses(api: Any, tag: str) -> None:
    operations = [one.ok() for one in api.include(tag=tag).get_all_operations()]
    assert operations
    for operation in operations:
        statuses = exchange(operation, GenerationMode.POSITIVE)
        # the model has no chat template; the only valid id is generated too seldom
        exempt = operation.path.endswith(("/chat/completions", "/v1/models/{id}"))
        assert exempt or 200 in statuses, operation.label


def test_invalid_requests_are_refused(api: Any) -> None:
    operations = [one.ok() for one in api.include(method="POST").get_all_operations()]
    # the same bodies go to the routes with a model's name in their path
    with_body = [one for one in operations if one.body and not one.path.startswith("/models/")]
    assert len(with_body) > 5
    for operation in with_body:
        assert 400 <= max(exchange(operation, GenerationMode.NEGATIVE)) < 500, operation.label


def keys(value: Any) -> Any:
    """The kinds of values in a response."""
    if isinstance(value, dict):
        return {name: keys(inner) for name, inner in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value else None


EXAMPLES = {
    path: facts.example
    for route in ROUTES
    if (facts := declared(route)) and facts.example and not (path := route.path).startswith("/models/")
}


@pytest.mark.parametrize(("path", "example"), EXAMPLES.items())
def test_examples_have_the_shape_of_answers(client: TestClient, path: str, example: Any) -> None:
    body = {"inputs" if path != "/v1/completions" else "prompt": "abc"}
    assert keys(client.post(path, json=body).json()) == keys(example)


def example_request(path: str, operation: dict[str, Any]) -> tuple[str, Any]:
    """The path and body that /docs sends if nothing is filled in."""
    for parameter in operation.get("parameters", []):
        if parameter["required"]:
            named = [example["value"] for example in parameter.get("examples", {}).values()]
            value = parameter.get("example") or next(iter(named), None) or parameter["schema"]["default"]
            path = path.replace(f"{{{parameter['name']}}}", value)
    body = operation.get("requestBody")
    return path, body and body["content"]["application/json"]["example"]


def test_every_example_works_unchanged(
    make_chatty: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a model with a chat template, which only chat needs."""
    client = make_chatty()
    app: Any = client.app
    monkeypatch.setattr("server.report.background.start_command", lambda *_: MADE_AT_ONCE)
    keep_report(app.state.default.reports)
    paths = client.get("/openapi.json").json()["paths"]
    operations = [(path, method, one) for path, each in paths.items() for method, one in each.items()]
    assert len(operations) > 20
    for path, method, operation in operations:
        address, body = example_request(path, operation)
        reply = client.request(method, address, json=body)
        assert reply.status_code == 200, (method, address, reply.text)
        assert "error_type" not in reply.text, (method, address, reply.text)
    assert client.get("/health").status_code == 200


def numbers(node: Any) -> Iterator[int | float]:
    if isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from numbers(inner)
    elif isinstance(node, int | float):
        yield node


def test_javascript_can_hold_every_number_that_is_described(client: TestClient) -> None:
    assert max(abs(number) for number in numbers(client.get("/openapi.json").json())) < 2**53


def test_keys_are_described_where_there_are_any(make_client: Callable[..., TestClient]) -> None:
    assert "security" not in make_client().get("/openapi.json").json()
    bearer = {"Authorization": "Bearer k"}
    secured = make_client(api_key="k").get("/openapi.json", headers=bearer).json()
    assert secured["security"] == [{"key": []}]
    assert secured["paths"]["/health"]["get"]["security"] == []


def test_the_docs_page_loads_no_external_files(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "http" not in page
    for asset in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert client.get(asset).status_code == 200, asset
