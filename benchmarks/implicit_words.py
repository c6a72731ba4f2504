"""The words of ``implicit.md``: what was measured, and findings that were written by hand of one set of lines."""

from __future__ import annotations

FINDINGS = {"lines": "", "text": ""}
"""The text is printed only of the lines with this fingerprint; of others the tables speak for themselves."""

TEXT = {
    "figure": [
        "![Accuracy by weight; F and the true loss by epoch, and by rate from a trained network](implicit.png)",
        "",
        "*Left: test accuracy at ε = 0.2 by the weight of the implicit term, mean and standard deviation over the "
        "seeds; the second point of a line is the published weight 0.1 λ, the last the exact hypergradient. Middle: F, "
        "the upper loss at its own δ\\*, and R, the cross-entropy under PGD-20, of the same 128 training images. "
        "Right: the same two after 10 epochs more from a network trained without the term, less those after 10 epochs "
        "without it, by peak rate, with standard errors; the axis is linear up to 0.1 and logarithmic above.*",
        "",
        "The digits, `small_cnn`, 30 epochs of batch 64, SGD 0.9 with the rate going 0 → 0.1 → 0, ε = 0.2 where "
        "nothing else is said: the usual recipe. Fast-BAT's lower level δ\\* = P_C(z − ∇_δ ℓ_atk(θ, z)/λ), z one "
        "unsigned step from a uniform draw; h = d + weight · i, with d the direct term ∇_θ f and i the implicit one. "
        "The last epoch is attacked, on all test images; F and R are means over 128 training images. Accuracy in %, "
        "± the standard deviation over the seeds; differences are to the same training without the term, paired by "
        "seed, ± their standard error, with \\* where they are outside Student's 95 % interval (about one in twenty "
        "of those without any effect).",
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
