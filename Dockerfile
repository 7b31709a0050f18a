# The base only tells the container runtime which driver is needed: torch brings its own CUDA libraries, of the same release.
FROM nvidia/cuda:13.2.1-base-ubuntu24.04

# Ubuntu keeps only the newest build of a package, so a version named here would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home salt \
    && install --directory --owner salt --group salt /saltlib

USER 10001
WORKDIR /saltlib
ENV PIP_NO_CACHE_DIR=1 \
    UV_NO_CACHE=1

# The environment is a layer of its own, so that a change in the code does not install it anew.
COPY --chown=salt Makefile requirements.lock ./
RUN make .venv/.synced

COPY --chown=salt . .
RUN make setup
ENV PATH=/saltlib/.venv/bin:$PATH

ENTRYPOINT ["salt"]
CMD ["--help"]
