"""Softmax attention and its gradients written a second time: Python floats, four loops, math.fsum, nothing of refattn.

Arrays are nested lists. `sees(b, h, i, j)` says whether query i of head h may attend to key j, and `bias(b, h, i, j)`
what is added to its logit; both are written in the tests, from the conventions and not from the library.
"""

import math


def shape(x):
    return (len(x), *shape(x[0])) if isinstance(x, list) and x else (0,) if isinstance(x, list) else ()


def zeros(*sizes):
    return [zeros(*sizes[1:]) for _ in range(sizes[0])] if sizes else 0.0


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def attention(q, k, v, dout, dlse=None, *, scale, sees, bias=lambda *_: 0.0, softcap=None, sink=None, keep=None):
    """out, lse and the gradients dq, dk, dv, dsink; dbias[b][h][i][j] is the gradient of each biased logit."""
    batch, heads, lq, width = shape(q)
    groups, lk, dv_width = len(k[0]), len(k[0][0]), len(v[0][0][0])
    found = {
        "out": zeros(batch, heads, lq, dv_width),
        "lse": zeros(batch, heads, lq),
        "dq": zeros(batch, heads, lq, width),
        "dk": zeros(batch, groups, lk, width),
        "dv": zeros(batch, groups, lk, dv_width),
        "dbias": zeros(batch, heads, lq, lk),
        "dsink": zeros(heads),
    }
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for i in range(lq):
                raw = {j: scale * dot(q[b][h][i], k[b][g][j]) for j in range(lk) if sees(b, h, i, j)}
                capped = raw if softcap is None else {j: softcap * math.tanh(s / softcap) for j, s in raw.items()}
                logits = {j: s + bias(b, h, i, j) for j, s in capped.items()}
                terms = list(logits.values()) + ([] if sink is None else [sink[h]])
                if not terms:
                    found["lse"][b][h][i] = -math.inf
                    continue
                top = max(terms)
                lse = top + math.log(math.fsum(math.exp(s - top) for s in terms))
                p = {j: math.exp(s - lse) for j, s in logits.items()}
                kept = {j: 1.0 if keep is None else keep(b, h, i, j) for j in p}
                found["lse"][b][h][i] = lse
                found["out"][b][h][i] = [math.fsum(p[j] * kept[j] * v[b][g][j][d] for j in p) for d in range(dv_width)]

                dp = {j: kept[j] * dot(dout[b][h][i], v[b][g][j]) for j in p}
                mean = math.fsum(p[j] * dp[j] for j in p)
                dlse_i = 0.0 if dlse is None else dlse[b][h][i]
                if sink is not None:
                    found["dsink"][h] += math.exp(sink[h] - lse) * (dlse_i - mean)
                for j, weight in p.items():
                    ds = weight * (dp[j] - mean + dlse_i)
                    found["dbias"][b][h][i][j] = ds
                    if softcap is not None:
                        ds *= 1 - math.tanh(raw[j] / softcap) ** 2
                    for d in range(width):
                        found["dq"][b][h][i][d] += scale * ds * k[b][g][j][d]
                        found["dk"][b][g][j][d] += scale * ds * q[b][h][i][d]
                    for d in range(dv_width):
                        found["dv"][b][g][j][d] += weight * kept[j] * dout[b][h][i][d]
    return found
