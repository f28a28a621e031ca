"""Nothing is for CUDA alone, on the way to other devices such as mps. None of them was run."""

import ast

from conftest import ROOT

FILES = {
    path.relative_to(ROOT / "hf_nanogpt").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "hf_nanogpt").rglob("*.py"))
}
# They answer on any machine.
QUESTIONS = ("torch.cuda.is_available", "torch.cuda.device_count")


def find_unguarded(node: ast.AST, guarded: bool = False) -> list[str]:
    """Return the uses of CUDA outside the branches of a condition that asks for it."""
    name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
    if name in QUESTIONS:
        return []
    if not guarded and (name.startswith("torch.cuda.") or name.endswith(".cuda")):
        return [name]
    asks = isinstance(node, ast.If | ast.IfExp) and "cuda" in ast.unparse(node.test)
    return [
        use
        for child in ast.iter_child_nodes(node)
        for use in find_unguarded(child, guarded or asks)
    ]


def test_cuda_is_used_only_where_the_device_was_asked_for():
    found = {name: find_unguarded(tree) for name, tree in FILES.items()}
    assert {name: uses for name, uses in found.items() if uses} == {}


def test_the_rule_finds_a_use_without_a_question():
    code = "if x.device.type == 'cuda':\n  torch.cuda.synchronize()\ny = x.cuda()\n"
    assert find_unguarded(ast.parse(code + "torch.cuda.empty_cache()")) == [
        "x.cuda",
        "torch.cuda.empty_cache",
    ]


def test_float64_which_mps_lacks_is_used_for_sums_on_the_cpu_alone():
    found = {
        (name, ast.unparse(node))
        for name, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (node.attr == "double" or ast.unparse(node) == "torch.float64")
    }
    assert found == {
        ("evaluation.py", "x.double"),  # after `.cpu()` on mps
        ("evaluation.py", "torch.float64"),
    }
