import numpy as np
import pytest
from PIL import Image

from sddit.errors import DataError, UsageError
from sddit.metrics.images import channels_first, image_batches, npz_statistics

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)  # (N, H, W, C)
GREY = RNG.integers(0, 256, (7, 5, 6, 1), dtype=np.uint8)


@pytest.mark.parametrize("images", [COLOUR, GREY])
def test_both_orders_of_the_axes(images):
    first = images.transpose(0, 3, 1, 2)
    assert np.array_equal(channels_first(images), first)
    assert np.array_equal(channels_first(first), first)


@pytest.mark.parametrize("images", [COLOUR.astype(np.float32), COLOUR[0], COLOUR[..., :2]])
def test_what_is_no_batch_of_images(images):
    with pytest.raises(UsageError, match=r"but must be uint8 \(N, H, W, C\) or \(N, C, H, W\)"):
        channels_first(images)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("images", [COLOUR, GREY])
def test_npz_in_batches(tmp_path, save, images):
    save(tmp_path / "samples.npz", images)
    batches = list(image_batches(tmp_path / "samples.npz", batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate(batches), images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": COLOUR}, "cannot be read as an .npz with images arr_0"),
        ({"arr_0": COLOUR.astype(np.float32)}, "has arr_0 float32"),
        ({"arr_0": COLOUR[0]}, "has arr_0 uint8"),
        ({"arr_0": np.array([{}], dtype=object)}, "has arr_0 object"),
    ],
)
def test_an_npz_of_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "samples.npz", **arrays)
    with pytest.raises(DataError, match=message):
        list(image_batches(tmp_path / "samples.npz"))


@pytest.mark.parametrize("keep", [0, 100, -40])
def test_a_torn_npz(tmp_path, keep):
    np.savez(tmp_path / "samples.npz", COLOUR)
    content = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "samples.npz").write_bytes(content[:keep])
    with pytest.raises(DataError, match=r"cannot be read as an .npz"):
        list(image_batches(tmp_path / "samples.npz"))
    with pytest.raises(DataError, match=r"cannot be read as an .npz"):
        npz_statistics(tmp_path / "samples.npz")


@pytest.mark.parametrize("images", [COLOUR, GREY])
def test_a_folder_of_files_in_the_order_of_their_paths(tmp_path, images):
    (tmp_path / "sub").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(tmp_path / ("sub" if i > 4 else ".") / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    batches = list(image_batches(tmp_path, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 3]
    assert np.array_equal(np.concatenate(batches), images.transpose(0, 3, 1, 2))


def test_palettes_and_transparency_become_rgb(tmp_path):
    Image.fromarray(COLOUR[0]).convert("RGBA").save(tmp_path / "0.png")
    Image.fromarray(COLOUR[0]).convert("P").save(tmp_path / "1.png")
    (batch,) = image_batches(tmp_path)
    assert batch.shape == (2, 3, 5, 6)
    assert np.array_equal(batch[0], COLOUR[0].transpose(2, 0, 1))


def test_images_of_different_sizes(tmp_path):
    Image.fromarray(COLOUR[0]).save(tmp_path / "0.png")
    Image.fromarray(COLOUR[0, :4]).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"1.png is \(4, 6, 3\) \(H, W, C\), but .*0.png is \(5, 6, 3\)"):
        list(image_batches(tmp_path))


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "0.png").write_text("hello")
    with pytest.raises(DataError, match=r"0.png is not an image"):
        list(image_batches(tmp_path))


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="No images at"):
        list(image_batches(tmp_path))


def test_statistics(tmp_path):
    np.savez(tmp_path / "images.npz", COLOUR)
    assert npz_statistics(tmp_path / "images.npz") is None
    np.savez(tmp_path / "both.npz", COLOUR, mu=np.zeros(4, dtype=np.float32), sigma=np.eye(4))
    mu, sigma = npz_statistics(tmp_path / "both.npz")
    assert (mu.dtype, mu.shape, sigma.shape) == (np.float64, (4,), (4, 4))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(4), sigma=np.eye(3))
    with pytest.raises(DataError, match="must be"):
        npz_statistics(tmp_path / "odd.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(DataError, match="cannot be read"):
        npz_statistics(tmp_path / "pickled.npz")
