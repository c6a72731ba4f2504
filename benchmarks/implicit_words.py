"""The words of ``implicit.md``: what was measured, and findings that were written by hand of one set of lines."""

from __future__ import annotations

from typing import Any

from implicit_cells import Lines, Row, accuracy, difference, last, mean, own, unbiased

FINDINGS_OF = "c33878116e93"
"""The fingerprint of the lines that :data:`FINDINGS` were written of; of others the tables speak for themselves."""

FINDINGS = """\
At the published weight, 0.1 λ, the implicit term makes no difference that these seeds show where 1/λ is 20, 5 or 1.25
({published_20}, {published_5} and {published_1_25} points of PGD-50-10 accuracy). As the exact hypergradient, weight 1,
it makes differences of {exact_20}, {exact_5} and {exact_1_25} points. Only at 1/λ = 0.3 does it help ({published_0_3}
at 0.1 λ, {exact_0_3} at 1), where the attacker is too weak to train against: {weak} % stand, beside {best} % at
1/λ = 20 without the term. Why following the gradient of the stated problem does harm has no single answer. At the usual
rate about half of the harm comes without any signal, from variance and too long a step, under which even F rises; at
smaller rates the rest looks like masking, F about as low as without the term and the true loss twice as high; and on a
network with kinks h is not the derivative of F, which jumps where h cannot see it. At ε = 0.1 the exact term makes
{exact_small} points at 1/λ = 20, which three seeds do not tell from none.

At 1/λ = 20, differences to the same training without the term ± their standard error, with \\* where they are outside
the 95 % interval (written by hand of the lines with this page's fingerprint; the numbers are filled in from them):

- **It is not that the anchor is held.** From anchor uniform, where nothing of z is left out, the exact hypergradient
  makes {uniform} points; with the derivative through the anchor {through}, over
  the four of five seeds whose training ended.
- **At the usual rate F is not lowered but raised**, {exact_F} on training images. Masking alone would lower it.
- **About half of the harm comes without any signal.** Of the second moment of i {signal_implicit} is signal, of d
  {signal_direct}. With a coin's sign, which leaves nothing but the variance, the term makes {coin} points, and
  the exact one {over_coin} more. Noise of the same length in a random direction makes {noise}: the directions that
  i takes matter, not only its length. At a tenth of the rate, from a trained network, the coin makes {slow_coin}. From
  scratch, 60 epochs at 0.03, the exact term makes {rates}.
- **What is left at a tenth of the rate looks like masking.** There the exact term makes {slow} points: F is {slow_F}, R
  {slow_R} and gradient alignment {slow_alignment}, each without → with. At a hundredth F falls further than without the
  term (difference {slowest_F_by}), as its gradient predicts, and R does not ({slowest_R_by}). From scratch, weight 0.1
  makes {w01_F} of F and {w01_R} of R.
- **Kinks hide a part of F from h.** At a tenth of the rate the derivative adds up to {slow_integral} along the way
  and F changes by {slow_change}; the rest, {slow_jumps}, are jumps, which undo the decrease that the derivative
  predicts. On the smooth network they are {smooth_jumps}, and the exact term makes {smooth} points, but {smooth_fast}
  at the usual rate, and {swish} from scratch. That network is also trained less far, so not all of this is due to
  kinks.

This is one small network on 8×8 images. PGD flatters networks that were trained with the exact term: the attack on the
nearest classes leaves {exact_nearest} % of {exact_pgd} %, without the term {none_nearest} % of {best} %.
"""


def findings(lines: Lines) -> str:
    """The findings with their numbers: differences in PGD-50-10 accuracy to weight 0, F and R, of these lines."""
    none = lines.row()

    def pgd(beside: Row = none, **settings: Any) -> str:
        return difference(lines.row(**({"weight": 1.0} | settings)), beside, accuracy("pgd-50-10"))

    def went_on(lr: float, activation: str = "relu", term: str = "implicit") -> dict[str, Row]:
        settings = {"part": "after", "lr": lr, "activation": activation}
        return {"none": lines.row(**settings), "exact": lines.row(weight=1.0, term=term, **settings)}

    def jumps(of: Row) -> str:
        return own(of, lambda r: r["segment"]["change"] - r["segment"]["integral"])

    slow, smooth, slowest = went_on(0.01), went_on(0.01, "swish"), went_on(0.001)
    cells = {f"exact_{step:g}": pgd(lines.row(step=step), step=step) for step in (20.0, 5.0, 1.25, 0.3)}
    cells |= {
        f"published_{step:g}": pgd(lines.row(step=step), step=step, weight=0.1 / step)
        for step in (20.0, 5.0, 1.25, 0.3)
    }
    cells |= {term: pgd(part="causes", term=term) for term in ("through", "noise", "coin")}
    for name, value in (("anchor", "uniform"), ("activation", "swish")):
        settings = {"part": "causes", name: value}
        cells[value] = pgd(lines.row(**settings), **settings)
    for name, pair in (
        ("slow", slow),
        ("smooth", smooth),
        ("slowest", slowest),
        ("slow_coin", went_on(0.01, term="coin")),
    ):
        cells[name] = difference(pair["exact"], pair["none"], accuracy("pgd-50-10"))
        for what in ("F", "R", "alignment"):
            cells[f"{name}_{what}"] = " → ".join(mean(pair[which], last(what)) for which in ("none", "exact"))
            cells[f"{name}_{what}_by"] = difference(pair["exact"], pair["none"], last(what), 3)
        cells[f"{name}_jumps"] = jumps(pair["exact"])
        cells[f"{name}_change"] = mean(pair["exact"], lambda r: r["segment"]["change"], 3).replace("-", "−")
        cells[f"{name}_integral"] = mean(pair["exact"], lambda r: r["segment"]["integral"], 3).replace("-", "−")
    exact = lines.row(weight=1.0)
    fast = went_on(0.1, "swish")
    cells["smooth_fast"] = pgd(fast["none"], part="after", activation="swish")
    small = {"part": "smaller", "epsilon": 0.1}
    cells["exact_small"] = pgd(lines.row(**small), **small)
    cells["rates"] = pgd(lines.row(part="rates", lr=0.03), part="rates", lr=0.03)
    cells["over_coin"] = pgd(lines.row(part="causes", weight=1.0, term="coin"))
    for what in ("F", "R"):
        cells[f"w01_{what}"] = difference(lines.row(weight=0.1), none, last(what), 2)
    cells["exact_F"] = f"{mean(none, last('F'))} → {mean(exact, last('F'))}"
    cells["exact_pgd"] = mean(exact, accuracy("pgd-50-10"), 1)
    for name, row in (("exact", exact), ("none", none)):
        cells[f"{name}_nearest"] = mean(row, accuracy("nearest-40-3-2"), 1)
    cells["weak"] = mean(lines.row(step=0.3, weight=1.0), accuracy("pgd-50-10"), 1)
    cells["best"] = mean(none, accuracy("pgd-50-10"), 1)
    for term in ("direct", "implicit"):
        cells[f"signal_{term}"] = mean(none, lambda r, term=term: unbiased(r["signal"][term]), 3)
    return FINDINGS.format_map({name.replace(".", "_"): cell for name, cell in cells.items()})


TEXT = {
    "setting": [
        "The digits, `small_cnn`, 30 epochs of batch 64, SGD 0.9 with the rate going 0 → 0.1 → 0, ε = 0.2 where "
        "nothing else is said: the usual recipe. Fast-BAT's lower level δ\\* = P_C(z − ∇_δ ℓ_atk(θ, z)/λ), z one "
        "unsigned step from a uniform draw; h = d + weight · i, with d the direct term ∇_θ f and i the implicit one, "
        "that through δ\\*. F is the upper loss at δ\\*(θ), whose derivative with z held is h with weight 1; R is the "
        "true loss, the cross-entropy under PGD-20. *Masking*: the network learns to make the attack δ\\* weak, so "
        "that F falls and R does not. The last epoch is attacked, on all test images; F and R are means over 128 "
        "training images. Accuracy in %, ± the standard deviation over the seeds; differences are to the same training "
        "without the term, paired by seed, ± their standard error, with \\* where they are outside Student's 95 % "
        "interval (about one in twenty of those without any effect).",
        "",
    ],
    "figure": [
        "![Accuracy by weight; F and the true loss by epoch, and by rate from a trained network](implicit.png)",
        "",
        "*Left: test accuracy at ε = 0.2 by the weight of the implicit term, mean and standard deviation over the "
        "seeds; the second point of a line is the published weight 0.1 λ, the last the exact hypergradient. Middle: F, "
        "the upper loss at its own δ\\*, and R, the cross-entropy under PGD-20, of the same 128 training images. "
        "Right: the same two after 10 epochs more from a network trained without the term, less those after 10 epochs "
        "without it, by peak rate, with standard errors; the axis is linear up to 0.1 and logarithmic above.*",
        "",
    ],
    "scan": ["## 1/λ, weight and ε", ""],
    "terms": [
        "## What the term is",
        "",
        "Of the network after the last epoch. Share as trained: ‖weight · i‖/‖d‖, mean over all steps of the training; "
        "the other columns are of h with weight 1, whatever the network was trained with. Free: coordinates of δ\\* at "
        "no bound. Cosine: of d and i. Signal: ‖E g‖²/E‖g‖² of a term over 8 batches of 64 and their draws, estimated "
        "without bias: 1 without variance, 0 for noise. Direct and implicit, ∇R: their cosine with the gradient of "
        "R (PGD's δ held), where R is on the same images. Through z: the cosine of i with the term whose anchor is "
        "differentiated too. Alignment: `bilevel_at.diagnose.gradient_alignment`. λ_min: of ∇²ℓ_atk at δ\\*, median "
        "of 16 images, and the share of them for which adding λ makes it positive.",
        "",
    ],
    "causes": [
        "## What could explain the harm",
        "",
        "From anchor uniform, h is the derivative of F itself, almost everywhere; the smooth network has no kinks that "
        "it leaves out; the derivative through the anchor leaves out nothing but kinks. Noise is a Gaussian vector as "
        "long as i in every step. The term with a coin's sign is i or −i by a fair coin in every step: i's second "
        "moments, and no mean.",
        "",
    ],
    "after": [
        "## From a network that was trained without the term",
        "",
        "10 epochs more, the rate going 0 → peak → 0. What the first epochs of training need is no matter here.",
        "",
    ],
    "segments": [
        "What F did in these 10 epochs, on 128 training images with the same starts, and what its derivative says: "
        "the integral along the straight line from the network before to the one after (64 points; the derivative "
        "through the anchor, so that nothing is left out), in its two parts. F is continuous but where the kink of a "
        "ReLU passes z: there the input gradient jumps, δ\\* with it, and F too, which no derivative sees. The last "
        "column is the change less the integral, ± its standard error over the seeds.",
        "",
    ],
    "lengths": [
        "## How far the hypergradient reaches",
        "",
        "In float64, on one batch of 64 training images: the largest t on a grid of half decades from 1e-6 to 1 up to "
        "which a step −t h with z held lowers F by at least half of t‖h‖², the geometric mean over seeds. Then the "
        "largest decrease of F that any t of the grid gives: on that batch with its z, and on 128 other images with z "
        "taken anew, along h and along the direct term d alone.",
        "",
    ],
    "rates": ["## A smaller rate, 60 epochs", ""],
}
