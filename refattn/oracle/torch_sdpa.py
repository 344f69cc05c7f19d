"""torch.nn.functional.scaled_dot_product_attention as a backend, on the CPU."""

from __future__ import annotations

from typing import Any

from refattn.oracle.frameworks import framework


def sdpa(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: Any = False,
    window: Any = None,
    scale: float | None = None,
    bias: Any = None,
    mask: Any = None,
    segment_ids: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    q_positions: Any = None,
    k_positions: Any = None,
    alibi_slopes: Any = None,
) -> Any:
    """Out (B,Hq,Lq,Dv). torch's is_causal where it means the same, a boolean or float32 attn_mask for all the rest.

    torch has no softcap, sink or given dropout mask, and does not return lse.
    """
    torch = framework("torch")
    batch, heads, lq, _ = q.shape
    lk = k.shape[2]
    same_place = causal == "top_left" or lq == lk
    restricted = (window, mask, segment_ids, q_lengths, kv_lengths, q_positions, k_positions)
    plain = all(option is None for option in (*restricted, bias, alibi_slopes))
    native = bool(causal) and same_place and plain
    attn_mask = None
    if not (plain and (native or not causal)):
        # Query i stands at i + Lk − Lq, lengths taken per sequence; at i if top-left; or where it is told.
        shift = (lk if kv_lengths is None else kv_lengths) - (lq if q_lengths is None else q_lengths)
        offset = torch.as_tensor(0 if causal == "top_left" else shift).reshape(-1, 1)
        i = _as_rows(torch.arange(lq) + offset if q_positions is None else q_positions, lq)[:, None, :, None]
        j = _as_rows(torch.arange(lk) if k_positions is None else k_positions, lk)[:, None, None, :]
        live = _live(torch, j - i, causal, window, mask)
        if segment_ids is not None:
            q_segment, k_segment = (torch.atleast_2d(s) for s in segment_ids)
            live = live & (q_segment[:, None, :, None] == k_segment[:, None, None, :])
        if q_lengths is not None:
            live = live & (torch.arange(lq) < q_lengths[:, None])[:, None, :, None]
        if kv_lengths is not None:
            live = live & (torch.arange(lk) < kv_lengths[:, None])[:, None, None, :]
        attn_mask = _mask(torch, live, j - i, bias, alibi_slopes).expand(batch, -1, lq, lk)
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = heads != k.shape[1]
    return attend(q, k, v, attn_mask=attn_mask, is_causal=native, scale=scale, enable_gqa=grouped)


def _as_rows(positions: Any, length: int) -> Any:
    return positions.reshape(-1, length)


def _live(torch: Any, ahead: Any, causal: Any, window: Any, mask: Any) -> Any:
    live = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        live = live & (ahead <= 0)
    left, right = window or (None, None)
    if left is not None:
        live = live & (ahead >= -left)
    if right is not None:
        live = live & (ahead <= right)
    return live if mask is None else live & mask


def _mask(torch: Any, live: Any, ahead: Any, bias: Any, slopes: Any) -> Any:
    """A boolean mask where nothing is added to the logits, else the float32 sum of the biases, −∞ where masked."""
    wide = [b if b.dtype == torch.float64 else b.float() for b in (bias,) if b is not None]
    if slopes is not None:
        wide.append(-slopes[:, None, None] * ahead.abs())
    if not wide:
        return live
    total = sum(wide[1:], wide[0])
    shape = torch.broadcast_shapes(total.shape, live.shape)
    return torch.where(live.expand(shape), total.expand(shape), -torch.inf)
