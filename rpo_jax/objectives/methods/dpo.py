"""Objectives that are a link on a weighting of the contrast matrix: DPO, RPO and their nearest relatives."""

from __future__ import annotations

from rpo_jax.objectives.pairwise import LinkObjective

OBJECTIVES = {
    "rpo": LinkObjective(
        description="Relative Preference Optimization", source="arXiv 2402.10958, Eqs. 10-14", weights="embedding"
    ),
    "dpo": LinkObjective(description="Direct Preference Optimization", source="arXiv 2305.18290"),
    "ipo": LinkObjective(
        description="Identity Preference Optimization", source="arXiv 2310.12036, Eq. 17", link="squared"
    ),
    "cdpo": LinkObjective(
        description="conservative DPO", source="Mitchell 2023, A note on DPO with noisy preferences", link="smoothed"
    ),
    "rdpo": LinkObjective(description="provably robust DPO", source="arXiv 2403.00409, Section 3.1", link="robust"),
    "exo": LinkObjective(
        description="Efficient Exact Optimization of preferences", source="arXiv 2402.00856, Eq. 16", link="exo"
    ),
    "rso": LinkObjective(
        description="the hinge-norm loss of Statistical Rejection Sampling", source="arXiv 2309.06657", link="hinge"
    ),
}
