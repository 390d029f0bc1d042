"""attn_implementation="flash_navit": this package's attention in the vision towers of Hugging Face's transformers.

    register()
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation={"vision_config": "flash_navit"})

Towers that pack their images themselves (Qwen2.5-VL with its windows, Qwen3-VL, Pixtral, and others that pass
`cu_seq_lens_q` when "flash" is in the implementation's name) run as they are. Siglip2's NaFlex encoder pads: it is
unpadded once before its first layer and padded again, with zeros, after its last. Valid tokens come out as eager's do.
What cannot be honoured (causal attention, dropout, a mask that is more than padding, attention weights, an argument
that is not known here) raises NotImplementedError with its name; nothing is dropped silently.

B rows of a batch, N tokens of a row, T tokens in all, H heads, D head width, E model width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from navit_kernels import PackPlan, plan_pack, varlen_attention

from . import require
from .padding import unpad

NAME = "flash_navit"
MINIMUM = "5.17"
HARMLESS = {  # arguments that change no number that attention returns
    "max_length_q", "max_length_k", "use_cache", "return_dict", "output_hidden_states", "num_items_in_batch",
}  # fmt: skip

_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # a tower's cu_seqlens -> (its version, its plan)


def register() -> None:
    """Make attn_implementation="flash_navit" known to transformers; again is harmless.

    Besides the two registrations this replaces two functions of transformers: the preloading of a flash-attn package,
    which it wants for every implementation with "flash" in its name, is left out for this name; and Siglip2's encoder
    packs where this implementation is chosen. All other implementations run as before.
    Raises ImportError for a transformers that is missing, too old, or so new that those functions are gone.
    """
    package = require("transformers", MINIMUM, "transformers")
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils
        from transformers.models.siglip2.modeling_siglip2 import Siglip2Encoder

        registered = NAME in AttentionInterface._global_mapping
        preload, encoder = modeling_utils.lazy_import_flash_attention, cast(Any, Siglip2Encoder)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"transformers {package.__version__} is newer than this integration knows ({error}); install one that it "
            "knows with: pip install 'navit-kernels[transformers]'"
        ) from error
    if not registered:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, padding_mask)
        modeling_utils.lazy_import_flash_attention = _no_preload(preload)
        encoder.forward = _unpadded_once(encoder.forward)


def attention(
    module: nn.Module,
    query_BHND: Tensor,
    key_BHND: Tensor,
    value_BHND: Tensor,
    attention_mask: Tensor | PackPlan | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer's attention.

    attention_mask: None, a padding mask of the keys, (B, N) or (B, 1, 1, N), nonzero where they are valid, or the plan
        of an encoder that was unpadded. cu_seq_lens_q, cu_seq_lens_k: boundaries of the images in the B · N tokens.
    position_ids: read where a tower packs several images into one row and gives nothing else (older Pixtral).

    Returns (B, N, H, D) and no weights. Raises NotImplementedError, naming it, for what cannot be honoured.
    """
    if is_causal if is_causal is not None else getattr(module, "is_causal", True):
        _refuse("causal attention", module)
    if dropout:
        _refuse(f"dropout={dropout}", module)
    if cu_seq_lens_k is not cu_seq_lens_q:
        _refuse("cu_seq_lens_k other than cu_seq_lens_q", module)
    if getattr(getattr(module, "config", None), "output_attentions", False):
        _refuse("output_attentions=True", module)
    for name, value in others.items():
        if name not in HARMLESS and value is not None and value is not False:
            _refuse(f"{name}={value}" if isinstance(value, (bool, int, float, str)) else name, module)
    batch, _, tokens, _ = query_BHND.shape
    q_THD, k_THD, v_THD = (part.transpose(1, 2).flatten(0, 1) for part in (query_BHND, key_BHND, value_BHND))
    plan: PackPlan | None
    if isinstance(attention_mask, PackPlan):
        plan = attention_mask
    elif cu_seq_lens_q is not None:
        if attention_mask is not None:
            _refuse("an attention_mask beside cu_seq_lens_q", module)
        plan = _plan(cu_seq_lens_q, len(q_THD))
    elif attention_mask is not None:
        valid_BN = _valid_keys(attention_mask, key_BHND.shape[0], key_BHND.shape[2], module)
        slots_T = valid_BN.flatten().nonzero().flatten()
        k_THD, v_THD = k_THD.index_select(0, slots_T), v_THD.index_select(0, slots_T)
        plan = plan_pack([tokens] * batch, q_THD.device, valid_BN.sum(1).tolist())
    elif position_ids is not None and type(module).__name__ == "PixtralAttention":
        plan = _plan_of_positions(position_ids, len(q_THD))
    elif position_ids is not None:
        _refuse("position_ids without cu_seq_lens_q", module)
    else:
        plan = _plan_of_rows(batch, tokens, key_BHND.shape[2], q_THD.device)
    if plan is None:
        assert cu_seq_lens_q is not None
        cu_seqlens, cu_seqlens_k = cu_seq_lens_q.int(), None
    else:
        cu_seqlens, cu_seqlens_k = plan.cu_seqlens, plan.cu_seqlens_k
    out = varlen_attention(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, softmax_scale=scaling, plan=plan)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, tokens)), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """What transformers calls to make a mask: (B, 1, 1, N) bool, true at valid keys, or None.

    One row for all queries says that it is no more than padding; as four axes it also serves Siglip2's pooling head.
    Raises NotImplementedError for a mask of any other kind, naming its function.
    """
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function is not bidirectional_mask_function:
        name = getattr(mask_function, "__qualname__", str(mask_function))
        raise NotImplementedError(
            f"{NAME} knows padding masks only, got {name}: it is for vision towers. Leave a text tower its own "
            f'attention: attn_implementation={{"vision_config": "{NAME}"}}'
        )
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (batch_size, kv_length):
        raise NotImplementedError(
            f"{NAME} takes an attention_mask (B, N) = ({batch_size}, {kv_length}), got {tuple(attention_mask.shape)}"
        )
    return attention_mask[:, None, None, :]


def _refuse(what: str, module: nn.Module) -> NoReturn:
    raise NotImplementedError(
        f"{NAME} does not support {what}, which {type(module).__name__} asks for. It is for vision towers: choose it "
        f'with attn_implementation={{"vision_config": "{NAME}"}}, and another implementation where this is needed'
    )


def _plan(cu_seqlens: Tensor, tokens: int) -> PackPlan | None:
    """The plan of a tower's segments. Waits for the device once per cu_seqlens, which all layers share.

    None where the host cannot read it, and for inference tensors, which would not tell that they were changed.
    """
    capturing = cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing or cu_seqlens.is_inference():
        return None
    version, plan = _plans.get(cu_seqlens, (None, None))
    if version != cu_seqlens._version:
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != tokens:
            raise ValueError(f"cu_seq_lens_q must go from 0 to the {tokens} tokens, got {starts[0]} to {starts[-1]}")
        plan = _plan_of([last - first for first, last in itertools.pairwise(starts)], cu_seqlens.device)
        _plans[cu_seqlens] = (cu_seqlens._version, plan)
    return plan


def _plan_of_positions(position_ids: Tensor, tokens: int) -> PackPlan:
    """An image begins where all coordinates of a patch are 0."""
    places_TN = position_ids.reshape(tokens, -1)
    starts = (places_TN == 0).all(1).nonzero().flatten().tolist()
    return _plan_of([last - first for first, last in itertools.pairwise([*starts, tokens])], position_ids.device)


def _plan_of(lengths: list[int], device: torch.device, lengths_k: list[int] | None = None) -> PackPlan:
    with torch.inference_mode(False):  # a plan that is kept may serve a backward later
        return plan_pack(lengths, device, lengths_k)


@functools.lru_cache(maxsize=16)
def _plan_of_rows(batch: int, tokens: int, tokens_k: int, device: torch.device) -> PackPlan:
    return _plan_of([tokens] * batch, device, None if tokens_k == tokens else [tokens_k] * batch)


def _valid_keys(mask: Tensor, batch: int, tokens: int, module: nn.Module) -> Tensor:
    """(B, N) bool."""
    if tuple(mask.shape) not in ((batch, tokens), (batch, 1, 1, tokens)) or mask.is_floating_point():
        _refuse(f"an attention_mask {tuple(mask.shape)} of {mask.dtype}, which is no padding mask of the keys,", module)
    return mask.reshape(batch, tokens).bool()


def _no_preload(preload: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(preload)
    def wrapper(implementation: str | None, *arguments: Any, **options: Any) -> Any:
        return None if implementation == NAME else preload(implementation, *arguments, **options)

    return wrapper


def _unpadded_once(padded: Callable[..., Any]) -> Callable[..., Any]:
    """Siglip2Encoder.forward, whose layers see the valid tokens only, as one row, where `flash_navit` is chosen.

    Hidden states, if asked for, have the padded shape: for them, and in text towers, it stays padded.
    """

    @functools.wraps(padded)
    def forward(self: Any, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        config = self.config
        if config._attn_implementation != NAME:
            return padded(self, inputs_embeds, attention_mask, **options)
        if options.get("output_attentions"):
            _refuse("output_attentions=True", self)
        states = options.get("output_hidden_states") or getattr(config, "output_hidden_states", False)
        if attention_mask is None or states or config.model_type != "siglip2_vision_model":
            return padded(self, inputs_embeds, attention_mask, **options)
        valid_BN = _valid_keys(attention_mask, inputs_embeds.shape[0], inputs_embeds.shape[1], self)
        kept = unpad(valid_BN, inputs_embeds.device)
        x_TE = inputs_embeds.flatten(0, 1).index_select(0, kept.slots_T)
        outputs = padded(self, x_TE[None], kept.plan, **options)
        outputs.last_hidden_state = kept.pad(outputs.last_hidden_state[0])
        return outputs

    return forward
