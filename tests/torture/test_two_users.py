"""Two users on two machines with one cluster and one MLflow server, who start a sweep of the same name at once."""

import pytest
from commands import MASK_RATIO, Running, no_traceback
from nodes import Nodes
from servers import MlflowServer
from tiny import set_flags
from written import assert_once

pytestmark = [pytest.mark.slow, pytest.mark.torture]

EVERY, STEPS = 40, 80
# A machine is told by its name.
OTHER_MACHINE = "import socket\nsocket.gethostname = lambda: 'other'\n"


@pytest.mark.parametrize("later", [False, True], ids=["at once", "while one trains"])
def test_of_two_sweeps_with_one_name_one_runs_and_the_other_is_refused(later, tmp_path):
    site, users = tmp_path / "site", [tmp_path / "one", tmp_path / "other"]
    for folder in (site, *users):
        folder.mkdir()
    (site / "sitecustomize.py").write_text(OTHER_MACHINE)
    with MlflowServer(tmp_path, f"{tmp_path}/artifacts") as server:
        nodes = Nodes(1, 1)
        try:
            flags = [
                *set_flags(eval__every=EVERY, eval__samples=80, method__mask_ratio="[0.2, 0.5]"), "--steps", STEPS,
                "--tracking-uri", server.uri, "--storage", f"{tmp_path}/shared",
            ]  # fmt: skip

            def start(folder, **env):
                return Running(MASK_RATIO, *flags, cwd=folder, **nodes.environment, **env)

            one = start(users[0])
            if later:
                one.wait_for_step(EVERY)
            other = start(users[1], PYTHONPATH=str(site))
            endings = {one.wait(300): one, other.wait(300): other}
            assert set(endings) == {0, 2}, one.output + other.output
            refused = no_traceback(endings[2].output)
            assert "is being run by process" in refused or "at the same moment" in refused
            assert "choose another name with --name" in refused
            no_traceback(endings[0].output)
            again = start(users[1], PYTHONPATH=str(site))
            assert again.wait(300) == 0 and "nothing to run" in again.output, again.output
            cells = assert_once(server.database, "mask_ratio", server.uri, every=EVERY, steps=STEPS)
            assert len(cells) == 2
        finally:
            nodes.close()
