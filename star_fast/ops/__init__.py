"""The operations, each with a plain-torch reference and fused backends behind one contract (see dispatch.py)."""

from star_fast.ops.add_rms_norm import add_rms_norm
from star_fast.ops.all_slots_contrast import all_slots_contrast
from star_fast.ops.decode_attention import decode_attention
from star_fast.ops.dispatch import use_backend
from star_fast.ops.ema_update import ema_update
from star_fast.ops.feature_distance import feature_distance
from star_fast.ops.group_norm_silu import group_norm_silu
from star_fast.ops.int8_linear import Int8Weight, int8_linear
from star_fast.ops.kv_cache import KVCache
from star_fast.ops.linear_cross_entropy import linear_cross_entropy
from star_fast.ops.masked_attention import masked_attention, masked_attention_qkv
from star_fast.ops.sample_tokens import sample_tokens
from star_fast.ops.slot_contrast import slot_contrast
from star_fast.ops.swiglu import swiglu

__all__ = [
    "Int8Weight",
    "KVCache",
    "add_rms_norm",
    "all_slots_contrast",
    "decode_attention",
    "ema_update",
    "feature_distance",
    "group_norm_silu",
    "int8_linear",
    "linear_cross_entropy",
    "masked_attention",
    "masked_attention_qkv",
    "sample_tokens",
    "slot_contrast",
    "swiglu",
    "use_backend",
]
