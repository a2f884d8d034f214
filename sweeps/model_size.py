"""Whether what SD-DiT gains holds over model sizes: FID of SD-DiT and of its control, DiT under EDM (paper: Table 1).

    python sweeps/model_size.py --plan
    python sweeps/model_size.py
    python sweeps/model_size.py --set 'system=["SD-DiT"]'

Cost on digits: 8 cells of half a minute to two minutes each, two at a time on two cores. Found there, one seed
(2026-11-26): S, B, L, XL give 31.3, 34.8, 28.7, 27.6 with SD-DiT and 35.6, 24.8, 25.5, 53.9 without: no trend that
seeds, some 10 FID apart, could not make.

On digits the sizes are tiny: widths 64, 96, 96 and 128 with 2 to 4 blocks.
"""

from sddit.orchestration.sweep import Sweep

sweep = Sweep(
    name="model_size",
    question="How does FID depend on the size of the model, with and without SD-DiT?",
    axes={
        "system": {
            "SD-DiT": {"method.name": "sddit"},
            "DiT (EDM)": {"method.name": "dit", "diffusion.kind": "edm"},
        },
        "model.size": ["S/2", "B/2", "L/2", "XL/2"],
    },
    figures=("analysis.plot_model_size", "analysis.table1"),
)

if __name__ == "__main__":
    sweep.main()
