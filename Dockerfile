# The tests run its steps in a folder, with nothing installed; no image has been built. On a machine with the NVIDIA container toolkit:
#   docker build -t lowrank-vit .
#   docker run --gpus all --ipc=host -v "$PWD/output:/app/output" -v "$PWD/data:/app/data" lowrank-vit
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        git make g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# Packages first: a change of the code alone then installs nothing anew.
COPY pyproject.toml constraints.txt README.md LICENSE Makefile ./
COPY scripts scripts
COPY configs configs
COPY lowrank_vit/__init__.py lowrank_vit/__init__.py
COPY data_prep/__init__.py data_prep/__init__.py
RUN make setup
COPY . .

CMD ["make", "train"]
