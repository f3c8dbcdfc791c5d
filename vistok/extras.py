"""Packages that only a part of vistok needs, and the extras that install them."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata


@contextmanager
def needs(package: str, extra: str | None, purpose: str) -> Iterator[None]:
    """Import a package that only `purpose` needs; errors name the extra that installs it.

    `extra` is None for a package that every install has.

        with needs("lpips", "lpips", "LPIPS"):
            from lpips import LPIPS

    Raises ImportError when `package` is older than vistok declares, and ModuleNotFoundError when it or a
    package that it imports is not installed.
    """
    try:
        _check_release(package, extra, purpose)
        yield
    except ModuleNotFoundError as error:
        raise missing(error.name or package, extra, purpose) from error


def missing(package: str, extra: str | None, purpose: str) -> ModuleNotFoundError:
    """The error for a `package` that is not installed, with the command that installs it."""
    return ModuleNotFoundError(
        f"{purpose} needs {package}, which is not installed: pip install {_requirement(extra)}", name=package
    )


def _requirement(extra: str | None) -> str:
    return f'"vistok[{extra}]"' if extra else "vistok"


def _check_release(package: str, extra: str | None, purpose: str) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    installed, name = metadata.version(package), canonicalize_name(package)
    declared = map(Requirement, metadata.requires("vistok") or ())
    requirement = next((each for each in declared if canonicalize_name(each.name) == name), None)
    if requirement is None:  # of an editable install whose metadata are older than its files
        return
    if not requirement.specifier.contains(installed, prereleases=True):
        raise ImportError(
            f"{purpose} needs {package} {requirement.specifier}, and {installed} is installed: "
            f"pip install --upgrade {_requirement(extra)}",
            name=package,
        )
