"""Places outside a run's folder where libraries write, and what stands in for those that cannot be written or are named too long.

Containers with an arbitrary user and batch jobs often have no home folder, and a batch system's temporary folder a long name.
"""

import atexit
import os
import pwd
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

Writable = Callable[[Path], bool]

HOME_FOLDERS = (
    ("HF_HOME", ("XDG_CACHE_HOME", ".cache"), "huggingface", True),
    ("HF_HUB_CACHE", ("HF_HOME", ".cache/huggingface"), "hub", True),
    ("HF_DATASETS_CACHE", ("HF_HOME", ".cache/huggingface"), "datasets", True),
    ("VLLM_CACHE_ROOT", ("XDG_CACHE_HOME", ".cache"), "vllm", False),
    ("VLLM_CONFIG_ROOT", ("XDG_CONFIG_HOME", ".config"), "vllm", False),
    ("MPLCONFIGDIR", ("XDG_CONFIG_HOME", ".config"), "matplotlib", False),
    ("TRITON_CACHE_DIR", ("TRITON_HOME", ""), ".triton/cache", False),
    ("FLASHINFER_WORKSPACE_BASE", ("HOME", ""), "", False),
)
"""Variables that name what libraries keep below the home folder: the variable that names the folder around it and where that is
without; the name within; and whether what is there already serves where it can only be read, as models that were fetched do."""

LONGEST_SOCKET = 107
"""Bytes of the path of a Unix socket."""
RAY_SOCKET = "session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
"""The longest path that Ray makes in its temporary folder."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def settle_home() -> None:
    """Let libraries write to a temporary folder what they would write to a home folder that is not there or cannot be written.

    This sets the environment of the process, and so comes before the libraries are imported. Nothing changes where the home
    folder can be written.

    Raises:
        ValueError: naming TMPDIR, if a temporary folder cannot be made either.
    """
    home = home_of(os.environ)
    instead = home_stand_ins(os.environ, home, can_be_written)
    wants_token = ray_token_wanted(os.environ, home, can_be_written)
    if not instead and not wants_token:
        return
    what = f"the home folder {home} cannot be written" if home else "this user has no home folder"
    try:
        folder = Path(tempfile.mkdtemp(prefix="atkd-home-"))
    except OSError as error:
        raise ValueError(f"{what}, and neither can a temporary one be made ({error}); TMPDIR=/a/folder would do") from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = {name: str(folder / place) for name, place in instead.items()}
    for place in settings.values():
        Path(place).mkdir()
    if wants_token:
        settings["RAY_AUTH_TOKEN_PATH"] = str(write_token(folder / "ray_auth_token"))
    os.environ.update(settings)
    print(
        f"note: {what}; what libraries keep there goes to {folder} and ends with this command ({', '.join(settings)})",
        file=sys.stderr,
    )


def home_of(environment: Mapping[str, str]) -> Path | None:
    """Return the home folder; None where neither HOME nor the machine's list of users knows one."""
    if "HOME" in environment:
        return Path(environment["HOME"] or "/")
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def home_stand_ins(environment: Mapping[str, str], home: Path | None, writable: Writable) -> dict[str, str]:
    """Return the variables to set, and a name for what each names; those that the user set stay as they are."""
    if home is None:
        return {"HOME": "home"}
    names: dict[str, str] = {}
    for name, (around, without), within, serves in HOME_FOLDERS:
        folder = Path(environment.get(around) or home / without) / within
        if environment.get(name) or around in names or writable(folder) or (serves and folder.is_dir()):
            continue
        names[name] = name.lower()
    return names


def ray_token_wanted(environment: Mapping[str, str], home: Path | None, writable: Writable) -> bool:
    """Whether a Ray of our own needs a token that it could not keep in the home folder; that of a cluster is the cluster's.

    Without a home folder Ray keeps it in the one that is made.
    """
    if environment.get("RAY_ADDRESS", "local") not in ("", "local"):
        return False
    if environment.get("RAY_AUTH_MODE", "token").lower() != "token":
        return False
    if home is None or environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH"):
        return False
    token = home / ".ray" / "auth_token"
    return not os.access(token, os.R_OK) and not writable(token.parent)


def write_token(path: Path) -> Path:
    """Write a new token into a new file that only its owner can read."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def can_be_written(folder: Path) -> bool:
    """Whether files can be made in a folder, or it itself can; found out by trying, since permissions do not tell all."""
    nearest = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError:
        return False
    return True


@contextmanager
def ray_folder() -> Iterator[str | None]:
    """Make a folder for the files of a Ray of our own, where the one that it would take will not do; None where it will.

    Raises:
        ValueError: naming the variable and what would do.
    """
    parent = short_parent(os.environ, os.getpid(), can_be_written)
    if parent is None:
        yield None
        return
    usual = os.environ.get("TMPDIR", "/tmp")
    with tempfile.TemporaryDirectory(prefix="atkd-", dir=parent, ignore_cleanup_errors=True) as folder:
        print(f"note: the temporary folder {usual} does not serve Ray's sockets; they go to {folder}", file=sys.stderr)
        for_vllm = "VLLM_RPC_BASE_PATH" not in os.environ  # where its engines of several processes keep sockets of their own
        if for_vllm:
            os.environ["VLLM_RPC_BASE_PATH"] = folder
        try:
            yield folder
        finally:
            if for_vllm:
                del os.environ["VLLM_RPC_BASE_PATH"]


def short_parent(environment: Mapping[str, str], process: int, writable: Writable) -> str | None:
    """Return where a folder for Ray is to be made; None where its sockets fit into the folder that Ray takes itself."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in environment), "TMPDIR")
    named = environment.get(variable, "/tmp")
    sockets = Path(named, "ray", RAY_SOCKET.format(pid=process))
    too_long = len(os.fsencode(sockets)) - LONGEST_SOCKET
    if too_long <= 0 and os.path.isabs(named) and writable(Path(named, "ray")):
        return None
    why = f"makes the paths of Ray's sockets {too_long} bytes too long" if too_long > 0 else "is no folder in which Ray can write"
    if variable == "RAY_TMPDIR":
        raise ValueError(f"RAY_TMPDIR {named!r} {why}; RAY_TMPDIR=/tmp, or another short folder that can be written, would do")
    for folder in SHORT_FOLDERS:
        if writable(Path(folder)):
            return folder
    raise ValueError(
        f"TMPDIR {named!r} {why}, and none of {', '.join(SHORT_FOLDERS)} can be written; RAY_TMPDIR=/a/short/folder that can be "
        "written would do"
    )
