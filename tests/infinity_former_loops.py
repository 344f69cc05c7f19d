"""The ∞-former in plain loops over lists, from its paper and its authors' code."""

import math

import numpy as np


def solved(a, b):
    """Gauss and Jordan on lists."""
    rows = [list(r) + list(c) for r, c in zip(a, b, strict=True)]
    for k in range(len(rows)):
        rows[k] = [v / rows[k][k] for v in rows[k]]
        for i in range(len(rows)):
            if i != k:
                factor = rows[i][k]
                rows[i] = [v - factor * w for v, w in zip(rows[i], rows[k], strict=True)]
    return [r[len(rows) :] for r in rows]


def normal(t, mean, deviation):
    return math.exp(-(((t - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))


def cdf(t):
    return math.erfc(-t / math.sqrt(2)) / 2


def basis_of(spec):
    n = spec.basis // len(spec.sigmas)
    return [(j / max(n - 1, 1), s) for j in range(n) for s in spec.sigmas]


def regression(spec, basis, points, signal, padding):
    """Coefficients of the least sum of squares plus penalty; the signal is 0 at the padding."""
    psi = [[normal(t, m, s) for m, s in basis] for t in (*points, *padding)]
    signal = signal + [[0.0] * len(signal[0])] * len(padding)
    gram = [
        [math.fsum(p[i] * p[j] for p in psi) + spec.ridge * (i == j) for j in range(len(basis))]
        for i in range(len(basis))
    ]
    right = [
        [math.fsum(p[i] * x[e] for p, x in zip(psi, signal, strict=True)) for e in range(len(signal[0]))]
        for i in range(len(basis))
    ]
    return solved(gram, right)


def fitted(spec, basis, tokens, past, drawn):
    n, m = spec.segment, spec.samples
    centred = spec.positions == "centre_padded"
    if past is None:
        points = [(i + 0.5) / n if centred else (i + 1) / n for i in range(n)]
        padding = [(i + 0.5) / n for i in range(-(n // 2), n + n // 2) if not 0 <= i < n] if centred else []
        return regression(spec, basis, points, tokens, padding)
    at = [i / spec.bins for i in sorted(drawn)] if drawn is not None else [(i + 1) / m for i in range(m)]
    read = [
        [math.fsum(normal(t, *f) * b[e] for f, b in zip(basis, past, strict=True)) for e in range(len(tokens[0]))]
        for t in at
    ]
    tau, shift = spec.contraction, 1 / (2 * n + m)
    points = [tau * (i + 1) / m for i in range(m)] + [tau + (1 - tau) * (i + 1) / n for i in range(n)]
    grid = np.linspace(-0.5 + shift, 1.5 - shift, 2 * (n + m)).tolist() if centred else []
    return regression(spec, basis, points, read + tokens, [t for t in grid if t < 0 or t > 1])


def mean_of(spec, mu, variance, centre, width):
    """∫ p ψ; the parabola by the integrals of ψ, tψ and t²ψ, as θ·φ − A."""
    if spec.density == "softmax":
        return normal(mu, centre, math.sqrt(variance + width**2))
    sigma = math.sqrt(variance)
    level = -0.5 * (3 / (2 * sigma)) ** (2 / 3)
    a = math.sqrt(-2 * level) * sigma
    low, high = mu - a, mu + a
    one = cdf((high - centre) / width) - cdf((low - centre) / width)
    at_low, at_high = normal(low, centre, width), normal(high, centre, width)
    t = centre * one - width**2 * (at_high - at_low)
    tt = (centre**2 + width**2) * one - width**2 * ((high + centre) * at_high - (low + centre) * at_low)
    return mu / variance * t - tt / (2 * variance) - (level + mu**2 / (2 * variance)) * one


def weighed(x, tokens):
    """The mask net on lists."""
    w, b, n = x["mask_w"].tolist(), x["mask_b"].tolist(), len(tokens)
    found = []
    for i in range(n):
        row = []
        for o in range(len(b)):
            level = b[o] + sum(
                w[o][e][k] * tokens[i + k - 1][e] for k in range(3) if 0 <= i + k - 1 < n for e in range(len(b))
            )
            row.append(tokens[i][o] / (1 + math.exp(-level)))
        found.append(row)
    return found


def parameters_of(spec, x, basis, a):
    if spec.parameters == "moments":
        p = [math.exp(v - max(a)) for v in a]
        p = [v / sum(p) for v in p]
        mu = sum(v * m for v, (m, _) in zip(p, basis, strict=True))
        return mu, sum(v * (m * m + s * s) for v, (m, s) in zip(p, basis, strict=True)) - mu * mu
    level, spread = (math.fsum(w * v for w, v in zip(x[n].tolist(), a, strict=True)) for n in ("w_mu", "w_sigma"))
    if spec.bias:
        level, spread = level + float(x["b_mu"][0]), spread + float(x["b_sigma"][0])
    return 1 / (1 + math.exp(-level)), math.log1p(math.exp(spread))


def loops(spec, x):
    """Token by token, on lists."""
    (batch, heads, length, width), groups, dv = x["q"].shape, x["wk"].shape[0], x["wv"].shape[2]
    basis, scale = basis_of(spec), width**-0.5 if spec.scale is None else spec.scale
    edges = [i / spec.bins for i in range(spec.bins + 1)]
    edges[0], edges[-1] = -1e-6, 1 + 1e-6
    found = {"out": np.zeros((batch, heads, length, dv)), "kl": np.zeros((batch, heads, length))}
    found["histogram"], memories = np.zeros((batch, length, spec.bins)), []
    for b in range(batch):
        memory, mass = None, [0.0] * spec.bins
        for i in range(length):
            if i and i % spec.segment == 0:
                tokens = x["x"][b, i - spec.segment : i].tolist()
                tokens = weighed(x, tokens) if spec.mask else tokens
                past = memory if spec.contraction is not None else None
                memory = fitted(spec, basis, tokens, past, x["drawn"][b, i].tolist() if spec.sticky else None)
                mass = [0.0] * spec.bins
            if memory is None:
                continue
            for h in range(heads):
                g = h // (heads // groups)
                keys, values = (np.array(memory) @ x[name][g] for name in ("wk", "wv"))
                mu, variance = parameters_of(spec, x, basis, (scale * keys @ x["q"][b, h, i]).tolist())
                variance = max(variance, spec.least_variance)
                r = [mean_of(spec, mu, variance, *f) for f in basis]
                found["out"][b, h, i] = np.array(r) @ values
                ratio = variance / spec.prior_deviation**2
                away = 0 if spec.prior_mean is None else ((mu - spec.prior_mean) / spec.prior_deviation) ** 2
                found["kl"][b, h, i] = (ratio - math.log(ratio) - 1 + away) / 2
                ends = [cdf((e - mu) / math.sqrt(variance)) for e in edges]
                mass = [m + high - low for m, low, high in zip(mass, ends, ends[1:], strict=False)]
            found["histogram"][b, i] = np.array(mass) / sum(mass)
        memories.append(memory)
    return found | {"memory": np.array(memories)}


