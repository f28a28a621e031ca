"""NanoGPT: one decoder-only transformer that becomes any of the GPT family by configuration.

It reads top-down, in the order of transformers' `modeling_llama.py`: norm, rotary positions,
attention, MLP, layer, model, heads. Comments say what differs. In shapes, B is the number of
sequences, T of query positions, S of key positions, C = hidden_size, H the number of query heads,
G of key-value heads, D = head_dim and V = vocab_size.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
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

# What differs between transformers 5.4 and 5.24; nothing below this block depends on the release.
# 5.24 renamed `past_key_values` to `cache`, both as an argument and as a field of the outputs. The
# model accepts both names and returns the one that the installed release uses. Before 5.24, `cache`
# was the paged cache of continuous batching, which only the attention function reads.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__annotations__ else "past_key_values"
# The keyword arguments that `forward` takes beyond its signature: for the loss; for the attention
# functions of flash attention, continuous batching and vLLM; and, as in Llama, some to ignore.
KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {
    *("num_items_in_batch", "shift_labels", "ignore_index"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    *("cache", "block_table", "read_index", "write_index", "logits_indices"),
    *("logits_processor_args", "max_seqlen_q", "max_seqlen_k", "attention_instances"),
    *("token_type_ids", "tokenizer", "assistant_tokenizer", "return_dict"),
}


def take_cache(past_key_values: Cache | None, kwargs: dict) -> Cache | None:
    """Return the cache, whichever of its two names it came by, and remove it from `kwargs`.

    Raises:
        TypeError: there are two caches, or a keyword argument that no part of the model reads.
    """
    if unknown := [name for name in kwargs if name not in KEYWORDS and kwargs[name] is not None]:
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}.")
    if CACHE != "cache" and not isinstance(kwargs.get("cache"), Cache | None):
        return past_key_values  # an older release's paged cache stays in `kwargs`
    cache = kwargs.pop("cache", None)
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("forward() got two caches: pass past_key_values or cache, not both.")
    return past_key_values if cache is None else cache


class NanoGPTRMSNorm(nn.Module):
    """Scale vectors to a root mean square of 1, then by a weight where the norm has one."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, weighted: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size)) if weighted else None
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        hidden_states = hidden_states.to(input_dtype)
        if self.weight is not None:
            # The second cast is not in Llama: under autocast the weight is float32, and queries
            # and keys must keep the dtype of the values.
            hidden_states = (self.weight * hidden_states).to(input_dtype)
        return hidden_states

    def extra_repr(self) -> str:
        size = "no weight" if self.weight is None else tuple(self.weight.shape)
        return f"{size}, eps={self.variance_epsilon}"


def build_norm(config: NanoGPTConfig, size: int) -> nn.Module:
    """Make the norm that `config.norm_type` names, over a last dimension of `size`."""
    # transformers initialises both by their class names, which have to end in RMSNorm or LayerNorm.
    if config.norm_type == "layernorm":  # GPT-1 to GPT-3
        return nn.LayerNorm(size, eps=config.norm_eps)
    return NanoGPTRMSNorm(size, config.norm_eps, weighted=config.norm_type == "rmsnorm")


class NanoGPTRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles, with every scaling that `rope_parameters` can name.

    transformers recomputes the two buffers after loading, which it recognises by their names.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: NanoGPTConfig) -> tuple[torch.Tensor, float]:
        """Return base^(-2i/D) for each pair i, shape (D/2,), and the factor for cos and sin (1)."""
        base, dim = config.rope_parameters["rope_theta"], config.head_dim
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0

    @dynamic_rope_update  # some scalings depend on the longest position seen
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(x.device).float()  # (B, T, D/2)
        emb = torch.cat((freqs, freqs), dim=-1)  # (B, T, D)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Return (-x2, x1) for x = (x1, x2), the two halves of each head."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q (B, H, T, D) and k (B, G, T, D) by their positions' cos and sin (B, T, D)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def eager_attention_forward(
    module: "NanoGPTAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend step by step and return the weights too; the fast kernels must give the same."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # (B, H, S, D)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    attn_weights = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask  # 0 where seen, hugely negative where hidden
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    return (attn_weights @ value).transpose(1, 2).contiguous(), attn_weights  # (B, T, H, D)


class NanoGPTAttention(nn.Module):
    """Causal self-attention; grouped-query if there are fewer key-value heads than query heads."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.find_attention_dropout()
        # For the attention functions of transformers: given no mask, they hide the future.
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        # For `_init_weights`, which sees only leaf modules. (torch annotates modules only.)
        self.o_proj.is_residual_proj = True  # type: ignore[assignment]
        self.q_norm = build_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = build_norm(config, self.head_dim) if config.qk_norm else None
        # An attribute so that `use_cpu_kernels` can replace it by a faster function.
        self.apply_rotary_pos_emb = apply_rotary_pos_emb

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended states (B, T, C), and the weights if the kernel computes them."""
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)  # (B, T, H or G, D)
        query_states = self.q_proj(hidden_states).view(hidden_shape)
        key_states = self.k_proj(hidden_states).view(hidden_shape)
        if self.q_norm is not None and self.k_norm is not None:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states = query_states.transpose(1, 2), key_states.transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        if position_embeddings is not None:  # None with learned positions
            cos, sin = position_embeddings
            query_states, key_states = self.apply_rotary_pos_emb(query_states, key_states, cos, sin)
        if past_key_values is not None:
            # From here on the keys are those of all S positions. A paged cache adds to `kwargs`,
            # which only the attention function reads.
            key_states, value_states = past_key_values.update(
                key_states, value_states, self.layer_idx, kwargs=kwargs
            )

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()  # (B, T, H * D)
        return self.o_proj(attn_output), attn_weights


class NanoGPTMLP(nn.Module):
    """The position-wise network: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias) if config.mlp_type == "glu" else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.down_proj.is_residual_proj = True  # type: ignore[assignment]
        # The same function as GPT-2's "gelu_new", which passes over memory eight times.
        hidden_act = "gelu_pytorch_tanh" if config.hidden_act == "gelu_new" else config.hidden_act
        self.act_fn = ACT2FN[hidden_act]

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

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Map states (B, T, C) to states; `kwargs` are the arguments of attention."""
        residual = hidden_states
        # Attention returns its weights too: a hook records them if `output_attentions` asks for it.
        if self.norm_position == "pre":  # as in Llama
            hidden_states, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states = residual = residual + self.dropout(hidden_states)
            hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
            return residual + self.dropout(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = residual = self.input_layernorm(residual + self.dropout(hidden_states))
        return self.post_attention_layernorm(residual + self.dropout(self.mlp(hidden_states)))


def is_empty(cache: Cache | None) -> bool:
    """Return whether there is no cache, or one that holds nothing and has no fixed size."""
    if not isinstance(cache, Cache):
        return cache is None
    return not cache.is_compileable and cache.get_seq_length() == 0


def count_past(cache: Cache | None) -> int | None:
    """Return how many positions a cache has seen, None for a tensor or the paged cache of many."""
    if not isinstance(cache, Cache):
        return 0 if cache is None else None
    seen = cache.get_seq_length()
    return None if isinstance(seen, torch.Tensor) else seen


class NanoGPTPreTrainedModel(PreTrainedModel):
    """What the model and its heads share: initialisation, saving, and what they support."""

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
    def _init_weights(self, module):
        """Initialise one leaf module: norms with 1, biases with 0, matrices by one of two schemes.

            weights                 initializer_range=std           None, made for Muon
            embeddings              N(0, std^2)                     N(0, 1); tied N(0, 0.02^2)
            q, k, v, gate, up       N(0, std^2)                     uniform, variance 0.36 / fan-in
            o, down                 N(0, std^2 / 2 layers)          0
            lm_head                 N(0, std^2)                     0

        o and down write into the residual stream; post-norm models keep std there.
        """
        super()._init_weights(module)  # the first scheme, but for o and down; std=None means 0.02
        std, tied = self.config.initializer_range, self.config.tie_word_embeddings
        is_residual_proj = getattr(module, "is_residual_proj", False)
        is_lm_head = hasattr(module, "is_lm_head")
        if std is not None:
            if is_residual_proj and self.config.norm_position == "pre":
                init.normal_(module.weight, std=std / math.sqrt(2 * self.config.num_hidden_layers))
        elif tied and (isinstance(module, nn.Embedding) or is_lm_head):
            pass  # embeddings of size 1 would make large logits, and so a large first loss
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        elif is_residual_proj or is_lm_head:
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            bound = 0.6 * math.sqrt(3 / module.in_features)
            init.uniform_(module.weight, -bound, bound)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as transformers does, but list all the classes that can load the folder."""
        self.config.auto_map = {"AutoConfig": "configuration_nanogpt.NanoGPTConfig"} | {
            auto_class: f"modeling_nanogpt.{cls.__name__}"
            for auto_class, cls in AUTO_CLASSES.items()
        }
        # FSDP2 puts a class of torch's in front of ours: its name and file would be saved.
        cls = next(c for c in type(self).__mro__ if not c.__module__.startswith("torch."))
        model: Any = object.__new__(cls)
        model.__dict__.update(self.__dict__)  # the same modules and weights
        super(NanoGPTPreTrainedModel, model).save_pretrained(save_directory, *args, **kwargs)


class NanoGPTModel(NanoGPTPreTrainedModel):
    """The decoder layers between token ids and hidden states."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        config.validate_architecture()  # fields may have changed since the configuration was made
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
    def forward(  # type: ignore[misc]  # TransformersKwargs has position_ids too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Map `input_ids` or `inputs_embeds` (not both) to hidden states (B, T, C).

        `position_ids` (B, T) that start again at 0 mark packed documents, which do not see each
        other as long as `attention_mask` is None.

        Raises ValueError for inputs that contradict each other, TypeError for an unknown keyword.
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
        filled = None if is_empty(past_key_values) else past_key_values

        counted = position_ids is None
        if position_ids is None:
            past_seen_tokens = 0 if filled is None else filled.get_seq_length()
            steps = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (steps + past_seen_tokens).unsqueeze(0)
        elif attention_mask is None and "cu_seq_lens_q" not in kwargs:
            self._check_packing(position_ids, filled)

        # The causal mask of each layer type, (B, 1, T, S): it hides the future, what is outside the
        # window, padding and other documents. It is None if the kernel's own causal mask will do
        # (`is_causal`). For a static cache `generate` has made the masks already.
        causal_masks: torch.Tensor | dict | None = attention_mask
        if not isinstance(causal_masks, dict):
            causal_masks = create_masks_for_generate(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                # Given position ids make transformers look for packed documents if there is no
                # cache: a GPU waits for that, and compiled they always make a mask of all pairs.
                position_ids=None if counted else position_ids,
                **{CACHE: filled if attention_mask is None else past_key_values},
            )
        if not isinstance(causal_masks, dict):  # 5.5 to 5.12, if all layers are of one type
            causal_masks = dict.fromkeys(self.config.layer_types, causal_masks)

        hidden_states, position_embeddings = inputs_embeds, None
        if self.embed_positions is not None:
            past = count_past(filled)
            length = None if past is None else past + inputs_embeds.shape[1]
            self._check_positions(position_ids, length, counted=counted)
            hidden_states = hidden_states + self.embed_positions(position_ids)
        elif self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        hidden_states = self.dropout(self.embed_norm(hidden_states))

        # Assisted decoding lowers num_hidden_layers to draft with the first layers only.
        depth = self.config.num_hidden_layers
        for layer, layer_type in zip(self.layers, self.config.layer_types[:depth], strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        named_cache: dict[str, Any] = {CACHE: past_key_values}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named_cache)

    def _check_packing(self, position_ids: torch.Tensor, cache: Cache | None):
        """Raise if packed documents would see each other."""
        rows, length = position_ids.shape
        # Flash attention keeps those of one sequence apart, or of any with `cu_seq_lens_q`.
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

    def _check_positions(
        self, position_ids: torch.Tensor, length: int | None, *, counted: bool = False
    ):
        """Raise before a learned table is read past its end, which on a GPU ends the process.

        `length` is that of the texts so far with their padding, None if it is not known. It is
        enough if positions were `counted` from it. A look at those that were given makes a GPU
        wait: it is taken only if the text is longer than the table. A compiler cannot look.
        """
        limit = self.config.max_position_embeddings
        if counted and length is not None:
            last = length - 1
        else:
            looks = position_ids.device.type == "cpu" or (length is not None and length > limit)
            if torch.compiler.is_compiling() or not looks or not position_ids.numel():
                return
            last = int(position_ids.max())
        if last >= limit:
            raise ValueError(
                f"Position {last} does not exist: this model has learned positions for "
                f"max_position_embeddings (block_size)={limit} tokens. Shorten the text, or choose "
                "position_embedding_type='rope'."
            )


def slice_logits_to_keep(
    hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor
) -> torch.Tensor:
    """Return the last `logits_to_keep` positions of (B, T, C) (0 keeps all), or those of an index.

    An index is of shape (N,), of (B, N) with a row for each sequence, or (B, T) and boolean.
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
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # as in Llama
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.model = NanoGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.is_lm_head = True  # for `_init_weights`
        self.post_init()

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` looks for its arguments
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        """Prepare a step as transformers does, and check its positions, as a compiler cannot."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        position_ids = inputs.get("position_ids")
        if self.model.embed_positions is not None and position_ids is not None:
            # Those of all positions so far, of which `inputs` has the last.
            length = max(input_ids.shape[1], kwargs["position_ids"].shape[-1])
            self.model._check_positions(position_ids, length)
        return inputs

    @can_return_tuple
    def forward(  # type: ignore[misc]  # TransformersKwargs has position_ids too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        linear_loss: Callable[..., torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Map tokens to logits (B, T, V) and, given `labels` (B, T), to the loss in nats per token.

        The loss compares the logits at t with the label at t + 1 and ignores labels of -100: pass
        the input ids as they are. `logits_to_keep` computes only the logits of some positions, see
        `slice_logits_to_keep`.

        A `linear_loss` computes the loss from the hidden states, the head and the labels. Then
        `logits` is None: those of a large vocabulary take more memory than the model.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=take_cache(past_key_values, kwargs),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        cap, logits, loss = self.config.final_logit_softcapping, None, None
        if linear_loss is not None:
            loss = linear_loss(hidden_states, self.lm_head, labels, softcap=cap, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
        if labels is not None and loss is None:
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


# Llama's heads are transformers' mixins and nothing else. Those build their model by `AutoModel`,
# which does not know a model loaded as remote code: each head here builds its own.


class NanoGPTForSequenceClassification(GenericForSequenceClassification, NanoGPTPreTrainedModel):
    """Classify a text by the state of its last token that is not padding."""

    def __init__(self, config: NanoGPTConfig):
        NanoGPTPreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # never None
        self.model = NanoGPTModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class NanoGPTForTokenClassification(GenericForTokenClassification, NanoGPTPreTrainedModel):
    """Classify each token by the text up to it."""

    def __init__(self, config: NanoGPTConfig):
        NanoGPTPreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # never None
        self.model = NanoGPTModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class NanoGPTForQuestionAnswering(GenericForQuestionAnswering, NanoGPTPreTrainedModel):
    """Mark where in the text an answer begins and ends."""

    def __init__(self, config: NanoGPTConfig):
        NanoGPTPreTrainedModel.__init__(self, config)
        self.model = NanoGPTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


# Which of transformers' Auto classes makes which model. `register_for_auto_class` lets
# `save_pretrained` copy this file into the folder, so that it loads without our package.
AUTO_CLASSES: dict[str, type[NanoGPTPreTrainedModel]] = {
    "AutoModel": NanoGPTModel,
    "AutoModelForCausalLM": NanoGPTForCausalLM,
    "AutoModelForSequenceClassification": NanoGPTForSequenceClassification,
    "AutoModelForTokenClassification": NanoGPTForTokenClassification,
    "AutoModelForQuestionAnswering": NanoGPTForQuestionAnswering,
}
for auto_class, model_class in AUTO_CLASSES.items():
    model_class.register_for_auto_class(auto_class)
