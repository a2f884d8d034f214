"""How much can be masked: FID against the mask ratio of SD-DiT's student (paper: Figure 5).

    python sweeps/mask_ratio.py --plan      # cells, state, predicted time
    python sweeps/mask_ratio.py             # run; run again to resume or to add cells

Cost on digits: 6 cells of 40 seconds to a minute each, two at a time on two cores. Found there (2026-11-26, three
seeds, results/digits): means of 28.9 to 32.7 at step 600, as wide apart as the intervals, so no best ratio can be
named; masking slows the start (140 to 187 at step 200). On latents of CIFAR-10 (three seeds,
results/cifar10) means rise with the ratio, 476 to 498 at step 4,000; only 0.75 is told apart from 0. No evidence about
larger models.
"""

from sddit.orchestration.sweep import Sweep

sweep = Sweep(
    name="mask_ratio",
    question="How does FID depend on the mask ratio of SD-DiT's student?",
    axes={"method.mask_ratio": [0.0, 0.2, 0.3, 0.5, 0.65, 0.75]},
    figures=("analysis.plot_mask_ratio",),
    suggest=lambda trial: {"method.mask_ratio": trial.suggest_float("method.mask_ratio", 0.0, 0.8, step=0.05)},
)

if __name__ == "__main__":
    sweep.main()
