# From the repository's root: docker build -f docker/cpu.Dockerfile -t lightning-mpo:cpu .
FROM python:3.11-slim
# `CodeAnswer` isolates programs with bubblewrap; in a container it needs `docker run --privileged`
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lightning-mpo
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lightning_mpo lightning_mpo
# `lightning_mpo/callbacks` is a link to this folder
COPY callbacks callbacks
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt -e .
COPY configs configs
ENV OMP_NUM_THREADS=1
CMD ["lightning-mpo", "--help"]
