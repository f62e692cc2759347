# docker build --target cpu -t shoal:0.1.0 .
# docker build --target gpu -t shoal:0.1.0-gpu .
# docker run --shm-size 1g -p 8000:8000 -e SHOAL_API_KEY=... shoal:0.1.0      # the bundled model
# The chart in helm/shoal runs either. Packages are those of constraints.txt; torch is chosen by the target.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/shoal/venv
ENV PATH=/opt/shoal/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM build AS build-cpu
ARG TORCH=torch==2.13.0
RUN pip install "$TORCH"
COPY . /src
RUN pip install --constraint /src/constraints.txt '/src[nixl,plots]' && cd / && python -m kernels.build

FROM build AS build-gpu
# torch's CUDA and NIXL's must be the same: 12 here
ARG TORCH=torch==2.11.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
RUN pip install --index-url "$TORCH_INDEX" "$TORCH"
COPY . /src
RUN pip install --constraint /src/constraints.txt '/src[nixl,plots]' && cd / && python -m kernels.build

FROM python:${PYTHON}-slim-bookworm AS runtime
# KubeRay's probes call it
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
# the chart's security.user; it mounts what is written over /tmp and /home/shoal
RUN useradd --uid 1000 --create-home --home-dir /home/shoal shoal
ENV PATH=/opt/shoal/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
COPY models/bundled /opt/shoal/models/bundled
USER 1000:1000
WORKDIR /home/shoal
EXPOSE 8000
CMD ["shoal", "serve", "/opt/shoal/models/bundled", "--host", "0.0.0.0"]

FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/shoal /opt/shoal

FROM runtime AS cpu
COPY --from=build-cpu /opt/shoal /opt/shoal
