import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from sddit.errors import DataError, UsageError
from sddit.metrics.images import channels_first, has_images, images_in, npz_arrays, open_images

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
    found = open_images(tmp_path / "samples.npz")
    assert (found.count, found.shape) == (7, images.transpose(0, 3, 1, 2).shape[1:])
    for _ in range(2):  # as often as asked
        batches = list(found.batches(3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert np.array_equal(np.concatenate(batches), images.transpose(0, 3, 1, 2))


def test_images_in_memory():
    found = images_in(COLOUR)
    assert (found.count, found.shape) == (7, (3, 5, 6))
    assert np.array_equal(np.concatenate(list(found.batches(4))), COLOUR.transpose(0, 3, 1, 2))


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
        open_images(tmp_path / "samples.npz")


@pytest.mark.parametrize("keep", [0, 100, -40])
def test_a_torn_npz(tmp_path, keep):
    np.savez(tmp_path / "samples.npz", COLOUR)
    content = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "samples.npz").write_bytes(content[:keep])
    with pytest.raises(DataError, match=r"cannot be read as an .npz"):
        open_images(tmp_path / "samples.npz")
    for function in (npz_arrays, has_images):
        with pytest.raises(DataError, match=r"cannot be read as an .npz"):
            function(tmp_path / "samples.npz")


def test_an_npz_with_fewer_values_than_its_head_says(tmp_path):
    """As left behind by a program that was stopped while it wrote into a valid archive."""
    whole = io.BytesIO()
    np.save(whole, COLOUR)
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive:
        archive.writestr("arr_0.npy", whole.getvalue()[:-100])
    with pytest.raises(DataError, match=r"arr_0 has 530 values of 630"):
        open_images(tmp_path / "samples.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_in_the_middle_of_an_npz_is_found_when_it_is_read(tmp_path, save):
    save(tmp_path / "samples.npz", COLOUR)
    content = bytearray((tmp_path / "samples.npz").read_bytes())
    content[300:310] = bytes(10)
    (tmp_path / "samples.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as an .npz"):
        list(open_images(tmp_path / "samples.npz").batches(256))


@pytest.mark.parametrize("images", [COLOUR, GREY])
def test_a_folder_of_files_in_the_order_of_their_paths(tmp_path, images):
    (tmp_path / "sub").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(tmp_path / ("sub" if i > 4 else ".") / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    found = open_images(tmp_path)
    batches = list(found.batches(4))
    assert (found.count, found.shape) == (7, batches[0].shape[1:])
    assert [len(batch) for batch in batches] == [4, 3]
    assert np.array_equal(np.concatenate(batches), images.transpose(0, 3, 1, 2))


def test_palettes_and_transparency_become_rgb(tmp_path):
    Image.fromarray(COLOUR[0]).convert("RGBA").save(tmp_path / "0.png")
    Image.fromarray(COLOUR[0]).convert("P").save(tmp_path / "1.png")
    (batch,) = open_images(tmp_path).batches(256)
    assert batch.shape == (2, 3, 5, 6)
    assert np.array_equal(batch[0], COLOUR[0].transpose(2, 0, 1))


def test_images_of_different_sizes(tmp_path):
    Image.fromarray(COLOUR[0]).save(tmp_path / "0.png")
    Image.fromarray(COLOUR[0, :4]).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"1.png is \(3, 4, 6\) \(C, H, W\), but .*0.png is \(3, 5, 6\)"):
        open_images(tmp_path)


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "0.png").write_text("hello")
    with pytest.raises(DataError, match=r"0.png is not an image"):
        open_images(tmp_path)


def test_an_image_that_is_cut_off_is_found_when_it_is_read(tmp_path):
    Image.fromarray(COLOUR[0]).save(tmp_path / "0.png")
    content = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(content[:60])
    with pytest.raises(DataError, match=r"0.png is not an image"):
        list(open_images(tmp_path).batches(256))


def test_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="No images at"):
        open_images(tmp_path)


def test_only_the_arrays_that_are_asked_for(tmp_path):
    np.savez(tmp_path / "both.npz", COLOUR, mu=np.zeros(4, dtype=np.float32), other=np.array([{}], dtype=object))
    assert list(npz_arrays(tmp_path / "both.npz", "mu", "sigma")) == ["mu"]
    assert has_images(tmp_path / "both.npz")
    with pytest.raises(DataError, match="cannot be read"):
        npz_arrays(tmp_path / "both.npz", "other")  # pickled
