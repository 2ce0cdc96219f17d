# rpo_jax on CPUs, from a clone of the repository:
#   docker build -f docker/cpu.Dockerfile -t rpo-jax:cpu .
#   docker run --rm -v "$PWD/runs:/app/runs" rpo-jax:cpu train --config quickstart_sft
FROM python:3.11-slim

# torch reads sentence encoders and reward models, on the CPU. Its CPU build must be there before anything else asks for
# torch: from the package index pip would take the CUDA build, several gigabytes that nothing here uses.
COPY constraints.txt /opt/constraints.txt
RUN pip install --no-cache-dir uv \
  && uv pip install --system --no-cache --torch-backend cpu -c /opt/constraints.txt torch

COPY . /opt/rpo_jax
RUN pip install --no-cache-dir -c /opt/constraints.txt "/opt/rpo_jax[minilm,judge]" && rm -rf /opt/rpo_jax
# A build with a CUDA torch ends here.
RUN python -c "import torch; assert torch.version.cuda is None, torch.__version__" && rpo-jax --version

WORKDIR /app
ENTRYPOINT ["rpo-jax"]
CMD ["--help"]
