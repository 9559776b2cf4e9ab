"""Files of a folder or of a repository on the Hub, by one function."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from plasticity_peft.errors import PlasticityError


def find_file(
    folder_or_repo: str | os.PathLike[str],
    name: str,
    error: type[PlasticityError],
    *,
    optional: bool = False,
    **hub: Any,
) -> Path | None:
    """Returns the path of a file, in the folder or in the Hub's cache on this machine; None where there is none.

    Args:
        folder_or_repo: a folder, or "user/repo" on the Hub.
        name: name of the file.
        error: what is raised where it cannot be told whether there is such a file, or where it cannot be fetched.
        optional: whether to do without a file that is not in the cache, when the Hub must not be asked.
        hub: options of `huggingface_hub.hf_hub_download`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    source = os.fspath(folder_or_repo)
    if os.path.isdir(source):
        path = Path(source, hub.get("subfolder") or "", name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, **hub))
    except LocalEntryNotFoundError as reason:
        if optional and (hub.get("local_files_only") or isinstance(reason.__cause__, OfflineModeIsEnabled)):
            return None
        raise error(f"{source} is no folder, and the Hub cannot be reached for {name}: {reason}") from reason
    except EntryNotFoundError:
        return None
    except RevisionNotFoundError as reason:
        raise error(f"{source} on the Hub has no revision {hub.get('revision')!r}: {reason}") from reason
    except (RepositoryNotFoundError, HFValidationError) as reason:
        raise error(
            f"{source} is neither a folder nor a repository on the Hub that can be read with this token (a private "
            f"one needs token=): {reason}"
        ) from reason
    except TypeError:
        raise
    except Exception as reason:  # which errors there are depends on the HTTP library below huggingface_hub
        raise error(f"Cannot get {name} of {source} from the Hub: {reason}") from reason


def read_json(
    folder_or_repo: str | os.PathLike[str],
    name: str,
    error: type[PlasticityError],
    *,
    optional: bool = False,
    **hub: Any,
) -> dict[str, Any] | None:
    """Returns the object in a JSON file that `find_file` finds; None where there is none."""
    path = find_file(folder_or_repo, name, error, optional=optional, **hub)
    if path is None:
        return None
    source = os.fspath(folder_or_repo)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"Cannot read {name} of {source}: {reason}.") from reason
    if not isinstance(values, dict):
        raise error(f"Cannot read {name} of {source}: it holds {type(values).__name__}, not an object.")
    return values
