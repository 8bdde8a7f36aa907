"""One client's calls against a server: a JSON line for each. ``scripts/check_clients.py`` runs it.

python calls.py CLIENT ADDRESS
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

PROMPT = "The with statement"
MESSAGES = [{"role": "user", "content": "Hi"}]
LONG = "word " * 2000
Call = tuple[str, Callable[[], object]]
"""Its name, and a function whose result is true on success."""


def _raises(kind: type[BaseException], work: Callable[[], object]) -> Callable[[], object]:
    def run() -> bool:
        try:
            work()
        except kind:
            return True
        raise AssertionError(f"no {kind.__name__}")

    return run


def of_openai(address: str) -> Iterator[Call]:
    import openai

    client: Any = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    text: dict[str, Any] = {"model": "tgi", "prompt": PROMPT, "max_tokens": 4}
    chat: dict[str, Any] = {"model": "tgi", "messages": MESSAGES, "max_completion_tokens": 4}
    inert: dict[str, Any] = {
        "tools": [], "tool_choice": "none", "parallel_tool_calls": False, "response_format": {"type": "text"},
        "seed": -1, "top_p": 0, "store": False, "metadata": {}, "service_tier": "auto", "logit_bias": {},
    }  # fmt: skip
    vllm = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
            "stop_token_ids": [], "skip_special_tokens": True, "use_beam_search": False}  # fmt: skip
    usage = {"include_usage": True}

    def streamed() -> bool:
        *_, last = client.completions.create(**text, stream=True, stream_options=usage)
        return bool(last.usage.completion_tokens)

    def chatted() -> bool:
        chunks = client.chat.completions.create(**chat, stream=True)
        return any(chunk.choices[0].delta.content for chunk in chunks)

    yield "models.list", lambda: len(client.models.list().data) > 1
    yield "completions", lambda: client.completions.create(**text).choices[0].finish_reason
    yield "completions, stream", streamed
    yield "completions, n and logprobs", lambda: client.completions.create(**text, n=2, logprobs=2).choices[1]
    yield "completions, empty prompt", lambda: client.completions.create(model="tgi", prompt="").usage
    yield "completions, vLLM's", lambda: client.completions.create(**text, extra_body=vllm).usage
    yield "chat", lambda: client.chat.completions.create(**chat).choices[0].finish_reason
    yield "chat, stream", chatted
    yield "chat, fields without effect", lambda: client.chat.completions.create(**chat, **inert).usage
    yield "chat, vLLM's", lambda: client.chat.completions.create(**chat, extra_body=vllm).usage
    too_long = {**text, "prompt": LONG}
    yield "context exceeded", _raises(openai.BadRequestError, lambda: client.completions.create(**too_long))
    embed = partial(client.embeddings.create, model="tgi", input="x")
    yield "an unknown route", _raises(openai.NotFoundError, embed)


def of_huggingface(address: str) -> Iterator[Call]:
    from huggingface_hub import InferenceClient

    client: Any = InferenceClient(address)
    yield "text_generation", lambda: client.text_generation(PROMPT, max_new_tokens=4)
    more = {"details": True, "decoder_input_details": True}
    text = partial(client.text_generation, PROMPT, max_new_tokens=4)
    chat = partial(client.chat_completion, MESSAGES, max_tokens=4)
    yield "text_generation, details", lambda: text(**more).details.tokens
    yield "text_generation, stream", lambda: "".join(text(stream=True))
    yield "chat_completion", lambda: chat().choices[0].finish_reason
    yield "chat_completion, stream", lambda: list(chat(stream=True))
    under: Any = InferenceClient(f"{address}/v1")
    yield "chat_completion under /v1", lambda: under.chat_completion(MESSAGES, max_tokens=4).choices[0]


def of_litellm(address: str) -> Iterator[Call]:
    import litellm

    there: dict[str, Any] = {
        "api_base": f"{address}/v1",
        "api_key": "none",
        "max_tokens": 4,
        "num_retries": 0,
    }
    chat: dict[str, Any] = {"messages": MESSAGES, **there}

    def of_provider(name: str) -> Iterator[Call]:
        one: dict[str, Any] = {"model": f"{name}/tgi", **chat}
        long = {**one, "messages": [{"role": "user", "content": LONG}]}
        yield f"completion, {name}", lambda: litellm.completion(**one).usage
        yield f"completion, {name}, stream", lambda: list(litellm.completion(**one, stream=True))
        exceeded = _raises(litellm.ContextWindowExceededError, lambda: litellm.completion(**long))
        yield f"context exceeded, {name}", exceeded

    yield from of_provider("openai")
    yield from of_provider("hosted_vllm")
    text = {"model": "text-completion-openai/tgi", "prompt": PROMPT, **there}
    yield "text_completion", lambda: litellm.text_completion(**text).choices[0].finish_reason
    extra = {"model": "hosted_vllm/tgi", **chat, "top_k": 5, "extra_body": {"min_tokens": 2}}
    yield "completion, vLLM's", lambda: litellm.completion(**extra).usage


def of_langchain(address: str) -> Iterator[Call]:
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI, OpenAI

    there: dict[str, Any] = {
        "base_url": f"{address}/v1",
        "api_key": "none",
        "max_retries": 0,
        "max_tokens": 4,
    }
    chat, text = ChatOpenAI(model="tgi", **there), OpenAI(model="tgi", **there)
    yield "ChatOpenAI.invoke", lambda: chat.invoke("Hi").response_metadata["finish_reason"]
    yield "ChatOpenAI.stream", lambda: list(chat.stream("Hi"))
    yield (
        "ChatOpenAI, stop",
        lambda: chat.bind(stop=["x", "\n"]).invoke("Hi").response_metadata["finish_reason"],
    )
    turns = [("system", "Be kind"), ("human", "Hi"), ("ai", ""), ("human", "Hi")]
    yield "ChatOpenAI, turns", lambda: chat.invoke(turns).response_metadata["finish_reason"]
    yield "context exceeded", _raises(ContextOverflowError, lambda: chat.invoke(LONG))
    yield "OpenAI.invoke", lambda: isinstance(text.invoke(PROMPT), str)
    yield "OpenAI.stream", lambda: list(text.stream(PROMPT))


def of_vllm(address: str) -> Iterator[Call]:
    """The requests of its benchmark (vllm/benchmarks/lib/endpoint_request_func.py)."""
    import httpx

    stream: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    text = {"model": "tgi", "prompt": PROMPT, "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None}
    content = [{"type": "text", "text": PROMPT}]
    chat = {"model": "tgi", "messages": [{"role": "user", "content": content}], "max_completion_tokens": 8}
    # its sampling options go into the body unchanged
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "frequency_penalty": 0.1,
               "presence_penalty": 0.1, "repetition_penalty": 1.05}  # fmt: skip

    def benchmarked(path: str, body: dict[str, Any]) -> bool:
        reply = httpx.post(f"{address}{path}", json={**body, **stream, "ignore_eos": True}, timeout=60)
        assert reply.status_code == 200, reply.text
        *chunks, last = reply.text.strip().split("\n\n")
        events = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
        assert last == "data: [DONE]"
        tokens = [one["usage"]["completion_tokens"] for one in events if not one["choices"]]
        return any(one["choices"] for one in events) and tokens == [8]

    for path, body in (("/v1/completions", text), ("/v1/chat/completions", chat)):
        yield path, partial(benchmarked, path, body)
        yield f"{path}, sampling", partial(benchmarked, path, {**body, **options})


CLIENTS = {
    "openai": of_openai,
    "huggingface_hub": of_huggingface,
    "litellm": of_litellm,
    "langchain-openai": of_langchain,
    "vllm bench serve": of_vllm,
}


def main(client: str, address: str) -> None:
    for name, work in CLIENTS[client](address):
        error = None
        try:
            if not work():
                error = "empty result"
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"[:300]
        print(json.dumps({"call": name, "error": error}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
