"""Create the provider that CLOUD= names."""

import re
from pathlib import Path

from common import hub
from common.errors import UserError, shown
from launch.provider import Launcher
from launch.providers import ssh_address
from launch.providers.ssh import Box
from pipeline.checkpoint_sync.snapshot import repository

FORMS = f"{ssh_address.FORM}; sky or sky/<infra> (SkyPilot), hf-jobs or hf-jobs/<organization> (Hugging Face Jobs)"
CHECKPOINTS = "{user}/{run}-checkpoints"
INFRA = re.compile(r"[a-z0-9*][\w*/-]{0,99}")
NAMESPACE = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")


def of(cloud: str, run: Path, checkpoints: str | None = None, spot: bool = False) -> Launcher:
    """Return the provider that CLOUD names.

    Args:
        cloud: What the user typed: an ssh:// address, sky[/infra] or hf-jobs[/organization].
        run_folder: The run's folder on this machine.
        checkpoints: owner/name of the repo for the checkpoints of a rented instance; {user} and {run} are filled in.
        spot: Whether to rent an instance that may be taken away.

    Raises:
        UserError: `cloud` names no provider, or the provider needs a token of the Hub and none is set.
    """
    engine, _, rest = cloud.partition("/")
    if engine not in ("sky", "hf-jobs") or cloud.startswith(f"{engine}//"):
        if spot:
            raise UserError("SPOT: a box that is there is nobody's to take away", "CLOUD=sky SPOT=1")
        return Box(ssh_address.read(cloud, FORMS))
    if rest and not (INFRA if engine == "sky" else NAMESPACE).fullmatch(rest):
        raise UserError(f"CLOUD={shown(cloud)}: {shown(rest)} is no name", FORMS)
    if not hub.token():
        raise UserError(
            f"CLOUD={engine}: code, data and checkpoints go through the Hub, and no token of it is set", hub.LOGIN
        )
    repo = repository(checkpoints or CHECKPOINTS, run.name)
    if engine == "sky":
        from launch.providers.skypilot import Sky

        return Sky(repo, rest, spot, run / "cloud")
    if spot:
        raise UserError("SPOT: Hugging Face Jobs has no spot machines", "leave SPOT out, or CLOUD=sky SPOT=1")
    from launch.providers.hf_jobs import HfJobs

    return HfJobs(repo, rest or None)
