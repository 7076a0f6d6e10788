"""What srun says of a task, in the words that torch and DeepSpeed read: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*."""

import re
from collections.abc import Mapping

from .errors import UserError

FIRST_PORT, PORTS = 20000, 12000  # below the ports that Linux hands out by itself


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that srun leaves unsaid; none where another launcher has set them, or outside of a job step.

    The address is that of the step's first host, where Slurm puts task 0; the port follows from the job and the step,
    so that two jobs on one machine do not meet. What is set already stays.

    Raises: UserError for a list of hosts that cannot be read.
    """
    # The script of an sbatch job has SLURM_PROCID as well, but is no step: what it starts by itself is one process.
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return {}
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if size == "1":
        return {}
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(hosts),
        "MASTER_PORT": str(port_of(environment.get("SLURM_JOB_ID", "0"), environment["SLURM_STEP_ID"])),
    }
    return {name: value for name, value in found.items() if name not in environment}


def of_srun(environment: Mapping[str, str]) -> bool:
    """Whether RANK and LOCAL_RANK are those of the task of a job step, as `from_slurm` gives them."""
    pairs = (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"))
    return "SLURM_STEP_ID" in environment and all(
        ours in environment and environment[ours] == environment.get(theirs) for ours, theirs in pairs
    )


def port_of(job: str, step: str) -> int:
    """The port that all tasks of one step of one job compute alike."""
    numbers = [int(text) for text in (job, step) if text.isdigit()]
    return FIRST_PORT + sum(numbers) % PORTS


def first_host(hosts: str) -> str:
    """The first name of a Slurm list: `node[07-12,20],gpu3` begins with node07."""
    match = re.match(r"([^\[,\s]+)(?:\[(\d+)[^\]]*\]([^\[,\s]*))?(?:,|$)", hosts)
    if match is None:
        raise UserError(
            f"SLURM_NODELIST={hosts!r}: expected hosts such as node[01-04]; set MASTER_ADDR to the first host"
        )
    return "".join(part or "" for part in match.groups())
