"""Checks of the NVIDIA driver and the GPUs: whether the locked torch can use them, and whether they are free."""

import re
from pathlib import Path

from common.checks import Check
from common.errors import UserError, shown
from pipeline.plan import gpu_table as table
from pipeline.toolchain import machine
from pipeline.toolchain.machine import Card, Nvidia, Where, gb

CUDA, DRIVER = (13, 0), 580  # what the locked torch needs, as in setup/packages.py
IDLE = 1 << 30  # bytes of GPU memory that a desktop or the driver itself may use
MADE = f"torch here is made for CUDA {CUDA[0]}.{CUDA[1]}"
INSTALL = f"sudo apt-get install nvidia-driver-{DRIVER}-server (Ubuntu's name of it), then reboot"
ELSEWHERE = f"rent a machine with driver {DRIVER} or newer: a container has its host's"
VISIBLE = "start the container with its cards (docker run --gpus all), or rent a machine that has one"


def checks(found: Nvidia, where: Where) -> list[Check]:
    """Check the driver, then for each GPU its type, its memory and its price."""
    return [
        driver(found, where),
        *(check for card in found.cards for check in (kind(card), room(card, found), price(card))),
    ]


def driver(found: Nvidia, where: Where) -> Check:
    """Check that the NVIDIA driver answers, names a GPU and is new enough for the locked torch."""
    if found.state == "absent":
        text = "no nvidia-smi here, so no NVIDIA card: `make demo` works, training a model of your own needs one"
        cure = VISIBLE if where.container else f"where there is a card: {INSTALL}; else rent a machine that has one"
        return Check("driver", "lack", text, cure)
    if too_old(found):
        text = f"{found.driver or 'the driver'} {runs(found)} at most; {MADE} (driver {DRIVER} or newer)"
        return Check("driver", "fault", text, ELSEWHERE if where.container else INSTALL)
    if found.cards:
        return Check("driver", "ok", f"{found.driver} {runs(found)}; {MADE}")
    cure = VISIBLE if where.container else f"reboot; where that does not help: {INSTALL}"
    if found.state == "hangs":
        return Check("driver", "fault", f"nvidia-smi gives no answer within {machine.PATIENCE} s", cure)
    return Check("driver", "fault", f"nvidia-smi fails: {found.words or 'it names no card'}", cure)


def too_old(found: Nvidia) -> bool:
    """Return whether the driver is too old for the locked torch.

    The CUDA version that it runs decides, because NVIDIA's compatibility packages raise that. A driver that does not
    state it is judged by its own version number.
    """
    major = found.driver.partition(".")[0]
    return found.cuda < CUDA if found.cuda else major.isdecimal() and int(major) < DRIVER


def runs(found: Nvidia) -> str:
    """Return which CUDA the driver runs, for messages."""
    return "runs CUDA {}.{}".format(*found.cuda) if found.cuda else "runs a CUDA that it does not name"


def kind(card: Card) -> Check:
    """Check the compute capability of a GPU, and whether it computes in bf16."""
    name, text = f"card {card.index}", f"{shown(card.name, 80)}, compute capability {card.capability}"
    if why := table.unfit(card.capability, ""):
        return Check(
            name,
            "fault",
            f"{shown(card.name, 80)}, {why}",
            f"take a machine with a newer card; {table.TABLE} has a list",
        )
    if card.capability < table.BF16:
        text += ": no bf16, so fp16. Gemma models are refused there: their activations overflow float16"
        return Check(name, "ok", text)
    return Check(name, "ok", f"{text}: bf16")


def room(card: Card, found: Nvidia) -> Check:
    """Check that no other process uses the GPU: it would take memory and computing time."""
    name, text = f"memory {card.index}", f"{gb(card.free)} of {gb(card.total)} free"
    if idle(card):
        return Check(name, "ok", text)
    who = ", ".join(
        f"{shown(Path(user.name).name, 40)} (process {user.pid}) has {gb(user.memory)}" for user in card.users
    )
    hidden = f"{gb(card.used)} are held by what cannot be seen from here (another container?)"
    others = [other.index for other in found.cards if idle(other) and other.capability >= table.OLDEST]
    cure = f"CUDA_VISIBLE_DEVICES={others[0]} takes another card" if others else "take another machine"
    return Check(name, "lack", f"{text}: {who or hidden}", f"wait for it, or end it if it is yours; or {cure}")


def idle(card: Card) -> bool:
    """Return whether no process uses the GPU, as far as the driver tells."""
    return not card.users and (card.used or 0) < IDLE


def price(card: Card) -> Check:
    """Check that the GPU is in the table, which only serves to tell a run's price and its share of the GPU's speed."""
    name = f"price {card.index}"
    try:
        known = table.find(card.name)
    except UserError as error:
        return Check(name, "lack", error.message, error.hint)
    if known:
        return Check(name, "ok", f"about {known.dollars_per_hour:.2f} $ an hour ({known.name} in {table.TABLE})")
    text = f"{shown(card.name, 80)} is not in {table.TABLE}: a run's price and share of its speed are not told"
    return Check(name, "lack", text, f"add a line: {line(card)}")


def line(card: Card) -> str:
    """Return a line for the GPU table with what the driver tells. Its field `match` is a regular expression."""
    plain = re.sub(r"[^\w .-]", ".", re.sub(r"^(NVIDIA|Tesla)( GeForce)? ", "", shown(card.name, 80)))
    return f"{plain},{plain},{(card.total or 0) / 1e9:.1f},{card.capability},TFLOPS in bf16,$ an hour"
