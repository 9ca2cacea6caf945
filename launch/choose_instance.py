"""Choose the instance that a job asks for: of the types on offer, the one that costs least for the whole job."""

from common.errors import UserError
from launch.provider import Machine, Offer, Order
from pipeline.plan import estimate as plans
from pipeline.plan import gpu_table

SETUP = 1.0  # hours for the environment, for downloads and for all that the plan does not count
SLACK = 1.5  # the time limit allows so many times the hours of the plan
UNPLANNED = 3.0  # hours, where there is no plan


def order(
    machine: Machine,
    work: plans.Work | None,
    disk: int,
    image: str,
    *,
    gpu: str | None,
    cpu: bool,
    spot: bool,
    hours: float | None,
    dollars: float | None,
) -> tuple[Order, plans.Plan | None]:
    """Return the request for the cheapest instance that can do the job, and the plan of the job on it.

    Args:
        machine: What the provider offers.
        work: The training to plan; None when it cannot be planned.
        disk_bytes: Disk that the job needs.
        image: The container image that the instance runs.
        gpu: A GPU of configs/gpus.csv, or a type of instance by the provider's name.
        cpu: Whether an instance without a GPU is wanted.
        spot: Whether the provider may take the instance away.
        hours: The time limit that the user asked for.
        dollars: The most that may be spent; the time limit is shortened to it.

    Raises:
        UserError: No type of instance on offer will do.
    """
    fitting, why = [], []
    for offer in machine.offers:
        if bool(offer.card) == cpu or (gpu and not called(offer, gpu)):
            continue
        plan = planned(offer, work, disk)
        why += [f"{offer.name}: {plan}"] if isinstance(plan, str) else []
        fitting += [] if isinstance(plan, str) else [(offer, plan)]
    if not fitting:
        named = ", ".join(offer.name for offer in machine.offers)
        raise UserError(
            "no machine that is offered will do" + "".join(f"\n  {line}" for line in why),
            f"offered are {named or 'none'}; GPU=name takes one, `make plan` says what fits which card",
        )
    offer, plan = min(fitting, key=cost)
    limit = hours or (SETUP + SLACK * plan.hours if plan else UNPLANNED)
    if hours is None and dollars is not None and offer.dollars:
        limit = min(limit, dollars / offer.dollars)
    return Order(offer, limit, disk, image, spot), plan


def called(offer: Offer, gpu: str) -> bool:
    """Return whether `gpu` names this type of instance, or the GPU in it."""
    card = gpu_table.find(offer.card)
    return gpu.lower() in (offer.name.lower(), card.name.lower() if card else "")


def planned(offer: Offer, work: plans.Work | None, disk: int) -> plans.Plan | None | str:
    """Return the plan on this type of instance, None when none can be made, or the reason why it will not do."""
    if offer.disk is not None and offer.disk < disk:
        return f"{offer.disk / 1e9:.0f} GB of disk, {disk / 1e9:.0f} are needed"
    if not offer.card or work is None:
        return None
    card = gpu_table.find(offer.card)
    return plans.on(card, work) if card else f"{gpu_table.TABLE} has no {offer.card}"


def cost(found: tuple[Offer, plans.Plan | None]) -> tuple[bool, float]:
    """Return a sort key: the cost of the whole job; instances without a known price come last."""
    offer, plan = found
    return offer.dollars is None, (offer.dollars or 0) * (plan.hours if plan else 1)
