"""CTranslate2 on a batch of rows. Runs in the peers' environment."""

import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np


class CTranslate2:
    """One converted folder, in one computation type.

    Args:
        folder: of the converted model.
        kind: ``float32`` or ``int8``; the weights are quantized while loading.
        threads: of a forward pass.
    """

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        self.weights_bytes: int | None = None  # not reported
        self._generator = ctranslate2.Generator(str(folder), compute_type=kind, intra_threads=threads)

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[list[float], list[list[int]]]:
        """Seconds from the start to each step's last token, and each row's tokens."""
        times = [0.0] * tokens
        started = time.perf_counter()

        def on_token(result: Any) -> bool:
            times[result.step] = time.perf_counter() - started
            return False

        results = self._generator.generate_batch(
            [[str(id_) for id_ in prompt] for prompt in prompts],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=on_token,
        )
        return times, [result.sequences_ids[0] for result in results]

    def score(self, texts: list[list[int]], kept: int) -> np.ndarray:
        """Logits (texts, kept, vocabulary) after the last ``kept`` ids of each text, in float32."""
        logits = self._generator.forward_batch(texts, return_log_probs=False)
        return np.array(logits, dtype=np.float32)[:, -kept:]

    def close(self) -> None:
        self._generator.unload_model()
