"""XLA's flags for programs that cost far more to compile than to run, as hundreds of the tests' do.

A run of two steps on eight virtual devices takes 16.8 s of processor without the last two flags, and 10.8 with them
(two cores of an AMD EPYC, jaxlib 0.10.2).
"""

from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # later ones do not know it, and end every process that gives it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"


def flags(devices: int = 1) -> str:
    """The same for so many virtual devices."""
    return f"--xla_force_host_platform_device_count={devices} {FLAGS}"
