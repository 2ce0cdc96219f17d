# rpo_jax on NVIDIA GPUs, from a clone of the repository; the host needs a driver for CUDA 13 and its container toolkit:
#   docker build -f docker/gpu.Dockerfile -t rpo-jax:gpu .
#   docker run --rm --gpus all -v "$PWD/runs:/app/runs" rpo-jax:gpu train --config quickstart_sft
FROM python:3.11-slim

# jax brings CUDA along (jax[cuda13]); torch, which only reads sentence encoders and reward models on the CPU, must not
# bring a second one: its CPU build is there before anything else asks for torch.
COPY constraints.txt /opt/constraints.txt
RUN pip install --no-cache-dir uv \
  && uv pip install --system --no-cache --torch-backend cpu -c /opt/constraints.txt torch

COPY . /opt/rpo_jax
RUN pip install --no-cache-dir -c /opt/constraints.txt "/opt/rpo_jax[cuda,minilm,judge]" && rm -rf /opt/rpo_jax
# A build with a CUDA torch ends here.
RUN python -c "import torch; assert torch.version.cuda is None, torch.__version__" && rpo-jax --version

WORKDIR /app
ENTRYPOINT ["rpo-jax"]
CMD ["--help"]
