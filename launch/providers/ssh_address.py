"""Parse CLOUD=ssh://user@host:port/folder."""

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from common.errors import UserError, printable_line

ADDRESS_FORM = "CLOUD=ssh://user@host, ssh://user@host:port or ssh://user@host:port/folder"
# Neither can be mistaken for an option of ssh, or has a meaning in a shell.
USER_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
HOST_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|[0-9A-Fa-f:]+(%[A-Za-z0-9]+)?")


@dataclass(frozen=True)
class SshAddress:
    """A machine that ssh reaches, and the folder for jobs on it."""

    host: str
    user: str | None
    """None: ~/.ssh/config decides."""
    port: int | None
    """None: ~/.ssh/config decides."""
    folder: str = "ferry"
    """An absolute path, or one below the home folder."""

    @property
    def destination(self) -> str:
        """Return user@host, or the host alone."""
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def known_hosts_name(self) -> str:
        """Return its name in ~/.ssh/known_hosts, as a word for a shell."""
        return f"'[{self.host}]:{self.port}'" if self.port else self.host

    @property
    def ssh_arguments(self) -> list[str]:
        """Return the arguments for `ssh`."""
        return [*(["-p", str(self.port)] if self.port else []), self.destination]


def parse_address(cloud: str, forms: str = ADDRESS_FORM) -> SshAddress:
    """Return the parsed address. Raise UserError when it is not the address of a machine.

    forms: what CLOUD may be, for messages.
    """
    if re.match(r"[^/]*//[^/@]*:[^/]*@", cloud):
        raise UserError(
            "CLOUD contains a password, which others on this machine could read",
            "use a key: ssh-copy-id",
            code="ssh.password_in_address",
        )
    try:
        url = urlsplit(cloud)
        host, port = url.hostname or "", url.port
    except ValueError as error:
        raise UserError(
            f"CLOUD={printable_line(cloud)} is not a valid address: {error}", forms, code="ssh.invalid_address"
        ) from None
    if url.scheme != "ssh":
        raise UserError(f"CLOUD={printable_line(cloud)} is not a known provider", forms, code="provider.unknown")
    user, folder = url.username, unquote(url.path).rstrip("/")
    if (
        not HOST_PATTERN.fullmatch(host)
        or (user is not None and not USER_PATTERN.fullmatch(user))
        or port == 0
        or url.query
        or url.fragment
    ):
        raise UserError(
            f"CLOUD={printable_line(cloud)} is not the address of a machine", forms, code="ssh.invalid_address"
        )
    if not re.fullmatch(r"[A-Za-z0-9_./-]*", folder) or ".." in folder.split("/"):
        raise UserError(
            f"CLOUD={printable_line(cloud)}: {printable_line(folder)} is not a valid folder",
            f"{forms}; letters, digits, `_`, `-` and `.`, and no `..`",
            code="ssh.invalid_folder",
        )
    # urlsplit gives the host in lower case, and a name in ~/.ssh/config may have capital letters
    typed_host = re.search(re.escape(host), url.netloc, re.IGNORECASE)
    return SshAddress(typed_host[0] if typed_host else host, user, port, folder or "ferry")
