"""How sharp the discriminative objective should be: FID over the student's and the teacher's temperature.

    python sweeps/temperatures.py --plan
    python sweeps/temperatures.py

Cost on digits: 9 cells of about a minute each, two at a time on two cores. Found there (2026-11-26, one seed): FID 28.7
to 34.5, within what seeds differ by. A student as sharp as its teacher or sharper (0.05 against 0.04, 0.07) kills the
[CLS] targets; at 0.07 the patches' too.

The teacher's temperature is that of patches and of [CLS] alike. A warm-up, where the preset has one, starts from
method.tau_teacher_start as before.
"""

from sddit.orchestration.sweep import Sweep

sweep = Sweep(
    name="temperatures",
    question="How does FID depend on the temperatures of student and teacher?",
    axes={"method.tau_student": [0.05, 0.1, 0.2], "method.tau_teacher": [0.02, 0.04, 0.07]},
    ties={"method.tau_teacher_cls": "method.tau_teacher"},
    figures=("analysis.plot_temperatures",),
)

if __name__ == "__main__":
    sweep.main()
