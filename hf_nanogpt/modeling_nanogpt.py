"""NanoGPT: one decoder-only transformer that is the whole GPT family by configuration.

Read it top-down: norm, positions, attention, MLP, layer, model, heads. Shapes are written with
B rows, T query positions, S key positions, C = hidden_size, H heads (G key-value heads), D =
head_dim and V = vocab_size.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_nanogpt import NanoGPTConfig

# Where transformers 5.4 to 5.24 differ; nothing below this block asks for a release.
# 5.24 renamed `past_key_values` to `cache`: as an argument of `forward` and of the functions that
# make masks, and as a field of the outputs. The model takes both names and answers by the name that
# the installed release has. Before 5.24, `cache` was the paged cache of continuous batching, which
# concerned the attention function alone.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__annotations__ else "past_key_values"
# What a model may be handed beyond the arguments that it names: for all models, for the loss, and
# for paged attention and vLLM, which their attention functions read.
KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {
    *("num_items_in_batch", "shift_labels", "ignore_index"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    *("cache", "block_table", "read_index", "write_index", "logits_indices"),
    *("logits_processor_args", "max_seqlen_q", "max_seqlen_k", "attention_instances"),
    # Tokenizers make the first, `generate` passes the others on; Llama ignores them as well.
    *("token_type_ids", "tokenizer", "assistant_tokenizer", "return_dict"),
}


def take_cache(past_key_values: Cache | None, kwargs: dict) -> Cache | None:
    """Return the cache, under whichever of its names it came, and take it out of `kwargs`.

    Raises:
        TypeError: two caches were given, or a keyword argument that no part of the model reads.
    """
    if unknown := [name for name in kwargs if name not in KEYWORDS and kwargs[name] is not None]:
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}.")
    if CACHE != "cache" and not isinstance(kwargs.get("cache"), Cache | None):
        return past_key_values  # the paged cache of an older release stays where it is
    cache = kwargs.pop("cache", None)
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("forward() got two caches: give past_key_values or cache, not both.")
    return past_key_values if cache is None else cache


def _is_eager_cpu(x: torch.Tensor) -> bool:
    """Say whether each small operation would be one more pass over memory, for nothing fuses."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def _normalize(x, eps):
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale, scale


class _RMSNormFunction(torch.autograd.Function):
    """Weighted root-mean-square norm in fewer passes over memory than autograd takes."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        normed, scale = _normalize(x, eps)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        normed, scale, weight = ctx.saved_tensors
        rows = (grad * normed).flatten(0, -2)
        along = (rows @ weight).view_as(scale)
        grad = torch.addcmul(grad * weight, normed, along, value=-1 / weight.numel())
        return grad.mul_(scale), rows.sum(dim=0), None


class NanoGPTRMSNorm(nn.RMSNorm):
    """Root-mean-square norm, weighted or not; transformers' init looks for this name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None or not _is_eager_cpu(x):
            return super().forward(x)
        if torch.is_grad_enabled():
            return _RMSNormFunction.apply(x, self.weight, self.eps)
        return _normalize(x, self.eps)[0].mul_(self.weight)


class NanoGPTLayerNorm(nn.LayerNorm):
    """Layer norm with weight and bias, as in GPT-1 to GPT-3."""


def build_norm(config: NanoGPTConfig, size: int) -> nn.Module:
    """Make the norm that the configuration names, over a last dimension of `size`."""
    if config.norm_type == "layernorm":
        return NanoGPTLayerNorm(size, eps=config.norm_eps)
    weighted = config.norm_type == "rmsnorm"
    return NanoGPTRMSNorm(size, eps=config.norm_eps, elementwise_affine=weighted)


class NanoGPTRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE, with every scaling that `rope_parameters` can name.

    The first half of the sines is negated: x * cos + (x with its halves exchanged) * sin rotates.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: NanoGPTConfig, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Return base^(-2i/D) for each pair i, shape (D/2,), and the factor for cos and sin (1)."""
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float)
        return config.rope_parameters["rope_theta"] ** (-pairs / config.head_dim), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device).float()
        angles = torch.cat((-angles, angles), dim=-1)  # (B, T, D)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class _RotaryFunction(torch.autograd.Function):
    """The rotation of x, whose gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _rotate(grad, *ctx.saved_tensors, -1), None, None


def _rotate(x, cos, sin, sign):
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=sign)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return rotated


def apply_rotary_pos_emb(q, k, cos, sin):
    """Rotate q (B, H, T, D) and k (B, G, T, D) by their positions' cos and sin (B, T, D)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if _is_eager_cpu(q):
        if torch.is_grad_enabled():
            return _RotaryFunction.apply(q, cos, sin), _RotaryFunction.apply(k, cos, sin)
        return _rotate(q, cos, sin, 1), _rotate(k, cos, sin, 1)
    half = q.shape[-1] // 2
    return q * cos + q.roll(half, -1) * sin, k * cos + k.roll(half, -1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend step by step, so that the weights can be looked at; the other kernels must agree."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, H, S, D)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights  # (B, T, H, D)


class NanoGPTAttention(nn.Module):
    """Causal self-attention, grouped-query where there are fewer key-value than query heads."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        self.o_proj.is_residual_proj = True
        self.q_norm = build_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = build_norm(config, self.head_dim) if config.qk_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # (B, H, T, D), (B, G, T, D)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            # A paged cache reads from `kwargs` which pages to write, and adds what to attend to.
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class NanoGPTMLP(nn.Module):
    """The position-wise network: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias) if config.mlp_type == "glu" else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.down_proj.is_residual_proj = True
        # GPT-2's GELU written out takes eight passes over memory, torch's kernel for it one.
        fused = {"gelu_new": "gelu_pytorch_tanh"}
        self.act_fn = ACT2FN[fused.get(config.hidden_act, config.hidden_act)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class NanoGPTDecoderLayer(GradientCheckpointingLayer):
    """Attention, then MLP, each added to the residual stream; norms before or after the sums."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.norm_position = config.norm_position
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.self_attn = NanoGPTAttention(config, layer_idx)
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        self.mlp = NanoGPTMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        x = hidden_states  # (B, T, C)
        if self.norm_position == "pre":
            x = self._add(x, self.self_attn(self.input_layernorm(x), **kwargs)[0])
            return self._add(x, self.mlp(self.post_attention_layernorm(x)))
        x = self.input_layernorm(self._add(x, self.self_attn(x, **kwargs)[0]))
        return self.post_attention_layernorm(self._add(x, self.mlp(x)))

    def _add(self, x, change):
        return x + (self.dropout(change) if self.training else change)


class NanoGPTCacheLayer(DynamicLayer):
    """A cache layer that writes new positions beside the old, where `DynamicLayer` copies them all.

    It copies too where gradients are wanted, and after somebody else (beam search) replaced `keys`.
    """

    _wholes: tuple[torch.Tensor, torch.Tensor] | None = None  # with room for more positions
    _last_keys: torch.Tensor | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        copying = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if self._wholes is not None and self._wholes[0].is_inference():
            copying |= not torch.is_inference_mode_enabled()  # torch forbids writing to them
        if copying or self.keys is None or self.keys is not self._last_keys:
            self._wholes = None
            super().update(key_states, value_states)
        else:
            start, added = self.keys.shape[2], key_states.shape[2]
            if self._wholes is None or start + added > self._wholes[0].shape[2]:
                more = (0, 0, 0, added + 256)
                self._wholes = tuple(nn.functional.pad(x, more) for x in (self.keys, self.values))
            for whole, new in zip(self._wholes, (key_states, value_states), strict=True):
                whole.narrow(2, start, added).copy_(new)
            self.keys, self.values = (x.narrow(2, 0, start + added) for x in self._wholes)
        self._last_keys = self.keys
        return self.keys, self.values


def is_empty(cache: Cache | None) -> bool:
    """Say whether a cache has neither content nor, as a static one has, room for the future."""
    if not isinstance(cache, Cache):
        return cache is None
    return not cache.is_compileable and cache.get_seq_length() == 0


class NanoGPTPreTrainedModel(PreTrainedModel):
    """What all heads share: initialisation, saving, and what transformers may do with the model."""

    config: NanoGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": NanoGPTDecoderLayer, "attentions": NanoGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialise one leaf module; the two schemes are described at `initializer_range`."""
        super()._init_weights(module)  # norms, biases, RoPE and GPT-2's normal distribution
        std, tied = self.config.initializer_range, self.config.tie_word_embeddings
        residual = getattr(module, "is_residual_proj", False)
        if std is not None:
            if residual and self.config.norm_position == "pre":
                init.normal_(module.weight, std=std / math.sqrt(2 * self.config.num_hidden_layers))
        elif tied and (isinstance(module, nn.Embedding) or hasattr(module, "is_lm_head")):
            pass  # one table serves both ends, and its logits must start small: GPT-2's 0.02
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        elif residual or hasattr(module, "is_lm_head"):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            bound = 0.6 * math.sqrt(3 / module.in_features)
            init.uniform_(module.weight, -bound, bound)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as transformers does, and make the folder load through every Auto class."""
        kind = type(self)
        if kind.__name__.startswith("FSDP"):  # `fully_shard` made it of ours, in a file of torch's
            ours = kind.__bases__[-1]
            kind.__name__, kind.__module__ = ours.__name__, ours.__module__
        self.config.auto_map = {"AutoConfig": "configuration_nanogpt.NanoGPTConfig"} | {
            auto_class: f"modeling_nanogpt.{name}" for name, auto_class in _AUTO_CLASSES.items()
        }
        super().save_pretrained(save_directory, *args, **kwargs)


class NanoGPTModel(NanoGPTPreTrainedModel):
    """The stack of decoder layers between token ids and hidden states; no encoder anywhere."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        config.validate_architecture()  # fields may have been set since the configuration was made
        learned = config.position_embedding_type == "learned"
        width, positions = config.hidden_size, config.max_position_embeddings
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.embed_positions = nn.Embedding(positions, width) if learned else None
        self.embed_norm = build_norm(config, width) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            NanoGPTDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = build_norm(config, width) if config.norm_position == "pre" else nn.Identity()
        self.rotary_emb = None if learned else NanoGPTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Map `input_ids` or `inputs_embeds`, one of the two, to hidden states (B, T, C).

        `position_ids` (B, T) that start again at 0 mark packed documents, which then do not see
        each other; that holds for `attention_mask=None`.

        Raises:
            ValueError: neither or both of the two were given, or a cache cannot be used as asked.
            TypeError: a keyword argument that no part of the model reads.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        past_key_values = take_cache(past_key_values, kwargs)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The backward pass runs each layer again, which would fill the cache twice.
            if not is_empty(past_key_values):
                raise ValueError(
                    "Gradient checkpointing cannot continue a cache: leave out past_key_values, or "
                    "call model.gradient_checkpointing_disable()."
                )
            past_key_values, use_cache = None, False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        is_new = is_empty(past_key_values)
        if type(past_key_values) is DynamicCache and is_new and not torch.compiler.is_compiling():
            for layer in past_key_values.layers:
                if type(layer) is DynamicLayer:
                    layer.__class__ = NanoGPTCacheLayer
        if position_ids is None:
            past_seen = 0 if is_new else past_key_values.get_seq_length()
            steps = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (steps + past_seen).unsqueeze(0)
        elif attention_mask is None and "cu_seq_lens_q" not in kwargs:
            self._check_packing(position_ids, None if is_new else past_key_values)

        masks = attention_mask  # `generate` hands over one mask per kind of layer for static caches
        if not isinstance(masks, dict):
            # transformers looks for packed documents only where it is given no cache.
            masks = create_masks_for_generate(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: None if is_new and attention_mask is None else past_key_values},
            )
        if not isinstance(masks, dict):  # 5.5 to 5.12 make one mask where all layers are alike
            masks = dict.fromkeys(self.config.layer_types, masks)

        hidden_states, position_embeddings = inputs_embeds, None
        if self.embed_positions is not None:
            self._check_positions(position_ids)
            hidden_states = hidden_states + self.embed_positions(position_ids)
        else:
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        hidden_states = self.dropout(self.embed_norm(hidden_states))
        depth = self.config.num_hidden_layers  # assisted decoding lowers it to draft by early exit
        for layer, layer_type in zip(self.layers, self.config.layer_types[:depth], strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values}
        )

    def _check_packing(self, position_ids: torch.Tensor, cache: Cache | None):
        """Raise where packed documents would see each other.

        A static or filled cache cannot keep them apart; flash attention does in a batch of one row,
        or where `cu_seq_lens_q` and its kin say where they begin.
        """
        rows, length = position_ids.shape
        flash = rows > 1 and "flash" in self.config._attn_implementation
        if not (flash or isinstance(cache, Cache)) or torch.compiler.is_compiling():
            return
        if length > 1 and bool((position_ids.diff(dim=-1) != 1).any()):
            what, instead = "a static or filled cache", "use_cache=False"
            if flash:
                what, instead = "flash attention of several rows", "attn_implementation='sdpa'"
            raise ValueError(
                f"position_ids that start again mark packed documents, which {what} cannot keep "
                f"apart: use {instead}, or give an attention_mask."
            )

    def _check_positions(self, position_ids: torch.Tensor):
        """Raise before a learned table is read past its end (on CPU; a GPU would have to wait)."""
        if position_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        limit = self.config.max_position_embeddings
        if position_ids.numel() and (longest := int(position_ids.max())) >= limit:
            raise ValueError(
                f"Position {longest} does not exist: this model has learned positions for "
                f"max_position_embeddings (block_size)={limit} tokens. Shorten the text, or choose "
                "position_embedding_type='rope'."
            )


def slice_logits_to_keep(
    hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor
) -> torch.Tensor:
    """Keep the last so many positions (0 keeps all) or those of an index, of (B, T, C).

    An index of one dimension serves all rows; one of two has its own positions for each row, or, of
    booleans, flattens all that are True to (N, C).
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


class NanoGPTForCausalLM(NanoGPTPreTrainedModel, GenerationMixin):
    """The language model: hidden states to logits over the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.model = NanoGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.is_lm_head = True
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Map tokens to logits (B, T, V) and, given `labels` (B, T), to the loss in nats per token.

        Labels are not shifted: the model compares logits at t with the label at t + 1, and ignores
        -100. `logits_to_keep` limits the logits to the last so many positions (0 keeps all), or to
        the given indices.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=take_cache(past_key_values, kwargs),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# The mixins below would build their trunk through AutoModel, which a model loaded as remote code is
# not registered with: each head makes its own NanoGPTModel and keeps the mixin's forward.


class NanoGPTForSequenceClassification(GenericForSequenceClassification, NanoGPTPreTrainedModel):
    """Classify a text by the state of its last token that is no padding."""

    def __init__(self, config: NanoGPTConfig):
        NanoGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = NanoGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class NanoGPTForTokenClassification(GenericForTokenClassification, NanoGPTPreTrainedModel):
    """Classify each token by the text up to it."""

    def __init__(self, config: NanoGPTConfig):
        NanoGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = NanoGPTModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class NanoGPTForQuestionAnswering(GenericForQuestionAnswering, NanoGPTPreTrainedModel):
    """Mark where in the text an answer begins and ends."""

    def __init__(self, config: NanoGPTConfig):
        NanoGPTPreTrainedModel.__init__(self, config)
        self.model = NanoGPTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


_AUTO_CLASSES = {
    "NanoGPTModel": "AutoModel",
    "NanoGPTForCausalLM": "AutoModelForCausalLM",
    "NanoGPTForSequenceClassification": "AutoModelForSequenceClassification",
    "NanoGPTForTokenClassification": "AutoModelForTokenClassification",
    "NanoGPTForQuestionAnswering": "AutoModelForQuestionAnswering",
}
for _name, _auto_class in _AUTO_CLASSES.items():
    globals()[_name].register_for_auto_class(_auto_class)

__all__ = ["NanoGPTPreTrainedModel", *_AUTO_CLASSES]
