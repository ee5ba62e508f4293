"""Replace cross-attention on a single context token by the linear layer that it is equal to."""

from __future__ import annotations

from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from mobilevd_deploy.config.recipe import PassName
from mobilevd_deploy.errors import RewriteError
from mobilevd_deploy.model.funnels import linear_from
from mobilevd_deploy.model.unet import MobileVDUNet


class SingleTokenCrossAttention(nn.Module):
    """W_out W_v c + b_out for one context token c; the caller broadcasts the result over pixels or frames."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
        """Map the context (B, 1, D) to (B, 1, C); the hidden states are not used."""
        if encoder_hidden_states.shape[1] != 1:
            raise ValueError(f"the context has {encoder_hidden_states.shape[1]} tokens; this form takes one")
        return self.proj(encoder_hidden_states)


class StripCrossAttention:
    """Remove the score map of spatial and temporal cross-attention.

        before  x + W_out softmax(q(norm2(x)) k(c)^T) W_v c
        after   x + (W_out W_v) c

    Softmax over a single key is 1, so query, key and norm2 (which only the query reads) do not affect the
    output. `denoise` passes one embedding per clip, so there is always one token.
    Source: MobileVD, optimised cross-attention; merging W_out W_v is exact up to rounding.
    """

    name: PassName = "single-token-cross-attention"

    def requires(self, unet: MobileVDUNet) -> None:
        """Refuse cross-attention with a normalised context, a residual or a value bias."""
        for path, attention in _cross_attentions(unet).items():
            if attention.norm_cross or attention.residual_connection or attention.to_v.bias is not None:
                raise RewriteError(
                    f"{path}: a cross-attention with normalised context, residual or value bias is not SVD's",
                    next_step="export a network that MobileVDUNet built",
                )

    def apply(self, unet: MobileVDUNet) -> tuple[str, ...]:
        """Replace attn2 by one linear layer, and norm2 by the identity."""
        attentions = _cross_attentions(unet)
        for path, attention in attentions.items():
            out = attention.to_out[0]
            merged = linear_from(out.weight @ attention.to_v.weight, out.bias)
            unet.set_submodule(path, SingleTokenCrossAttention(merged))
            unet.set_submodule(path.removesuffix("attn2") + "norm2", nn.Identity())
        return tuple(attentions)


def _cross_attentions(unet: MobileVDUNet) -> dict[str, Attention]:
    return {
        f"{path}.attn2": block.attn2
        for path, block in unet.named_modules()
        if isinstance(block, (BasicTransformerBlock, TemporalBasicTransformerBlock))
        and isinstance(block.attn2, Attention)
    }
