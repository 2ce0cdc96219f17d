"""Dataset layouts by name: one module each, listed here."""

from __future__ import annotations

from rpo_jax.data.layouts import (
    hh_rlhf,
    oasst1,
    preference,
    ranked,
    sharegpt,
    shp,
    summarize_from_feedback,
    ultrafeedback_binarized,
    unpaired,
)
from rpo_jax.data.layouts.layout import Layout

LAYOUTS: dict[str, Layout] = {
    "preference": preference.LAYOUT,
    "unpaired": unpaired.LAYOUT,
    "ranked": ranked.LAYOUT,
    "hh_rlhf": hh_rlhf.LAYOUT,
    "summarize_from_feedback": summarize_from_feedback.LAYOUT,
    "ultrafeedback_binarized": ultrafeedback_binarized.LAYOUT,
    "shp": shp.LAYOUT,
    "oasst1": oasst1.LAYOUT,
    "sharegpt": sharegpt.LAYOUT,
}
