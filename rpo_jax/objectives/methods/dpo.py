"""Objectives that are a link on a weighting of the contrast matrix: DPO, RPO and their nearest relatives."""

from __future__ import annotations

from rpo_jax.objectives.objective import Objective
from rpo_jax.objectives.pairwise import on_matrix

OBJECTIVES: dict[str, Objective] = {
    "rpo": on_matrix("logistic", "embedding", "Relative Preference Optimization", "arXiv 2402.10958, Eqs. 10-14"),
    "dpo": on_matrix("logistic", "pair", "Direct Preference Optimization", "arXiv 2305.18290"),
    "ipo": on_matrix("squared", "pair", "Identity Preference Optimization", "arXiv 2310.12036, Eq. 17"),
    "cdpo": on_matrix("smoothed", "pair", "conservative DPO", "Mitchell 2023, A note on DPO with noisy preferences"),
    "rdpo": on_matrix("robust", "pair", "provably robust DPO", "arXiv 2403.00409, Section 3.1"),
    "exo": on_matrix("exo", "pair", "Efficient Exact Optimization of preferences", "arXiv 2402.00856, Eq. 16"),
    "rso": on_matrix("hinge", "pair", "the hinge-norm loss of Statistical Rejection Sampling", "arXiv 2309.06657"),
}
