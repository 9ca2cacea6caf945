"""Choose the instance that a job asks for: of the types on offer, the one that costs least for the whole job."""

from dataclasses import dataclass

from common.errors import UserError
from launch.provider import InstanceRequest, InstanceType, Machine
from pipeline.plan import estimate, gpu_table

SETUP_HOURS = 1.0  # hours for the environment, for downloads and for all that the plan does not count
TIME_LIMIT_FACTOR = 1.5  # the time limit allows so many times the hours of the plan
UNPLANNED_HOURS = 3.0  # hours, where there is no plan


@dataclass(frozen=True)
class InstanceNeeds:
    """What a job needs of an instance, and what the user asked for."""

    disk_bytes: int
    """Disk that the job needs."""
    image: str
    """The container image that the instance runs."""
    gpu: str | None = None
    """A GPU of configs/gpus.csv, or a type of instance by the provider's name."""
    cpu: bool = False
    """Whether an instance without a GPU is wanted."""
    spot: bool = False
    """Whether the provider may take the instance away."""
    hours: float | None = None
    """The time limit that the user asked for."""
    max_dollars: float | None = None
    """The most that may be spent; the time limit is shortened to it."""


def choose_cheapest_instance(
    machine: Machine, work: estimate.Workload | None, needs: InstanceNeeds
) -> tuple[InstanceRequest, estimate.TrainingPlan | None]:
    """Return the request for the cheapest instance that can do the job, and the plan of the job on it.

    Args:
        machine: What the provider offers.
        work: The training to plan; None when it cannot be planned.
        needs: What the instance must have, and its limits.

    Raises:
        UserError: No type of instance on offer will do.
    """
    candidates, reasons = [], []
    for instance_type in machine.instance_types:
        if bool(instance_type.gpu_name) == needs.cpu or (needs.gpu and not has_gpu_name(instance_type, needs.gpu)):
            continue
        plan = plan_on_instance(instance_type, work, needs.disk_bytes)
        reasons += [f"{instance_type.name}: {plan}"] if isinstance(plan, str) else []
        candidates += [] if isinstance(plan, str) else [(instance_type, plan)]
    if not candidates:
        names = ", ".join(instance_type.name for instance_type in machine.instance_types)
        raise UserError(
            "no instance type on offer can run the job" + "".join(f"\n  {line}" for line in reasons),
            f"on offer: {names or 'none'}; GPU=name chooses one, `make plan` lists the GPUs that fit",
            code="provider.no_suitable_instance",
        )
    instance_type, plan = min(candidates, key=job_cost_key)
    time_limit = needs.hours or (SETUP_HOURS + TIME_LIMIT_FACTOR * plan.hours if plan else UNPLANNED_HOURS)
    if needs.hours is None and needs.max_dollars is not None and instance_type.dollars_per_hour:
        time_limit = min(time_limit, needs.max_dollars / instance_type.dollars_per_hour)
    return InstanceRequest(instance_type, time_limit, needs.disk_bytes, needs.image, needs.spot), plan


def has_gpu_name(instance_type: InstanceType, gpu: str) -> bool:
    """Return whether `gpu` names this type of instance, or the GPU in it."""
    table_gpu = gpu_table.find_gpu(instance_type.gpu_name)
    return gpu.lower() in (instance_type.name.lower(), table_gpu.name.lower() if table_gpu else "")


def plan_on_instance(
    instance_type: InstanceType, work: estimate.Workload | None, disk_bytes: int
) -> estimate.TrainingPlan | None | str:
    """Return the plan on this type of instance, None when none can be made, or the reason why it will not do."""
    if instance_type.disk_bytes is not None and instance_type.disk_bytes < disk_bytes:
        return f"{instance_type.disk_bytes / 1e9:.0f} GB of disk, the job needs {disk_bytes / 1e9:.0f} GB"
    if not instance_type.gpu_name or work is None:
        return None
    table_gpu = gpu_table.find_gpu(instance_type.gpu_name)
    if not table_gpu:
        return f"{gpu_table.TABLE_PATH} has no {instance_type.gpu_name}"
    return estimate.plan_on_gpu(table_gpu, work)


def job_cost_key(candidate: tuple[InstanceType, estimate.TrainingPlan | None]) -> tuple[bool, float]:
    """Return a sort key: the cost of the whole job; instances without a known price come last."""
    instance_type, plan = candidate
    return instance_type.dollars_per_hour is None, (instance_type.dollars_per_hour or 0) * (plan.hours if plan else 1)
