"""An OpenAPI document as one Markdown page: routes by tag, parameters with types and limits, examples."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_HEAD = """\
# HTTP reference

Every route, parameter and limit, written from the server's own OpenAPI when these pages were built, with
the default settings. What the routes mean, and how they are used, is in [HTTP interface](api.md). Routes
under `/models/{model}` are the plain ones with the model's name, and a precision in it, in the path; they are
left out here.
"""
_LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}
_FEW = 8  # choices that a table shows


def reference(document: Mapping[str, Any]) -> str:
    """The page. Each tag is a section, in the document's order."""
    parts = [_HEAD]
    for tag in document["tags"]:
        parts.append(f"## {tag['name'].capitalize()}\n\n{tag['description']}\n")
        for method, path, operation in _operations(document):
            if tag["name"] in operation["tags"]:
                parts += _route(method, path, operation)
    parts.append("## Errors\n")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f"`{name}`, with a status of 400 or more:\n\n{_table(schema)}")
    return "\n".join(parts)


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in document["paths"].items():
        if not path.startswith("/models/"):
            yield from ((method.upper(), path, operation) for method, operation in methods.items())


def _route(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {method} {path}\n"
    yield operation.get("description", operation["summary"]).replace("``", "`") + "\n"
    if parameters := operation.get("parameters"):
        yield _rows([(f"{one['name']}", one["in"], _type(one["schema"])) for one in parameters], "where")
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"Body, `{kind}`:\n\n{_table(content['schema'])}"
    answer = operation["responses"]["200"]["content"]
    kinds = " or ".join(f"`{kind}`" for kind in answer)
    yield f"Answers {kinds}; an error is `{_error(operation)}`.\n"
    if (example := answer.get("application/json", {}).get("example")) is not None:
        yield f"```json\n{json.dumps(example, indent=1, ensure_ascii=False)}\n```\n"


def _error(operation: Mapping[str, Any]) -> str:
    schema: str = operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"]
    return schema.rpartition("/")[2]


def _table(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    fields = schema.get("properties", {}).items()
    return _rows(
        [(name, "yes" if name in required else "", _type(field)) for name, field in fields], "required"
    )


def _rows(rows: list[tuple[str, str, str]], second: str) -> str:
    lines = [f"| `{name}` | {middle} | {shown.replace('|', chr(92) + '|')} |" for name, middle, shown in rows]
    return "\n".join([f"| field | {second} | type and limits |", "|---|---|---|", *lines]) + "\n"


def _type(schema: Mapping[str, Any]) -> str:
    """A field's type in words; null alternatives are left out, since every optional field may be null."""
    if alternatives := schema.get("anyOf"):
        return " or ".join(_type(one) for one in alternatives if one.get("type") != "null")
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    if (choices := schema.get("enum")) is not None:
        few = ", ".join(f"`{choice}`" for choice in choices[:_FEW])
        return few + (f" … ({len(choices)} choices)" if len(choices) > _FEW else "")
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    words = [str(schema.get("type", "any"))]
    if isinstance(items := schema.get("items"), dict):
        words[0] = f"list of ({_type(items)})"
    words += [text.format(schema[key]) for key, text in _LIMITS.items() if key in schema]
    if fields := schema.get("properties"):
        words.append("with " + ", ".join(f"`{name}`" for name in fields))
    return ", ".join(words)
