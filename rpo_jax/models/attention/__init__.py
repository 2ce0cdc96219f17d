"""Attention over packed rows: one module a kind, found by `registry`; which tokens see which is `masking`'s alone.

To add a kind: put a module here that declares `KIND`, an AttentionKind, and hold it to the dense one in
tests/models/test_NAME.py. Configuration, planning and messages follow.
"""
