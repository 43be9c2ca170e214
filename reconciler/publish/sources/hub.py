"""
Repositories of a hub: ``hf://ORG/REPO[@REVISION][/PATH or pattern]``, through the hub's own client (``huggingface_hub``, extra ``hub``).

The hub knows the SHA-256 of files in large-file storage; the others are read. A revision that is no commit is resolved, and what is written
names the commit. A token, which gated repositories need, is the client's own (``hf auth login``, ``HF_TOKEN``).
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from reconciler.core.errors import PublishError
from reconciler.publish.sources.listing import Listing, SourceFile, chosen

_FORM = re.compile(r"hf://(?:models/)?([\w.-]+/[\w.-]+)(?:@([^/\s]+))?(?:/(.+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LEFT_OUT = (".gitattributes", ".gitignore", ".cache/*")
#: The hub's own storage, which it redirects to by region and by kind of file.
_STORAGE = {"huggingface.co": ("*.hf.co", "*.huggingface.co")}


class Place(Struct, frozen=True, kw_only=True):
    """A repository, a revision of it, and a pattern of its files."""

    repository: str
    revision: str = ""
    pattern: str = ""


def parse(source: str) -> Place:
    """
    Return what *source* names.

    Raises:
        PublishError: it is not of the form ``hf://ORG/REPO[@REVISION][/PATH]``.
    """
    found = _FORM.fullmatch(source)
    if not found:
        raise PublishError(f"{source!r} is not of the form hf://ORG/REPO[@REVISION][/PATH or pattern]")
    return Place(repository=found[1], revision=(found[2] or "").replace("%2F", "/"), pattern=found[3] or "")


def list_files(source: str, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = (), token: str | bool | None = None) -> Listing:
    """
    Return the files that *source* names, pinned to a commit.

    Raises:
        PublishError: the client is not installed, the hub does not answer or refuses, or the files are not of one model.
    """
    place = parse(source)
    info, endpoint = _ask(place, token)
    commit = str(info.sha)
    by_path = {one.rfilename: one for one in info.siblings or ()}
    named = (place.pattern, *include) if place.pattern else include
    paths = chosen((path for path in by_path), named, exclude if named else (*exclude, *_LEFT_OUT))
    _refuse_several_models(paths, place)
    prefix = f"{endpoint}/{place.repository}/resolve/{commit}"
    host = urlsplit(endpoint).hostname or ""
    return Listing(
        files=tuple(_file(by_path[path], path, prefix) for path in paths),
        notes=tuple(_notes(info, place, commit)),
        redirects={host: _STORAGE[host]} if host in _STORAGE else {},
    )


def _ask(place: Place, token: str | bool | None) -> tuple[Any, str]:
    """Return what the hub says of the repository, and the hub's address."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise PublishError(
            "hf:// needs huggingface_hub, which is not installed", hint="`pip install huggingface-hub` installs it"
        ) from None
    api = HfApi(token=token)
    try:
        return api.model_info(place.repository, revision=place.revision or None, files_metadata=True), api.endpoint.rstrip("/")
    except GatedRepoError:
        raise PublishError(
            f"{place.repository} is gated", hint="accept its terms on the hub, and sign in: `hf auth login`, or HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise PublishError(
            f"the hub has no {place.repository}, or does not show it to you", hint="`hf auth login` signs in, or HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise PublishError(f"{place.repository} has no revision {place.revision!r}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        text = str(error).splitlines()
        raise PublishError(f"the hub does not tell what {place.repository} has: {text[0] if text else type(error).__name__}") from None


def _file(found: Any, path: str, prefix: str) -> SourceFile:
    from urllib.parse import quote

    url = f"{prefix}/{quote(path)}"
    lfs = found.lfs
    digest = f"sha256:{lfs.sha256}" if lfs else ""
    return SourceFile(path=path, place=url, urls=(url,), size=lfs.size if lfs else -1, digest=digest)


def _refuse_several_models(paths: list[str], place: Place) -> None:
    """Refuse a whole repository of quantisations: a model is one of them."""
    models = [path for path in paths if path.endswith(".gguf") and not re.search(r"-\d{5}-of-\d{5}\.gguf$|mmproj|lora", path)]
    if len(models) > 1 and not place.pattern:
        shown = ", ".join(models[:8])
        raise PublishError(
            f"{place.repository} has {len(models)} GGUF models: {shown}", hint=f"name one: hf://{place.repository}/{models[0]}"
        )


def _notes(info: Any, place: Place, commit: str) -> list[str]:
    card = info.card_data
    facts = {
        "licence": getattr(card, "license", None) if card else None,
        "gated": info.gated or None,
        "tags": ", ".join((info.tags or [])[:8]) or None,
        "architecture": (info.gguf or {}).get("architecture") if getattr(info, "gguf", None) else None,
        "context": (info.gguf or {}).get("context_length") if getattr(info, "gguf", None) else None,
    }
    told = "; ".join(f"{name} {value}" for name, value in facts.items() if value)
    pinned = (
        []
        if _COMMIT.fullmatch(place.revision)
        else [f"{place.repository}: {place.revision or 'its default branch'} is pinned to commit {commit}"]
    )
    return [*pinned, *([f"the hub says: {told}"] if told else [])]
