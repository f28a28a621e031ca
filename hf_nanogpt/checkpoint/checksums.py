"""The former home of these names, until all imports name the new module."""

from .steps import RECORD, find_damage, read_record, save_state, sum_file, sum_state

__all__ = ["RECORD", "find_damage", "read_record", "save_state", "sum_file", "sum_state"]
