# The image of all nodes with GPUs, and of the head: Python 3.11, a compiler, requirements/gpu.lock, and this project.
#     docker build --tag registry.example.com/atkd:latest .
# A driver of 580 or later is needed on the nodes. torch brings its own CUDA libraries, so a small base without them will do.
ARG BASE=nvidia/cuda:13.0.2-base-rockylinux9
FROM ${BASE}

# Triton and torch's inductor compile what they launch, as a replica or a compiled student starts: with gcc and Python's headers.
RUN dnf install --assumeyes python3.11 python3.11-devel python3.11-pip gcc gcc-c++ && dnf clean all

# A shell that KubeRay starts is a login shell, which reads its PATH anew.
RUN python3.11 -m venv /opt/venv && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/venv.sh
ENV PATH=/opt/venv/bin:$PATH

# A layer of its own: it changes with the lock alone. Compiled once here, since nobody may write beside packages later.
COPY requirements/gpu.lock /tmp/gpu.lock
RUN python -m pip install --no-cache-dir uv \
    && uv pip install --python /opt/venv/bin/python --no-cache --compile-bytecode --no-deps --requirement /tmp/gpu.lock

WORKDIR /opt/atkd
COPY pyproject.toml README.md LICENSE ./
COPY losses losses
COPY tune_spaces tune_spaces
COPY actors actors
COPY orchestrator orchestrator
COPY configs configs
RUN python -m pip install --no-deps --no-build-isolation --editable . \
    && python -m compileall -q losses tune_spaces actors orchestrator

RUN useradd --uid 1000 --create-home atkd
USER 1000
CMD ["python", "-m", "orchestrator", "--help"]
