"""Parse CLOUD=ssh://user@host:port/folder."""

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from common.errors import UserError, shown

FORM = "CLOUD=ssh://user@box, ssh://user@box:port or ssh://user@box:port/folder"
# Neither can be mistaken for an option of ssh, or has a meaning in a shell.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|[0-9A-Fa-f:]+(%[A-Za-z0-9]+)?")


@dataclass(frozen=True)
class Address:
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
    def words(self) -> list[str]:
        """Return the arguments for `ssh`."""
        return [*(["-p", str(self.port)] if self.port else []), self.destination]


def read(cloud: str, forms: str = FORM) -> Address:
    """Return the parsed address. Raises UserError when it is not the address of a machine.

    forms: what CLOUD may be, for messages.
    """
    if re.match(r"[^/]*//[^/@]*:[^/]*@", cloud):
        raise UserError("CLOUD holds a password, which others on this machine could read", "use a key: ssh-copy-id")
    try:
        url = urlsplit(cloud)
        host, port = url.hostname or "", url.port
    except ValueError as error:
        raise UserError(f"CLOUD={shown(cloud)} is no address: {error}", forms) from None
    if url.scheme != "ssh":
        raise UserError(f"CLOUD={shown(cloud)}: there is no launcher for that", forms)
    user, folder = url.username, unquote(url.path).rstrip("/")
    if (
        not HOST.fullmatch(host)
        or (user is not None and not NAME.fullmatch(user))
        or port == 0
        or url.query
        or url.fragment
    ):
        raise UserError(f"CLOUD={shown(cloud)} is no address of a box", forms)
    if not re.fullmatch(r"[A-Za-z0-9_./-]*", folder) or ".." in folder.split("/"):
        raise UserError(f"CLOUD={shown(cloud)}: no folder has such a name", forms)
    # urlsplit gives the host in lower case, and a name in ~/.ssh/config may have capital letters
    given = re.search(re.escape(host), url.netloc, re.IGNORECASE)
    return Address(given[0] if given else host, user, port, folder or "ferry")
