"""Draws two figures of the gradient coefficient, from `jaxreason.objectives` itself: what the code does is what is drawn.

    python docs/figures/coefficients.py [--out FOLDER]

`coefficients.png`: the coefficient against the ratio, for both signs of the advantage, one panel for each treatment of the ratio.
`kl_pulls.png`: how hard each estimator of the divergence pulls a token back, against log pi/pi_ref.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreason.objectives import coefficients
from jaxreason.objectives.kl import reference_pull

# Okabe and Ito's colours, which the colour-blind tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"

Curve = Callable[[Array, Array], Array]  # (ratios, advantages) of tokens -> their coefficients, each of them on its own


def alone(coefficient: Callable[..., tuple[Array, Array]], **settings: Any) -> Curve:
    """Each ratio is a completion of one token, old log-probability 0, so that a completion's ratio is its token's."""

    def curve(ratio: Array, advantage: Array) -> Array:
        logp = jnp.log(ratio)[:, None, None]
        return coefficient(
            logp, jnp.zeros_like(logp), advantage[:, None, None], jnp.ones(logp.shape, bool), **settings
        )[0][:, 0, 0]  # fmt: skip

    return curve


def no_clip(logp: Array, logp_old: Array, advantage: Array, mask: Array) -> tuple[Array, Array]:
    """Plain importance sampling, which is a clip that never bites."""
    return coefficients.clipped(logp, logp_old, advantage, mask, clip_low=1.0, clip_high=np.inf)


CLIP = {"clip_low": 0.2, "clip_high": 0.2}
PANELS: list[tuple[str, str, Curve]] = [
    ("No clip", "importance sampling", alone(no_clip)),
    ("Clip", "PPO, GRPO: 0.8 to 1.2", alone(coefficients.clipped, **CLIP)),
    ("Clip higher", "DAPO: 0.8 to 1.28", alone(coefficients.clipped, clip_low=0.2, clip_high=0.28)),
    ("Dual clip", "and at most 3 where A < 0", alone(coefficients.clipped, **CLIP, dual_clip=3.0)),
    ("Capped weight", "CISPO: none dropped; here 3", alone(coefficients.clipped_importance, clip_low=1.0, clip_high=2.0)),
    ("Soft gate", "SAPO: everything fades", alone(coefficients.soft_gate, tau_positive=1.0, tau_negative=1.05)),
    ("Clip in log space", "GMPO: 0.67 to 1.49", alone(coefficients.geometric_mean, clip_low=0.4, clip_high=0.4)),
    ("Whole completion", "GSPO: 0.9997 to 1.0004", alone(coefficients.sequence_clipped, clip_low=3e-4, clip_high=4e-4)),
]


def pieces(x: np.ndarray, y: np.ndarray, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """The curve with a hole wherever it jumps by more than `gap`, so that no line is drawn through the jump."""
    jumps = np.flatnonzero(np.abs(np.diff(y)) > gap) + 1
    return np.insert(x, jumps, np.nan), np.insert(y, jumps, np.nan)


def style() -> dict[str, Any]:
    return {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555",
        "xtick.color": "#444444", "ytick.color": "#444444", "xtick.labelsize": 9, "ytick.labelsize": 9,
    }  # fmt: skip


def draw_coefficients(path: Path) -> None:
    """Small multiples on shared axes, but for the last: a completion's ratio has a scale of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(style()):
        figure, axes = plt.subplots(2, 4, figsize=(9.6, 5.8), sharey=True, layout="constrained")
        for axis, (title, subtitle, curve) in zip(axes.flat, PANELS, strict=True):
            whole = axis is axes[-1, -1]
            low, high = (0.999, 1.001) if whole else (1e-4, 4.0)
            ratio = np.linspace(low, high, 4001)
            axis.axhline(0, color="#CCCCCC", linewidth=0.8, zorder=0)
            axis.axvline(1, color="#CCCCCC", linewidth=0.8, zorder=0)
            for sign, color, width in ((1.0, BLUE, 3.2), (-1.0, ORANGE, 2.0)):  # the thinner one lies on top
                axis.plot(ratio, sign * ratio, color=GREY, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
                value = np.asarray(curve(jnp.asarray(ratio, jnp.float32), jnp.full(ratio.shape, sign, jnp.float32)))
                axis.plot(*pieces(ratio, value, 0.2), color=color, linewidth=width, solid_capstyle="butt", zorder=3)
            axis.set_title(f"{title}\n", fontsize=11, fontweight="bold", loc="left")
            axis.text(0, 1.03, subtitle, transform=axis.transAxes, fontsize=9, color="#444444", va="bottom")
            axis.set(xlim=(low, high), ylim=(-4, 4), yticks=range(-3, 4))
            axis.set_xticks((0.9995, 1, 1.0005) if whole else range(5), *((("0.9995", "1", "1.0005"),) if whole else ()))
            axis.set_xlabel("ratio of the completion" if whole else "ratio of the token" if axis in axes[-1] else "")
        for axis in axes[:, 0]:
            axis.set_ylabel("gradient coefficient")
        axes[0, 0].text(2.2, 3.0, "A = +1", color=BLUE, fontweight="bold", ha="right")
        axes[0, 0].text(2.2, -3.3, "A = −1", color=ORANGE, fontweight="bold", ha="right")
        axes[0, 1].text(2.55, 3.2, "without a clip", color="#666666", fontsize=9, ha="right")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def draw_pulls(path: Path) -> None:
    """Coefficient per unit of beta against l = log pi - log pi_ref: below 0 the token's probability is pushed down."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    difference = np.linspace(-3, 3, 1201)
    logp = jnp.asarray(difference, jnp.float32)[None, None, :]
    mask = jnp.ones(logp.shape, bool)
    lines = {
        "k1": ("k1: the same everywhere", GREY, (0, (5, 2)), (-2.9, -1.35), "left"),
        "k2": ("k2: reverse KL", BLUE, "-", (2.15, -2.75), "right"),
        "k3": ("k3: forward KL, GRPO's", ORANGE, "-", (-1.55, 4.4), "left"),
        "abs": ("|l|: the side alone", GREEN, (0, (1, 1.2)), (-2.9, 1.15), "left"),
    }
    with plt.rc_context(style()):
        figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
        axis.axhline(0, color="#CCCCCC", linewidth=0.8, zorder=0)
        axis.axvline(0, color="#CCCCCC", linewidth=0.8, zorder=0)
        for kind, (text, color, dashes, at, side) in lines.items():
            pull = np.asarray(reference_pull(logp, jnp.zeros_like(logp), mask, kind=kind)[0])[0, 0]
            axis.plot(*pieces(difference, pull, 0.5), color=color, linewidth=2.2, linestyle=dashes)
            axis.text(*at, text, color=color, fontweight="bold", ha=side)
        axis.set(xlim=(-3, 3), ylim=(-3.2, 6), ylabel="pull: coefficient per unit of β")
        axis.set_xlabel(r"$l = \log\,(\pi / \pi_{\mathrm{ref}})$ of the token")
        axis.text(2.95, 5.5, "above 0: made likelier", color="#666666", fontsize=9, ha="right")
        axis.text(-2.95, -2.9, "below 0: made less likely", color="#666666", fontsize=9)
        axis.set_title("How hard each estimator of the KL pulls a token back", fontsize=11, fontweight="bold", loc="left")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1], help="the folder of the two PNGs; default: docs")
    out = parser.parse_args().out
    draw_coefficients(out / "coefficients.png")
    draw_pulls(out / "kl_pulls.png")


if __name__ == "__main__":
    main()
