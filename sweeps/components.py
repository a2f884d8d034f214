"""What each part of SD-DiT buys, and what the paper leaves open: one change at a time from SD-DiT as read here.

    python sweeps/components.py --plan
    python sweeps/components.py
    python sweeps/components.py --set 'component=["SD-DiT", "no L_D", "stop-gradient", "MaskDiT", "DiT (EDM)"]'

Cost on digits: 29 cells of a minute or less each, two at a time on two cores: 10 to 20 minutes. Found there, one seed
(2026-11-26): most settings are within some 10 FID of SD-DiT's 31.3, which is how far seeds differ: no masking 31.2,
no CLS loss 32.5, no L_D 33.0, no patch loss 33.7, DiT (EDM) 35.6, no separate decoder 38.3. What is not: nothing (43.0)
or zeros (43.9) at masked slots, L_G on visible tokens (44.0), stop-gradient (51.5), MaskDiT (62.9). The lowest is 8
times the prototypes, 25.2, one draw of 29. A decoder as wide as the encoder is what digits has anyway.

The last line is the minimum set that attributes a gain: without 'no L_D' and 'DiT (EDM)' the change of formulation and
architecture is confounded with the discriminative loss, since the published comparison sets DiT and MDT under IDDPM
beside SD-DiT under EDM. The others are the uncertainty register (U1 to U15; U13, the optimiser's settings, is the axis
`lr` of the sweep convergence). A setting that a preset has already is the same cell as SD-DiT and left out.
"""

from sddit.orchestration.sweep import Sweep, Times

sweep = Sweep(
    name="components",
    question="What does each part of SD-DiT contribute, and how much do its undocumented choices matter?",
    axes={
        "component": {
            "SD-DiT": {},
            "no L_D": {"method.lambda_d": 0.0},
            "stop-gradient": {"method.stop_gradient": True},  # U1
            "MaskDiT": {"method.name": "maskdit"},
            "DiT (EDM)": {"method.name": "dit", "diffusion.kind": "edm"},
            # the parts
            "no masking": {"method.mask_ratio": 0.0},
            "no CLS loss": {"method.discriminated_tokens": "patches"},
            "no patch loss": {"method.discriminated_tokens": "cls"},
            "no separate decoder": {"method.decoder": "last_blocks"},  # U5
            # the register
            "decoder as wide as the encoder": {"method.decoder": "wide"},
            "L_G on visible tokens": {"method.generative_tokens": "visible"},  # U2
            "zeros at masked slots": {"method.masked_slots": "zeros"},  # U3
            "nothing at masked slots": {"method.masked_slots": "nothing"},
            "lambda_D x0.1": {"method.lambda_d": Times(0.1)},  # U4
            "lambda_D x10": {"method.lambda_d": Times(10)},
            "mask ratio 0.5": {"method.mask_ratio": 0.5},  # U6
            "teacher momentum 0.99": {"method.teacher_momentum": 0.99},  # U7
            "teacher is the sampling EMA": {"method.share_ema": True},
            "no centring": {"method.centring": "none"},  # U8, U14
            "EMA centre": {"method.centring": "ema"},
            "Sinkhorn-Knopp": {"method.centring": "sinkhorn"},
            "8 times the prototypes": {"method.num_prototypes": Times(8)},  # U9
            "separate heads": {"method.head_shared": False},
            "[CLS] forwarded to the decoder": {"method.cls_in_decoder": "forwarded"},  # U10
            "[CLS] in the condition": {"method.cls_in_decoder": "embedded"},
            "no [CLS] at inference": {"method.cls_at_inference": False},
            "teacher's label never dropped": {"method.teacher_label": "never_dropped"},  # U11
            "teacher's label always dropped": {"method.teacher_label": "always_dropped"},
            "teacher sees the visible tokens": {"method.teacher_tokens": "visible"},  # U12
            "patch centre per position": {"method.centre_per_position": True},  # U15
        }
    },
    figures=("analysis.plot_components",),
)

if __name__ == "__main__":
    sweep.main()
