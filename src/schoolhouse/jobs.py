"""Job files for many machines: complete text to be read, changed and submitted by a person. Nothing is submitted here.

All three start one process for each accelerator with the project's own command, hand exit code 75 (stopped and
resumable) back to the scheduler as "start again", and keep the run and its caches on storage that all machines share.
None holds a secret: a token for gated models stays in the scheduler's own secret store.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Template

from schoolhouse.config import Parallel
from schoolhouse.errors import ConfigError

PORT = 29_500
"""Where process 0 listens."""
GRACE = 300
"""Seconds between the request to stop and the end of a machine: a step and a checkpoint must fit."""
USUAL = 8
"""Accelerators of a machine, where the layout leaves it open."""
SHARED = "/shared"
"""Where Kubernetes and SkyPilot mount the storage that all machines share."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is started, and on how many machines."""

    name: str
    """Lower-case letters, digits and hyphens, as Kubernetes wants them."""
    recipe: str
    overrides: tuple[str, ...]
    nodes: int
    gpus: int
    """Accelerators, and so processes, of each machine."""

    def command(self, *options: str) -> str:
        """The shell words that train it; the user's own settings stand last."""
        return shlex.join([".venv/bin/schoolhouse", "run", self.recipe, *options, *self.overrides])


def job(recipe: str, overrides: Sequence[str], parallel: Parallel, nodes: int | None, gpus: int | None) -> Job:
    """The job of a recipe; machines that are not named follow from the layout, with at most 8 accelerators each."""
    fixed = parallel.replicate * parallel.ulysses
    wanted = fixed * parallel.shard if parallel.shard != -1 else fixed * max(1, USUAL // fixed)
    nodes = nodes or (-(-wanted // gpus) if gpus else -(-wanted // USUAL))
    gpus = gpus or -(-wanted // nodes)
    world = nodes * gpus
    if world % fixed or (parallel.shard != -1 and world != wanted):
        raise ConfigError(
            f"{nodes} machine(s) with {gpus} accelerator(s) make {world} process(es), which the layout cannot use",
            required=f"{wanted if parallel.shard != -1 else f'a multiple of {fixed}'} processes: replicate "
            f"{parallel.replicate} × shard {parallel.shard} × ulysses {parallel.ulysses}",
            where="--nodes, --gpus, parallel", remedy="choose other numbers, or change parallel.*",
        )
    if any(not word.isprintable() for word in (recipe, *overrides)):
        raise ConfigError(
            "a setting holds a line break or another character that cannot be printed",
            required="words of one line", where="command line", remedy="put the setting into the recipe",
        )
    return Job(_name(recipe), recipe, tuple(overrides), nodes, gpus)


def text(job: Job, to: str) -> str:
    """The whole job file for `slurm`, `skypilot` or `kubernetes`."""
    return WRITERS[to](job)


def slurm(job: Job) -> str:
    """A batch script: one task for each accelerator, known to the program by SLURM's own variables."""
    return _SLURM.substitute(
        name=job.name, nodes=job.nodes, gpus=job.gpus, grace=GRACE, wait=GRACE, command=job.command(),
    )


def skypilot(job: Job) -> str:
    """A managed job: `sky jobs launch` brings machines up, and new ones after a preemption."""
    command = job.command("--nproc", str(job.gpus), *_on_shared(job))
    return _SKYPILOT.substitute(
        name=job.name, nodes=job.nodes, gpus=job.gpus, shared=SHARED, port=PORT, command=command,
    )


def kubernetes(job: Job) -> str:
    """An Indexed Job with a headless service: core Kubernetes (1.31), no operator to be installed.

    A pod is a machine. Its index and the first pod's name are all that the processes need to find one another.
    """
    command = job.command("--nproc", str(job.gpus), *_on_shared(job))
    return _KUBERNETES.substitute(
        name=job.name, nodes=job.nodes, gpus=job.gpus, shared=SHARED, port=PORT, grace=GRACE,
        retries=3 * job.nodes, command=json.dumps(f"exec {command}", ensure_ascii=False),
    )


WRITERS: Mapping[str, Callable[[Job], str]] = {"slurm": slurm, "skypilot": skypilot, "kubernetes": kubernetes}
"""Each scheduler's file."""


def _name(recipe: str) -> str:
    """The last two names of the recipe's path, as a DNS label: letters, digits and hyphens, a letter first."""
    words = "-".join(recipe.removesuffix(".yaml").split("/")[-2:])
    return re.sub(r"[^a-z0-9]+", "-", f"sft-{words.lower()}")[:50].strip("-")


def _on_shared(job: Job) -> list[str]:
    """The run directory on the shared storage, unless the user names one."""
    named = any(override.startswith("directory=") for override in job.overrides)
    return [] if named else [f"directory={SHARED}/runs/{job.name}"]


_SLURM = Template("""\
#!/usr/bin/env bash
# Submit with `sbatch FILE` in the project's directory, which must lie on storage that all machines share and hold the
# environment that scripts/setup makes. sbatch's own options go before these: sbatch --partition=… --account=… FILE
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SIGTERM $grace seconds before the time is up: the step at work is finished and saved, and the exit code is 75
#SBATCH --signal=TERM@$grace
set -euo pipefail
cd "$${SLURM_SUBMIT_DIR:?submit this with sbatch}"

hosts=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST")
MASTER_ADDR=$${hosts%%$$'\\n'*}
MASTER_PORT=$$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="$${OMP_NUM_THREADS:-4}"
# The rows are prepared once, for all machines; what is downloaded is downloaded once.
export XDG_CACHE_HOME="$${XDG_CACHE_HOME:-$$PWD/.cache}" HF_HOME="$${HF_HOME:-$$PWD/.cache/huggingface}"

# A task that ends early does not take the others with it: they have $wait seconds to save and to say why.
code=0
srun --kill-on-bad-exit=0 --wait=$wait $command || code=$$?

# 75: stopped and resumable. A job that was cancelled is not RUNNING any more and stays cancelled.
if [ "$$code" -eq 75 ] && [ "$$(squeue --noheader --jobs="$$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    scontrol requeue "$$SLURM_JOB_ID"
fi
exit "$$code"
""")

_SKYPILOT = Template("""\
# Launch with `sky jobs launch FILE` in the project's directory. Change the accelerator to what you have.
# $shared is a volume that all machines read and write (`sky volumes apply`): the run and the caches live there.
# A token for gated models is passed at launch, never written here: sky jobs launch --secret HF_TOKEN FILE
name: $name
workdir: .
num_nodes: $nodes

resources:
  accelerators: H100:$gpus
  network_tier: best
  job_recovery:
    strategy: EAGER_NEXT_REGION
    recover_on_exit_codes: [7, 75]  # 7: another machine was lost; 75: stopped and resumable

volumes:
  $shared: schoolhouse

envs:
  XDG_CACHE_HOME: $shared/cache
  HF_HOME: $shared/cache/huggingface

setup: |
  scripts/setup

run: |
  set -euo pipefail
  # where the first machine listens, and which of them this is: the variables that torchrun reads
  PET_MASTER_ADDR=$${SKYPILOT_NODE_IPS%%$$'\\n'*}
  export PET_MASTER_ADDR PET_MASTER_PORT=$port PET_NNODES="$$SKYPILOT_NUM_NODES" PET_NODE_RANK="$$SKYPILOT_NODE_RANK"
  exec $command
""")

_KUBERNETES = Template("""\
# Start with `kubectl apply -f FILE`, follow with `kubectl logs -f job/$name`, stop with `kubectl delete -f FILE`.
# The claim `schoolhouse` (ReadWriteMany) is mounted at $shared and holds the project in $shared/project, with the
# environment that scripts/setup made there once in this image. PyTorch's wheels bring CUDA; the image needs Python.
# A token for gated models comes from the secret `schoolhouse`, key HF_TOKEN, where there is one.
apiVersion: v1
kind: Service
metadata:
  name: $name
spec:
  clusterIP: None  # no address of its own: it gives each pod a name
  publishNotReadyAddresses: true  # the first pod must be found while all are still starting
  selector:
    job-name: $name
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $name
spec:
  completionMode: Indexed
  completions: $nodes
  parallelism: $nodes
  backoffLimit: $retries
  podFailurePolicy:
    rules:
      - action: Ignore  # 75: stopped and resumable; the pod is started again and does not count as a failure
        onExitCodes: {containerName: train, operator: In, values: [75]}
      - action: Ignore  # the machine was drained or preempted
        onPodConditions: [{type: DisruptionTarget, status: "True"}]
      - action: FailJob  # recipe, data, non-finite, memory, storage, safety: trying again would not help
        onExitCodes: {containerName: train, operator: In, values: [2, 3, 4, 5, 6, 8]}
  template:
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: $grace
      automountServiceAccountToken: false
      containers:
        - name: train
          image: python:3.11
          workingDir: $shared/project
          command: [bash, -c]
          args:
            - $command
          env:
            - {name: PET_NNODES, value: "$nodes"}
            - {name: PET_MASTER_ADDR, value: $name-0.$name}
            - {name: PET_MASTER_PORT, value: "$port"}
            - name: PET_NODE_RANK
              valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/job-completion-index']"}}
            - {name: XDG_CACHE_HOME, value: $shared/cache}
            - {name: HF_HOME, value: $shared/cache/huggingface}
            - name: HF_TOKEN
              valueFrom: {secretKeyRef: {name: schoolhouse, key: HF_TOKEN, optional: true}}
          resources:
            limits: {nvidia.com/gpu: $gpus}
          volumeMounts:
            - {name: shared, mountPath: $shared}
            - {name: memory, mountPath: /dev/shm}
      volumes:
        - name: shared
          persistentVolumeClaim: {claimName: schoolhouse}
        - name: memory  # the 64 MiB of a container are too few for processes that talk through memory
          emptyDir: {medium: Memory}
""")
