import numpy as np

from kdfast.data.readers.archives.digits import open_digits


def test_split_is_fixed_and_stratified():
    source = open_digits()
    assert (len(source.train), len(source.test)) == (1442, 355)
    counts = np.bincount(source.test.labels)
    assert counts.tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert source.fingerprint == open_digits().fingerprint
    assert (source.view_spec.pad, source.view_spec.flip, source.view_spec.count) == (1, False, 9)
    pixels = source.train.read(range(100))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_splits_cover_the_bundle():
    from sklearn.datasets import load_digits

    source = open_digits()
    both = np.concatenate([split.read(range(len(split)))[..., 0] for split in (source.train, source.test)])
    bundle = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in bundle)
