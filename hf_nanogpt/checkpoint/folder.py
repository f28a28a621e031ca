"""The former home of these names, until all imports name the new modules."""
# ruff: noqa: F401

from .loading import (
    LOADING,
    TOKENIZER_FILES,
    check_checkpoint,
    download,
    load_checkpoint,
    load_model,
    local_folder,
    split_revision,
    unreachable,
)
from .steps import find_intact_checkpoint, find_last_checkpoint
from .writing import (
    ARTIFACTS,
    LOCK,
    check_output_dir,
    check_writable,
    clear_abandoned,
    clear_output_dir,
    clear_unfinished,
    explain_write_errors,
    staged_folder,
)
