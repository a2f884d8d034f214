"""What the teacher should see: FID against the noise of its view, from almost clean to as noisy as the student's
(paper: 'Various teacher noise').

    python sweeps/teacher_sigma.py --plan
    python sweeps/teacher_sigma.py

Cost on digits: 5 cells of about a minute each, two at a time on two cores. Found there (2026-11-26, one seed): FID 29.6
to 34.8 without a trend, within what seeds differ by; with the student's own noise the start is slower (186 against 147
to 156 at step 200), and the [CLS] targets carry 3.2 instead of 2.3 nat.

Fixed at σ_min, fixed higher, drawn between σ_min and the student's σ (log-uniform), and equal to the student's.
"""

from sddit.orchestration.sweep import Sweep

sweep = Sweep(
    name="teacher_sigma",
    question="How does FID depend on the noise of the teacher's view?",
    axes={"method.teacher_sigma": [0.002, 0.1, 0.5, "drawn", "student"]},
    figures=("analysis.plot_teacher_sigma",),
)

if __name__ == "__main__":
    sweep.main()
