"""Locating a checkpoint's files: the bundled model, a local folder, or a hub repository, downloaded once."""

import errno
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loaders.base import Progress
from loaders.errors import ModelNotFound
from loaders.model_id import BUNDLED, is_hub_id, local_folder

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_IGNORED = ["consolidated*", "original/*"]  # the same weights again, in the original layout of their authors
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


def locate(model_id: str, revision: str | None, progress: Progress) -> tuple[Path, str, str | None]:
    """Returns the model's folder, the name to show and the hub commit.

    Raises:
        ModelNotFound
    """
    if model_id == BUNDLED:
        _no_revision(revision, "the bundled model")
        return Path(__file__).parent / "bundled", BUNDLED, None
    if (folder := local_folder(model_id)) is not None:
        _no_revision(revision, f"the folder {folder.name}")
        return folder, folder.name, None
    if not is_hub_id(model_id):
        shown = ascii(model_id if len(model_id) <= 200 else f"{model_id[:200]}…")
        raise ModelNotFound(
            f"the model {shown} is neither 'bundled', nor an existing folder, nor a hub id (owner/name)"
        )
    progress("downloading", 0, 0)
    folder = _download(model_id, revision)
    return folder, model_id, folder.name


def _no_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise ModelNotFound(f"{what} has no revision {revision!r}: only a model of the hub has revisions")


def _download(model_id: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(model_id, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED)
        )
    except GatedRepoError as error:
        raise ModelNotFound(f"{model_id} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{model_id} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(f"the hub has no model {model_id}; a private one needs HF_TOKEN") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if error.errno in _UNWRITABLE:
            place = f"{constants.HF_HUB_CACHE}: {error.strerror}; HF_HOME names another place"
            raise ModelNotFound(f"{model_id} can't be kept in {place}") from error
        raise ModelNotFound(
            f"{model_id} is not in the local cache and the hub {_download_failure(error)}; "
            "name a local folder, or MODEL_ID=bundled"
        ) from error


def _download_failure(error: OSError) -> str:
    cause = error if isinstance(error, HfHubHTTPError | OfflineModeIsEnabled) else error.__cause__
    if isinstance(cause, OfflineModeIsEnabled):
        return "is not contacted, since HF_HUB_OFFLINE is set"
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        return f"answers {cause.response.status_code}"
    return "can't be reached"
