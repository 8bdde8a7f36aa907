"""The results of ``scripts/textbook.py`` in Markdown."""

from typing import Any

from server.tables import markdown_table

Figures = dict[str, Any]


def markdown(found: Figures) -> str:
    """The results as a document."""
    host = f"{found['cpu']}, torch {found['torch']}, {found['threads']} threads"
    sections = [
        f"# Published results, reproduced on {found['date']}",
        f"`scripts/textbook.py` on {host}. The weights of GPT-2 and BERT are random.",
        *_gpt2_section(found["gpt2"]),
        *_bert_section(found["bert"]),
        *_own_section(found["own"]),
    ]
    return "\n\n".join(sections)


def _gpt2_section(found: Figures) -> list[str]:
    layers = found["linear8bitlt"]
    kinds = list(dict.fromkeys(name.split(".", 3)[-1] for name in layers))
    blocks = len(layers) // len(kinds)
    listed = f"{', '.join(f'`{kind}`' for kind in kinds)} of each of {blocks} blocks"
    return [
        "## GPT-2 small",
        f"Parameters in float32: {found['fp32_bytes']:,} bytes; published: {found['published_bytes']:,}.",
        f"`load_in_8bit=True` makes {len(layers)} layers `Linear8bitLt`: {listed}. "
        "The head is not among them: it is tied to the embedding.",
    ]


def _bert_section(found: Figures) -> list[str]:
    sizes, published, times = found["megabytes"], found["published_megabytes"], found["milliseconds"]
    table = [["", "fp32", "int8", "ratio"]]
    table.append(["MB", *_pair(sizes, ".1f")])
    table.append(["MB, published", *_pair(published, ".1f")])
    table.append(["ms, one thread", *_pair(times, ".0f")])
    return [
        "## BERT-base in PyTorch's dynamic int8",
        f"Size of the saved file; time of one text of {found['tokens']} tokens.",
        markdown_table(table),
        "The embeddings (95 MB) stay float32: the file shrinks by 2.4, not by 4.",
    ]


def _own_section(found: Figures) -> list[str]:
    rows = [["precision", "top-1", "MB", "bits per weight", "ms per token"]]
    for name, one in found["precisions"].items():
        size, bits = f"{one['weights_bytes'] / 1e6:.2f}", f"{one['bits_per_weight']:.2f}"
        rows.append([name, f"{one['top1']:.2%}", size, bits, f"{one['milliseconds_a_token']:.2f}"])
    return [
        f"## Accuracy, size and latency of the {found['model']} model",
        f"Next-token top-1 on {found['predicted_tokens']:,} held-out tokens; latency of one row.",
        markdown_table(rows),
    ]


def _pair(values: dict[str, float], form: str) -> list[str]:
    one, other = values["fp32"], values["int8"]
    return [format(one, form), format(other, form), f"{one / other:.2f}"]
