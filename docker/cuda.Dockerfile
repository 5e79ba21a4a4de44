# From the repository's root: docker build -f docker/cuda.Dockerfile -t lightning-mpo:cuda .
# Run it with --gpus all --ipc=host; the wheels of torch bring CUDA, the host brings the driver.
FROM python:3.11-slim
# bitsandbytes and torch.compile build kernels; `CodeAnswer` isolates programs with bubblewrap, which in a container needs
# `docker run --privileged`
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ bubblewrap && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lightning-mpo
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lightning_mpo lightning_mpo
# `lightning_mpo/callbacks` is a link to this folder
COPY callbacks callbacks
RUN pip install --no-cache-dir -c constraints.txt -e .
COPY configs configs
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["lightning-mpo", "--help"]
