"""The rules of the code that a machine can check: import order, public names, sizes, paths."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_nanogpt

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_nanogpt"

# Each name may import only from names to its left, or in a line above.
LEVELS = [
    "configuration_nanogpt",
    "modeling_nanogpt",
    "auto errors hub_errors untrusted streaming flops cpu_kernels linear_cross_entropy",
    "checkpoint presets",
    "data",
    "quantization generation evaluation convert",
    "hub analysis",
    "apps training",
    "benchmark cli",
]
ORDER = " ".join(LEVELS).split()


def _siblings(path: Path) -> set[str]:
    """Return the parts of the package that a file imports, at the top or inside a function."""
    found = set()
    dots = len(path.relative_to(PACKAGE).parts)  # two in a folder, which is one part here
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == dots:
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.split(".")[0] for name in modules}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            assert not any(str(name).startswith("hf_nanogpt") for name in names), path
    return found - {"__version__"}


def test_imports_point_one_way():
    files = {path: path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
    parts = {path: name.removesuffix(".py") for path, name in files.items() if name[0] != "_"}
    assert set(parts.values()) == set(ORDER)
    for path, name in parts.items():
        for sibling in _siblings(path) - {name}:
            assert ORDER.index(sibling) < ORDER.index(name), f"{path} must not import {sibling}"


def test_hub_files_import_only_what_everyone_has():
    allowed = {"collections", "dataclasses", "difflib", "functools", "math", "sys", "typing"}
    allowed |= {"huggingface_hub", "torch", "transformers"}
    for name in ("configuration_nanogpt", "modeling_nanogpt"):
        source = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        assert "from __future__" not in source
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed
            elif isinstance(node, ast.ImportFrom):
                assert (name, node.module) == ("modeling_nanogpt", "configuration_nanogpt")


def test_public_names_are_these():
    assert hf_nanogpt.__all__ == [
        "DataArguments",
        "EvaluationResult",
        "Explanation",
        "MuonAdamW",
        "NanoGPTConfig",
        "NanoGPTForCausalLM",
        "NanoGPTForQuestionAnswering",
        "NanoGPTForSequenceClassification",
        "NanoGPTForTokenClassification",
        "NanoGPTModel",
        "NanoGPTPreTrainedModel",
        "NanoGPTTrainer",
        "NanoGPTTrainingArguments",
        "PackedCollator",
        "TrainingResult",
        "add_chat_template",
        "build_optimizer",
        "convert_checkpoint",
        "evaluate",
        "evaluate_tasks",
        "explain_text",
        "export_checkpoint",
        "generate_text",
        "list_presets",
        "list_recipes",
        "load_checkpoint",
        "load_documents",
        "load_preset",
        "load_text",
        "pack_documents",
        "pull_checkpoint",
        "push_to_hub",
        "render_model_card",
        "stream_text",
        "token_byte_counts",
        "tokenize_corpus",
        "train",
        "train_tokenizer",
    ]
    for name in hf_nanogpt.__all__:
        thing = getattr(hf_nanogpt, name)
        assert thing.__doc__, f"{name} has no docstring"


def test_type_checkers_find_the_public_names_where_python_does():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and not node.orelse][1:]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = {alias.name: node.module for node in block.body for alias in node.names}
    assert imports == hf_nanogpt._MODULES
    assert sorted(imports) == hf_nanogpt.__all__


@pytest.mark.slow
def test_mypy_knows_the_signature_of_train(tmp_path):
    pytest.importorskip("mypy")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        "import hf_nanogpt\n"
        'hf_nanogpt.train("quickstart", resume="yes")\n'
        'result = hf_nanogpt.train("quickstart", resume=True)\n'
        "result.matrics\n"
    )
    heavy = ("accelerate", "datasets", "huggingface_hub", "numpy", "peft", "torch", "transformers")
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in heavy)
    config = tmp_path / "mypy.ini"
    config.write_text(f"[mypy]\nfollow_imports = silent\nignore_missing_imports = True\n{skipped}")
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), str(snippet)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert 'snippet.py:2: error: Argument "resume" to "train" has incompatible type' in done.stdout
    assert 'snippet.py:4: error: "TrainingResult" has no attribute "matrics"' in done.stdout
    assert "snippet.py:3" not in done.stdout


def test_one_place_suggests_names():
    users = {p.stem for p in PACKAGE.rglob("*.py") if "import difflib" in p.read_text("utf-8")}
    assert users == {"errors", "configuration_nanogpt"}  # a Hub file imports nothing of ours


def test_nothing_looks_at_how_the_program_was_called_when_it_is_imported():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_import = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        assert not any("sys.argv" in ast.unparse(node) for node in at_import), path


def test_files_stay_readable():
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines < (656 if path.stem == "modeling_nanogpt" else 460), f"{path.name}: {lines}"


def test_version_has_a_changelog_entry():
    assert f"## {hf_nanogpt.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_tracked_file_names_a_place_on_one_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    here = Path(__file__).name
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".png", ".lock"} or path.name == here or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(root|home|work|Users)/[a-z]", text), name


@pytest.mark.xdist_group("house")
def test_the_tests_of_a_group_run_in_one_worker(request):
    # pytest 9.2 with pytest-xdist 3.8 spreads them, and each worker makes their slow fixtures anew.
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@house")
