# One image for laptop, GPU node and cluster: PyTorch's wheels bring CUDA along, the driver comes from the host.
#   docker build -t mmkd .                                                                      CUDA
#   docker build -t mmkd --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .         CPU, a third of the size
#   docker run --gpus all -v /data:/data mmkd extract /data/pmc /data/features
# Scheduler, workers and client of a Dask cluster must run the same image.
FROM python:3.12-slim-bookworm AS build
# The version comes from git's tags: without git every image would call itself 0.1.0.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:3.12-slim-bookworm
ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=cluster,dicom,distill,evaluate,inspect,remote,wsi
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/data/huggingface
# torch first and alone: its layer stays when only mmkd changes. Versions are left open: pin yours with a constraints
# file (PIP_CONSTRAINT) when two builds must be equal.
# hadolint ignore=DL3013
RUN pip install --index-url "$TORCH_INDEX" torch torchvision
COPY --from=build /wheels /wheels
# hadolint ignore=DL3013
RUN pip install "$(ls /wheels/*.whl)[$EXTRAS]"
RUN useradd --create-home --uid 1000 mmkd
USER 1000
WORKDIR /home/mmkd
ENTRYPOINT ["mmkd"]
CMD ["--help"]
