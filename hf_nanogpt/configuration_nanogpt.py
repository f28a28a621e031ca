"""The configuration of NanoGPT: one flat set of fields that spells out the whole GPT family."""

import difflib
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Names that the base class takes as keyword arguments without having a field for them.
BASE_KEYWORDS = {
    *("attn_implementation", "auto_map", "experts_implementation", "name_or_path", "num_labels"),
    *("output_attentions", "partial_rotary_factor", "per_layer_config", "quantization_config"),
    *("rope_scaling", "rope_theta", "torch_dtype"),
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "sliding_window"),
)
_DERIVED_FROM = ("hidden_size", "num_attention_heads", "mlp_type")  # three of the sizes
_OLDER_ROPE = ("rope_theta", "rope_scaling")  # older names of what is in rope_parameters
_BIASES = ("attention_bias", "mlp_bias")  # what nanoGPT's `bias` sets

# `Derived[int]` is an int that `__post_init__` derives if it is left at None. At run time `@strict`
# has to accept None; a type checker lets whoever reads the field later use it without a check.
T = TypeVar("T")
if TYPE_CHECKING:
    Derived: TypeAlias = T | Any
else:
    Derived = T | None


@strict
class NanoGPTConfig(PreTrainedConfig):
    """Describe one decoder-only transformer; the defaults are the `nano` architecture.

    `None` means "derive": `intermediate_size` (4 x `hidden_size`, or 8/3 of it rounded up to a
    multiple of 32 for `mlp_type="glu"`), `num_key_value_heads` (`num_attention_heads`), `head_dim`
    (`hidden_size / num_attention_heads`), `layer_types` (all sliding if `sliding_window` is set,
    otherwise all full) and `rope_parameters` (base 10000).

    The short names of nanoGPT (`n_layer`, `n_head`, `n_embd`, `block_size`, `bias`) and of GPT-2
    (`n_positions`, `n_inner`) work too. An unknown name raises a `ValueError`.

    Fields that need an explanation:
        position_embedding_type: `"rope"` rotates q and k (RoFormer, arXiv:2104.09864); `"learned"`
            adds a table of `max_position_embeddings` vectors, as GPT-1 to GPT-3 do.
        norm_type: `"rmsnorm"` (arXiv:1910.07467), `"rmsnorm_unweighted"` or `"layernorm"`.
        norm_position: `"pre"` normalises the input of each sublayer and the final state (GPT-2 and
            later), `"post"` the sum after each sublayer (GPT-1).
        embedding_norm: normalise the embeddings before the first layer (nanochat).
        qk_norm: normalise each query and key head before the rotation (Qwen3, nanochat).
        mlp_type: `"glu"` is down(act(gate(x)) * up(x)) (arXiv:2002.05202), `"mlp"` is
            down(act(up(x))).
        dropout: probability, after the embeddings and each sublayer.
        attention_dropout: the same, of the attention weights; `None` is the value of `dropout`.
        sliding_window: number of positions that a `"sliding_attention"` layer sees, with its own.
        initializer_range: standard deviation of GPT-2's normal initialisation; `None` selects the
            initialisation made for Muon, which starts at a loss of exactly ln(vocab_size). The
            table of both is at `NanoGPTPreTrainedModel._init_weights`.
    """

    model_type = "nanogpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "block_size": "max_position_embeddings",
        "n_positions": "max_position_embeddings",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: Derived[int] = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: Derived[int] = None
    head_dim: Derived[int] = None
    max_position_embeddings: int = 1024
    position_embedding_type: Literal["rope", "learned"] = "rope"
    rope_parameters: Derived[dict] = None
    norm_type: Literal["rmsnorm", "rmsnorm_unweighted", "layernorm"] = "rmsnorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    embedding_norm: bool = False
    qk_norm: bool = True
    hidden_act: str = "silu"
    mlp_type: Literal["glu", "mlp"] = "glu"
    attention_bias: bool = False
    mlp_bias: bool = False
    dropout: float | int = 0.0
    attention_dropout: float | int | None = None
    sliding_window: int | None = None
    layer_types: Derived[list[str]] = None
    final_logit_softcapping: float | int | None = None
    initializer_range: float | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __new__(cls, *args, **kwargs):
        """Check the names here: `__post_init__` cannot tell a given value from a default."""
        cls.resolve_names(kwargs)
        return super().__new__(cls)

    @classmethod
    def resolve_names(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return fields by their full names; raise if two names of one field disagree."""
        found: dict[str, str] = {}  # the name by which each field came
        for name, value in given.items():
            for field in _BIASES if name == "bias" else [cls.attribute_map.get(name, name)]:
                other = found.setdefault(field, name)
                if given[other] != value:
                    raise ValueError(
                        f"{other}={given[other]!r} and {name}={value!r} contradict each other: "
                        "leave one of them out."
                    )
        return {field: given[name] for field, name in found.items()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Put overrides of a saved configuration in its place, under any name, and check them.

        The base class would assign them afterwards, unchecked, and ignore names without a field.
        A saved value that was derived is derived again: other heads have another size.
        """
        inherited = {field.name for field in fields(PreTrainedConfig)}
        own = {field.name for field in fields(cls)} - inherited
        names = own | {*cls.attribute_map, "bias", *_OLDER_ROPE}
        given = cls.resolve_names({name: kwargs.pop(name) for name in names & kwargs.keys()})
        if given:
            saved = cls.resolve_names(config_dict)
            # Of these alone: a saved value that is not valid may be what an override corrects.
            kept = {name: saved[name] for name in _DERIVED_FROM if name in saved}
            derived = cls(**kept, head_dim=2)._derive()
            saved = {name: saved[name] for name in saved if derived.get(name, ...) != saved[name]}
            if len(set(saved.get("layer_types") or [])) == 1:
                del saved["layer_types"]  # derived again, for another number of layers or window
            if "rope_parameters" in given:
                saved = {name: value for name, value in saved.items() if name not in _OLDER_ROPE}
            elif not given.keys().isdisjoint(_OLDER_ROPE):
                rope = saved.pop("rope_parameters", None) or {}
                scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
                saved = {"rope_theta": rope.get("rope_theta"), "rope_scaling": scaling} | saved
            config_dict = saved | given
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        # The base class would resolve short names only after we have derived the other fields.
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        if "bias" in kwargs:
            self.attention_bias = self.mlp_bias = kwargs.pop("bias")
        self._refuse_unknown_names(kwargs)
        self._merge_rope(kwargs)
        self._check_sizes()
        self._derive_missing()
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "learned":
            self.rope_parameters = None  # the base class has filled them in
        self.validate_architecture()
        self.base_model_tp_plan = self._tensor_parallel_plan()  # type: ignore[misc]  # a plan for each object

    def _refuse_unknown_names(self, kwargs: dict):
        """Raise on a misspelt field; the base class keeps the extra keys of a saved file."""
        if "model_type" in kwargs or self.transformers_version is not None:
            return  # from a file
        known = {field.name for field in fields(self)} | {*self.attribute_map, "bias"}
        allowed = BASE_KEYWORDS | set(GenerationConfig._get_default_generation_params())
        for name in kwargs:
            if name.startswith("_") or name in allowed:
                continue
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Known: {sorted(known)}."
            raise ValueError(f"{name}={kwargs[name]!r} is not a field of NanoGPTConfig. {hint}")

    def _merge_rope(self, kwargs: dict):
        """Move `rope_scaling` and `rope_theta`, the older names, into `rope_parameters`."""
        scaling, theta = kwargs.pop("rope_scaling", None), kwargs.pop("rope_theta", None)
        given = {"rope_parameters": self.rope_parameters, "rope_scaling": scaling}
        given |= {"rope_theta": theta, "partial_rotary_factor": kwargs.get("partial_rotary_factor")}
        given = {name: value for name, value in given.items() if value is not None}
        if given and self.position_embedding_type == "learned":
            raise ValueError(
                f"{given} is for rotary positions, but position_embedding_type='learned': leave "
                "out one of them."
            )
        rope = given.get("rope_parameters", scaling)
        if scaling not in (None, rope):
            raise ValueError(f"{given} contradict each other: leave out rope_scaling.")
        if isinstance(rope, dict):  # a copy, because the base class adds to it
            rope = dict(rope)
            if theta is not None and rope.setdefault("rope_theta", theta) != theta:
                raise ValueError(f"{given} contradict each other: leave out rope_theta.")
        elif theta is not None:
            rope = {"rope_type": "default", "rope_theta": theta}
        self.rope_parameters = rope

    def _check_sizes(self):
        """Raise on a size that is too small, before anything is divided by it."""
        for name in SIZES:
            # A window of 1 is no attention at all, and transformers' cache keeps all tokens then.
            least = 2 if name == "sliding_window" else 1
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be a whole number, at least {least}.")

    def _derive(self) -> dict[str, int | None]:
        """Return the sizes that follow from others; `None` where they do not."""
        width, heads = self.hidden_size, self.num_attention_heads
        # 8/3 of the width: three matrices then cost as much as two of 4 times the width.
        inner = 32 * math.ceil(width / 12) if self.mlp_type == "glu" else 4 * width
        head_dim = None if width % heads else width // heads
        return {"head_dim": head_dim, "num_key_value_heads": heads, "intermediate_size": inner}

    def _derive_missing(self):
        """Fill in every field that was left at `None`."""
        for name, value in self._derive().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.head_dim is None:
            raise ValueError(
                f"hidden_size (n_embd)={self.hidden_size} must be a multiple of "
                f"num_attention_heads (n_head)={self.num_attention_heads}. Change one of them, "
                "or set head_dim."
            )
        if self.layer_types is None:
            full = self.sliding_window is None
            layer_type = "full_attention" if full else "sliding_attention"
            self.layer_types = [layer_type] * self.num_hidden_layers

    def find_attention_dropout(self) -> float:
        """Return the dropout of the attention weights: their own, or that of all else."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    def validate_architecture(self):
        """Check the fields that depend on each other: in a new object, a saved one, and a model."""
        self._check_numbers()
        self._check_layers()
        if self.position_embedding_type == "rope":
            self._check_rope()

    def _check_numbers(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}. Choose one of its divisors, or "
                "leave num_key_value_heads out."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is unknown; allowed: {sorted(ACT2FN)}."
            )
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1.")
        for name in ("final_logit_softcapping", "initializer_range", "norm_eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0.")

    def _check_layers(self):
        allowed = {"full_attention", "sliding_attention"}
        if set(self.layer_types) - allowed or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types={self.layer_types} must list num_hidden_layers="
                f"{self.num_hidden_layers} entries, each one of {sorted(allowed)}."
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError(
                "layer_types has 'sliding_attention', but sliding_window is None: set "
                "sliding_window to the number of positions that these layers see."
            )
        if "sliding_attention" not in self.layer_types and self.sliding_window is not None:
            raise ValueError(
                f"sliding_window={self.sliding_window}, but no entry of layer_types is "
                "'sliding_attention': set sliding_window to None, or leave out layer_types."
            )

    def _check_rope(self):
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd, but RoPE rotates pairs. Choose an even head_dim "
                "(hidden_size / num_attention_heads), or position_embedding_type='learned'."
            )
        rope, known = self.rope_parameters, {"default", *ROPE_INIT_FUNCTIONS}
        if rope.get("rope_type") not in known:
            raise ValueError(f"rope_parameters={rope}: rope_type must be one of {sorted(known)}.")
        for name in ("rope_theta", "factor"):
            value = rope.get(name)
            if value is None and rope["rope_type"] == "default":
                continue  # rope_theta is 10000 then, and factor is not read
            if name in rope and (not isinstance(value, int | float) or value <= 0):
                raise ValueError(f"rope_parameters={rope}: {name} must be a number above 0.")
        partial = rope.get("partial_rotary_factor") not in (None, 1.0)
        if partial and rope["rope_type"] != "proportional":
            raise ValueError(
                f"rope_parameters={rope}: this model rotates whole heads. Leave out "
                "partial_rotary_factor; only rope_type='proportional' takes it."
            )

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Say how tensor parallelism splits each matrix of a layer over the devices."""
        plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
        if self.qk_norm and self.norm_type != "rmsnorm_unweighted":
            # Every device has these weights whole, and the gradient of its own heads.
            for name in ("q_norm", "k_norm"):
                plan[f"layers.*.self_attn.{name}"] = "replicated_with_grad_allreduce"
        for name in ("gate_proj", "up_proj") if self.mlp_type == "glu" else ("up_proj",):
            plan[f"layers.*.mlp.{name}"] = "colwise"
        return plan | {"layers.*.self_attn.o_proj": "rowwise", "layers.*.mlp.down_proj": "rowwise"}


NanoGPTConfig.register_for_auto_class()
