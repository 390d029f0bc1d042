"""flash_navit, the function: what it refuses by name, where it sees images begin, and how it is registered."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from navit.integrations import require
from navit.integrations import transformers as integration
from navit_kernels import plan_pack
from navit_kernels.testing import relative_errors

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[transformers]'")
from transformers.models.siglip2 import Siglip2VisionConfig  # noqa: E402

NAME = integration.NAME


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    integration.register()


# What cannot be honoured


class Attention(nn.Module):
    is_causal = False


def call(module: nn.Module | None = None, batch: int = 1, **options: Any) -> Tensor:
    """The registered function on q, k, v (batch, 2, 6, 8)."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, batch, 2, 6, 8, generator=generator)
    function = transformers.AttentionInterface()[NAME]
    return function(module or Attention(), query, key, value, **{"attention_mask": None, "scaling": 0.3, **options})[0]


BOUNDARIES = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"is_causal": True}, "causal"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"sliding_window": 4}, "sliding_window=4"),
        ({"softcap": 30.0}, r"softcap=30\.0"),
        ({"s_aux": torch.ones(2)}, "s_aux"),
        ({"position_bias": torch.ones(6, 6)}, "position_bias"),
        ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, r"attention_mask \(1, 1, 6, 6\)"),
        ({"attention_mask": torch.zeros(1, 1, 1, 6)}, "attention_mask .* of torch.float32"),
        ({"attention_mask": torch.ones(1, 5, dtype=torch.bool)}, r"attention_mask \(1, 5\)"),
        ({"attention_mask": torch.ones(1, 6), "cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": BOUNDARIES}, "beside"),
        ({"cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": BOUNDARIES.clone()}, "cu_seq_lens_k"),
        ({"cu_seq_lens_k": BOUNDARIES}, "cu_seq_lens_k"),
        ({"position_ids": torch.zeros(1, 6)}, "position_ids"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        call(**options)


def test_a_module_that_says_nothing_counts_as_causal() -> None:
    with pytest.raises(NotImplementedError, match="causal"):
        call(nn.Identity())


def test_boundaries_of_other_tokens_are_refused() -> None:
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="6 tokens, got 0 to 5"):
        call(cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.parametrize("overlay", ["and_mask_function", "or_mask_function"])
def test_a_mask_with_more_than_padding_is_refused(overlay: str) -> None:
    from transformers.masking_utils import create_bidirectional_mask

    config = Siglip2VisionConfig()
    config._attn_implementation = NAME
    with pytest.raises(NotImplementedError, match="padding masks only"):
        create_bidirectional_mask(
            config=config, inputs_embeds=torch.zeros(2, 6, 8), attention_mask=torch.ones(2, 6),
            **{overlay: lambda batch, head, query, key: key < 3},
        )  # fmt: skip


def test_arguments_without_influence_are_let_through() -> None:
    harmless = {"use_cache": True, "max_length_q": 6, "sliding_window": None, "output_attentions": False}
    assert torch.equal(call(**harmless), call())


# Where images begin


def test_a_padding_mask_hides_keys_whatever_its_form() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
    found = call(batch=2, attention_mask=mask)
    assert torch.equal(call(batch=2, attention_mask=mask[:, None, None].bool()), found)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 6, 8, generator=generator)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None].bool(), scale=0.3)
    assert max(relative_errors(found, expected.transpose(1, 2))) < 1e-5


def test_pixtral_without_boundaries_is_cut_where_positions_begin_again() -> None:
    """transformers before 5.23 gives Pixtral's layers nothing but positions."""
    expected = call(cu_seq_lens_q=BOUNDARIES, cu_seq_lens_k=BOUNDARIES)
    module = type("PixtralAttention", (Attention,), {})()
    pairs = torch.tensor([(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 1)])
    assert torch.equal(call(module, position_ids=pairs), expected)
    assert torch.equal(call(module, position_ids=torch.tensor([[0, 1, 0, 1, 4, 5]])), expected)


def test_a_plan_is_made_once_for_all_layers_and_again_when_boundaries_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(integration, "plan_pack", lambda *given: made.append(given) or plan_pack(*given))
    ends = BOUNDARIES.clone()
    first = call(cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    assert torch.equal(call(cu_seq_lens_q=ends, cu_seq_lens_k=ends), first)
    assert len(made) == 1
    ends.copy_(torch.tensor([0, 4, 6]))
    other = call(cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    assert len(made) == 2
    assert not torch.equal(other, first)


def test_a_plan_made_in_inference_mode_serves_training() -> None:
    ends = BOUNDARIES.clone()
    with torch.inference_mode():
        call(cu_seq_lens_q=ends, cu_seq_lens_k=ends)
        call()
    assert not call(cu_seq_lens_q=ends, cu_seq_lens_k=ends).is_inference()
    assert not integration._plan(ends, 6).items.is_inference()


# The package


def test_other_implementations_are_preloaded_as_before() -> None:
    integration.register()
    with pytest.raises((ImportError, ValueError)):
        transformers.modeling_utils.lazy_import_flash_attention("flash_attention_of_nobody")


def test_a_missing_or_old_package_is_an_error_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"no_such_package >= 1.*pip install 'navit-kernels\[extra\]'"):
        require("no_such_package", "1", "extra")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.6")
    with pytest.raises(ImportError, match=r"transformers >= 5\.\d+, found 4\.57\.6.*\[transformers\]"):
        integration.register()


def test_a_package_that_has_moved_on_is_an_error_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.modeling_utils, "lazy_import_flash_attention")
    with pytest.raises(ImportError, match=r"newer than .*lazy_import_flash_attention.*\[transformers\]"):
        integration.register()
