"""What we add to vLLM's own worker process. Loaded there by name, so it imports vLLM only where it needs it."""

from __future__ import annotations

from typing import Any


class WeightReload:
    """Mixed into vLLM's worker; called by `AsyncLLM.collective_rpc`."""

    reload_weights: Any
    get_model: Any

    def load_checkpoint(self, checkpoint: str) -> None:
        """Put the weights of `checkpoint` in place of the engine's."""
        from vllm.platforms import current_platform

        self.reload_weights(weights_path=checkpoint)
        model = self.get_model()
        if current_platform.is_cpu() and model.config.tie_word_embeddings and hasattr(model, "lm_head"):
            # On CPU the output layer multiplies by a packed copy of its weights. Reloading repacks every layer but a
            # tied output layer, which would go on with the old weights. Where there is none (Gemma 2), the embeddings
            # stand in for it, and they are repacked.
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
