"""`lms`, LM Studio's command line (lmstudio-ai/lms, src/): import, ls --json, --version.

Left out: asking the Hub for a name when --user-repo is missing, and every prompt: nobody is there to answer.
"""

import argparse
import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

COMMIT = "07b7252"
NO_APP = (
    "LM Studio daemon is not running and no valid installation could be found or installed.\n"
    "Error: Failed to start or connect to local LM Studio API server."
)
MOVES = "By default, lms import will move the file to LM Studio's models folder"


class Exit(Exception):
    """A message on stderr, exit code 1."""


class Usage(Exit):
    """The same, in the words of its argument parser."""


def log(*words: object) -> None:
    print(*words, file=sys.stderr)


def home() -> Path:
    """lms-common-server, findLMStudioHome: it leaves a pointer, and fails where it cannot."""
    user = Path.home().resolve()
    pointer = user / ".lmstudio-home-pointer"
    if pointer.exists():
        return Path(pointer.read_text(encoding="utf-8").strip())
    cache = user / ".cache" / "lm-studio"
    found = cache if cache.exists() else user / ".lmstudio"
    pointer.write_text(str(found), encoding="utf-8")
    return found


def models_folder(place: Path) -> Path:
    """importCmd.ts, resolveModelsFolderPath"""
    folder, settings = place / "models", place / "settings.json"
    if not settings.exists():
        log("W Could not locate LM Studio configuration file, using default path:", folder)
    else:
        try:
            said = json.loads(settings.read_text(encoding="utf-8"))["downloadsFolder"]
            if not isinstance(said, str):
                raise TypeError
            folder = Path(said)
        except (ValueError, KeyError, TypeError):
            log("W Could not parse LM Studio configuration file, using default path:", folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def import_(args: argparse.Namespace, place: Path) -> None:
    """importCmd.ts. Folders are joined as they are written: `--user-repo ../x` leaves the models folder."""
    how = [name for name in ("copy", "hard_link", "symbolic_link") if getattr(args, name)]
    if len(how) > 1:
        raise Exit("[Error: Invalid Usage\n\nCannot specify more than one of --copy, --hard-link, or --symbolic-link]")
    if not args.file.lower().endswith(".gguf"):
        log("W The file name does not look like a model file. This may not work.")
        log("W Model files usually have extensions: .gguf")
        if not args.yes:
            confirmed()
    folder = models_folder(place)
    if not how and not json.loads(_read(place / ".internal" / "cli-pref.json") or "{}").get("importWillMoveWarned"):
        log("W Warning about move suppressed by the --yes flag." if args.yes else "")
        log(MOVES)
        confirmed()  # also with --yes
    if args.user_repo is None and not args.yes:
        confirmed()
    name = Path(args.file).name
    user, repo = args.user_repo or (os.environ.get("USER", "unknown"), re.sub(r"(?:\.Q[^.]{1,5})?\.[^.]+$", "", name))
    target = Path(os.path.normpath(folder / user / repo / name))
    if target.exists():  # a dangling link does not count
        raise Exit(f"Target file already exists: {target}")
    verb = how[0] if how else "move"
    if args.dry_run:
        log(DRY[verb], target)
        log("But not actually doing it because of --dry-run")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    DOES[verb](args.file, target)
    log(DONE[verb], target)


# os.link follows a symbolic link unless it is told not to; node's does not.
DOES = {
    "move": os.rename, "copy": shutil.copyfile, "symbolic_link": os.symlink,
    "hard_link": lambda a, b: os.link(a, b, follow_symlinks=False),
}  # fmt: skip
DRY = {
    "move": "Would move the file to", "copy": "Would copy the file to", "hard_link": "Would create a hard link at",
    "symbolic_link": "Would create a symbolic link at",
}  # fmt: skip
DONE = {
    "move": "File moved to", "copy": "File copied to", "hard_link": "Hard link created at",
    "symbolic_link": "Symbolic link created at",
}  # fmt: skip


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def confirmed() -> None:
    """A prompt. Without an answer it ends the command (prompt.ts); built with bun, and /dev/null to read, it waits for ever."""
    if sys.stdin.readline() not in ("\n", "y\n", "yes\n"):
        raise SystemExit(1)


def need_app() -> None:
    """createClient.ts: every command but import wakes an installed app by itself."""
    control = Path(os.environ["LMS_STANDIN"])
    state = json.loads((control / "lms.json").read_text())["app"]
    if state == "absent":
        raise Exit(NO_APP)
    if state == "asleep":
        log("Waking up LM Studio service...")
        (control / "lms-woken").touch()
        (control / "lms.json").write_text(json.dumps({"app": "running"}))


def ls(args: argparse.Namespace, place: Path) -> None:
    """list.ts; the rows are the SDK's LLMInfo (lms-shared-types)."""
    need_app()
    folder = models_folder(place)
    # <user>/<repo>/<file>, neither deeper nor higher.
    found = [model(path, path.relative_to(folder)) for path in sorted(folder.glob("*/*/*.gguf")) if path.is_file()]
    print(json.dumps(found, separators=(",", ":")))


def model(path: Path, place: Path) -> dict:
    from common import gguf_reader
    from tests.helpers.standins import create

    header = gguf_reader.read_header(path)
    family, repo = str(header.metadata["general.architecture"]), place.parts[1]
    kind = create.quantization(header)
    key = re.sub(r"-gguf$", "", repo.lower())
    bits = re.search(r"\d+", kind)
    return {
        "type": "llm", "modelKey": key, "format": "gguf", "displayName": re.sub(r"[-_]", " ", key).title(),
        "publisher": place.parts[0], "path": place.as_posix(), "sizeBytes": path.stat().st_size,
        "indexedModelIdentifier": place.as_posix(), "deviceIdentifier": None, "paramsString": create.parameters(header).partition(".")[0] + "M",
        "architecture": family,
        "quantization": {"name": kind, "bits": int(bits[0]) if bits else 32}, "vision": False,
        "trainedForToolUse": "tools" in str(header.metadata.get("tokenizer.chat_template")),
        "maxContextLength": header.metadata.get(f"{family}.context_length", 0),
    }  # fmt: skip


def a_file(text: str) -> str:
    wrong = f"command-argument value '{text}' is invalid for argument 'file-path'."
    if not os.path.exists(text):
        raise Usage(f"{wrong} File does not exist")
    if not os.path.isfile(text):
        raise Usage(f"{wrong} Path is not a file")
    return text


def pair(text: str) -> tuple[str, ...]:
    parts = tuple(text.split("/"))
    if len(parts) != 2:
        wrong = f"option '--user-repo <user/repo>' argument '{text}' is invalid."
        raise Usage(f"{wrong} Must be user and repo separated by a slash.")
    return parts


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Usage(message)


def parser() -> Parser:
    top = Parser(prog="lms")
    verbs = top.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("import")
    made.set_defaults(does=import_)
    made.add_argument("file", type=a_file)
    made.add_argument("--user-repo", type=pair)
    for names in ("-y --yes", "-c --copy", "-L --hard-link", "-l --symbolic-link", "--dry-run"):
        made.add_argument(*names.split(), action="store_true")
    made = verbs.add_parser("ls")
    made.set_defaults(does=ls)
    made.add_argument("--json", action="store_true", required=True)
    return top


def main() -> int:
    try:
        place = home()
        if {"-v", "--version"} & set(sys.argv[1:]):
            print("CLI commit:", COMMIT)
            return 0
        args = parser().parse_args()
        args.does(args, place)
    except Usage as error:
        log("error:", error)
        return 1
    except Exit as error:
        log("Error:", error)
        return 1
    except OSError as error:
        what = {errno.EXDEV: "cross-device link not permitted"}.get(error.errno, os.strerror(error.errno).lower())
        log(f"{errno.errorcode[error.errno]}: {what}, '{error.filename}' -> '{error.filename2}'")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
