"""Whether there is a Ray here that this package was written for; it can be asked without one."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from thresher.protos.errors import ConfigurationError

_FIRST: Final = (2, 55)
_BEYOND: Final = (3, 0)
_INSTALL: Final = "pip install 'thresher[ray]'"


def check_ray() -> None:
    """Refuse to go on without Ray, or with one that this package does not know.

    Raises:
        ConfigurationError: it says what is installed, and what to install.
    """
    try:
        found = version("ray")
    except PackageNotFoundError:
        raise ConfigurationError(f"to run on a cluster takes the package ray: {_INSTALL}") from None
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not _FIRST <= (int(numbers[1]), int(numbers[2])) < _BEYOND:
        raise ConfigurationError(
            f"Ray {found} is installed, and this takes Ray >= {_FIRST[0]}.{_FIRST[1]} and < {_BEYOND[0]}, the same on "
            f"all nodes: {_INSTALL}"
        )
