# The server in an image. The parts that change seldom come first: a change of code builds the last layers anew, and
# nothing is downloaded for it.
#
#   docker build -t bitdial .                                  for CUDA
#   docker build -t bitdial:cpu --build-arg VARIANT=cpu .      without

ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm
# pyproject.toml's; the build fails where they differ
ARG VERSION=0.1.0


# What is to be installed, and no other line of those files, so that a change of another builds no packages anew.
FROM ${BASE_IMAGE} AS requirements
WORKDIR /requirements
COPY pyproject.toml scripts/constraints.txt ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb')); \
      print(*project['build-system']['requires'], sep='\n', file=open('build.txt', 'w')); \
      print(*project['project']['dependencies'], *project['project']['optional-dependencies']['otlp'], \
            sep='\n', file=open('run.txt', 'w'))"


FROM ${BASE_IMAGE} AS packages
# cuda or cpu
ARG VARIANT=cuda
# where torch's wheel is, and nothing else: an index, or a page or folder of wheels; without one, pip's index
ARG TORCH_INDEX_URL=
# pip's own, for those who have a mirror
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /requirements
COPY --from=requirements /requirements/run.txt /requirements/constraints.txt ./
# By its name alone torch is whichever build pip prefers; so "+cpu" is asked for, or the one without a suffix (===), which
# is PyPI's with CUDA. PyPI has no "+cpu": PyTorch's own index does.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/venv \
 && install="python -m pip --python /opt/venv/bin/python install --disable-pip-version-check" \
 && version=$(sed -n 's/^torch==//p' constraints.txt) \
 && case "$VARIANT ${TORCH_INDEX_URL:+elsewhere}" in \
      "cpu "*) torch="torch==$version+cpu" ;; \
      "cuda ") torch="torch===$version" ;; \
      "cuda elsewhere") torch="torch==$version" ;; \
      *) echo "VARIANT is cuda or cpu, not $VARIANT" >&2; exit 2 ;; \
    esac \
 && if [ -n "$TORCH_INDEX_URL" ]; then \
      $install --no-deps --index-url="$TORCH_INDEX_URL" --find-links="$TORCH_INDEX_URL" "$torch"; \
    else \
      $install --no-deps "$torch" \
      || { [ "$VARIANT" = cpu ] && $install --no-deps --index-url=https://download.pytorch.org/whl/cpu "$torch"; }; \
    fi \
 && $install --constraint constraints.txt --requirement run.txt
# Not needed to serve: torch's tests and headers (not every build has them), and bitsandbytes' libraries for other versions
# of CUDA and other makers' cards.
RUN site=$(echo /opt/venv/lib/python3*/site-packages) \
 && cuda=$(sed -n "s/^cuda.* = '\([0-9]*\).*/\1/p" "$site/torch/version.py") \
 && if [ "$VARIANT" = cuda ] && [ -z "$cuda" ]; then echo "that torch is built without CUDA" >&2; exit 1; fi \
 && rm -rf "$site/torch/test" "$site/torch/include" \
 && find "$site/torch/bin" -type f ! -name torch_shm_manager -delete \
 && find "$site/bitsandbytes" -name 'libbitsandbytes_*' ! -name '*_cpu.so' ! -name "*_cuda${cuda:-none}*.so" -delete


FROM ${BASE_IMAGE} AS kernels
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /kernels
COPY loaders/kernels/build.py loaders/kernels/*.c loaders/kernels/*.h ./
# on other processors than x86-64 there are none
RUN python build.py && if [ "$(uname -m)" = x86_64 ]; then ls -l ./*.so; fi


FROM ${BASE_IMAGE} AS code
WORKDIR /source
COPY --from=requirements /requirements/build.txt /requirements/constraints.txt ./
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# at the path of the last stage's environment, for the first line of the command
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt --requirement build.txt
COPY pyproject.toml README.md ./
COPY loaders loaders
COPY server server
COPY --from=kernels /kernels loaders/kernels/
ARG VERSION
RUN /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation \
      --target /opt/bitdial . \
 && if [ ! -d "/opt/bitdial/bitdial-$VERSION.dist-info" ]; then \
      echo "VERSION is $VERSION, and pyproject.toml says otherwise" >&2; exit 1; fi


FROM ${BASE_IMAGE}
# Group 0 may write what the user may, so that any other user of that group (OpenShift's) can run it as well.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /data --shell /usr/sbin/nologin bitdial \
 && install --directory --owner=bitdial --group=root --mode=0775 /data
ENV PATH=/opt/bitdial/bin:/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/bitdial \
    HOME=/data \
    HF_HOME=/data \
    HOST=0.0.0.0 \
    PORT=8080 \
    MODEL_ID=openai-community/gpt2 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages /opt/venv /opt/venv
WORKDIR /data
VOLUME ["/data"]
EXPOSE 8080
USER 10001:0
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
  CMD ["python", "-P", "-m", "server.http.health_check"]
ENTRYPOINT ["bitdial", "serve"]
# what changes with every commit
COPY --from=code /opt/bitdial /opt/bitdial
ARG VERSION
ARG GIT_REVISION=unknown
ARG SOURCE_URL=
LABEL org.opencontainers.image.title="bitdial" \
      org.opencontainers.image.description="One causal language model in FP32, 8-bit and 4-bit, chosen per request" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$GIT_REVISION" \
      org.opencontainers.image.source="$SOURCE_URL"
