# prerl-lightning with everything in it, for a CPU or for NVIDIA GPUs. The set-up is README's: python, git and make are there,
# and `make setup` does the rest. NOT BUILT BY US: no Docker engine was there.
#
#   docker build -t prerl .                          # for a CPU
#   docker build -t prerl --build-arg EXTRA=gpu .    # for GPUs; the driver is the host's
#   docker run --rm -v "$PWD:/work" prerl fit --config dsrl.yaml
#   docker run --rm -v "$PWD:/work" --gpus all --shm-size 8g prerl doctor
ARG PYTHON=3.11
FROM python:${PYTHON}-bookworm
ARG EXTRA=cpu
WORKDIR /prerl-lightning
COPY . .
RUN make setup EXTRA=${EXTRA}
ENV PATH=/prerl-lightning/.venv/bin:${PATH} NVIDIA_DRIVER_CAPABILITIES=compute,utility
# runs/ is made in the folder that is mounted here
WORKDIR /work
ENTRYPOINT ["prerl"]
CMD ["--help"]
