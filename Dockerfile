# The project with its environment, ready for ./run_and_time.sh.
#   docker build -t detection .                                                   NVIDIA GPUs
#   docker build -t detection --build-arg FROM_IMAGE_NAME=python:3.12-slim .      CPU
# --build-arg COMMIT="$(git describe --always --abbrev=40 --exclude='*' --dirty)" records the commit in the run logs.
ARG FROM_IMAGE_NAME=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${FROM_IMAGE_NAME}
ARG PIP_NO_CACHE_DIR=1

WORKDIR /workspace/detection-training

# A separate layer for the packages, so that a change of the code does not install them again.
COPY pyproject.toml constraints.txt setup.sh ./
RUN ./setup.sh --system-site-packages

# Writable by any user: run_with_docker.sh passes the caller's user ID, who then owns the logs.
RUN mkdir -m 1777 data results
ENV HOME=/tmp USER=mlperf LOGNAME=mlperf PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ECHO_LOG=1

COPY . .

# Last, since it differs in each build.
ARG COMMIT=
ENV DETECTION_SOURCE_COMMIT=$COMMIT
LABEL org.opencontainers.image.title=detection-training \
  org.opencontainers.image.version=0.2.0 \
  org.opencontainers.image.licenses=Apache-2.0 \
  org.opencontainers.image.revision=$COMMIT

USER 1000:1000
CMD ["./run_and_time.sh"]
