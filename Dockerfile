# Both commands of README, on a CPU:
#   docker build -t bilevel-at .
#   docker run --rm bilevel-at                                             # trains on the digits
#   docker run --rm -v "$PWD/runs:/bilevel-at/runs" bilevel-at             # and keeps the run
#   docker build -t bilevel-at-test --target test . && docker run --rm bilevel-at-test
FROM python:3.11-slim AS base
WORKDIR /bilevel-at
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# The CPU build of PyTorch, which is a tenth of the CUDA build that plain pip takes.
RUN pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY bilevel_at bilevel_at
COPY problems problems
COPY solvers solvers
RUN pip install -e .

FROM base AS test
# g++: torch.compile. chromium: a test opens the report. git: a benchmark's test compares commits.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git chromium && rm -rf /var/lib/apt/lists/*
RUN pip install -e '.[test]'
COPY . .
CMD ["python", "-m", "pytest", "-n", "auto"]

FROM base AS run
CMD ["python", "-m", "bilevel_at.run", "problems/fastbat.py"]
