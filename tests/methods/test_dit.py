"""DiT under EDM: in which update each part first moves (methods.md §12.4)."""

from steps import is_gate, moved_at_update

from sddit import presets
from sddit.methods import build_method


def test_reachability() -> None:
    method = build_method(presets.digits(method="dit"), (1, 8, 8), 10)
    first = moved_at_update(method)
    assert first.keys() == {name for name, p in method.named_parameters() if p.requires_grad}
    assert {n for n, u in first.items() if u == 1} == {"network.final.linear.weight", "network.final.linear.bias"}
    second = {n for n, u in first.items() if u == 2}
    patch = {"network.patch_embed.weight", "network.patch_embed.bias"}
    assert second == patch | {n for n in first if is_gate(n) or n.startswith("network.final.modulation")}
