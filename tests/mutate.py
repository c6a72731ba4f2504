"""Break the algebra, one line at a time, and see that a test notices.

    python tests/mutate.py            # about four minutes
    python tests/mutate.py 2 7        # only these

Each mutation is made in a copy of the checkout; one of the tests it names must then fail. Exits 0 if every mutation was
noticed. The list stands in the docstring of ``tests/language/test_hypergradient.py`` too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROPERTIES = ("tests/language/test_hypergradient.py",)
ANCHORS = ("tests/language/test_anchors.py",)
POLICIES = ("tests/language/test_policy.py",)

# What is broken, in which file, the text before and after, and the tests that must notice it.
MUTATIONS = [
    ("the sign of the implicit term", "bilevel_at/solver.py", "-self.ig_weight * w", "self.ig_weight * w", PROPERTIES),
    ("the mask of active coordinates", "bilevel_at/constraints.py", "v = v * self.free\n", "v = v * 1\n", PROPERTIES),
    (
        "the polyhedron's normals",
        "bilevel_at/constraints.py",
        "        if self.normals is not None:\n            flat",
        "        if False:\n            flat",
        PROPERTIES,
    ),
    (
        "the point of the cross derivative",
        "bilevel_at/kkt.py",
        'if self.cross_at != "solution" or gradient is None',
        "if gradient is None",
        PROPERTIES,
    ),
    (
        "λ in the Hessian-free adjoint",
        "bilevel_at/kkt.py",
        "active.tangent(v) / per_sample(diagonal, v)",
        "active.tangent(v) * per_sample(diagonal, v)",
        PROPERTIES,
    ),
    ("λ of the closed form", "bilevel_at/lower.py", "lam = 1 / step\n", "lam = step\n", PROPERTIES),
    (
        "the ℓ2 ball's curvature",
        "bilevel_at/constraints.py",
        "return ActiveSet(free, unit[:, None], torch.where(has_normal, mu, 0).clamp(min=0))",
        "return ActiveSet(free, unit[:, None], torch.zeros_like(mu))",
        PROPERTIES,
    ),
    (
        "the diagonal in conjugate gradients",
        "solvers/linear.py",
        "else product + scaled)",
        "else product)",
        PROPERTIES,
    ),
    (
        "the Hessian",
        "solvers/full_kkt.py",
        "        if part is None:",
        "        diagonal = diagonal - lam + solution.lam\n        if True:",
        PROPERTIES,
    ),
    (
        "the mean over the batch",
        "bilevel_at/solver.py",
        "shares.mean(losses) * self.scale",
        "losses.sum() * self.scale",
        PROPERTIES,
    ),
    (
        "the statistics that the attack has seen",
        "bilevel_at/solver.py",
        "full_precision(gradient.device), attacked.statistics.again():",
        "full_precision(gradient.device):",
        ("tests/language/test_solver.py",),
    ),
    ("the last epoch's exception", "bilevel_at/anchors.py", " and epoch != epochs - 1", "", ANCHORS),
    (
        "that a step is observed",
        "bilevel_at/solver.py",
        "        policy.observe((problem, self), step)",
        "        pass",
        POLICIES,
    ),
    ("that each policy is told once", "bilevel_at/policy.py", "    seen.add(id(value))\n", "", POLICIES),
    (
        "couplings between samples of the same parity",
        "solvers/linear.py",
        "range((len(values) - 1).bit_length())",
        "range(1)",
        ("tests/solvers/test_full_kkt.py",),
    ),
    (
        "v during the warm-up",
        "bilevel_at/steps.py",
        "(self.follow_warmup or not self.warming_up)",
        "True",
        ("tests/language/test_steps.py",),
    ),
    (
        "the class of what is remembered",
        "bilevel_at/targeted.py",
        "index=wide.index * classes + targets.flatten()",
        "index=wide.index",
        ("tests/language/test_targeted.py",),
    ),
    (
        "the reference of the divergence",
        "bilevel_at/problem.py",
        "full_precision(batch.x.device) if differentiable else no_graph()",
        "full_precision(batch.x.device)",
        ("tests/language/test_losses.py",),
    ),
]


def survives(file: str, old: str, new: str, tests: tuple[str, ...]) -> bool:
    """Whether the tests still pass with ``old`` replaced by ``new`` in a copy."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("bilevel_at", "solvers", "problems", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        shutil.copy(ROOT / "pyproject.toml", folder)
        # The copy is a package of its own: solvers and problems move to where an installation has them.
        for name in ("solvers", "problems"):
            shutil.move(Path(folder) / name, Path(folder) / "bilevel_at" / name)
        target = Path(folder) / (file if file.startswith("bilevel_at") else f"bilevel_at/{file}")
        source = target.read_text()
        assert source.count(old) == 1, f"{file} has {source.count(old)} times {old!r}; the mutation must be renewed"
        target.write_text(source.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True
        )
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 0


def main() -> int:
    missed = 0
    chosen = [int(number) for number in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    for i in chosen:
        what, *change = MUTATIONS[i - 1]
        alive = survives(*change)
        missed += alive
        print(f"{i:2}. {what}: {'NOT NOTICED' if alive else 'noticed'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
