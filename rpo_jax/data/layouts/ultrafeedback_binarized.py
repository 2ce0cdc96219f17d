"""HuggingFaceH4/ultrafeedback_binarized: whole conversations, with the prompt repeated in a column."""

from __future__ import annotations

from rpo_jax.data.layouts.layout import Layout, per_row, shared_conversation

LAYOUT = Layout(
    # The conversations hold the prompt; the column repeats its text without the roles.
    read=per_row(shared_conversation),
    columns=("prompt", "prompt_id", "chosen", "rejected"),
    truncation_side="keep_end",
    description="HuggingFaceH4/ultrafeedback_binarized: chosen and rejected conversations that share their prompt",
)
