"""The tests' oracle: an independent NumPy rendering of the operator, token by token."""

import ml_dtypes
import numpy as np

F16, BF16, F32 = np.dtype("float16"), np.dtype(ml_dtypes.bfloat16), np.dtype("float32")


def rows_of_tokens(indices, x_shape, cache_shape, cache_mode):
    """(c1, c2) of each token in row-major order, or None for a token that is skipped."""
    B, S = x_shape[0], x_shape[1] if len(x_shape) == 3 else 1
    C1, C2 = cache_shape[:2]
    flat = [int(i) for i in np.asarray(indices).reshape(-1)]
    rows = []
    for b in range(B):
        for s in range(S):
            if cache_mode == "page":
                slot = flat[b * S + s]
                rows.append(divmod(slot, C2) if 0 <= slot < C1 * C2 else None)
            else:
                start = flat[b]
                rows.append((b, start + s) if start >= 0 and start + s < C2 else None)
    return rows


def quantize(value, scale, offset):
    z = value.astype(F32) / scale
    if offset is not None:
        z = z + offset
    codes = np.clip(np.rint(z), -128, 127)
    return np.where(np.isnan(z), 0, codes).astype(np.int8)


def rotate(heads, cos, sin):
    """heads [N, D] in the compute dtype; NumPy rounds each float16 operation to float16."""
    half = heads.shape[-1] // 2
    first, second = heads[:, :half], heads[:, half:]
    return np.concatenate(
        [
            second * -sin[:half] + first * cos[:half],
            first * sin[half:] + second * cos[half:],
        ],
        axis=1,
    )


def dequant_rope_quant_kvcache(
    x, cos, sin, k_cache, v_cache, indices, scale_k, scale_v, *,
    offset_k=None, offset_v=None, weight_scale=None, activation_scale=None, bias=None,
    kv_output=False, cache_mode="contiguous",
):  # fmt: skip
    Nkv, D = k_cache.shape[-2:]
    dtype = cos.dtype
    compute = F16 if dtype == F16 else F32
    tokens = x.reshape(-1, x.shape[-1])
    cos, sin = (t.reshape(-1, D).astype(compute) for t in (cos, sin))
    scale_k, scale_v, offset_k, offset_v = (
        None if p is None else p.reshape(Nkv, D) for p in (scale_k, scale_v, offset_k, offset_v)
    )
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    qs, ks, vs = [], [], []
    rows = rows_of_tokens(indices, x.shape, k_cache.shape, cache_mode)
    with np.errstate(all="ignore"):
        for t, token in enumerate(tokens):
            y = token
            if x.dtype == np.int32:
                if bias is not None and bias.dtype == np.int32:
                    y = y + bias
                y = y.astype(F32) * weight_scale.reshape(-1)
                if activation_scale is not None:
                    y = y * activation_scale.reshape(-1)[t]
                if bias is not None and bias.dtype != np.int32:
                    y = y + bias.astype(F32)
            heads = y.reshape(-1, D)
            rotated = rotate(heads[:-Nkv].astype(compute), cos[t], sin[t])
            q, k, v = rotated[:-Nkv], rotated[-Nkv:], heads[-Nkv:]
            if rows[t] is not None:
                k_cache[rows[t]] = quantize(k, scale_k, offset_k)
                v_cache[rows[t]] = quantize(v, scale_v, offset_v)
            qs.append(q.astype(dtype))
            ks.append(k.astype(dtype))
            vs.append(v.astype(dtype))
    q, k, v = (np.stack(a).reshape(*x.shape[:-1], -1, D) for a in (qs, ks, vs))
    return q, (k if kv_output else None), (v if kv_output else None), k_cache, v_cache
