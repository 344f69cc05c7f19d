"""What each flag of a golden case means: what the case exercises, and the public bugs it would have caught.

A family says how the inputs are made; every other flag names an option or a size. Bugs are `repository#number`, as
reported there by users or maintainers. A variant's module has the flags that its own cases alone use.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from refattn import registry
from refattn.case import Flag


def _family(exercises: str, *bugs: str) -> Flag:
    return Flag(exercises, bugs, family=True)


def _flag(exercises: str, *bugs: str) -> Flag:
    return Flag(exercises, bugs)


_FAMILIES: Mapping[str, Flag] = {
    "normal": _family(
        "Nearly normal inputs and no option at all: the plain formula, lse to base e.",
        "flashinfer#4485", "pytorch#181645", "FlashMLA#106",
    ),
    "large_scores": _family("Scores of 100 to 8000: exponentials overflow unless their row's maximum is subtracted."),
    "exact32": _family(
        "Small integers: q·k is exact in a float32 accumulator in any order, so what differs is softmax or P·V."
    ),
    "near_ties": _family("Scores that differ by 2^-8 to 2^-50, made by one coordinate of the key."),
    "equal_keys": _family("All keys equal: equal weights, the mean of the visible values, dq exactly 0."),
    "repeated_keys": _family("Keys that repeat with a short period: a running maximum that soon stops moving."),
    "dominant_key": _family("One score far above the others, whose weights vanish or nearly."),
    "cancelling_values": _family("Values in pairs +v, −v: the output is far smaller than its terms."),
    "constant_values": _family("All values equal: the output must be that value; lost mass shows."),
    "one_hot_values": _family("The identity for values: the output is the matrix of weights."),
    "subnormal": _family("Numbers at the lower end of the storage type, subnormal in float16."),
    "max_finite": _family("Numbers at the upper end of the storage type, or products beyond it."),
    "overflow": _family(
        "Results beyond the largest number of their type, under the rule that the case names.",
        "ml_dtypes#260", "ml_dtypes#400", "ml_dtypes#147",
    ),
    "infinite_bias": _family("A mask written as −∞ in the bias."),
    "finite_mask": _family(
        "A mask written as a finite number: −1e30, or the least number of the type.", "onnxruntime#28904"
    ),
    "fully_masked_rows": _family(
        "Rows that see no key: out 0, gradients 0, lse −∞ (with a sink, the sink).",
        "pytorch#103963", "pytorch#103749", "pytorch#109517", "pytorch#110213", "pytorch#160064",
        "mlx#2608", "cubecl#1070", "iree#24178", "rten#1321", "brevitas#1591", "onnx#8068", "onnxruntime#28904",
    ),
    "fully_masked_head": _family("A whole head, or a whole sequence, that sees nothing."),
    "one_visible_key": _family("Rows that see one key of several: out is its value, dq and dk are exactly 0."),
    "zero_length": _family("Sequences of length 0 among others."),
    "distinct_heads": _family("Values of head g larger by 4^g: the result names the head it read."),
    "poison": _family("NaN, inf or 1e30 where no query looks.", "pytorch#101967"),
    "propagates": _family("NaN in a visible key: it reaches the rows and columns that read it and no others."),
    "position_edges": _family("Positions or distances that 16-bit types, or float32 beyond 2^24, round."),
    "single_query": _family("Lq = 1: a decode step."),
    "single_key": _family("Lk = 1: every weight is 1."),
    "odd_length": _family("A length 2^k − 1 or 2^k + 1: one key too few or too many for a tile."),
    "more_queries_than_keys": _family("Lq > Lk.", "flash-attention#1778", "flash-attention#581"),
    "chosen_rows": _family("A long problem of which some rows are published."),
}  # fmt: skip

_OPTIONS: Mapping[str, Flag] = {
    "causal": _flag("A causal mask."),
    "causal_top_left": _flag("Causal, query i at key position i.", "pytorch#108108", "pytorch#103082"),
    "causal_bottom_right": _flag(
        "Causal, query i at key position i + Lk − Lq.",
        "flash-attention#581", "flash-attention#282", "flash-attention#402", "flash-attention#1778", "mlx#2835",
        "mlx#2967", "onnx#8054", "onnx#8068", "TransformerEngine#960",
    ),
    "window": _flag(
        "A window (left, right), both ends inclusive.",
        "transformers#39408", "transformers#29623", "transformers#29176", "vllm#3385", "zml#763",
        "Megatron-Bridge#2656", "flash-attention#1133",
    ),
    "softcap": _flag(
        "Scores capped by c·tanh(s/c), before bias and mask.",
        "onnx#7865", "onnx#7867", "onnx#7913", "onnxruntime#28370",
    ),
    "scale": _flag("A scale that is given."),
    "mask": _flag("A boolean mask, True where a query may attend."),
    "bias": _flag("An additive bias, with its gradient."),
    "sink": _flag(
        "A sink logit per query head.", "flash-attention#1819", "flash-attention#1895", "tilelang#831",
        "TransformerEngine#2541", "rocm-libraries#12229",
    ),
    "sigmoid": _flag("Weights by sigmoid, each key by itself: no normaliser, no lse."),
    "paged": _flag("Keys and values in blocks that a table names for each sequence."),
    "int8_kv": _flag("Keys and values in int8 with scales, by token and head or shared."),
    "keep_mask": _flag("Dropout as a given mask with its probability."),
    "segments": _flag("Sequences packed into one row, told apart by segment ids."),
    "padding": _flag("Sequences shorter than their arrays."),
    "positions": _flag("Positions that are given instead of counted."),
    "inner": _flag("Final logits and weights are published beside the outputs."),
    "lse_cotangent": _flag("A cotangent of lse beside that of out."),
}  # fmt: skip

_SHAPES: Mapping[str, Flag] = {
    "batch": _flag("More than one sequence."),
    "gqa": _flag("Several key heads, each read by several query heads."),
    "mqa": _flag("One key head for all query heads."),
    "different_widths": _flag("D ≠ Dv."),
    "odd_width": _flag("An odd D or Dv."),
    "float64": _flag("Double precision, stored rounded to nearest as well."),
    "float8": _flag("8-bit floats."),
}

@cache
def known() -> Mapping[str, Flag]:
    """Every flag by name: those of all variants, and each variant's own."""
    own = [info.flags() for info in registry.variants().values()]
    return {name: flag for flags in (_FAMILIES, _OPTIONS, _SHAPES, *own) for name, flag in flags.items()}


def table() -> str:
    """Markdown of every flag, as docs/golden-suite.md shows it."""
    parts = []
    own = [(f"`{info.name}`", info.flags()) for info in registry.variants().values()]
    common = [("How the inputs are made", _FAMILIES), ("Options", _OPTIONS), ("Shapes and types", _SHAPES)]
    for title, flags in [*common, *((title, flags) for title, flags in own if flags)]:
        rows = (f"| `{name}` | {flag.exercises} | {', '.join(flag.bugs)} |" for name, flag in flags.items())
        parts.append("\n".join((f"### {title}", "", "| flag | what it exercises | reports |", "|---|---|---|", *rows)))
    return "\n\n".join(parts) + "\n"
