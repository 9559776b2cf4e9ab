"""Files of an adapter, in a folder or in a repository on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from plasticity_peft import files
from plasticity_peft.errors import PlasticityError

CONFIG_NAME = "adapter_config.json"
"""A folder without this file is not an adapter."""
WEIGHTS_NAME = "adapter_model.safetensors"
REPORT_NAME = "plasticity.json"
"""The file with the report and the selection; plain LoRA adapters do not have it."""
MODEL_CONFIG_NAME = "config.json"
PROCESSOR_NAME = "preprocessor_config.json"
"""The image processor, if it was saved with the adapter."""


def find_file(
    folder_or_repo: str | os.PathLike[str],
    name: str,
    error: type[PlasticityError],
    *,
    optional: bool = False,
    **hub: Any,
) -> Path | None:
    """Returns the path of a file, in the folder or in the local cache of the Hub; None if there is no such file.

    Args:
        folder_or_repo: a folder, or "user/repo" on the Hub.
        name: name of the file.
        error: class of the errors.
        optional: True to return None, too, for a file that is not in the cache when the Hub must not be asked.
        hub: options of `huggingface_hub.hf_hub_download`.

    Raises:
        error: the file cannot be fetched, or it is unknown whether it exists.
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
        raise error(f"{source} is not a folder, and the Hub cannot be reached for {name}: {reason}") from reason
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
    except Exception as reason:  # the types of error depend on the HTTP library that huggingface_hub uses
        raise error(f"Cannot get {name} of {source} from the Hub: {reason}") from reason


def find_json(
    folder_or_repo: str | os.PathLike[str],
    name: str,
    error: type[PlasticityError],
    *,
    optional: bool = False,
    **hub: Any,
) -> dict[str, Any] | None:
    """Returns the object in a JSON file that `find_file` finds; None if there is no such file.

    Raises:
        error: the file cannot be fetched, or does not contain a JSON object.
    """
    path = find_file(folder_or_repo, name, error, optional=optional, **hub)
    if path is None:
        return None
    source = os.fspath(folder_or_repo)
    try:
        values = files.read_json(path)
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"Cannot read {name} of {source}: {reason}.") from reason
    if not isinstance(values, dict):
        raise error(f"Cannot read {name} of {source}: it must contain an object, got {type(values).__name__}.")
    return values


def without_report(folder_or_repo: str | os.PathLike[str]) -> str:
    """Returns the error message for an adapter without plasticity.json."""
    return f"No {REPORT_NAME} in {os.fspath(folder_or_repo)}. This adapter was not trained with plasticity_peft."
