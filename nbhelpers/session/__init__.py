"""A notebook's session: where its files outlive it, on Colab and on Kaggle, and how it shows errors of this package."""

import shutil
from importlib import import_module
from pathlib import Path

from nbhelpers import gpu, host
from nbhelpers.architecture import GB

from .errors import instead_of_tracebacks as instead_of_tracebacks

DRIVE = Path("/content/drive")  # where Colab's own examples mount it
KAGGLE = Path("/kaggle/working")
KAGGLE_KEEPS = 20  # GB, as Kaggle says


def drive(folder: str | Path, *, mount: bool) -> str:
    """`folder` on your Google Drive where this is Colab and `mount` is set, else as it is; and a line that says so.

    Args:
        folder (`str` or `Path`): Relative: inside "My Drive". An absolute one stays where it is.
        mount (`bool`): Whether to ask for the Drive; Colab wants your permission.

    Raises host.CannotRun if the Drive is not given.
    """
    if host.where() != "Colab":
        print(f"not on Colab, so there is no Drive to ask for: files go to {folder}")
        return str(folder)
    if not mount:
        print(f"files go to {folder} and are lost with the session: DRIVE = True keeps them on your Drive")
        return str(folder)
    try:
        import_module("google.colab.drive").mount(str(DRIVE))
    except Exception as error:  # Colab's own kinds, not to be imported elsewhere
        raise host.CannotRun(
            f"your Drive was not mounted ({type(error).__name__}): run this cell again and allow it, or set "
            "DRIVE = False, and files end with the session"
        ) from None
    root = DRIVE / "MyDrive"
    found = root / folder
    print(f"files go to {found}: {shutil.disk_usage(root).free / GB:.1f} GB free there")
    return str(found)


def kaggle(folder: str | Path) -> str:
    """`folder` inside the output folder where this is Kaggle, else as it is; and lines that say what the limits are.

    Args:
        folder (`str` or `Path`): An absolute one stays where it is.
    """
    if host.where() != "Kaggle":
        print("not on Kaggle: none of its limits hold here")
        return str(folder)
    found, left = KAGGLE / folder, host.session_left()
    hours = f"{left / 3600:.1f} hours" if left is not None else "12 hours"
    print(
        f"files go to {found}. Kaggle keeps {KAGGLE_KEEPS} GB of {KAGGLE}: as this notebook's output after Save "
        "Version, or for your next session with Settings > Persistence > Files only. This session ends in "
        f"{hours} at the latest."
    )
    if len(gpu.cards()) > 1:
        print(f"{len(gpu.cards())} GPUs: a notebook uses one of them; README's line with torchrun uses all.")
    return str(found)
