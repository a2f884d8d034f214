"""What samples are scored against: the cache, the ADM suite's files, and what `sddit reference` builds."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sddit.data import open_manifest
from sddit.data.shards import Shards, write_shards
from sddit.errors import DataError, UsageError
from sddit.metrics import reference
from sddit.metrics.features import get_extractor
from sddit.metrics.fidelity import evaluate_images
from sddit.metrics.images import images_in
from sddit.metrics.reference import (
    PARTS,
    Source,
    build_reference,
    noise_floor,
    of_manifest,
    open_reference,
    subset_indices,
)
from sddit.metrics.statistics import Moments, frechet_distance

DIGITS = Shards(open_manifest("digits")).read(np.arange(1797))[0]  # (1797, 1, 8, 8)
ALL = tuple(PARTS)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SDDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def digits() -> Source:
    return of_manifest(open_manifest("digits"))


def features(images) -> dict[str, np.ndarray]:
    layers = get_extractor("digits-cnn", metrics=ALL).layers(torch.from_numpy(np.ascontiguousarray(images)))
    return {name: values.numpy() for name, values in layers.items()}


def moments(values) -> Moments:
    found = Moments()
    found.update(values)
    return found


def forbid_computing(monkeypatch):
    monkeypatch.setattr(reference, "_compute", None)


# ------------------------------------------------------------------------------------------------------------ the cache


def test_statistics_are_those_of_all_images_and_kept(cache, monkeypatch):
    extractor, expected = get_extractor("digits-cnn", metrics=ALL), features(DIGITS)
    first = digits().load(extractor, ALL)
    assert (first.count, first.digest, first.subset_digest) == (1797, open_manifest("digits").digest, None)
    for found, layer in ((first.moments, "features"), (first.spatial, "spatial")):
        np.testing.assert_allclose(found.mean, expected[layer].mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.covariance, np.cov(expected[layer], rowvar=False), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first.subset, expected["features"], rtol=1e-5, atol=1e-5)
    assert first.subset.dtype == np.float32
    (file,) = (cache / "reference").iterdir()
    assert file.suffix == ".npz"
    forbid_computing(monkeypatch)
    again = digits().load(extractor, ALL)
    assert np.array_equal(again.moments.covariance, first.moments.covariance)
    assert np.array_equal(again.spatial.mean, first.spatial.mean) and np.array_equal(again.subset, first.subset)


def test_only_what_is_needed_is_computed_and_parts_join(cache, monkeypatch):
    extractor = get_extractor("digits-cnn", metrics=ALL)
    assert digits().load(extractor, ["is"]).moments is None
    assert not (cache / "reference").exists(), "the Inception score needs no reference"
    first = digits().load(extractor, ["fid"])
    assert first.spatial is None and first.subset is None
    digits().load(extractor, ["kid"])
    digits().load(extractor, ["sfid"])
    assert len(list((cache / "reference").iterdir())) == 1
    forbid_computing(monkeypatch)
    again = digits().load(extractor, ALL)
    assert np.array_equal(again.moments.covariance, first.moments.covariance)


def test_an_entry_of_an_older_version_serves(cache, monkeypatch):
    """Those had the moments of the features alone."""
    extractor = get_extractor("digits-cnn")
    first = digits().load(extractor, ["fid"])
    (file,) = (cache / "reference").iterdir()
    with np.load(file) as entry:
        old = entry["moments"]
    np.savez(file, moments=old)
    with monkeypatch.context() as patch:
        forbid_computing(patch)
        assert np.array_equal(digits().load(extractor, ["fid"]).moments.mean, first.moments.mean)
    digits().load(extractor, ["kid"])
    forbid_computing(monkeypatch)
    digits().load(extractor, ["fid", "precision"])


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_a_torn_entry_is_computed_again(cache, keep):
    extractor = get_extractor("digits-cnn")
    first = digits().load(extractor, ["fid"])
    (file,) = (cache / "reference").iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    assert np.array_equal(digits().load(extractor, ["fid"]).moments.covariance, first.moments.covariance)
    assert len(os.listdir(cache / "reference")) == 1


def test_a_cache_that_cannot_be_written_costs_time_only(cache, caplog):
    open_manifest("digits")
    (cache / "reference").write_text("in the way")
    assert digits().load(get_extractor("digits-cnn"), ["fid"]).count == 1797
    assert "were not kept" in caplog.text
    with pytest.raises(DataError, match="Set SDDIT_CACHE"):  # but building is for keeping
        build_reference(digits(), get_extractor("digits-cnn"), ["fid"])


def test_statistics_of_other_data_are_kept_apart(cache, tmp_path):
    extractor = get_extractor("digits-cnn")
    labels = np.zeros(300, dtype=np.int64)
    manifest = write_shards(DIGITS[:300], labels, tmp_path / "set", name="digits", num_classes=1)
    assert digits().load(extractor, ["fid"]).count == 1797
    assert of_manifest(manifest).load(extractor, ["fid"]).count == 300


def test_a_subset_is_fixed_and_does_not_depend_on_batches(cache, monkeypatch):
    monkeypatch.setattr(reference, "SUBSET", 100)
    chosen = subset_indices(1797)
    assert len(set(chosen)) == 100 and list(chosen) == sorted(chosen) and chosen.max() > 1500
    assert np.array_equal(subset_indices(99), np.arange(99))
    extractor, expected = get_extractor("digits-cnn"), features(DIGITS)["features"][chosen]
    alone = digits().load(extractor, ["kid"]).subset
    np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(reference, "BATCH", 17)
    monkeypatch.setenv("SDDIT_CACHE", str(cache / "another"))
    together = digits().load(extractor, ["fid", "kid"]).subset
    np.testing.assert_allclose(together, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ the noise floor


def test_noise_floor_of_digits_is_kept(cache, monkeypatch):
    extractor = get_extractor("digits-cnn")
    floor = noise_floor(digits(), extractor, 1024)
    assert 2 < floor["mean"] < 4 and 0 < floor["sd"] < 0.5 and floor["draws"] == 5
    (file,) = (cache / "reference").glob("*-noise-1024.json")
    with monkeypatch.context() as patch:
        patch.setattr(reference, "Moments", None)  # nothing is computed
        assert noise_floor(digits(), extractor, 1024) == floor
    file.write_text(file.read_text()[:-5])
    assert noise_floor(digits(), extractor, 1024) == floor, "a torn entry is computed again"
    assert noise_floor(digits(), extractor, 256)["mean"] > 2 * floor["mean"]


def test_noise_floor_is_that_of_the_images_drawn(cache, monkeypatch):
    """As often as they are drawn, in whatever batches they are read, and from whatever they are read."""
    extractor, real = get_extractor("digits-cnn"), moments(features(DIGITS)["features"])
    scores = []
    for draw in range(5):
        images = DIGITS[reference._draw(draw, 300, 1797)]
        assert len(np.unique(images, axis=0)) < 300
        part = moments(features(images)["features"])
        scores.append(frechet_distance(part.mean, part.covariance(), real.mean, real.covariance()))
    expected = {"mean": np.mean(scores), "sd": np.std(scores, ddof=1), "draws": 5}
    assert noise_floor(digits(), extractor, 300) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(reference, "BATCH", 17)
    assert noise_floor(Source("some", images_in(DIGITS)), extractor, 300) == pytest.approx(expected, rel=1e-5)


def test_noise_floor_reads_what_is_drawn(cache):
    source, read = digits(), []
    source.load(get_extractor("digits-cnn"), ["fid"])
    watched = dataclasses.replace(source, read=lambda indices: read.extend(indices) or source.read(indices))
    noise_floor(watched, get_extractor("digits-cnn"), 50)
    assert read == sorted(set(read)) and len(read) <= 5 * 50


def test_noise_floor_needs_the_images_and_no_cache(cache, tmp_path, inception, caplog):
    cache.write_text("in the way")
    source = Source("some", images_in(DIGITS))
    assert noise_floor(source, get_extractor("digits-cnn"), 100)["mean"] > 4
    assert "The noise floor was not kept" in caplog.text
    adm_file(tmp_path / "virtual.npz")
    with pytest.raises(UsageError, match="does not hold all images"):
        noise_floor(open_reference(tmp_path / "virtual.npz"), inception, 100)


# ----------------------------------------------------------------------------------------- the ADM suite's .npz files


@pytest.fixture
def inception():
    """digits-cnn under Inception's name, by which a file's statistics go; Inception's weights do not ship."""
    extractor = get_extractor("digits-cnn", metrics=ALL)
    extractor.name = "inception-v3-compat"
    return extractor


def adm_file(path: Path, *, images=DIGITS[:50], spatial=True) -> dict[str, np.ndarray]:
    real = features(DIGITS)
    arrays = {"mu": real["features"].mean(0), "sigma": np.cov(real["features"], rowvar=False)}
    if spatial:
        arrays |= {"mu_s": real["spatial"].mean(0), "sigma_s": np.cov(real["spatial"], rowvar=False)}
    if images is not None:
        arrays["arr_0"] = images.transpose(0, 2, 3, 1)
    np.savez(path, **arrays)
    return arrays


def test_statistics_win_over_the_images_beside_them(cache, tmp_path, inception):
    arrays = adm_file(tmp_path / "virtual.npz")
    source = open_reference(tmp_path / "virtual.npz")
    assert (source.count, source.shape, source.default_extractor) == (50, (1, 8, 8), "inception-v3-compat")
    source.check(inception.name, ALL, (1, 8, 8))
    found = source.load(inception, ALL)
    assert found.count is None, "the statistics are of more images than are in the file"
    for gaussian, suffix in ((found.moments, ""), (found.spatial, "_s")):
        assert np.array_equal(gaussian.mean, arrays[f"mu{suffix}"].astype(np.float64))
        assert np.array_equal(gaussian.covariance, arrays[f"sigma{suffix}"])
    np.testing.assert_allclose(found.subset, features(DIGITS[:50])["features"], rtol=1e-5, atol=1e-5)
    assert found.subset_digest
    alone = source.load(inception, ["fid", "sfid"])
    assert alone.subset is None and alone.subset_digest is None and alone.digest == found.digest


def test_images_serve_other_extractors(cache, tmp_path):
    adm_file(tmp_path / "virtual.npz")
    source = open_reference(tmp_path / "virtual.npz")
    source.check("digits-cnn", ALL)
    found = source.load(get_extractor("digits-cnn", metrics=ALL), ALL)
    assert found.count == 50 == len(found.subset) and found.subset_digest is None


@pytest.mark.parametrize(
    ("options", "extractor", "metric", "message"),
    [
        ({"spatial": False}, "inception-v3-compat", "sfid", "no mu_s and sigma_s, which sFID needs"),
        ({"images": None}, "inception-v3-compat", "recall", "has no images arr_0, which recall needs"),
        ({"images": None}, "digits-cnn", "fid", "has statistics of Inception features and no images"),
    ],
)
def test_what_a_file_cannot_serve(tmp_path, options, extractor, metric, message):
    adm_file(tmp_path / "virtual.npz", **options)
    source = open_reference(tmp_path / "virtual.npz")
    with pytest.raises(UsageError, match=message):
        source.check(extractor, [metric])


def test_statistics_of_another_width(tmp_path, inception):
    np.savez(tmp_path / "virtual.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UsageError, match="statistics of width 5, but inception-v3-compat gives 64"):
        open_reference(tmp_path / "virtual.npz").load(inception, ["fid"])
    np.savez(tmp_path / "odd.npz", mu=np.zeros(4), sigma=np.eye(3))
    with pytest.raises(DataError, match="must be"):
        open_reference(tmp_path / "odd.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(DataError, match="cannot be read"):
        open_reference(tmp_path / "pickled.npz")


# --------------------------------------------------------------------------------------------------- sddit reference


def test_what_is_built_can_be_given_back(cache, monkeypatch):
    extractor = get_extractor("digits-cnn", metrics=ALL)
    about = build_reference(digits(), extractor, ALL)
    path = Path(about["path"])
    assert about["bytes"] == path.stat().st_size and about["images"] == 1797 and about["shape"] == [1, 8, 8]
    assert (about["extractor"], about["extractor_digest"]) == ("digits-cnn", extractor.digest)
    assert about["parts"] == ["moments", "spatial", "subset"] and about["digest"] == open_manifest("digits").digest
    forbid_computing(monkeypatch)
    assert build_reference(digits(), extractor, ALL) == about
    expected = digits().load(extractor, ALL)
    for name in (path, path.stem, path.name):
        source = open_reference(name)
        assert (source.count, source.shape, source.default_extractor) == (1797, (1, 8, 8), "digits-cnn")
        source.check("digits-cnn", ALL, (1, 8, 8))
        found = source.load(extractor, ALL)
        assert (found.digest, found.count) == (expected.digest, expected.count)
        assert np.array_equal(found.moments.covariance, expected.moments.covariance)
        assert np.array_equal(found.subset, expected.subset)


def test_a_file_names_no_code_that_is_run(cache, tmp_path):
    about = build_reference(digits(), get_extractor("digits-cnn"), ["fid"])
    with np.load(about["path"]) as file:
        content = {name: file[name] for name in file.files}
    content["about"] = np.array(str(content["about"]).replace('"digits-cnn"', '"somebodys_module:Class"'))
    np.savez(tmp_path / "theirs.npz", **content)
    with pytest.raises(UsageError, match=r"theirs\.npz names the extractor somebodys_module:Class, which"):
        evaluate_images(DIGITS[:50].transpose(0, 2, 3, 1), str(tmp_path / "theirs.npz"), None, ["fid"])


def test_what_does_not_fit_what_was_built(cache):
    extractor = get_extractor("digits-cnn")
    source = open_reference(build_reference(digits(), extractor, ["fid"])["path"])
    with pytest.raises(UsageError, match="was built with digits-cnn, so it cannot serve inception-v3-compat"):
        source.check("inception-v3-compat", ["fid"])
    with pytest.raises(UsageError, match="was built without what KID needs"):
        source.check("digits-cnn", ["fid", "kid"])
    with pytest.raises(UsageError, match=r"images are 16×16 with 3 channels, but the reference is 8×8 with 1 channels"):
        source.check("digits-cnn", ["fid"], (3, 16, 16))
    extractor.digest = "another"
    with pytest.raises(UsageError, match="built with other weights"):
        source.load(extractor, ["fid"])


def test_a_built_file_that_is_cut_off(cache):
    path = Path(build_reference(digits(), get_extractor("digits-cnn"), ["fid"])["path"])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        open_reference(path)
    np.savez(path, about=np.array("{}"))
    with pytest.raises(DataError, match="is not what sddit reference built"):
        open_reference(path)


def test_nothing_to_build(tmp_path, inception):
    adm_file(tmp_path / "virtual.npz", images=None)
    with pytest.raises(UsageError, match="There is nothing to build"):
        build_reference(open_reference(tmp_path / "virtual.npz"), inception, ["fid"])
    with pytest.raises(UsageError, match="There is nothing to build"):
        build_reference(digits(), get_extractor("digits-cnn", metrics=["is"]), ["is"])


def test_images_of_which_the_last_batch_has_none_of_the_subset(cache, monkeypatch):
    monkeypatch.setattr(reference, "SUBSET", 3)
    monkeypatch.setattr(reference, "BATCH", 2)
    source = Source("some", images_in(DIGITS[:40]))
    assert source.load(get_extractor("digits-cnn"), ["kid"]).subset.shape == (3, 64)
