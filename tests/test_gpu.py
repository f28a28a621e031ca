"""On a GPU as on the CPU: the same logits, kernels, documents, tokens, trainings and refusals.

Without a GPU these tests are skipped. `HF_NANOGPT_TEST_DEVICE=cpu` rehearses them: each assertion
runs on the CPU then, but for those of kernels that only a GPU has.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import CORPUS, ROOT, certain_model, tiny_model
from references import REFERENCES, make_reference, make_tokens
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig, StaticCache
from transformers.utils import is_flash_attn_2_available

from hf_nanogpt import (
    NanoGPTForCausalLM,
    build_optimizer,
    convert_checkpoint,
    evaluate,
    load_checkpoint,
    train,
)
from hf_nanogpt.cli import main
from hf_nanogpt.errors import UserError
from hf_nanogpt.quantization import multiplies_exactly, quantize_model

DEVICE = os.environ.get("HF_NANOGPT_TEST_DEVICE") or ("cuda" * torch.cuda.is_available())
IS_GPU = DEVICE == "cuda"
# Read when the first product is computed; deterministic algorithms need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DEVICE, reason="needs a GPU; HF_NANOGPT_TEST_DEVICE=cpu rehearses it"),
]
only_gpu = pytest.mark.skipif(not IS_GPU, reason="the CPU has no such kernel")
needs_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")

# The largest difference of logits, as a share of their norm: some roundings to 24, 11 and 8 bits.
ROUNDING = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=lambda dtype: str(dtype).split(".")[1])
FORMATS = ["llama", "qwen3", "gpt2"]
# Heads of 16, the smallest that flex attention compiles for.
WIDE = {"n_embd": 64, "eos_token_id": None}
FAST = ["nano", "gpt2", "qwen3"]
# How attention is computed: the implementation of transformers, and torch's own choice.
KERNELS = [
    pytest.param("eager", None, id="eager"),
    pytest.param("sdpa", None, id="sdpa"),
    pytest.param("sdpa", SDPBackend.MATH, id="math"),
    pytest.param("sdpa", SDPBackend.EFFICIENT_ATTENTION, id="efficient", marks=only_gpu),
    pytest.param("sdpa", SDPBackend.FLASH_ATTENTION, id="flash"),
    pytest.param("sdpa", SDPBackend.CUDNN_ATTENTION, id="cudnn", marks=only_gpu),
    pytest.param("flex_attention", None, id="flex"),
    pytest.param("flash_attention_2", None, id="flash2", marks=needs_flash),
]
HALF_ONLY = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if IS_GPU else ()


@pytest.fixture(autouse=True)
def _exact_products():
    """Compute in float32 as float32 says, and compile each test anew."""
    torch.compiler.reset()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE, 0) if IS_GPU else torch.device(DEVICE)


@pytest.fixture
def tokens(device) -> torch.Tensor:
    """Random token ids, (2, 48), without the pad token."""
    return torch.randint(1, 61, (2, 48), generator=torch.Generator().manual_seed(1)).to(device)


def rounded(model, device, dtype):
    """Return the model on the device in `dtype`, and one on the CPU with those weights."""
    there = model.to(device, dtype)
    here = type(model)(model.config).eval()
    here.load_state_dict({k: v.float().cpu() for k, v in there.state_dict().items()})
    return there, here.float()


def assert_near(found: torch.Tensor, expected: torch.Tensor, *, share: float) -> None:
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    assert found.isfinite().all()
    assert (found - expected).norm() <= share * expected.norm()


def backend_of(name: str) -> str:
    """Return the compiler's backend: on the CPU one that only traces, and spares minutes."""
    return name if IS_GPU else "aot_eager"


@contextlib.contextmanager
def attending(implementation: str, backend: SDPBackend | None):
    """Attend by one kernel; on the CPU flex attention runs as plain tensor code."""
    with contextlib.ExitStack() as stack:
        if backend is not None:
            stack.enter_context(sdpa_kernel(backend))
        if implementation == "flex_attention" and not IS_GPU:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def precise(implementation: str, backend: SDPBackend | None) -> torch.dtype:
    """Return float32, or bfloat16 for a kernel that has no other."""
    halves = implementation == "flash_attention_2" or backend in HALF_ONLY
    return torch.bfloat16 if halves else torch.float32


# Logits


@DTYPES
@torch.no_grad()
def test_logits_equal_those_of_the_cpu(family, dtype, device, tokens):
    there, here = rounded(tiny_model(family, **WIDE), device, dtype)
    expected = here(tokens.cpu()).logits
    assert expected.std() > 1
    # A random post-norm model doubles a rounding in each layer.
    assert_near(there(tokens).logits, expected, share=2 * ROUNDING[dtype])


@DTYPES
@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_logits_equal_those_of_the_native_equivalent(format, dtype, device, tmp_path):
    theirs = make_reference(format)
    theirs.save_pretrained(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    ours = NanoGPTForCausalLM.from_pretrained(tmp_path / "ours").to(device, dtype).eval()
    ids = make_tokens().to(device)
    expected = theirs.to(device, dtype)(ids).logits
    assert type(theirs).__name__ == REFERENCES[format].architecture and expected.std() > 1
    assert_near(ours(ids).logits, expected, share=ROUNDING[dtype])


@torch.no_grad()
def test_tf32_is_off_unless_asked_for_and_would_show(device, tokens):
    model = tiny_model("nano", n_embd=256, n_layer=1, initializer_range=0.1)
    there, here = rounded(model, device, torch.float32)
    expected = here(tokens.cpu()).logits
    assert_near(there(tokens).logits, expected, share=ROUNDING[torch.float32])
    torch.set_float32_matmul_precision("high")
    coarse = there(tokens).logits.cpu()
    if IS_GPU:
        assert (coarse - expected).norm() > 10 * ROUNDING[torch.float32] * expected.norm()


def test_gradient_checkpointing_gives_the_same_loss_and_gradients(device, tokens):
    model = tiny_model("nano", **WIDE).to(device).train()
    expected = loss_and_gradients(model, tokens)
    model.gradient_checkpointing_enable()
    loss, gradients = loss_and_gradients(model, tokens)
    assert_near(loss, expected[0], share=1e-6)
    assert_near(gradients, expected[1], share=1e-5)


def loss_and_gradients(model, ids, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and all gradients, one after the other."""
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False, **kwargs).loss
    loss.backward()
    gradients = [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]
    return loss.detach().clone(), torch.cat(gradients)


@pytest.mark.parametrize("recipe", ["muon", "adamw"])
def test_steps_of_the_optimizer_equal_those_of_the_cpu(recipe, device, tokens):
    losses = []
    for where in (device, torch.device("cpu")):
        model, ids = tiny_model("nano", initializer_range=None).to(where).train(), tokens.to(where)
        optimizer, row = build_optimizer(model, recipe=recipe), []
        for _ in range(4):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            row.append(loss.item())
        losses.append(row)
    assert losses[0][-1] < losses[0][0] - 0.01
    # On a GPU Muon orthogonalises in bfloat16, which changes directions by about a hundredth.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if recipe == "muon" else 1e-4)


# Kernels


@pytest.mark.parametrize(("implementation", "backend"), KERNELS)
@pytest.mark.parametrize("family", FAST)
def test_kernels_give_the_loss_and_gradients_of_eager_attention(
    family, implementation, backend, device, tokens
):
    if implementation == "flex_attention" and not IS_GPU:
        pytest.skip("flex attention has no backward pass on the CPU")
    dtype = precise(implementation, backend)
    there = tiny_model(family, **WIDE, num_key_value_heads=4, attn_implementation=implementation)
    there = there.to(device, dtype)
    here = tiny_model(family, **WIDE, num_key_value_heads=4, attn_implementation="eager")
    here.load_state_dict({k: v.float().cpu() for k, v in there.state_dict().items()})
    expected = loss_and_gradients(here, tokens.cpu())
    with attending(implementation, backend):
        loss, gradients = loss_and_gradients(there, tokens)
    share = ROUNDING[dtype]
    assert_near(loss, expected[0], share=share)
    assert_near(gradients, expected[1], share=10 * share)


@only_gpu
@torch.no_grad()
def test_bfloat16_attends_by_a_fused_kernel_without_a_mask_in_memory(device, tokens):
    model = tiny_model("nano", **WIDE, num_key_value_heads=2).to(device, torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(tokens, use_cache=False)
    names = {event.key for event in seen.key_averages()}
    assert any("flash_attention" in name or "cudnn_attention" in name for name in names), names


@pytest.mark.parametrize(("implementation", "backend"), KERNELS)
@torch.no_grad()
def test_the_future_changes_no_earlier_logit_at_all(implementation, backend, device, tokens):
    dtype = precise(implementation, backend)
    model = tiny_model("nano", **WIDE, num_key_value_heads=4, attn_implementation=implementation)
    model, other = model.to(device, dtype), tokens.clone()
    other[:, -1] = tokens[:, -1] % 60 + 1
    with attending(implementation, backend):
        change = model(other, use_cache=False).logits - model(tokens, use_cache=False).logits
    assert change[:, :-1].abs().max() == 0.0
    assert change[:, -1].abs().max() > 0.01


# Each row is packed from documents of these lengths.
PACKED = [[20, 1, 27], [48]]


@pytest.mark.parametrize("family", ["nano", "gpt2", "gpt3"])
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("eager", torch.float32),
        ("sdpa", torch.float32),
        ("sdpa", torch.bfloat16),
        ("flex_attention", torch.float32),
        pytest.param("flash_attention_2", torch.bfloat16, marks=needs_flash),
    ],
    ids=str,
)
@torch.no_grad()
def test_packed_documents_have_the_logits_that_each_has_alone(
    family, implementation, dtype, device, tokens
):
    model = tiny_model(family, **WIDE, attn_implementation=implementation).to(device, dtype)
    rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in PACKED]
    positions = torch.stack(rows).to(device)
    # flash-attn keeps the documents of a single row apart; several rows are refused
    batches = [slice(0, 2)] if implementation != "flash_attention_2" else [slice(0, 1), slice(1, 2)]
    with attending(implementation, None):
        packed = [
            model(tokens[rows], position_ids=positions[rows], use_cache=False).logits
            for rows in batches
        ]
        packed = torch.cat(packed)
        for row, lengths in enumerate(PACKED):
            ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
            for start, end in pairwise(ends):
                alone = model(tokens[row : row + 1, start:end], use_cache=False).logits[0]
                assert_near(packed[row, start:end], alone, share=2 * ROUNDING[dtype])


# Generation


def continue_text(model, ids, new=8, **settings) -> list[list[int]]:
    """Return the new tokens of each row of ids; 0 is padding."""
    return model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )[:, ids.shape[1] :].tolist()


CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 6},
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_padded_rows_get_the_tokens_that_each_gets_alone(family, cache, device, tokens):
    model = tiny_model(family, **WIDE).to(device)
    rows = [tokens[0, :13], tokens[1, :20]]
    together = torch.stack([torch.nn.functional.pad(row, (20 - len(row), 0)) for row in rows])
    alone = [continue_text(model, row[None])[0] for row in rows]
    assert continue_text(model, together, **cache) == alone
    here = model.cpu()
    assert [continue_text(here, row[None].cpu())[0] for row in rows] == alone


GRAPHS = pytest.mark.parametrize("mode", ["default", "reduce-overhead"], ids=["plain", "graphs"])


@GRAPHS
def test_compiled_decoding_gives_the_same_tokens(mode, device):
    ids = torch.arange(1, 25)[None]
    model = certain_model(ids, n_layer=1, **WIDE).to(device)
    compiler = CompileConfig(mode=mode if IS_GPU else None, backend=backend_of("inductor"))
    compiler._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compiler}
    torch._dynamo.utils.counters.clear()
    for length in (12, 9):  # the second text needs no second compilation
        found = continue_text(model, ids[:, :length].to(device), **settings)
        assert found == ids[:, length : length + 8].tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@GRAPHS
def test_compiled_training_gives_the_same_losses(mode, device, tokens):
    losses = []
    for compiled in (False, True):
        model = tiny_model("nano", **WIDE, n_layer=1).to(device).train()
        if compiled:
            kwargs = {"mode": mode} if IS_GPU else {"backend": "aot_eager"}
            model.compile(fullgraph=True, dynamic=False, **kwargs)
        optimizer = build_optimizer(model, recipe="adamw", learning_rate=1e-3)
        row = []
        for _ in range(4):  # graphs are recorded in the second and played from the third
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            row.append(loss.item())
        losses.append(row)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# The end of learned positions

LIMIT = 64


@pytest.fixture
def learned(device):
    return tiny_model("gpt2", **WIDE, initializer_range=0.05).to(device)


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_learned_positions_end_in_a_sentence_and_the_process_lives(cache, device, learned, tokens):
    ids, room = tokens[:1], LIMIT - tokens.shape[1] + 1
    assert len(continue_text(learned, ids, new=room, **cache)[0]) == room
    with pytest.raises(ValueError, match=f"Position {LIMIT} does not exist"):
        continue_text(learned, ids, new=room + 3, **cache)
    with pytest.raises(ValueError, match=f"Position {LIMIT} does not exist"):
        learned(ids.repeat(1, 2)[:, : LIMIT + 1])
    assert torch.ones(3, device=device).sum().item() == 3


def test_compiled_decoding_ends_at_the_same_position(device, learned, tokens):
    compiler = CompileConfig(mode=None, backend=backend_of("inductor"))
    compiler._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compiler}
    ids, room = tokens[:1], LIMIT - tokens.shape[1] + 1
    expected = continue_text(learned, ids, new=room)
    assert continue_text(learned, ids, new=room, **settings) == expected
    with pytest.raises(ValueError, match=f"Position {LIMIT} does not exist"):
        continue_text(learned, ids, new=room + 3, **settings)
    assert torch.ones(3, device=device).sum().item() == 3


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_padding_does_not_count_against_learned_positions(cache, device, learned, tokens):
    # With its padding a text may be longer than the table; its positions are not.
    padded = torch.nn.functional.pad(tokens[:1, :40], (20, 0))
    expected = continue_text(learned, tokens[:1, :40], new=20)
    assert continue_text(learned, padded, new=20, **cache) == expected


def test_a_static_cache_used_by_hand_gives_the_same_logits(device, learned, tokens):
    cache = StaticCache(config=learned.config, max_cache_len=LIMIT)
    with torch.no_grad():
        expected = learned(tokens, use_cache=False).logits
        parts = [learned(p, past_key_values=cache).logits for p in tokens.split([40, 1, 7], dim=1)]
    assert_near(torch.cat(parts, dim=1), expected, share=1e-5)


# Training


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """A run of seconds: 40 blocks, the last one short, so the last batch of an epoch is small."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(CORPUS[:1260], encoding="utf-8")
    return {
        "data": str(path),
        "tokenizer": "char",
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "block_size": 32,
        "dropout": 0.1,
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "eval_steps": 4,
        "save_steps": 4,
        "sample_steps": 0,
        "disable_tqdm": True,
        **({} if IS_GPU else {"use_cpu": True, "num_threads": 1}),
    }


def losses_of(folder: Path) -> list[float]:
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    return [row.get("loss", row.get("eval_loss")) for row in state["log_history"]]


def bytes_of(folder: Path) -> dict[str, bytes]:
    weights = load_file(folder / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


@pytest.fixture
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("recipe", ["muon", "adamw"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one(
    recipe, precision, settings, tmp_path
):
    if precision == "fp16" and not IS_GPU:
        pytest.skip("Trainer has fp16 on GPUs only")
    folder, whole = tmp_path / "run", tmp_path / "whole"
    given = settings | PRECISIONS[precision] | {"optim_recipe": recipe, "output_dir": str(folder)}
    train(**given)
    shutil.copytree(folder, whole)
    shutil.rmtree(folder / "checkpoint-8")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    train(**given, resume=True)
    assert losses_of(folder) == losses_of(whole)
    assert bytes_of(folder) == bytes_of(whole)
    assert torch.get_float32_matmul_precision() == "highest"  # no TF32 by the way
    files = [path / "checkpoint-8" / "optimizer.pt" for path in (folder, whole)]
    resumed, expected = (torch.load(file, map_location="cpu")["state"] for file in files)
    for index, state in expected.items():
        assert state.keys() == resumed[index].keys()
        assert all(torch.equal(resumed[index][name], state[name]) for name in state)


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory) -> Path:
    """A run in float32, without dropout, which would draw other numbers on another device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(output_dir=str(folder), **(settings | {"dropout": 0.0}))
    return folder


def test_a_training_has_the_losses_of_the_cpu(settings, alone, tmp_path):
    given = settings | {"dropout": 0.0, "use_cpu": True, "num_threads": 1}
    train(output_dir=str(tmp_path / "run"), **given)
    # Muon's bfloat16 again.
    assert losses_of(alone) == pytest.approx(losses_of(tmp_path / "run"), abs=0.03)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_has_nearly_the_losses_of_float32(precision, settings, alone, tmp_path):
    if precision == "fp16" and not IS_GPU:
        pytest.skip("Trainer has fp16 on GPUs only")
    given = settings | {"dropout": 0.0, "dataloader_num_workers": 1} | PRECISIONS[precision]
    train(output_dir=str(tmp_path / "run"), **given)
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(alone), abs=0.03)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_compiled_trainer_compiles_once_and_has_the_same_losses(settings, alone, tmp_path):
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(
            output_dir=str(tmp_path / "run"),
            torch_compile=True,
            torch_compile_backend=backend_of("inductor"),
            tf32=False,  # else Trainer turns it on, to compile
            **(settings | {"dropout": 0.0}),
        )
    assert not torch._dynamo.utils.counters["graph_break"]
    # On a GPU Muon computes in bfloat16, which rounds otherwise when it is compiled.
    rounding = 2e-2 if IS_GPU else 1e-3
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(alone), abs=rounding)


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "NanoGPTDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def test_one_process_of_ddp_and_of_fsdp2_has_the_losses_of_none(settings, alone, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = settings | {"dropout": 0.0}
    flags = [f"--{name}={value}" for name, value in given.items()]
    ddp = [*launch, "-m", "hf_nanogpt", "train", *flags, f"--output_dir={tmp_path / 'ddp'}"]
    (tmp_path / "train_by_fsdp.json").write_text(json.dumps(given))
    script = ROOT / "tests" / "distributed_checks.py"
    fsdp = [*launch, script, "train_by_fsdp", tmp_path]
    start = partial(subprocess.Popen, stdout=-1, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    with start(ddp, env=env) as first, start(fsdp, env=env | FSDP) as second:
        printed = [process.communicate()[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), "\n".join(p[-3000:] for p in printed)
    for folder in ("ddp", "uninterrupted", "fsdp"):  # the last was resumed in the middle
        assert losses_of(tmp_path / folder) == pytest.approx(losses_of(alone), abs=1e-3), folder
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["processes"] == 1
    assert not list((tmp_path / "fsdp").glob("_fsdp*"))


def test_int8_weights_are_right_or_refused_and_int4_is_refused(device, tokens, capsys):
    model = tiny_model("nano", **WIDE).to(device)
    with torch.no_grad():
        expected = model(tokens).logits
    if IS_GPU:
        with pytest.raises(UserError, match="int8 weights are for a float32 model on the CPU"):
            quantize_model(model)
    if multiplies_exactly():
        with torch.no_grad():
            assert_near(quantize_model(model.cpu())(tokens.cpu()).logits, expected, share=0.05)
    assert main(["generate", "x", "--quantize", "int4"]) == 2
    assert "invalid choice: 'int4'" in capsys.readouterr().err


def test_memory_that_runs_out_is_a_sentence_that_says_what_to_lower(settings, tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += [f"--output_dir={tmp_path / 'run'}", "--n_embd=512", "--n_head=8", "--n_layer=12"]
    if IS_GPU:  # leave 0.1 % of the memory, about 80 MB
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.001)
        flags += ["--per_device_train_batch_size=64"]
    else:
        flags += ["--n_layer=1", "--n_head=1000000", "--n_embd=2000000000"]
    try:
        assert main(["train", *flags]) == 2
    finally:
        if IS_GPU:
            torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err
    for name in ("per_device_train_batch_size=", "gradient_accumulation_steps=", "block_size"):
        assert name in said
    assert f"not enough memory on {DEVICE}" in said and "gradient_checkpointing" in said


def test_a_trained_folder_is_used_by_the_command_line(settings, alone, capsys):
    prompt = ["generate", str(alone), "The", "--max_new_tokens=8", "--seed=1"]
    for argv in (prompt, ["eval", str(alone), "--data", settings["data"]], ["info", str(alone)]):
        assert main(argv) == 0, capsys.readouterr().err
    assert "The" in capsys.readouterr().out


def test_an_evaluation_on_the_device_equals_that_of_the_cpu(settings, alone, device):
    model, tokenizer = load_checkpoint(alone)
    found, expected = (
        evaluate(model.to(where), settings["data"], tokenizer=tokenizer).loss
        for where in (device, torch.device("cpu"))
    )
    assert found == pytest.approx(expected, rel=1e-6)
