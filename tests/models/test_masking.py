"""Oracles of methods.md §12.3 on masks, and their algebra for any size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sddit.errors import UsageError
from sddit.models import masking

KEEP = {
    256: {0: 256, 0.1: 230, 0.2: 204, 0.25: 192, 0.3: 179, 0.4: 153, 0.5: 128, 0.6: 102, 0.7: 76, 0.75: 64, 0.8: 51,
          0.9: 25},
    64: {0.2: 51, 0.3: 44, 0.5: 32, 0.75: 16, 0.8: 12},
    16: {0: 16, 0.1: 14, 0.2: 12, 0.25: 12, 0.3: 11, 0.5: 8, 0.65: 5, 0.75: 4},
}  # fmt: skip


@pytest.mark.parametrize(("tokens", "ratio", "keep"), [(n, m, k) for n, row in KEEP.items() for m, k in row.items()])
def test_keep_count_truncates_as_published(tokens: int, ratio: float, keep: int) -> None:
    assert masking.keep_count(tokens, ratio) == keep


def test_something_must_stay_visible() -> None:
    with pytest.raises(UsageError, match=r"mask_ratio 0.95 leaves none of 16 tokens.*at most 0.9375"):
        masking.keep_count(16, 0.95)


masks = st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**16)).flatmap(
    lambda t: st.tuples(st.just(t), st.integers(1, t[1]))
)


@given(masks)
def test_masks_are_permutations_cut_in_two(drawn: tuple[tuple[int, int, int], int]) -> None:
    (b, n, seed), keep = drawn
    noise = torch.rand(b, n, generator=torch.Generator().manual_seed(seed))
    mask = masking.random_mask(noise, keep)
    assert mask.ids_keep.shape == (b, keep)
    assert (mask.removed.sum(1) == n - keep).all()
    assert not mask.removed.gather(1, mask.ids_keep).any()  # 1 is removed
    ids_shuffle = noise.argsort(1)
    assert torch.equal(ids_shuffle.gather(1, mask.ids_restore), torch.arange(n).expand(b, n))
    assert (noise.gather(1, mask.ids_keep).amax(1) <= (noise + 2 * (1 - mask.removed)).amin(1)).all()


@given(masks)
def test_gather_then_scatter_restores_the_order(drawn: tuple[tuple[int, int, int], int]) -> None:
    (b, n, seed), keep = drawn
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(b, n, 3, generator=generator)
    mask = masking.random_mask(torch.rand(b, n, generator=generator), keep)
    visible = masking.gather(tokens, mask.ids_keep)
    assert visible.shape == (b, keep, 3)
    restored = masking.scatter(torch.full_like(tokens, 7.0), mask.ids_keep, visible)
    assert torch.equal(restored, torch.where(mask.removed[:, :, None] == 1, 7.0, tokens))
    # The published way, by ids_restore on visible tokens followed by mask tokens, gives the same.
    padded = torch.cat([visible, torch.full((b, n - keep, 3), 7.0)], 1)
    assert torch.equal(restored, masking.gather(padded, mask.ids_restore))


def test_equal_noise_is_kept_in_order() -> None:
    mask = masking.random_mask(torch.zeros(2, 40), 10)
    assert torch.equal(mask.ids_keep, torch.arange(10).expand(2, 10))
