"""Other releases of transformers: what we use of it that it does not promise, and newer ones."""

import ast
import importlib
import inspect
import pkgutil
import warnings

import pytest
import transformers
from compat import find_unmet
from conftest import ROOT
from packaging.version import parse

import hf_nanogpt
from hf_nanogpt.auto import TESTED_TRANSFORMERS, warn_of_newer

PACKAGE = ROOT / "hf_nanogpt"
# Every private name of transformers that we override or use, and the last release that has it. Add
# a line only where there is no public way: each may be gone in the next release.
OVERRIDDEN = {
    ("PreTrainedConfig", "_auto_class"): "5.24.0",
    ("PreTrainedModel", "_auto_class"): "5.24.0",
    ("PreTrainedModel", "_can_compile_fullgraph"): "5.24.0",
    ("PreTrainedModel", "_can_record_outputs"): "5.24.0",
    ("PreTrainedModel", "_fsdp_plan"): "5.24.0",
    ("PreTrainedModel", "_init_weights"): "5.24.0",
    ("PreTrainedModel", "_no_split_modules"): "5.24.0",
    ("PreTrainedModel", "_pp_plan"): "5.24.0",
    ("PreTrainedModel", "_skip_keys_device_placement"): "5.24.0",
    ("PreTrainedModel", "_supports_attention_backend"): "5.24.0",
    ("PreTrainedModel", "_supports_flash_attn"): "5.24.0",
    ("PreTrainedModel", "_supports_flex_attn"): "5.24.0",
    ("PreTrainedModel", "_supports_sdpa"): "5.24.0",
    ("PreTrainedModel", "_tied_weights_keys"): "5.24.0",
    ("PreTrainedModel", "_tp_plan"): "5.24.0",
    ("Trainer", "_finish_current_push"): "5.24.0",
    ("Trainer", "_get_num_items_in_batch"): "5.24.0",
    ("Trainer", "_track_num_input_tokens"): "5.24.0",
    ("Trainer", "_init_training_state"): "5.24.0",
    ("Trainer", "_load_best_model"): "5.24.0",
    ("Trainer", "_load_from_checkpoint"): "5.24.0",
    ("Trainer", "_load_optimizer_and_scheduler"): "5.24.0",
    ("Trainer", "_load_rng_state"): "5.24.0",
    ("Trainer", "_load_scaler"): "5.24.0",
    ("Trainer", "_maybe_log_save_evaluate"): "5.24.0",
    ("Trainer", "_push_from_checkpoint"): "5.24.0",
    ("Trainer", "_run_epoch"): "5.24.0",
    ("Trainer", "_save"): "5.24.0",
    ("Trainer", "_save_checkpoint"): "5.24.0",
    ("Trainer", "_save_rng_state"): "5.24.0",
}
USED = {
    ("GenerationConfig", "_get_default_generation_params"): "5.24.0",
    ("PreTrainedConfig", "_attn_implementation"): "5.24.0",
    ("Trainer", "_get_output_dir"): "5.24.0",
    ("Trainer", "_prepare_inputs"): "5.24.0",
}
# Private names of other libraries.
ELSEWHERE = {
    *("_actions", "_group_actions"),  # argparse
    *("_foreach_add_", "_foreach_lerp_", "_foreach_mul_", "_int_mm"),  # torch
    *("_forward_hooks", "_forward_pre_hooks"),  # torch
    *("_exit",),  # os
    *("_fingerprint",),  # datasets
}


def package_modules():
    for module in pkgutil.walk_packages([str(PACKAGE)], "hf_nanogpt."):
        if not module.name.endswith("__main__"):
            yield importlib.import_module(module.name)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def find_overridden():
    """Return the private attributes that our classes replace in those of transformers."""
    found = set()
    for module in package_modules():
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            theirs = [base for base in cls.__mro__ if base.__module__.startswith("transformers.")]
            for name in filter(is_private, set(vars(cls)) - {"_abc_impl"}):
                found |= {(b.__name__, name) for b in theirs[:1] if hasattr(b, name)}
    return found


def find_used():
    """Return the private attributes that we read or call and do not define ourselves."""
    used, ours = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    ours.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    ours.add(name)
                case ast.Attribute(attr=name):
                    used.add(name)
    return {name for name in used - ours if is_private(name)}


@pytest.mark.skipif(
    parse(transformers.__version__) < parse(TESTED_TRANSFORMERS[-1]),
    reason="older releases lack some of these names, and do without what we put there",
)
def test_private_names_that_we_override_are_listed_and_exist():
    assert find_overridden() == set(OVERRIDDEN)
    assert set((OVERRIDDEN | USED).values()) <= set(TESTED_TRANSFORMERS)


def test_compat_installs_what_another_release_needs_and_this_environment_lacks(tmp_path):
    info = tmp_path / "old-1.0.dist-info"
    info.mkdir()
    needs = ["nothing-of-this-name>=1", "torch<1", "numpy>=1", "other; extra == 'x'"]
    lines = ["Metadata-Version: 2.1", "Name: old", "Version: 1.0"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    (info / "METADATA").write_text("\n".join(lines))
    assert find_unmet(tmp_path) == needs[:2]


def test_private_names_that_we_use_are_listed_and_exist():
    assert find_used() - ELSEWHERE == {name for _, name in USED}
    for owner, name in USED:
        assert hasattr(getattr(transformers, owner), name), (owner, name)


def test_everything_that_we_import_from_transformers_exists():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                names = ", ".join(alias.name for alias in node.names)
                assert not any(map(is_private, names.split(", "))), (path.name, names)
                exec(f"from {node.module} import {names}")


def find_tricks(tree: ast.AST) -> set[str]:
    """Return what the code does behind other code's back: it renames classes, or looks around."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="__class__" | "__name__" | "__module__", ctx=ast.Store()):
                found.add(f"assigns to {node.attr}")
            case ast.Subscript(value=ast.Call(func=ast.Name(id="globals"))):
                found.add("reads or writes globals()[...]")
            case ast.Attribute(value=ast.Name(id="sys"), attr="argv" | "modules"):
                found.add(f"sys.{node.attr}")
    return found


def test_only_the_command_line_looks_at_the_process_and_no_class_is_changed():
    for path in PACKAGE.rglob("*.py"):
        tricks = find_tricks(ast.parse(path.read_text(encoding="utf-8")))
        if path.parent == PACKAGE / "cli" or path == PACKAGE / "__init__.py":
            tricks -= {"sys.argv", "sys.modules"}
        assert tricks == set(), path
    broken = "x.__class__ = y\nglobals()['a'].b()\nsys.modules.get('peft')\nsys.argv"
    assert len(find_tricks(ast.parse(broken))) == 4


def test_the_newest_release_is_the_one_that_constraints_name():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"transformers=={TESTED_TRANSFORMERS[-1]}" in lines


def test_a_release_newer_than_any_tested_is_warned_of_once_and_names_doctor():
    major, minor, _ = map(int, TESTED_TRANSFORMERS[-1].split("."))
    with pytest.warns(UserWarning, match=rf"{major}\.{minor + 1}\.0.*hf-nanogpt doctor") as found:
        warn_of_newer(f"{major}.{minor + 1}.0")
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_newer(f"{major}.{minor}.9")
        warn_of_newer(TESTED_TRANSFORMERS[0])
        warn_of_newer(f"{major}.{minor}.0.dev0")


def test_importing_the_package_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", "transformers .* is newer than"
        )  # where it is, as at night
        importlib.reload(importlib.import_module("hf_nanogpt.auto"))
    assert hf_nanogpt.NanoGPTConfig.model_type == "nanogpt"
