"""What is installed, against what this package's own metadata asks for: dependencies and extras.

Nothing is taken on trust: a distribution can be there and its import still fail.
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "whisper-at-cli"
EXTRAS = {  # what each is for
    "demo": "weights of tiny.en: demo, and --model tiny.en, offline",
    "hf": "Hugging Face: HuBERT, WavLM, ..., names on the hub, datasets",
    "board": "train-head --tensorboard",
    "ray": "extract --engine ray: a Ray cluster",
    "cloud": "caches and datasets in a bucket: s3://, gs://, az://",
    "test": "the project's own tests",
}
FOR_DEVELOPERS = "test"  # the extra whose packages are looked at, not imported


@dataclass(frozen=True)
class Dependency:
    """One distribution that is asked for. `state` is ok, missing, out of bounds or broken (its import fails)."""

    name: str
    needs: str  # as >=2.7,<3; empty where any version will do
    version: str | None
    state: str
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.state == "ok"

    @property
    def remedy(self) -> str:
        """The command that puts it right."""
        again = "--force-reinstall " if self.state == "broken" else ""
        return f"pip install {again}'{self.name}{self.needs}'"


@dataclass(frozen=True)
class Extra:
    """One group of optional dependencies, what it is for and how to get it."""

    name: str
    purpose: str
    install: str
    dependencies: tuple[Dependency, ...]

    @property
    def state(self) -> str:
        """ok where all of it is, else the first other state among its parts."""
        return next((one.state for one in self.dependencies if not one.ok), "ok")


@dataclass(frozen=True)
class Installation:
    """This package and its interpreter, and what both need."""

    version: str  # of the code that runs
    installed_version: str  # that pip knows of
    place: str  # of the code
    editable: bool
    python: str
    python_needs: str
    python_ok: bool
    executable: str
    system: str
    dependencies: tuple[Dependency, ...]
    extras: tuple[Extra, ...]


def examine_installation(progress: Callable[[str], None] | None = None) -> Installation:
    """Compare what is installed with the bounds in this package's metadata, and import each part.

    Raises ImportError where `packaging`, which reads the bounds, or this package's own metadata is not there.
    """
    import whisper_at_cli

    specifiers = importlib.import_module("packaging.specifiers")
    own = metadata.distribution(PACKAGE)
    python_needs = own.metadata["Requires-Python"] or ""
    source = _editable_source(own)
    return Installation(
        version=whisper_at_cli.__version__,
        installed_version=own.version,
        place=str(Path(whisper_at_cli.__file__).parent),
        editable=source is not None,
        python=platform.python_version(),
        python_needs=python_needs,
        python_ok=specifiers.SpecifierSet(python_needs).contains(platform.python_version(), prereleases=True),
        executable=sys.executable,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        dependencies=_examined(_requirements(own, ""), progress, "dependencies"),
        extras=tuple(_extra(own, name, source, progress) for name in _extra_names(own)),
    )


def one_line(error: BaseException) -> str:
    """An error's kind and message on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__


def _editable_source(own: metadata.Distribution) -> str | None:
    """The folder that an editable install (`pip install -e`) runs from."""
    try:
        origin = json.loads(own.read_text("direct_url.json") or "{}")
    except ValueError:
        return None
    url = origin.get("url", "")
    return unquote(url.removeprefix("file://")) if origin.get("dir_info", {}).get("editable") else None


def _extra_names(own: metadata.Distribution) -> list[str]:
    """Extras with packages of their own; one that only gathers others is left out."""
    names = own.metadata.get_all("Provides-Extra") or []
    return [name for name in names if any(one.name != PACKAGE for one in _requirements(own, name))]


def _extra(own: metadata.Distribution, name: str, source: str | None, progress: Callable[[str], None] | None) -> Extra:
    what = f"{source}[{name}]" if source else f"{PACKAGE}[{name}]"
    return Extra(
        name=name,
        purpose=EXTRAS.get(name, ""),
        install=f"pip install {'-e ' if source else ''}'{what}'",
        dependencies=_examined(_requirements(own, name), progress, f"extra {name}", imported=name != FOR_DEVELOPERS),
    )


def _requirements(own: metadata.Distribution, extra: str) -> list[Requirement]:
    """What the package needs by itself, or with one extra more."""
    requirements = importlib.import_module("packaging.requirements")
    found: list[Requirement] = []
    for requirement in map(requirements.Requirement, own.requires or ()):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if (always and not extra) or (extra and not always and marker.evaluate({"extra": extra})):
            found.append(requirement)
    return found


def _examined(
    requirements: list[Requirement], progress: Callable[[str], None] | None, what: str, *, imported: bool = True
) -> tuple[Dependency, ...]:
    found = []
    for requirement in requirements:
        if progress:
            progress(f"{what}: {requirement.name}")
        found.append(_examine(requirement, imported))
    return tuple(found)


def _examine(requirement: Requirement, imported: bool) -> Dependency:
    name, needs = requirement.name, _bounds(requirement)
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return Dependency(name, needs, None, "missing")
    version = distribution.version
    if not requirement.specifier.contains(version, prereleases=True):
        return Dependency(name, needs, version, "out of bounds")
    try:
        if imported:
            _import_quietly(_module_of(distribution))
    except Exception as error:  # noqa: BLE001 - a broken package can raise anything: OSError of a library, AttributeError, ...
        return Dependency(name, needs, version, "broken", one_line(error))
    return Dependency(name, needs, version, "ok")


def _bounds(requirement: Requirement) -> str:
    """The bounds in the order in which people write them: the lower one first."""
    return ",".join(sorted(map(str, requirement.specifier), key=lambda bound: (bound[0] != ">", bound)))


def _module_of(distribution: metadata.Distribution) -> str:
    """The module that a distribution is imported by: scikit-learn is sklearn."""
    by_name = re.sub(r"[-.]+", "_", distribution.metadata["Name"]).lower()
    tops = (distribution.read_text("top_level.txt") or "").split()
    if not tops:
        files = [file.parts for file in distribution.files or () if file.suffix == ".py" and len(file.parts) < 3]
        tops = sorted({parts[0].removesuffix(".py") for parts in files})
    tops = [name for name in tops if name.isidentifier() and not name.startswith("_")]
    return by_name if by_name in tops or not tops else tops[0]


def _import_quietly(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(module)
