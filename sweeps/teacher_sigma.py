"""What the teacher should see: FID against the noise of its view, from almost clean to as noisy as the student's
(paper: 'Various teacher noise').

    python sweeps/teacher_sigma.py --plan
    python sweeps/teacher_sigma.py

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
