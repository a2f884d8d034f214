"""Whether what SD-DiT gains holds over model sizes: FID of SD-DiT and of its control, DiT under EDM (paper: Table 1).

    python sweeps/model_size.py --plan
    python sweeps/model_size.py
    python sweeps/model_size.py --set 'system=["SD-DiT"]'

Cost on digits: 8 cells of one to five minutes each as planned, two at a time on two cores. Found there: nothing yet, it
was planned (2026-11-26) and not run to its end.

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
