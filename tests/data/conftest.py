import pytest

from rpo_jax.data.tokenizer import train_tokenizer

TEXTS = [
    "How do I bake bread? Mix flour, water, salt and yeast, and wait.",
    "What is the capital of France? The capital of France is Paris.",
    "Tell me a joke about a horse. A horse walks into a bar.",
] * 20


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A byte-level BPE that was really learned, with BOS, EOS and role tags."""
    return train_tokenizer(TEXTS, 320, tmp_path_factory.mktemp("tokenizer"))
