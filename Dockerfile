# The images of docker-compose.yml: `coordinator` (no torch) and `participant` (sites and researchers).
#
# Nothing that builds is in what runs: wheels are made in a stage of their own, and the two last stages hold Python, a
# virtual environment and no pip of ours. Third-party packages, pinned by constraints.txt, come in layers before our own
# code, so a change of the code builds in seconds.
#
# TORCH_INDEX_URL: address of a package index with CPU builds of torch. Left out, torch==2.13.0 comes from wherever pip
# looks by itself; on x86-64 Linux the default index gives the build with CUDA there, which works and is gigabytes larger.

ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS tools
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY constraints.txt docker/requirements.py ./
COPY common/pyproject.toml common/
COPY coordinator/pyproject.toml coordinator/
COPY participant/pyproject.toml participant/

FROM tools AS wheels
RUN pip install -q -c constraints.txt hatchling
COPY LICENSE ./
COPY common common
COPY coordinator coordinator
COPY participant participant
RUN pip wheel -q --no-deps --no-build-isolation --wheel-dir wheels ./common ./coordinator ./participant

FROM tools AS coordinator-packages
RUN python -m venv --without-pip /opt/maskwork \
 && python requirements.py common[database] coordinator >requirements.txt \
 && pip --python /opt/maskwork/bin/python install -q -c constraints.txt -r requirements.txt

FROM tools AS participant-packages
ARG TORCH_INDEX_URL=
RUN python -m venv --without-pip /opt/maskwork \
 && pip --python /opt/maskwork/bin/python install -q -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --no-deps torch \
 && python requirements.py common[database] participant[digits] >requirements.txt \
 && pip --python /opt/maskwork/bin/python install -q -c constraints.txt -r requirements.txt \
 && cd /opt/maskwork/lib/python3.*/site-packages/torch \
 && rm -rf test include && find bin -type f ! -name torch_shm_manager -delete  # 190 MB of C++ headers and test programs

# Our own code, as a layer of its own to lay over the third-party one.
FROM coordinator-packages AS coordinator-code
COPY --from=wheels /build/wheels wheels
RUN pip --python /opt/maskwork/bin/python install -q --no-warn-script-location --no-index --no-deps --root /code \
    wheels/maskwork-[0-9]*.whl wheels/maskwork_coordinator-*.whl

FROM participant-packages AS participant-code
COPY --from=wheels /build/wheels wheels
RUN pip --python /opt/maskwork/bin/python install -q --no-warn-script-location --no-index --no-deps --root /code \
    wheels/maskwork-[0-9]*.whl wheels/maskwork_participant-*.whl

# One user for both images: the volumes are kept apart by what mounts them. A named volume takes its owner and its mode
# from the directory that it is first mounted on, so these are made here.
FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --system --gid 10001 maskwork \
 && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin maskwork \
 && install -d -m 0700 -o 10001 -g 10001 /ca /identities /identities/coordinator /identities/researcher /identities/sites /state
ENV PATH=/opt/maskwork/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /tmp
COPY --chmod=0644 docker/coordinator.toml docker/job.toml /etc/maskwork/
USER 10001:10001

FROM runtime AS coordinator
COPY --from=coordinator-packages /opt/maskwork /opt/maskwork
COPY --from=coordinator-code /code/ /
COPY --chmod=0755 docker/make-identities /usr/local/bin/
ENTRYPOINT ["maskwork"]
CMD ["coordinator", "run", "--config", "/etc/maskwork/coordinator.toml"]

FROM runtime AS participant
COPY --from=participant-packages /opt/maskwork /opt/maskwork
COPY --from=participant-code /code/ /
COPY --chmod=0755 docker/take-a-site docker/researcher /usr/local/bin/
ENTRYPOINT ["take-a-site"]
