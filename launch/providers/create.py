"""Create the provider that CLOUD= names."""

import re
from pathlib import Path

from common import hub
from common.errors import UserError, printable_line
from launch.provider import Provider
from launch.providers import ssh_address
from launch.providers.ssh import SshProvider
from pipeline.checkpoint_sync.snapshot import fill_repo_name

ADDRESS_FORMS = (
    f"{ssh_address.ADDRESS_FORM}; sky or sky/<infra> (SkyPilot), hf-jobs or hf-jobs/<organization> (Hugging Face Jobs)"
)
DEFAULT_CHECKPOINTS_REPO = "{user}/{run}-checkpoints"
INFRA_PATTERN = re.compile(r"[a-z0-9*][\w*/-]{0,99}")
NAMESPACE_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")


def create_provider(cloud: str, run_folder: Path, checkpoints: str | None = None, spot: bool = False) -> Provider:
    """Return the provider that CLOUD names.

    Args:
        cloud: What the user typed: an ssh:// address, sky[/infra] or hf-jobs[/organization].
        run_folder: The run's folder on this machine.
        checkpoints: owner/name of the repo for the checkpoints of a rented instance; {user} and {run} are filled in.
        spot: Whether to rent an instance that may be taken away.

    Raises:
        UserError: `cloud` names no provider, or the provider needs a token of the Hub and none is set.
    """
    provider_name, _, place = cloud.partition("/")
    if provider_name not in ("sky", "hf-jobs") or cloud.startswith(f"{provider_name}//"):
        if spot:
            raise UserError(
                "SPOT=1 needs CLOUD=sky: an SSH machine is not a spot instance",
                "leave SPOT out, or use CLOUD=sky SPOT=1",
                code="provider.no_spot",
            )
        return SshProvider(ssh_address.parse_address(cloud, ADDRESS_FORMS))
    if place and not (INFRA_PATTERN if provider_name == "sky" else NAMESPACE_PATTERN).fullmatch(place):
        kind = "an infra of SkyPilot" if provider_name == "sky" else "an organization"
        raise UserError(
            f"CLOUD={printable_line(cloud)}: {printable_line(place)} is not a valid name of {kind}",
            ADDRESS_FORMS,
            code="provider.invalid_name",
        )
    if not hub.read_token():
        raise UserError(
            f"CLOUD={provider_name}: code, data and checkpoints go through the Hub, and no Hub token is set",
            hub.LOGIN_HINT,
            code="hub.no_token",
        )
    repo = fill_repo_name(checkpoints or DEFAULT_CHECKPOINTS_REPO, run_folder.name)
    if provider_name == "sky":
        from launch.providers.skypilot import SkyPilotProvider

        return SkyPilotProvider(repo, place, spot, run_folder / "cloud")
    if spot:
        raise UserError(
            "SPOT=1 needs CLOUD=sky: Hugging Face Jobs has no spot instances",
            "leave SPOT out, or use CLOUD=sky SPOT=1",
            code="provider.no_spot",
        )
    from launch.providers.hf_jobs import HfJobsProvider

    return HfJobsProvider(repo, place or None)
