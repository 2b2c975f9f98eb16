"""A path that orbax, and JAX's profiler, take as it is written.

Orbax looks for the parts of a checkpoint by patterns (`glob`) that begin with the whole path. In a folder named
`my [v1]` they match nothing: no index is written and what was saved cannot be read.
"""

import contextlib
import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path

from etils import epath

from lens_jax.errors import LensError

_PLAIN = re.compile(r"[\w/.,:=@+~ -]*")


def plain(path: epath.Path) -> epath.Path:
    """The same file or folder, there already or not, by a path without `[`, `]`, `*`, `?`, backslash and the like.

    Where there is none it is a symbolic link in a folder of this user's own in the temporary folder. The link's name
    follows from the path, so all processes of a run have the same; what is renamed is in the folder it leads to.
    """
    if _PLAIN.fullmatch(str(path)):
        return path
    if "://" in str(path):
        raise LensError(f"{path}: [, ], *, ? and backslash are patterns in an object store; choose another name")
    if _PLAIN.fullmatch(path.name):
        return plain(path.parent) / path.name
    links = Path(tempfile.gettempdir()) / f"lens-jax-{os.getuid()}"
    if not _PLAIN.fullmatch(str(links)):
        links = Path("/tmp") / links.name
    try:
        links.mkdir(mode=0o700, exist_ok=True)
        found = links.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise OSError(0, f"{links} is not a folder of this user alone")
        link = links / hashlib.sha256(str(path).encode()).hexdigest()[:24]
        with contextlib.suppress(FileExistsError):
            link.symlink_to(str(path))
        if os.readlink(link) != str(path):
            raise OSError(0, f"{link} is no link to it")
    except OSError as error:
        raise LensError(
            f"{path}: a name with [, ], *, ?, backslash or the like needs a link in {links} ({error.strerror}); "
            "choose another name"
        ) from None
    return epath.Path(link)
