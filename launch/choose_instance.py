"""Which machine a job asks for: of those that are offered, the one that `plan` says costs least for all of it."""

from common.errors import UserError
from launch.provider import Machine, Offer, Order
from pipeline.plan import estimate as plans
from pipeline.plan import gpu_table

SETUP = 1.0  # hours for the environment, downloads and all that the plan does not count
SLACK = 1.5  # times the plan
UNPLANNED = 3.0  # hours, where there is no plan


def order(
    machine: Machine, work: plans.Work | None, disk: int, image: str, *, gpu: str | None, cpu: bool, spot: bool,
    hours: float | None, dollars: float | None,
) -> tuple[Order, plans.Plan | None]:  # fmt: skip
    """disk: bytes. gpu: a card of configs/gpus.csv, or a machine by its own name. hours: the time limit that was asked for.
    dollars: the most that may be spent: the time limit is shortened to it.

    Raises UserError when nothing that is offered will do.
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
    card = gpu_table.find(offer.card)
    return gpu.lower() in (offer.name.lower(), card.name.lower() if card else "")


def planned(offer: Offer, work: plans.Work | None, disk: int) -> plans.Plan | None | str:
    """The plan on it, None where there is none to be made, or why it will not do."""
    if offer.disk is not None and offer.disk < disk:
        return f"{offer.disk / 1e9:.0f} GB of disk, {disk / 1e9:.0f} are needed"
    if not offer.card or work is None:
        return None
    card = gpu_table.find(offer.card)
    return plans.on(card, work) if card else f"{gpu_table.TABLE} has no {offer.card}"


def cost(found: tuple[Offer, plans.Plan | None]) -> tuple[bool, float]:
    """For the whole job; what has no price comes last."""
    offer, plan = found
    return offer.dollars is None, (offer.dollars or 0) * (plan.hours if plan else 1)
