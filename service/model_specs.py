"""Which encoders may be loaded over the network: what ships with the package, the models folder, and what is listed.

A spec names files to read and addresses to fetch from, so that whoever may send any spec may have the service read any
folder and ask any host. An administrator's key is not that much trust: the operator's settings say what may be loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ironclip.artifact import CONFIG_FILE
from ironclip.errors import OptionError
from ironclip.loading import DEMO_ENCODERS
from service.errors import SpecForbidden

_LOCAL = "local-dir:"


class ModelSpecs:
    """What may be asked for.

    Args:
        folder: artifacts anywhere below it may be loaded.
        patterns: what else may: specs in which `*` stands for anything, and folders with an absolute path.
    """

    def __init__(self, folder: Path | None, patterns: Sequence[str]) -> None:
        self._folder = folder
        self._patterns = tuple(patterns)

    def checked(self, spec: str) -> str:
        """What to load for a spec: a folder with every link in its path resolved, or the spec itself.

        Raises:
            SpecForbidden: it may not be loaded. What lies outside the allowed folders is never told: not even whether
                it is there.
            OptionError: it is an allowed folder, and no artifact.
        """
        spec = spec.strip()
        if spec in DEMO_ENCODERS:
            return spec
        if self._is_path(spec):
            return self._checked_folder(spec.removeprefix(_LOCAL))
        if any(fnmatchcase(spec, pattern) for pattern in self._patterns if not _absolute(pattern)):
            return spec
        raise self._forbidden()

    def _is_path(self, spec: str) -> bool:
        """Whether the loader could take it for a folder; a name of a model must not lead to one by chance."""
        if spec.startswith(_LOCAL) or spec.startswith((".", "/", "~")):
            return True
        if spec.startswith(("hf-hub:", "random:")):
            return False
        try:
            return Path(spec).is_dir()
        except (OSError, ValueError):
            return True

    def _checked_folder(self, path: str) -> str:
        try:
            resolved = Path(os.path.realpath(Path(path).expanduser()))
            inside = self._folder is not None and resolved.is_relative_to(os.path.realpath(self._folder))
            listed = any(
                fnmatchcase(str(resolved), pattern.removeprefix(_LOCAL))
                for pattern in self._patterns
                if _absolute(pattern)
            )
            if not inside and not listed:
                raise self._forbidden()
            if not (resolved / CONFIG_FILE).is_file():
                raise OptionError(f"There is no artifact in this folder: it has no {CONFIG_FILE}.", pointer="/spec")
        except (OSError, ValueError, RuntimeError):  # a NUL, too long, no such user
            raise self._forbidden() from None
        return str(resolved)

    def _forbidden(self) -> SpecForbidden:
        below = f", artifact folders below {self._folder}" if self._folder is not None else ""
        listed = "".join(f", {json.dumps(pattern)}" for pattern in self._patterns)
        return SpecForbidden(
            f"This may not be loaded over the network. What may: {', '.join(DEMO_ENCODERS)}{below}{listed}. The "
            "operator extends it with IRONCLIP_MODEL_SPECS and IRONCLIP_MODELS_DIR.",
            pointer="/spec",
        )


def _absolute(pattern: str) -> bool:
    return pattern.removeprefix(_LOCAL).startswith("/")
