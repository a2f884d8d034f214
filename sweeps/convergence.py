"""Does self-supervised discrimination speed up training: FID at each step of DiT, MaskDiT, MDT and SD-DiT (paper:
Figure 4, Table 1), with the control that the paper lacks, DiT under EDM, and each at half and twice its learning rate.

    python sweeps/convergence.py --plan
    python sweeps/convergence.py --set 'lr=["x1"]'       # published learning rates alone
    python sweeps/convergence.py --seeds 3 --steps 1200

Cost on digits: 15 cells of half a minute to a minute and a half each, two at a time on two cores. Found there
(2026-11-26, three seeds, results/digits): at equal steps SD-DiT ends below DiT, MDT and MaskDiT, but not below DiT
under EDM (33.6 against 35.5, difference -1.9 [-11.4, +7.6]); at equal compute DiT under EDM is ahead of all. On latents
of CIFAR-10 (results/cifar10) the same two do not differ either, and DiT is not behind them.

Methods start from their own presets, batch size included: for equal batches on imagenet256 add
--set train.batch_size=256.
"""

from sddit.orchestration.sweep import Sweep, Times

sweep = Sweep(
    name="convergence",
    question="At equal steps, and at equal compute, does SD-DiT reach a lower FID than DiT, MaskDiT and MDT?",
    axes={
        "system": {
            "DiT": {"method.name": "dit"},
            "DiT (EDM)": {"method.name": "dit", "diffusion.kind": "edm"},
            "MaskDiT": {"method.name": "maskdit"},
            "MDT": {"method.name": "mdt"},
            "SD-DiT": {"method.name": "sddit"},
        },
        "lr": {"x1": {}, "x0.5": {"train.lr": Times(0.5)}, "x2": {"train.lr": Times(2)}},
    },
    figures=("analysis.plot_convergence", "analysis.table1"),
)

if __name__ == "__main__":
    sweep.main()
