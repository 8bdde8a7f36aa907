"""An exported GPT-2 → GGUF for llama.cpp, and a folder for CTranslate2. Needs no torch.

Runs in the peers' environment.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
_GGUF_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""As llama.cpp's convert_hf_to_gguf.py maps GPT-2's names."""


class Exported:
    """A checkpoint written by ``export``.

    Args:
        folder: where it was written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "model.json").read_text())

    def weight(self, name: str) -> np.ndarray:
        """A parameter by ``transformers``' name; matrices as (outputs, inputs): Conv1D's are transposed."""
        array: np.ndarray = np.load(self._folder / f"{name}.npy")
        return np.ascontiguousarray(array.T) if name.endswith(_CONV1D) else array

    def names(self) -> list[str]:
        return sorted(file.stem for file in self._folder.glob("*.npy"))


def gguf_name(name: str) -> str:
    """``h.3.attn.c_attn.weight`` → ``blk.3.attn_qkv.weight``."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("h."):
        return f"{_GGUF_NAMES[stem]}.{kind}"
    _, layer, inner = stem.split(".", 2)
    return f"blk.{layer}.{_GGUF_NAMES[inner]}.{kind}"


def write_gguf(exported: Exported, file: Path) -> Path:
    """The model in float32, with its tokenizer, as llama.cpp reads it; the head is the tied embedding."""
    import gguf

    facts = exported.facts
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_name(facts["name"])
    writer.add_context_length(facts["context"])
    writer.add_embedding_length(facts["width"])
    writer.add_feed_forward_length(facts["inner"])
    writer.add_block_count(facts["layers"])
    writer.add_head_count(facts["heads"])
    writer.add_layer_norm_eps(facts["epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(facts["tokens"])
    writer.add_token_types(list(_token_types(facts, gguf.TokenType)))
    writer.add_token_merges(facts["merges"])
    writer.add_bos_token_id(facts["bos"])
    writer.add_eos_token_id(facts["eos"])
    for name in exported.names():
        writer.add_tensor(gguf_name(name), exported.weight(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _token_types(facts: dict[str, Any], kinds: Any) -> Iterator[Any]:
    special, unused = set(facts["special"]), set(facts["unused"])
    for id_ in range(len(facts["tokens"])):
        yield kinds.CONTROL if id_ in special else kinds.UNUSED if id_ in unused else kinds.NORMAL


def write_ctranslate2(exported: Exported, folder: Path) -> Path:
    """The model in float32, filled in as CTranslate2's GPT2Loader does; it quantizes when it loads."""
    from ctranslate2.specs import common_spec, transformer_spec

    facts = exported.facts
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        facts["layers"], facts["heads"], pre_norm=True, activation=common_spec.Activation.GELUTanh
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = exported.weight("wte.weight")
    decoder.position_encodings.encodings = exported.weight("wpe.weight")
    decoder.projection.weight = decoder.embeddings.weight
    _fill_norm(exported, decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        _fill_norm(exported, layer.self_attention.layer_norm, f"h.{i}.ln_1")
        _fill_linear(exported, layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        _fill_linear(exported, layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        _fill_norm(exported, layer.ffn.layer_norm, f"h.{i}.ln_2")
        _fill_linear(exported, layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        _fill_linear(exported, layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
    spec.register_vocabulary(facts["tokens"])
    end = facts["tokens"][facts["eos"]]
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
    spec.validate()
    spec.optimize()
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))
    return folder


def _fill_norm(exported: Exported, spec: Any, name: str) -> None:
    spec.gamma, spec.beta = exported.weight(f"{name}.weight"), exported.weight(f"{name}.bias")


def _fill_linear(exported: Exported, spec: Any, name: str) -> None:
    spec.weight, spec.bias = exported.weight(f"{name}.weight"), exported.weight(f"{name}.bias")
