# The server's image. Layers that seldom change come first: a code change rebuilds the last layers only and downloads
# nothing.
#
#   docker build -t bitdial .                                  CUDA
#   docker build -t bitdial:cpu --build-arg VARIANT=cpu .      CPU only
#   docker build --build-arg EXTRAS=otlp,onnx,litert …         with the extras of these precisions

ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm
# equals pyproject.toml's version; otherwise the build fails
ARG VERSION=0.1.0


# Only the requirements in those files, so that a change of any other line rebuilds no packages.
FROM ${BASE_IMAGE} AS requirements
# by comma, of pyproject.toml
ARG EXTRAS=otlp
WORKDIR /requirements
COPY pyproject.toml scripts/constraints.txt ./
RUN python -c "import os, tomllib; project = tomllib.load(open('pyproject.toml', 'rb')); \
      print(*project['build-system']['requires'], sep='\n', file=open('build.txt', 'w')); \
      extras = [project['project']['optional-dependencies'][name] for name in os.environ['EXTRAS'].split(',')]; \
      print(*project['project']['dependencies'], *sum(extras, []), sep='\n', file=open('run.txt', 'w'))"


FROM ${BASE_IMAGE} AS packages
# cuda or cpu
ARG VARIANT=cuda
# source of torch's wheel only: an index, or a page or folder of wheels; default: pip's index
ARG TORCH_INDEX_URL=
# pip's own settings, for a mirror
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /requirements
COPY --from=requirements /requirements/run.txt /requirements/constraints.txt ./
# The bare requirement torch matches whichever build pip prefers, so the version selects it: "+cpu", or no suffix (===), which
# is PyPI's build with CUDA. PyPI has no "+cpu"; PyTorch's own index does.
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
# Not needed for serving: torch's tests and headers (not every build has them), and bitsandbytes' libraries for other CUDA
# versions and other vendors' cards.
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
# there are kernels for x86-64 only
RUN python build.py && if [ "$(uname -m)" = x86_64 ]; then ls -l ./*.so; fi


FROM ${BASE_IMAGE} AS code
WORKDIR /source
COPY --from=requirements /requirements/build.txt /requirements/constraints.txt ./
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# at the path of the final stage's environment, which the shebang of the bitdial command contains
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt --requirement build.txt
COPY pyproject.toml setup.py README.md LICENSE ./
COPY loaders loaders
COPY server server
COPY --from=kernels /kernels loaders/kernels/
ARG VERSION
RUN /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation \
      --target /opt/bitdial . \
 && if [ ! -d "/opt/bitdial/bitdial-$VERSION.dist-info" ]; then \
      echo "VERSION is $VERSION, and pyproject.toml says otherwise" >&2; exit 1; fi


FROM ${BASE_IMAGE}
# Group 0 has the user's write permissions, so that any other user of that group (as on OpenShift) can run the image.
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
# layers that change with every commit
COPY --from=code /opt/bitdial /opt/bitdial
ARG VERSION
ARG GIT_REVISION=unknown
ARG SOURCE_URL=
LABEL org.opencontainers.image.title="bitdial" \
      org.opencontainers.image.description="One causal language model in FP32, 8-bit and 4-bit, chosen per request" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$GIT_REVISION" \
      org.opencontainers.image.source="$SOURCE_URL"
