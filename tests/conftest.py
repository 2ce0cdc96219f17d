"""Eight virtual CPU devices for every test: the sharded step must run as it would on real ones."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Hundreds of tiny programs: compiling them costs far more than running them, and unoptimised code compiles in a third.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
