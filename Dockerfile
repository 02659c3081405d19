# The scripts with all that they need, on a CPU or an NVIDIA GPU.
#
#   docker build -t unireplknet .
#   docker build -t unireplknet --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   docker run --rm -v "$PWD/data1:/app/data1" -v "$PWD/data:/app/data" -v "$PWD/checkpoints:/app/checkpoints" \
#       unireplknet sh -c "python makedata.py && python mean_std.py && python train.py"
#
# For a GPU add --gpus all (NVIDIA Container Toolkit) and --shm-size 8g, which the processes that read images need. In
# mainland China add --build-arg PIP_INDEX=https://pypi.tuna.tsinghua.edu.cn/simple.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# Where PyTorch comes from: the CPU version by default; .../whl/cu128 and the like are for NVIDIA GPUs.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX=https://pypi.org/simple

# libgl1 and libglib2.0-0: for OpenCV, which torchtoolbox imports; the font: for Chinese names in figures.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 fonts-noto-cjk \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt requirements-extra.txt ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --extra-index-url "${PIP_INDEX}" torch torchvision \
    && pip install --no-cache-dir --index-url "${PIP_INDEX}" -r requirements.txt -r requirements-extra.txt

COPY . .
# Results belong to the one who starts the container where that is wanted: docker run --user "$(id -u):$(id -g)".
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib PYTHONUNBUFFERED=1
CMD ["python", "train.py", "--help"]
