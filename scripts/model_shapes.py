"""Configurations of published models, by name, and how many parameters their authors' checkpoints have."""

from typing import Any

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config


def _gpt2(width: int, layers: int, heads: int) -> PreTrainedConfig:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads)


def _llama(
    width: int, inner: int, layers: int, heads: int, keys: int, words: int, **others: Any
) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, max_position_embeddings=8192, **others,
    )  # fmt: skip


def _qwen(
    width: int, inner: int, layers: int, heads: int, keys: int, words: int, tied: bool
) -> PreTrainedConfig:
    return Qwen2Config(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, max_position_embeddings=32768,
        tie_word_embeddings=tied,
    )  # fmt: skip


SHAPES: dict[str, tuple[PreTrainedConfig, int]] = {
    "GPT-2 124M": (_gpt2(768, 12, 12), 124_439_808),
    "GPT-2 355M": (_gpt2(1024, 24, 16), 354_823_168),
    "GPT-2 774M": (_gpt2(1280, 36, 20), 774_030_080),
    "GPT-2 1.5B": (_gpt2(1600, 48, 25), 1_557_611_200),
    "SmolLM2 135M": (_llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True), 134_515_008),
    "SmolLM2 1.7B": (_llama(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True), 1_711_376_384),
    "Qwen2.5 0.5B": (_qwen(896, 4864, 24, 14, 2, 151936, True), 494_032_768),
    "Qwen2.5 1.5B": (_qwen(1536, 8960, 28, 12, 2, 151936, True), 1_543_714_304),
    "Qwen2.5 3B": (_qwen(2048, 11008, 36, 16, 2, 151936, True), 3_085_938_688),
    "Qwen2.5 7B": (_qwen(3584, 18944, 28, 28, 4, 152064, False), 7_615_616_512),
    "Qwen2.5 14B": (_qwen(5120, 13824, 48, 40, 8, 152064, False), 14_770_033_664),
    "Qwen2.5 32B": (_qwen(5120, 27648, 64, 40, 8, 152064, False), 32_763_876_352),
    "Llama-3 8B": (_llama(4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "Llama-3 70B": (_llama(8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
}
